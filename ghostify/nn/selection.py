"""Copies of trained modules with fewer channels."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def select_channels(module: Module, channels: Tensor, total: int) -> Module:
    """Copy a convolution or norm, keeping only some of its output channels.

    Every parameter and buffer whose first dimension is the number of channels is indexed by
    ``channels``; everything else is copied as it is. So a subclass keeps its own forward, padding
    mode, dilation, weight standardisation and so on. Storage of dropped channels is never copied.

    Args:
        module: A module with ``total`` output channels, such as ``nn.Conv2d`` or ``nn.BatchNorm2d``.
        channels: Which channels to keep, and in which order, ``(m,)``.
        total: Output channels of ``module``.

    Returns:
        A module of the same class; its ``out_channels`` or ``num_features`` is ``m``.

    Example:
        >>> conv = nn.Conv2d(3, 8, 5, bias=False)
        >>> half = select_channels(conv, torch.tensor([6, 1]), total=8)
        >>> half.weight.shape, torch.equal(half.weight[0], conv.weight[6])
        (torch.Size([2, 3, 5, 5]), True)
    """
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dim() > 0 and tensor.shape[0] == total:
            index = channels.to(tensor.device)
            with torch.no_grad():
                kept: Tensor = tensor.detach().index_select(0, index)
            if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
                kept = kept.contiguous(memory_format=torch.channels_last)  # index_select forgets it
            if isinstance(tensor, nn.Parameter):
                kept = nn.Parameter(kept, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = kept
    chosen = copy.deepcopy(module, memo)
    for name in ("out_channels", "num_features"):
        if hasattr(chosen, name):
            setattr(chosen, name, len(channels))
    return chosen
