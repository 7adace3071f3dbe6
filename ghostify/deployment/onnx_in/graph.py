"""One operator of an ONNX file, and the torch.fx graph that is built from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

Array = NDArray[Any]
# Side lengths that are partly known only when the model runs: what the operator Shape gives.
Sizes = list["int | fx.Node"]
# A value of the file: known now, a list of sizes, or computed when the model runs. None: an input that is left out.
Value = Array | Sizes | fx.Node | None

_WITH_WEIGHTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Names that a GraphModule needs itself.
_RESERVED = {*dir(fx.GraphModule), *vars(nn.Module()), "meta"}


class Unreadable(Exception):  # noqa: N818 - not an error of the user's: the reader tells it with the file's name
    """An operator, or a form of it, that no plain CNN needs."""


@dataclass(frozen=True)
class Op:
    """One node of the file.

    Attributes:
        kind: The operator, as in ``Conv``.
        name: A name for the module that is made of it.
        inputs: Its inputs; those left out at the end are missing.
        attributes: Its attributes as plain Python values and arrays.
        outputs: How many outputs are asked for.
        opset: Version of the operator set that the file is written for.
        rank: Dimensions of the first input; ``None`` where shape inference does not tell.
        shape: Its sides, ``None`` where they are dynamic.
    """

    kind: str
    name: str
    inputs: Sequence[Value]
    attributes: dict[str, Any]
    outputs: int
    opset: int
    shape: tuple[int | None, ...] | None

    @property
    def rank(self) -> int | None:
        """Dimensions of the first input, where they are known."""
        return None if self.shape is None else len(self.shape)

    def input(self, place: int) -> Value:
        """An input, ``None`` if it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    @property
    def x(self) -> fx.Node:
        """The first input, which is computed when the model runs."""
        return self.tensor(0)

    def tensor(self, place: int) -> fx.Node:
        """An input that is computed when the model runs."""
        value = self.input(place)
        if not isinstance(value, fx.Node):
            what = "a size that is known only when the model runs" if isinstance(value, list) else "a constant"
            raise Unreadable(f"input {place} is {what}")
        return value

    def array(self, place: int) -> Array | None:
        """An input that must be a constant of the file; ``None`` if it is left out."""
        value = self.input(place)
        if isinstance(value, np.ndarray) or value is None:
            return value
        raise Unreadable(f"input {place} is computed when the model runs, and must be a constant")

    def needed(self, place: int) -> torch.Tensor:
        """A constant input as a tensor of its own."""
        value = self.array(place)
        if value is None:
            raise Unreadable(f"input {place} is missing")
        return tensor_of(value)

    def numbers(self, place: int, attribute: str) -> list[int] | None:
        """Whole numbers that newer versions take as an input, and older ones as an attribute."""
        value = self.array(place) if self.input(place) is not None else self.attributes.get(attribute)
        return None if value is None else [int(number) for number in np.asarray(value).reshape(-1)]


def tensor_of(array: Array) -> torch.Tensor:
    """A tensor with memory of its own."""
    return torch.from_numpy(np.array(array))


@dataclass
class Builder:
    """A torch.fx graph that grows operator by operator.

    Attributes:
        graph: The graph.
        parts: Modules and buffers by the names that the graph calls them.
        shared: The names of layers by their options and weights, which other nodes may read, too.
        constants: Arrays by their identity, with the names of the buffers that hold them.
    """

    graph: fx.Graph = field(default_factory=fx.Graph)
    parts: dict[str, Any] = field(default_factory=dict)
    shared: dict[tuple[Any, ...], str] = field(default_factory=dict)
    constants: dict[int, tuple[Array, str]] = field(default_factory=dict)

    def module(self, op: Op, module: nn.Module, *inputs: fx.Node) -> fx.Node:
        """Call a module of its own; of convolutions and linear layers the same one where the weights are the same."""
        weights = [id(value) for value in op.inputs if isinstance(value, np.ndarray)]
        key = (op.kind, *weights, repr(module), repr(op.attributes))
        # Not of norms: those of a network that was never trained may all read the same ones and zeros.
        name = self.shared.get(key) if op.kind in _WITH_WEIGHTS else None
        if name is None:
            name = self.shared[key] = self._add(op.name, module)
        return self.graph.call_module(name, inputs or (op.x,))

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Call a function."""
        return self.graph.call_function(function, args, kwargs)

    def operand(self, op: Op, place: int) -> Any:
        """An input of arithmetic: a node, a plain number for a constant of one element, or a buffer."""
        value = op.input(place)
        if isinstance(value, np.ndarray):
            if value.size == 1 and value.ndim <= (op.rank or 0):
                return value.item()
            if id(value) not in self.constants:  # what many operators read is there once
                self.constants[id(value)] = value, self._add(f"{op.name}_constant", tensor_of(value))
            return self.graph.get_attr(self.constants[id(value)][1])
        return op.tensor(place)

    def constant(self, op: Op, value: torch.Tensor) -> fx.Node:
        """Read a buffer."""
        return self.graph.get_attr(self._add(f"{op.name}_constant", value))

    def finished(self, outputs: Sequence[fx.Node]) -> fx.GraphModule:
        """The model; several outputs come as a tuple."""
        self.graph.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        self.graph.lint()
        used = {str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        return fx.GraphModule({name: part for name, part in self.parts.items() if name in used}, self.graph).eval()

    def _add(self, name: str, part: Any) -> str:
        # torch.fx writes these names into Python code, so nothing of the file but letters and digits may reach it.
        own = ".".join(re.sub(r"\W", "_", piece, flags=re.ASCII) for piece in name.split(".") if piece) or "part"
        if own[0].isdigit():
            own = f"node_{own}"
        taken = any(own == other or own.startswith(f"{other}.") or other.startswith(f"{own}.") for other in self.parts)
        if taken or own.split(".", maxsplit=1)[0] in _RESERVED:
            own = f"{own.replace('.', '_')}_{len(self.parts)}"
        self.parts[own] = part
        return own
