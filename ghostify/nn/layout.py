"""How the ``n`` output channels of a Ghost unit are laid out on its ``m`` intrinsic ones.

With ``q = n // m`` and ``r = n % m``, every intrinsic channel stands for ``q`` outputs and the
first ``r`` for one more. So a ratio that is no integer, or does not divide ``n``, costs no gather
and computes nothing that is thrown away. The parents come in the same order again and again, so
that every copy is a depthwise convolution with one map for each channel, which runs several times
faster than one that makes several of each::

    concat    [ m primary maps | m ghosts | … | m ghosts | r ghosts of the first r parents ]
    add, mul  [     m maps     |  m maps  | … |  m maps  |  r maps of the first r parents  ]

A *layout* is a permutation ``(n,)``: the original channel at every position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostify.spec import GhostSpec


def position_parents(spec: GhostSpec, total: int, groups: int = 1) -> Tensor:
    """The primary channel that every position of the layout stands on, ``(n,)``.

    Example:
        >>> position_parents(GhostSpec(3), 7)
        tensor([0, 1, 2, 0, 1, 2, 0])
    """
    return torch.arange(total) % spec.intrinsic_channels(total, groups)


def natural_layout(spec: GhostSpec, total: int, groups: int = 1) -> Tensor:
    """The layout nearest to the channels as they are: the first ones of every group are intrinsic.

    Without groups it is the identity.
    """
    if groups == 1:
        return torch.arange(total)
    channels = torch.arange(total).view(groups, -1)
    per_group = spec.intrinsic_channels(total, groups) // groups
    # Copy after copy, each with as many channels of every group as the primary has.
    return torch.cat([part.flatten() for part in torch.split(channels, per_group, dim=1)])
