"""Ratios by a budget: of all ways to meet it, the one that is estimated to lose least, found exactly.

The loss of a choice is the share of the site's output variance, behind its norm, that the Ghost unit cannot express,
measured as [keeping][ghostify.planning.keeping] does. Their sum is an estimate: it looks at each layer alone, as if no
layer's errors met another's. Latency is a sum, too, of what was measured layer by layer; there, only choices that pay
are on offer.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
from torch import Tensor, nn

from ghostify.errors import BudgetError, NothingToConvertError
from ghostify.planning.keeping import kept
from ghostify.planning.latency import LatencyTable
from ghostify.planning.limits import KEYS, MICROSECONDS, Budget, absolute
from ghostify.planning.orders import with_orders
from ghostify.planning.rules import reasons_told
from ghostify.spec import Decision
from ghostify.tracing import Trace

# The solver's tolerances are absolute, 1e-6: what it compares has this size at most.
_SOLVER_SCALE = 1_000
_OPTIMAL = 1e-6
# Of the solver's search tree. A limit in seconds would give other plans on other machines.
_NODES = 20_000
# A status of ``scipy.optimize.milp``.
_INFEASIBLE = 2


@dataclass(frozen=True)
class Met:
    """Decisions that meet a budget.

    Attributes:
        decisions: For every site.
        damage: Sum over the sites of what each loses, measured alone: its share of variance, or with
            ``sensitivity="measured"`` the divergence of the answers.
        left: What is left of every cost, as a fraction of the original.
        notes: What was asked and what is reached, in lines to read.
    """

    decisions: list[Decision]
    damage: float
    left: dict[str, float]
    notes: tuple[str, ...]


def within_budget(
    options: Sequence[Sequence[Decision]], budget: Budget, facts: Trace, table: LatencyTable | None = None
) -> Met:
    """Choose for every site whether it stays or which ratio it gets, so that the sum of the losses is least.

    Args:
        options: From [measured][ghostify.planning.keeping.measured].
        budget: As [plan][ghostify.plan] takes it, checked.
        facts: The original with its facts.
        table: What every choice saves on a backend; those that do not pay there are left out.

    Raises:
        NothingToConvertError: The original meets the budget.
        BudgetError: No choice meets it.
    """
    totals = original_costs(facts, table)
    limits = {key: absolute(key, value, totals[key]) for key, value in budget.items()}
    if all(limits[key] >= totals[key] for key in limits):
        has = ", ".join(f"{key}={_shown(key, totals[key])}" for key in limits)
        unit = " Up to 1 a number is a fraction; write '0.8 ms' for milliseconds." if "latency" in budget else ""
        raise NothingToConvertError(
            f"budget={dict(budget)!r} asks for nothing: the original has {has}. Ask for less.{unit}"
        )
    menu = _menu(options, facts, table)
    changes = _changes(menu, facts, table)
    found = least_damage(
        [[_damage(offer) for offer in offers] for offers in menu],
        [[[change[key] for key in limits] for change in some] for some in changes],
        [limits[key] - totals[key] for key in limits],
    )
    if found is None:
        least = smallest(options, facts, table)
        if all(least[key] >= totals[key] for key in limits):
            raise BudgetError(
                f"budget={dict(budget)!r} cannot be met: no layer that may change saves any. "
                f"{why_kept(options, facts, table)}"
            )
        raise BudgetError(_out_of_reach(budget, limits, least, totals))
    chosen, gap = found
    decisions = [offers[index] for offers, index in zip(menu, chosen, strict=True)]
    damage = sum(map(_damage, decisions))
    left = {key: totals[key] + sum(some[i][key] for some, i in zip(changes, chosen, strict=True)) for key in totals}
    notes = [
        f"{key} {_shown(key, left[key])} of at most {_shown(key, limits[key])}, "
        f"{100 * left[key] / totals[key]:.2f} % of the original"
        for key in limits
    ]
    sites = sum(len(offers) > 1 for offers in menu)
    lost = "lose of their variance" if all(made.damage is None for made in decisions) else "cost the answers"
    notes.append(f"damage {damage:.4g}: what {sites} sites {lost}, each measured alone, in sum; {_optimal(gap)}")
    return Met(decisions, damage, {key: left[key] / totals[key] for key in totals}, tuple(notes))


def original_costs(facts: Trace, table: LatencyTable | None = None) -> dict[str, int]:
    """Multiply-accumulates, parameters, bytes of the parameters (without buffers) and microseconds of the original."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in facts.model.parameters())
    timed = () if table is None else (round(table.original * MICROSECONDS),)
    return dict(zip(KEYS, (facts.count.macs, facts.params, size, *timed), strict=False))


