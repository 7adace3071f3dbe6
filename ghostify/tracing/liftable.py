"""Whether a graph can stand in a model's place: what the forward does, and the model's own ways, must not be lost."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import torch
from torch import Tensor, fx, nn

from ghostify.errors import TraceError, first_line
from ghostify.tracing.execution import copied
from ghostify.tracing.lifted import named_state
from ghostify.tracing.sites import has_hooks
from ghostify.tracing.symbolic import same_steps, trace_all

_METHODS = (
    *("__call__", "train", "eval", "requires_grad_", "parameters", "named_parameters", "buffers", "named_buffers"),
    *("_apply", "to", "type", "cpu", "cuda", "float", "double", "half", "bfloat16", "state_dict", "load_state_dict"),
    *("get_extra_state", "set_extra_state", "_save_to_state_dict", "_load_from_state_dict"),
)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def check_graph(model: nn.Module, graph: fx.Graph, arguments: Collection[str], entered: Collection[str]) -> None:
    """See that the forward does the same in training, and with other values in the model's state.

    A graph holds the branches of one mode, and numbers that were computed while it was traced.

    Raises:
        TraceError: It does not.
    """
    other = copied(model)  # another kind of numbers would cut a parameter from what hangs on its gradient
    state = {id(value): value for _, value in named_state(other)}.values()
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


def check_modules(model: nn.Module, taken: Collection[str], held: Collection[nn.Module]) -> None:
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
        own = [
            method
            for method in _METHODS
            if method in vars(module) or getattr(type(module), method) is not getattr(nn.Module, method)
        ]
        # Those of torch that have some: two that cannot be called, and what was compiled.
        if own and not isinstance(module, nn.ParameterList | nn.ParameterDict | torch.jit.ScriptModule):
            raise TraceError(f"{who} has a {own[0]} of its own")


def check_names(model: nn.Module, read: Collection[str]) -> None:
    """See that no name, of the state or of what else is read, is one that torch's graphs have themselves.

    Raises:
        TraceError: One is.
    """
    graph = fx.GraphModule(nn.Module(), fx.Graph())
    for name in {*model._modules, *model._parameters, *model._buffers, *(target.partition(".")[0] for target in read)}:
        if hasattr(graph, name):
            raise TraceError(f"a graph has a {name!r} of its own")
