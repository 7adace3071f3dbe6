"""Copies of trained modules with fewer channels."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

Module = TypeVar("Module", bound=nn.Module)


def select_channels(module: Module, channels: Tensor) -> Module:
    """Copy a convolution or norm, keeping only some of its output channels.

    Every parameter and buffer whose first dimension is the number of channels is indexed by
    ``channels``; everything else is copied as it is. So a subclass keeps its own forward, padding
    mode, dilation, weight standardisation and so on. Storage of dropped channels is never copied.

    Args:
        module: A module with output channels, such as ``nn.Conv2d`` or ``nn.BatchNorm2d``.
        channels: Which channels to keep, and in which order, ``(m,)``; of a grouped convolution
            equally many of every group, group after group.

    Returns:
        A module of the same class; its ``out_channels`` or ``num_features`` is ``m``.

    Example:
        >>> conv = nn.Conv2d(3, 8, 5, bias=False)
        >>> half = select_channels(conv, torch.tensor([6, 1]))
        >>> half.weight.shape, torch.equal(half.weight[0], conv.weight[6])
        (torch.Size([2, 3, 5, 5]), True)
    """
    sizes = [name for name in ("out_channels", "num_features") if hasattr(module, name)]
    total = getattr(module, sizes[0])
    transposed = isinstance(module, _ConvTransposeNd)
    memo: dict[int, object] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        index = channels.to(tensor.device)
        with torch.no_grad():
            if transposed and name == "weight":
                kept = _select_transposed(tensor.detach(), index, module.groups)  # type: ignore[arg-type]
            elif tensor.dim() > 0 and tensor.shape[0] == total:
                kept = tensor.detach().index_select(0, index)
            else:
                continue
        for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
            if tensor.dim() == dims and tensor.is_contiguous(memory_format=layout):
                kept = kept.contiguous(memory_format=layout)  # index_select forgets it
        memo[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
    chosen = copy.deepcopy(module, memo)
    for name in sizes:
        setattr(chosen, name, len(channels))
    return chosen


def _select_transposed(weight: Tensor, channels: Tensor, groups: int) -> Tensor:
    """Choose output channels of a weight ``(c, n/groups, k, …)``."""
    by_group = weight.view(groups, -1, *weight.shape[1:])
    within = channels.view(groups, -1) % weight.shape[1]
    return torch.cat([part.index_select(1, index) for part, index in zip(by_group, within, strict=True)])
