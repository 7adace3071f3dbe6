"""Going through teacher and student side by side, stopping at every site in order.

Each layer of the student can then be fitted to the inputs that it will really get, those of the
student converted so far, with the teacher's outputs as targets. With a graph both networks are run
once, node by node; without one, each is run anew up to every site.
"""

from __future__ import annotations

import copy
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


@dataclass(frozen=True)
class Visit:
    """One site, about to be run by the student.

    Attributes:
        decision: What the plan says of it.
        inputs: What the student's site gets, chunk by chunk, each ``(b, c, h, w)``.
        targets: What the teacher's site makes, chunk by chunk, each ``(b, n, h', w')``.
        drift: Where the site closes a residual block: teacher's minus student's shortcut, chunk by
            chunk, to be made up for in the norm's (or the site's) output; else ``None``.
    """

    decision: Decision
    inputs: list[Tensor]
    targets: list[Tensor]
    drift: list[Tensor] | None = None


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
    dying = _last_uses(graph)
    visited: set[str] = set()
    values: dict[fx.Node, list[tuple[Any, Any]]] = {}
    for node in graph.nodes:
        if node.op == "output":
            return
        decision = decisions.get(str(node.target)) if node.op == "call_module" else None
        if decision is not None and str(node.target) not in visited:
            visited.add(str(node.target))
            inputs = [_arguments(node, values, chunk) for chunk in range(len(chunks))]
            module = teacher.get_submodule(str(node.target))
            targets = [module(*mine[0], **mine[1]) for mine, _ in inputs]
            drift = _drift(node, values, decision, teacher, targets)
            yield Visit(decision, [theirs[0][0] for _, theirs in inputs], targets, drift)
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


def _drift(
    node: fx.Node,
    values: dict[fx.Node, list[tuple[Any, Any]]],
    decision: Decision,
    teacher: nn.Module,
    targets: list[Tensor],
) -> list[Tensor] | None:
    """Teacher's minus student's other operand, if the site's (normed) output is next added to something known."""
    norm = decision.site.chain.norm if decision.site.chain is not None else None
    follower = only_user(node)
    while follower is not None and follower.op == "call_module":
        module = teacher.get_submodule(str(follower.target))
        inside = module.children() if str(follower.target) == norm else [module]
        if not all(isinstance(part, nn.Identity | _DropoutNd) for part in inside):
            return None  # an activation, say: what is added before it does not arrive behind it
        node, follower = follower, only_user(follower)
    if follower is None or follower.target not in _ADDITIONS or follower.kwargs:
        return None
    others = [argument for argument in follower.all_input_nodes if argument is not node]
    if len(others) != 1 or others[0] not in values:
        return None
    pairs = values[others[0]]
    if all(mine is theirs for mine, theirs in pairs):
        return None
    if any(getattr(mine, "shape", None) != target.shape for (mine, _), target in zip(pairs, targets, strict=True)):
        return None  # broadcast
    return [mine - theirs for mine, theirs in pairs]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nobody reads after it."""
    dying: dict[fx.Node, list[fx.Node]] = {node: [] for node in graph.nodes}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for argument in (node, *node.all_input_nodes):
            if argument not in seen:
                seen.add(argument)
                dying[node].append(argument)
    return dying
