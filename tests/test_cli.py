"""The command, run in a process of its own where its exit status and its streams count."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ghostify import cli, cli_distill
from ghostify.cli import app, main
from ghostify.nn.cifar import resnet20
from ghostify.spec import Plan

REPOSITORY = Path(__file__).resolve().parents[1]
RESNET = "ghostify.nn.cifar:resnet20"


def ghostify(*arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "ghostify", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["plan", "convert", "distill", "compare", "export", "describe", "demo"])
def test_help_has_an_example(command):
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: ghostify {command}" in " ".join(shown.output.split())


def test_the_whole_way(called, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from ghostify.nn.cifar import CifarResNet\ndef digits_net():\n    return CifarResNet(1, in_channels=1)\n"
    )

    def done(*arguments):
        status, out, error = called(*arguments)
        assert status == 0, error
        return out

    model, shape = "nets:digits_net", ("--input-shape", "1,8,8")
    planned = done("plan", model, *shape, "--override", "layer1.*=keep", "--out", "plan.json")
    assert "kept by override 'layer1.*'" in planned
    done("convert", model, "--plan", "plan.json", "--calibration", "digits", "--images", "64", "--out", "small")
    distilled = done(
        "distill", model, "small", "--data", "digits", "--epochs", "1", "--out", "run", "--cache-teacher", "--json"
    )
    assert [epoch["epoch"] for epoch in json.loads(distilled)] == [1]
    assert json.loads((tmp_path / "run/history.json").read_text())["config"]["cache_teacher"]
    report = json.loads(
        done(
            "compare", model, "run/student", "--data", "digits", "--history", "run/history.json", "--out", "page.html",
            "--json",
        )
    )  # fmt: skip
    assert report["compressed"]["params"] < report["original"]["params"]
    assert report["accuracy"]["examples"] == 359
    assert len(report["history"]) == 1
    assert (tmp_path / "page.html").is_file()
    done("export", model, "run/student", *shape, "--out", "small.onnx")
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
        (["plan", RESNET, "--ratio", "2", "--keep", "0.9", "--calibration", "digits"], "--ratio 2.0 would be ignored"),
        (["plan", RESNET, "-s", "3", "--budget", "macs=0.5"], "--budget ['macs=0.5'] decides that"),
        (["plan", RESNET, "--budget", "macs=0.5", "--budget", "macs=0.6"], "budget='macs=0.6' and macs=0.5"),
        (["plan", RESNET, "--calibration", "digits", "--input-shape", "3,8,8"], "--input-shape 3,8,8 would be ignored"),
        (["convert", RESNET, "--plan", "p.json", "--keep", "0.9", "--out", "s"], "--plan p.json decides that"),
        (
            ["convert", RESNET, "--plan", "p.json", "--budget", "macs=0.5", "--skip", "a", "--out", "s"],
            "--skip ['a'], ",
        ),
    ],
)
def test_errors_are_one_line_and_status_1(called, arguments, told, tmp_path):
    status, out, error = called(*arguments)
    assert (status, out) == (1, "")
    assert error.startswith("ghostify: ")
    assert error.count("\n") == 1
    assert told in error
    assert not any(tmp_path.iterdir())


def test_a_network_without_trained_weights_is_told(called, tmp_path):
    status, _, told = called("convert", RESNET, "--out", "small")
    assert status == 0
    assert told.startswith(f"note: {RESNET} has the weights that it is made with, which may be random")
    torch.save(resnet20().state_dict(), tmp_path / "w.pth")
    status, _, told = called("compare", RESNET, "small", "--weights", "w.pth", "--json")
    assert (status, told) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--plan", "nowhere.json"), "nowhere.json"),
        (("--budget", "weight=0.5"), "budget="),
        (("--override", "conv1"), "conv1"),
        (("--budget", "latency=0.5", "--backend", "abacus"), "backend='abacus' is unknown"),
        (("--ratio", "0.5"), "ratio=0.5"),
        (("--input-shape", "3x"), "input-shape='3x'"),
        (("--initialiser", "best"), "initialiser='best' is unknown"),
        (("--initialiser", "alternating"), "initialiser='alternating' needs calibration"),
        (("--budget", "macs=0.5", "--sensitivity", "guessed"), "sensitivity='guessed' is unknown"),
        (("--budget", "macs=0.5", "--sensitivity", "measured"), "needs a budget, and calibration"),
        (("--keep", "0.9"), "keep=0.9 needs calibration"),
        (("--keep", "1.5", "--calibration", "digits"), "keep=1.5 is no share"),
        (("--out", "full"), "holds other files"),
        (("--out", "full/notes.txt"), "is a file, and a model is stored as a folder"),
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(called, tmp_path, monkeypatch, arguments, told):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    monkeypatch.setattr(cli, "trained", lambda *given: pytest.fail("a network was read"))
    status, _, error = called("convert", RESNET, "--out", "small", *arguments)
    assert status == 1
    assert told in error


def test_wrong_settings_of_a_distillation_are_told_before_anything_is_read(called, monkeypatch):
    monkeypatch.setattr(cli_distill, "trained", lambda *given: pytest.fail("a network was read"))
    status, _, error = called("distill", RESNET, "small", "--data", "digits", "--out", "run", "--loss", "kdd")
    assert status == 1
    assert "loss='kdd' is unknown" in error


def test_bad_files_are_told(called, tmp_path):
    status, _, told = called("convert", RESNET, "--plan", "nowhere.json", "--out", "small")
    assert status == 1
    assert "nowhere.json" in told
    called("convert", RESNET, "--out", "small")
    (tmp_path / "h.json").write_text('{"epochs": [{"epoch": 1, "loss": "low"}]}')
    status, _, told = called("compare", RESNET, "small", "--history", "h.json")
    assert status == 1
    assert "not a ghostify history: epochs.0.loss" in told


def test_a_folder_that_saving_would_empty_is_refused_before_the_training(called, tmp_path):
    (tmp_path / "run" / "student").mkdir(parents=True)
    (tmp_path / "run" / "student" / "thesis.tex").write_text("")
    status, _, told = called("distill", RESNET, "nowhere", "--data", "digits", "--out", "run")
    assert status == 1
    assert "holds other files (thesis.tex)" in told


def test_what_was_not_foreseen_is_one_line_too(called, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("on\npurpose")

    monkeypatch.setattr("ghostify.cli.plan", broken)
    status, out, told = called("plan", RESNET)
    assert (status, out) == (1, "")
    assert told == (
        "ghostify: ZeroDivisionError: on purpose. This was not foreseen; GHOSTIFY_DEBUG=1 shows where it happened.\n"
    )
    monkeypatch.setenv("GHOSTIFY_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["ghostify", "plan", RESNET])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_behind_standard_output_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ghostify", "plan", RESNET],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("ghostify: OSError: [Errno 28] No space left")
    assert done.stderr.count("\n") == 1


def test_versions_are_told_as_an_issue_needs_them(called):
    status, out, _ = called("--version")
    assert status == 0
    assert out.startswith(f"ghostify {version('ghostify')}, torch {torch.__version__}, Python 3.")


def test_wrong_usage_is_status_2(called):
    for wrong in (["--images", "0"], ["--seed", "-1"], ["--seed", str(2**63)]):
        status, _, told = called("convert", RESNET, "--out", "small", *wrong)
        assert status == 2
        assert wrong[0] in told
    for arguments in (["plan"], ["plan", RESNET, "--ratio", "two"], ["prune", RESNET]):
        assert called(*arguments)[0] == 2


@pytest.mark.slow
def test_demo(tmp_path):
    done = ghostify("demo", "--out", "made", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    top1 = json.loads(done.stdout)["accuracy"]["top1"]
    assert top1["original"] > 0.97
    assert top1["compressed"] > top1["original"] - 0.01
    made = {path.name for path in (tmp_path / "made").iterdir()}
    assert {"report.html", "report.json", "student", "student.onnx"} <= made
