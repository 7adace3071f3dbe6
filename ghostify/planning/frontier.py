"""The whole curve: what every budget would cost, from one measurement."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate
from torch import nn

from ghostify.backends.runners import Backend
from ghostify.errors import NothingToConvertError, OptionError
from ghostify.extras import require
from ghostify.files import atomic_file
from ghostify.planning.budget import original_costs, smallest, why_kept, within_budget
from ghostify.planning.goal import Goal
from ghostify.planning.limits import KEYS, absolute, check_limit
from ghostify.planning.planner import (  # fmt: skip
    Override,
    check_patterns,
    chosen_spec,
    made_plan,
    measured_options,
    override_specs,
    skip_patterns,
    timed_options,
)
from ghostify.spec import Decision, GhostSpec, Plan
from ghostify.tracing import ExampleInputs, Trace, unwrapped
from ghostify.tracing.calibration import MOST_IMAGES, Calibration, calibration_chunks, trace_calibrated


class FrontierPoint(NamedTuple):
    """A plan of the curve.

    Attributes:
        fraction: What is left of the cost, as a fraction of the original.
        damage: Sum over the sites of what each loses, measured alone: its share of variance, or with
            ``sensitivity="measured"`` the divergence of the answers.
        plan: For [apply][ghostify.apply].
    """

    fraction: float
    damage: float
    plan: Plan


@dataclass(frozen=True, repr=False)
class Frontier:
    """Plans that lose least for what they cost, the cheapest first; print it.

    Attributes:
        key: The cost: ``macs``, ``params``, ``size_bytes`` or ``latency``.
        points: The plans, each with what is left of the cost and what it damages.
    """

    key: str
    points: tuple[FrontierPoint, ...]

    def __iter__(self) -> Iterator[FrontierPoint]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __repr__(self) -> str:
        rows = [
            [
                f"{100 * fraction:.1f} %",
                f"{damage:.4g}",
                len(plan.replaced),
                f"{plan.macs_after:,}",
                f"{plan.params_after:,}",
            ]
            for fraction, damage, plan in self.points
        ]
        headers = [f"{self.key} left", "damage", "Ghost units", "MACs", "params"]
        return tabulate(rows, headers=headers, disable_numparse=True, colalign=["right"] * 5)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw damage against what is left of the cost, into a file whose name ends in ``.svg`` or ``.png``.

        Args:
            path: The file.

        Raises:
            MissingExtraError: The extra ``report`` is not installed.
            OutputError: The file cannot be written.
        """
        kind = Path(path).suffix.removeprefix(".")
        if kind not in ("svg", "png"):
            raise OptionError(f"path={str(path)!r} ends neither in .svg nor in .png. Name the file so.")
        figure = require("matplotlib.figure", extra="report").Figure((6, 4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([100 * point.fraction for point in self], [point.damage for point in self], marker="o")
        axes.set(xlabel=f"{self.key} left, %", ylabel="damage, estimated")
        axes.grid(alpha=0.3)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=kind)


def frontier(
    model: nn.Module,
    *,
    key: str = "macs",
    points: int | Sequence[float | str] = 10,
    calibration: Calibration | None = None,
    images: int = MOST_IMAGES,
    backend: Backend | str | None = None,
    sensitivity: str = "explained",
    example_inputs: ExampleInputs | None = None,
    spec: GhostSpec | None = None,
    skip: str | Sequence[str] = (),
    overrides: Mapping[str, Override] | None = None,
) -> Frontier:
    """The plans for a whole range of budgets; what each ratio damages is measured once.

    Damages are estimates that look at each layer alone; see [plan][ghostify.plan], also for the other arguments.

    Args:
        model: The trained network.
        key: What is limited: ``macs``, ``params``, ``size_bytes`` or ``latency``.
        points: Limits as [plan][ghostify.plan] takes them, such as fractions of the original; or how many, evenly
            spread from the smallest that can be reached.
        calibration: A few hundred inputs; without, the weights alone tell what each ratio damages.
        images: Calibration inputs to use at most.
        backend: Measure every choice there, and replace no site where it does not pay; needed for ``latency``, where it
            is by default ``onnxruntime`` on one thread.
        sensitivity: ``explained`` or ``measured``.
        example_inputs: One batch; by default two of the calibration inputs.
        spec: Options of the Ghost units except the ratio.
        skip: Names of sites to keep, or patterns.
        overrides: By name or pattern, for single sites: a ratio, a spec or ``None``.

    Returns:
        The curve; budgets with the same plan are one point.

    Raises:
        OptionError: An option cannot be used.
        NothingToConvertError: There is no choice of ratios, or a budget asks for nothing.
        BudgetError: One of the budgets cannot be met.

    Example:
        >>> import torch
        >>> from ghostify.nn.cifar import resnet20
        >>> curve = frontier(resnet20(), points=[0.5, 0.8], calibration=torch.randn(32, 3, 16, 16))
        >>> [point.plan.macs_after <= limit * point.plan.macs for point, limit in zip(curve, (0.5, 0.8))]
        [True, True]
    """
    if key not in KEYS:
        raise OptionError(f"key={key!r} is unknown. Use one of {', '.join(KEYS)}.")
    _check_points(points)
    for limit in () if isinstance(points, int) else points:
        check_limit(key, limit)
    default, model = chosen_spec(None, spec), unwrapped(model)
    patterns, chosen = skip_patterns(skip), override_specs(overrides, default)
    chunks = calibration_chunks(calibration, model, images)
    facts = trace_calibrated(model, example_inputs, chunks)
    check_patterns(facts, patterns, chosen)
    goal = Goal.of(None, {key: 0.5}, backend, sensitivity, None, chunks)
    options = measured_options(facts, default, patterns, chosen, goal)
    table = timed_options(facts, options, goal)
    total = original_costs(facts, table)[key]
    budgets: list[float | str]
    if isinstance(points, int):
        least = smallest(options, facts, table)[key]
        if least >= total:
            raise NothingToConvertError(
                f"No convolution of {type(model).__name__} that may change saves {key}: the original has as little as "
                f"any plan. {why_kept(options, facts, table)}"
            )
        # As fractions: latency counts in microseconds. The half keeps rounding from asking for less than the least.
        budgets = [(int(limit) + 0.5) / total for limit in np.linspace(least, total, int(points), endpoint=False)]
    else:
        budgets = sorted(points, key=lambda limit: absolute(key, limit, total))
    found: dict[tuple[object, ...], FrontierPoint] = {}
    for budget in budgets:
        met = within_budget(options, {key: budget}, facts, table)
        known, decisions = _of_own_class(facts, met.decisions)
        made = made_plan(known, decisions, share=table is not None, budget=met.notes, table=table)
        found.setdefault(made.decisions, FrontierPoint(met.left[key], met.damage, made))
    return Frontier(key, tuple(found.values()))


def _of_own_class(facts: Trace, decisions: list[Decision]) -> tuple[Trace, list[Decision]]:
    """The same about the model as it is, if no convolution is replaced that only its graph has as a module."""
    if facts.unlifted is None or any(made.replaced and made.site.name in facts.lifted for made in decisions):
        return facts, decisions
    sites = {site.name: site for site in facts.unlifted.sites}
    return facts.unlifted, [replace(made, site=sites[made.site.name]) for made in decisions if made.site.name in sites]


def _check_points(points: int | Sequence[float | str]) -> None:
    """Raise OptionError unless they are a number of points, or some."""
    if isinstance(points, int):
        usable = not isinstance(points, bool) and points >= 1
    else:
        usable = isinstance(points, Sequence) and not isinstance(points, str) and len(points) > 0
    if not usable:
        raise OptionError(
            f"points={points!r} is neither a number of points nor a list of fractions such as [0.5, 0.8]."
        )
