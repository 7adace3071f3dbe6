"""Reading what a caller gives as data: any iterable of ``(input, target)`` or of inputs alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ghostify.errors import InputsError

UNLABELLED = -100
"""What validation labels say of an answer that has none, as torch's cross-entropy has it."""


@dataclass(frozen=True)
class Batch:
    """One batch, where the models are.

    Attributes:
        inputs: ``(n, ...)``, floating-point ones in the models' dtype.
        labels: Class ids ``(n, ...)`` as int64, or ``None``.
        others: Of a blended batch the class ids of what was blended into each example, if there are labels.
        share: What ``labels`` count beside ``others``, 0 to 1.
    """

    inputs: Tensor
    labels: Tensor | None
    others: Tensor | None = None
    share: float = 1.0

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.inputs.device

    def rows(self, chosen: slice) -> Batch:
        """Some of its examples."""
        labels, others = (None if ids is None else ids[chosen] for ids in (self.labels, self.others))
        return Batch(self.inputs[chosen], labels, others, self.share)

    def parts(self, count: int) -> list[Batch]:
        """The batch in at most ``count`` parts, none of them empty."""
        size = -(-len(self.inputs) // count)
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.inputs), size)]


@dataclass(frozen=True)
class Reader:
    """What it takes to read a batch for a pair of models, and to run them on it.

    Attributes:
        device: Where the models are.
        dtype: Of the models' parameters.
        channels_last: Give 4-d inputs in that memory format.
        precision: ``"bf16"`` or ``"fp16"`` to compute in that where it is safe; ``"fp32"`` leaves it to the models.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    precision: str = "fp32"

    def autocast(self) -> torch.autocast:
        """The context that both models run in."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def read(self, batch: Any, name: str) -> Batch:
        """Take a batch apart and move it to the models.

        Args:
            batch: A tensor; ``(input,)``; or ``(input, target)``. Targets that are no tensor, array or list of whole
                numbers (boxes, captions) are no labels, and are left alone.
            name: ``data`` or ``val``, for messages.

        Raises:
            InputsError: It is none of these, or is empty.
        """
        parts = list(batch) if isinstance(batch, tuple | list) else [batch]
        if not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor) or parts[0].dim() == 0:
            raise InputsError(
                f"{name} yields {_described(batch)}; a batch must be a tensor (n, ...) or a pair (input, target). "
                "Give the loader a collate_fn that makes one."
            )
        inputs, target = parts[0], parts[1] if len(parts) == 2 else None
        if inputs.shape[0] == 0:
            raise InputsError(f"{name} yields an input of shape {tuple(inputs.shape)}: a batch without examples.")
        ids = _whole_numbers(target)
        labels = None if ids is None else ids.to(self.device, torch.int64, non_blocking=True)
        return Batch(self._moved(inputs), labels)

    def _moved(self, inputs: Tensor) -> Tensor:
        dtype = self.dtype if inputs.is_floating_point() else inputs.dtype
        if self.channels_last and inputs.dim() == 4:
            return inputs.to(self.device, dtype, non_blocking=True, memory_format=torch.channels_last)
        return inputs.to(self.device, dtype, non_blocking=True)


def _whole_numbers(target: Any) -> Tensor | None:
    """Whole numbers as a tensor; ``None`` for whatever else a target is."""
    if isinstance(target, Tensor):
        return None if target.is_floating_point() or target.is_complex() else target
    # Not whatever torch makes a tensor of: several targets of one example are a list of tensors.
    numbers = isinstance(target, np.ndarray) and target.dtype.kind in "iub"
    if numbers or (isinstance(target, list | tuple) and all(isinstance(one, int) for one in target)):
        with suppress(TypeError, RuntimeError):  # of a kind, or a size, that torch does not have
            return torch.as_tensor(target)
    return None


@contextmanager
def laid_out(*models: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Lay weights out in memory as the images are, channels last; afterwards they lie where they lay.

    A GPU would otherwise bring them into that order at every step. Weights that share their memory with others stay.

    Args:
        models: Changed in place, their values are not.
        wanted: Whether to do so.
    """
    moved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for parameter in _with_own_memory(models) if wanted else ():
            moved.append((parameter, parameter.data))
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, before in moved:
            parameter.data = before.copy_(parameter.data)


def _with_own_memory(models: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Contiguous weights of four dimensions that can be written to, and in whose memory there is nothing else."""
    parameters = {id(p): p for model in models for p in model.parameters()}
    tensors = [*parameters.values(), *(buffer for model in models for buffer in model.buffers())]
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.layout is torch.strided)
    return [
        p
        for p in parameters.values()
        if p.dim() == 4
        and p.is_contiguous()
        and not p.is_inference()
        and users[p.untyped_storage().data_ptr()] == 1
        and p.untyped_storage().nbytes() == p.numel() * p.element_size()
    ]


def check_labels(labels: Tensor, logits: Tensor, name: str) -> None:
    """See that labels are class ids that fit the class scores.

    Args:
        labels: ``(n, ...)``.
        logits: ``(n, classes, ...)``.
        name: ``data`` or ``val``, for messages.

    Raises:
        InputsError: Another shape, or an id outside ``0 … classes - 1``; in ``val`` -100 stands for no label.
    """
    expected = (logits.shape[0], *logits.shape[2:])
    if tuple(labels.shape) != expected:
        raise InputsError(
            f"{name} yields labels of shape {tuple(labels.shape)} for class scores of shape {tuple(logits.shape)}; "
            f"class ids of shape {expected} are expected. Give class ids, or the inputs alone."
        )
    ids = labels[labels != UNLABELLED] if name == "val" else labels
    if not ids.numel():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= logits.shape[1]:
        unlabelled = f" ({UNLABELLED} where there is none)" if name == "val" else ""
        raise InputsError(
            f"{name} yields labels from {lowest} to {highest}, and the models tell {logits.shape[1]} classes apart "
            f"(0 to {logits.shape[1] - 1}). Renumber the labels{unlabelled}, or give the inputs alone."
        )


def count_batches(data: Iterable[Any], name: str) -> int:
    """How many batches one pass over the data has; data without a length is gone through once to count.

    Args:
        data: What ``distill`` was given.
        name: ``data`` or ``val``, for messages.

    Raises:
        InputsError: It cannot be iterated, can be iterated once only, or is empty.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise InputsError(
            f"{name} is {_described(data)}; it must be an iterable of batches. "
            "Pass a DataLoader, ImageBatches, or a list such as [(images, labels)]."
        )
    if isinstance(data, Iterator):
        raise InputsError(
            f"{name} is a {type(data).__name__}, which is used up after one pass, and it is gone through every epoch. "
            "Pass something that can be iterated anew: a DataLoader, ImageBatches, or list(...)."
        )
    count = _length(data)
    if count is None:
        count = sum(1 for _ in data)
    if count == 0:
        raise InputsError(f"{name} is empty: it has no batch. Check the path or the filter that it was made with.")
    return count


def _length(data: Iterable[Any]) -> int | None:
    if not isinstance(data, Sized):
        return None
    try:
        return len(data)
    except TypeError:  # a DataLoader over an IterableDataset has __len__ and cannot answer
        return None


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        inside = ", ".join(type(item).__name__ for item in value[:4])
        return f"a {type(value).__name__} of {len(value)} ({inside}{', …' if len(value) > 4 else ''})"
    return f"a {type(value).__name__}"
