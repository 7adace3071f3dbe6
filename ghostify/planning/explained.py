"""How much of a layer's output its Ghost unit could still express, measured on the original's own activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.nn.layout import position_parents
from ghostify.planning.statistics import Moments, Window, at_pixels, in_parts, ridge_solve, sample_pixels
from ghostify.spec import GhostSpec, Site
from ghostify.tracing import Example, Trace, seed_torch, unmarked

# Share of the mean diagonal of the Gram matrix; see docs/decisions.md.
RIDGE = 1e-4
# Bytes for the sums of the sites that are measured in one pass over the images.
_MEMORY = 2**30


def explained_share(targets: list[Tensor], pixels: list[Tensor], window: Window, norm: nn.Module | None) -> Tensor:
    """How much of each channel's variance a filter with the given window on each other channel explains.

    Channels count as they do after the norm: by the square of its scale.

    Args:
        targets: What the layer makes, each ``(b, n, …)``.
        pixels: Which pixels of each are used, ``(p,)``.
        window: Of the cheap operation.
        norm: The batch norm after the layer, if there is one.

    Returns:
        ``(n, n)``, for [choose_layout][ghostify.planning.choice.choose_layout].
    """
    pairs = (pair for maps, places in zip(targets, pixels, strict=True) for pair in _pairs(maps, places, window))
    return explained_by(Moments.of(pairs), norm)


def kept_share(explained: Tensor, layout: Tensor, spec: GhostSpec, groups: int = 1) -> float:
    """The share of all channels' variance that is left with a layout, 0 to 1.

    Args:
        explained: From [explained_share][ghostify.planning.explained.explained_share].
        layout: From [choose_layout][ghostify.planning.choice.choose_layout].
        spec: The unit's options.
        groups: Of the convolution.
    """
    parents = layout[position_parents(spec, len(layout), groups)].to(explained.device)
    total = float(explained.diagonal().sum())
    return min(1.0, float(explained[parents, layout.to(explained.device)].sum()) / total) if total > 0 else 1.0


def site_shares(
    facts: Trace, sites: Sequence[Site], spec: GhostSpec, chunks: list[Example], seed: int = 0
) -> Iterator[tuple[Site, Tensor]]:
    """Explained shares of many sites; see [site_moments][ghostify.planning.explained.site_moments]."""
    for site, moments in site_moments(facts, sites, spec, chunks, seed):
        yield site, explained_by(moments, norm_of(site, facts))


def site_moments(
    facts: Trace, sites: Sequence[Site], spec: GhostSpec, chunks: list[Example], seed: int = 0
) -> Iterator[tuple[Site, Moments]]:
    """Second moments of what many sites make: the original is run, and only sums are kept.

    Args:
        facts: The original with its facts.
        sites: Which ones.
        spec: Gives the size of the cheap kernels.
        chunks: Calibration inputs.
        seed: Of the choice of pixels.

    Yields:
        For every site that was called: of what a cheap filter sees of each channel, and each channel's value there.
    """
    examples = sum(chunk.batch for chunk in chunks)
    for group in _groups(sites, spec):
        sums: dict[str, Moments] = {}
        handles = [
            facts.model.get_submodule(site.name).register_forward_hook(_adder(site, spec, examples, sums, seed))
            for site in group
        ]
        try:
            with unmarked(facts.model), torch.no_grad():
                seed_torch(seed, facts.model)
                for chunk in chunks:
                    fresh = chunk.copied()
                    facts.model(*fresh.args, **fresh.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for site in group:
            if site.name in sums:
                yield site, sums[site.name]


def norm_of(site: Site, facts: Trace) -> nn.Module | None:
    """The batch norm that alone reads a site, if there is one."""
    norm = site.chain.norm if site.chain is not None else None
    return None if norm is None else facts.model.get_submodule(norm)


def _adder(
    site: Site, spec: GhostSpec, examples: int, sums: dict[str, Moments], seed: int
) -> Callable[[nn.Module, Any, Tensor], None]:
    """A hook that adds what a site makes to its sums."""
    window = Window.depthwise(spec.dw_size, len(site.kernel_size))
    share = rows_for(site.out_channels) / (
        examples * sum(math.prod(call.output_shape[1:]) * call.rows for call in site.calls)
    )
    generator = torch.Generator().manual_seed(seed)

    def add(module: nn.Module, args: Any, output: Tensor) -> None:
        maps = output if output.dim() == len(window.kernel) + 2 else output.unsqueeze(0)
        pairs = _pairs(maps, sample_pixels(maps, share, generator), window)
        sums[site.name] = Moments.of(pairs, onto=sums.get(site.name))

    return add


def rows_for(channels: int) -> int:
    """Samples for the pairs of so many channels: each has few unknowns, and there are many pairs in a wide layer."""
    return max(2_000, min(20_000, 1_250_000 // channels))


def channel_weight(norm: nn.Module | None, channels: int) -> Tensor:
    """Squared factor by which a norm in evaluation mode scales each channel, ``(n,)``; ones without a norm."""
    return norm_scale(norm, channels).square()


def norm_scale(norm: nn.Module | None, channels: int) -> Tensor:
    """Factor by which a batch norm in evaluation mode scales each channel, ``(n,)``; ones without a norm."""
    variance = getattr(norm, "running_var", None)
    if not isinstance(variance, Tensor):
        return torch.ones(channels)
    scale, eps = getattr(norm, "weight", None), getattr(norm, "eps", 0.0)
    deviation = (variance.double() + eps).sqrt()
    return (scale.detach().double() if isinstance(scale, Tensor) else 1.0) / deviation


def _pairs(maps: Tensor, pixels: Tensor, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
    """What a filter sees of every channel ``(n, rows, taps)``, and all channels' values there ``(rows, n)``."""
    taps = math.prod(window.kernel)
    for part in in_parts(pixels, maps.shape[0] * maps.shape[1] * taps):
        yield window.patches(maps, part).transpose(0, 1), at_pixels(maps, part)


def explained_by(moments: Moments, norm: nn.Module | None) -> Tensor:
    """How much of each channel ``b`` a cheap filter on channel ``a`` explains, at ``[a, b]``, ``(n, n)``."""
    gram, cross = moments.centred()
    explained = (cross * ridge_solve(gram, cross, RIDGE)).sum(1)
    centre = gram.shape[1] // 2
    variance = gram[:, centre, centre]
    explained = explained.clamp_min(0).minimum(variance)
    explained.diagonal().copy_(variance)
    return explained * channel_weight(norm, len(variance)).to(explained)


def _groups(sites: Sequence[Site], spec: GhostSpec) -> Iterator[list[Site]]:
    """The sites in groups whose sums fit the memory."""
    group: list[Site] = []
    used = 0
    for site in sites:
        taps = spec.dw_size ** len(site.kernel_size)
        needed = 8 * site.out_channels * taps * (taps + site.out_channels)
        if group and used + needed > _MEMORY:
            yield group
            group, used = [], 0
        group.append(site)
        used += needed
    if group:
        yield group
