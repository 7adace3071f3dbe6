"""How the Ghost units of a converted model start.

An initialiser is a plain function of a [Conversion][ghostify.conversion.Conversion] that changes
the student in place. ``INITIALISERS`` holds those that have a name; a function of one's own does as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.conversion.channel_order import shared_choices
from ghostify.conversion.fits import Fit
from ghostify.conversion.fitting import Fitting, fit_unit, left_over
from ghostify.conversion.refinement import refine_unit
from ghostify.conversion.sensitivity import channel_metrics
from ghostify.conversion.tails import Tail
from ghostify.conversion.walk import Visit, walk_calls, walk_graph
from ghostify.conversion.white_noise import solve_kernels
from ghostify.errors import InputsError, OptionError
from ghostify.nn.ghost import GhostConv
from ghostify.planning.choice import Choice, choose_layout
from ghostify.planning.explained import norm_scale, site_shares
from ghostify.planning.white import white_shares
from ghostify.spec import Decision, Plan
from ghostify.tracing import Example, Trace, own_random_state, seed_torch, unmarked


@dataclass(frozen=True)
class Conversion:
    """What an initialiser gets.

    Attributes:
        plan: The plan.
        facts: The teacher with all that is known of it; the teacher must not be changed.
        student: The converted model, in evaluation mode; its Ghost units are to be started.
        chunks: Calibration inputs, on the model's device; empty if there are none.
        seed: Seed of everything that is random.
        fits: By site, how well the start fits it; an initialiser that knows writes it down here.
    """

    plan: Plan
    facts: Trace
    student: nn.Module
    chunks: list[Example]
    seed: int
    fits: dict[str, Fit] = field(default_factory=dict)

    @property
    def decisions(self) -> dict[str, Decision]:
        """The replaced sites by name, in order of execution."""
        return {decision.site.name: decision for decision in self.plan.replaced}

    def unit(self, decision: Decision) -> GhostConv:
        """The student's Ghost unit at a site."""
        return cast(GhostConv, self.student.get_submodule(decision.site.name))

    def original(self, decision: Decision) -> _ConvNd:
        """The teacher's convolution at a site."""
        return cast(_ConvNd, self.facts.model.get_submodule(decision.site.name))

    def norm(self, decision: Decision) -> nn.Module | None:
        """The batch norm after a site: the student's own, or the teacher's where the unit holds the norms."""
        chain = decision.site.chain
        if chain is None or chain.norm is None:
            return None
        owner = self.facts.model if decision.spec and decision.spec.placement == "paper" else self.student
        return owner.get_submodule(chain.norm)


Initialiser = Callable[[Conversion], None]

# A norm's squared scale below this share of the mean counts as nearly muting its channel.
_MUTED = 0.01
# Images on which the error of a fit is measured, and those on which units that share an order choose it.
_ERROR_IMAGES, _SHARED_IMAGES = 32, 64


def random(conversion: Conversion) -> None:
    """Fresh random weights in every Ghost unit, channels in their natural order; no other layer changes."""
    with own_random_state(conversion.facts.model):
        seed_torch(conversion.seed, conversion.facts.model)
        for decision in conversion.plan.replaced:
            unit = conversion.unit(decision)
            gate = unit.spec.fusion == "mul"  # a gate starts as the identity, not at random
            for module in [unit.primary_conv, *([] if gate else unit.modules())]:
                if isinstance(module, _ConvNd):
                    module.reset_parameters()
            unit.set_order(torch.arange(unit.out_channels))


def first(conversion: Conversion) -> None:
    """The first filters of every layer (of every group) as they are; cheap kernels at random."""
    with own_random_state(conversion.facts.model):
        seed_torch(conversion.seed, conversion.facts.model)
        for decision in conversion.plan.replaced:
            unit = conversion.unit(decision)
            if unit.spec.fusion != "mul" and unit.cheap_operation is not None:
                for module in unit.cheap_operation.children():
                    cast(_ConvNd, module).reset_parameters()


def weights(conversion: Conversion) -> None:
    """Chosen filters and least-squares kernels from the weights alone, without data.

    The input is taken for white noise, so that the filters' own correlations say how well a ghost
    follows its parent. What is known from a batch norm (how much a channel counts, its mean) is used.
    """
    explained = {name: white_shares(conversion.facts, made.site) for name, made in conversion.decisions.items()}
    shared = shared_choices(conversion.decisions, conversion.facts.streams, explained)
    for name, decision in conversion.decisions.items():
        unit = conversion.unit(decision)
        layout = shared[name].layout if name in shared else choose_layout(explained[name], unit.spec, unit.groups)
        solve_kernels(unit, conversion.original(decision), conversion.norm(decision), layout)


