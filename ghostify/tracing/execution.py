"""Running a graph node by node: whether it computes what its model computes, and what works in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_structure

from ghostify.errors import TraceError, first_line
from ghostify.tracing.example import Example, copier_memo, difference, same_shapes
from ghostify.tracing.graph import CHANGES_INPUT
from ghostify.tracing.running import COMPARED, full_precision, own_random_state, seed_torch, unmarked
from ghostify.tracing.symbolic import attribute


def run_graph(graph: fx.Graph, model: nn.Module, example: Example, outputs: Any) -> str:
    """Run a graph on the example, and note in every node's ``meta`` whether it changes what it reads.

    A graph can part from its model: tracing goes past hooks of the root, sees a stand-in where the
    model asks for a tensor, and knows no addition in place.

    Args:
        graph: From [trace_graph][ghostify.tracing.symbolic.trace_graph].
        model: Its model.
        example: The example inputs.
        outputs: What the model makes of them.

    Returns:
        Why the graph is not the model's; empty if it is.
    """
    values: dict[fx.Node, Any] = {}
    dying = last_uses(list(graph.nodes))
    example = example.to(model)
    buffers = list(model.buffers())
    with unmarked(model), torch.inference_mode(False), torch.no_grad():
        unchanged = list(_versions(buffers))
        seed_torch(COMPARED, model)  # as in a run of the model
        for node in graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            read = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
            before = list(_versions(read))
            if node.op == "output":
                if unchanged != list(_versions(buffers)):
                    return "it changes buffers, which several batches on their way through it cannot share"
                parted = difference(args[0], outputs) if same_shapes(args[0], outputs) else "other shapes"
                return f"its graph gives other outputs than the run ({parted})" if parted else ""
            try:
                values[node] = run_node(node, model, example, args, kwargs)
            except Exception as error:  # whatever the model's operations raise
                return f"its graph does not run: {first_line(error)}"
            node.meta[CHANGES_INPUT] = before != list(_versions(read))
            for dead in dying[node]:
                del values[dead]
    return ""


def parted_in_training(model: nn.Module, graph: nn.Module, example: Example) -> str:
    """How what a graph answers in training mode is not what its model does; empty if it is, or the model does not run.

    A graph was traced with a stand-in for the inputs, and a forward may ask what it was given.

    Raises:
        TraceError: One of them cannot be copied.
    """
    original, other = copied(model), copied(graph)
    try:
        wanted = _answer_in_training(original, example)
    except Exception:  # it may want labels, or more than one example
        return ""
    try:
        found = _answer_in_training(other, example)
    except Exception as error:  # whatever the model's operations raise
        return f"in training a graph does not run ({first_line(error)})"
    if parted := parted_answers(found, wanted):
        return f"in training {parted}"
    mine, theirs = dict(original.named_buffers()), dict(other.named_buffers())
    others = [name for name in mine.keys() & theirs.keys() if _parted(mine[name], theirs[name])]
    return f"in training a graph leaves something else in {', '.join(sorted(others))}" if others else ""


def _parted(one: Tensor, two: Tensor) -> bool:
    """Whether two buffers hold other numbers, by more than rounding."""
    if (one.dtype, one.shape, one.layout) != (two.dtype, two.shape, two.layout):
        return True
    if one.is_meta or one.layout is not torch.strided or torch.equal(one, two):
        return False
    if one.is_complex():
        one, two = torch.view_as_real(one), torch.view_as_real(two)
    return bool(difference(two, one))


def _answer_in_training(model: nn.Module, example: Example) -> Any:
    moved = example.to(model).copied()
    with own_random_state(model), full_precision(model), torch.inference_mode(False), torch.no_grad():
        seed_torch(COMPARED, model)
        for module in model.modules():
            module.training = True
        return model(*moved.args, **moved.kwargs)


def copied(model: nn.Module) -> nn.Module:
    """A copy, to do with it what must not be done with the model.

    Raises:
        TraceError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model, copier_memo(model))
    except Exception as error:  # whatever an attribute raises that knows no copies, such as a lock
        raise TraceError(f"{type(model).__name__} cannot be copied ({first_line(error)})") from error


def parted_answers(outputs: Any, originals: Any) -> str:
    """How what a graph gives is not what its model does; empty if it is."""
    if tree_structure(outputs) != tree_structure(originals):
        return f"a graph gives {type(outputs).__name__} of another structure than {type(originals).__name__}"
    return "a graph gives other outputs" if difference(outputs, originals) else ""


def run_node(node: fx.Node, model: nn.Module, example: Example, args: Any, kwargs: Any) -> Any:
    """The value of one node that is no output."""
    if node.op == "placeholder":
        return _placeholder(node, example.copied())
    if node.op == "get_attr":
        return attribute(node, model)
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)  # op is call_function
    return node.target(*args, **kwargs)


def last_uses(nodes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the values that nobody reads after it."""
    dying: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        for argument in (node, *node.all_input_nodes):
            if argument not in seen:
                seen.add(argument)
                dying[node].append(argument)
    return dying


def _versions(tensors: Iterable[Tensor]) -> Iterable[int]:
    """How often each was changed; views of one tensor share the number."""
    return (0 if tensor.is_inference() else tensor._version for tensor in tensors)


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
