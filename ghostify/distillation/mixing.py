"""Blends of the images of a batch: more views of unlabelled data, for teacher and student alike."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ghostify.errors import InputsError, OptionError


class Mixed(NamedTuple):
    """A batch of blends, and what they were blended from.

    Attributes:
        inputs: ``share · inputs + (1 - share) · inputs[permutation]``, of the shape that was given.
        permutation: Which example was blended into each, ``(n,)``, on the inputs' device.
        share: λ, between 0 and 1: the weight of each example itself.
    """

    inputs: Tensor
    permutation: Tensor
    share: float


def mixed(inputs: Tensor, alpha: float, generator: torch.Generator | None = None) -> Mixed:
    """MixUp: blend every example of a batch with another one of it.

    Zhang et al. 2018, arXiv 1710.09412, §2: λ from Beta(α, α), here one λ and one permutation for the
    whole batch. In distillation the teacher answers for the same blend, so that labels need not be
    blended. Where they count as well, their loss is
    ``share · cross_entropy(output, labels) + (1 - share) · cross_entropy(output, labels[permutation])``,
    which is the cross-entropy with the paper's blended one-hot labels.

    Args:
        inputs: A batch ``(n, ...)`` of floating-point numbers; left as it was.
        alpha: α, above 0: about 0.2 to 0.4 for images, 1 for a λ that is anywhere.
        generator: On the CPU; decides everything. By default torch's global one.

    Raises:
        OptionError: ``alpha`` is not above 0.
        InputsError: ``inputs`` are whole numbers.

    Example:
        >>> batch = torch.tensor([[0.0], [1.0]])
        >>> blend = mixed(batch, 1.0, torch.Generator().manual_seed(0))
        >>> torch.equal(blend.inputs, batch * blend.share + batch[blend.permutation] * (1 - blend.share))
        True
    """
    if not 0 < alpha < float("inf"):
        raise OptionError(f"alpha={alpha!r} must be a number above 0. Pass, for example, alpha=0.2, or do not mix.")
    if not inputs.is_floating_point():
        raise InputsError(f"inputs of type {inputs.dtype} cannot be blended. Pass inputs.float().")
    # torch has no Beta distribution that takes a generator.
    seed = int(torch.randint(2**62, (), generator=generator))
    share = float(np.random.default_rng(seed).beta(alpha, alpha))
    permutation = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    return Mixed(inputs * share + inputs[permutation] * (1 - share), permutation, share)
