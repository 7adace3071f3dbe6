"""Fitting one Ghost unit by least squares to what its layer should compute."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ghostify.nn.ghost import GhostConv
from ghostify.planning.choice import Choice, choose_layout
from ghostify.planning.explained import channel_weight, explained_share, kept_share, rows_for
from ghostify.planning.statistics import (
    Moments,
    Window,
    at_pixels,
    channel_means,
    channel_moments,
    in_parts,
    ridge_solve,
    sample_pixels,
)

# Shares of the mean diagonal of the Gram matrix; see docs/decisions.md.
_PRIMARY_RIDGE = 3e-3
_CHEAP_RIDGE = 1e-4
# Samples for the primary: several for every unknown of a filter, fewer for each where there are thousands.
_PRIMARY_ROWS = 20_000
_PRIMARY_ROWS_PER_UNKNOWN, _MANY_UNKNOWNS, _ROWS_PER_MANY_UNKNOWNS = 8, 1024, 6
# Samples for the cheap kernels, which have few unknowns each; of all channels together no more than so many.
_FEWEST_CHEAP_ROWS, _MOST_CHEAP_ROWS, _CHEAP_ROWS_OF_ALL = 2_500, 40_000, 2_500_000
# Multiply-accumulates of the original layer on the images from which these are taken; some images in any case.
_CHEAP_MACS, _FEWEST_CHEAP_IMAGES = 5e9, 64


@dataclass(frozen=True)
class Fitting:
    """What a fit finds out.

    Attributes:
        explained: The share of the targets' variance that cheap kernels on the chosen channels explain, 0 to 1.
        seen: Second moments of what a filter of the primary sees, ``(groups, p, p)``, where it was solved.
    """

    explained: float
    seen: Tensor | None


def fit_unit(
    unit: GhostConv,
    conv: _ConvNd,
    norm: nn.Module | None,
    *,
    inputs: list[Tensor],
    targets: list[Tensor],
    refit_primary: bool,
    generator: torch.Generator,
    choice: Choice | None = None,
) -> Fitting:
    """Choose the unit's intrinsic channels, then solve its primary and its cheap kernels.

    Args:
        unit: The unit; changed in place.
        conv: The original convolution.
        norm: The batch norm that alone reads the unit's output (the original's values; with
            placement ``linear`` its running mean is shifted by what the fit leaves over), if there is one.
        inputs: What the unit will get, each ``(b, c, …)``.
        targets: What it should make of it, each ``(b, n, …)``, original channel order.
        refit_primary: Solve the primary on ``inputs``; else its filters stay the chosen original ones.
        generator: Picks the pixels that are sampled.
        choice: Of the channels, where it has been made already.
    """
    choice = choice or _chosen(unit, norm, targets, generator)
    layout = choice.layout
    kept = kept_share(choice.explained, layout, unit.spec, unit.groups)
    unit.take_channels(conv, layout, norm)
    centred = running_mean(norm) is not None or conv.bias is not None
    seen = None
    if refit_primary:
        seen = _solve_primary(unit, conv, inputs, targets, centred=centred, generator=generator)
    found = Fitting(kept, seen)
    inputs, targets = _thinned(conv, inputs, targets)
    if unit.spec.placement == "linear":
        solve_cheap(unit, inputs, targets, centred=centred, generator=generator)
        _shift_mean(norm, targets, (unit(x) for x in inputs))
        return found
    rows = layout[: unit.intrinsic_channels].to(targets[0].device)
    _shift_mean(unit.primary_norm, [y[:, rows] for y in targets], (unit.primary_conv(x) for x in inputs))
    if unit.spec.fusion == "concat":
        solve_cheap(unit, inputs, targets, centred=centred, generator=generator)
        ghosts = layout[unit.intrinsic_channels :].to(targets[0].device)
        _shift_mean(unit.cheap_norm, [y[:, ghosts] for y in targets], _cheap_maps(unit, inputs))
    else:
        # The branches meet after their norms, so what they make together is the normed map.
        normed = targets if norm is None else [norm(y) for y in targets]
        bias = solve_cheap(unit, inputs, normed, centred=True, generator=generator)
        _let_pass(unit.cheap_norm, _cheap_maps(unit, inputs), bias)
    return found


def _chosen(unit: GhostConv, norm: nn.Module | None, targets: list[Tensor], generator: torch.Generator) -> Choice:
    pixels = [sample_pixels(target, _share(targets, rows_for(unit.out_channels)), generator) for target in targets]
    window = Window.depthwise(unit.spec.dw_size, unit.dims)
    explained = explained_share(targets, pixels, window, norm)
    return Choice(explained, choose_layout(explained, unit.spec, unit.groups))


def _thinned(conv: _ConvNd, inputs: list[Tensor], targets: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Every second, third, … image, where running a unit on all of them would take long."""
    macs = math.prod(targets[0].shape[2:]) * conv.weight.numel()
    step = max(1, sum(len(x) for x in inputs) // max(_FEWEST_CHEAP_IMAGES, int(_CHEAP_MACS / macs)))
    firsts = [-before % step for before in accumulate((len(x) for x in inputs[:-1]), initial=0)]

    def some(chunks: list[Tensor]) -> list[Tensor]:
        return [maps[first::step] for maps, first in zip(chunks, firsts, strict=True) if first < len(maps)]

    return some(inputs), some(targets)


def left_over(unit: GhostConv, norm: nn.Module | None, inputs: list[Tensor], targets: list[Tensor]) -> float:
    """The share of the targets' variance by which a unit misses them, behind the norm; its mean error is the norm's.

    Args:
        unit: The unit.
        norm: The original's batch norm after the layer, if there is one.
        inputs: What the unit gets.
        targets: What it should make of it.
    """
    made = [unit(x) for x in inputs]
    if unit.spec.placement == "paper" and norm is not None:
        targets, norm = [norm(y) for y in targets], None
    weight = channel_weight(norm, unit.out_channels)
    missed, all_of_it = (
        float((channel_moments(maps)[1].to(weight) * weight).sum())
        for maps in ([y - z for y, z in zip(targets, made, strict=True)], targets)
    )
    return missed / all_of_it if all_of_it > 0 else 0.0


def _solve_primary(
    unit: GhostConv,
    conv: _ConvNd,
    inputs: list[Tensor],
    targets: list[Tensor],
    *,
    centred: bool,
    generator: torch.Generator,
) -> Tensor | None:
    """Solve the primary's filters on the inputs, near to the old ones where the data say little.

    Returns:
        Second moments of what a filter sees, ``(groups, p, p)``; nothing if the module is no plain convolution.
    """
    window, groups = Window.of(conv), conv.groups
    if not is_plain(conv, inputs[0]):
        return None
    unknowns = conv.weight[0].numel()
    rows_wanted = max(
        _PRIMARY_ROWS + _PRIMARY_ROWS_PER_UNKNOWN * min(unknowns, _MANY_UNKNOWNS), _ROWS_PER_MANY_UNKNOWNS * unknowns
    )
    channels = unit.layout()[: unit.intrinsic_channels].to(inputs[0].device)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in zip(inputs, targets, strict=True):
            chosen = sample_pixels(target, _share(targets, rows_wanted), generator)
            for part in in_parts(chosen, x.shape[0] * conv.weight[0].numel() * groups):
                seen, wanted = window.patches(x, part), at_pixels(target, part)[:, channels]
                yield by_group(seen, groups), by_group(wanted, groups)

    moments = Moments.of(pairs())
    gram, cross = moments.centred() if centred else moments.plain()
    primary = unit.primary_conv
    assert isinstance(primary, _ConvNd)  # a copy of conv
    old = primary.weight.detach().double().reshape(groups, -1, gram.shape[-1]).transpose(1, 2)
    new = ridge_solve(gram, cross, _PRIMARY_RIDGE, prior=old)
    with torch.no_grad():
        primary.weight.copy_(new.transpose(1, 2).reshape(primary.weight.shape))
        if primary.bias is not None:
            predicted = (moments.mean_a.unsqueeze(-2) @ new).squeeze(-2)
            primary.bias.copy_((moments.mean_y - predicted).flatten())
    return moments.plain()[0]


def solve_cheap(
    unit: GhostConv, inputs: list[Tensor], targets: list[Tensor], *, centred: bool, generator: torch.Generator
) -> Tensor:
    """Solve every depthwise kernel on the primary map that it reads.

    Returns:
        The constant of every map, ``(maps,)``, for a norm to add where the operation has no bias itself.
    """
    if unit.cheap_operation is None:
        return torch.zeros(0)
    fusion = unit.spec.fusion
    window = Window.depthwise(unit.spec.dw_size, unit.dims)
    taps = math.prod(window.kernel)
    parents = unit.parents().to(inputs[0].device)
    layout = unit.layout().to(inputs[0].device)
    channels = layout[unit.intrinsic_channels :] if fusion == "concat" else layout
    rows = max(_FEWEST_CHEAP_ROWS, min(_MOST_CHEAP_ROWS, _CHEAP_ROWS_OF_ALL // unit.out_channels))
    share = _share(targets, rows)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in zip(inputs, targets, strict=True):
            primary = unit.primary(x)
            chosen = sample_pixels(target, share, generator)
            for part in in_parts(chosen, x.shape[0] * len(parents) * taps):
                seen = window.patches(unit.cheap_input(primary), part)[:, parents]  # (rows, maps, d²)
                wanted = at_pixels(target, part)[:, channels]
                if fusion != "concat":
                    parent = at_pixels(primary, part)[:, parents]
                    if fusion == "add":
                        wanted = wanted - parent
                    else:
                        seen = torch.cat([seen * parent.unsqueeze(2), parent.unsqueeze(2)], dim=2)
                yield seen.transpose(0, 1), wanted.T.unsqueeze(2)

    moments = Moments.of(pairs())
    gram, cross = moments.centred() if centred else moments.plain()
    solved = ridge_solve(gram, cross, _CHEAP_RIDGE)
    kernels = solved[:, :taps, 0].view(-1, *window.kernel)
    if fusion == "mul":
        bias = solved[:, -1, 0]
    else:
        bias = (moments.mean_y - (moments.mean_a.unsqueeze(-2) @ solved).squeeze(-2))[:, 0]
    unit.cheap_operation.assign(kernels, bias)
    return torch.zeros_like(bias) if unit.cheap_operation.has_bias else bias


def _cheap_maps(unit: GhostConv, inputs: list[Tensor]) -> Iterator[Tensor]:
    """What the cheap operation makes, before its norm."""
    if unit.cheap_operation is not None:
        for x in inputs:
            yield unit.cheap_operation(unit.cheap_input(unit.primary(x)))


@torch.no_grad()
def _shift_mean(norm: nn.Module | None, targets: list[Tensor], made: Iterable[Tensor]) -> None:
    """Let a norm absorb the mean error that a fit leaves over."""
    mean = running_mean(norm)
    if mean is not None:
        mean -= (channel_means(targets) - channel_means(made)).to(mean)


@torch.no_grad()
def _let_pass(norm: nn.Module | None, maps: Iterable[Tensor], bias: Tensor) -> None:
    """Set a norm so that it passes its maps on as they are (plus ``bias``), in training mode too."""
    if isinstance(norm, _BatchNorm) and norm.running_mean is not None and norm.running_var is not None:
        mean, variance = channel_moments(maps)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if norm.affine:
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.copy_(mean + bias)


def running_mean(norm: nn.Module | None) -> Tensor | None:
    """The mean that a norm takes off in evaluation mode, ``(n,)``, if it keeps one."""
    mean = getattr(norm, "running_mean", None)
    return mean if isinstance(mean, Tensor) else None


def is_plain(conv: _ConvNd, x: Tensor) -> bool:
    """Whether the module computes a convolution with its weight and nothing more (checked on real input)."""
    if conv.transposed:
        return False
    window = Window.of(conv)
    some = x[:1]
    made = conv(some)
    size = window.size_after(tuple(some.shape[2:]))
    if made.shape[2:] != size:
        return False
    total = math.prod(size)
    pixels = torch.arange(0, total, max(1, total // 64), device=x.device)
    patches = by_group(window.patches(some, pixels), conv.groups)
    weight = conv.weight.detach().reshape(conv.groups, -1, patches.shape[-1])
    expected = (patches @ weight.transpose(1, 2)).transpose(0, 1).flatten(1)
    if conv.bias is not None:
        expected = expected + conv.bias.detach()
    actual = at_pixels(made, pixels)
    return torch.allclose(expected, actual, rtol=1e-3, atol=1e-3 * float(actual.abs().max()))


def by_group(samples: Tensor, groups: int) -> Tensor:
    """``(rows, groups·c, …)`` as ``(groups, rows, c·…)``."""
    return samples.reshape(samples.shape[0], groups, -1).transpose(0, 1)


def channel_view(numbers: Tensor, dims: int) -> Tensor:
    """Numbers of channels ``(n,)`` as ``(1, n, 1, …)``, to go with maps of so many sides."""
    return numbers.view(1, -1, *(1 for _ in range(dims)))


def _share(targets: list[Tensor], rows: int) -> float:
    """The share of all pixels that gives about so many samples."""
    return rows / sum(target.numel() // target.shape[1] for target in targets)
