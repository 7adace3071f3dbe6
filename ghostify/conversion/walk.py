"""Going through teacher and student side by side, stopping at every site in order.

Each layer of the student can then be fitted to the inputs that it will really get, those of the
student converted so far, with the teacher's outputs as targets. With a graph both networks are run
once, node by node; without one, each is run anew up to every site.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ghostify.conversion.tails import Tail, shortcuts_first, tail_of
from ghostify.errors import ConversionError
from ghostify.spec import Decision
from ghostify.tracing.example import Example
from ghostify.tracing.execution import last_uses, run_node
from ghostify.tracing.graph import changes_its_input
from ghostify.tracing.symbolic import is_constant

# Bytes for activations.
MEMORY = 2**30

Values = dict[fx.Node, list[tuple[Any, Any]]]
"""What lives: chunk by chunk, the teacher's value and the student's."""


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
    tail: Tail = field(default_factory=Tail)


def walk_graph(
    graph: fx.Graph,
    teacher: nn.Module,
    student: nn.Module,
    decisions: dict[str, Decision],
    chunks: list[Example],
    memory: int = MEMORY,
) -> Iterator[Visit]:
    """Run both networks node by node, and yield at the first call of every replaced site.

    What both compute alike is computed once; a value is dropped after its last use. Where maps are
    large, only so many chunks are on their way as fit the memory; the others join further on, where
    maps are smaller. Both networks must be in evaluation mode. With ``student is teacher`` the
    inputs are the teacher's own.

    Args:
        graph: The teacher's FX graph.
        teacher: The original.
        student: The converted model, of the same structure.
        decisions: The replaced sites by name.
        chunks: Calibration inputs.
        memory: Bytes for the values that live at one time; at least one chunk is used.
    """
    nodes = shortcuts_first(graph, teacher, decisions)
    walk = _Walk(nodes, last_uses(nodes), teacher, student, decisions)
    room = walk.room(chunks[0], memory)
    visited: set[str] = set()
    values: Values = {}
    waiting, examples = deque(chunks), list[Example]()
    for place, node in enumerate(nodes):
        if node.op == "output":
            break
        name = str(node.target)
        visit = node.op == "call_module" and name in decisions and name not in visited
        if visit or not examples:
            fitting = _fitting(waiting, sum(example.batch for example in examples), room[place])
            for example in [waiting.popleft() for _ in range(fitting if examples else max(1, fitting))]:
                joined = walk.values_before(node, example)
                for live in joined:
                    values.setdefault(live, []).extend(joined[live])
                examples.append(example)
        if visit:
            visited.add(name)
            inputs = [_arguments(node, values, index) for index in range(len(examples))]
            module = teacher.get_submodule(name)
            targets = [module(*mine[0], **mine[1]) for mine, _ in inputs]
            tail = tail_of(node, values, decisions[name], teacher, targets)
            yield Visit(decisions[name], [theirs[0][0] for _, theirs in inputs], targets, tail)
            replaced = student.get_submodule(name)
            values[node] = [
                (target, target if replaced is module else replaced(*theirs[0], **theirs[1]))
                for target, (_, theirs) in zip(targets, inputs, strict=True)
            ]
        else:
            values[node] = [walk.step(node, values, index, example) for index, example in enumerate(examples)]
        for dead in walk.dying[node]:
            del values[dead]
    if waiting:
        _warn_of_memory(sum(example.batch for example in examples), chunks, memory)


def walk_calls(
    teacher: nn.Module,
    student: nn.Module,
    decisions: dict[str, Decision],
    chunks: list[Example],
    memory: int = MEMORY,
) -> Iterator[Visit]:
    """The same without a graph: both networks are run anew up to every site, so it takes longer.

    Args:
        teacher: The original.
        student: The converted model, of the same structure.
        decisions: The replaced sites by name, in order of execution.
        chunks: Calibration inputs.
        memory: Bytes for inputs and targets of one site; at least one chunk is used.
    """
    most = 0
    for name, decision in decisions.items():
        numbers = max(sum(math.prod(s) for s in (c.input_shape, c.output_shape)) * c.rows for c in decision.site.calls)
        count = max(1, _fitting(chunks, 0, int(memory / (8 * numbers))))
        pairs = [(_stop_at(teacher, name, chunk), _stop_at(student, name, chunk)) for chunk in chunks[:count]]
        ends = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        if not ends:
            raise ConversionError(
                f"site={name!r} is not reached by the calibration inputs. Pass data like the example inputs."
            )
        module = teacher.get_submodule(name)
        yield Visit(decision, [theirs for _, theirs in ends], [module(mine) for mine, _ in ends])
        most = max(most, count)
    if most < len(chunks):
        _warn_of_memory(sum(chunk.batch for chunk in chunks[:most]), chunks, memory)


def _fitting(chunks: Iterable[Example], there: int, room: int) -> int:
    """How many of these chunks may join so many examples that are there."""
    totals = accumulate((chunk.batch for chunk in chunks), initial=there)
    return sum(total <= room for total in totals) - (there <= room)


def _warn_of_memory(used: int, chunks: list[Example], memory: int) -> None:
    warnings.warn(
        f"Calibration uses {used} of {sum(chunk.batch for chunk in chunks)} inputs, so that the activations of both "
        f"models stay within {memory / 2**30:g} GiB.",
        stacklevel=2,
    )


class _Reached(BaseException):
    """The site has been reached; its input is all that was wanted. No model catches it."""


def _stop_at(model: nn.Module, name: str, chunk: Example) -> Tensor | None:
    """The first input that a module gets, if it gets one."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Any, ...]) -> None:
        caught.append(args[0])
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(catch)
    try:
        fresh = chunk.copied()
        model(*fresh.args, **fresh.kwargs)
    except _Reached:
        return caught[0]
    finally:
        handle.remove()
    return None


