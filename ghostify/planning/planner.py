"""Making a plan: for every convolution, replace it (how) or keep it (why)."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from ghostify.backends.runners import Backend
from ghostify.errors import NothingToConvertError, OptionError, PatternError
from ghostify.planning.budget import within_budget
from ghostify.planning.cost import conv_macs, ghost_macs, ghost_params
from ghostify.planning.goal import Goal, check_goal
from ghostify.planning.influence import influences
from ghostify.planning.keeping import RATIOS, measured, with_ratios
from ghostify.planning.latency import LatencyTable, latency_table
from ghostify.planning.layers import aligned, distinct
from ghostify.planning.limits import Budget
from ghostify.planning.orders import with_orders
from ghostify.planning.rules import HABITS, OBSTACLES, reasons_told, saves_nothing
from ghostify.spec import Decision, GhostSpec, Plan, Site
from ghostify.tracing import ExampleInputs, Trace, fingerprint, unwrapped
from ghostify.tracing.calibration import MOST_IMAGES, Calibration, calibration_chunks, trace_calibrated

Override = float | GhostSpec | None


def plan(
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
) -> Plan:
    """Decide for every convolution of a model whether and how a Ghost unit replaces it.

    Nothing is changed: the model is run on the example inputs in evaluation mode, and with ``keep`` or ``budget``
    on the calibration inputs.

    Args:
        model: The trained network, any module that runs.
        ratio: Output channels divided by intrinsic channels, any number ≥ 1; by default 2.
        example_inputs: One batch: a tensor ``(n, c, h, w)``, a tuple of positional arguments, or a
            dict of keyword arguments. By default two of the calibration inputs.
        spec: All options of the Ghost unit; in place of ``ratio``.
        skip: Names of sites to keep, or patterns such as ``layer1.*``.
        overrides: By name or pattern, for single sites: a ratio, a [GhostSpec][ghostify.GhostSpec], or
            ``None`` to keep the site. An override outranks ``skip`` and the habit of keeping the
            first and the output layer; of several that match, the last one counts.
        keep: In place of a ratio: every site gets the largest one out of 1.1, 1.25, 1.5, 2, 3 and 4 at which
            so much of its output's variance can still be expressed, 0 to 1; or it stays as it is.
        budget: In place of a ratio: what may be left of ``macs``, ``params``, ``size_bytes`` (the parameters in
            bytes of their dtypes, without buffers) and ``latency`` of the whole model: up to 1 a fraction of the
            original, above 1 a whole number, or milliseconds for the batch of the example inputs; or with its unit,
            ``"0.8 ms"`` or ``"50 %"``. All that are given must hold. Every site stays or gets one of the ratios of
            ``keep``, so that the shares of variance that the sites lose are least in sum. This is an estimate: it looks
            at each layer alone.
        backend: With ``budget``: measure every choice there, and replace no site where it does not pay; a
            [Backend][ghostify.Backend] or its name. By default ``onnxruntime`` on one thread if latency is limited.
        sensitivity: With ``budget``: what a site's loss counts. ``explained``: the share of variance, everywhere alike.
            ``measured``: how far the network's answers part from the original's when only this site is replaced; the
            network is run for every site, on some of the calibration inputs.
        calibration: With ``keep`` or ``budget``: a few hundred inputs, as [apply][ghostify.apply] takes them. A
            budget without them goes by the weights alone.
        images: Calibration inputs to use at most.

    Returns:
        The plan; print it.

    Raises:
        OptionError: A ratio or another option is out of range, or ``keep`` has no calibration inputs.
        MissingExtraError: The backend is not installed.
        ExportError: The model cannot be exported for it.
        InputsError: There are no example inputs, or the calibration data are empty or do not fit.
        TraceError: The model does not run on them.
        PatternError: A pattern matches no convolution.
        NothingToConvertError: No convolution is left to replace, the reasons are in the message; or the budget asks
            for nothing.
        BudgetError: The budget cannot be met; the message names the smallest that can.

    Example:
        >>> import torch
        >>> from ghostify.nn.cifar import resnet20
        >>> made = plan(resnet20(), ratio=2, example_inputs=torch.zeros(1, 3, 32, 32))
        >>> len(made.replaced), made.params, made.params_after
        (18, 269722, 139114)
    """
    default, model = chosen_spec(ratio, spec), unwrapped(model)
    patterns, chosen = skip_patterns(skip), override_specs(overrides, default)
    check_goal(keep, budget, backend, sensitivity, ratio, calibrated=calibration is not None)
    if calibration is not None and keep is None and budget is None:
        raise OptionError(
            "calibration is given without keep=… or budget=…: a plan with a fixed ratio measures nothing on it."
        )
    chunks = calibration_chunks(calibration, model, images)
    goal = Goal.of(keep, budget, backend, sensitivity, ratio, chunks)
    return plan_traced(trace_calibrated(model, example_inputs, chunks), default, patterns, chosen, goal)


def chosen_spec(ratio: float | None, spec: GhostSpec | None) -> GhostSpec:
    """The unit's options from the two ways to give them.

    Raises:
        OptionError: Both are given, or one is out of range.
    """
    if spec is not None and not isinstance(spec, GhostSpec):
        raise OptionError(f"spec={spec!r} is not a GhostSpec. Pass spec=GhostSpec(2), or ratio=2.")
    if spec is None:
        return GhostSpec(2.0 if ratio is None else ratio)
    if ratio is not None:
        raise OptionError(f"ratio={ratio!r} and spec={spec!r} are both given. Put the ratio into the spec.")
    return spec


def plan_traced(
    facts: Trace,
    default: GhostSpec,
    skip: Iterable[str],
    overrides: Mapping[str, GhostSpec | None],
    goal: Goal,
) -> Plan:
    """The same from facts that are known already; see [plan][ghostify.plan] for the arguments."""
    skip = list(skip)
    check_patterns(facts, skip, overrides)
    made = _decided(facts, default, skip, overrides, goal)
    if facts.unlifted is not None and not any(decision.site.name in facts.lifted for decision in made.replaced):
        made = _decided(facts.unlifted, default, skip, overrides, goal)  # the model can stay of its own class
    if not made.replaced:
        raise NothingToConvertError(
            f"No convolution of {made.model} is left to replace: "
            f"{reasons_told(made)}. "
            "An override such as overrides={'NAME': 2} outranks a skip and the habits (first layer, output layer)."
        )
    return made


def _decided(
    facts: Trace, default: GhostSpec, skip: list[str], overrides: Mapping[str, GhostSpec | None], goal: Goal
) -> Plan:
    if goal.keep is None and goal.budget is None:
        return made_plan(facts, [_decide(site, default, skip, overrides) for site in facts.sites], share=True)
    options = measured_options(facts, default, skip, overrides, goal)
    if goal.budget is None:
        assert goal.keep is not None  # the only goal that is left
        # No order is shared: the share that is promised is that of a layer's own choice.
        return made_plan(facts, with_ratios(options, goal.keep), share=False)
    table = timed_options(facts, options, goal)
    met = within_budget(options, goal.budget, facts, table)
    return made_plan(facts, met.decisions, share=table is not None, budget=met.notes, table=table)


def measured_options(
    facts: Trace,
    default: GhostSpec,
    skip: list[str],
    overrides: Mapping[str, GhostSpec | None],
    goal: Goal,
) -> list[list[Decision]]:
    """All that may happen to every site, from [measured][ghostify.planning.keeping.measured]."""
    specs = [replace(default, ratio=ratio) for ratio in RATIOS]
    options = []
    for site in facts.sites:
        own = specs[:1] if _matching(site, overrides) else specs
        if goal.backend is not None:
            own = distinct([aligned(site, spec) for spec in own])
        options.append([_decide(site, spec, skip, overrides) for spec in own])
    found = measured(options, default, facts, list(goal.chunks))
    if goal.sensitivity == "explained":
        return found
    tried = {some[0].site.name: some[len(some) // 2].spec for some in found if some[0].explained is not None}
    factors = influences(facts, {name: spec for name, spec in tried.items() if spec is not None}, list(goal.chunks))
    return [[_with_damage(option, factors) for option in some] for some in found]


def _with_damage(option: Decision, factors: Mapping[str, float]) -> Decision:
    if option.explained is None:
        return option
    return replace(option, damage=factors[option.site.name] * (1 - option.explained))


def timed_options(facts: Trace, options: Sequence[Sequence[Decision]], goal: Goal) -> LatencyTable | None:
    """What all of it saves on the backend, if there is one."""
    if goal.backend is None:
        return None
    choices = {some[0].site.name: [made.spec for made in some if made.spec is not None] for some in options}
    return latency_table(facts, choices, goal.backend)


def made_plan(
    facts: Trace,
    decisions: Sequence[Decision],
    *,
    share: bool,
    budget: tuple[str, ...] = (),
    table: LatencyTable | None = None,
) -> Plan:
    """The plan of a model from the decisions about its sites; ``share`` as in ``with_orders``."""
    ordered = with_orders(decisions, facts.streams, share=share)
    return Plan(
        model=type(facts.model).__name__,
        fingerprint=fingerprint(facts.model),
        trace_way=facts.way,
        trace_note=facts.note,
        input_shapes=facts.example.shapes,
        params=facts.params,
        macs=facts.count.macs,
        uncounted=facts.count.outside,
        decisions=ordered if table is None else table.timed(ordered),
        lifted=facts.lifted,
        arguments=facts.arguments,
        budget=budget,
        latency=None if table is None else table.forecast(ordered),
    )


def _decide(site: Site, default: GhostSpec, skip: list[str], overrides: Mapping[str, GhostSpec | None]) -> Decision:
    macs = conv_macs(site)

    def keep(reason: str) -> Decision:
        return Decision(site, None, reason, site.params, site.params, macs, macs)

    for rule in OBSTACLES:
        if reason := rule(site):
            return keep(reason)
    matching = _matching(site, overrides)
    if matching:
        override = overrides[matching[-1]]
        if override is None:
            return keep(f"kept by override {matching[-1]!r}")
        spec = override
    else:
        for pattern in skip:
            if fnmatchcase(site.name, pattern):
                return keep(f"skipped by {pattern!r}")
        for rule in HABITS:
            if reason := rule(site):
                return keep(reason)
        spec = default
    spec, remark = _with_possible_placement(site, spec)
    if reason := saves_nothing(site, spec, macs):
        return keep(reason)
    return Decision(site, spec, remark, site.params, ghost_params(site, spec), macs, ghost_macs(site, spec))


def _matching(site: Site, overrides: Mapping[str, GhostSpec | None]) -> list[str]:
    return [pattern for pattern in overrides if fnmatchcase(site.name, pattern)]


def _with_possible_placement(site: Site, spec: GhostSpec) -> tuple[GhostSpec, str]:
    """Fall back to placement ``linear``, saying why, where norm and activation cannot move into the branches."""
    if spec.placement == "linear":
        return spec, ""
    obstacle = "what follows it is unknown" if site.chain is None else site.chain.paper_obstacle
    return (replace(spec, placement="linear"), f"placement linear: {obstacle}") if obstacle else (spec, "")


def skip_patterns(skip: str | Sequence[str]) -> list[str]:
    """The patterns of [plan][ghostify.plan] as a list.

    Raises:
        OptionError: Something in it is not a string.
    """
    patterns = [skip] if isinstance(skip, str) else list(skip) if isinstance(skip, Iterable) else [skip]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"skip={skip!r} is neither a name or pattern nor a list of them.")
    return patterns


def override_specs(overrides: Mapping[str, Override] | None, default: GhostSpec) -> dict[str, GhostSpec | None]:
    """The overrides of [plan][ghostify.plan] with every ratio made a full spec.

    Raises:
        OptionError: A value is neither a ratio, nor a spec, nor ``None``.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise OptionError(f"overrides={overrides!r} is not a dict from names or patterns to ratios.")
    return {pattern: _override_spec(pattern, value, default) for pattern, value in (overrides or {}).items()}


def _override_spec(pattern: str, value: Override, default: GhostSpec) -> GhostSpec | None:
    if value is None or isinstance(value, GhostSpec):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(
            f"overrides={{{pattern!r}: {value!r}}} is neither a ratio, nor a GhostSpec, nor None, which keeps the site."
        )
    return replace(default, ratio=float(value))


def check_patterns(facts: Trace, skip: Sequence[str], overrides: Mapping[str, GhostSpec | None]) -> None:
    """Raise PatternError if a pattern matches no convolution."""
    names = list(dict.fromkeys(site.name for known in (facts, facts.unlifted) if known for site in known.sites))
    for option, patterns in (("skip", skip), ("overrides", list(overrides))):
        for pattern in patterns:
            _check_pattern(option, pattern, names)


def _check_pattern(option: str, pattern: str, names: list[str]) -> None:
    if any(fnmatchcase(name, pattern) for name in names):
        return
    # A pattern names a branch of the model as often as a layer, so branches are offered too.
    branches = {name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}
    near = difflib.get_close_matches(pattern.rstrip(".*"), sorted(branches), n=3, cutoff=0.4) or names[:3]
    raise PatternError(f"{option}={pattern!r} matches no convolution of the model. Near it are: {', '.join(near)}.")
