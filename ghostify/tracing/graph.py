"""What a torch.fx graph of a model tells about a convolution."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ghostify.spec import Chain
from ghostify.tracing.sites import has_hooks, is_batch_norm
from ghostify.tracing.symbolic import attribute

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
_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor,
}  # fmt: skip
_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FUNCTION_TARGETS = {
    getattr(home, name): name for home in (torch, F) for name in FUNCTIONS if callable(getattr(home, name, None))
}


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
