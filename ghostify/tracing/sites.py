"""The facts of a convolution that its module alone tells, and the fingerprint of a whole model."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import defaultdict
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from ghostify.nn.selection import select_channels
from ghostify.spec import Call, Site
from ghostify.tracing.example import difference
from ghostify.tracing.running import unmarked

CONVOLUTIONS: dict[Any, type[_ConvNd]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
"""The function of every kind of convolution, and its module."""

_REPLACEABLE = tuple(CONVOLUTIONS.values())
_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "output_padding")


def own_facts(module: _ConvNd) -> dict[str, Any]:
    """What a site says of its module alone, whatever the module is part of."""
    return {
        "kind": type(module).__name__,
        "in_channels": module.in_channels,
        "out_channels": module.out_channels,
        "kernel_size": tuple(module.kernel_size),
        "stride": tuple(module.stride),
        "groups": module.groups,
        "bias": module.bias is not None,
        "params": sum(parameter.numel() for parameter in module.parameters(recurse=False)),
        "channel_params": _channel_params(module),
        "transposed": module.transposed,
    }


def is_site(module: nn.Module | None, site: Site) -> bool:
    """Whether a module can be the one that a site tells of."""
    return isinstance(module, _ConvNd) and all(
        getattr(site, name) == value for name, value in own_facts(module).items()
    )


def fingerprint(model: nn.Module) -> str:
    """Hash of a model's structure; values and devices do not count.

    Names and shapes of its state, and the class and options of every convolution, which shapes do not tell.

    Example:
        >>> fingerprint(nn.Conv2d(3, 8, 3)) == fingerprint(nn.Conv2d(3, 8, 3))
        True
        >>> fingerprint(nn.Conv2d(3, 8, 3)) == fingerprint(nn.Conv2d(3, 8, 3, stride=2))
        False
    """
    lines = [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            options = {option: getattr(module, option) for option in _OPTIONS}
            lines.append(f"{name} {type(module).__name__} {options}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold each parameter, by the parameter's identity."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)].append(name)
    return owners


def obstacle_to_replacing(name: str, module: _ConvNd, owners: dict[int, list[str]]) -> str:
    """Why a module cannot be replaced without changing its meaning; empty if it can."""
    if not name:
        return "it is the whole model; put it into an nn.Sequential"
    if not isinstance(module, _REPLACEABLE):
        return f"{type(module).__name__}: not a kind of torch.nn.Conv1d to 3d, transposed or not"
    if is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed anew at every call (parametrization)"
    if has_hooks(module):
        return "it carries hooks that expect this very module"
    if next(module.children(), None) is not None:
        return "it has modules of its own inside"
    for what, parameter in module._parameters.items():
        others = [owner for owner in owners.get(id(parameter), ()) if owner != name]
        if others:
            return f"its {what} is shared with {others[0] or 'the model itself'}"
    return ""


def has_hooks(module: nn.Module) -> bool:
    """Whether something looks on, or interferes, when a module is called."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises every channel by running statistics, whatever else it does.

    So do torch's batch norms, frozen ones (torchvision's, timm's), and timm's ``BatchNormAct2d``.
    """
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(value, Tensor) for value in statistics) and not isinstance(module, _InstanceNorm)


def is_separable(module: _ConvNd, call: Call) -> bool:
    """Whether some channels of a convolution are what they are without the others, too.

    A subclass may normalise over all filters, or hold what looks like a number for every output
    channel and is one for every input channel. So where it is not torch's own, it is tried.
    """
    n = module.out_channels
    channels = torch.arange(n).view(module.groups, -1)[:, 1::2].flatten()
    if not len(channels) or module.weight.is_meta or type(module) in _REPLACEABLE:
        return True
    weight = module.weight
    x = torch.randn(1, *call.input_shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    try:
        with unmarked(module), torch.no_grad():
            part = select_channels(module, channels)
            return not difference(part(x), module(x).index_select(1, channels.to(weight.device)))
    except Exception:  # whatever a subclass raises when its own numbers do not fit any more
        return False


def filters_of(conv: _ConvNd) -> Tensor:
    """The filter of every output channel, ``(n, c/groups, k, …)``, whatever the layout of the weight.

    A subclass may convolve with another weight than it holds, one that is standardised, say; that one counts.

    Example:
        >>> filters_of(nn.ConvTranspose2d(6, 8, 2, groups=2)).shape
        torch.Size([8, 3, 2, 2])
    """
    weight = conv.weight.detach()
    if type(conv) not in _REPLACEABLE and not weight.is_meta:
        weight = _applied_weight(conv)
    if not conv.transposed:
        return weight
    by_group = weight.view(conv.groups, -1, *weight.shape[1:])  # (groups, c/groups, n/groups, k, …)
    return by_group.transpose(1, 2).flatten(0, 1)


def _applied_weight(conv: _ConvNd) -> Tensor:
    """The weight with which a subclass makes its output; its own, and a warning, where there is more to it."""
    weight, calls = conv.weight.detach(), _Calls()
    # Two outputs a side.
    size = [d * (k - 1) + 1 + s for d, k, s in zip(conv.dilation, conv.kernel_size, conv.stride, strict=True)]
    x = torch.randn(1, conv.in_channels, *size, generator=torch.Generator().manual_seed(0)).to(weight)
    with suppress(Exception), unmarked(conv), torch.no_grad():  # whatever a subclass raises for such an input
        with calls:
            made = conv(x)
        for applied, output in calls.found:
            rounding = 8 * torch.finfo(weight.dtype).eps * float(made.abs().max())
            fits = applied.shape == weight.shape and made.shape == output.shape
            if fits and float((_slopes(output) - _slopes(made)).abs().max()) <= rounding:
                return applied.detach()
    warnings.warn(
        f"{type(conv).__name__} does more than to convolve with a weight, so the weights alone hardly tell how its "
        "channels are related. Start it from calibration images.",
        stacklevel=2,
    )
    return weight


def _slopes(maps: Tensor) -> Tensor:
    """Maps ``(1, n, …)`` but for a constant of every channel, which tells nothing of its filter."""
    numbers = maps.float().flatten(2)
    return numbers - numbers[..., :1]


class _Calls(TorchFunctionMode):
    """While it is open, notes the weights and outputs of convolutions.

    Attributes:
        found: Pairs of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in CONVOLUTIONS:
            self.found.append((args[1] if len(args) > 1 else (kwargs or {})["weight"], made))
        return made


def _channel_params(module: _ConvNd) -> int:
    """Parameters that belong to one output channel: those that `select_channels` would leave out with it."""
    n = module.out_channels
    # Not read from the weight: a parametrized one is computed anew when it is read, and may keep count of that.
    weight = module.in_channels // module.groups * math.prod(module.kernel_size)
    rest = (p for name, p in module.named_parameters(recurse=False) if name != "weight")
    return weight + sum(p.numel() // n for p in rest if p.dim() and p.shape[0] == n)
