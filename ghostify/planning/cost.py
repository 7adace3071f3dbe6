"""What a convolution costs, and what the Ghost unit in its place will cost.

Source: Han et al., arXiv 1911.11907, §3.2, eq. 4–5; here exact for any ratio, group count and bias.
"""

from __future__ import annotations

import math

from ghostify.spec import GhostSpec, Site


def conv_macs(site: Site) -> int:
    """Multiply-accumulates of all calls of the convolution, batch 1, no bias.

    Args:
        site: The facts of the convolution.
    """
    return _macs_of(site, site.out_channels)


def ghost_macs(site: Site, spec: GhostSpec) -> int:
    """Multiply-accumulates of the Ghost unit in its place, batch 1, no bias.

    Args:
        site: The facts of the convolution.
        spec: The unit.
    """
    primary = spec.intrinsic_channels(site.out_channels, site.groups)
    cheap = spec.cheap_channels(site.out_channels, site.groups) * spec.dw_size ** len(site.kernel_size)
    return _macs_of(site, primary) + _times_pixels(site, cheap)


def ghost_params(site: Site, spec: GhostSpec) -> int:
    """Parameters of the Ghost unit in its place.

    With placement ``paper`` and a fusion other than ``concat`` the norms of the two branches hold
    more channels than the original norm; the difference is counted here.

    Args:
        site: The facts of the convolution.
        spec: The unit.
    """
    n = site.out_channels
    primary = spec.intrinsic_channels(n, site.groups)
    cheap = spec.cheap_channels(n, site.groups)
    bias = site.bias or spec.fusion == "mul"
    kernel: int = spec.dw_size ** len(site.kernel_size)
    params = site.params - (n - primary) * site.channel_params + cheap * (kernel + bias)
    if spec.placement == "paper" and site.chain is not None and site.chain.norm is not None:
        params += 2 * (primary + cheap - n)
    return params


def _macs_of(site: Site, out_channels: int) -> int:
    """Multiply-accumulates of a convolution like the site's with so many output channels."""
    taps = math.prod(site.kernel_size)
    if site.transposed:  # every input pixel meets every tap
        per_pixel = out_channels // site.groups * taps
        return round(sum(per_pixel * math.prod(call.input_shape) * call.rows for call in site.calls))
    return _times_pixels(site, out_channels * site.in_channels // site.groups * taps)


def _times_pixels(site: Site, per_pixel: int) -> int:
    return round(sum(per_pixel * math.prod(call.output_shape[1:]) * call.rows for call in site.calls))
