"""Running a model on example inputs without leaving a mark on it."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from ghostify.errors import InputsError, TraceError, first_line
from ghostify.tracing.running import COMPARED, seed_torch, unmarked

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a model.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(inputs: ExampleInputs | Example | None) -> Example:
        """Normalise what a caller gives.

        Args:
            inputs: A tensor ``(n, c, h, w)``; a tuple or list of positional arguments; or a dict
                of keyword arguments.

        Raises:
            InputsError: Nothing was given, or it holds no tensor.
        """
        if isinstance(inputs, Example):
            return inputs
        if inputs is None:
            raise InputsError(
                "example_inputs=None: shapes decide what a Ghost unit costs, so one batch is needed. "
                "Pass, for example, example_inputs=torch.randn(1, 3, 224, 224)."
            )
        if isinstance(inputs, Tensor):
            example = Example((inputs,))
        elif isinstance(inputs, Mapping):
            example = Example((), dict(inputs))
        elif isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes):
            example = Example(tuple(inputs))
        else:
            raise InputsError(
                f"example_inputs has type {type(inputs).__name__}; it must be a tensor, a tuple of positional "
                "arguments, or a dict of keyword arguments."
            )
        if not example.tensors():
            raise InputsError("example_inputs holds no tensor. Pass a batch such as torch.randn(1, 3, 224, 224).")
        if any(tensor.numel() == 0 for tensor in example.tensors()):
            raise InputsError("example_inputs holds an empty tensor. Pass a batch of at least one example.")
        return example

    def tensors(self) -> list[Tensor]:
        """All tensors in it, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    @property
    def batch(self) -> int:
        """Examples in the batch: the first dimension of the first tensor, or the number of images in a list.

        A first argument that is a list of tensors ``(c, h, w)`` is what detection models take: one
        image each, of its own size.
        """
        if (images := self._images()) is not None:
            return len(images)
        first = self.tensors()[0]
        return first.shape[0] if first.dim() > 0 else 1

    def _images(self) -> list[Tensor] | None:
        first = next(iter((*self.args, *self.kwargs.values())))
        if isinstance(first, list | tuple) and all(isinstance(image, Tensor) and image.dim() == 3 for image in first):
            return list(first)
        return None

    def is_single(self, dims: int) -> bool:
        """Whether it is one example without a batch, its first tensor being a map of ``dims`` sides."""
        return self._images() is None and self.tensors()[0].dim() == dims + 1

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all tensors, with the batch dimension."""
        return tuple(tuple(tensor.shape) for tensor in self.tensors())

    def names(self, model: nn.Module) -> tuple[str, ...]:
        """The names of the arguments of the model's forward that are given."""
        return tuple(inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments)

    def to(self, model: nn.Module) -> Example:
        """The same on the model's device, floating-point tensors in the model's dtype."""
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        if parameter is None:
            return self

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(parameter.device, parameter.dtype if leaf.is_floating_point() else None)

        args, kwargs = tree_map(move, (self.args, self.kwargs))
        return Example(args, kwargs)

    @property
    def separable(self) -> bool:
        """Whether every tensor has one row for each example, so that `part` can take the batch apart."""
        return self._images() is None and all(tensor.dim() and len(tensor) == self.batch for tensor in self.tensors())

    def part(self, start: int, stop: int) -> Example:
        """Some examples of a batch whose tensors all have one row for each example."""
        args, kwargs = tree_map(
            lambda leaf: leaf[start:stop] if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Example(args, kwargs)

    def copied(self) -> Example:
        """The same in tensors of its own, for a model that changes its inputs in place."""
        args, kwargs = tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Example(args, kwargs)

    def run(self, model: nn.Module) -> Any:
        """Call the model in evaluation mode without gradients; it, the inputs and the global RNG stay as they were.

        Raises:
            TraceError: The model's forward raised.
        """
        moved = self.to(model).copied()
        with unmarked(model), torch.no_grad():
            seed_torch(COMPARED, model)  # a model that draws random numbers draws the same ones in every run
            try:
                # A GraphModule's own call prints a traceback beside the error that it raises.
                call = nn.Module.__call__ if isinstance(model, fx.GraphModule) else type(model).__call__
                return call(model, *moved.args, **moved.kwargs)
            except Exception as error:
                shapes = ", ".join(str(shape) for shape in self.shapes)
                raise TraceError(
                    f"{type(model).__name__} does not run on example_inputs of shape {shapes}: "
                    f"{first_line(error).rstrip('.')}. "
                    "Pass inputs that the model accepts in evaluation mode."
                ) from error


def require_module(value: object, name: str) -> None:
    """Raise an InputsError for an argument that is no network, before anything else is made of it.

    Args:
        value: What was passed.
        name: The argument's name.
    """
    if not isinstance(value, nn.Module):
        raise InputsError(f"{name}={reprlib.repr(value)} is no torch.nn.Module. Pass a network, such as resnet18().")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what torch wraps around it: ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``.

    Raises:
        InputsError: It is no module at all.

    Example:
        >>> type(unwrapped(nn.DataParallel(nn.Conv2d(3, 8, 3)))).__name__
        'Conv2d'
    """
    require_module(model, "model")
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":  # its home, torch._dynamo, is slow to import
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def leaves_in(value: Any) -> list[Any]:
    """All that is in containers of any depth, in order; also in dataclasses."""
    found: list[Any] = []
    seen: set[int] = set()  # one may hold itself
    stack = tree_leaves(value)[::-1]
    while stack:
        leaf = stack.pop()
        if is_dataclass(leaf) and not isinstance(leaf, type):
            if id(leaf) not in seen:
                seen.add(id(leaf))
                members = [getattr(leaf, member.name, None) for member in fields(leaf)]
                stack += tree_leaves(members)[::-1]
        else:
            found.append(leaf)
    return found


def tensors_in(outputs: Any) -> list[Tensor]:
    """All tensors in what a model returned, in order; also those in dataclasses.

    Example:
        >>> @dataclass
        ... class Output:
        ...     logits: Tensor
        >>> [tensor.shape for tensor in tensors_in({"first": Output(torch.zeros(1, 10))})]
        [torch.Size([1, 10])]
    """
    return [leaf for leaf in leaves_in(outputs) if isinstance(leaf, Tensor)]


def shapes_of(outputs: Any) -> list[tuple[int, ...]]:
    """Shapes of all tensors in what a model returned, in order."""
    return [tuple(tensor.shape) for tensor in tensors_in(outputs)]


def same_shapes(outputs: Any, originals: Any) -> bool:
    """Whether two runs gave tensors of the same shapes.

    In a list or dict of outputs the first dimension is free: how many objects a detector finds
    depends on values.

    Example:
        >>> same_shapes([{"boxes": torch.zeros(3, 4)}], [{"boxes": torch.zeros(0, 4)}])
        True
        >>> same_shapes(torch.zeros(3, 4), torch.zeros(0, 4))
        False
    """
    runs = shapes_of(outputs), shapes_of(originals)
    start = 0 if isinstance(originals, Tensor) else 1
    return len(runs[0]) == len(runs[1]) and all(
        len(a) == len(b) and a[start:] == b[start:] for a, b in zip(*runs, strict=True)
    )


def difference(outputs: Any, originals: Any) -> float:
    """The largest difference of two runs' tensors that are not close to each other; 0 if all are.

    Infinite where there are more tensors in one than in the other. Tensors on meta have no values that could differ.
    """
    pairs = [tensors_in(run) for run in (outputs, originals)]
    if len(pairs[0]) != len(pairs[1]) or any(a.shape != b.shape for a, b in zip(*pairs)):
        return math.inf
    return max(
        (
            float((a.double() - b.double()).abs().nan_to_num(math.inf).max())
            for a, b in zip(*pairs)
            if not a.is_meta and not torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        ),
        default=0.0,
    )


def on_meta(model: nn.Module) -> bool:
    """Whether a model has shapes but no values."""
    return any(parameter.is_meta for parameter in model.parameters())


def copier_memo(model: nn.Module) -> dict[int, object]:
    """A memo for ``copy.deepcopy`` of a model that keeps tensors with a history, which torch refuses to copy.

    Such are the last features that a model keeps as an attribute, and the weight that the old
    ``torch.nn.utils.weight_norm`` computes. The copy gets their values, without the history.
    """
    leaves = (leaf for module in model.modules() for leaf in tree_leaves(vars(module)) if isinstance(leaf, Tensor))
    return {id(tensor): tensor.detach().clone() for tensor in leaves if not tensor.is_leaf}
