"""The model as a torch.fx graph, and what the graph tells about a convolution."""

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
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from ghostify.errors import TraceError
from ghostify.spec import Chain
from ghostify.tracing.example import leaves_in
from ghostify.tracing.running import random_state, unmarked
from ghostify.tracing.sites import has_hooks

# Activations that act on every number alone and have no parameters: they may be copied.
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU,
    nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Hardtanh,
)  # fmt: skip
FUNCTIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid, "mish": nn.Mish, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh,
}  # fmt: skip
# Activations with parameters or arguments of their own.
_OTHER_ACTIVATIONS = {
    "leaky_relu", "prelu", "rrelu", "elu", "celu", "selu", "hardtanh", "threshold", "softplus", "softsign",
    "logsigmoid", "tanhshrink", "hardshrink", "softshrink", "clamp", "clip", "clamp_min",
}  # fmt: skip
# What a run has noted in a node's meta: whether it changes what it reads.
CHANGES_INPUT = "changes_input"
# What tracing has: whether a public method of the model, such as timm's forward_features, gives it to whoever calls it.
HANDED_OUT = "handed_out"
# And what the forward makes of nothing, such as a tensor of means that it takes off: the model does not hold it.
_CONSTANT = "constant"
_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor,
}  # fmt: skip
_CASTING = ("cpu", "cuda")  # devices that autocast is turned on and off for
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FUNCTION_TARGETS = {
    getattr(home, name): name for home in (torch, F) for name in FUNCTIONS if callable(getattr(home, name, None))
}


