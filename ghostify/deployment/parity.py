"""Comparing an ONNX file in onnxruntime with the model that it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import nn

from ghostify.backends.onnx_program import named_outputs, with_batch
from ghostify.errors import ExportError, TraceError
from ghostify.tracing.example import Example


@dataclass(frozen=True)
class BatchCheck:
    """How far onnxruntime is from the model on one batch.

    Attributes:
        batch: Examples in the batch.
        source: ``random`` or ``example``.
        absolute: Largest absolute difference over all outputs.
        relative: Largest difference of an output tensor divided by the largest value in it.
        top1: Share of examples with the same highest score, in ``[0, 1]``; ``None`` where the first
            output is no table of scores ``(n, classes)``.
    """

    batch: int
    source: str
    absolute: float
    relative: float
    top1: float | None


@dataclass(frozen=True)
class ExportCheck:
    """What was exported, and the proof that it computes the same. Print it to read it.

    Attributes:
        path: The ONNX file.
        bytes: Its size.
        opset: Version of the operator set.
        tolerance: Largest relative error that was allowed.
        batches: One entry for every batch that was compared.
        ops: How often each operator occurs, most frequent first.
    """

    path: Path
    bytes: int
    opset: int
    tolerance: float
    batches: tuple[BatchCheck, ...]
    ops: dict[str, int]

    @property
    def absolute(self) -> float:
        """The largest absolute error of all batches."""
        return max(batch.absolute for batch in self.batches)

    @property
    def relative(self) -> float:
        """The largest relative error of all batches."""
        return max(batch.relative for batch in self.batches)

    def table(self, style: str = "simple") -> str:
        """The errors by batch, in any format that tabulate knows."""
        return _table(self.batches, style)

    def __str__(self) -> str:
        ops = ", ".join(f"{name} {count}" for name, count in self.ops.items())
        return f"{self.path} ({self.bytes:,} bytes, opset {self.opset})\n{self.table()}\noperators: {ops}"


def compare_in_onnxruntime(
    runtime: Any, file: Path, reference: nn.Module, example: Example, batch_sizes: Sequence[int]
) -> tuple[BatchCheck, ...]:
    """Run file and model side by side, on random batches and on the example itself.

    Args:
        runtime: The module ``onnxruntime``.
        file: The ONNX file.
        reference: The model.
        example: Its example inputs.
        batch_sizes: Sizes of the random batches.

    Raises:
        ExportError: The file does not load or run, or its inputs or shapes are not the model's.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class that is public
        raise ExportError(f"onnxruntime cannot load the exported file: {error}. Try another opset.") from error
    generator = torch.Generator().manual_seed(0)
    runs = [("random", with_batch(example, batch, generator)) for batch in batch_sizes]
    return tuple(_check_batch(session, reference, source, run) for source, run in [*runs, ("example", example)])


def _check_batch(session: Any, reference: nn.Module, source: str, inputs: Example) -> BatchCheck:
    try:
        expected = {name: value.cpu().numpy() for name, value in named_outputs(inputs.run(reference)).items()}
    except TraceError as error:
        raise ExportError(
            f"The model itself fails on a batch of {inputs.batch} ({source}): {error} Or give other batch_sizes."
        ) from error
    names = [entry.name for entry in session.get_inputs()]
    tensors = inputs.tensors()
    if len(names) != len(tensors):
        raise ExportError(
            f"The exported file takes {len(names)} inputs ({', '.join(names)}), example_inputs holds {len(tensors)} "
            "tensors. Leave out those that the model does not use."
        )
    try:
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
    except Exception as error:
        raise ExportError(f"onnxruntime fails on a batch of {inputs.batch} ({source}): {error}") from error
    absolute = relative = 0.0
    for (name, wanted), found in zip(expected.items(), outputs, strict=True):
        if wanted.shape != found.shape:
            raise ExportError(
                f"Output {name!r} of the exported file has shape {found.shape}, the model's {wanted.shape}, on a batch "
                f"of {inputs.batch} ({source}): the batch is not dynamic there."
            )
        difference = _largest_difference(wanted, found)
        scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
        absolute = max(absolute, difference)
        relative = max(relative, difference / scale if scale > 0 else difference)
    first, found = next(iter(expected.values())), outputs[0]
    scores = first.ndim == 2 and first.shape[1] > 1
    top1 = float((first.argmax(1) == found.argmax(1)).mean()) if scores else None
    return BatchCheck(inputs.batch, source, absolute, relative, top1)


def _largest_difference(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where one of them is not a number or only one is infinite."""
    with np.errstate(invalid="ignore"):
        difference = np.where(wanted == found, 0.0, np.abs(wanted.astype(np.float64) - found.astype(np.float64)))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _table(batches: Sequence[BatchCheck], style: str) -> str:
    rows = [
        [b.source, b.batch, f"{b.absolute:.2e}", f"{b.relative:.2e}", "" if b.top1 is None else f"{b.top1:.1%}"]
        for b in batches
    ]
    headers = ["inputs", "batch", "max abs error", "max rel error", "same top-1"]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)
