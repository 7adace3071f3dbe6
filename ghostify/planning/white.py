"""How much of a layer a Ghost unit could express, from the weights alone: the input is taken for white noise.

Then the correlation of two output maps at one pixel is that of their filters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.spec import Site
from ghostify.tracing import Trace
from ghostify.tracing.sites import filters_of

# A filter below this share of the mean length would need huge kernels to stand for another one.
_FAINT = 1e-3


def white_shares(facts: Trace, site: Site) -> Tensor:
    """How much of each channel of a site a multiple of each other channel explains, ``(n, n)``.

    That is the squared cosine of their filters times the channel's variance behind the norm. Channels of different
    groups see different inputs and explain nothing of each other.
    """
    conv = facts.model.get_submodule(site.name)
    assert isinstance(conv, _ConvNd)  # what a site is
    norm = None if site.chain is None or site.chain.norm is None else facts.model.get_submodule(site.chain.norm)
    filters = filters_of(conv).float().flatten(1)
    lengths, directions = filters.norm(dim=1), F.normalize(filters)
    n, per_group = len(filters), conv.out_channels // conv.groups
    cosine = torch.zeros(n, n, device=filters.device)
    for start in range(0, n, per_group):
        block = slice(start, start + per_group)
        cosine[block, block] = directions[block] @ directions[block].T
    explained = cosine.square_()
    explained[lengths < _FAINT * lengths.mean()] = 0
    explained.fill_diagonal_(1.0)
    return explained.mul_(_variance(conv, norm).to(explained)).cpu()


def _variance(conv: _ConvNd, norm: nn.Module | None) -> Tensor:
    """The variance of every channel: behind a batch norm the square of its scale, else that of white noise."""
    if norm is None:
        return filters_of(conv).float().flatten(1).square().sum(1)
    scale = getattr(norm, "weight", None)
    return torch.ones(conv.out_channels) if scale is None else scale.detach().float().square()
