"""A model as an ONNX graph in memory, with a dynamic batch and, if asked, dynamic sides of its maps."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from ghostify.errors import ExportError
from ghostify.tracing.example import Example
from ghostify.tracing.running import evaluating, own_random_state

# Names of the dynamic sides of a map, by the number of its dimensions.
SIDES = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}
# A dot is in no name that the exporter invents, and no parameter is called by two numbers.
_PLACEHOLDER = "output.{}.of.{}"
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def onnx_program(
    plain: nn.Module, example: Example, *, opset: int | None = None, dynamic_size: bool = False, name: str
) -> Any:
    """Trace a model into an ``onnx.ModelProto``.

    A single input is named ``input``; several have the names of the forward's arguments. Outputs are named by
    [named_outputs][ghostify.backends.onnx_program.named_outputs], with ``output_`` before what is the name of an
    input. So a model and its Ghost network, and every later export of either, have the same names.

    Args:
        plain: In float32 on the CPU; left as it was.
        example: Its inputs: every tensor whose first dimension is the batch gets a dynamic one.
        opset: Version of the operator set; by default the exporter's.
        dynamic_size: Whether the sides of maps ``(n, c, …)`` among the inputs are dynamic, too.
        name: Of the model, for errors.

    Raises:
        ExportError: It cannot be traced.
    """
    # torch.export takes a dimension of 1 for a constant.
    batch = max(example.batch, 2)
    traced = with_batch(example, batch)
    dimensions = {side: torch.export.Dim(side) for side in ("batch", *SIDES[5], *SIDES[3])}

    def dynamic(leaf: Any) -> dict[int, Any] | None:
        if not has_batch(leaf, batch):
            return None
        sides = SIDES.get(leaf.dim(), ()) if dynamic_size else ()
        return {0: dimensions["batch"], **{2 + place: dimensions[side] for place, side in enumerate(sides)}}

    by_parameter = inspect.signature(plain.forward).bind(*traced.args, **traced.kwargs).arguments
    try:
        with evaluating(plain), torch.no_grad(), own_random_state(plain), _quiet():
            returned = plain(*traced.args, **traced.kwargs)
            _check_returned(returned, name)
            names = list(named_outputs(returned))
            program = torch.onnx.export(
                plain,
                # An empty dictionary at the end, or the exporter takes a last argument that is one for keywords.
                traced.args if traced.kwargs else (*traced.args, {}),
                kwargs=traced.kwargs,
                dynamo=True,
                dynamic_shapes=tree_map(dynamic, dict(by_parameter)),
                input_names=["input"] if len(traced.tensors()) == 1 else None,
                output_names=[_PLACEHOLDER.format(place, len(names)) for place in range(len(names))],
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except ExportError:
        raise
    except Exception as error:  # the exporter's errors have no common class that is public
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
        asked = "a dynamic batch and dynamic_size=True" if dynamic_size else "a dynamic batch"
        advice = " Or export it for one size, without dynamic_size." if dynamic_size else ""
        raise ExportError(
            f"{name} cannot be exported with {asked} (opset={opset or 'default'}): {type(cause).__name__}: {first} "
            f"Usually its forward depends on values or on one {'size' if dynamic_size else 'batch size'}; the cause "
            f"above says where.{advice}"
        ) from error
    proto = program.model_proto  # type: ignore[union-attr]  # None only from the exporter of old
    _name_outputs(proto.graph, names)
    _count_axes_from_the_front(proto.graph)
    return proto


def _check_returned(returned: Any, name: str) -> None:
    for place, leaf in tree_flatten_with_path(returned)[0]:
        if leaf is not None and not isinstance(leaf, Tensor):
            raise ExportError(
                f"{name} returns a value of type {type(leaf).__name__}, at {keystr(place) or 'the top'}: a file holds "
                "tensors alone. Wrap the model in one that returns its tensors, or None in the place of other values."
            )


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Give the outputs their names; a value inside that has one of them, as in ``mean``, gives way."""
    inputs = {entry.name for entry in graph.input}
    graphs = list(graphs_of(graph))
    taken = {name for part in graphs for node in part.node for name in node.output}
    taken |= {entry.name for part in graphs for entry in part.initializer} | inputs
    new: dict[str, str] = {}
    for place, name in enumerate(names):
        given = _free(f"output_{name}" if name in inputs else name, inputs | set(new.values()))
        new[_PLACEHOLDER.format(place, len(names))] = given
    outputs = set(new.values())
    for name in sorted(taken & outputs):
        new[name] = _free(f"{name}_inside", taken | outputs)
    for part in graphs:
        for entry in (*part.initializer, *part.value_info, *part.output):
            entry.name = new.get(entry.name, entry.name)
        for node in part.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            node.output[:] = [new.get(name, name) for name in node.output]


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def graphs_of(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes, which see its values."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from graphs_of(attribute.g)


def _count_axes_from_the_front(graph: Any) -> None:
    """Let every concatenation name its axis from the front: onnxruntime keeps its blocked layout only behind such."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type == "Concat" and node.output[0] in ranks:
            for attribute in node.attribute:
                if attribute.name == "axis" and attribute.i < 0:
                    attribute.i += ranks[node.output[0]]


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of an output by its place in it: ``output``, ``output_1``, or the keys of a dict."""
    leaves, _ = tree_flatten_with_path(outputs)
    root = [] if isinstance(outputs, Mapping) else ["output"]
    named: dict[str, Tensor] = {}
    for place, leaf in leaves:
        if isinstance(leaf, Tensor):
            # Keys such as "a-b" and "a_b" are two outputs.
            named[_free("_".join([*root, *re.findall(r"\w+", keystr(place))]), set(named))] = leaf
    return named


def with_batch(example: Example, batch: int, generator: torch.Generator | None = None) -> Example:
    """The example with another batch size: repeated, or (given a generator) with random floating-point values."""
    own = example.batch

    def resize(leaf: Any) -> Any:
        if not has_batch(leaf, own):
            return leaf
        if generator is not None and leaf.is_floating_point():
            return torch.randn((batch, *leaf.shape[1:]), generator=generator, dtype=leaf.dtype)
        return leaf[torch.arange(batch) % own]  # integers may be indices, so no random ones

    return Example(tree_map(resize, example.args), tree_map(resize, example.kwargs))


def with_size(example: Example, larger: Sequence[int], generator: torch.Generator) -> Example:
    """Random values in the place of every map of a batch, with sides larger by so many pixels, one for each side."""

    def resize(leaf: Any) -> Any:
        if not has_batch(leaf, example.batch) or leaf.dim() not in SIDES or not leaf.is_floating_point():
            return leaf
        sides = (side + more for side, more in zip(leaf.shape[2:], larger, strict=False))
        return torch.randn((*leaf.shape[:2], *sides), generator=generator, dtype=leaf.dtype)

    return Example(tree_map(resize, example.args), tree_map(resize, example.kwargs))


def has_batch(leaf: Any, batch: int) -> bool:
    """Whether an argument is a tensor whose first dimension is the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and progress notes from the user; its errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