def smallest(options: Sequence[Sequence[Decision]], facts: Trace, table: LatencyTable | None = None) -> dict[str, int]:
    """The least that can be left of every cost, each looked at alone."""
    changes = _changes(_menu(options, facts, table), facts, table)
    totals = original_costs(facts, table)
    return {key: totals[key] + sum(min(change[key] for change in some) for some in changes) for key in totals}


def why_kept(options: Sequence[Sequence[Decision]], facts: Trace, table: LatencyTable | None = None) -> str:
    """Why the layers that cannot change are kept, as a sentence."""
    told = reasons_told(offers[0] for offers in _menu(options, facts, table) if len(offers) == 1)
    return f"Kept are: {told or 'none; overrides decide'}."


def least_damage(
    damages: Sequence[Sequence[float]], changes: Sequence[Sequence[Sequence[int]]], limits: Sequence[int]
) -> tuple[list[int], float] | None:
    """Choose one offer for each site: a multiple-choice knapsack, solved by HiGHS (``scipy.optimize.milp``).

    The solver's limits hold up to a tolerance; they are checked again in whole numbers, and a choice that
    exceeds one is ruled out.

    Args:
        damages: What every offer of every site damages.
        changes: What it adds to every cost.
        limits: The most that may be added in sum; none for a choice without limits.

    Returns:
        The number of each site's offer, and by how much the sum of damages may be above the least, 0 if it is the
        least; ``None`` if nothing keeps to the limits.

    Raises:
        BudgetError: The solver gave up.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, as importing it takes longer than most commands

    sizes = [len(some) for some in damages]
    starts = np.cumsum([0, *sizes])
    damage = np.array([value for some in damages for value in some], dtype=float)
    unit = float(np.abs(damage).max()) / _SOLVER_SCALE or 1.0
    cost = np.array([change for some in changes for change in some], dtype=object).reshape(-1, len(limits))
    one_each = np.repeat(np.eye(len(sizes)), sizes, axis=1)
    scale = np.maximum(1, np.abs(cost).max(0)).astype(float) / _SOLVER_SCALE
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint((cost / scale).astype(float).T, -np.inf, np.array(limits, dtype=float) / scale),
    ]
    while True:
        with _nothing_on_stdout():
            found = milp(
                damage / unit,
                integrality=np.ones(starts[-1]),
                bounds=Bounds(0, 1),
                constraints=constraints,
                options={"mip_rel_gap": 0.0, "node_limit": _NODES},
            )
        if found.status == _INFEASIBLE:
            return None
        if found.x is None:
            raise BudgetError(f"The solver found no choice of ratios: {found.message} Ask for less or more.")
        chosen = [int(found.x[start:end].argmax()) for start, end in pairwise(starts.tolist())]
        columns = starts[:-1] + chosen
        if all(sum(cost[columns, k]) <= limit for k, limit in enumerate(limits)):
            gap = float(found.fun - found.mip_dual_bound)
            return chosen, gap * unit if gap > _OPTIMAL else 0.0
        constraints.append(LinearConstraint(np.isin(np.arange(starts[-1]), columns)[None], 0, len(sizes) - 1))


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Lead standard output to the error stream: HiGHS prints lines of its own there, past Python and its options."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        before = os.dup(1)
    except (OSError, ValueError):  # closed: nothing can come out
        yield
        return
    try:
        with suppress(OSError):  # there may be no error stream
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def _menu(options: Sequence[Sequence[Decision]], facts: Trace, table: LatencyTable | None) -> list[list[Decision]]:
    """What may happen to every site: it stays, or gets a ratio; only one thing where the site is not open."""
    if table is None:
        return [list(some) if some[0].explained is None else [kept(some), *some] for some in options]
    return [_paying(some, table, sure) for some, sure in zip(options, _ordered(options, facts), strict=True)]


def _ordered(options: Sequence[Sequence[Decision]], facts: Trace) -> list[bool]:
    """Whether a site will need an index if all that are open change, which is the least that can be promised."""
    return [made.order == "index" for made in with_orders([some[-1] for some in options], facts.streams, share=False)]


def _paying(some: Sequence[Decision], table: LatencyTable, ordered: bool) -> list[Decision]:
    """To keep a site, and those of its ratios that are faster than it by more than noise, each with what it saves."""
    savings = [None if made.spec is None else table.saving(made.site, made.spec, ordered=ordered) for made in some]
    timed = [
        made if saved is None else replace(made, saved_ms=saved.ms) for made, saved in zip(some, savings, strict=True)
    ]
    if some[0].explained is None:
        return timed  # not open: an override decides, or an obstacle
    paying = [made for made, saved in zip(timed, savings, strict=True) if saved is not None and saved.pays]
    if paying:
        return [kept(some), *paying]
    best = max(saved.ms for saved in savings if saved is not None)
    return [replace(kept(some), reason=f"no ratio pays on {table.backend}: the best saves {best:.3f} ms")]


def _damage(offer: Decision) -> float:
    """What the sum is made of: measured at the network's output, or else the share of variance that is lost."""
    if offer.damage is not None:
        return offer.damage
    return 0.0 if offer.explained is None else 1 - offer.explained


