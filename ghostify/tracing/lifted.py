"""A graph that stands in a model's place: what copies and pickles of it keep, and torch's own graphs lose."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

_HOMES = ("_parameters", "_buffers", "_modules")  # of a module's state
_HOOKS = {name for name in vars(nn.Module()) if "_hook" in name}
_COMPILED = "_compiled_call_impl"  # it would call the model that it was made of; torch leaves it out of pickles, too


class Retracer(fx.Tracer):
    """Reads a pickled graph again: torch traces the code that it was written as."""

    proxy_buffer_attributes = True


class LiftedModel(fx.GraphModule):
    """A model as a graph whose functional convolutions are modules; copies and pickles keep what the graph lacks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        # By the memo: where a convolution is to be a Ghost unit in the copy, it is one.
        return self._completed(super().__deepcopy__(memo), lambda held: copy.deepcopy(held, memo))

    def __copy__(self) -> fx.GraphModule:
        with kinds_kept(self):
            made = LiftedModel(self, self.graph)
        made.meta = self.meta
        return self._completed(made, lambda held: held)

    def _completed(self, made: fx.GraphModule, held_by_it: Callable[[Any], Any]) -> fx.GraphModule:
        """A copy with what torch has lost; ``held_by_it`` gives what it is to hold in the place of what this holds."""
        for name in _lost(vars(self), made):
            vars(made)[name] = held_by_it(vars(self)[name])
        _take_over(made, {kind: held_by_it(vars(self)[kind]) for kind in _HOMES})
        for name in made._buffers.keys() - self._buffers.keys():
            del made._buffers[name]
        made._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        type(made).__name__ = type(self).__name__  # every graph has a class of its own
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        buffers = {name for name, _ in self.named_buffers(remove_duplicate=False)}
        targets = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        read = {target: operator.attrgetter(target)(self) for target in sorted(targets - buffers)}
        plain = [
            name for name, value in read.items() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        ]
        body, imports = super().__reduce__()[1]
        body.pop(_COMPILED, None)
        return _unpickled, (body, imports, type(self).__name__, buffers_of(self), plain)


def _lost(held: dict[str, Any], made: nn.Module) -> set[str]:
    """What torch does not take over from a graph that it copies or reads: attributes that are not read, and hooks."""
    return (held.keys() - vars(made).keys() | _HOOKS & held.keys()) - {_COMPILED}


def _unpickled(
    body: dict[str, Any], imports: str, kind: str, buffers: dict[str, Buffers], plain: list[str]
) -> LiftedModel:
    for target in plain:  # while torch traces, or it would compute with the tensor's values
        *path, last = target.split(".")
        home = vars(body["_modules"][path[0]].get_submodule(".".join(path[1:]))) if path else body
        home["_buffers"][last] = home.pop(last)
    read: Any = reduce_graph_module(body, imports)
    made = LiftedModel(read, read.graph, kind)
    for name in _lost(body, made):
        vars(made)[name] = body[name]
    _take_over(made, body)
    keep_kinds(made, buffers)
    return made


def _take_over(made: nn.Module, known: dict[str, Any]) -> None:
    """Let it hold all that there is by all names; torch's graphs hold what they read, by one name."""
    for kind in _HOMES:
        held = {**known[kind], **vars(made)[kind], **known[kind]}  # in the order that is known
        vars(made)[kind].clear()
        vars(made)[kind].update(held)


def named_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, by all the names that they have."""
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@dataclass(frozen=True)
class Buffers:
    """Names of a module's buffers, and which of them are no part of its state."""

    all: frozenset[str]
    kept_out: frozenset[str]


def buffers_of(model: nn.Module) -> dict[str, Buffers]:
    """By the names of the modules."""
    return {
        name: Buffers(frozenset(module._buffers.keys()), frozenset(module._non_persistent_buffers_set))
        for name, module in model.named_modules(remove_duplicate=False)
    }


@contextmanager
def kinds_kept(model: nn.Module) -> Iterator[None]:
    """While torch makes a graph that shares modules with a model, and registers their buffers once more."""
    buffers = buffers_of(model)
    try:
        yield
    finally:
        keep_kinds(model, buffers)


def keep_kinds(made: nn.Module, known: dict[str, Buffers]) -> None:
    """Let buffers, those outside the state and tensors that are neither be what they were.

    Torch's graphs make every tensor that they read, and that is no parameter, a buffer of the state.
    """
    for name, module in made.named_modules():
        buffers = known.get(name, Buffers(frozenset(), frozenset()))
        for other in {*module._buffers.keys()} - buffers.all:
            vars(module)[other] = module._buffers.pop(other)
        kept_out = buffers.kept_out & {*module._buffers.keys()}
        if module._non_persistent_buffers_set != kept_out:
            module._non_persistent_buffers_set = set(kept_out)