@dataclass(frozen=True)
class _Walk:
    """Both networks, and the nodes in the order in which they are run.

    Attributes:
        nodes: The nodes.
        dying: For every node, the values that nobody reads after it.
        teacher: The original.
        student: The converted model.
        decisions: The replaced sites by name.
    """

    nodes: list[fx.Node]
    dying: dict[fx.Node, list[fx.Node]]
    teacher: nn.Module
    student: nn.Module
    decisions: dict[str, Decision]

    def values_before(self, last: fx.Node, example: Example) -> Values:
        """What is alive on one chunk before a node."""
        values: Values = {}
        for node in self.nodes[: self.nodes.index(last)]:
            values[node] = [self.step(node, values, 0, example)]
            for dead in self.dying[node]:
                del values[dead]
        return values

    def room(self, example: Example, memory: int) -> list[int]:
        """How many examples may be on their way at every node, so that they fit the memory from there on."""
        values: Values = {}
        fits: list[int] = []
        for node in self.nodes:
            if node.op != "output":
                mine, _ = self.step(node, values, 0, example, alone=True)
                values[node] = [(mine, mine)]
                kept = (value for other, value in values.items() if other.op != "get_attr")
                leaves = [leaf for leaf in tree_leaves([pair[0] for (pair,) in kept]) if isinstance(leaf, Tensor)]
                storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in leaves}
                fits.append(int(memory * example.batch / max(1, 2 * sum(storages.values()))))  # of both networks
                for dead in self.dying[node]:
                    del values[dead]
        return list(accumulate(reversed(fits), min))[::-1]

    def step(
        self, node: fx.Node, values: Values, index: int, example: Example, *, alone: bool = False
    ) -> tuple[Any, Any]:
        """One node on one chunk, for both networks (or the teacher ``alone``); once where both do the same."""
        teacher, student = self.teacher, self.teacher if alone else self.student
        if node.op in ("placeholder", "get_attr"):
            mine = run_node(node, teacher, example, (), {})
            theirs = mine if node.op == "placeholder" or is_constant(node) else run_node(node, student, example, (), {})
            same = mine is theirs or (
                isinstance(mine, Tensor) and mine.layout is torch.strided and torch.equal(mine, theirs)
            )
            return mine, mine if same else theirs
        replaced = not alone and node.op == "call_module" and str(node.target) in self.decisions
        same = not replaced and all(
            pair[0] is pair[1] for pair in (values[argument][index] for argument in node.all_input_nodes)
        )
        if not same and changes_its_input(node, teacher):
            # What the teacher's step is about to change may be what the student goes on with, under this
            # name or another.
            _unshare(_arguments(node, values, index)[0], values, index)
        mine_in, theirs_in = _arguments(node, values, index)
        mine = run_node(node, teacher, example, *mine_in)
        return mine, (mine if same else run_node(node, student, example, *theirs_in))


def _unshare(arguments: Any, values: Values, index: int) -> None:
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


def _arguments(node: fx.Node, values: Values, index: int) -> tuple[Any, Any]:
    """Positional and keyword arguments of a node, the teacher's and the student's."""

    def of(side: int) -> tuple[Any, Any]:
        return (
            fx.map_arg(node.args, lambda argument: values[argument][index][side]),
            fx.map_arg(node.kwargs, lambda argument: values[argument][index][side]),
        )

    return of(0), of(1)
