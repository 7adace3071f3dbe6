"""The teacher's answers to data that are the same in every epoch, asked for once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import Reader
from ghostify.distillation.preflight import explained
from ghostify.distillation.splits import MEMORY_LIMIT
from ghostify.errors import InputsError, OptionError
from ghostify.tracing.running import evaluating


class KnownAnswers:
    """A teacher that answers from memory: called with examples ``(n, ...)``, it gives ``(n, classes, ...)``.

    Examples are known by their content, so any data will do, in any order.

    Args:
        teacher: Asked once about every example, in batches as they come.
        data: What ``distill`` was given; every process reads all of it.
        batches: How many there are.
        reader: Moves them to the teacher.

    Raises:
        OptionError: The answers would take more than ``MEMORY_LIMIT`` bytes, or are not one for each example.
        TrainingError: The teacher does not run on a batch.
    """

    def __init__(self, teacher: nn.Module, data: Iterable[Any], batches: int, reader: Reader) -> None:
        self._answers: dict[bytes, Tensor] = {}
        size = 0
        with evaluating(teacher), torch.no_grad(), reader.autocast():
            for number, item in enumerate(data, start=1):
                inputs = reader.read(item, "data").inputs
                keys = _keys(inputs)  # beforehand: a model may change its inputs
                with explained(f"teacher ({type(teacher).__name__})", inputs, "data"):
                    found = teacher(inputs).clone()  # of what it is a part of, nothing is to be kept
                if len(found) != len(inputs):
                    raise OptionError(
                        f"cache_teacher=True: teacher gives {len(found)} answers to {len(inputs)} examples, and which "
                        "belongs to which cannot be told. Pass cache_teacher=False."
                    )
                size += found.nbytes
                if (expected := size * max(batches, number) // number) > MEMORY_LIMIT:
                    raise OptionError(
                        f"cache_teacher=True: the answers to all of data would take {expected:,} bytes, and "
                        f"{MEMORY_LIMIT:,} are allowed. Pass cache_teacher=False."
                    )
                self._answers.update(zip(keys, found, strict=True))

    def __call__(self, inputs: Tensor) -> Tensor:
        """The answers to examples that were there before.

        Raises:
            InputsError: Others.
        """
        known = [self._answers.get(key) for key in _keys(inputs)]
        answers = [answer for answer in known if answer is not None]
        if len(answers) < len(known):
            raise InputsError(
                f"cache_teacher=True: {len(known) - len(answers)} of {len(known)} examples of a batch are others than "
                "when the teacher was asked. It needs the same examples in every epoch: without augmentation, and "
                "none left out (drop_last=False). Or pass cache_teacher=False."
            )
        return torch.stack(answers)


def _keys(inputs: Tensor) -> list[bytes]:
    """What every example is in 16 bytes: its kind of numbers, its shape and its content."""
    kind = hashlib.blake2b(f"{inputs.dtype} {tuple(inputs.shape[1:])}".encode(), digest_size=16)
    keys = []
    for row in inputs.detach().cpu().contiguous().reshape(len(inputs), -1).view(torch.uint8).numpy():
        hashed = kind.copy()
        hashed.update(row)
        keys.append(hashed.digest())
    return keys
