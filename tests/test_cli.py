"""The command, run in a process of its own where its exit status and its streams count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ghostify.cli import app
from ghostify.spec import Plan

REPOSITORY = Path(__file__).resolve().parents[1]
RESNET = "ghostify.nn.cifar:resnet20"


def ghostify(*arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "ghostify", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["plan", "convert", "distill", "compare", "export", "demo"])
def test_help_has_an_example(command):
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: ghostify {command}" in " ".join(shown.output.split())


def test_the_whole_way(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from ghostify.nn.cifar import CifarResNet\ndef digits_net():\n    return CifarResNet(1, in_channels=1)\n"
    )
    model, shape = "nets:digits_net", ("--input-shape", "1,8,8")
    planned = ghostify("plan", model, *shape, "--override", "layer1.*=keep", "--out", "plan.json", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "kept by override 'layer1.*'" in planned.stdout
    converted = ghostify(
        "convert", model, "--plan", "plan.json", "--calibration", "digits", "--images", "64", "--out", "small",
        folder=tmp_path,
    )  # fmt: skip
    assert converted.returncode == 0, converted.stderr
    distilled = ghostify(
        "distill", model, "small", "--data", "digits", "--epochs", "1", "--out", "run", "--json", folder=tmp_path
    )
    assert distilled.returncode == 0, distilled.stderr
    assert [epoch["epoch"] for epoch in json.loads(distilled.stdout)] == [1]
    compared = ghostify(
        "compare", model, "run/student", "--data", "digits", "--history", "run/history.json", "--out", "page.html",
        "--json", folder=tmp_path,
    )  # fmt: skip
    assert compared.returncode == 0, compared.stderr
    report = json.loads(compared.stdout)
    assert report["compressed"]["params"] < report["original"]["params"]
    assert report["accuracy"]["examples"] == 359
    assert len(report["history"]) == 1
    assert (tmp_path / "page.html").is_file()
    exported = ghostify("export", model, "run/student", *shape, "--out", "small.onnx", folder=tmp_path)
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "small.onnx").is_file()


def test_plan_as_json(tmp_path):
    done = ghostify("plan", RESNET, "--ratio", "3", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Plan.from_json(done.stdout).replaced[0].spec.ratio == 3


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan", RESNET, "--ratio", "0.5"], "ratio=0.5"),
        (["plan", RESNET, "--dw-size", "4"], "dw_size=4"),
        (["plan", RESNET, "--fusion", "sum"], "fusion='sum'"),
        (["plan", RESNET, "--skip", "layre1.*"], "layer1"),
        (["plan", RESNET, "--override", "layer1"], "PATTERN=RATIO"),
        (["plan", RESNET, "--override", "layer1.*=x"], "neither a ratio nor 'keep'"),
        (["plan", RESNET, "--input-shape", "3x"], "input-shape='3x'"),
        (["plan", "ghostify.nn.cifar:resnet200"], "resnet20"),
        (["export", RESNET, "nowhere", "--out", "x.onnx"], "nowhere"),
        (["convert", RESNET, "--plan", "nowhere.json", "--out", "small"], "nowhere.json"),
    ],
)
def test_errors_are_one_line_and_status_1(arguments, told, tmp_path):
    done = ghostify(*arguments, folder=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ghostify: ")
    assert done.stderr.count("\n") == 1
    assert told in done.stderr
    assert not any(tmp_path.iterdir())


def test_wrong_usage_is_status_2(tmp_path):
    assert ghostify("plan", folder=tmp_path).returncode == 2
    assert ghostify("plan", RESNET, "--ratio", "two", folder=tmp_path).returncode == 2
    assert ghostify("prune", RESNET, folder=tmp_path).returncode == 2


@pytest.mark.slow
def test_demo(tmp_path):
    done = ghostify("demo", "--out", "made", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    top1 = json.loads(done.stdout)["accuracy"]["top1"]
    assert top1["original"] > 0.97
    assert top1["compressed"] > top1["original"] - 0.01
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"report.html", "report.json", "student", "student.onnx"} <= made
