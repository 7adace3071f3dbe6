"""Convolutions that a model calls as functions with a stored weight, made modules so that they can be replaced.

``F.conv2d(x, self.weight)`` has no module whose place a Ghost unit could take, so here the graph
itself changes and a ``torch.fx.GraphModule`` takes the model's place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from ghostify.errors import TraceError, first_line
from ghostify.tracing.execution import copied
from ghostify.tracing.lifted import LiftedModel, Retracer, buffers_of, keep_kinds
from ghostify.tracing.sites import has_hooks
from ghostify.tracing.symbolic import attribute, is_constant, same_steps, trace_all, trace_graph

_CONVOLUTIONS: dict[Any, type[_ConvNd]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
_METHODS = (
    *("__call__", "train", "eval", "_apply", "to", "state_dict", "load_state_dict"),
    *("get_extra_state", "set_extra_state", "_save_to_state_dict", "_load_from_state_dict"),
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class Lifted:
    """What came of it.

    Attributes:
        model: The new model.
        names: Those of its new convolutions.
        left: Why there are not more of them, if one of the owners could not be entered.
    """

    model: LiftedModel
    names: tuple[str, ...]
    left: str = ""


class FunctionalConvolutions(TorchFunctionMode):
    """While it is open, notes which modules hold the weights that are given to convolutions as arguments."""

    def __init__(self, owners: dict[int, list[str]]) -> None:
        super().__init__()
        self.owners: set[str] = set()
        self._of_parameter = owners

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            groups = args[6] if len(args) > 6 else (kwargs or {}).get("groups", 1)
            depthwise = groups > 1 and isinstance(weight, Tensor) and weight.shape[1] == 1  # cheap already
            if not depthwise:
                self.owners.update(self._of_parameter.get(id(weight), ()))
        return func(*args, **(kwargs or {}))


def lift_functions(
    model: nn.Module, graph: fx.Graph, arguments: Collection[str], owners: Collection[str] = ()
) -> Lifted | None:
    """Make a model in which functional convolutions with a stored weight are modules.

    Parameters are shared with the model. They keep their names in the state dict where an owner inside the model
    calls them ``weight`` and ``bias`` and holds nothing else.

    Args:
        model: The model; left untouched.
        graph: Its FX graph in evaluation mode; left untouched.
        arguments: What the example gives, as in [trace_graph][ghostify.tracing.symbolic.trace_graph].
        owners: Names of the modules that hold the weights. The graph goes into those without children, which are a node
            each where it was traced, but for convolutions.

    Returns:
        The new model; ``None`` if there is nothing to lift.

    Raises:
        TraceError: A graph would not do what the model does in training, or with other values in its state.
    """
    entered = sorted(name for name in owners if _can_be_entered(model, name))
    try:
        return _entering(model, graph, arguments, entered)
    except TraceError as error:
        if not entered:
            raise
        left = str(error)
    passing = []
    for name in entered:
        with suppress(TraceError):
            _entering(model, graph, arguments, [name])
            passing.append(name)
    found = _entering(model, graph, arguments, passing)
    if found is None:
        raise TraceError(left)
    return replace(found, left=left)


def _entering(model: nn.Module, graph: fx.Graph, arguments: Collection[str], entered: Collection[str]) -> Lifted | None:
    """The same with a graph that goes into some modules."""
    if not entered:
        return _lifted(model, graph, arguments, entered)
    try:
        inside = trace_graph(model, arguments, entered=entered)
    except Exception as error:  # whatever FX or the model's own code raises
        raise TraceError(f"FX cannot trace what is inside of {', '.join(entered)} ({first_line(error)})") from error
    return _lifted(model, inside, arguments, entered)


def _lifted(model: nn.Module, graph: fx.Graph, arguments: Collection[str], entered: Collection[str]) -> Lifted | None:
    lifted = fx.Graph(tracer_cls=Retracer)
    lifted.output(lifted.graph_copy(graph, {}))
    taken = {str(node.target) for node in lifted.nodes if node.op == "call_module"}
    reads = Counter(str(node.target) for node in lifted.nodes if node.op == "get_attr")
    for called in taken:  # what is called reads its own parameters, too
        reads.update(f"{called}.{name}" for name, _ in model.get_submodule(called).named_parameters())
    made: dict[str, nn.Module] = {}
    for node in list(lifted.nodes):
        if node.op == "call_function" and node.target in _CONVOLUTIONS:
            conv = _module_for(node, model, reads)
            if conv is not None:
                name = _name_for(node, {*taken, *made, *reads}, model)
                made[name] = conv
                with lifted.inserting_before(node):
                    call = lifted.call_module(name, (_argument(node, "input"),))
                read = [_argument(node, "weight"), _argument(node, "bias")]
                node.replace_all_uses_with(call)
                for dead in (node, *filter(None, read)):
                    lifted.erase_node(dead)
    if not made:
        return None
    _check_graph(model, graph, arguments, entered)
    _check_names(model)
    for node in list(filter(is_constant, lifted.nodes)):  # made anew in every run: it may be changed there
        with lifted.inserting_after(node):
            fresh = lifted.call_method("clone", (node,))
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user, fresh=fresh: user is not fresh)
    named = {str(node.target): node for node in lifted.nodes if node.op in ("call_module", "get_attr")}
    root = {target: attribute(named[target], model) for target in sorted(named.keys() - made.keys())}
    buffers = buffers_of(model)
    whole = LiftedModel({**root, **made}, lifted, type(model).__name__)
    keep_kinds(model, buffers)  # torch registers the buffers of shared modules once more
    _hold_all(whole, model, {id(parameter) for conv in made.values() for parameter in conv.parameters()})
    known = set(model.modules())
    for module in whole.modules():
        if module not in known:  # what is shared with the model keeps its mode
            module.training = model.training
    _check_modules(model, taken, set(whole.modules()))
    return Lifted(whole, tuple(made))


def _can_be_entered(model: nn.Module, name: str) -> bool:
    module = dict(model.named_modules()).get(name)
    return module is not None and not isinstance(module, _ConvNd) and next(module.children(), None) is None


def _check_graph(model: nn.Module, graph: fx.Graph, arguments: Collection[str], entered: Collection[str]) -> None:
    """See that the forward does the same in training, and with other values in the model's state.

    A graph holds the branches of one mode, and numbers that were computed while it was traced.

    Raises:
        TraceError: It does not.
    """
    other = copied(model)  # another kind of numbers would cut a parameter from what hangs on its gradient
    state = {id(value): value for _, value in _named_state(other)}.values()
    before = [(value, value.data) for value in state if value.layout is torch.strided]
    for change in (_lowered, _raised):
        try:
            for value, data in before:
                with suppress(RuntimeError, TypeError):  # kinds of numbers without arithmetic
                    value.data = change(data)
            same = same_steps(graph, trace_all(other, arguments, entered, training=True))
        except TraceError:
            raise
        except Exception as error:  # whatever FX or the model's own code raises
            raise TraceError(
                f"in training, or with buffers as a part of the graph, it cannot be traced ({first_line(error)})"
            ) from error
        if not same:
            raise TraceError("what it does depends on the mode, or on values in its state")


def _lowered(tensor: Tensor) -> Tensor:
    """Far below zero, so that comparisons come out otherwise."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.new_full((), -1000).expand(tensor.shape)
    return ~tensor


