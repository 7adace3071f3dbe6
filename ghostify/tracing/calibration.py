"""Calibration inputs in any form, as chunks on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.errors import InputsError, OptionError, TraceError
from ghostify.tracing.example import Example, ExampleInputs
from ghostify.tracing.trace import Trace, trace

Calibration = Tensor | Iterable[Any]

MOST_IMAGES = 1024
# A chunk holds so many images, and of large ones no more than so many numbers.
_CHUNK, _CHUNK_NUMBERS = 64, 2**22
# Examples of a calibration batch that are enough to trace a model.
_TRACED = 2
_ADVICE = "Pass a few hundred inputs from the training data."


def calibration_chunks(
    calibration: Calibration | None, model: nn.Module, images: int = MOST_IMAGES, *, whole: bool = False
) -> list[Example]:
    """Split calibration inputs into chunks.

    Args:
        calibration: A tensor ``(n, c, h, w)``, or an iterable of batches: tensors, ``(input, target)``
            pairs of which the target is ignored, or dicts of keyword arguments.
        model: Gives device and dtype.
        images: How many examples are enough. Small batches stay whole, so there may be a few more.
        whole: Leave large batches whole, too, where what is computed depends on what is together in one.

    Raises:
        OptionError: ``images`` is no number ≥ 1.
        InputsError: There is nothing in it, or something that is no input.
    """
    if isinstance(images, bool) or not isinstance(images, int) or images < 1:
        raise OptionError(f"images={images!r} is not a whole number ≥ 1: how many calibration inputs to use at most.")
    if calibration is None:
        return []
    kind = type(calibration)
    iterable = hasattr(kind, "__iter__") or hasattr(kind, "__getitem__")
    if not iterable or isinstance(calibration, str | bytes | Mapping):
        raise InputsError(f"calibration has type {kind.__name__}; it must be a tensor (n, c, h, w) or many batches.")
    if isinstance(calibration, Tensor) and calibration.numel() == 0:
        raise InputsError(f"calibration is empty: shape {tuple(calibration.shape)}. {_ADVICE}")
    chunks: list[Example] = []
    total = 0
    for batch in (calibration[:images],) if isinstance(calibration, Tensor) else calibration:
        example = _example(batch)
        stays = not isinstance(calibration, Tensor) and (whole or _is_one(example, model))
        for chunk in [example] if stays else _parts(example, images - total):
            chunks.append(chunk.to(model))
            total += chunk.batch
        if total >= images:
            break
    if not chunks:
        raise InputsError(f"calibration is empty. {_ADVICE}")
    for chunk in chunks:
        for tensor in chunk.tensors():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputsError("calibration holds NaN or infinite numbers. Check how the inputs are normalised.")
    return chunks


def _is_one(batch: Example, model: nn.Module) -> bool:
    """Whether it is one example without a batch, as far as the model's first convolution tells."""
    dims = next((len(module.kernel_size) for module in model.modules() if isinstance(module, _ConvNd)), 2)
    return batch.is_single(dims)


def _parts(batch: Example, most: int) -> Iterator[Example]:
    """No more examples of a batch than are wanted, few at a time; all of it where it is small or cannot be parted."""
    size = max(1, min(_CHUNK, _CHUNK_NUMBERS * batch.batch // max(1, sum(some.numel() for some in batch.tensors()))))
    if batch.batch <= size or not batch.separable:
        yield batch
        return
    stop = min(batch.batch, most)
    for start in range(0, stop, size):
        yield batch.part(start, min(start + size, stop))


def trace_calibrated(
    model: nn.Module, example_inputs: ExampleInputs | None, chunks: list[Example], *, lift: bool = True
) -> Trace:
    """Trace a model on its example inputs, or else on some of the first calibration batch; the others must run too.

    Args:
        model: Run in evaluation mode; left as it was.
        example_inputs: One batch, or ``None``.
        chunks: Calibration inputs.
        lift: See [trace][ghostify.tracing.trace].

    Raises:
        InputsError: There is nothing to run it on, or the calibration inputs do not fit.
        TraceError: The model does not run on the example inputs.
    """
    if example_inputs is not None or not chunks:
        facts = trace(model, example_inputs, lift=lift)
    else:
        facts = _trace_batch(model, chunks[0], lift=lift)
    _check_runs(chunks, facts.example, model)
    return facts


def _trace_batch(model: nn.Module, batch: Example, *, lift: bool) -> Trace:
    """Trace a model on a few examples of a batch; on all of it if a few cannot be told apart, or do not run."""
    with suppress(TraceError):
        return trace(model, batch.part(0, _TRACED) if batch.separable else batch, lift=lift)
    try:
        return trace(model, batch, lift=lift)
    except TraceError as error:
        raise InputsError(f"calibration does not fit the model: {error}") from error


def _check_runs(chunks: list[Example], example: Example, model: nn.Module) -> None:
    """Run the model on one calibration batch of every shape or type that the example inputs do not have.

    Raises:
        InputsError: The model does not run on it.
    """
    known = {_kind(example.to(model))}
    names = example.names(model)
    for chunk in chunks:
        try:
            given = chunk.names(model)
        except TypeError as error:
            raise InputsError(f"calibration does not fit the model's forward: {error}") from error
        if given != names:
            raise InputsError(
                f"calibration gives the arguments {', '.join(given)}, and example_inputs gives {', '.join(names)}. "
                "Pass the same ones in both."
            )
        if _kind(chunk) in known:
            continue
        try:
            chunk.run(model)
        except TraceError as error:
            raise InputsError(f"calibration does not fit the model: {error}") from error
        known.add(_kind(chunk))


def _kind(example: Example) -> tuple[object, ...]:
    """What decides whether a model runs: names, shapes without the batch, types."""
    tensors = tuple((tuple(tensor.shape[1:]), tensor.dtype) for tensor in example.tensors())
    return (len(example.args), tuple(sorted(example.kwargs)), tensors)


def _example(batch: Any) -> Example:
    if isinstance(batch, Tensor | Mapping):
        return Example.of(batch)
    if isinstance(batch, Sequence) and batch and not isinstance(batch, str | bytes):
        return Example.of(batch[0])
    raise InputsError(
        f"calibration holds a batch of type {type(batch).__name__}; a batch must be a tensor (n, c, h, w), an "
        "(input, target) pair, or a dict of keyword arguments."
    )
