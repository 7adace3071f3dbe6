"""What holds the package together: the direction of imports, the facade, a light import."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import ghostify

PACKAGE = Path(ghostify.__file__).parent
BASE = ["errors", "spec", "extras", "files"]
STAGES = ["nn", "tracing", "planning", "conversion", "distillation", "reporting", "deployment"]
HEAVY = [
    "matplotlib",
    "jinja2",
    "onnx",
    "onnxruntime",
    "torchvision",
    "timm",
    "sklearn",
    "pyarrow",
    "accelerate",
    "pandas",
]


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


@pytest.mark.parametrize("name", [name for name in ghostify.__all__ if inspect.isroutine(getattr(ghostify, name))])
def test_every_parameter_is_described(name):
    """In the function's own docstring, or in that of the one it refers to for its arguments."""
    function = getattr(ghostify, name)
    documentation = inspect.getdoc(function)
    if name == "convert":
        documentation += inspect.getdoc(ghostify.plan) + inspect.getdoc(ghostify.apply)
    missing = [p for p in inspect.signature(function).parameters if f"\n    {p}: " not in documentation]
    assert not missing


@pytest.mark.parametrize("name", [name for name in ghostify.__all__ if inspect.isclass(getattr(ghostify, name))])
def test_every_field_is_described(name):
    kind = getattr(ghostify, name)
    documentation = inspect.getdoc(kind)
    parameters = [] if issubclass(kind, BaseException) else inspect.signature(kind).parameters
    # Several may share an entry ("kernel_size: As in nn.Conv2d; so are the next six").
    missing = [p for p in parameters if f"\n    {p}: " not in documentation and not p.startswith("_")]
    assert not missing
