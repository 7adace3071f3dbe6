"""Carrying out a plan: a copy of the model, of the caller's own class, with Ghost units in it."""

from __future__ import annotations

import copy
import inspect
import reprlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.backends.runners import Backend
from ghostify.conversion.channel_order import fold_orders
from ghostify.conversion.fits import with_fits
from ghostify.conversion.initialisers import INITIALISERS, Conversion, Initialiser, check_initialiser
from ghostify.conversion.verification import verify
from ghostify.errors import ConversionError, InputsError, OptionError, PlanMismatchError
from ghostify.nn.ghost import GhostConv
from ghostify.planning import (  # fmt: skip
    Budget,
    Goal,
    Override,
    check_goal,
    chosen_spec,
    override_specs,
    plan_traced,
    skip_patterns,
)
from ghostify.planning.cost import ghost_macs, ghost_params
from ghostify.planning.rules import saves_nothing
from ghostify.spec import Decision, GhostSpec, Plan
from ghostify.tracing import (
    Example,
    ExampleInputs,
    Trace,
    copier_memo,
    evaluating,
    fingerprint,
    is_site,
    lifted_as,
    on_meta,
    own_random_state,
    seed_torch,
    unmarked,
    unwrapped,
)
from ghostify.tracing.calibration import MOST_IMAGES, Calibration, calibration_chunks, trace_calibrated
from ghostify.tracing.graph import FUNCTIONS


def convert(
    model: nn.Module,
    *,
    ratio: float | None = None,
    example_inputs: ExampleInputs | None = None,
    spec: GhostSpec | None = None,
    skip: str | Sequence[str] = (),
    overrides: Mapping[str, Override] | None = None,
    keep: float | None = None,
    budget: Budget | None = None,
    backend: Backend | str | None = None,
    sensitivity: str = "explained",
    calibration: Calibration | None = None,
    images: int = MOST_IMAGES,
    initialiser: str | Initialiser | None = None,
    seed: int = 0,
) -> nn.Module:
    """Plan and apply in one go: see [plan][ghostify.plan] and [apply][ghostify.apply] for the arguments.

    Returns:
        A converted copy of the caller's own class; ``model`` is left as it was.

    Example:
        >>> from ghostify.nn.cifar import resnet20
        >>> small = convert(resnet20(), ratio=2, example_inputs=torch.zeros(1, 3, 32, 32))
        >>> type(small).__name__, type(small.layer1[0].conv1).__name__
        ('CifarResNet', 'GhostConv2d')
    """
    default, model = chosen_spec(ratio, spec), unwrapped(model)
    patterns, chosen = skip_patterns(skip), override_specs(overrides, default)
    start = _chosen_initialiser(initialiser, calibration, model)
    check_goal(keep, budget, backend, sensitivity, ratio, calibrated=calibration is not None)
    chunks = calibration_chunks(calibration, model, images)
    facts = trace_calibrated(model, example_inputs, chunks)
    goal = Goal.of(keep, budget, backend, sensitivity, ratio, chunks)
    plan = plan_traced(facts, default, patterns, chosen, goal)
    return _apply(plan, facts if plan.lifted else facts.unlifted or facts, chunks, start, seed)


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    calibration: Calibration | None = None,
    images: int = MOST_IMAGES,
    initialiser: str | Initialiser | None = None,
    example_inputs: ExampleInputs | None = None,
    seed: int = 0,
) -> nn.Module:
    """Carry out a plan on a model.

    The new layers start from the old weights. With calibration inputs they are solved layer by
    layer on real activations; without, from the weights alone.

    Args:
        plan: Made for this very model, or one of the same structure.
        model: The trained network; it is left as it was.
        calibration: A few hundred inputs from the training data, no labels needed: a tensor
            ``(n, c, h, w)``, or any iterable of batches or of ``(input, target)`` pairs. ``random``, ``first`` and
            ``weights`` do not look at them, and the plan tells no errors then.
        images: Use at most about so many of them; the rest of the iterable is not read.
        initialiser: A name out of ``random``, ``first``, ``weights``, ``least-squares``,
            ``sequential``, ``alternating``, or a function of a
            [Conversion][ghostify.conversion.Conversion]. By default ``alternating`` with
            calibration, ``weights`` without.
        example_inputs: One batch to verify the result on; by default a calibration batch, or
            random numbers of the shapes for which the plan was made.
        seed: Seed of everything that is random.

    Returns:
        A converted copy of the caller's own class; its plan is its attribute ``ghostify_plan``.

    Raises:
        PlanMismatchError: The plan was made for another model.
        OptionError: The initialiser is unknown, or needs calibration and there is none.
        InputsError: The calibration data are empty or do not fit.
        ConversionError: The result does not do what the plan promised.
    """
    if not isinstance(plan, Plan):
        raise OptionError(
            f"plan={reprlib.repr(plan)} is no Plan. Pass what ghostify.plan(...) gives, and then the model."
        )
    model = as_planned(plan, model)
    check_fits(plan, model)
    start = _chosen_initialiser(initialiser, calibration, model)
    chunks = calibration_chunks(calibration, model, images)
    inputs = _made_up(plan, model, seed) if example_inputs is None and not chunks else example_inputs
    facts = trace_calibrated(model, inputs, chunks, lift=False)
    known = {site.name: site for site in facts.sites}
    for decision in plan.replaced:
        site = known[decision.site.name]
        if site.obstacle:
            raise PlanMismatchError(
                f"site={site.name!r} cannot be replaced in this model: {site.obstacle}. Make a new plan for it."
            )
        if decision.spec is not None and decision.spec.placement == "paper" and site.chain != decision.site.chain:
            raise PlanMismatchError(
                f"site={site.name!r} is followed by {site.chain} in this model, and by {decision.site.chain} in the "
                "plan. Make a new plan for it."
            )
    return _apply(plan, facts, chunks, start, seed)


