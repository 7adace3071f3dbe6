"""How well the started units fit their layers, told in the plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ghostify.spec import Plan

# A unit that misses more of its layer's variance is warned of.
_POOR = 0.5


@dataclass(frozen=True)
class Fit:
    """How well the start of a Ghost unit fits its layer.

    Attributes:
        explained: Share of the layer's variance that cheap kernels on its chosen channels explain.
        error: Share of it that the started unit misses, on the inputs that it gets in the converted model.
    """

    explained: float
    error: float


def with_fits(plan: Plan, fits: Mapping[str, Fit]) -> Plan:
    """The plan with what is known of the start at every site; warns of sites where little is left."""
    decisions = tuple(
        replace(d, explained=fits[d.site.name].explained, error=fits[d.site.name].error) if d.site.name in fits else d
        for d in plan
    )
    poor = [f"{name} ({fits[name].error:.0%})" for name in fits if not fits[name].error <= _POOR]
    if poor:
        warnings.warn(
            f"{len(poor)} of {len(fits)} Ghost units start with more than {_POOR:.0%} of their layer's variance "
            f"missed: {', '.join(poor[:5])}{', …' if len(poor) > 5 else ''}. Give them a lower ratio (overrides), or "
            "let plan(keep=…) choose the ratios; else much is left to the distillation.",
            stacklevel=3,
        )
    return replace(plan, decisions=decisions)
