"""Convolutions that a model calls as functions with a stored weight, made modules so that they can be replaced.

``F.conv2d(x, self.weight)`` has no module whose place a Ghost unit could take, so here the graph
itself changes and a ``torch.fx.GraphModule`` takes the model's place.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

from ghostify.errors import TraceError, first_line
from ghostify.tracing.liftable import check_graph, check_modules, check_names
from ghostify.tracing.lifted import LiftedModel, Retracer, buffers_of, keep_kinds, kinds_kept, named_state
from ghostify.tracing.sites import CONVOLUTIONS
from ghostify.tracing.symbolic import attribute, is_constant, trace_graph

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
    """While it is open, notes convolutions that are called as functions with a weight as an argument.

    Not those inside a convolution module, while which is called ``inside`` counts, nor depthwise ones, which are cheap
    already.

    Attributes:
        owners: Which modules hold the weights.
        computed: Calls whose weight no module holds; filters of a single channel, such as a blur's, are left out.
        inside: Of how many convolution modules the call goes on.
    """

    def __init__(self, model: nn.Module, holders: dict[int, list[str]]) -> None:
        super().__init__()
        self.owners: set[str] = set()
        self.computed, self.inside = 0, 0
        self._holders = holders
        self._fixed = {id(buffer) for buffer in model.buffers()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            groups = args[6] if len(args) > 6 else (kwargs or {}).get("groups", 1)
            thin = isinstance(weight, Tensor) and weight.shape[1] == 1  # every filter sees a single channel
            if id(weight) in self._holders and not (thin and groups > 1):
                self.owners.update(self._holders[id(weight)])
            elif not (self.inside or thin or id(weight) in self._fixed):
                self.computed += 1
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
    modules = dict(model.named_modules())
    entered = sorted(name for name in owners if _can_be_entered(modules.get(name)))
    try:
        return _entering(model, graph, arguments, entered)
    except TraceError:
        if not entered:
            raise
    check_graph(model, graph, arguments, ())  # what parts outside of them does so whatever is entered
    reasons: dict[str, list[str]] = defaultdict(list)
    passing = _passing(model, graph, arguments, entered, reasons)
    left = "; ".join(
        reason if len(names) == len(entered) > 1 else f"{', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    )
    found = _entering(model, graph, arguments, passing)
    if found is None:
        raise TraceError(left)
    return replace(found, left=left)


def _passing(
    model: nn.Module, graph: fx.Graph, arguments: Collection[str], names: list[str], reasons: dict[str, list[str]]
) -> list[str]:
    """Those of some modules that can be entered; the others are added to their reasons."""
    try:
        _entering(model, graph, arguments, names)
    except TraceError as error:
        if len(names) == 1:
            reasons[str(error)] += names
            return []
        halves = names[: len(names) // 2], names[len(names) // 2 :]
        return [name for half in halves for name in _passing(model, graph, arguments, half, reasons)]
    return names


def _entering(model: nn.Module, graph: fx.Graph, arguments: Collection[str], entered: Collection[str]) -> Lifted | None:
    """The same with a graph that goes into some modules."""
    if not entered:
        return _lifted(model, graph, arguments, entered)
    try:
        inside = trace_graph(model, arguments, entered=entered)
    except Exception as error:  # whatever FX or the model's own code raises
        raise TraceError(f"FX cannot trace what is inside ({first_line(error)})") from error
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
        if node.op == "call_function" and node.target in CONVOLUTIONS:
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
    check_graph(model, graph, arguments, entered)
    check_names(model, reads)
    _make_plain(lifted)
    named = {str(node.target): node for node in lifted.nodes if node.op in ("call_module", "get_attr")}
    root = {target: attribute(named[target], model) for target in sorted(named.keys() - made.keys())}
    try:
        with kinds_kept(model):
            whole = LiftedModel({**root, **made}, lifted, type(model).__name__)
    except Exception as error:  # whatever torch makes of names and values that it does not foresee
        raise TraceError(f"torch cannot make a module of its graph ({first_line(error)})") from error
    _hold_all(whole, model, {id(parameter) for conv in made.values() for parameter in conv.parameters()})
    known = set(model.modules())
    for module in whole.modules():
        if module not in known:  # what is shared with the model keeps its mode
            module.training = model.training
    check_modules(model, taken, set(whole.modules()))
    return Lifted(whole, tuple(made))


def _make_plain(graph: fx.Graph) -> None:
    """Let a graph be what can be written as code of its own, and make anew in every run what the forward makes."""
    for node in graph.nodes:
        node.type = None  # an annotation may be a name that this code does not know
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    last = max((place for place, node in enumerate(inputs) if node.all_input_nodes), default=-1)
    for node in inputs[: last + 1]:  # a tensor as a default, and those before it: the example gives these arguments
        node.args = ()
    for node in list(filter(is_constant, graph.nodes)):
        with graph.inserting_after(node):
            fresh = graph.call_method("clone", (node,))  # it may be changed there
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user, fresh=fresh: user is not fresh)


def _can_be_entered(module: nn.Module | None) -> bool:
    return module is not None and not isinstance(module, _ConvNd) and next(module.children(), None) is None


def _hold_all(made: nn.Module, model: nn.Module, moved: Collection[int]) -> None:
    """Give a graph what of the model's state it does not read, under the same names.

    Args:
        made: The graph; it gets the model's own modules and tensors.
        model: The model.
        moved: The ids of parameters that have other names in the graph.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    there = {id(modules[name]): module for name, module in made.named_modules() if name in modules}
    for name, value in named_state(model):
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


def _module_for(node: fx.Node, model: nn.Module, reads: Counter[str]) -> _ConvNd | None:
    """The module that computes what a call computes, with the same parameters; ``None`` where there can be none."""
    weight, bias = (_parameter(_argument(node, name), model, reads) for name in ("weight", "bias"))
    if weight is None or (bias is None) != (_argument(node, "bias") is None):
        return None
    tensors = [_argument(node, name) for name in ("input", "weight", "bias")]
    if any(read not in tensors for read in node.all_input_nodes):  # an option that is computed
        return None
    kind = CONVOLUTIONS[node.target]
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    options = {name: value for name in names if (value := _argument(node, name)) is not None}
    channels = (weight.shape[1] * options.get("groups", 1), weight.shape[0])
    if issubclass(kind, _ConvTransposeNd):
        channels = channels[::-1]
    # On meta: its own parameters are never made.
    conv: _ConvNd = kind(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **options)
    conv.weight, conv.bias = weight, bias
    conv.training = model.training
    return conv


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a functional convolution, ``None`` if it is not given."""
    names = _TRANSPOSED_ARGUMENTS if issubclass(CONVOLUTIONS[node.target], _ConvTransposeNd) else _ARGUMENTS
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
    names = {*taken, *(name for name, _ in named_state(model))}
    inside = {name for name in names if name == owner or name.startswith(f"{owner}.")}
    mine = {str(argument.target) for argument in (weight, bias) if argument is not None}
    plain = last == "weight" and (bias is None or str(bias.target) == f"{owner}.bias")
    if owner and plain and inside == mine:
        return owner
    name = f"{weight.target}_conv"
    while name in names or name in modules:
        name += "_"
    return name
