"""Convolutions that a model calls as functions with a stored weight, made modules so that they can be replaced.

``F.conv2d(x, self.weight)`` has no module whose place a Ghost unit could take, so here the graph
itself changes and a ``torch.fx.GraphModule`` takes the model's place.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ghostify.tracing.graph import attribute, is_constant, is_derived, trace_graph

_FUNCTIONS: dict[Any, type[_ConvNd]] = {
    F.conv1d: nn.Conv1d,
    F.conv2d: nn.Conv2d,
    F.conv3d: nn.Conv3d,
    F.conv_transpose1d: nn.ConvTranspose1d,
    F.conv_transpose2d: nn.ConvTranspose2d,
    F.conv_transpose3d: nn.ConvTranspose3d,
}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


class LiftedModel(fx.GraphModule):
    """A model as a graph whose functional convolutions are modules; its copies keep attributes that the graph lacks."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        made = super().__deepcopy__(memo)
        for name in vars(self).keys() - vars(made).keys():
            setattr(made, name, copy.deepcopy(vars(self)[name], memo))
        return made


def lift_functions(
    model: nn.Module, graph: fx.Graph, arguments: Collection[str]
) -> tuple[LiftedModel, tuple[str, ...]] | None:
    """Make a model in which functional convolutions with a stored weight are modules.

    Parameters are shared with the model, and keep their names in the state dict where the function's
    owner calls them ``weight`` and ``bias``.

    Args:
        model: The model; left untouched.
        graph: Its FX graph in evaluation mode; left untouched.
        arguments: What the example gives, as in [trace_graph][ghostify.tracing.graph.trace_graph].

    Returns:
        The new model and the names of its new convolutions; ``None`` if there is nothing to lift, or if a
        graph would not do in training what the model does, or not hold all that the model holds.
    """
    lifted = fx.Graph()
    lifted.output(lifted.graph_copy(graph, {}))
    taken = {str(node.target) for node in lifted.nodes if node.op == "call_module"}
    reads = Counter(str(node.target) for node in lifted.nodes if node.op == "get_attr")
    for called in taken:  # what is called reads its own parameters, too
        reads.update(f"{called}.{name}" for name, _ in model.get_submodule(called).named_parameters())
    made: dict[str, nn.Module] = {}
    for node in list(lifted.nodes):
        if node.op == "call_function" and node.target in _FUNCTIONS:
            conv = _module_for(node, model, reads)
            if conv is not None:
                name = _name_for(node, taken | made.keys(), reads)
                made[name] = conv
                with lifted.inserting_before(node):
                    call = lifted.call_module(name, (_argument(node, "input"),))
                read = [_argument(node, "weight"), _argument(node, "bias")]
                node.replace_all_uses_with(call)
                for dead in (node, *filter(None, read)):
                    lifted.erase_node(dead)
    if not made or any(map(is_derived, graph.nodes)) or not _same_in_training(model, graph, arguments):
        return None
    for node in list(filter(is_constant, lifted.nodes)):  # made anew in every run: it may be changed there
        with lifted.inserting_after(node):
            fresh = lifted.call_method("clone", (node,))
        node.replace_all_uses_with(fresh, delete_user_cb=lambda user, fresh=fresh: user is not fresh)
    named = {str(node.target): node for node in lifted.nodes if node.op in ("call_module", "get_attr")}
    root = {target: attribute(named[target], model) for target in sorted(named.keys() - made.keys())}
    whole = LiftedModel({**root, **made}, lifted, type(model).__name__)
    known = set(model.modules())
    for module in whole.modules():
        if module not in known:  # what is shared with the model keeps its mode
            module.training = model.training
    return whole, tuple(made)


def _same_in_training(model: nn.Module, graph: fx.Graph, arguments: Collection[str]) -> bool:
    """Whether the forward does the same in training: a graph holds the branches of one mode."""
    try:
        training = trace_graph(model, arguments, training=True)
    except Exception:  # whatever FX or the model's own code raises
        return False
    steps = ([(node.op, node.target, str((node.args, node.kwargs))) for node in one.nodes] for one in (graph, training))
    return next(steps) == next(steps)


def _module_for(node: fx.Node, model: nn.Module, reads: Counter[str]) -> _ConvNd | None:
    """The module that computes what a call computes, with the same parameters; ``None`` where there can be none."""
    weight, bias = (_parameter(_argument(node, name), model, reads) for name in ("weight", "bias"))
    options = {name: _argument(node, name) for name in _ARGUMENTS[3:]}
    kind = _FUNCTIONS[node.target]
    if weight is None or (bias is None) != (_argument(node, "bias") is None):
        return None
    if any(isinstance(value, fx.Node) for value in options.values()):
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
    names = _TRANSPOSED_ARGUMENTS if issubclass(_FUNCTIONS[node.target], _ConvTransposeNd) else _ARGUMENTS
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


def _name_for(node: fx.Node, taken: set[str], reads: Counter[str]) -> str:
    """Where to put the module: in its owner's place, if that holds nothing else, so that keys of the state stay."""
    weight, bias = (_argument(node, name) for name in ("weight", "bias"))
    owner, _, attribute = str(weight.target).rpartition(".")
    inside = [name for name in {*taken, *reads} if name == owner or name.startswith(f"{owner}.")]
    mine = [str(argument.target) for argument in (weight, bias) if argument is not None]
    plain = attribute == "weight" and (bias is None or str(bias.target) == f"{owner}.bias")
    return owner if owner and plain and sorted(inside) == sorted(mine) else f"{weight.target}_conv"
