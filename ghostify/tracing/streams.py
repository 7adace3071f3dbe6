"""Which layers make, carry and read channels in one common order.

The channels between layers have an order only because some layer made them in it. Where all that
make, carry or read them are known, the order may be another one, if all of them follow: norms and
depthwise convolutions with their numbers, readers with their weights' columns. Such channels are a
*stream*. What is added to each other is one stream; what is concatenated stays several in a row.
Wherever an operation is not known to treat all channels alike, the order is fixed.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ghostify.tracing.alike import ALIKE, is_alike, is_alike_call, is_known
from ghostify.tracing.sites import has_hooks, is_batch_norm, parameter_owners
from ghostify.tracing.symbolic import HANDED_OUT, attribute

_TOGETHER = {"add", "sub", "mul", "truediv", "div", "iadd", "isub", "imul", "maximum", "minimum"}
_TOLD_OF = {"size", "dim"}


@dataclass(frozen=True)
class Streams:
    """The streams of a graph, each by a number; several in a row where channels were concatenated.

    Attributes:
        sizes: Channels of each.
        fixed: Those whose order may not change.
        made_by: By convolution or linear layer: the stream that it makes.
        carried_by: By norm, depthwise convolution or the like: the streams that pass through it.
        read_by: By convolution or linear layer: the streams that it reads. A linear layer behind a
            flattened map reads several numbers in a row of every channel.
    """

    sizes: dict[int, int] = field(default_factory=dict)
    fixed: frozenset[int] = frozenset()
    made_by: dict[str, int] = field(default_factory=dict)
    carried_by: dict[str, tuple[int, ...]] = field(default_factory=dict)
    read_by: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def makers(self, stream: int) -> list[str]:
        """The layers that make a stream."""
        return [name for name, made in self.made_by.items() if made == stream]


@dataclass(frozen=True)
class _Maps:
    """A value of the graph: streams in a row along dimension 1, its dimensions, and whether channels were flattened."""

    streams: tuple[int, ...]
    dims: int
    flat: bool = False


def find_streams(graph: fx.Graph, model: nn.Module) -> Streams:
    """Follow the channels of all layers through the graph of a model that takes batches.

    Args:
        graph: From [trace_graph][ghostify.tracing.symbolic.trace_graph].
        model: The model.
    """
    return _Search(graph, model).found()


class _Search:
    """One pass over the nodes in order; streams that turn out to be one are united."""

    def __init__(self, graph: fx.Graph, model: nn.Module) -> None:
        self.graph, self.model = graph, model
        self.owners = parameter_owners(model)
        self.held = Counter(id(buffer) for module in model.modules() for buffer in module.buffers(recurse=False))
        self.calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self.read_directly = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
        self.sizes: list[int] = []
        self.united: list[int] = []
        self.fixed: set[int] = set()
        self.made: dict[str, int] = {}
        self.carried: dict[str, tuple[int, ...]] = {}
        self.read: dict[str, tuple[int, ...]] = {}

    def found(self) -> Streams:
        values: dict[fx.Node, _Maps] = {}
        for node in self.graph.nodes:
            maps = self._module(node, values) if node.op == "call_module" else self._call(node, values)
            if maps is not None:
                values[node] = maps
                if HANDED_OUT in node.meta:
                    self._fix([maps])

        def rows(known: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
            return {name: tuple(map(self._root, streams)) for name, streams in known.items()}

        return Streams(
            sizes={stream: size for stream, size in enumerate(self.sizes) if self._root(stream) == stream},
            fixed=frozenset(map(self._root, self.fixed)),
            made_by={name: self._root(stream) for name, stream in self.made.items()},
            carried_by=rows(self.carried),
            read_by=rows(self.read),
        )

    def _root(self, stream: int) -> int:
        while self.united[stream] != stream:
            stream = self.united[stream]
        return stream

    def _new(self, size: int) -> int:
        self.sizes.append(size)
        self.united.append(len(self.united))
        return len(self.united) - 1

    def _width(self, maps: _Maps) -> int:
        return sum(self.sizes[stream] for stream in maps.streams)

    def _fix(self, maps: Iterable[_Maps]) -> None:
        self.fixed.update(self._root(stream) for value in maps for stream in value.streams)

    def _unite(self, one: int, other: int) -> None:
        self.united[self._root(other)] = self._root(one)

    def _module(self, node: fx.Node, values: dict[fx.Node, _Maps]) -> _Maps | None:
        name, inputs = str(node.target), [values[n] for n in node.all_input_nodes if n in values]
        module = self.model.get_submodule(name)
        plain = len(node.args) == 1 and not node.kwargs and not has_hooks(module) and is_known(module)
        maps = inputs[0] if plain and len(inputs) == 1 else None
        if plain and isinstance(module, _ConvNd | nn.Linear):
            return self._layer(name, module, maps)
        if maps is None:
            return self._unknown(inputs)
        if is_alike(module, maps.dims):
            return maps
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return _Maps(maps.streams, 2, flat=True)
        if is_batch_norm(module) or isinstance(module, nn.PReLU):
            return self._through(name, module, maps)
        return self._unknown(inputs)

    def _layer(self, name: str, module: _ConvNd | nn.Linear, maps: _Maps | None) -> _Maps | None:
        """A layer reads what comes, and makes a stream; a depthwise convolution carries it on."""
        if isinstance(module, _ConvNd):
            inputs, outputs, groups = module.in_channels, module.out_channels, module.groups
            dims = len(module.kernel_size) + 2
            if maps is not None and groups == inputs == outputs > 1:
                return self._through(name, module, maps)
        else:
            inputs, outputs, groups, dims = module.in_features, module.out_features, 1, 2
            if maps is None or maps.dims != dims:  # over the last of several dimensions, perhaps
                return self._unknown([maps] if maps is not None else [])
        ours = self._is_ours(name, module) and _has_one_weight(module, outputs)
        if maps is not None:
            width = self._width(maps)
            fits = inputs % width == 0 if maps.flat else inputs == width
            if ours and fits and groups == 1:
                self.read[name] = maps.streams
            else:
                self._fix([maps])
        stream = self._new(outputs)
        self.made[name] = stream
        if not ours:
            self.fixed.add(stream)
        return _Maps((stream,), dims)

    def _through(self, name: str, module: nn.Module, maps: _Maps) -> _Maps:
        """A module with numbers for every channel; they follow the channels."""
        width = self._width(maps)
        state = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.numel() > 1]
        if self._is_ours(name, module) and all(tensor.shape[0] == width for tensor in state):
            self.carried[name] = maps.streams
        else:
            self._fix([maps])
        return maps

    def _is_ours(self, name: str, module: nn.Module) -> bool:
        """Whether this one call alone uses the module's parameters and buffers."""
        shared = any(len(self.owners.get(id(parameter), ())) > 1 for parameter in module.parameters())
        shared = shared or any(self.held[id(buffer)] > 1 for buffer in module.buffers())
        return self.calls[name] == 1 and not shared and name not in self.read_directly and _is_simple(module)

    def _call(self, node: fx.Node, values: dict[fx.Node, _Maps]) -> _Maps | None:
        inputs = [values[argument] for argument in node.all_input_nodes if argument in values]
        if not inputs:
            return None
        name = getattr(node.target, "__name__", str(node.target)).rstrip("_")
        first = values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        alone = first is not None and len(node.all_input_nodes) == 1
        if node.target is getattr or name in _TOLD_OF:
            return None if _is_told_of(node, name) else self._unknown(inputs)
        if name in _TOGETHER:
            return self._together(node, inputs)
        if node.target in (torch.cat, torch.concat) and first is None:
            return self._in_a_row(node, values)
        if first is None:
            return self._unknown(inputs)
        if alone and is_alike_call(name, first.dims):
            return first
        if alone and _keeps_channels(node, first.dims):
            return first
        if _flattens(node, name):
            return _Maps(first.streams, 2, flat=True)
        if alone and name == "mean" and (dims := _averages(node, first.dims)):
            return _Maps(first.streams, dims)
        return self._unknown(inputs)

    def _together(self, node: fx.Node, inputs: list[_Maps]) -> _Maps | None:
        """Number by number: with a constant, or with channels in the same order."""
        tensors = [arg for arg in node.args if isinstance(arg, fx.Node) and not self._is_number(arg)]
        if len(node.args) != 2 or node.kwargs or len(tensors) != len(inputs):
            return self._unknown(inputs)
        if len(tensors) == 1:
            constant = all(isinstance(argument, int | float | fx.Node) for argument in node.args)
            return inputs[0] if constant else self._unknown(inputs)
        one, other = inputs
        if one.dims != other.dims or one.flat != other.flat:
            return self._unknown(inputs)
        if not one.flat and 1 in (self._width(one), self._width(other)):
            return other if self._width(one) == 1 else one
        sizes = [[self.sizes[stream] for stream in maps.streams] for maps in inputs]
        if sizes[0] != sizes[1]:
            return self._unknown(inputs)
        for mine, theirs in zip(one.streams, other.streams, strict=True):
            self._unite(mine, theirs)
        return one

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a node reads one number of the model's."""
        if node.op != "get_attr":
            return False
        value = attribute(node, self.model)
        return isinstance(value, torch.Tensor) and value.numel() == 1

    def _in_a_row(self, node: fx.Node, values: dict[fx.Node, _Maps]) -> _Maps | None:
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        known = [values.get(part) for part in parts] if isinstance(parts, list | tuple) else [None]
        whole = [maps for maps in known if maps is not None]
        alike = len(whole) == len(known) and len({maps.dims for maps in whole}) == 1
        if alike and dim in (1, 1 - whole[0].dims):
            return _Maps(tuple(stream for maps in whole for stream in maps.streams), whole[0].dims)
        return self._unknown(whole)

    def _unknown(self, inputs: list[_Maps]) -> _Maps | None:
        """From here on nothing is known, so what comes in keeps its order."""
        self._fix(inputs)
        return None