def rebuild(plan: Plan, base: nn.Module) -> nn.Module:
    """The structure that a plan describes, with weights that are still to be loaded.

    Args:
        plan: The plan.
        base: A model of the structure for which the plan was made, as [as_planned][ghostify.conversion.as_planned]
            gives it; left as it was.

    Raises:
        PlanMismatchError: The plan was made for another model.
    """
    check_fits(plan, base)
    return _copy_with_units(base, plan.replaced, plan, seed=0)


def as_planned(plan: Plan, model: nn.Module) -> nn.Module:
    """The model whose sites a plan names: without torch's wrappers, and with functional convolutions as modules.

    Raises:
        TraceError: The plan names functional convolutions, and the model has no graph in which they are modules.
    """
    model = unwrapped(model)
    return lifted_as(model, plan.arguments, plan.lifted) if plan.lifted else model


def check_fits(plan: Plan, model: nn.Module) -> None:
    """Raise PlanMismatchError unless the plan was made for a model of this structure."""
    modules = dict(model.named_modules())
    for decision in plan.decisions:
        _check_promise(decision)
        site, module = decision.site, modules.get(decision.site.name)
        if not is_site(module, site):
            found = "there is no such module" if module is None else f"there it is {module}"
            raise PlanMismatchError(
                f"The plan was made for another model: site={site.name!r} is {site.shape} in the plan ({plan.model}); "
                f"in this {type(model).__name__} {found}. Make a plan for this model."
            )
    if fingerprint(model) != plan.fingerprint:
        raise PlanMismatchError(
            f"The plan was made for another model: its {plan.model} has the same convolutions, but other parameters, "
            f"buffers or paddings than this {type(model).__name__}. Make a plan for this model."
        )


def _check_promise(decision: Decision) -> None:
    """Raise PlanMismatchError if a plan that was changed by hand does not add up any more."""
    site, spec = decision.site, decision.spec
    if spec is None:
        return
    reason = saves_nothing(site, spec)
    if not reason and decision.params_after != ghost_params(site, spec):
        reason = f"params_after={decision.params_after:,}, and {spec} gives {ghost_params(site, spec):,}"
    if not reason and decision.macs_after != ghost_macs(site, spec):
        reason = f"macs_after={decision.macs_after:,}, and {spec} gives {ghost_macs(site, spec):,}"
    if reason:
        raise PlanMismatchError(
            f"The plan does not add up at site={site.name!r}: {reason}. "
            f"Make it anew, with overrides={{{site.name!r}: …}}."
        )


