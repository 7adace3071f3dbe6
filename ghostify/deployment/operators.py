"""Which operators of an exported file come from Ghost units, and that none is there which the plan promised away."""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from ghostify.errors import ExportError
from ghostify.nn.folded import FoldedGhost
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Plan

# Where the exporter notes the names of the modules that a node lies in, as the text of a Python list.
_SCOPES = "pkg.torch.onnx.name_scopes"
_INDEX = ("Gather", "GatherElements", "GatherND")
# What moves numbers and computes nothing; a folded unit needs none of it.
_MOVES = ("Slice", "Split", "Transpose")


def check_operators(graph: Any, exported: nn.Module, plan: Plan | None) -> None:
    """Refuse an index, a slice or a transposition that a Ghost unit should not need.

    An index puts a unit's channels back in order; there is none where the plan says that the order is
    ``folded`` or ``shared``. Slices and transpositions are in no folded unit. What the rest of the network does with
    its maps is its own affair.

    Args:
        graph: The exporter's graph, with its notes.
        exported: The module that was exported, folded or not.
        plan: The plan that the model carries, if any.

    Raises:
        ExportError: There is such a node.
    """
    units = {name: unit for name, unit in exported.named_modules() if isinstance(unit, GhostConv | FoldedGhost)}
    without_index = {decision.site.name for decision in plan or () if decision.order in ("folded", "shared")}
    unwanted = []
    for node in graph.node:
        unit = next((scope for scope in _scopes(node) if scope in units), None)
        if unit is None:
            continue
        index = node.op_type in _INDEX and unit in without_index
        if index or (node.op_type in _MOVES and isinstance(units[unit], FoldedGhost)):
            unwanted.append(f"{node.op_type} in {unit!r}")
    if unwanted:
        raise ExportError(
            f"The file would hold {len(unwanted)} operators that the plan promised away ({', '.join(unwanted[:3])}"
            f"{', …' if len(unwanted) > 3 else ''}): they cost time and compute nothing. Was the model changed after "
            "its conversion? Convert it anew, or else please report the model."
        )


def _scopes(node: Any) -> list[str]:
    """Names of the modules that a node lies in; none for what the exporter's passes have made."""
    text = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "[]")
    try:
        return [str(scope) for scope in ast.literal_eval(text)]
    except (ValueError, SyntaxError):
        return []