def least_squares(conversion: Conversion) -> None:
    """Chosen filters; cheap kernels solved for each layer alone, on the teacher's own activations."""
    shared = _measured_choices(conversion)
    fitted = {
        visit.decision.site.name: _fit(conversion, visit, shared, refit_primary=False).fitting
        for visit in _visits(conversion, student=conversion.facts.model)
    }
    for visit in _visits(conversion, student=conversion.student):  # where the inputs are others
        inputs, targets = ([_batched(maps, visit.decision) for maps in some] for some in (visit.inputs, visit.targets))
        _note(conversion, visit.decision, fitted[visit.decision.site.name], inputs, targets)


def sequential(conversion: Conversion) -> None:
    """Layer by layer in order, on the activations that the converted layers before really give.

    Asymmetric: inputs are the student's, targets the teacher's, so that a layer makes up for what
    the ones before it have lost (the primary is solved again, not only chosen). A layer that closes
    a residual block also makes up for the drift of the shortcut.
    """
    shared = _measured_choices(conversion)
    for visit in _visits(conversion, student=conversion.student):
        _fit(conversion, visit, shared, refit_primary=True).note(conversion)


def alternating(conversion: Conversion) -> None:
    """As ``sequential``; then primary and cheap kernels of each layer in turn, for what the output depends on.

    That is what the activation lets through, each error weighted by what it costs at the output. Units of placement
    ``paper``, of fusion ``add`` or ``mul``, or not in float32 stay as ``sequential`` leaves them. See
    [refinement][ghostify.conversion.refinement] and [sensitivity][ghostify.conversion.sensitivity].
    """
    generator = torch.Generator().manual_seed(conversion.seed)
    metrics = channel_metrics(conversion.facts.model, conversion.plan, conversion.chunks, generator)
    shared = _measured_choices(conversion)
    for visit in _visits(conversion, student=conversion.student):
        fitted, decision = _fit(conversion, visit, shared, refit_primary=True), visit.decision
        refine_unit(
            conversion.unit(decision),
            conversion.norm(decision),
            _batched_tail(visit.tail, decision),
            inputs=fitted.inputs,
            targets=fitted.targets,
            seen=fitted.fitting.seen,
            metric=metrics.get(decision.site.name),
            generator=fitted.generator,
        )
        fitted.note(conversion)


INITIALISERS: dict[str, Initialiser] = {
    "random": random,
    "first": first,
    "weights": weights,
    "least-squares": least_squares,
    "sequential": sequential,
    "alternating": alternating,
}
_NEED_CALIBRATION = frozenset({"least-squares", "sequential", "alternating"})


def check_initialiser(name: str, *, calibrated: bool) -> None:
    """Raise OptionError unless an initialiser has this name, and has the calibration inputs that it needs."""
    if name not in INITIALISERS:
        raise OptionError(f"initialiser={name!r} is unknown. Use one of {', '.join(INITIALISERS)}, or a function.")
    if name in _NEED_CALIBRATION and not calibrated:
        raise OptionError(
            f"initialiser={name!r} needs calibration inputs. Pass calibration=images (a few hundred, no labels), "
            "or use initialiser='weights'."
        )


def _visits(conversion: Conversion, student: nn.Module) -> Iterator[Visit]:
    """Every site in order, ready to be fitted; with a progress bar on a terminal."""
    facts, decisions = conversion.facts, conversion.decisions
    for name, decision in decisions.items():
        if (count := len(decision.site.calls)) > 1 and student is conversion.student:
            warnings.warn(
                f"site={name!r} is called {count} times in a run: its unit is fitted to the first call alone, whose "
                "error the plan tells.",
                stacklevel=2,
            )
    console = Console(stderr=True)
    fitted = [module for decision in conversion.plan.replaced for module in _fitted(conversion, decision)]
    with unmarked(facts.model), unmarked(student, but=fitted), torch.no_grad():
        seed_torch(conversion.seed, conversion.facts.model)  # for a model that draws random numbers
        if facts.graph is not None:
            visits = walk_graph(facts.graph, facts.model, student, decisions, conversion.chunks)
        else:
            visits = walk_calls(facts.model, student, decisions, conversion.chunks)
        shown = console.is_terminal
        yield from track(visits, "start", total=len(decisions), console=console, disable=not shown, transient=True)