def _apply(plan: Plan, facts: Trace, chunks: list[Example], start: Initialiser, seed: int) -> nn.Module:
    _check_values(plan, facts.model)
    with torch.inference_mode(False):  # parameters made in it could never be trained
        student = _copy_with_units(facts.model, plan.replaced, plan, seed)
        with evaluating(student):
            conversion = Conversion(plan, facts, student, chunks, seed)
            start(conversion)
    student.ghostify_plan = with_fits(plan, conversion.fits)  # type: ignore[assignment]
    for decision in plan.replaced:
        # Modules that the initialiser made anew know only the evaluation mode of the moment.
        mode = facts.model.get_submodule(decision.site.name).training
        unit = student.get_submodule(decision.site.name).train(mode)
        chain = decision.site.chain
        if chain is not None and chain.norm is not None:
            mode = facts.model.get_submodule(chain.norm).training  # a frozen norm stays frozen
            for norm in (unit.primary_norm, unit.cheap_norm):
                if isinstance(norm, nn.Module):
                    norm.train(mode)
    with torch.inference_mode(False), unmarked(facts.model):  # a copy may call the original through a closure
        verify(student, plan, facts)
        fold_orders(student, plan, facts)
    return student


def _check_values(plan: Plan, model: nn.Module) -> None:
    """Raise InputsError for NaN among the weights that the Ghost units are to start from."""
    for decision in plan.replaced:
        chain = decision.site.chain
        for name in filter(None, (decision.site.name, chain.norm if chain is not None else None)):
            for what, tensor in model.get_submodule(name).state_dict().items():
                if isinstance(tensor, Tensor) and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                    raise InputsError(
                        f"model: {name}.{what} holds NaN or infinite numbers. Load weights of a training that did not "
                        "diverge."
                    )


def _copy_with_units(model: nn.Module, decisions: Iterable[Decision], plan: Plan, seed: int) -> nn.Module:
    """Deep-copy a model, with Ghost units where the decisions say so.

    The units are put into the copier's memo under their convolutions' identity: every alias finds
    them, and the replaced weights are never copied.
    """
    memo: dict[int, object] = {}
    for decision in decisions:
        conv = model.get_submodule(decision.site.name)
        assert isinstance(conv, _ConvNd)  # the rules replace nothing else
        assert decision.spec is not None  # it is a replaced one
        chain = decision.site.chain
        inside = decision.spec.placement == "paper" and chain is not None
        norm = model.get_submodule(chain.norm) if inside and chain is not None and chain.norm else None
        activation = _activation(chain.activation, model) if inside and chain is not None else None
        with own_random_state(model):
            seed_torch(seed + len(memo), model)
            memo[id(conv)] = GhostConv.from_conv(conv, decision.spec, norm=norm, activation=activation)
        if norm is not None:
            memo[id(norm)] = nn.Identity().train(norm.training)
    try:
        student = copy.deepcopy(model, {**copier_memo(model), **memo})
    except Exception as error:  # whatever a class of the user's raises
        raise ConversionError(
            f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. Take what cannot be copied "
            "(a lock, an open file, a generator) off the model while it is converted."
        ) from error
    for decision in plan.replaced:
        if not isinstance(student.get_submodule(decision.site.name), GhostConv):
            raise ConversionError(
                f"site={decision.site.name!r} is not replaced in a copy of {type(model).__name__}: a __deepcopy__ of "
                "its own makes modules anew. Take that method off while the model is converted."
            )
    student.ghostify_plan = plan  # type: ignore[assignment]
    return student


def _activation(name: str | None, model: nn.Module) -> nn.Module | None:
    """A copy of the activation that a chain names, never in place: the primary map is read again."""
    if name is None:
        return None
    kind, _, target = name.partition(":")
    activation = FUNCTIONS[target]() if kind == "function" else copy.deepcopy(model.get_submodule(target))
    if hasattr(activation, "inplace"):
        setattr(activation, "inplace", False)  # noqa: B010 - not an attribute of every module
    return activation


def _chosen_initialiser(
    chosen: str | Initialiser | None, calibration: Calibration | None, model: nn.Module
) -> Initialiser:
    if chosen is None:
        chosen = "first" if on_meta(model) else "weights" if calibration is None else "alternating"
    if callable(chosen):
        return chosen
    check_initialiser(chosen, calibrated=calibration is not None)
    if on_meta(model) and chosen not in ("first", "random"):
        raise OptionError(
            f"initialiser={chosen!r} needs values, and the model is on the meta device, which has none. "
            "Load the weights first, or use initialiser='first' for the structure alone."
        )
    return INITIALISERS[chosen]


def _made_up(plan: Plan, model: nn.Module, seed: int) -> ExampleInputs:
    """Random inputs of the shapes for which a plan was made; by keyword where some arguments are left out."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator) for shape in plan.input_shapes]
    names = list(inspect.signature(model.forward).parameters)
    in_place = list(plan.arguments) == names[: len(plan.arguments)]
    return inputs if in_place or len(inputs) != len(plan.arguments) else dict(zip(plan.arguments, inputs))
