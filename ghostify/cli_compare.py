"""The sub-command ``ghostify compare``: original and converted model, and the forms in which they may be deployed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor, nn

from ghostify.backends.runners import backend_installed
from ghostify.cli_inputs import example_for, read_text, sample
from ghostify.cli_options import (
    Images,
    Json,
    Model,
    OptionalData,
    Pretrained,
    Shape,
    Student,
    Threads,
    Weights,
    check_none_ignored,
    show,
    stored,
    trained,
)
from ghostify.deployment import DeployedForms, FormsConfig, compare_deployed, load
from ghostify.distillation import Splits, load_data
from ghostify.distillation.history import read_history
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require
from ghostify.reporting import compare
from ghostify.reporting.report import check_format

_WITH = ("int8", "pruning")


def compare_command(
    context: typer.Context,
    model: Model,
    student: Student,
    data: OptionalData = None,
    out: Annotated[
        list[Path] | None, typer.Option("--out", "-o", help="write .html, .md, .json, .csv or .txt; repeatable")
    ] = None,
    history: Annotated[Path | None, typer.Option(help="history.json of a distillation, for its curves")] = None,
    weights: Weights = None,
    pretrained: Pretrained = False,
    input_shape: Shape = None,
    beside: Annotated[
        str | None,
        typer.Option(
            "--with",
            help="also compare as deployed in onnxruntime: int8 (both in 8 bits, ranges from --data), pruning (the "
            "original pruned to as many MACs), or int8,pruning",
        ),
    ] = None,
    images: Images = 512,
    threads: Threads = 1,
    onnx: Annotated[Path | None, typer.Option("--onnx", help="with --with: keep the ONNX files in this folder")] = None,
    as_json: Json = False,
) -> None:
    """Compare original and converted model: parameters, MACs, latency, and accuracy where data are given."""
    check_none_ignored(context)
    wanted = _read_with(beside, data)
    for path in out or []:
        check_format(path)
    epochs = () if history is None else read_history(read_text(history))
    original = trained(model, pretrained, weights)
    small = load(student, base=original)
    splits = None if data is None else load_data(data)
    example = sample(splits, 1) if splits is not None and input_shape is None else None
    example = example_for(original, model, input_shape) if example is None else example
    report = compare(
        original,
        small,
        example_inputs=example,
        data=None if splits is None else splits.test,
        history=epochs,
    )
    for path in out or []:
        report.save(path)
    config = FormsConfig(
        int8="int8" in wanted,
        pruning="pruning" in wanted,
        threads=threads,
        folder=onnx,
        quantisation=replace(FormsConfig().quantisation, images=images),
    )
    forms = _deployed(original, small, example, splits, config) if wanted else None
    if as_json:
        told = json.loads(report.to_json())
        show(json.dumps(told if forms is None else {**told, "deployed": json.loads(forms.to_json())}, indent=1))
    else:
        show(f"{report}{''.join(stored(path) for path in out or [])}")
        if forms is not None:
            show(f"\n{forms}{stored(onnx)}")


def _read_with(text: str | None, data: str | None) -> list[str]:
    """Read the names of ``--with``, and see that what they need is there."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in _WITH:
            raise OptionError(f"with={text!r}: {name!r} is unknown. Use int8, pruning, or int8,pruning.")
    if "int8" in names and data is None:
        raise InputsError(f"with={text!r}: 8-bit ranges come from images. Name a data set with --data, too.")
    if names:
        backend_installed("onnxruntime")
    if "pruning" in names:
        require("torch_pruning", extra="bench")
    return names


def _deployed(
    original: nn.Module, small: nn.Module, example: Tensor, splits: Splits | None, config: FormsConfig
) -> DeployedForms:
    return compare_deployed(
        original,
        small,
        example_inputs=example,
        calibration=None if splits is None else sample(splits, config.quantisation.images),
        data=None if splits is None else splits.test,
        config=config,
    )
