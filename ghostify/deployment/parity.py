"""Comparing an ONNX file in onnxruntime with the model that it was made from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tabulate import tabulate
from torch import Tensor, nn

from ghostify.backends.onnx_program import named_outputs, with_batch, with_size
from ghostify.errors import ExportError, InputsError, TraceError
from ghostify.reporting.report import Latency
from ghostify.tracing.example import Example

# Pixels by which the other size is larger, each side by another number, so that none is taken for the other;
# multiples of 32, because networks that halve their maps five times may need that.
_LARGER = (32, 64, 96)


@dataclass(frozen=True)
class BatchCheck:
    """How far onnxruntime is from the model on one batch.

    Attributes:
        batch: Examples in the batch; of ``data`` all together.
        source: ``random``, that with another size, ``example`` or ``data``.
        absolute: Largest absolute difference over all outputs.
        relative: Largest difference of an output tensor divided by the largest value in it; of whole numbers, such
            as classes, the share that differs.
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
        agreement: Least share of the data that had to be told the same class.
        batches: One entry for every batch that was compared.
        ops: How often each operator occurs, most frequent first.
        latency: Of original and exported model in onnxruntime, if it was measured.
    """

    path: Path
    bytes: int
    opset: int
    tolerance: float
    agreement: float
    batches: tuple[BatchCheck, ...]
    ops: dict[str, int]
    latency: Latency | None = None

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
        return batches_table(self.batches, style)

    def to_json(self) -> str:
        """Everything as JSON text; infinite errors as ``Infinity``."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        ops = ", ".join(f"{name} {count}" for name, count in self.ops.items())
        text = f"{self.path} ({self.bytes:,} bytes, opset {self.opset})\n{self.table()}\noperators: {ops}"
        if (timed := self.latency) is None:
            return text
        before, after = timed.original, timed.compressed
        return (
            f"{text}\nlatency: {before.median:.2f} ms → {after.median:.2f} ms, {timed.ratio:.2f}× as fast "
            f"(quartiles {timed.ratio_q25:.2f} to {timed.ratio_q75:.2f}, {timed.pairs} pairs; {timed.backend})"
        )


