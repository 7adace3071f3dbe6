"""Which channels stay intrinsic, and which of them is the parent of every ghost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ghostify.spec import GhostSpec

Matrix = NDArray[np.float32]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Choice:
    """Which channels of a layer stay, and what speaks for it.

    Attributes:
        explained: How much of each channel a cheap filter on each other one explains, ``(n, n)``.
        layout: The original channel at every position of the unit, ``(n,)``.
    """

    explained: Tensor
    layout: Tensor


def choose_layout(explained: Tensor, spec: GhostSpec, groups: int = 1) -> Tensor:
    """Choose intrinsic channels and parents so that the most is kept of all channels.

    First greedily: the ghost that loses least goes to its best parent that has room, until enough
    are gone. Then, for the channels chosen, the parents again by an optimal assignment
    (``scipy.optimize.linear_sum_assignment``).

    Args:
        explained: ``(n, n)``; how much of channel ``b`` a cheap filter on channel ``a`` explains at
            ``[a, b]``, on the diagonal all that there is to explain.
        spec: The unit's options.
        groups: Groups of the convolution; every group keeps as many intrinsic channels.

    Returns:
        The layout: the original channel at every position of the unit, ``(n,)``.
    """
    gain = explained.detach().cpu().float().numpy()
    n = len(gain)
    m = spec.intrinsic_channels(n, groups)
    if m == n:
        return torch.arange(n)
    intrinsic = _greedy(gain, n - m, room=-(-(n - m) // m), groups=groups)
    ghosts = np.setdiff1d(np.arange(n), intrinsic)
    intrinsic, ghosts = _assign(gain, intrinsic, ghosts, movable=groups == 1)
    return torch.from_numpy(np.concatenate([intrinsic, ghosts]))


def _greedy(gain: Matrix, count: int, room: int, groups: int) -> Indices:
    """Take ``count`` channels away, the least loss first; returns those that stay, ascending."""
    n = len(gain)
    # loss[b, a]: what is lost of channel b as a ghost of a. Infinite where that is not possible (any more).
    loss = np.ascontiguousarray(np.diag(gain)[:, None] - gain.T)  # rows are searched, so rows are contiguous
    np.fill_diagonal(loss, np.inf)
    free = np.full(n, room)
    quota = np.full(groups, count // groups)
    group = np.repeat(np.arange(groups), n // groups)
    is_ghost = np.zeros(n, dtype=bool)
    parent = loss.argmin(axis=1)
    least = loss[np.arange(n), parent]
    for _ in range(count):
        ghost = int(least.argmin())
        if not np.isfinite(least[ghost]):
            # All that is left are parents with ghosts and no one with room: rare, and only for odd
            # sizes. Any channel that is no parent yet will do; the assignment below finds its parent.
            ghost = int(np.flatnonzero(~is_ghost & (quota[group] > 0))[-1])
            is_ghost[ghost] = True
            quota[group[ghost]] -= 1
            continue
        chosen = int(parent[ghost])
        is_ghost[ghost] = True
        least[ghost] = least[chosen] = np.inf  # neither can become a ghost any more
        free[chosen] -= 1
        quota[group[ghost]] -= 1
        closed = [ghost] if free[chosen] else [ghost, chosen]
        loss[:, closed] = np.inf
        if not quota[group[ghost]]:
            least[group == group[ghost]] = np.inf
        orphaned = parent == ghost if free[chosen] else (parent == ghost) | (parent == chosen)
        for orphan in np.flatnonzero(orphaned & np.isfinite(least)):
            parent[orphan] = loss[orphan].argmin()
            least[orphan] = loss[orphan, parent[orphan]]
    return np.flatnonzero(~is_ghost)


def _assign(gain: Matrix, intrinsic: Indices, ghosts: Indices, *, movable: bool) -> tuple[Indices, Indices]:
    """Give every ghost its parent optimally; order both as the layout wants them.

    Every intrinsic channel has ``q`` ghosts and some have one more: those come first. In a grouped
    convolution the order of intrinsic channels is fixed (not ``movable``), so the first ones it is.
    """
    m = len(intrinsic)
    q, extra = divmod(len(ghosts), m)
    candidates = m if movable and extra else extra
    slots = np.concatenate([np.repeat(np.arange(m), q), np.arange(candidates)])
    value = gain[np.ix_(intrinsic[slots], ghosts)].T
    # Where more slots are offered than ghosts exist, the first q of every parent must be filled.
    value[:, : m * q] += 2 * (np.abs(value).max() + 1)
    from scipy.optimize import linear_sum_assignment  # here, as importing it takes longer than most commands

    rows, columns = linear_sum_assignment(value, maximize=True)
    ghost_of_slot = dict(zip(columns.tolist(), ghosts[rows].tolist()))
    with_extra = [slot - m * q for slot in range(m * q, len(slots)) if slot in ghost_of_slot]
    order = [*with_extra, *(i for i in range(m) if i not in set(with_extra))]
    regular = [ghost_of_slot[i * q + copy] for copy in range(q) for i in order]
    last = [ghost_of_slot[m * q + i] for i in with_extra]
    return intrinsic[order], np.array([*regular, *last], dtype=np.int64)
