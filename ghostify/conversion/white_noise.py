"""Fitting a Ghost unit without data: the input is taken for white noise.

Then the correlation of two output maps is the correlation of their filters, at any offset
``δ`` of output pixels: ``R_ab(δ) = Σ_u w_a(u) · w_b(u + stride·δ)``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostify.conversion.choice import choose_layout
from ghostify.conversion.statistics import ridge_solve
from ghostify.nn.ghost import GhostConv2d
from ghostify.nn.layout import intrinsic_positions

_RIDGE = 1e-4


def white_explained(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    """How much of each channel a multiple of each other channel explains: squared cosine times ``weight``, ``(n, n)``.

    Channels of different groups see different inputs and explain nothing of each other.
    """
    filters = F.normalize(conv.weight.detach().float().flatten(1))
    n, per_group = len(filters), conv.out_channels // conv.groups
    if conv.groups == 1:
        cosine = filters @ filters.T
    else:
        cosine = torch.zeros(n, n, device=filters.device)
        for start in range(0, n, per_group):
            block = slice(start, start + per_group)
            cosine[block, block] = filters[block] @ filters[block].T
    explained = cosine.square_().cpu()
    explained.fill_diagonal_(1.0)
    return explained.mul_(weight.to(explained))


@torch.no_grad()
def solve_kernels(unit: GhostConv2d, conv: nn.Conv2d, norm: nn.Module | None, explained: Tensor) -> None:
    """Choose the unit's channels and solve its cheap kernels; its norm's mean follows where one is known.

    Args:
        unit: The unit; changed in place.
        conv: The original convolution.
        norm: The batch norm that alone reads the unit's output, if there is one.
        explained: ``(n, n)``, from [white_explained][ghostify.conversion.white_noise.white_explained].
    """
    layout = choose_layout(explained, unit.spec, unit.groups)
    unit.take_channels(conv, layout, norm)
    if unit.cheap_operation is None:
        return
    m, fusion, side = unit.intrinsic_channels, unit.spec.fusion, unit.spec.dw_size
    positions = layout[m:] if fusion == "concat" else layout
    primary = layout[intrinsic_positions(unit.spec, unit.out_channels, unit.groups)]
    parents = primary[unit.parents()]
    filters = conv.weight.detach().float()
    stride, dilation = conv.stride, conv.dilation
    if fusion == "mul":
        # A gate that is constant: the best multiple of the parent.
        side = 1
    half = side // 2
    gram_of = _correlation(filters[primary], filters[primary], stride, dilation, 2 * half)
    offsets = torch.cartesian_prod(torch.arange(side), torch.arange(side)).reshape(-1, 2)
    difference = offsets[None] - offsets[:, None] + 2 * half
    gram = gram_of[:, difference[..., 0], difference[..., 1]][unit.parents()]
    same_group = (parents // (conv.out_channels // conv.groups)) == (positions // (conv.out_channels // conv.groups))
    cross = _correlation(filters[parents], filters[positions], stride, dilation, half).flatten(1)
    cross = cross * same_group[:, None].to(cross)
    kernels = ridge_solve(gram.double(), cross.double().unsqueeze(-1), _RIDGE).squeeze(-1).view(-1, side, side)
    total = kernels.sum((1, 2))
    bias = None
    if conv.bias is not None:
        bias = conv.bias[positions] - total * conv.bias[parents]
    if fusion == "add":
        kernels[:, half, half] -= 1
    if fusion == "mul":
        bias = total
        kernels = torch.zeros(len(total), unit.spec.dw_size, unit.spec.dw_size, dtype=total.dtype)
    unit.cheap_operation.assign(kernels, bias)
    mean = getattr(norm, "running_mean", None)
    if unit.spec.placement == "linear" and mean is not None and conv.bias is None:
        # The parent's mean is known, so the ghost's is; the norm must take out that one.
        mean[positions] = (total.to(mean) * mean[parents]).clone()


def _correlation(a: Tensor, b: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], reach: int) -> Tensor:
    """``R_ab(δ)`` of pairs of filters ``(k, c, h, w)`` for offsets up to ``reach``: ``(k, 2·reach+1, 2·reach+1)``."""
    k, _, h, w = a.shape
    products = (a.flatten(2).transpose(1, 2) @ b.flatten(2)).view(k, h, w, h, w)
    down, right = (_meeting(size, step, gap, reach).to(a) for size, step, gap in zip((h, w), stride, dilation))
    return torch.einsum("khwij,hir,wjs->krs", products, down, right)


def _meeting(size: int, stride: int, dilation: int, reach: int) -> Tensor:
    """One where tap ``i`` of a filter meets tap ``h`` of another that stands ``r - reach`` output pixels further."""
    tap = torch.arange(size)
    apart = dilation * (tap - tap[:, None])
    return apart[..., None] == stride * torch.arange(-reach, reach + 1)
