"""How the ``n`` output channels of a Ghost unit are laid out on its ``m`` intrinsic ones.

With ``q = n // m`` and ``r = n % m``, every intrinsic channel stands for ``q`` outputs and the
first ``r`` for one more. So a ratio that is no integer, or does not divide ``n``, costs no gather
and computes nothing that is thrown away::

    concat    [ m primary maps | (q-1)·m ghosts, by parent | r ghosts of the first r parents ]
    add, mul  [            q·m maps, by parent             | r maps of the first r parents   ]

A *layout* is a permutation ``(n,)``: the original channel at every position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ghostify.spec import GhostSpec


def intrinsic_positions(spec: GhostSpec, total: int, groups: int = 1) -> Tensor:
    """Positions of the layout whose channels are the intrinsic ones, in the order of the primary, ``(m,)``.

    Example:
        >>> intrinsic_positions(GhostSpec(2, fusion="add"), 6)
        tensor([0, 2, 4])
    """
    m = spec.intrinsic_channels(total, groups)
    return torch.arange(m) * (1 if spec.fusion == "concat" else total // m)


def position_parents(spec: GhostSpec, total: int, groups: int = 1) -> Tensor:
    """The primary channel that every position of the layout stands on, ``(n,)``.

    Example:
        >>> position_parents(GhostSpec(3), 7)
        tensor([0, 1, 2, 0, 1, 2, 0])
    """
    m = spec.intrinsic_channels(total, groups)
    copies, extra = divmod(total, m)
    primary = torch.arange(m)
    if spec.fusion == "concat":
        return torch.cat([primary, primary.repeat_interleave(copies - 1), primary[:extra]])
    return torch.cat([primary.repeat_interleave(copies), primary[:extra]])


def natural_layout(spec: GhostSpec, total: int, groups: int = 1) -> Tensor:
    """The layout nearest to the channels as they are: the first ones of every group are intrinsic.

    Without groups it is the identity.
    """
    if groups == 1:
        return torch.arange(total)
    channels = torch.arange(total).view(groups, -1)
    per_group = spec.intrinsic_channels(total, groups) // groups
    return compose_layout(spec, channels[:, :per_group].flatten(), channels[:, per_group:].flatten(), groups)


def compose_layout(spec: GhostSpec, intrinsic: Tensor, ghosts: Tensor, groups: int = 1) -> Tensor:
    """Put chosen channels at their positions.

    Args:
        spec: The unit's options.
        intrinsic: The original channels of the primary, in its order, ``(m,)``.
        ghosts: The other channels in the order of the free positions, ``(n-m,)``.
        groups: Groups of the primary convolution.
    """
    total = len(intrinsic) + len(ghosts)
    layout = torch.full((total,), -1)
    layout[intrinsic_positions(spec, total, groups)] = intrinsic
    layout[layout < 0] = ghosts
    return layout
