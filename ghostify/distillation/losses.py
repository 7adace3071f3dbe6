"""What the student is to minimise: pure functions of the two networks' class scores.

Every function takes ``(student_logits, teacher_logits, temperature)`` and gives a scalar. Class scores
have shape ``(n, classes)`` or ``(n, classes, ...)``; whatever follows the class dimension (the pixels
of a segmentation) counts as further examples. All compute in float32, whatever autocast is doing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, float], Tensor]


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Knowledge distillation: ``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, mean over the examples.

    Hinton, Vinyals and Dean 2015, arXiv 1503.02531, §2: eq. 1 softens both distributions with the
    temperature, and the factor T² keeps the gradient's size where T changes (eq. 2–4). The teacher's
    entropy, which no student can change, is subtracted, so that 0 is reached where the two agree.

    Args:
        student_logits: Class scores ``(n, classes, ...)``.
        teacher_logits: Class scores of the same shape.
        temperature: T, above 0.

    Returns:
        A float32 scalar, in nats times T².

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 2.0, 3.0]])
        >>> distillation_loss(scores, scores + 7.0, temperature=4.0).item()
        0.0
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


def logit_mse(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean squared difference of the class scores, over examples and classes.

    It is what distillation becomes at a high temperature for scores of zero mean (arXiv 1503.02531,
    eq. 4, up to a constant); ``temperature`` therefore has no part in it.

    Args:
        student_logits: Class scores ``(n, classes, ...)``.
        teacher_logits: Class scores of the same shape.
        temperature: Not used.

    Returns:
        A float32 scalar, in squared score units.

    Example:
        >>> import torch
        >>> logit_mse(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 3.0]])).item()
        2.0
    """
    return F.mse_loss(student_logits.float(), teacher_logits.float())


def dist_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """DIST: the student's probabilities need only vary as the teacher's do, over the classes and over the batch.

    Huang et al. 2022, arXiv 2205.10536. The distance of two vectors is ``1 - ρ``, ρ being Pearson's
    correlation, so that neither scale nor offset counts. With ``softmax(scores / T)``, one row for every
    example and one column for every class, it is the mean distance of the rows (inter-class, eq. 8)
    plus the mean distance of the columns (intra-class, eq. 9), both with the weight 1 (eq. 10, β = γ = 1).
    The equations have no factor T²: a correlation does not shrink where T grows.

    One example alone has no correlation over the batch, so its intra-class part is left out. What
    does not vary has correlation 0 with anything.

    Args:
        student_logits: Class scores ``(n, classes, ...)``.
        teacher_logits: Class scores of the same shape.
        temperature: T, above 0.

    Returns:
        A float32 scalar between 0 and 4.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 1.0]])
        >>> round(dist_loss(scores, scores + 7.0, temperature=4.0).item(), 4)
        0.0
        >>> bool(dist_loss(-scores, scores) > 2)
        True
    """
    student = _examples(F.softmax(student_logits.float() / temperature, dim=1))
    teacher = _examples(F.softmax(teacher_logits.float() / temperature, dim=1))
    inter = 1 - _correlations(student, teacher).mean()
    if len(student) == 1:
        return inter
    return inter + 1 - _correlations(student.T, teacher.T).mean()


def _examples(probabilities: Tensor) -> Tensor:
    """``(n, classes, ...)`` as ``(examples, classes)``."""
    return probabilities.movedim(1, -1).flatten(end_dim=-2)


def _correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of every row of ``(rows, k)`` with the same row of the other, ``(rows,)``."""
    a, b = (F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1, eps=1e-8) for rows in (a, b))
    return (a * b).sum(dim=1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with class ids, mean over the examples, in float32.

    Args:
        logits: Class scores ``(n, classes, ...)``.
        labels: Class ids ``(n, ...)``.
    """
    return F.cross_entropy(logits.float(), labels)


LOSSES: dict[str, Loss] = {"kd": distillation_loss, "mse": logit_mse, "dist": dist_loss}
