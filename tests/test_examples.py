"""Every example is run, as a user would run it."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ghostify.nn.cifar import resnet20

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "data"


def run(name, *arguments, folder):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "examples" / name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_resnet(tmp_path):
    printed = run("ghostify_resnet.py", "--size", 64, folder=tmp_path)
    assert "ResNet: 19 of 20 convolutions become Ghost units" in printed
    assert "11,689,512 → " in printed
    assert {path.name for path in (tmp_path / "resnet18-ghost").iterdir()} == {"model", "model.onnx"}


@pytest.mark.slow
def test_mobilenet(tmp_path):
    printed = run("ghostify_mobilenet.py", "--size", 64, folder=tmp_path)
    assert "skipped by 'features.1.*'" in printed
    assert "depthwise: cheap already" in printed
    assert (tmp_path / "mobilenet-ghost" / "plan.json").is_file()


@pytest.mark.slow
def test_comparison(tmp_path):
    printed = run("compare_models.py", "--epochs", 2, folder=tmp_path)
    assert "top-1 accuracy" in printed
    written = {path.suffix for path in (tmp_path / "comparison").iterdir()}
    assert written == {".html", ".md", ".json", ".csv"}


@pytest.mark.parametrize("at_a_time", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_cifar10(tmp_path, at_a_time):
    tiny_cifar10(tmp_path)
    folders = ("--data", tmp_path, "--weights", tmp_path, "--out", tmp_path / "runs")
    sizes = ("--epochs", 1, "--images", 2, "--val", 8, "--batch", 8)
    run("cifar10.py", "--method", "random", "narrow", "--side-by-side", at_a_time, *sizes, *folders, folder=tmp_path)
    rows = {path: json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*/row.json"))}
    narrow, ghost = rows.values()  # by their folders' names
    assert (narrow["method"], ghost["method"]) == ("narrow", "random")
    assert narrow["macs"] == pytest.approx(ghost["macs"], rel=0.01)
    assert len(ghost["validation"]) == 1


def tiny_cifar10(folder):
    """Random pictures in the layout of the real ones, and random weights."""
    images, parquet = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        stored = []
        for pixels in torch.randint(256, (24, 32, 32, 3), generator=generator, dtype=torch.uint8):
            images.fromarray(pixels.numpy()).save(file := io.BytesIO(), "PNG")
            stored.append({"bytes": file.getvalue(), "path": ""})
        parquet.write_table(
            table({"img": stored, "label": [row % 10 for row in range(24)]}), folder / f"{split}-0.parquet"
        )
    save_file(resnet20().state_dict(), folder / "cifar10_resnet20.safetensors")


def test_all_examples_are_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    for example in (REPOSITORY / "examples").glob("*.py"):
        assert f'"{example.name}"' in text


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs CIFAR-10 and trained weights in ../shared/data")
@pytest.mark.parametrize(("initialiser", "least", "most"), [("alternating", 87.0, 91.8), ("random", 60.0, 85.0)])
def test_cifar10_resnet20(tmp_path, initialiser, least, most):
    printed = run("cifar10_resnet20.py", "--epochs", 3, "--initialiser", initialiser, folder=tmp_path)
    row = next(line for line in printed.splitlines() if line.startswith("top-1 accuracy")).split()
    assert float(row[2]) == pytest.approx(91.7, abs=0.1)
    assert least <= float(row[4]) <= most
