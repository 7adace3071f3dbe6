"""Deciding, before anything is changed, what happens to every convolution and what it saves."""

from ghostify.planning.frontier import Frontier, frontier
from ghostify.planning.goal import Goal, check_goal
from ghostify.planning.limits import Budget
from ghostify.planning.planner import (  # fmt: skip
    Override,
    chosen_spec,
    override_specs,
    plan,
    plan_traced,
    skip_patterns,
)

__all__ = [
    "Budget",
    "Frontier",
    "Goal",
    "Override",
    "check_goal",
    "chosen_spec",
    "frontier",
    "override_specs",
    "plan",
    "plan_traced",
    "skip_patterns",
]
