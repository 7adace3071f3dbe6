"""Accuracy and agreement of two models on the same data, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import check_labels
from ghostify.errors import InputsError
from ghostify.reporting.report import Accuracy, Pair
from ghostify.tracing.example import Example
from ghostify.tracing.running import evaluating


class NoClassScores(Exception):  # noqa: N818 - not an error: a model may well have other outputs
    """The models' outputs are not scores of classes, so no accuracy can be told."""


@dataclass
class _Tally:
    """Running sums over the data; index 0 is the original, 1 the compressed model."""

    examples: int = 0
    targets: int = 0
    classes: int = 0
    batches: int = 0
    same: int = 0
    bad: int = 0
    difference: float = 0.0

    def __post_init__(self) -> None:
        self.top1 = [0, 0]
        self.top5 = [0, 0]


def measure_accuracy(
    original: nn.Module, compressed: nn.Module, *, data: Iterable[Any], input_dims: int
) -> tuple[Accuracy, tuple[str, ...]]:
    """Run both models on all data.

    Args:
        original: The model to compare with.
        compressed: The smaller one.
        data: Batches: inputs ``(n, ...)``, or ``(inputs, targets)`` with class numbers ``(n,)``.
        input_dims: Dimensions that an input batch must have, those of the example inputs.

    Returns:
        The accuracy, and remarks on what was unusual.

    Raises:
        InputsError: The data are empty, or a batch does not fit.
        NoClassScores: The outputs are not tensors ``(n, classes)`` with two classes or more.
    """
    tally = _Tally()
    with evaluating(original, compressed), torch.no_grad():
        for item in data:
            inputs, targets = split_batch(item, tally.batches, input_dims)
            tally.batches += 1
            if len(inputs) == 0:
                continue
            scores = [_scores(model, inputs) for model in (original, compressed)]
            _check_shapes(scores, inputs)
            targets = class_numbers(targets, inputs, tally.batches - 1)
            _add(tally, scores, targets)
    if tally.examples == 0:
        raise InputsError(
            f"data holds no example ({tally.batches} batches). Pass a non-empty iterable of batches; an iterator that "
            "was used up before, such as a generator, must be made anew."
        )
    if tally.targets not in (0, tally.examples):
        raise InputsError(
            f"data has targets for {tally.targets} of {tally.examples} examples. Give all batches as "
            "(inputs, targets), or all as inputs alone."
        )
    return _accuracy(tally)


def _accuracy(tally: _Tally) -> tuple[Accuracy, tuple[str, ...]]:
    n = tally.examples
    top1 = Pair(tally.top1[0] / n, tally.top1[1] / n) if tally.targets else None
    top5 = Pair(tally.top5[0] / n, tally.top5[1] / n) if tally.targets and tally.classes >= 10 else None
    remarks: tuple[str, ...] = ()
    if tally.bad:
        remarks = (f"{tally.bad:,} of {n:,} examples have scores that are not finite; they count as wrong.",)
    accuracy = Accuracy(
        examples=n,
        classes=tally.classes,
        top1=top1,
        top5=top5,
        agreement=tally.same / n,
        output_difference=None if tally.bad else tally.difference / (n * tally.classes),
    )
    return accuracy, remarks


def split_batch(item: Any, index: int, input_dims: int) -> tuple[Tensor, Any]:
    """Inputs of a batch, with the shape that they must have, and its targets, whatever these are.

    Args:
        item: Inputs ``(n, ...)``, or ``(inputs, targets)``.
        index: Number of the batch, for messages.
        input_dims: Dimensions that the inputs must have.

    Raises:
        InputsError: It is something else.
    """
    parts = list(item) if isinstance(item, tuple | list) else [item]
    if len(parts) not in (1, 2) or not isinstance(parts[0], Tensor):
        kinds = ", ".join(type(part).__name__ for part in parts) or "nothing"
        raise InputsError(f"data: batch {index} holds {kinds}. Give (inputs, targets) or inputs each time.")
    inputs = parts[0]
    if inputs.dim() != input_dims:
        raise InputsError(
            f"data: batch {index} has inputs of shape {tuple(inputs.shape)}, and the example inputs have {input_dims} "
            "dimensions. Pass batches, for example torch.utils.data.DataLoader(dataset, batch_size=64)."
        )
    return inputs, parts[1] if len(parts) == 2 else None


def class_numbers(given: Any, inputs: Tensor, index: int) -> Tensor | None:
    """Targets of a batch as class numbers ``(n,)``; ``None`` if there are none.

    Args:
        given: What the batch holds.
        inputs: ``(n, ...)``.
        index: Number of the batch, for messages.

    Raises:
        InputsError: They are something else.
    """
    if given is None:
        return None
    targets = torch.as_tensor(given)
    if targets.shape != inputs.shape[:1] or targets.is_floating_point() or targets.is_complex():
        raise InputsError(
            f"data: batch {index} has targets of shape {tuple(targets.shape)} and type {targets.dtype} for "
            f"{len(inputs)} examples. Pass class numbers: integers of shape ({len(inputs)},)."
        )
    return targets


def _scores(model: nn.Module, inputs: Tensor) -> Tensor:
    """Scores ``(n, classes)`` of one batch."""
    moved = Example.of(inputs).to(model)
    try:
        output = model(*moved.args)
    except Exception as error:
        raise InputsError(
            f"data: {type(model).__name__} does not run on a batch of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}. Pass inputs like example_inputs."
        ) from error
    if not isinstance(output, Tensor):
        raise NoClassScores(f"the output is a {type(output).__name__}")
    if output.dim() != 2 or output.shape[1] < 2 or not output.is_floating_point():
        raise NoClassScores(f"the output has shape {tuple(output.shape)} and type {output.dtype}")
    return output.float()


def _check_shapes(scores: list[Tensor], inputs: Tensor) -> None:
    first, second = (tuple(score.shape) for score in scores)
    if first != second or first[0] != len(inputs):
        raise InputsError(
            f"For a batch of shape {tuple(inputs.shape)} the original gives {first} and the compressed model "
            f"{second}. Compare models that score the same classes."
        )


def _add(tally: _Tally, scores: list[Tensor], targets: Tensor | None) -> None:
    first, second = scores[0], scores[1].to(scores[0].device)
    finite = first.isfinite().all(1) & second.isfinite().all(1)
    best = [first.argmax(1), second.argmax(1)]
    tally.examples += len(first)
    tally.classes = first.shape[1]
    tally.bad += int((~finite).sum())
    tally.same += int((finite & (best[0] == best[1])).sum())
    tally.difference += float((first.double() - second.double()).abs().sum())
    if targets is None:
        return
    targets = targets.to(first.device)
    check_labels(targets, first, "data")
    tally.targets += len(targets)
    for index, score in enumerate((first, second)):
        usable = score.isfinite().all(1)
        tally.top1[index] += int((usable & (best[index] == targets)).sum())
        among = score.topk(min(5, score.shape[1]), dim=1).indices == targets[:, None]
        tally.top5[index] += int((usable & among.any(1)).sum())
