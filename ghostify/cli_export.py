"""The sub-commands ``ghostify export`` and ``ghostify describe``: ONNX files out, in floats or 8 bits; their notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ghostify.cli_inputs import example_for, sample
from ghostify.cli_options import Json, Model, OptionalData, Shape, Student, check_none_ignored, show
from ghostify.deployment import (
    ExportCheck,
    ExportConfig,
    QuantisationCheck,
    QuantisationConfig,
    export_onnx,
    load,
    quantise_onnx,
    read_notes,
)
from ghostify.deployment.quantisation import RANGES
from ghostify.distillation import load_data
from ghostify.errors import ExportError, InputsError, OptionError
from ghostify.zoo import load_model


def export_command(
    context: typer.Context,
    model: Model,
    student: Student,
    out: Annotated[Path, typer.Option("--out", "-o", help="the ONNX file")],
    input_shape: Shape = None,
    data: OptionalData = None,
    agreement: Annotated[
        float | None,
        typer.Option(help="least share of the data that must be told the same class  [default: 0.99; of --int8 0.9]"),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="largest difference, as a share of the largest output  [default: 0.001; of --int8 0.25]"),
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="time both models in onnxruntime, in turn")] = False,
    dynamic_size: Annotated[bool, typer.Option("--dynamic-size", help="let height and width be dynamic, too")] = False,
    opset: Annotated[int | None, typer.Option(help="version of the operator set")] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="weights and activations in 8 bits, ranges from training images of --data")
    ] = False,
    images: Annotated[int | None, typer.Option(min=1, help="with --int8: how many of them  [default: 512]")] = None,
    ranges: Annotated[
        str | None, typer.Option(help=f"with --int8: one of {', '.join(RANGES)}  [default: minmax]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a converted model as ONNX, checked in onnxruntime before the file appears."""
    check_none_ignored(context)
    gate, eight = _given(agreement=agreement, tolerance=tolerance), _given(images=images, ranges=ranges)
    if eight and not int8:
        name, value = next(iter(eight.items()))
        raise OptionError(f"{name}={value!r} is of --int8 alone. Leave it out, or add --int8.")
    if int8 and data is None:
        raise InputsError("int8: 8-bit ranges come from images. Name a data set with --data, too.")
    quantisation = QuantisationConfig(**gate, **eight) if int8 else None
    config = None if int8 else ExportConfig(**gate, dynamic_size=dynamic_size, opset=opset)
    base = load_model(model)
    small = load(student, base=base)
    splits = None if data is None else load_data(data)
    test = None if splits is None else splits.test
    check: ExportCheck | QuantisationCheck
    with check_shown(as_json):
        if quantisation is not None and splits is not None:
            seen = sample(splits, quantisation.images)
            check = quantise_onnx(small, out, calibration=seen, data=test, config=quantisation)
        else:
            example = sample(splits, 1) if splits is not None and input_shape is None else None
            check = export_onnx(
                small,
                out,
                example_inputs=example_for(base, model, input_shape) if example is None else example,
                data=test,
                original=base if latency else None,
                config=config,
            )
    show(check.to_json() if as_json else str(check))


def _given(**options: Any) -> dict[str, Any]:
    """Those that were given: what they are by default, the library knows."""
    return {name: value for name, value in options.items() if value is not None}


def describe_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="an ONNX file")], as_json: Json = False
) -> None:
    """Show what an ONNX file tells about itself: who wrote it, inputs, outputs, and the plan."""
    notes = read_notes(file)
    show(notes.to_json() if as_json else str(notes))


@contextmanager
def check_shown(as_json: bool) -> Iterator[None]:
    """Print a check that failed before the error goes on."""
    try:
        yield
    except ExportError as error:
        if error.check is None:
            raise
        show(error.check.to_json() if as_json else error.check.table())
        raise ExportError(error.message) from error
