"""What the GhostNet blocks are put together from: convolutions with a norm, sums of them, and folding such a sum.

Source of sums that become one convolution: RepVGG (Ding et al., arXiv 2101.03697, §3.3), as GhostNetV3 uses it
(Liu et al., arXiv 2404.11202, "Re-parameterization").
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ghostify.errors import OptionError

Form = Literal["plain", "branched", "folded"]

# Equal branches beside each other; GhostNetV3's own number.
_BRANCHES = 3


class ConvNorm(nn.Module):
    """A convolution that keeps the map's size (but for the stride), its batch norm and, where asked for, a ReLU.

    Args:
        in_channels: Input channels ``c``.
        out_channels: Output channels ``n``.
        kernel_size: Side of the kernel, odd.
        stride: Stride.
        groups: Groups of the convolution.
        relu: Whether a ReLU follows the norm.
    """

    conv: nn.Conv2d
    bn1: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.conv, self.bn1 = conv_and_norm(in_channels, out_channels, kernel_size, stride, groups)
        self.act1 = activation(relu)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, h, w)`` to ``(b, n, ⌈h/stride⌉, ⌈w/stride⌉)``."""
        maps: Tensor = self.act1(self.bn1(self.conv(x)))
        return maps


def activation(relu: bool) -> nn.Module:
    """A ReLU or nothing."""
    return nn.ReLU() if relu else nn.Identity()


def conv_and_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, form: Form = "plain"
) -> tuple[nn.Conv2d, nn.Module]:
    """A convolution and its norm; folded, a convolution with a bias and nothing."""
    folded = form == "folded"
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=folded)
    return conv, nn.Identity() if folded else nn.BatchNorm2d(out_channels)


def branches(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.ModuleList:
    """Three equal convolutions with a norm each, to be [added up][ghostify.nn.ghostnet_branches.add_up]."""
    return nn.ModuleList(ConvNorm(in_channels, out_channels, kernel_size, stride, groups) for _ in range(_BRANCHES))


def add_up(parts: Iterable[nn.Module], x: Tensor) -> Tensor:
    """The sum of what every part makes of ``x``."""
    first, *others = parts
    total: Tensor = first(x)
    for part in others:
        total = total + part(x)
    return total


def merged(parts: Iterable[nn.Module], where: str) -> nn.Conv2d:
    """The one convolution with a bias that computes what the parts add up to in evaluation mode.

    In evaluation mode a norm multiplies each channel by ``γ/√(σ²+ε)`` and shifts it, so every part is a kernel and a
    bias, and their sum is one. A smaller kernel stands at the centre of the larger; a norm alone is a kernel that
    hands its channel on.

    Args:
        parts: Convolutions with a norm, or norms beside depthwise convolutions. The last is a convolution with the
            full kernel.
        where: The name of the module that holds them, for the error message.

    Raises:
        OptionError: A part is something else by now, because the network was converted before it was folded.
    """
    *_, last = parts = list(parts)
    # In double precision on the CPU: not every accelerator has it.
    kernels, biases = zip(*(_folded(copy.deepcopy(part).to("cpu", torch.float64), where) for part in parts))
    conv = copy.deepcopy(last.conv)
    assert isinstance(conv, nn.Conv2d)  # checked with the others
    side = conv.kernel_size[0]
    with torch.no_grad():
        padded = [F.pad(kernel, [(side - kernel.shape[-1]) // 2] * 4) for kernel in kernels]
        conv.weight.copy_(torch.stack(padded).sum(0))
        conv.bias = nn.Parameter(torch.stack(biases).sum(0).to(conv.weight), conv.weight.requires_grad)
    return conv


def _folded(part: Any, where: str) -> tuple[Tensor, Tensor]:
    """The kernel and bias of a convolution with a norm, or of a norm alone, in double precision."""
    conv, norm = (part.conv, part.bn1) if isinstance(part, ConvNorm) else (None, part)
    foldable = conv is None or isinstance(conv, nn.Conv2d)
    if not foldable or not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise OptionError(
            f"model: {where} has a branch of {type(conv).__name__} and {type(norm).__name__}, but only a convolution "
            "and a batch norm with running statistics can be folded. Fold the network first, then convert it."
        )
    kernel = torch.ones(norm.num_features, 1, 1, 1, dtype=torch.float64) if conv is None else conv.weight
    return fuse_conv_bn_weights(kernel, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)


def require_whole(where: str, *, least: int = 1, odd: bool = False, **values: int) -> None:
    """Raise an OptionError for a value that is not a whole number in range; an even kernel would shift the map."""
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least or (odd and value % 2 == 0):
            kind, example = ("an odd", 3) if odd else ("a whole", least)
            raise OptionError(
                f"{name}={value!r} in {where} is not {kind} number of at least {least}. "
                f"Pass, for example, {name}={example}."
            )


def require_form(where: str, form: str) -> None:
    """Raise an OptionError for an unknown form."""
    if form not in get_args(Form):
        raise OptionError(f"form={form!r} in {where} is unknown. Pass one of {', '.join(get_args(Form))}.")


def is_number(value: object) -> bool:
    """Whether it can be compared with a limit; ``True`` and ``"1.0"`` are no numbers here."""
    return isinstance(value, int | float) and not isinstance(value, bool)
