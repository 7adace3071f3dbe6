"""Scoring a student beside its teacher."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import UNLABELLED, Reader, check_labels
from ghostify.distillation.history import Scores
from ghostify.distillation.processes import Processes
from ghostify.distillation.stopping import Stop
from ghostify.errors import InputsError, NonFiniteLossError
from ghostify.tracing.running import evaluating


def validate(
    student: nn.Module,
    *,
    teacher: nn.Module,
    val: Iterable[Any],
    reader: Reader,
    loss: Callable[[Tensor, Tensor], Tensor],
    processes: Processes,
    stop: Stop | None = None,
) -> Scores:
    """Score a student on all of the validation data; both models' modes are restored.

    Of a student whose scores are not all finite the loss is NaN, whatever the loss function says.

    Args:
        student: Gives class scores ``(n, classes, ...)``.
        teacher: Gives class scores of the same shape.
        val: Batches, with or without labels.
        reader: Moves them to the models.
        loss: Distillation loss of student's and teacher's scores.
        processes: Each scores its own rows of every batch.
        stop: Asked at every batch; not where several processes would have to leave together.

    Raises:
        InputsError: Labels that do not fit the scores, or no batch at all.
        NonFiniteLossError: The teacher's scores are NaN or infinite.
    """
    # loss, agreeing, right, teacher right, scores that are not finite, the same of the teacher, answers among several
    sums = torch.zeros(7, dtype=torch.float64, device=reader.device)
    examples = answers = labelled = 0
    with evaluating(student, teacher), torch.no_grad():
        for item in val:
            if stop and processes.count == 1:
                raise stop.error()
            batch = reader.read(item, "val")
            batch = batch.rows(processes.rows(len(batch.inputs)))
            if not len(batch.inputs):
                continue
            with reader.autocast():
                scores, wanted = student(batch.inputs), teacher(batch.inputs)
            guess, reference = scores.argmax(1), wanted.argmax(1)
            examples += scores.shape[0]
            answers += guess.numel()
            sums[0] += loss(scores, wanted) * scores.shape[0]
            sums[1] += (guess == reference).sum()
            sums[4] += (~torch.isfinite(scores)).sum()
            sums[5] += (~torch.isfinite(wanted)).sum()
            sums[6] += guess.numel() if scores.shape[1] > 1 else 0
            if batch.labels is not None:
                check_labels(batch.labels, scores, "val")
                labelled += int((batch.labels != UNLABELLED).sum())
                sums[2] += (guess == batch.labels).sum()
                sums[3] += (reference == batch.labels).sum()
    counts = processes.sum(torch.tensor([examples, answers, labelled], device=reader.device))
    examples, answers, labelled = counts.tolist()
    if not examples:
        raise InputsError("val yields no batch any more. Pass something that can be iterated anew.")
    total, agreeing, right, teacher_right, bad, teacher_bad, several = processes.sum(sums).tolist()
    if teacher_bad:
        raise NonFiniteLossError(
            f"val: {teacher_bad:,.0f} of the teacher's scores are NaN or infinite. "
            "Clean the data, or check the normalisation of the inputs."
        )
    return Scores(
        loss=math.nan if bad else total / examples,
        agreement=agreeing / answers if several else None,
        accuracy=right / labelled if labelled else None,
        teacher_accuracy=teacher_right / labelled if labelled else None,
        labelled=labelled,
    )
