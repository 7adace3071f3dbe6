"""Deciding, before anything is changed, what happens to every convolution and what it saves."""

from ghostify.planning.keeping import check_keep_options
from ghostify.planning.planner import Override, chosen_spec, override_specs, plan, plan_traced, skip_patterns

__all__ = ["Override", "check_keep_options", "chosen_spec", "override_specs", "plan", "plan_traced", "skip_patterns"]