def _fitted(conversion: Conversion, decision: Decision) -> Iterator[nn.Module]:
    """The modules that a fit changes."""
    yield from conversion.unit(decision).modules()
    norm = conversion.norm(decision)
    if norm is not None:
        yield norm


@dataclass(frozen=True)
class _Fitted:
    """A unit that was fitted.

    Attributes:
        decision: What the plan says of it.
        inputs: What it gets.
        targets: What it should make, corrected by the shortcut's drift.
        fitting: What the fit found out.
        generator: Picks samples.
    """

    decision: Decision
    inputs: list[Tensor]
    targets: list[Tensor]
    fitting: Fitting
    generator: torch.Generator

    def note(self, conversion: Conversion) -> None:
        """Measure what is missed, and write it down."""
        _note(conversion, self.decision, self.fitting, self.inputs, self.targets)


def _note(
    conversion: Conversion, decision: Decision, fitting: Fitting, inputs: list[Tensor], targets: list[Tensor]
) -> None:
    """Measure what a unit misses on the first inputs, and write it down."""
    unit, chain = conversion.unit(decision), decision.site.chain
    norm = conversion.facts.model.get_submodule(chain.norm) if chain is not None and chain.norm else None
    count = sum(total <= _ERROR_IMAGES for total in accumulate((len(x) for x in inputs), initial=0))
    error = left_over(unit, norm, inputs[:count], targets[:count])
    conversion.fits[decision.site.name] = Fit(fitting.explained, error)


def _measured_choices(conversion: Conversion) -> dict[str, Choice]:
    """One choice of channels for the units that share an order, from what their layers make of some images."""
    decisions = {name: made for name, made in conversion.decisions.items() if made.order == "shared"}
    explained: dict[str, Tensor] = {}
    if decisions:
        counts = accumulate((chunk.batch for chunk in conversion.chunks), initial=0)
        chunks = [chunk for chunk, before in zip(conversion.chunks, counts) if before < _SHARED_IMAGES]
        for spec in {made.spec for made in decisions.values() if made.spec is not None}:
            sites = [made.site for made in decisions.values() if made.spec == spec]
            shares = site_shares(conversion.facts, sites, spec, chunks, conversion.seed)
            explained |= {site.name: share for site, share in shares}
    return shared_choices(decisions, conversion.facts.streams, explained)


def _fit(conversion: Conversion, visit: Visit, shared: dict[str, Choice], *, refit_primary: bool) -> _Fitted:
    """Fit the unit at a site."""
    decision = visit.decision
    norm = conversion.norm(decision)
    targets = visit.targets
    if visit.tail.drift is not None:
        factor = _through_norm(norm, decision.site.out_channels).to(targets[0])
        factor = factor.view(-1, *(1 for _ in decision.site.kernel_size))
        targets = [y + d * factor for y, d in zip(targets, visit.tail.drift, strict=True)]
    if not all(bool(torch.stack(maps.aminmax()).isfinite().all()) for maps in (*visit.inputs, *targets)):
        raise InputsError(
            f"site={decision.site.name!r}: on the calibration inputs, its maps hold NaN or infinite numbers. "
            "Check how the inputs are normalised, and whether the model's precision is enough for them."
        )
    unit, conv = conversion.unit(decision), conversion.original(decision)
    inputs = [_batched(x, decision) for x in visit.inputs]
    targets = [_batched(y, decision) for y in targets]
    generator = torch.Generator().manual_seed(conversion.seed)
    fitting = fit_unit(
        unit,
        conv,
        norm,
        inputs=inputs,
        targets=targets,
        refit_primary=refit_primary,
        generator=generator,
        choice=shared.get(decision.site.name),
    )
    return _Fitted(decision, inputs, targets, fitting, generator)


def _batched(maps: Tensor, decision: Decision) -> Tensor:
    """``(b, c, …)``, also of a map ``(c, …)`` without a batch."""
    return maps if maps.dim() == 2 + len(decision.site.kernel_size) else maps.unsqueeze(0)


def _batched_tail(tail: Tail, decision: Decision) -> Tail:
    addend = None if tail.addend is None else [_batched(maps, decision) for maps in tail.addend]
    return replace(tail, addend=addend)


def _through_norm(norm: nn.Module | None, channels: int) -> Tensor:
    """What to add before a norm so that 1 is added after it, ``(n,)``; little where the norm nearly mutes a channel."""
    scale = norm_scale(norm, channels)
    floor = _MUTED * scale.square().mean()
    return scale / (scale.square() + floor).clamp_min(1e-12)
