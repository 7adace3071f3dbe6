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


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with class ids, mean over the examples, in float32.

    Args:
        logits: Class scores ``(n, classes, ...)``.
        labels: Class ids ``(n, ...)``.
    """
    return F.cross_entropy(logits.float(), labels)


LOSSES: dict[str, Loss] = {"kd": distillation_loss, "mse": logit_mse}
