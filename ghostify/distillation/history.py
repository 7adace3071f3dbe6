"""What a distillation leaves behind, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic
from torch import nn

from ghostify.documents import STRICT, read_document
from ghostify.errors import InputsError


@dataclass(frozen=True)
class Scores:
    """How a student does on the validation data.

    Attributes:
        loss: Mean distillation loss.
        agreement: Share of examples where student and teacher name the same class; ``None`` where there is only one.
        accuracy: Share where the student is right; ``None`` without labels.
        teacher_accuracy: The same of the teacher.
        labelled: How many answers the labels speak of.
    """

    loss: float
    agreement: float | None
    accuracy: float | None
    teacher_accuracy: float | None
    labelled: int = 0

    @property
    def rank(self) -> tuple[float, float]:
        """What the best student has most of: accuracy (without labels, agreement), then a low loss."""
        agreement = 1.0 if self.agreement is None else self.agreement  # as where nobody could disagree
        return (agreement if self.accuracy is None else self.accuracy, -self.loss)


@dataclass(frozen=True)
class Epoch:
    """The record of one epoch; ``None`` is what was not recorded.

    Attributes:
        epoch: Its number, from 1.
        loss: Mean training loss.
        lr: Learning rate of its last step.
        val_accuracy: Share of validation examples that the student gets right, ``None`` without labels.
        val_agreement: Share where student and teacher agree, ``None`` without validation data, or classes.
        val_loss: Mean distillation loss on the validation data, ``None`` without.
        seconds: Training and validation together.
        images_per_second: Of the training alone.
    """

    epoch: int
    loss: float | None = None
    lr: float | None = None
    val_accuracy: float | None = None
    val_agreement: float | None = None
    val_loss: float | None = None
    seconds: float | None = None
    images_per_second: float | None = None

    __pydantic_config__ = STRICT


def read_history(text: str | bytes) -> tuple[Epoch, ...]:
    """The epochs in the text of a ``history.json``.

    Raises:
        InputsError: It is no history, or was changed by hand.
    """
    return read_document(_HISTORY, text, kind="history", verb="distill", error=InputsError).epochs


@dataclass(frozen=True)
class _History:
    """What is read of a ``history.json``; the settings of the run and its start are for the reader."""

    epochs: tuple[Epoch, ...]

    __pydantic_config__ = pydantic.ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True)
class Run:
    """A finished distillation.

    Attributes:
        student: The model that was trained: the one that was passed in.
        history: One record for each epoch.
        start: The student on the validation data before the first step, ``None`` without such data.
        best_epoch: The epoch whose weights the student holds; 0 means that no epoch beat the start.
        out: The folder with the checkpoints, if one was asked for.
    """

    student: nn.Module
    history: tuple[Epoch, ...]
    start: Scores | None
    best_epoch: int
    out: Path | None


_HISTORY = pydantic.TypeAdapter(_History)