def _raised(tensor: Tensor) -> Tensor:
    """Far above, and of another kind of numbers, which a forward may ask for, too."""
    if tensor.is_complex():
        return tensor.new_full((), 1000).expand(tensor.shape)
    if tensor.is_floating_point():
        kind = torch.float32 if tensor.dtype == torch.float64 else torch.float64
        return tensor.new_full((), 1000, dtype=kind).expand(tensor.shape)
    return tensor + 100


def _check_modules(model: nn.Module, taken: Collection[str], held: Collection[nn.Module]) -> None:
    """See that a module that the graph does not call does no more than its forward does.

    Args:
        model: The model.
        taken: Names of what the graph calls.
        held: Modules that the graph holds as they are, whether it calls them or not.

    Raises:
        TraceError: Something looks on, or it has a state or a way into training of its own.
    """
    for name, module in model.named_modules():
        who = f"module {name!r}" if name else "the model itself"
        if any(name == called or name.startswith(f"{called}.") for called in taken):
            continue
        if has_hooks(module) or any(getattr(module, hooks) for hooks in _STATE_HOOKS):
            raise TraceError(f"{who} carries hooks")
        if module in held:
            continue
        own = [method for method in _METHODS if getattr(type(module), method) is not getattr(nn.Module, method)]
        if own and not isinstance(module, nn.ParameterList | nn.ParameterDict):  # which cannot be called
            raise TraceError(f"{who} has a {own[0]} of its own")


