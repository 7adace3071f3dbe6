"""The command ``ghostify``: one sub-command for each verb of the library, same names and defaults."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

import torch
import typer

from ghostify import __version__
from ghostify.cli_compare import compare_command
from ghostify.cli_distill import distill_command
from ghostify.cli_export import check_shown, describe_command, export_command
from ghostify.cli_inputs import calibration_images, example_for, read_text
from ghostify.cli_options import (  # fmt: skip
    BackendName,
    BudgetTexts,
    CalibrationData,
    DwSize,
    Fusion,
    Images,
    Json,
    Keep,
    Model,
    Overrides,
    Placement,
    Pretrained,
    Ratio,
    Seed,
    Sensitivity,
    Shape,
    Skip,
    Threads,
    Weights,
    check_none_ignored,
    chosen_backend,
    read_budget,
    read_overrides,
    show,
    stored,
    trained,
)
from ghostify.conversion import INITIALISERS, apply, check_initialiser
from ghostify.deployment import export_onnx, save
from ghostify.deployment.artefact import check_replaceable, model_plan
from ghostify.errors import GhostifyError
from ghostify.files import atomic_file
from ghostify.planning import check_goal, plan
from ghostify.spec import GhostSpec, Plan
from ghostify.zoo import is_onnx, load_model

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _show_version(asked: bool) -> None:
    if asked:
        show(f"ghostify {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the versions and end")
    ] = False,
) -> None:
    """Turn a trained CNN into a Ghost network: plan, convert, distil, compare, export."""


@app.command(
    "plan",
    epilog="Example: ghostify plan torchvision:resnet18 --ratio 2 --override 'layer4.*=3' --out plan.json",
)
def plan_command(
    context: typer.Context,
    model: Model,
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    fusion: Fusion = "concat",
    placement: Placement = "linear",
    skip: Skip = None,
    override: Overrides = None,
    input_shape: Shape = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="store the plan in this JSON file")] = None,
    keep: Keep = None,
    budget: BudgetTexts = None,
    backend: BackendName = None,
    threads: Threads = 1,
    sensitivity: Sensitivity = "explained",
    calibration: CalibrationData = None,
    images: Images = 512,
    weights: Weights = None,
    pretrained: Pretrained = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Show, before anything is changed, what happens to every convolution and what it saves."""
    check_none_ignored(context)
    spec, overrides, limits = _spec(ratio, dw_size, fusion, placement), read_overrides(override), read_budget(budget)
    chosen = chosen_backend(backend, threads, limits)
    check_goal(keep, limits, chosen, sensitivity, None, calibrated=calibration is not None)
    network = load_model(model) if keep is None and not budget else trained(model, pretrained, weights)
    inputs = calibration_images(calibration, images, seed)
    made = plan(
        network,
        example_inputs=inputs[:1] if inputs is not None else example_for(network, model, input_shape),
        spec=spec,
        skip=skip or (),
        overrides=overrides,
        keep=keep,
        budget=limits,
        backend=chosen,
        sensitivity=sensitivity,
        calibration=inputs,
    )
    if out is not None:
        with atomic_file(out) as temporary:
            temporary.write_text(made.to_json(), encoding="utf-8")
    show(made.to_json() if as_json else f"{made}{stored(out)}")


@app.command(
    "convert",
    epilog="Example: ghostify convert torchvision:resnet18 --weights resnet18.pth --plan plan.json --out small",
)
def convert_command(
    context: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the converted model, or a file .onnx")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="a stored plan; else one is made")] = None,
    ratio: Ratio = 2.0,
    dw_size: DwSize = 3,
    fusion: Fusion = "concat",
    placement: Placement = "linear",
    skip: Skip = None,
    override: Overrides = None,
    keep: Keep = None,
    budget: BudgetTexts = None,
    backend: BackendName = None,
    threads: Threads = 1,
    sensitivity: Sensitivity = "explained",
    calibration: CalibrationData = None,
    images: Images = 512,
    initialiser: Annotated[str | None, typer.Option(help=f"one of {', '.join(INITIALISERS)}")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_shape: Shape = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Replace convolutions by Ghost units that start from the old weights, and store the result, or export it."""
    check_none_ignored(context)
    # What may be wrong is read before data, which take longer.
    made = None if plan_file is None else Plan.from_json(read_text(plan_file))
    spec, overrides, limits = _spec(ratio, dw_size, fusion, placement), read_overrides(override), read_budget(budget)
    chosen = chosen_backend(backend, threads, limits)
    check_goal(keep, limits, chosen, sensitivity, None, calibrated=calibration is not None)
    if initialiser is not None:
        check_initialiser(initialiser, calibrated=calibration is not None)
    if not is_onnx(str(out)):
        check_replaceable(out)
    network = trained(model, pretrained, weights)
    inputs = calibration_images(calibration, images, seed)
    example = inputs[:1] if inputs is not None else example_for(network, model, input_shape)
    if made is None:
        made = plan(
            network,
            example_inputs=example,
            spec=spec,
            skip=skip or (),
            overrides=overrides,
            keep=keep,
            budget=limits,
            backend=chosen,
            sensitivity=sensitivity,
            calibration=inputs if keep is not None or budget else None,
        )
    student = apply(made, network, calibration=inputs, initialiser=initialiser, example_inputs=example, seed=seed)
    started = model_plan(student)
    told = stored(out)
    if is_onnx(str(out)):
        with check_shown(as_json):
            check = export_onnx(student, out, example_inputs=example)
        told = f"\n\n{check}"
    else:
        save(student, out)
    show(started.to_json() if as_json else f"{started}{told}")


app.command(
    "distill",
    epilog="Example: ghostify distill my.models:resnet20 small --weights resnet20.safetensors "
    "--data parquet:cifar10 --epochs 30 --out run",
)(distill_command)


app.command(
    "compare",
    epilog="Example: ghostify compare my.models:resnet20 run/student --weights resnet20.safetensors "
    "--data parquet:cifar10 --out report.html",
)(compare_command)


app.command(
    "export", epilog="Example: ghostify export my.models:resnet20 run/student --input-shape 3,32,32 --out small.onnx"
)(export_command)
app.command("describe", epilog="Example: ghostify describe small.onnx --json")(describe_command)


@app.command("demo", epilog="Example: ghostify demo --out demo-run")
def demo_command(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for everything that is made")] = Path("demo-run"),
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The whole way on 5,000 handwritten digits: train, ghostify, distil, compare, store, export."""
    from ghostify.demo import run_demo

    report = run_demo(out, seed=seed, say=lambda line: show(line, sys.stderr if as_json else sys.stdout))
    if as_json:
        show(report.to_json())


def main() -> NoReturn:
    """Run the command: exit status 0, 1 for an error that is told in one line, 2 for wrong usage."""
    warnings.showwarning = _short_warning
    try:
        app()
    except GhostifyError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        sys.stdout = None  # else Python complains once more when it flushes
        sys.exit(1)
    except Exception as error:
        if os.environ.get("GHOSTIFY_DEBUG"):
            raise
        sys.stdout = None  # it may be what failed
        _fail(f"{type(error).__name__}: {error}. This was not foreseen; GHOSTIFY_DEBUG=1 shows where it happened.")
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(f"ghostify: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _short_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings in one line, without the line of code."""
    print(f"note: {message}", file=file or sys.stderr)


def _spec(ratio: float, dw_size: int, fusion: str, placement: str) -> GhostSpec:
    # GhostSpec itself checks the words.
    return GhostSpec(ratio, dw_size, fusion, placement)  # type: ignore[arg-type]
