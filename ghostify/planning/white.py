"""How much of a layer a Ghost unit could express, from the weights alone: the input is taken for white noise.

Then the correlation of two output maps at one pixel is that of their filters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.nn.selection import filters_of
from ghostify.spec import Site
from ghostify.tracing import Trace


def white_explained(conv: _ConvNd, weight: Tensor) -> Tensor:
    """How much of each channel a multiple of each other channel explains: squared cosine times ``weight``, ``(n, n)``.

    Channels of different groups see different inputs and explain nothing of each other.
    """
    filters = F.normalize(filters_of(conv).float().flatten(1))
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


def white_shares(facts: Trace, site: Site) -> Tensor:
    """The same of a site, each channel with its variance behind the norm: ``(n, n)``."""
    conv = facts.model.get_submodule(site.name)
    assert isinstance(conv, _ConvNd)  # what a site is
    norm = None if site.chain is None or site.chain.norm is None else facts.model.get_submodule(site.chain.norm)
    return white_explained(conv, _variance(conv, norm))


def _variance(conv: _ConvNd, norm: nn.Module | None) -> Tensor:
    """The variance of every channel: behind a batch norm the square of its scale, else that of white noise."""
    if norm is None:
        return filters_of(conv).float().flatten(1).square().sum(1)
    scale = getattr(norm, "weight", None)
    return torch.ones(conv.out_channels) if scale is None else scale.detach().float().square()