def _is_simple(module: nn.Module) -> bool:
    """Whether all that it holds is its own, but for an activation, as in timm's batch norms."""
    return all(isinstance(child, ALIKE) for child in module.modules() if child is not module)


def _has_one_weight(module: nn.Module, outputs: int) -> bool:
    """Whether all its numbers but the weight belong to one output channel each, or to none."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    transposed = isinstance(module, _ConvTransposeNd)
    return all(
        name == "weight" or tensor.numel() == 1 or (tensor.numel() == outputs == tensor.shape[0] and not transposed)
        for name, tensor in tensors
        if not (transposed and name == "bias")
    )


def _is_told_of(node: fx.Node, name: str) -> bool:
    """Whether a node only asks a map for its shape, not for its numbers."""
    return name in _TOLD_OF or (len(node.args) > 1 and node.args[1] in ("shape", "dtype", "device", "ndim"))


def _flattens(node: fx.Node, name: str) -> bool:
    """Whether a map becomes one row for every example, channel after channel."""
    arguments: tuple[Any, ...] = node.args[1:]
    if name == "flatten":
        start = arguments[0] if arguments else node.kwargs.get("start_dim", 0)
        return bool(start == 1) and len(arguments) < 2 and "end_dim" not in node.kwargs
    if name in ("view", "reshape") and not node.kwargs:
        shape = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list | tuple) else arguments
        return len(shape) == 2 and shape[1] == -1 and _is_batch(shape[0])
    return False


def _is_batch(size: Any) -> bool:
    """Whether it is the number of examples, as ``x.size(0)`` or ``x.shape[0]`` tells it."""
    return isinstance(size, fx.Node) and size.target in ("size", operator.getitem) and size.args[1:] == (0,)


def _averages(node: fx.Node, dims: int) -> int:
    """Dimensions that are left if a node averages over all places of a map, else 0."""
    over = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if not isinstance(over, list | tuple):
        return 0
    if sorted(dim % dims for dim in over if isinstance(dim, int)) != list(range(2, dims)):
        return 0
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return dims if keep is True else 2 if keep is False else 0


def _keeps_channels(node: fx.Node, dims: int) -> bool:
    """Whether a node cuts out or adds places of a map, and leaves its channels as they are."""
    if node.target is operator.getitem:
        index = node.args[1]
        every = slice(None)
        return (
            isinstance(index, tuple)
            and len(index) == dims
            and index[:2] == (every, every)
            and all(isinstance(part, slice) for part in index)
        )
    if node.target is F.pad:
        pads = node.args[1] if len(node.args) > 1 else node.kwargs.get("pad")
        return isinstance(pads, list | tuple) and len(pads) <= 2 * (dims - 2)
    return False