def _changes(
    menu: Sequence[Sequence[Decision]], facts: Trace, table: LatencyTable | None
) -> list[list[dict[str, int]]]:
    """What every offer adds to every cost of the model (it is negative)."""
    return [[_change(offer, facts.model, table) for offer in offers] for offers in menu]


def _change(offer: Decision, model: nn.Module, table: LatencyTable | None) -> dict[str, int]:
    params = offer.params_after - offer.params_before
    weight = model.get_submodule(offer.site.name).weight if params else None  # a Ghost unit is of its dtype
    size = params * weight.element_size() if isinstance(weight, Tensor) else 0
    timed = () if table is None else (-round((offer.saved_ms or 0.0) * MICROSECONDS),)
    return dict(zip(KEYS, (offer.macs_after - offer.macs_before, params, size, *timed), strict=False))


def _shown(key: str, number: int) -> str:
    return f"{number / MICROSECONDS:.3f} ms" if key == "latency" else f"{number:,}"


def _optimal(gap: float) -> str:
    return "no choice has less" if not gap else f"another choice may have up to {gap:.1g} less"


def _out_of_reach(budget: Budget, limits: dict[str, int], least: dict[str, int], totals: dict[str, int]) -> str:
    """Why nothing meets a budget. Fractions are rounded up, so that asking for them succeeds."""
    least_left = {key: math.ceil(Fraction(least[key], totals[key]) * 10_000) / 10_000 for key in limits}
    reach = ", ".join(
        f"{key}={left} ({_shown(key, least[key])} of {_shown(key, totals[key])})" for key, left in least_left.items()
    )
    each = "" if any(limits[key] < least[key] for key in limits) else "each of them can be met, but not together; "
    alone = " (each alone)" if len(limits) > 1 else ""
    return (
        f"budget={dict(budget)!r} cannot be met with the ratios up to 4 and the layers that may change: {each}the "
        f"smallest that can be reached{alone} is {reach}. Ask for no less, skip fewer layers, or give single layers a "
        "higher ratio: overrides={'PATTERN': 8}."
    )
