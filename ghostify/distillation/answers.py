"""The teacher's answers to data that are the same in every epoch, asked for once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import Reader
from ghostify.distillation.splits import MEMORY_LIMIT
from ghostify.errors import InputsError, OptionError
from ghostify.tracing.example import evaluating


class KnownAnswers:
    """A teacher that answers from memory: called with examples ``(n, ...)``, it gives ``(n, classes, ...)``.

    Examples are known by their content, so any data will do, in any order.

    Args:
        teacher: Asked once about every example, in batches as they come.
        data: What ``distill`` was given; every process reads all of it.
        batches: How many there are.
        reader: Moves them to the teacher.

    Raises:
        OptionError: The answers would take more than ``MEMORY_LIMIT`` bytes.
    """

    def __init__(self, teacher: nn.Module, data: Iterable[Any], batches: int, reader: Reader) -> None:
        self._rows: dict[bytes, int] = {}
        answers: list[Tensor] = []
        with evaluating(teacher), torch.no_grad(), reader.autocast():
            for item in data:
                inputs = reader.read(item, "data").inputs
                found = teacher(inputs)
                if not answers and (size := found.nbytes * batches) > MEMORY_LIMIT:
                    raise OptionError(
                        f"cache_teacher=True: the answers to all of data would take {size:,} bytes, and "
                        f"{MEMORY_LIMIT:,} are allowed. Pass cache_teacher=False."
                    )
                first = sum(map(len, answers))
                self._rows |= {key: first + row for row, key in enumerate(_keys(inputs))}
                answers.append(found)
        self._answers = torch.cat(answers)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The answers to examples that were there before.

        Raises:
            InputsError: Others.
        """
        rows = [self._rows.get(key) for key in _keys(inputs)]
        if None in rows:
            raise InputsError(
                f"cache_teacher=True: {rows.count(None)} of {len(rows)} examples of a batch are others than when the "
                "teacher was asked. It needs data that are the same in every epoch: without augmentation, or with "
                "cache_teacher=False."
            )
        return self._answers[torch.tensor(rows, device=self._answers.device)]


def _keys(inputs: Tensor) -> list[bytes]:
    """What is in every example, in 16 bytes."""
    content = inputs.detach().cpu().contiguous().reshape(len(inputs), -1).view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in content]
