"""What becomes of a site's output: its norm, the shortcut that is added, the activation that cuts it off."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ghostify.spec import Decision
from ghostify.tracing.graph import changes_its_input, only_user

_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
# Activations called as functions or methods: what they pass on as it is.
_LIMITS = {"relu": (0.0, math.inf), "relu_": (0.0, math.inf), "relu6": (0.0, 6.0)}


@dataclass(frozen=True)
class Tail:
    """What becomes of a site's output until an activation cuts it off.

    Attributes:
        norm: The teacher's batch norm after it, if there is one.
        drift: Where the site closes a residual block: teacher's minus student's shortcut, chunk by
            chunk, to be made up for in the norm's (or the site's) output; else ``None``.
        addend: There, the student's shortcut, which is added before the activation.
        low: Values below are cut off, as a ReLU does; infinite where there is no such activation.
        high: Values above are cut off.
    """

    norm: nn.Module | None = None
    drift: list[Tensor] | None = None
    addend: list[Tensor] | None = None
    low: float = -math.inf
    high: float = math.inf


def tail_of(
    node: fx.Node,
    values: dict[fx.Node, list[tuple[Any, Any]]],
    decision: Decision,
    teacher: nn.Module,
    targets: list[Tensor],
) -> Tail:
    """What follows a site, as far as it is known when the site's turn comes."""
    name = decision.site.chain.norm if decision.site.chain is not None else None
    norm = teacher.get_submodule(name) if name is not None else None
    node, addition, low, high = _up_to_addition(node, teacher, name)
    if addition is None:
        return Tail(norm, None, None, low, high)
    others = [argument for argument in addition.all_input_nodes if argument is not node]
    if len(others) != 1 or others[0] not in values:
        return Tail(norm)
    pairs = values[others[0]]
    if any(getattr(mine, "shape", None) != target.shape for (mine, _), target in zip(pairs, targets, strict=True)):
        return Tail(norm)  # broadcast
    same = all(mine is theirs for mine, theirs in pairs)
    drift = None if same else [mine - theirs for mine, theirs in pairs]
    *_, low, high = _up_to_addition(addition, teacher, None)
    return Tail(norm, drift, [theirs for _, theirs in pairs], low, high)


def _up_to_addition(
    node: fx.Node, teacher: nn.Module, norm: str | None
) -> tuple[fx.Node, fx.Node | None, float, float]:
    """Follow a value that one node alone reads, through its norm: to an addition, or to what an activation passes on.

    Returns:
        The last node before the addition, the addition if there is one, and the limits of the
        activation, infinite if there is another one or none.
    """
    follower = only_user(node)
    while follower is not None and follower.op == "call_module":
        module = teacher.get_submodule(str(follower.target))
        for part in module.children() if str(follower.target) == norm else [module]:
            if not isinstance(part, nn.Identity | _DropoutNd):
                return node, None, *_limits_of_module(part)
        node, follower = follower, only_user(follower)
    if follower is None or follower.kwargs.keys() - {"inplace"}:
        return node, None, -math.inf, math.inf
    if follower.target in _ADDITIONS and not follower.kwargs:
        return node, follower, -math.inf, math.inf
    return node, None, *_LIMITS.get(getattr(follower.target, "__name__", str(follower.target)), (-math.inf, math.inf))


def _limits_of_module(module: nn.Module) -> tuple[float, float]:
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return float(module.min_val), float(module.max_val)
    return (0.0, math.inf) if isinstance(module, nn.ReLU) else (-math.inf, math.inf)


def shortcuts_first(graph: fx.Graph, teacher: nn.Module, decisions: dict[str, Decision]) -> list[fx.Node]:
    """The nodes in an order in which the shortcut of a block is computed before the site that closes the block.

    Moved are only nodes that hold no site, and only where nothing on either side works in place.
    """
    nodes = list(graph.nodes)
    for site in [node for node in nodes if node.op == "call_module" and str(node.target) in decisions]:
        chain = decisions[str(site.target)].site.chain
        last, addition, _, _ = _up_to_addition(site, teacher, chain.norm if chain is not None else None)
        others = [node for node in addition.all_input_nodes if node is not last] if addition is not None else []
        start = nodes.index(site)
        place = {node: position for position, node in enumerate(nodes[start:], start)}
        wanted = {node for node in others if node in place}
        stack = list(wanted)
        while stack:
            fresh = {node for node in stack.pop().all_input_nodes if node in place} - wanted
            wanted |= fresh
            stack += fresh
        if not wanted or site in wanted:
            continue
        between = nodes[start : max(place[node] for node in wanted) + 1]
        if any(str(node.target) in decisions or changes_its_input(node, teacher) for node in wanted):
            continue
        if any(changes_its_input(node, teacher) for node in between):
            continue
        nodes[start : start + len(between)] = [
            *(node for node in between if node in wanted),
            *(node for node in between if node not in wanted),
        ]
    return nodes