class _Tracer(fx.Tracer):
    """Keeps convolutions, batch norms and modules without children whole, as one node each, whatever their class."""

    def __init__(self, model: nn.Module, *, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        # Found before: to look at a norm's statistics while FX traces would make nodes that read them.
        self._norms = {id(module) for module in model.modules() if is_batch_norm(module)}
        # FX counts on from model to model; here the same model has the same names every time.
        self._qualname_counter = Counter()
        self._around, self.within = _context(), False  # whether something was done in a way that no graph knows

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        self.within |= _context() != self._around
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        alone = isinstance(m, _ConvNd) or id(m) in self._norms or next(m.children(), None) is None
        return alone or super().is_leaf_module(m, module_qualified_name)


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


def trace_graph(model: nn.Module, arguments: Collection[str], *, training: bool = False) -> fx.Graph:
    """Trace a model symbolically; it is left as it was.

    Buffers that the forward reads are nodes, as parameters are, so that they stay the model's; but where one decides
    what the forward does, as a number does, what is made of buffers counts as made of nothing.

    Args:
        model: The model.
        arguments: Names of the arguments that the example gives. Others keep their defaults, so
            ``if mask is not None`` takes the branch that it takes in the example.
        training: Whether all modules are in training mode, or in evaluation mode.

    Raises:
        Exception: Whatever FX raises where it cannot trace (control flow on data, say).
    """
    try:
        return _traced(model, arguments, training=training, buffers=True)[0]
    except Exception:  # whatever FX or the forward raises where a number is asked for
        return _traced(model, arguments, training=training, buffers=False)[0]


def trace_all(model: nn.Module, arguments: Collection[str], *, training: bool) -> fx.Graph:
    """Trace a model whose graph is to stand in its place: what the graph does must be all that the forward does.

    Args:
        model: The model.
        arguments: As in [trace_graph][ghostify.tracing.graph.trace_graph].
        training: The same.

    Raises:
        TraceError: The forward leaves something on the model, such as a count, draws random numbers while it is traced,
            or goes in some part without gradients, with gradients of its own, or in a precision of its own.
        Exception: Whatever FX raises where it cannot trace, also where a buffer decides what is done.
    """
    for enabled in (True, False):  # so that who turns it off is seen, and who turns it on
        with _autocasting(enabled=enabled):
            graph, unseen = _traced(model, arguments, training=training, buffers=True)
        if unseen:
            raise TraceError(unseen[0])
    return graph


def _traced(
    model: nn.Module, arguments: Collection[str], *, training: bool, buffers: bool
) -> tuple[fx.Graph, list[str]]:
    """The graph, and what the forward does that is in no graph."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name not in arguments and parameter.default is not inspect.Parameter.empty
    }
    with unmarked(model) as left, torch.inference_mode(False), torch.enable_grad():
        for module in model.modules():
            module.training = training
        held, drawn = set(vars(model)), random_state(model)
        tracer = _Tracer(model, buffers=buffers)
        with _noted_results(model), _watched_functions(tracer):
            graph = tracer.trace(model, concrete_args=defaults or None)
        read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        hung = {name: value for name, value in vars(model).items() if name not in held and name in read}
        _note_constants(graph, hung)
        mine = {f"{type(model).__name__}.{name}" for name in hung}
        unseen = [f"the forward changes {name}" for name in left() if name not in mine]
        if random_state(model) != drawn:
            unseen.append("the forward draws random numbers that a graph would keep")
        if tracer.within:
            unseen.append("a part of the forward has no gradients, gradients of its own or a precision of its own")
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


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``, or ``None`` if several or none do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def calls_per_module(graph: fx.Graph) -> Counter[str]:
    """How often every module is called, by the name under which FX knows it."""
    return Counter(str(node.target) for node in graph.nodes if node.op == "call_module")


def chain_after(node: fx.Node, model: nn.Module, calls: Counter[str], owners: Mapping[int, Collection[str]]) -> Chain:
    """What follows one call of a convolution.

    Args:
        node: The call.
        model: The model that was traced.
        calls: From [calls_per_module][ghostify.tracing.graph.calls_per_module].
        owners: From [parameter_owners][ghostify.tracing.sites.parameter_owners].
    """
    norm, obstacle = None, ""
    follower = only_user(node)
    if follower is not None and follower.op == "call_module":
        module = model.get_submodule(str(follower.target))
        if is_batch_norm(module):
            if calls[str(follower.target)] == 1:
                norm = str(follower.target)
                obstacle = _norm_obstacle(module, owners) or _read_elsewhere(norm, node.graph)
            else:
                obstacle = f"its norm {follower.target} is used {calls[str(follower.target)]} times"
        elif "norm" in type(module).__name__.lower():
            obstacle = f"its norm is a {type(module).__name__}"
    activation = None
    after = only_user(follower) if norm is not None and follower is not None else follower
    if after is not None and not obstacle:
        activation, obstacle = _activation(after, model)
    return Chain(norm, activation, obstacle, _makes_output(node, model))


@dataclass(frozen=True)
class Follower:
    """What directly reads a layer.

    Attributes:
        activation: ``module:NAME`` or ``function:NAME`` of the activation, behind an addition if there is one;
            empty if there is none that can be told.
        own: Whether that is a module which is called for nothing else.
        adds: Whether the layer's output is added to something first, as where a residual block ends.
        bare: Whether the forward reads tensors of the layer's itself, too, and not only what it makes.
    """

    activation: str = ""
    own: bool = False
    adds: bool = False
    bare: bool = False


def follower_of(layer: str, graph: fx.Graph, model: nn.Module) -> Follower:
    """What alone reads a layer that is called once.

    Args:
        layer: Its name, of a batch norm or convolution.
        graph: Of the model.
        model: The model that was traced.
    """
    call = next((node for node in graph.nodes if node.op == "call_module" and node.target == layer), None)
    user = None if call is None else _reader(call, model)  # a layer that was changed since may be no node any more
    adds = user is not None and user.target in _ADDITIONS
    if adds and user is not None:
        user = _reader(user, model)
    name = None if user is None else _activation(user, model)[0]
    kind, _, target = (name or "").partition(":")
    own = kind == "module" and calls_per_module(graph)[target] == 1 and not has_hooks(model.get_submodule(target))
    return Follower(name or "", own, adds, bool(_read_elsewhere(layer, graph)))


def _reader(node: fx.Node, model: nn.Module) -> fx.Node | None:
    """The one node that reads ``node``, past modules that do nothing."""
    user = only_user(node)
    while user is not None and user.op == "call_module" and type(model.get_submodule(str(user.target))) is nn.Identity:
        user = only_user(user)
    return user


def changes_its_input(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node works in place, so that others see what it did to its first argument.

    As it was seen to do in a run of the graph; else as its name and options say.
    """
    if CHANGES_INPUT in node.meta:
        return bool(node.meta[CHANGES_INPUT])
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    return (
        node.target in _IN_PLACE
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
    )


def is_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises every channel by running statistics, whatever else it does.

    So do torch's batch norms, frozen ones (torchvision's, timm's), and timm's ``BatchNormAct2d``.
    """
    statistics = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return all(isinstance(value, Tensor) for value in statistics) and not isinstance(module, _InstanceNorm)


def _read_elsewhere(norm: str, graph: fx.Graph) -> str:
    reads = (node for node in graph.nodes if node.op == "get_attr")
    return "its norm is read directly, too" if any(str(r.target).startswith(f"{norm}.") for r in reads) else ""


def _norm_obstacle(norm: nn.Module, owners: Mapping[int, Collection[str]]) -> str:
    """Why a batch norm cannot be shared out to the two branches; empty if it can."""
    if type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
        return f"its norm is a {type(norm).__name__}"
    if has_hooks(norm):
        return "its norm carries hooks"
    if any(len(owners.get(id(parameter), ())) > 1 for parameter in norm.parameters()):
        return "its norm shares parameters"
    return "" if getattr(norm, "affine", True) else "its norm has no scale and shift"


def _activation(node: fx.Node, model: nn.Module) -> tuple[str | None, str]:
    """Name the activation that ``node`` applies, and why it cannot be copied, if so."""
    if node.op == "call_module":
        module = model.get_submodule(str(node.target))
        if isinstance(module, ACTIVATIONS):
            return f"module:{node.target}", ""
        if isinstance(module, nn.PReLU | nn.RReLU) or "act" in type(module).__name__.lower():
            return None, f"its activation {type(module).__name__} cannot be copied"
        return None, ""
    name = _FUNCTION_TARGETS.get(node.target) if node.op == "call_function" else str(node.target).rstrip("_")
    plain_name = getattr(node.target, "__name__", str(node.target)).strip("_")
    if node.op in ("call_function", "call_method") and plain_name in _OTHER_ACTIVATIONS:
        return None, f"its activation {plain_name} cannot be copied"
    if name not in FUNCTIONS or node.op not in ("call_function", "call_method"):
        return None, ""
    if len(node.args) > 1 or set(node.kwargs) - {"inplace"}:
        return None, f"its activation {name} has arguments of its own"
    return f"function:{name}", ""


def _makes_output(node: fx.Node, model: nn.Module) -> bool:
    """Whether no further convolution or linear layer reads, however indirectly, what ``node`` makes."""
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.op == "call_module" and any(p.dim() > 1 for p in model.get_submodule(str(user.target)).parameters()):
            return False
        if any(_is_weight(argument, model) for argument in user.all_input_nodes):
            return False
        stack.extend(user.users)
        if changes_its_input(user, model) and user.all_input_nodes:
            stack.extend(later for later in user.all_input_nodes[0].users if user < later)
    return True


def _is_weight(node: fx.Node, model: nn.Module) -> bool:
    """Whether ``node`` reads a matrix or kernel of the model directly, as in ``F.conv2d(x, self.weight)``."""
    if node.op != "get_attr":
        return False
    value = attribute(node, model)
    return isinstance(value, nn.Parameter) and value.dim() > 1