def open_session(runtime: Any, file: Path) -> Any:
    """Load a file into onnxruntime, on the CPU.

    Args:
        runtime: The module ``onnxruntime``.
        file: The ONNX file.

    Raises:
        ExportError: It does not load.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its errors come as exceptions, too
    try:
        return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class that is public
        raise ExportError(f"onnxruntime cannot load the exported file: {error}. Try another opset.") from error


def compare_on_examples(
    session: Any, reference: nn.Module, example: Example, batch_sizes: Sequence[int], other_size: bool = False
) -> tuple[BatchCheck, ...]:
    """Run file and model side by side, on random batches and on the example itself.

    Args:
        session: Of the file.
        reference: The model.
        example: Its example inputs.
        batch_sizes: Sizes of the random batches.
        other_size: Whether to compare on larger maps, too.

    Raises:
        ExportError: The file does not run, or its inputs or shapes are not the model's.
    """
    generator = torch.Generator().manual_seed(0)
    runs = [("random", with_batch(example, batch, generator)) for batch in batch_sizes]
    if other_size:
        larger = with_size(example, _LARGER, generator)
        runs.append((f"random {'×'.join(map(str, larger.tensors()[0].shape[1:]))}", larger))
    return tuple(compare_batch(session, reference, source, run) for source, run in [*runs, ("example", example)])


def feeds(data: Iterable[Any], example: Example) -> Iterator[Tensor]:
    """The inputs of every batch. What is wrong with the first one is told at once, before anything is compared.

    Args:
        data: Batches ``(n, …)``, or ``(inputs, targets)``.
        example: The model's example inputs: one tensor, whose number of dimensions a batch has.

    Raises:
        InputsError: The data are empty, or do not fit the model.
    """
    if len(example.tensors()) != 1:
        raise InputsError(
            f"data can be compared for models of one input; this one takes {len(example.tensors())}. Pass data=None."
        )
    dims = example.tensors()[0].dim()

    def checked() -> Iterator[Tensor]:
        for number, batch in enumerate(data):
            inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
            if not isinstance(inputs, Tensor) or inputs.dim() != dims or not len(inputs):
                shape = f"a tensor of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else None
                raise InputsError(
                    f"data: batch {number} holds {shape or type(inputs).__name__}, and the example inputs have {dims} "
                    "dimensions. Give batches of inputs, or (inputs, targets), as a DataLoader does."
                )
            yield inputs

    batches = checked()
    if (first := next(batches, None)) is None:
        raise InputsError("data holds no batch. Pass an iterable of batches that was not used up before.")
    return chain([first], batches)


def compare_on_data(session: Any, reference: nn.Module, inputs: Iterable[Tensor]) -> BatchCheck:
    """Run file and model side by side on real inputs.

    Args:
        session: Of the file.
        reference: The model; it takes one tensor.
        inputs: Batches ``(n, …)``, at least one.

    Returns:
        The largest errors of all batches together, and how many examples have the same highest score.

    Raises:
        InputsError: A batch does not fit the model.
        ExportError: The file does not run, or its shapes are not the model's.
    """
    checks = [
        compare_batch(session, reference, f"batch {number} of the data", Example((batch,)).to(reference))
        for number, batch in enumerate(inputs)
    ]
    examples = sum(check.batch for check in checks)
    same = [check.top1 * check.batch for check in checks if check.top1 is not None]
    return BatchCheck(
        examples,
        "data",
        max(check.absolute for check in checks),
        max(check.relative for check in checks),
        sum(same) / examples if len(same) == len(checks) else None,
    )


def compare_batch(session: Any, reference: nn.Module, source: str, inputs: Example) -> BatchCheck:
    """Run file and model side by side on one batch.

    Args:
        session: Of the file.
        reference: The model.
        source: Where the batch comes from.
        inputs: The batch.

    Raises:
        ExportError: One of them does not run, or the file's inputs or shapes are not the model's.
    """
    where = f"a batch of {inputs.batch} ({source})"
    try:
        expected = {name: value.cpu().numpy() for name, value in named_outputs(inputs.run(reference)).items()}
    except TraceError as error:
        advice = "export it for one size, without dynamic_size" if "×" in source else "give other batch_sizes"
        raise ExportError(f"The model itself fails on {where}: {error} Or {advice}.") from error
    names = [entry.name for entry in session.get_inputs()]
    tensors = inputs.tensors()
    if len(names) != len(tensors):
        raise ExportError(
            f"The exported file takes {len(names)} inputs ({', '.join(names)}), example_inputs holds {len(tensors)} "
            "tensors. Leave out those that the model does not use."
        )
    try:
        outputs = session.run(None, {name: tensor.cpu().numpy() for name, tensor in zip(names, tensors, strict=True)})
    except Exception as error:
        raise ExportError(f"onnxruntime fails on {where}: {error}") from error
    absolute = relative = 0.0
    for (name, wanted), found in zip(expected.items(), outputs, strict=True):
        if wanted.shape != found.shape:
            raise ExportError(
                f"Output {name!r} of the exported file has shape {found.shape}, the model's {wanted.shape}, on "
                f"{where}: the batch or the size is not dynamic there."
            )
        parting = _parting(wanted, found)
        absolute, relative = max(absolute, parting[0]), max(relative, parting[1])
    first, found = next(iter(expected.values())), outputs[0]
    scores = first.ndim == 2 and first.shape[1] > 1
    top1 = float((first.argmax(1) == found.argmax(1)).mean()) if scores else None
    return BatchCheck(inputs.batch, source, absolute, relative, top1)


def _parting(wanted: NDArray[Any], found: NDArray[Any]) -> tuple[float, float]:
    """Absolute and relative, as `BatchCheck` defines them."""
    difference = _largest_difference(wanted, found)
    if wanted.dtype.kind in "biu":
        return difference, float((wanted != found).mean()) if wanted.size else 0.0
    scale = float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    return difference, difference / scale if scale > 0 else difference


def _largest_difference(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where one of them is not a number or only one is infinite."""
    with np.errstate(invalid="ignore"):
        difference = np.where(wanted == found, 0.0, np.abs(wanted.astype(np.float64) - found.astype(np.float64)))
    return float(np.nan_to_num(difference, nan=np.inf, posinf=np.inf).max(initial=0.0))


def batches_table(batches: Sequence[BatchCheck], style: str) -> str:
    """The errors by batch, in any format that tabulate knows."""
    rows = [
        [b.source, b.batch, f"{b.absolute:.2e}", f"{b.relative:.2e}", "" if b.top1 is None else f"{b.top1:.1%}"]
        for b in batches
    ]
    headers = ["inputs", "examples", "max abs error", "max rel error", "same top-1"]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)
