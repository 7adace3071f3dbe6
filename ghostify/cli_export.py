"""The sub-commands ``ghostify export`` and ``ghostify describe``: ONNX files out, and what they tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from ghostify.cli_inputs import example_for, sample
from ghostify.cli_options import Json, Model, OptionalData, Shape, Student, show
from ghostify.deployment import ExportCheck, ExportConfig, export_onnx, load, read_notes
from ghostify.distillation import load_data
from ghostify.errors import ExportError
from ghostify.zoo import load_model


def export_command(
    model: Model,
    student: Student,
    out: Annotated[Path, typer.Option("--out", "-o", help="the ONNX file")],
    input_shape: Shape = None,
    data: OptionalData = None,
    agreement: Annotated[float, typer.Option(help="least share of the data that must be told the same class")] = 0.99,
    tolerance: Annotated[float, typer.Option(help="largest difference, as a share of the largest output")] = 1e-3,
    latency: Annotated[bool, typer.Option("--latency", help="time both models in onnxruntime, in turn")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="let height and width be dynamic, too")] = False,
    opset: Annotated[int | None, typer.Option(help="version of the operator set")] = None,
    as_json: Json = False,
) -> None:
    """Write a converted model as ONNX, checked in onnxruntime before the file appears."""
    base = load_model(model)
    small = load(student, base=base)
    config = ExportConfig(agreement=agreement, tolerance=tolerance, dynamic_size=dynamic_size, opset=opset)
    splits = None if data is None else load_data(data)
    example = sample(splits, 1) if splits is not None and input_shape is None else None
    check = checked_export(
        small,
        out,
        example=example_for(base, model, input_shape) if example is None else example,
        data=None if splits is None else splits.test,
        original=base if latency else None,
        config=config,
        as_json=as_json,
    )
    show(check.to_json() if as_json else str(check))


def describe_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="an ONNX file")], as_json: Json = False
) -> None:
    """Show what an ONNX file tells about itself: who wrote it, inputs, outputs, and the plan."""
    notes = read_notes(file)
    show(notes.to_json() if as_json else str(notes))


def checked_export(
    model: nn.Module,
    out: Path,
    *,
    example: Tensor,
    config: ExportConfig,
    as_json: bool,
    data: Iterable[Any] | None = None,
    original: nn.Module | None = None,
) -> ExportCheck:
    """Export a model; a check that failed is printed before the error goes on."""
    try:
        return export_onnx(model, out, example_inputs=example, data=data, original=original, config=config)
    except ExportError as error:
        if error.check is None:
            raise
        show(error.check.to_json() if as_json else error.check.table())
        raise ExportError(error.message) from error
