"""The building blocks of the GhostNet family: the Ghost module with its norms, and the Ghost bottleneck.

Sources: GhostNet (Han et al., arXiv 1911.11907, §3.1–3.2), GhostNetV2 (Tang et al., arXiv 2211.12905, "DFC
attention"), GhostNetV3 (Liu et al., arXiv 2404.11202, "Re-parameterization").

A block has one of three forms. ``plain``: every convolution has its batch norm, as in GhostNet and GhostNetV2.
``branched``: as GhostNetV3 is trained, where a sum of convolutions with a norm each stands in the place of one.
``folded``: as it is deployed, every sum made one convolution with a bias by
[fold][ghostify.nn.ghostnet_blocks.fold].

Attributes have the names of the authors' code, so trained weights load.
"""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostify.errors import OptionError
from ghostify.nn.ghostnet_branches import (
    ConvNorm,
    Form,
    activation,
    add_up,
    branches,
    conv_and_norm,
    is_number,
    merged,
    require_form,
    require_whole,
)

_Model = TypeVar("_Model", bound=nn.Module)


class GhostModule(nn.Module):
    """A Ghost module with norm and activation in both branches (GhostNet §3.1, Figure 2).

    ``m = ⌈n/ratio⌉`` intrinsic channels come first, then the ghosts; what there is beyond ``n`` is cut off.
    [GhostConv2d][ghostify.nn.GhostConv2d] is the unit that takes a trained convolution's place; this is the one that
    the GhostNet networks are made of.

    Args:
        in_channels: Input channels ``c``.
        out_channels: Output channels ``n``.
        kernel_size: Side of the primary convolution's kernel, odd.
        stride: Stride of the primary convolution.
        ratio: Output channels divided by intrinsic channels, a whole number.
        dw_size: Side of the cheap operation's depthwise kernel, odd.
        relu: Whether a ReLU follows each norm; a bottleneck's second module has none.
        attention: Whether DFC attention weighs the outputs (GhostNetV2, "DFC attention"): a gate computed at half
            the size by convolutions along the rows, then along the columns. The input must be at least 2×2.
        form: ``plain``, ``branched`` or ``folded``; see the module's docstring.

    Raises:
        OptionError: An argument is out of range.

    Example:
        >>> module = GhostModule(16, 30, ratio=4, attention=True)
        >>> module(torch.zeros(2, 16, 8, 8)).shape, module.primary_conv[0].out_channels
        (torch.Size([2, 30, 8, 8]), 8)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        *,
        ratio: int = 2,
        dw_size: int = 3,
        relu: bool = True,
        attention: bool = False,
        form: Form = "plain",
    ) -> None:
        require_whole("GhostModule", in_channels=in_channels, out_channels=out_channels, stride=stride)
        require_whole("GhostModule", odd=True, kernel_size=kernel_size, dw_size=dw_size)
        require_whole("GhostModule", least=2, ratio=ratio)
        require_form("GhostModule", form)
        super().__init__()
        self.out_channels, self.form = out_channels, form
        m = math.ceil(out_channels / ratio)
        ghosts = m * (ratio - 1)
        if form == "branched":
            self.primary_rpr_conv = branches(in_channels, m, kernel_size, stride)
            self.primary_activation = activation(relu)
            self.cheap_rpr_conv = branches(m, ghosts, dw_size, groups=m)
            self.cheap_rpr_scale = ConvNorm(m, ghosts, 1, groups=m)
            # A norm alone hands its input on, which needs a ghost for every intrinsic channel.
            self.cheap_rpr_skip = nn.BatchNorm2d(m) if ghosts == m else None
            self.cheap_activation = activation(relu)
        else:
            primary = conv_and_norm(in_channels, m, kernel_size, stride, form=form)
            self.primary_conv = nn.Sequential(*primary, activation(relu))
            cheap = conv_and_norm(m, ghosts, dw_size, groups=m, form=form)
            self.cheap_operation = nn.Sequential(*cheap, activation(relu))
        self.short_conv = _attention(in_channels, out_channels, kernel_size, stride) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, n, ⌈h/stride⌉, ⌈w/stride⌉)``."""
        if self.form == "branched":
            primary = self.primary_activation(add_up(self.primary_rpr_conv, x))
            ghosts = self.cheap_activation(add_up(self._cheap_branches(), primary))
        else:
            primary = self.primary_conv(x)
            ghosts = self.cheap_operation(primary)
        maps = torch.cat([primary, ghosts], dim=1)[:, : self.out_channels]
        if self.short_conv is None:
            return maps
        gate = torch.sigmoid(self.short_conv(F.avg_pool2d(x, 2)))
        return maps * F.interpolate(gate, size=maps.shape[-2:], mode="nearest")

    def fold_branches(self, where: str = "GhostModule") -> None:
        """Change this module from ``branched`` to ``folded``, in place; ``fold`` makes a copy instead.

        Args:
            where: The module's name, for error messages.
        """
        self.primary_conv = nn.Sequential(merged(self.primary_rpr_conv, where), nn.Identity(), self.primary_activation)
        self.cheap_operation = nn.Sequential(
            merged(self._cheap_branches(), where), nn.Identity(), self.cheap_activation
        )
        del self.primary_rpr_conv, self.primary_activation
        del self.cheap_rpr_conv, self.cheap_rpr_scale, self.cheap_rpr_skip, self.cheap_activation
        self.form = "folded"

    def _cheap_branches(self) -> list[nn.Module]:
        skip = [] if self.cheap_rpr_skip is None else [self.cheap_rpr_skip]
        return [self.cheap_rpr_scale, *skip, *self.cheap_rpr_conv]


