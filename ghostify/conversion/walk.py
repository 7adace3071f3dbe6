"""Going through teacher and student side by side, stopping at every site in order.

Each layer of the student can then be fitted to the inputs that it will really get, those of the
student converted so far, with the teacher's outputs as targets. With a graph both networks are run
once, node by node; without one, each is run anew up to every site.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from ghostify.errors import ConversionError
from ghostify.spec import Decision
from ghostify.tracing.example import Example
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


@dataclass(frozen=True)
class Visit:
    """One site, about to be run by the student.

    Attributes:
        decision: What the plan says of it.
        inputs: What the student's site gets, chunk by chunk, each ``(b, c, h, w)``.
        targets: What the teacher's site makes, chunk by chunk, each ``(b, n, h', w')``.
        tail: What follows.
    """

    decision: Decision
    inputs: list[Tensor]
    targets: list[Tensor]
    tail: Tail = Tail()


def walk_graph(
    graph: fx.Graph, teacher: nn.Module, student: nn.Module, decisions: dict[str, Decision], chunks: list[Example]
) -> Iterator[Visit]:
    """Run both networks node by node, and yield at the first call of every replaced site.

    What both compute alike is computed once; a value is dropped after its last use. Both networks
    must be in evaluation mode. With ``student is teacher`` the inputs are the teacher's own.

    Args:
        graph: The teacher's FX graph.
        teacher: The original.
        student: The converted model, of the same structure.
        decisions: The replaced sites by name.
        chunks: Calibration inputs.
    """
    nodes = _shortcuts_first(graph, teacher, decisions)
    dying = _last_uses(nodes)
    visited: set[str] = set()
    values: dict[fx.Node, list[tuple[Any, Any]]] = {}
    for node in nodes:
        if node.op == "output":
            return
        decision = decisions.get(str(node.target)) if node.op == "call_module" else None
        if decision is not None and str(node.target) not in visited:
            visited.add(str(node.target))
            inputs = [_arguments(node, values, chunk) for chunk in range(len(chunks))]
            module = teacher.get_submodule(str(node.target))
            targets = [module(*mine[0], **mine[1]) for mine, _ in inputs]
            tail = _tail(node, values, decision, teacher, targets)
            yield Visit(decision, [theirs[0][0] for _, theirs in inputs], targets, tail)
            replaced = student.get_submodule(str(node.target))
            values[node] = [
                (target, target if replaced is module else replaced(*theirs[0], **theirs[1]))
                for target, (_, theirs) in zip(targets, inputs, strict=True)
            ]
        else:
            values[node] = [
                _step(node, values, teacher, student, index, example, replaced=decision is not None)
                for index, example in enumerate(chunks)
            ]
        for dead in dying[node]:
            del values[dead]


def walk_calls(
    teacher: nn.Module, student: nn.Module, decisions: dict[str, Decision], chunks: list[Example]
) -> Iterator[Visit]:
    """The same without a graph: both networks are run anew up to every site, so it takes longer.

    Args:
        teacher: The original.
        student: The converted model, of the same structure.
        decisions: The replaced sites by name, in order of execution.
        chunks: Calibration inputs.
    """
    for name, decision in decisions.items():
        ends = [(_stop_at(teacher, name, chunk), _stop_at(student, name, chunk)) for chunk in chunks]
        module = teacher.get_submodule(name)
        yield Visit(decision, [theirs for _, theirs in ends], [module(mine) for mine, _ in ends])


class _ReachedError(Exception):
    """The site has been reached; its input is all that was wanted."""


def _stop_at(model: nn.Module, name: str, chunk: Example) -> Tensor:
    """The first input that a module gets."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _ReachedError

    handle = model.get_submodule(name).register_forward_pre_hook(catch)
    try:
        fresh = chunk.copied()
        model(*fresh.args, **fresh.kwargs)
    except _ReachedError:
        return caught[0]
    finally:
        handle.remove()
    raise ConversionError(f"site={name!r} is not reached by the calibration inputs. Pass data like the example inputs.")


def _step(
    node: fx.Node,
    values: dict[fx.Node, list[tuple[Any, Any]]],
    teacher: nn.Module,
    student: nn.Module,
    index: int,
    example: Example,
    *,
    replaced: bool,
) -> tuple[Any, Any]:
    """One node on one chunk, for teacher and student; computed once where both would do the same."""
    if node.op == "placeholder":
        value = _placeholder(node, example.copied())
        return value, value
    if node.op == "get_attr":
        mine, theirs = (operator.attrgetter(str(node.target))(model) for model in (teacher, student))
        return mine, (mine if isinstance(mine, Tensor) and torch.equal(mine, theirs) else theirs)
    same = not replaced and all(
        pair[0] is pair[1] for pair in (values[argument][index] for argument in node.all_input_nodes)
    )
    if not same and changes_its_input(node, teacher):
        # What the teacher's step is about to change may be what the student goes on with, under this name or another.
        _unshare(_arguments(node, values, index)[0], values, index)
    mine_in, theirs_in = _arguments(node, values, index)
    if node.op == "call_module":
        name = str(node.target)
        mine = teacher.get_submodule(name)(*mine_in[0], **mine_in[1])
        return mine, (mine if same else student.get_submodule(name)(*theirs_in[0], **theirs_in[1]))
    mine = _call(node, *mine_in)
    return mine, (mine if same else _call(node, *theirs_in))


def _call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)  # op is call_function
    return node.target(*args, **kwargs)


def _unshare(arguments: Any, values: dict[fx.Node, list[tuple[Any, Any]]], index: int) -> None:
    """Give the student copies of all values that lie in the same memory as arguments of the teacher's.

    Views of one tensor stay views of one tensor.
    """

    def addresses(value: Any) -> set[int]:
        return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}

    written = addresses(arguments)
    memo: dict[int, Any] = {}
    for pairs in values.values():
        mine, theirs = pairs[index]
        if addresses(theirs) & written:
            pairs[index] = (mine, copy.deepcopy(theirs, memo))


def _placeholder(node: fx.Node, example: Example) -> Any:
    positional = [other for other in node.graph.nodes if other.op == "placeholder"]
    place = positional.index(node)
    if str(node.target).startswith("**"):
        names = {str(other.target) for other in positional}
        return {name: value for name, value in example.kwargs.items() if name not in names}
    if str(node.target).startswith("*"):
        return example.args[place:]
    if place < len(example.args):
        return example.args[place]
    return example.kwargs.get(str(node.target), node.args[0] if node.args else None)


def _arguments(node: fx.Node, values: dict[fx.Node, list[tuple[Any, Any]]], index: int) -> tuple[Any, Any]:
    """Positional and keyword arguments of a node, the teacher's and the student's."""

    def of(side: int) -> tuple[Any, Any]:
        return (
            fx.map_arg(node.args, lambda argument: values[argument][index][side]),
            fx.map_arg(node.kwargs, lambda argument: values[argument][index][side]),
        )

    return of(0), of(1)


def _tail(
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


def _shortcuts_first(graph: fx.Graph, teacher: nn.Module, decisions: dict[str, Decision]) -> list[fx.Node]:
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


def _last_uses(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nobody reads after it."""
    dying: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        for argument in (node, *node.all_input_nodes):
            if argument not in seen:
                seen.add(argument)
                dying[node].append(argument)
    return dying
