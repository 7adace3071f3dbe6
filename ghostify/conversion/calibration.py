"""Calibration inputs in any form, as chunks on the model's device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.errors import InputsError
from ghostify.tracing.example import Example

Calibration = Tensor | Iterable[Any]

MOST_IMAGES = 1024
_CHUNK = 64


def calibration_chunks(calibration: Calibration | None, model: nn.Module) -> list[Example]:
    """Split calibration inputs into chunks, at most 1,024 examples in all.

    Args:
        calibration: A tensor ``(n, c, h, w)``, or an iterable of batches: tensors, ``(input, target)``
            pairs of which the target is ignored, or dicts of keyword arguments.
        model: Gives device and dtype.

    Raises:
        InputsError: There is nothing in it, or something that is no input.
    """
    if calibration is None:
        return []
    batches: Iterable[Any] = torch.split(calibration, _CHUNK) if isinstance(calibration, Tensor) else calibration
    chunks: list[Example] = []
    total = 0
    for batch in batches:
        chunk = _example(batch).to(model)
        chunks.append(chunk)
        total += chunk.batch
        if total >= MOST_IMAGES:
            break
    if not chunks:
        raise InputsError("calibration is empty. Pass a few hundred inputs from the training data.")
    for chunk in chunks:
        for tensor in chunk.tensors():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise InputsError("calibration holds NaN or infinite numbers. Check how the inputs are normalised.")
    return chunks


def _example(batch: Any) -> Example:
    if isinstance(batch, Tensor | Mapping):
        return Example.of(batch)
    if isinstance(batch, Sequence) and batch and not isinstance(batch, str | bytes):
        return Example.of(batch[0])
    raise InputsError(
        f"calibration holds a batch of type {type(batch).__name__}; a batch must be a tensor (n, c, h, w), an "
        "(input, target) pair, or a dict of keyword arguments."
    )
