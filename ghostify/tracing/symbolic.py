"""The model as a torch.fx graph."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from ghostify.errors import TraceError
from ghostify.tracing.example import leaves_in
from ghostify.tracing.running import random_state, unmarked
from ghostify.tracing.sites import is_batch_norm

# What tracing has noted in a node's meta: whether a public method of the model, such as timm's forward_features, gives
# it to whoever calls it.
HANDED_OUT = "handed_out"
# And what the forward makes of nothing, such as a tensor of means that it takes off: the model does not hold it.
_CONSTANT = "constant"
_CASTING = ("cpu", "cuda")  # devices that autocast is turned on and off for


@dataclass(frozen=True)
class _Default:
    """What FX is to take as it is, and would take apart if it were a tuple, say."""

    value: Any


class _StandIn(fx.Proxy):
    """For a tensor, while FX traces. What is set on it is in no graph: ``self.gain.data = …``."""

    def __setattr__(self, name: str, value: Any) -> None:
        tracer = vars(self).get("tracer")
        if tracer is not None and name not in ("tracer", "node", "__dict__"):  # those when it is made, or copied
            tracer.within = True
        super().__setattr__(name, value)


class _Tracer(fx.Tracer):
    """Keeps convolutions, batch norms and modules without children whole, as one node each, whatever their class."""

    def __init__(
        self, model: nn.Module, arguments: Collection[str], entered: Collection[str], *, buffers: bool
    ) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        self._given = arguments
        self._entered = {id(module) for name, module in model.named_modules() if name in entered}
        # Found before: to look at a norm's statistics while FX traces would make nodes that read them.
        self._norms = {id(module) for module in model.modules() if is_batch_norm(module)}
        # FX counts on from model to model; here the same model has the same names every time.
        self._qualname_counter = Counter()
        self._around, self.within = _context(), False  # whether something was done in a way that no graph knows

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.within |= _context() != self._around
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        alone = next(m.children(), None) is None and id(m) not in self._entered
        known = isinstance(m, _ConvNd) or id(m) in self._norms
        return alone or known or super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        called, found = super().create_args_for_root(*args, **kwargs)
        return called, [argument.value if isinstance(argument, _Default) else argument for argument in found]

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: inspect.Signature, fn_for_analysis: Any) -> Any:
        """An argument that the example does not give keeps its default, and the graph does not have it."""
        parameter = sig.parameters.get(name)  # none where it is for all others: *args
        if parameter is None or name in self._given or parameter.default is inspect.Parameter.empty:
            return super()._proxy_placeholder(name, concrete_args, sig, fn_for_analysis)
        default = parameter.default  # a list of its own, or a set: the forward may add to it
        return _Default(set(default) if isinstance(default, set) else tree_map(lambda leaf: leaf, default))


def _context() -> tuple[object, ...]:
    """Whether gradients are computed, and in which precision."""
    casts = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _CASTING]
    return torch.is_grad_enabled(), *casts


@contextmanager
def _autocasting(*, enabled: bool) -> Iterator[None]:
    """While it is open autocast is on everywhere, or nowhere."""
    before = {device: torch.is_autocast_enabled(device) for device in _CASTING}
    try:
        for device in _CASTING:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, was in before.items():
            torch.set_autocast_enabled(device, was)


@contextmanager
def _watched_functions(tracer: _Tracer) -> Iterator[None]:
    """While it is open the tracer is told of functions with gradients of their own, which may leave no node."""
    home = torch.autograd.Function
    apply = vars(home)["apply"]

    def watched(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        tracer.within |= any(isinstance(leaf, fx.Proxy) for leaf in leaves_in((args, kwargs)))
        return apply.__func__(cls, *args, **kwargs)

    setattr(home, "apply", classmethod(watched))  # noqa: B010 - a method is not assigned to
    try:
        yield
    finally:
        setattr(home, "apply", apply)  # noqa: B010


def trace_graph(
    model: nn.Module, arguments: Collection[str], *, training: bool = False, entered: Collection[str] = ()
) -> fx.Graph:
    """Trace a model symbolically; it is left as it was.

    Buffers that the forward reads are nodes, as parameters are, so that they stay the model's; but where one decides
    what the forward does, as a number does, what is made of buffers counts as made of nothing.

    Args:
        model: The model.
        arguments: Names of the arguments that the example gives. Others keep their defaults, so
            ``if mask is not None`` takes the branch that it takes in the example; the graph does not have them.
        training: Whether all modules are in training mode, or in evaluation mode.
        entered: Names of modules without children whose forward is a part of the graph; others are one node.

    Raises:
        Exception: Whatever FX raises where it cannot trace (control flow on data, say).
    """
    try:
        return _traced(model, arguments, entered, training=training, buffers=True)[0]
    except Exception:  # whatever FX or the forward raises where a number is asked for
        return _traced(model, arguments, entered, training=training, buffers=False)[0]


def trace_all(model: nn.Module, arguments: Collection[str], entered: Collection[str], *, training: bool) -> fx.Graph:
    """Trace a model whose graph is to stand in its place: what the graph does must be all that the forward does.

    Args:
        model: The model.
        arguments: As in [trace_graph][ghostify.tracing.symbolic.trace_graph].
        entered: The same.
        training: The same.

    Raises:
        TraceError: The forward leaves something on the model, such as a count, draws random numbers while it is traced,
            goes in some part without gradients, with gradients of its own, or in a precision of its own, or does
            something else where autocast is on.
        Exception: Whatever FX raises where it cannot trace, also where a buffer decides what is done.
    """
    graphs = []
    for enabled in (True, False):  # autocast on: who turns it off is seen; off: who turns it on
        with _autocasting(enabled=enabled):
            graph, unseen = _traced(model, arguments, entered, training=training, buffers=True)
        if unseen:
            raise TraceError(unseen[0])
        graphs.append(graph)
    if not same_steps(*graphs):
        raise TraceError("the forward does something else where autocast is on")
    return graphs[0]


def _traced(
    model: nn.Module, arguments: Collection[str], entered: Collection[str], *, training: bool, buffers: bool
) -> tuple[fx.Graph, list[str]]:
    """The graph, and what the forward does that is in no graph."""
    with unmarked(model) as left, torch.inference_mode(False), torch.enable_grad():
        for module in model.modules():
            module.training = training
        held, drawn = set(vars(model)), random_state(model)
        tracer = _Tracer(model, arguments, entered, buffers=buffers)
        with _noted_results(model), _watched_functions(tracer):
            graph = tracer.trace(model)
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        hung = {name: value for name, value in vars(model).items() if name not in held and name in read}
        _note_constants(graph, hung)
        mine = {f"{type(model).__name__}.{name}" for name in hung}
        unseen = [f"the forward changes {name}" for name in left() if name not in mine]
        if random_state(model) != drawn:
            unseen.append("the forward draws random numbers that a graph would keep")
        if tracer.within:
            unseen.append(
                "a part of the forward has no gradients, gradients of its own or a precision of its own, or sets an "
                "attribute of a tensor"
            )
        return graph, unseen


def _note_constants(graph: fx.Graph, hung: Mapping[str, Any]) -> None:
    """Note what FX has hung on the model in the node that reads it: one alone, as a run makes such a tensor once."""
    first: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and (name := str(node.target)) in hung:
            node.meta[_CONSTANT] = hung[name]
            if first.setdefault(name, node) is not node:
                node.replace_all_uses_with(first[name])
                graph.erase_node(node)


def is_constant(node: fx.Node) -> bool:
    """Whether a node reads a tensor that the forward makes of nothing, and makes anew in every run."""
    return isinstance(node.meta.get(_CONSTANT), Tensor)


def same_steps(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs do the same, one node after the other, with the same tensors that they make of nothing."""
    pairs = list(zip_longest(graph.nodes, other.nodes))
    return all(one is not None and two is not None and _same_step(one, two) for one, two in pairs)


