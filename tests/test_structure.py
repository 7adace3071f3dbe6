"""What holds the package together: the direction of imports, the facade, a light import."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ghostify

PACKAGE = Path(ghostify.__file__).parent
BASE = ["errors", "documents", "plan_text", "spec", "extras", "files", "measurements", "states"]
STAGES = ["nn", "tracing", "backends", "planning", "conversion", "distillation", "reporting", "deployment"]
HEAVY = [
    "scipy.optimize",
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
    "datasets",
    "webdataset",
    "tensorboard",
]


def imported_parts(source):
    """Parts of ghostify (stages and modules at the top) that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it points to"
            # `from ghostify import planning` names the part behind the import, everything else before it.
            names = [f"ghostify.{alias.name}" for alias in node.names] if node.module == "ghostify" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ghostify":
                yield parts[1] if len(parts) > 1 else "the facade"


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("from ghostify.planning.cost import conv_macs", "planning"),
        ("from ghostify import planning", "planning"),
        ("from ghostify import convert", "convert"),
        ("import ghostify.planning as p", "planning"),
        ("import ghostify", "the facade"),
        ("def f():\n    from ghostify.planning import plan", "planning"),
    ],
)
def test_no_form_of_import_escapes(source, part):
    assert list(imported_parts(source)) == [part]


def test_every_folder_is_a_stage():
    assert {file.parent.name for file in PACKAGE.glob("*/__init__.py")} == set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_imports_only_stages_on_its_left(stage):
    allowed = {*BASE, *STAGES[: STAGES.index(stage) + 1]}
    for file in (PACKAGE / stage).rglob("*.py"):
        assert set(imported_parts(file.read_text(encoding="utf-8"))) <= allowed, file.name


@pytest.mark.parametrize("module", BASE)
def test_the_base_imports_no_stage(module):
    assert set(imported_parts((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))) <= set(BASE)


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
    missing = [
        p for p in inspect.signature(function).parameters if not re.search(rf"\n    (?:\*\*)?{p}: ", documentation)
    ]
    assert not missing


@pytest.mark.parametrize("name", [name for name in ghostify.__all__ if inspect.isclass(getattr(ghostify, name))])
def test_every_field_is_described(name):
    kind = getattr(ghostify, name)
    documentation = inspect.getdoc(kind)
    parameters = [] if issubclass(kind, BaseException) else inspect.signature(kind).parameters
    missing = [p for p in parameters if f"\n    {p}: " not in documentation and not p.startswith("_")]
    assert not missing
