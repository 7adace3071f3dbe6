"""What holds the package together: the direction of imports, the facade, a light import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ghostify

PACKAGE = Path(ghostify.__file__).parent
BASE = ["errors", "spec", "extras", "files"]
STAGES = ["nn", "tracing", "planning", "conversion", "distillation", "reporting", "deployment"]
HEAVY = ["matplotlib", "jinja2", "onnx", "onnxruntime", "torchvision", "timm", "sklearn", "pyarrow", "accelerate"]


def imported_parts(file):
    """Parts of ghostify (stages and modules at the top) that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ghostify" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_stages_on_its_left(stage):
    allowed = {*BASE, *STAGES[: STAGES.index(stage) + 1]}
    for file in (PACKAGE / stage).glob("*.py"):
        assert set(imported_parts(file)) <= allowed, file.name


@pytest.mark.parametrize("module", BASE)
def test_the_base_imports_no_stage(module):
    assert set(imported_parts(PACKAGE / f"{module}.py")) <= set(BASE)


def test_the_facade_is_sorted_and_documented():
    assert ghostify.__all__ == sorted(ghostify.__all__)
    for name in ghostify.__all__:
        assert getattr(ghostify, name).__doc__
        assert f"`{name}`" in ghostify.__doc__ or f"[ghostify.{name}]" in ghostify.__doc__, name


def test_importing_is_light():
    code = f"import sys, ghostify; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_can_be_read_in_one_sitting():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 350, file