def _same_step(one: fx.Node, two: fx.Node) -> bool:
    steps = [(node.op, node.target, str((node.args, node.kwargs)), _CONSTANT in node.meta) for node in (one, two)]
    if steps[0] != steps[1]:
        return False
    made, again = one.meta.get(_CONSTANT), two.meta.get(_CONSTANT)
    if isinstance(made, Tensor) and isinstance(again, Tensor):
        kinds = [(value.dtype, value.layout, value.device, value.shape) for value in (made, again)]
        return kinds[0] == kinds[1] and (made.is_meta or torch.equal(made.to_dense(), again.to_dense()))
    return made is again


def attribute(node: fx.Node, model: nn.Module) -> Any:
    """What of the model a node reads or calls by name; a tensor that the forward makes is made anew, as there."""
    if _CONSTANT in node.meta:
        return node.meta[_CONSTANT].clone() if is_constant(node) else node.meta[_CONSTANT]
    return operator.attrgetter(str(node.target))(model)


@contextmanager
def _noted_results(model: nn.Module) -> Iterator[None]:
    """While it is open, what the model's public methods give its forward is noted in the nodes' meta."""
    kind = type(model)
    names = [
        name
        for name in dir(kind)
        if not name.startswith("_")
        and not hasattr(nn.Module, name)
        and inspect.isfunction(inspect.getattr_static(kind, name))
        and name not in vars(model)
    ]

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            for leaf in leaves_in(result):
                if isinstance(leaf, fx.Proxy):
                    leaf.node.meta[HANDED_OUT] = True
            return result

        return called

    for name in names:
        vars(model)[name] = noting(getattr(model, name))
    try:
        yield
    finally:
        for name in names:
            del vars(model)[name]
