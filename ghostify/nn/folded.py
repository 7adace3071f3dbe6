"""A Ghost unit as it is deployed: nothing but convolutions and one concatenation.

In evaluation mode a batch norm is ``a·x + b`` for every channel. Behind a unit of placement ``linear`` it
goes into the depthwise convolutions that make the ghosts, and for the intrinsic channels into one of side
1, because the cheap operation reads the raw primary map. ``F = H + G(H)`` (fusion ``add``) is one depthwise
convolution for every map, whose centre tap is one larger. So all that is left has one map for each
channel, which onnxruntime runs without leaving its blocked layout; and no slice does either, where only some
primary maps have one ghost more: these are then made by a convolution of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ghostify.nn.cheap import CONVOLUTIONS
from ghostify.nn.ghost import GhostConv
from ghostify.nn.selection import select_channels

# Classes whose weight can take in a norm: others may do something with it first.
PLAIN = tuple(CONVOLUTIONS.values())


class FoldedGhost(nn.Module):
    """A Ghost unit, and perhaps the batch norm behind it, for inference: maps ``(b, c, …)`` to ``(b, n, …)``.

    Made by [folded][ghostify.nn.folded.folded].

    Attributes:
        primary: The primary convolution, in two where only the first maps have one ghost more.
        intrinsic: What the norm does to the primary maps; empty where they come out as they are.
        cheap: For every copy and every part of the primary a depthwise convolution.
        activation: Through which the cheap operation reads (placement ``paper``).
        after: The activation behind the unit and its norm, applied before the concatenation, so that it can be fused.
        channel_order: The index that puts the channels in order, if one is needed.
    """

    channel_order: Tensor | None

    def __init__(
        self,
        primary: Sequence[nn.Module],
        intrinsic: Sequence[nn.Module],
        cheap: Sequence[Sequence[nn.Module]],
        *,
        dims: int,
        shows_primary: bool,
        activation: nn.Module | None = None,
        after: nn.Module | None = None,
        channel_order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.primary = nn.ModuleList(primary)
        self.intrinsic = nn.ModuleList(intrinsic)
        self.cheap = nn.ModuleList(nn.ModuleList(copy) for copy in cheap)
        self.activation = activation
        self.after = after
        self.shows_primary = shows_primary
        self.channel_dim = -(dims + 1)
        self.register_buffer("channel_order", channel_order)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, …)`` to ``(b, n, …)``."""
        maps = [conv(x) for conv in self.primary]
        parts: list[Tensor] = []
        if self.shows_primary:
            parts += [conv(part) for conv, part in zip(self.intrinsic, maps, strict=True)] if self.intrinsic else maps
        read = maps if self.activation is None else [self.activation(part) for part in maps]
        for maps_of_copy in self.cheap:
            # The last copy may be of the first part alone.
            parts += [conv(part) for conv, part in zip(cast(nn.ModuleList, maps_of_copy), read, strict=False)]
        if self.after is not None:
            parts = [self.after(part) for part in parts]
        joined = torch.cat(parts, dim=self.channel_dim) if len(parts) > 1 else parts[0]
        return joined if self.channel_order is None else joined.index_select(self.channel_dim, self.channel_order)


def can_fold(unit: GhostConv) -> bool:
    """Whether a unit has a folded form: not a gate (fusion ``mul``), and no grouped or transposed primary."""
    primary, spec = unit.primary_conv, unit.spec
    if not isinstance(primary, _ConvNd) or primary.transposed or primary.groups > 1:
        return False
    if spec.placement == "paper":
        return spec.fusion == "concat" and (unit.primary_norm is None or type(primary) in PLAIN)
    return spec.fusion != "mul"


