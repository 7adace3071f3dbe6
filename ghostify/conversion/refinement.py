"""Refining a fitted Ghost unit: primary and cheap kernels in turn, and only for what the activation lets through.

A first fit ([fit_unit][ghostify.conversion.fitting.fit_unit]) solves the primary for the intrinsic
channels alone, and takes pains over values that the activation cuts off anyway. Here both are
solved in turn for all channels (alternating least squares). Where the teacher's value is cut off
and the student's too, the student's own is the target: such targets only ever lower the error
behind the activation (a majorisation of it, as the auxiliary variable of Zhang et al. 2015 is,
arXiv 1505.06798, §2.3).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from ghostify.conversion.fitting import channel_view, running_mean, solve_cheap
from ghostify.conversion.tails import Tail
from ghostify.nn.ghost import GhostConv
from ghostify.planning.explained import norm_scale
from ghostify.planning.statistics import channel_means


@dataclass(frozen=True)
class _Effort:
    """How thoroughly a unit is refined.

    Attributes:
        rounds: Primary and cheap kernels are solved so often in turn.
        steps: Of conjugate gradients a round; they start from, and are preconditioned by, the layer's own
            second moments.
    """

    rounds: int
    steps: int

    def macs(self, layer: int, metric: int) -> int:
        """Multiply-accumulates for one image, from those of the primary and of applying the metric, once.

        A round has a product with the metric, and the layer run and its weight's gradient, for every
        step and once before; and the layer twice more, for goals and for kernels.
        """
        return self.rounds * ((self.steps + 1) * (2 * layer + metric) + 2 * layer)


# The most thorough one that is affordable on enough images.
_EFFORTS = (_Effort(4, 6), _Effort(3, 4), _Effort(2, 3), _Effort(1, 3))
# Multiply-accumulates that a site may cost: seconds, not minutes.
_MOST_MACS = 2e10
_FEWEST_IMAGES = 4
# Share of the mean diagonal of the Gram matrix that holds the primary to what it was; see docs/decisions.md.
_RIDGE = 3e-3
# Samples: pixels, some for every unknown of a filter; more images if the numbers of their maps are no more than these.
_PIXELS, _PIXELS_PER_UNKNOWN, _IMAGES, _NUMBERS = 40_000, 16, 128, 16_000_000
# Numbers in the largest tensor of a part: 128 MB.
_LARGEST_PART = 32_000_000
# Added to every channel's weight, as a share of the mean, though its norm mutes it.
_LEAST_WEIGHT = 1e-3


@dataclass
class _Site:
    """A unit amid samples of its inputs, and its norm as a map: ``normed = scale · (output + offset) + shift``.

    Attributes:
        unit: The unit.
        inputs: Parts of the sampled inputs.
        targets: The teacher's outputs for them.
        tail: What follows, with the sampled addends.
        scale: Of the norm, ``(1, n, …)``.
        shift: Of the teacher's norm.
        offset: What the student's norm adds to the unit's output beside it.
        metric: How much an error counts: ``(n, n)``, or only the diagonal ``(n,)``.
    """

    unit: GhostConv
    inputs: list[Tensor]
    targets: list[Tensor]
    tail: Tail
    scale: Tensor
    shift: Tensor
    offset: Tensor
    metric: Tensor

    def made(self) -> list[Tensor]:
        """What the unit makes as it is."""
        return [self.unit(x) for x in self.inputs]

    def goals(self, made: list[Tensor]) -> list[Tensor]:
        """What the unit should make, original channel order: the targets, but for what is cut off in both."""
        found = []
        for index, (own, target) in enumerate(zip(made, self.targets, strict=True)):
            after = self.shift if self.tail.addend is None else self.shift + self.tail.addend[index]
            wanted = self.scale * target + after
            normed = self.scale * (own + self.offset) + after
            cut = torch.where(wanted <= self.tail.low, normed.clamp_max(self.tail.low), wanted)
            cut = torch.where(wanted >= self.tail.high, normed.clamp_min(self.tail.high), cut)
            muted = self.scale.abs() < 1e-6
            change = (cut - wanted) / torch.where(muted, 1, self.scale)
            found.append(target + torch.where(muted, 0, change) - self.offset)
        return found


def refine_unit(
    unit: GhostConv,
    norm: nn.Module | None,
    tail: Tail,
    *,
    inputs: list[Tensor],
    targets: list[Tensor],
    seen: Tensor | None,
    metric: Tensor | None,
    generator: torch.Generator,
) -> None:
    """Improve a fitted unit of placement ``linear`` and fusion ``concat`` in single precision; others stay.

    Args:
        unit: The unit; changed in place, and so is the mean of ``norm``.
        norm: The student's batch norm that alone reads the unit's output, if there is one.
        tail: What follows the layer.
        inputs: What the unit will get, each ``(b, c, …)``.
        targets: What it should make of it, each ``(b, n, …)``, original channel order.
        seen: Second moments of what a filter of the primary sees, ``(groups, p, p)``, from the fit.
        metric: What an error costs, ``(n, n)``, see [channel_metrics][ghostify.conversion.sensitivity.channel_metrics];
            by default channels count alone, by the scale that the norm gives them.
        generator: Picks the images and pixels that are sampled.
    """
    primary = unit.primary_conv
    plain = unit.spec.placement == "linear" and unit.spec.fusion == "concat"
    if not plain or unit.cheap_operation is None or seen is None:
        return
    assert isinstance(primary, _ConvNd)  # a copy of a plain one, or its filters would not have been solved
    if primary.weight.dtype != torch.float32:
        return
    effort, images = _affordable(primary, inputs, targets, metric)
    site = _sampled(unit, norm, tail, inputs, targets, metric, images, generator)
    mean = running_mean(norm)
    factors = _cholesky(seen)
    made = site.made()
    for _ in range(effort.rounds):
        goals = site.goals(made)
        left = [goal - own for goal, own in zip(goals, made, strict=True)]
        del made  # maps of all the samples
        with torch.no_grad():
            primary.weight += _step(site, left, factors, effort.steps)
            if mean is None and primary.bias is not None:
                rows = unit.layout()[: unit.intrinsic_channels].to(primary.bias.device)
                primary.bias += (channel_means(goals) - channel_means(site.made()))[rows]
        solve_cheap(unit, site.inputs, goals, centred=mean is not None or primary.bias is not None, generator=generator)
        made = site.made()
        if mean is not None:
            missed = (channel_means(goals) - channel_means(made)).to(site.offset)
            site.offset = site.offset + channel_view(missed, unit.dims)
    if mean is not None:
        teachers = running_mean(tail.norm)
        assert teachers is not None  # the student's norm is a copy of it
        with torch.no_grad():
            mean.copy_(teachers - site.offset.flatten())


def _affordable(
    primary: _ConvNd, inputs: list[Tensor], targets: list[Tensor], metric: Tensor | None
) -> tuple[_Effort, int]:
    """How thoroughly a unit can be refined, and on how many images, for what it may cost."""
    maps, total = targets[0], sum(len(x) for x in inputs)
    size = math.prod(maps.shape[2:])
    layer = size * primary.weight.numel()
    products = 0 if metric is None or metric.dim() == 1 else size * metric.numel()
    enough = math.ceil((_PIXELS + _PIXELS_PER_UNKNOWN * primary.weight[0].numel()) / size)
    most = max(_FEWEST_IMAGES, enough, min(_IMAGES, _NUMBERS // (inputs[0][0].numel() + maps[0].numel())))
    images = {effort: int(_MOST_MACS / effort.macs(layer, products)) for effort in _EFFORTS}
    effort = next((some for some in _EFFORTS if images[some] >= min(enough, total)), _EFFORTS[-1])
    return effort, min(total, most, max(_FEWEST_IMAGES, images[effort]))


def _sampled(
    unit: GhostConv,
    norm: nn.Module | None,
    tail: Tail,
    inputs: list[Tensor],
    targets: list[Tensor],
    metric: Tensor | None,
    count: int,
    generator: torch.Generator,
) -> _Site:
    """Some of the images, and all that is known of the unit amid them."""
    images = torch.randperm(sum(len(x) for x in inputs), generator=generator)[:count].sort().values
    part = max(1, _LARGEST_PART // (inputs[0][0].numel() + targets[0][0].numel()))

    starts = torch.tensor([0, *(len(x) for x in inputs)]).cumsum(0).tolist()
    chosen = [images[(images >= start) & (images < stop)] - start for start, stop in pairwise(starts)]
    some = [index for index, rows in enumerate(chosen) if len(rows)]
    # Chunks are joined where inputs and outputs alike are of one size.
    alike = [list(run) for _, run in groupby(some, key=lambda i: (inputs[i].shape[1:], targets[i].shape[1:]))]

    def sampled(chunks: list[Tensor]) -> list[Tensor]:
        taken = {index: chunks[index][chosen[index].to(chunks[index].device)] for index in some}
        return [piece for run in alike for piece in torch.split(torch.cat([taken[i] for i in run]), part)]

    scale = norm_scale(tail.norm, unit.out_channels).to(targets[0])
    bias = getattr(tail.norm, "bias", None)
    mean, teachers = running_mean(norm), running_mean(tail.norm)
    shift = bias.detach().to(scale) if isinstance(bias, Tensor) else torch.zeros_like(scale)
    shift = shift - scale * teachers.to(scale) if teachers is not None else shift
    offset = (teachers - mean).to(scale) if mean is not None and teachers is not None else torch.zeros_like(scale)
    if metric is None:
        metric = scale.square() / scale.square().mean().clamp_min(1e-12) + _LEAST_WEIGHT
    return _Site(
        unit,
        inputs=sampled(inputs),
        targets=sampled(targets),
        tail=replace(tail, addend=None if tail.addend is None else sampled(tail.addend)),
        scale=channel_view(scale, unit.dims),
        shift=channel_view(shift, unit.dims),
        offset=channel_view(offset, unit.dims),
        metric=metric.to(scale),
    )


def _cholesky(seen: Tensor) -> tuple[Tensor, float]:
    """Second moments ``(groups, p, p)``, damped, as Cholesky factors in single precision; and the damping."""
    damping = _RIDGE * float(seen.diagonal(dim1=1, dim2=2).mean())
    damped = seen.clone()
    damped.diagonal(dim1=1, dim2=2).add_(max(damping, 1e-12))
    return torch.linalg.cholesky(damped).float(), damping  # it preconditions: speed counts, not the last digit


def _step(site: _Site, left: list[Tensor], factors: tuple[Tensor, float], steps: int) -> Tensor:
    """The change of the primary's weight that best makes up for what is left over, by conjugate gradients."""
    unit, (factor, damping) = site.unit, factors
    primary, cheap = copy.deepcopy(unit.primary_conv), copy.deepcopy(unit.cheap_operation)
    assert isinstance(primary, _ConvNd)
    assert cheap is not None  # the caller has looked
    for module in (primary, *cheap.children()):
        if module.bias is not None:
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # a convolution's
    order = unit.layout().to(left[0].device)
    metric = site.metric[order] if site.metric.dim() == 1 else site.metric[order][:, order]
    weight = metric if metric.dim() == 1 else metric.diagonal()
    m, shape = unit.intrinsic_channels, primary.weight.shape
    pixels = sum(part.numel() // part.shape[1] for part in left)
    kernels = cheap.kernels().flatten(1).square().sum(1)
    share = weight[:m].index_add(0, unit.parents().to(weight.device), weight[m:] * kernels)

    def weighed(maps: Tensor) -> Tensor:
        if metric.dim() == 1:
            return maps * channel_view(metric, unit.dims)
        return torch.conv1d(maps.flatten(2), metric.unsqueeze(2)).view_as(maps)

    def back(parts: list[Tensor] | None, direction: Tensor) -> Tensor:
        """The gradient of the maps' products with ``parts``, or with what ``direction`` itself makes."""
        total = torch.zeros_like(direction)
        for index, x in enumerate(site.inputs):
            with torch.enable_grad():
                variable = direction.detach().requires_grad_()
                own = functional_call(primary, {"weight": variable}, (x,))
                maps = torch.cat([own, cheap(own)], 1)
            error = maps.detach() if parts is None else parts[index][:, order]
            total += torch.autograd.grad(maps, variable, weighed(error))[0]
        return total / pixels

    def by_filter(numbers: Tensor) -> Tensor:
        return numbers.view(-1, *(1 for _ in shape[1:]))

    def preconditioned(gradient: Tensor) -> Tensor:
        grouped = gradient.reshape(len(factor), -1, factor.shape[-1]).transpose(1, 2)
        solved = torch.cholesky_solve(grouped, factor).transpose(1, 2).reshape(shape)
        return solved / by_filter(share)

    def inner(a: Tensor, b: Tensor) -> Tensor:
        products = (a * b).flatten(1).sum(1)
        # Without a metric every filter is a problem of its own (its own map and its ghosts'), with its own steps.
        return products if metric.dim() == 1 else products.sum().expand(len(products))

    change = torch.zeros_like(primary.weight)
    residual = back(left, change)
    search = towards = preconditioned(residual)
    product = inner(residual, towards)
    for _ in range(steps):
        image = back(None, search) + damping * by_filter(share) * search
        length = by_filter(product / inner(search, image).clamp_min(1e-20))
        change, residual = change + length * search, residual - length * image
        towards = preconditioned(residual)
        before, product = product, inner(residual, towards)
        search = towards + by_filter(product / before.clamp_min(1e-20)) * search
    return change