class GhostBottleneck(nn.Module):
    """Two Ghost modules around an optional strided depthwise convolution, and a shortcut (GhostNet §3.2, Figure 3).

    Args:
        in_channels: Input channels ``c``.
        hidden_channels: Channels between the two modules, the paper's expansion size.
        out_channels: Output channels ``n``.
        kernel_size: Side of the depthwise kernels, odd.
        stride: 1 for a block without depthwise convolution; from 2 on it makes the map smaller.
        se_ratio: Channels inside the squeeze-and-excitation divided by the hidden ones; 0 for none.
        attention: Whether the first module has DFC attention (GhostNetV2).
        form: ``plain``, ``branched`` or ``folded``; see the module's docstring.

    Raises:
        OptionError: An argument is out of range.

    Example:
        >>> block = GhostBottleneck(16, 48, 24, stride=2, se_ratio=0.25)
        >>> block(torch.zeros(1, 16, 9, 9)).shape
        torch.Size([1, 24, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        se_ratio: float = 0.0,
        attention: bool = False,
        form: Form = "plain",
    ) -> None:
        where, hidden = "GhostBottleneck", hidden_channels
        require_whole(where, in_channels=in_channels, hidden_channels=hidden, out_channels=out_channels, stride=stride)
        require_whole(where, odd=True, kernel_size=kernel_size)
        require_form(where, form)
        if not (is_number(se_ratio) and 0 <= se_ratio <= 1):
            raise OptionError(f"se_ratio={se_ratio!r} in {where} is not between 0 and 1. Pass 0.25, or 0 for none.")
        super().__init__()
        self.stride, self.form = stride, form
        self.ghost1 = GhostModule(in_channels, hidden, attention=attention, form=form)
        if stride > 1 and form == "branched":
            self.dw_rpr_conv = branches(hidden, hidden, kernel_size, stride, groups=hidden)
            self.dw_rpr_scale = ConvNorm(hidden, hidden, 1, stride, groups=hidden)
        elif stride > 1:
            self.conv_dw, self.bn_dw = conv_and_norm(hidden, hidden, kernel_size, stride, hidden, form)
        self.se = SqueezeExcite(hidden, se_ratio) if se_ratio else nn.Identity()
        self.ghost2 = GhostModule(hidden, out_channels, relu=False, form=form)
        if stride == 1 and in_channels == out_channels:
            self.shortcut: nn.Module = nn.Identity()
        else:
            self.shortcut = nn.Sequential(
                *conv_and_norm(in_channels, in_channels, kernel_size, stride, groups=in_channels),
                *conv_and_norm(in_channels, out_channels, 1),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, n, ⌈h/stride⌉, ⌈w/stride⌉)``."""
        maps: Tensor = self.ghost2(self.se(self._shrink(self.ghost1(x)))) + self.shortcut(x)
        return maps

    def _shrink(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        if self.form == "branched":
            return add_up([self.dw_rpr_scale, *self.dw_rpr_conv], x)
        maps: Tensor = self.bn_dw(self.conv_dw(x))
        return maps

    def fold_branches(self, where: str = "GhostBottleneck") -> None:
        """Change the block's own depthwise branches from ``branched`` to ``folded``, in place.

        Its two Ghost modules have to be folded too; ``fold`` does all of it, on a copy.

        Args:
            where: The block's name, for error messages.
        """
        if self.stride > 1:
            self.conv_dw = merged([self.dw_rpr_scale, *self.dw_rpr_conv], where)
            self.bn_dw = nn.Identity()
            del self.dw_rpr_scale, self.dw_rpr_conv
        self.form = "folded"


class SqueezeExcite(nn.Module):
    """Weighs every channel by what the whole map holds (Hu et al., arXiv 1709.01507), with a hard sigmoid.

    Args:
        channels: Channels ``c``.
        ratio: Channels of the layer inside divided by ``c``; rounded to a multiple of 4.
    """

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        inside = rounded_channels(channels * ratio)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv_reduce = nn.Conv2d(channels, inside, 1)
        self.act1 = nn.ReLU()
        self.conv_expand = nn.Conv2d(inside, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Weigh the channels of ``(b, c, h, w)``."""
        weights: Tensor = self.gate(self.conv_expand(self.act1(self.conv_reduce(self.pool(x)))))
        return x * weights


def fold(model: _Model) -> _Model:
    """Make a copy in which every ``branched`` block is ``folded``: fewer layers, the same outputs in evaluation mode.

    The sums are worked out in double precision and stored in the weights' own. Nothing else is folded: other
    batch norms stay as they are.

    Args:
        model: A block, a network or anything that holds some; left untouched.

    Returns:
        A copy in the model's own mode, to be run in evaluation mode.

    Raises:
        OptionError: There is nothing to fold, or a branch is not a convolution with a batch norm any more.

    Example:
        >>> block = GhostModule(8, 16, form="branched").eval()
        >>> sum(p.numel() for p in block.parameters()), sum(p.numel() for p in fold(block).parameters())
        (544, 152)
    """
    folded = copy.deepcopy(model)
    blocks = {
        name: block
        for name, block in folded.named_modules()
        if isinstance(block, (GhostModule, GhostBottleneck)) and block.form == "branched"
    }
    if not blocks:
        raise OptionError(
            f"model={type(model).__name__} has no block of form='branched', so there is nothing to fold. "
            "Make it with form='branched', or use it as it is."
        )
    for name, block in blocks.items():
        block.fold_branches(name or type(model).__name__)
    return folded


def rounded_channels(channels: float) -> int:
    """The nearest multiple of 4, at least 4 and never less than nine tenths of ``channels``.

    Example:
        >>> rounded_channels(26.0), rounded_channels(5.2), rounded_channels(1)
        (28, 8, 4)
    """
    nearest = max(4, int(channels + 2) // 4 * 4)
    return nearest if nearest >= 0.9 * channels else nearest + 4


def _attention(in_channels: int, out_channels: int, kernel_size: int, stride: int) -> nn.Sequential:
    """The path of DFC attention before its sigmoid: as the Ghost module's own, then along the rows and the columns."""
    along = [
        nn.Conv2d(out_channels, out_channels, (1, 5), padding=(0, 2), groups=out_channels, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, (5, 1), padding=(2, 0), groups=out_channels, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*conv_and_norm(in_channels, out_channels, kernel_size, stride), *along)
