"""Fitting a Ghost unit without data: the input is taken for white noise.

Then the correlation of two output maps is the correlation of their filters, at any offset
``δ`` of output pixels: ``R_ab(δ) = Σ_u w_a(u) · w_b(u + stride·δ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ghostify.conversion.norms import looks_folded
from ghostify.nn.ghost import GhostConv
from ghostify.planning.statistics import ridge_solve
from ghostify.tracing.sites import filters_of

_RIDGE = 1e-4


@torch.no_grad()
def solve_kernels(unit: GhostConv, conv: _ConvNd, norm: nn.Module | None, layout: Tensor) -> None:
    """Give the unit its channels and solve its cheap kernels; its norm's mean follows where one is known.

    Args:
        unit: The unit; changed in place.
        conv: The original convolution.
        norm: The batch norm that alone reads the unit's output, if there is one.
        layout: The original channel at every position of the unit, ``(n,)``.
    """
    unit.take_channels(conv, layout, norm)
    if unit.cheap_operation is None:
        return
    m, fusion, side = unit.intrinsic_channels, unit.spec.fusion, unit.spec.dw_size
    positions = layout[m:] if fusion == "concat" else layout
    primary = layout[:m]
    parents = primary[unit.parents()]
    filters = filters_of(conv).float()
    if fusion == "mul":
        # A gate that is constant: the best multiple of the parent.
        side = 1
    taps = _grid(range(side), unit.dims)
    # Two taps of one cheap kernel lie up to twice as far from each other as a tap from the centre.
    offsets = 2 * side - 1
    between = (taps[None] - taps[:, None] + side - 1) @ offsets ** torch.arange(unit.dims - 1, -1, -1)
    gram = _correlation(filters[primary], filters[primary], conv, offsets // 2)[:, between][unit.parents()]
    same_group = (parents // (conv.out_channels // conv.groups)) == (positions // (conv.out_channels // conv.groups))
    cross = _correlation(filters[parents], filters[positions], conv, side // 2)
    cross = cross * same_group[:, None].to(cross)
    kernels = ridge_solve(gram.double(), cross.double().unsqueeze(-1), _RIDGE).squeeze(-1)
    total = kernels.sum(1)
    mean = getattr(norm, "running_mean", None) if unit.spec.placement == "linear" else None
    bias = None
    if conv.bias is not None:
        # What the maps are on average: the norm knows it if it is in use, and white noise adds nothing to the bias.
        centre = conv.bias
        if mean is not None and isinstance(norm, _BatchNorm) and not looks_folded(norm):
            centre = mean.to(conv.bias)
        bias = centre[positions] - total.to(centre) * centre[parents]
    if fusion == "add":
        kernels[:, len(taps) // 2] -= 1
    if fusion == "mul":
        bias = total
        kernels = kernels.new_zeros(len(total), unit.spec.dw_size**unit.dims)
    unit.cheap_operation.assign(kernels.view(-1, *(unit.spec.dw_size,) * unit.dims), bias)
    if mean is not None and (conv.bias is None or fusion == "mul"):
        # The parent's mean is known, so the ghost's is; the norm must take out that one.
        mean[positions] = (total.to(mean) * mean[parents]).clone()


def _correlation(a: Tensor, b: Tensor, conv: _ConvNd, reach: int) -> Tensor:
    """``R_ab(δ)`` of pairs of filters of a convolution for offsets up to ``reach``.

    Args:
        a: ``(k, c, h, w)``, or with one or three spatial dimensions.
        b: Of the same shape.
        conv: Its stride and dilation count. A transposed convolution steps on its input, so its
            outputs lie next to each other.
        reach: Largest offset in output pixels.

    Returns:
        ``(k, offsets)``, the last dimension of the offset fastest.
    """
    dims = a.dim() - 2
    products = a.flatten(2).transpose(1, 2) @ b.flatten(2)  # (k, taps of a, taps of b)
    offsets = _grid(range(-reach, reach + 1), dims)
    taps = torch.cartesian_prod(*map(torch.arange, a.shape[2:])).view(-1, dims)
    apart = (taps[None] - taps[:, None]) * torch.tensor(conv.dilation)
    step = torch.ones(dims, dtype=torch.long) if conv.transposed else torch.tensor(conv.stride)
    meet = (apart[..., None, :] == offsets * step).all(-1)  # (taps of a, taps of b, offsets)
    return products.flatten(1) @ meet.flatten(0, 1).to(a)


def _grid(side: range, dims: int) -> Tensor:
    """All points of a cube, the last dimension fastest, ``(points, dims)``."""
    return torch.cartesian_prod(*[torch.tensor(side)] * dims).view(-1, dims)