def _check_names(model: nn.Module) -> None:
    """See that no name is one that torch's graphs have themselves.

    Raises:
        TraceError: One is.
    """
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    for name in (*model._modules, *model._parameters, *model._buffers):
        if hasattr(graph, name):
            raise TraceError(f"a graph has a {name!r} of its own")


def _hold_all(made: nn.Module, model: nn.Module, moved: Collection[int]) -> None:
    """Give a graph what of the model's state it does not read, under the same names.

    Args:
        made: The graph; it gets the model's own modules and tensors.
        model: The model.
        moved: The ids of parameters that have other names in the graph.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    there = {id(modules[name]): module for name, module in made.named_modules() if name in modules}
    for name, value in _named_state(model):
        if id(value) in moved:
            continue
        *path, last = name.split(".")
        home, place = made, ""
        for part in path:
            place = f"{place}.{part}".lstrip(".")
            if part not in home._modules:
                module = modules[place]
                if id(module) not in there:  # else it has another name, too
                    whole = not any(id(parameter) in moved for parameter in module.parameters())
                    there[id(module)] = module if whole else nn.Module()
                home._modules[part] = there[id(module)]
            home = home.get_submodule(part)
        if getattr(home, last, None) is None:
            setattr(home, last, value if isinstance(value, nn.Parameter) else nn.Buffer(value))
    keep_kinds(made, buffers_of(model))


def _named_state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _module_for(node: fx.Node, model: nn.Module, reads: Counter[str]) -> _ConvNd | None:
    """The module that computes what a call computes, with the same parameters; ``None`` where there can be none."""
    weight, bias = (_parameter(_argument(node, name), model, reads) for name in ("weight", "bias"))
    options = {name: _argument(node, name) for name in _ARGUMENTS[3:]}
    kind = _CONVOLUTIONS[node.target]
    if weight is None or (bias is None) != (_argument(node, "bias") is None):
        return None
    tensors = [_argument(node, name) for name in ("input", "weight", "bias")]
    if any(read not in tensors for read in node.all_input_nodes):  # an option that is computed
        return None
    options = {name: value for name, value in options.items() if value is not None}
    groups = options.get("groups", 1)
    first, second = weight.shape[0], weight.shape[1] * groups
    if issubclass(kind, _ConvTransposeNd):
        channels = (first, second)
        if (extra := _argument(node, "output_padding")) is not None:
            options["output_padding"] = extra
    else:
        channels = (second, first)
    # On meta: its own parameters are never made.
    conv: _ConvNd = kind(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    conv.weight, conv.bias = weight, bias
    conv.training = model.training
    return conv


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a functional convolution, ``None`` if it is not given."""
    names = _TRANSPOSED_ARGUMENTS if issubclass(_CONVOLUTIONS[node.target], _ConvTransposeNd) else _ARGUMENTS
    given = dict(zip(names, node.args))
    return given.get(name, node.kwargs.get(name))


def _parameter(argument: Any, model: nn.Module, reads: Counter[str]) -> nn.Parameter | None:
    """The parameter that an argument is, if the graph reads it there and nowhere else."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    if reads[str(argument.target)] != 1 or len(argument.users) != 1:
        return None
    value = attribute(argument, model)
    return value if isinstance(value, nn.Parameter) else None


def _name_for(node: fx.Node, taken: Collection[str], model: nn.Module) -> str:
    """Where to put the module: in its owner's place, if that holds nothing else, so that keys of the state stay."""
    weight, bias = (_argument(node, name) for name in ("weight", "bias"))
    owner, _, last = str(weight.target).rpartition(".")
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]
    names = {*taken, *(name for name, _ in _named_state(model))}
    inside = {name for name in names if name == owner or name.startswith(f"{owner}.")}
    mine = {str(argument.target) for argument in (weight, bias) if argument is not None}
    plain = last == "weight" and (bias is None or str(bias.target) == f"{owner}.bias")
    if owner and plain and inside == mine:
        return owner
    name = f"{weight.target}_conv"
    while name in names or name in modules:
        name += "_"
    return name
