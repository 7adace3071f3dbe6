"""Options that several sub-commands share, and how they load and answer."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer
from torch import nn

from ghostify.backends.runners import RUNNERS, Backend
from ghostify.errors import OptionError
from ghostify.planning import Budget, Override
from ghostify.planning.limits import check_limit
from ghostify.zoo import is_onnx, load_model

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, package.module:factory or FILE.onnx")
]
Student = Annotated[Path, typer.Argument(metavar="STUDENT", help="folder of a converted model")]
Weights = Annotated[Path | None, typer.Option("--weights", help="file of trained weights for MODEL")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="take the library's own trained weights")]


def _checked_shape(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"\d+([,x×]\d+)*", text):
        raise OptionError(f"input-shape={text!r} is not a list of numbers. Write it as 3,224,224.")
    return text


Shape = Annotated[
    str | None, typer.Option("--input-shape", callback=_checked_shape, help="shape of one input, such as 3,224,224")
]
Ratio = Annotated[float, typer.Option("--ratio", "-s", help="output channels / intrinsic channels, ≥ 1")]
DwSize = Annotated[int, typer.Option("--dw-size", "-d", help="side of the depthwise kernels, odd")]
Fusion = Annotated[str, typer.Option("--fusion", help="concat, add or mul")]
Placement = Annotated[str, typer.Option("--placement", help="linear or paper")]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="name or pattern of layers to keep; repeatable")]
Overrides = Annotated[
    list[str] | None, typer.Option("--override", help="PATTERN=RATIO, or PATTERN=keep, for single layers; repeatable")
]
_DATA = "digits, mnist, parquet:FOLDER, imagefolder:FOLDER, hf:NAME, wds:TRAIN,VAL or package.module:factory"
Data = Annotated[str, typer.Option("--data", help=_DATA)]
OptionalData = Annotated[str | None, typer.Option("--data", help=f"score on the test part of this data set: {_DATA}")]
Keep = Annotated[
    float | None,
    typer.Option("--keep", help="in place of --ratio: share of each layer's variance to keep; needs --calibration"),
]
BudgetTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        help="in place of --ratio: KEY=VALUE, what may be left of macs, params, size_bytes or latency, as a "
        "fraction, a whole number, milliseconds, or with a unit as 50% or 0.8ms; repeatable",
    ),
]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="with --budget: measure there, and replace no layer where it does not pay; "
        f"one of {', '.join(RUNNERS)}; onnxruntime if latency is limited",
    ),
]
Sensitivity = Annotated[
    str,
    typer.Option(
        "--sensitivity",
        help="with --budget: what a layer's loss counts: explained (its variance) or measured (what the answers lose "
        "when it alone is replaced; needs --calibration)",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=1, help="processor threads of the backend")]
CalibrationData = Annotated[
    str | None, typer.Option("--calibration", help="data set to measure and start the new layers on, as --data")
]
Images = Annotated[int, typer.Option("--images", min=1, help="how many of its training images")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="images in a batch")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="of everything random")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, and nothing else, on standard output")]


# Options beside which others would be ignored.
_CHIEFS: dict[str, tuple[str, ...]] = {
    "plan_file": (
        "ratio", "dw_size", "fusion", "placement", "skip", "override", "keep", "budget", "backend", "threads",
        "sensitivity",
    ),
    "keep": ("ratio",),
    "budget": ("ratio",),
    "calibration": ("input_shape",),
    "int8": ("latency", "dynamic_size", "opset", "input_shape"),
}  # fmt: skip
_NEED: dict[str, tuple[str, ...]] = {"beside": ("onnx", "threads", "images")}


def check_none_ignored(context: typer.Context) -> None:
    """Raise OptionError if an option is given that another one, or the lack of it, leaves nothing to decide.

    Args:
        context: Of a command that has some of these options.
    """
    names = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    given = {name for name in names if getattr(context.get_parameter_source(name or ""), "name", "") == "COMMANDLINE"}
    for chief, others in _CHIEFS.items():
        ignored = [f"{names[other]} {context.params[other]}" for other in others if other in given]
        if chief in given and ignored:
            raise OptionError(
                f"{', '.join(ignored)} would be ignored: {names[chief]} {context.params[chief]} decides that. Leave "
                "out one or the other."
            )
    for chief, others in _NEED.items():
        ignored = [f"{names[other]} {context.params[other]}" for other in others if other in given]
        if chief in names and chief not in given and ignored:
            raise OptionError(f"{', '.join(ignored)} would be ignored without {names[chief]}. Give that, too.")


def read_overrides(texts: list[str] | None) -> dict[str, Override]:
    """Read ``PATTERN=RATIO`` and ``PATTERN=keep``."""
    read: dict[str, Override] = {}
    for text in texts or []:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise OptionError(f"override={text!r} has no '='. Write PATTERN=RATIO or PATTERN=keep, as in 'layer4.*=3'.")
        try:
            read[pattern] = None if value == "keep" else float(value)
        except ValueError as error:
            raise OptionError(f"override={text!r}: {value!r} is neither a ratio nor 'keep'.") from error
    return read


def read_budget(texts: list[str] | None) -> Budget | None:
    """Read ``KEY=VALUE``; None if there is none."""
    read: dict[str, float | str] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise OptionError(f"budget={text!r} is not KEY=VALUE. Write it as macs=0.5 or latency=0.8ms.")
        if key in read:
            raise OptionError(f"budget={text!r} and {key}={read[key]} are both given. Pass one limit of each kind.")
        try:
            read[key] = float(value)
        except ValueError:
            read[key] = value
        check_limit(key, read[key])
    return read or None


def chosen_backend(name: str | None, threads: int, budget: Budget | None) -> Backend | None:
    """The backend from its two options; that of a limited latency if only the threads are given."""
    if name is not None:
        return Backend(name, threads)
    if budget is not None and "latency" in budget:
        return Backend(threads=threads)
    if threads != 1:
        raise OptionError(f"threads={threads} is given without a backend. Add --backend or --budget latency=0.7.")
    return None


def trained(name: str, pretrained: bool, weights: Path | None) -> nn.Module:
    """Load a model; one that was given no weights may well be random, which is said."""
    if weights is None and not pretrained and not is_onnx(name):
        show(
            f"note: {name} has the weights that it is made with, which may be random: neither --weights nor "
            "--pretrained is given",
            sys.stderr,
        )
    return load_model(name, pretrained=pretrained, weights=weights)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print at once, on standard output by default."""
    print(text, file=stream or sys.stdout, flush=True)


def stored(path: Path | None) -> str:
    """A line that says where a result is, if it is anywhere."""
    return "" if path is None else f"\nstored in {path}"