@torch.no_grad()
def folded(unit: GhostConv, norm: nn.Module | None = None, after: nn.Module | None = None) -> FoldedGhost:
    """The same unit for inference, with the norm that alone reads it inside.

    Args:
        unit: With a folded form, see [can_fold][ghostify.nn.folded.can_fold]; left as it is.
        norm: The batch norm behind a unit of placement ``linear``, if it is to be inside.
        after: An activation behind it that is to be inside, too; it acts on every number alone, and not in place.

    Example:
        >>> from ghostify.nn import GhostConv2d
        >>> from ghostify.spec import GhostSpec
        >>> unit, norm = GhostConv2d(3, 8, 3, spec=GhostSpec(3)).eval(), nn.BatchNorm2d(8).eval()
        >>> x = torch.randn(1, 3, 9, 9)
        >>> bool(torch.allclose(folded(unit, norm)(x), norm(unit(x)), atol=1e-5))
        True
    """
    conv = unit.primary_conv
    assert isinstance(conv, _ConvNd)  # see can_fold
    if unit.primary_norm is not None:
        # Copies: a mode that is set on the unit itself would stay.
        conv = fuse_conv_bn_eval(copy.deepcopy(conv).eval(), cast(_BatchNorm, copy.deepcopy(unit.primary_norm).eval()))
    m, n = unit.intrinsic_channels, unit.out_channels
    sizes = [n % m, m - n % m] if n % m else [m]
    behind = None if norm is None else tuple(numbers[_made_at(unit)] for numbers in affine(norm))
    concat = unit.spec.fusion == "concat" or unit.cheap_operation is None
    intrinsic: list[_ConvNd] = []
    if concat and behind is not None:
        scale, shift = (numbers[:m] for numbers in behind)
        intrinsic = _depthwise(scale.view(-1, *(1,) * unit.dims), shift, sizes, like=conv.weight)
    cheap: list[list[_ConvNd]] = []
    if unit.cheap_operation is not None:
        kernels, bias = _cheap(unit)
        if behind is not None:
            kernels, bias = _normed(kernels, bias, *(numbers[n - len(kernels) :] for numbers in behind))
        for start in range(0, len(kernels), m):
            part = slice(start, start + m)
            cheap.append(_depthwise(kernels[part], None if bias is None else bias[part], sizes, like=conv.weight))
    return FoldedGhost(
        [select_channels(conv, rows) for rows in torch.split(torch.arange(m), sizes)],
        intrinsic,
        cheap,
        dims=unit.dims,
        shows_primary=concat,
        activation=copy.deepcopy(unit.activation),
        after=after,
        channel_order=unit.channel_order,
    )


def affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation mode: factor and constant of a channel, ``(n,)``, float64 on the CPU."""
    mean, variance = norm.running_mean, norm.running_var
    assert isinstance(mean, Tensor)  # a batch norm's
    assert isinstance(variance, Tensor)
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    scale = (variance.cpu().double() + getattr(norm, "eps", 0.0)).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().cpu().double()
    shift = -mean.cpu().double() * scale
    return scale, shift if bias is None else shift + bias.detach().cpu().double()


def _made_at(unit: GhostConv) -> Tensor:
    """For every position of the unit's own layout the place at which its channel comes out, ``(n,)``."""
    return torch.arange(unit.out_channels) if unit.channel_order is None else torch.argsort(unit.channel_order.cpu())


def _cheap(unit: GhostConv) -> tuple[Tensor, Tensor | None]:
    """Kernels ``(maps, d, …)`` and bias of the cheap operation, with its norm and the primary map that is added."""
    operation = unit.cheap_operation
    assert operation is not None  # the caller has looked
    kernels = operation.kernels().cpu().double()  # not every device has float64
    bias = torch.cat([cast(Tensor, conv.bias) for conv in operation]).cpu().double() if operation.has_bias else None
    if unit.spec.fusion == "add":
        kernels.flatten(1)[:, kernels[0].numel() // 2] += 1  # a view
    if unit.cheap_norm is not None:
        return _normed(kernels, bias, *affine(unit.cheap_norm))
    return kernels, bias


def _normed(kernels: Tensor, bias: Tensor | None, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise kernels ``(maps, d, …)`` and their bias with what a norm makes of the maps."""
    inside = kernels * scale.view(-1, *(1,) * (kernels.dim() - 1))
    return inside, shift if bias is None else shift + scale * bias


def _depthwise(kernels: Tensor, bias: Tensor | None, sizes: list[int], *, like: Tensor) -> list[_ConvNd]:
    """Depthwise convolutions with one map for each channel: of each part of the primary, or of the first alone."""
    made, start = [], 0
    for size in sizes if len(kernels) == sum(sizes) else sizes[:1]:
        side = kernels.shape[1]
        conv = CONVOLUTIONS[kernels.dim() - 1](
            size,
            size,
            side,
            padding=side // 2,
            groups=size,
            bias=bias is not None,
            device=like.device,
            dtype=like.dtype,
        )
        conv.weight.copy_(kernels[start : start + size].unsqueeze(1))
        if conv.bias is not None and bias is not None:
            conv.bias.copy_(bias[start : start + size])
        made.append(conv)
        start += size
    return made
