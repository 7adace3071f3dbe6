"""From an ONNX file to a torch.fx graph of torch's own layers, which is then run beside the file."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ghostify.deployment.onnx_in.functions import FUNCTIONS
from ghostify.deployment.onnx_in.graph import Array, Builder, Op, Unreadable, Value
from ghostify.deployment.onnx_in.layers import LAYERS
from ghostify.deployment.onnx_notes import opset_of, read_onnx
from ghostify.deployment.parity import BatchCheck, compare_batch, open_session
from ghostify.errors import ArtefactError, ExportError
from ghostify.extras import require
from ghostify.tracing.example import Example

OPERATORS = {**LAYERS, **FUNCTIONS}
# Of the largest output.
_TOLERANCE = 1e-3
# Tried in turn for a side that the file leaves open.
_OPEN_SIDES = (64, 224, 32)
# Operators that are carried out at once on constants.
_FOLDED = {
    "ConstantOfShape", "Add", "Cast", "Concat", "Div", "Floor", "Gather", "Mul", "Reshape", "Shape", "Slice", "Squeeze",
    "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
_BROADCAST = {"Add", "Div", "Mul", "Sub"}
# Numbers that they may make in all, beside so many times as many as the file's weights have.
_CONSTANTS, _TIMES_WEIGHTS = 2**20, 4
# The longest list of sizes that shape inference is to carry on: each of them takes some fifty bytes at each operator.
_LONGEST_SIZES = 2**10
_INTEGERS, _STRING = (6, 7), 8  # onnx.TensorProto.INT32, INT64 and STRING
_LARGEST_INPUT = 2**28
_FLOAT = 1  # onnx.TensorProto.FLOAT


def read_model(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read a plain CNN, and see that torch computes what the file computes in onnxruntime.

    The operators of convolutional networks are read (convolutions, norms, pools, linear layers, activations,
    arithmetic, reshaping), of any operator set, in float32, with weights that are constants of the file or of files
    beside it. Layers are named after their weights where the file names these as torch does. Nothing of the file is
    run as code.

    Args:
        path: The ONNX file.

    Returns:
        The model in evaluation mode; ``meta["input_shapes"]`` holds the shapes of its inputs, ``None`` for open sides.

    Raises:
        ArtefactError: The file is missing, damaged, or holds what is not read; or torch computes something else.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    runtime = require("onnxruntime", extra="onnx")
    proto = read_onnx(path, external_data=True)
    try:
        with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
            model = _built(proto)
        _check_parity(runtime, Path(path), model)
    except Unreadable as reason:
        raise ArtefactError(
            f"path={str(path)!r} cannot be read as a plain CNN: {reason}. Build the model in torch, and load its "
            "weights there."
        ) from reason
    return model


def _built(proto: Any) -> fx.GraphModule:
    """The graph, not yet compared with anything."""
    onnx = require("onnx", extra="onnx")
    for number, node in enumerate(proto.graph.node):
        if _kind(node) not in OPERATORS.keys() | _FOLDED:
            raise Unreadable(f"{_where(node, number)} is none of the {len(OPERATORS)} that are read")
    if proto.functions:
        raise Unreadable("it has functions of its own")
    build = Builder()
    values: dict[str, Value] = {tensor.name: _array(tensor) for tensor in proto.graph.initializer}
    stored = [*proto.graph.initializer, *(entry.t for node in proto.graph.node for entry in node.attribute)]
    room = _CONSTANTS + _TIMES_WEIGHTS * sum(math.prod(tensor.dims) for tensor in stored if tensor.dims)
    inputs = [entry for entry in proto.graph.input if entry.name not in values]
    shapes = _known_shapes(onnx, proto)
    for number, entry in enumerate(inputs):
        if entry.type.tensor_type.elem_type != _FLOAT:
            raise Unreadable(f"input {entry.name!r} is not of float32")
        name = entry.name if re.fullmatch(r"[a-z][a-z0-9_]*", entry.name) else f"input_{number}"
        values[entry.name] = build.graph.placeholder(name)
    for number, node in enumerate(proto.graph.node):
        kind, where = _kind(node), _where(node, number)
        missing = next((name for name in node.input if name and name not in values), None)
        if missing is not None:
            raise Unreadable(f"{where} reads {missing!r}, which nothing makes before it")
        if kind in _FOLDED and all(isinstance(values.get(name), np.ndarray) for name in node.input if name):
            given = {name: np.asarray(values[name]) for name in node.input if name}
            values[node.output[0]], room = _folded(onnx, proto, node, given, where, room)
            continue
        if kind == "Split" and not all(node.output):
            raise Unreadable(f"{where} leaves out an output, on which onnxruntime crashes")
        if kind not in OPERATORS:
            raise Unreadable(f"{where} is read of constants alone")
        op = Op(
            kind=kind,
            name=_name(node, number, values),
            inputs=[values[name] if name else None for name in node.input],
            attributes={entry.name: _attribute(onnx, entry) for entry in node.attribute},
            outputs=sum(1 for name in node.output if name),
            opset=opset_of(proto),
            shape=shapes.get(node.input[0]) if node.input else None,
        )
        try:
            made = OPERATORS[kind](build, op)
        except Unreadable as reason:
            raise Unreadable(f"{where}: {reason}") from reason
        except Exception as error:  # numbers and shapes that do not fit each other
            raise Unreadable(f"{where} does not fit its inputs: {type(error).__name__}: {error}") from error
        # A list of sizes is one value; a split makes several.
        results = made if kind == "Split" and isinstance(made, list) else [made]
        values.update(zip(node.output, map(_known, results)))
    outputs = [values.get(entry.name) for entry in proto.graph.output]
    if not inputs or not all(isinstance(output, fx.Node) for output in outputs):
        raise Unreadable("it has no input, or an output that depends on none")
    model = build.finished([output for output in outputs if isinstance(output, fx.Node)])
    model.meta["input_shapes"] = [shapes.get(entry.name) for entry in inputs]
    return model


def _known(value: Value) -> Value:
    """A list of sizes that are all known is a constant, with which others are computed."""
    if isinstance(value, list) and all(isinstance(side, int) for side in value):
        return np.array(value, np.int64)
    return value


def _kind(node: Any) -> str:
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _where(node: Any, number: int) -> str:
    return f"operator {_kind(node)} (node {node.name or number!r})"


def _folded(onnx: Any, proto: Any, node: Any, given: dict[str, Array], where: str, room: int) -> tuple[Array, int]:
    """What an operator makes of constants alone, and the room that it leaves: small files could make any number."""
    reference = require("onnx.reference", extra="onnx")
    try:
        kinds = {entry.i if entry.name == "to" else entry.t.data_type for entry in node.attribute}
        if _STRING in kinds and node.op_type in ("Cast", "ConstantOfShape"):
            raise Unreadable(f"{where} makes text")
        if (made := _numbers_made(node, [given[name] for name in node.input if name])) > room:
            raise Unreadable(f"{where} makes more numbers of constants than the {room:,} that are still allowed")
        unknown = [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in (*given, node.output[0])]
        graph = onnx.helper.make_graph([node], "constants", unknown[:-1], unknown[-1:])
        alone = onnx.helper.make_model(graph, opset_imports=proto.opset_import)
        return np.asarray(reference.ReferenceEvaluator(alone).run(None, given)[0]), room - made
    except Unreadable:
        raise
    except Exception as error:  # numbers and shapes that do not fit each other
        raise Unreadable(f"{where} does not fit its inputs: {type(error).__name__}: {error}") from error


def _numbers_made(node: Any, given: list[Array]) -> int:
    """How many numbers an operator makes of constants, at most."""
    kind, first = node.op_type, given[0]
    if kind == "ConstantOfShape":
        return int(math.prod(first.tolist()))
    if kind in _BROADCAST:
        return math.prod(np.broadcast_shapes(*(array.shape for array in given)))
    if kind == "Concat":
        return sum(array.size for array in given)
    if kind == "Gather":
        axis: int = next((entry.i for entry in node.attribute if entry.name == "axis"), 0)
        return int(first.size // max(first.shape[axis], 1) * given[1].size)
    return max(first.size, first.ndim)


def _array(tensor: Any) -> Array:
    from onnx import numpy_helper

    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # sizes that do not fit, types that NumPy does not know
        raise Unreadable(f"weight {tensor.name!r} is damaged: {error}") from error


def _attribute(onnx: Any, entry: Any) -> Any:
    """An attribute as a plain value; text as ``str``."""
    value = onnx.helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return _array(value) if isinstance(value, onnx.TensorProto) else value


def _known_shapes(onnx: Any, proto: Any) -> dict[str, tuple[int | None, ...]]:
    """Sides of every tensor that shape inference tells, ``None`` for those that are open."""
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=_longest_sizes(proto) <= _LONGEST_SIZES)
    except Exception as error:
        raise Unreadable(f"its shapes contradict each other: {error}") from error
    return {
        value.name: tuple(
            side.dim_value if side.WhichOneof("value") == "dim_value" and side.dim_value > 0 else None
            for side in value.type.tensor_type.shape.dim
        )
        for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
        if value.type.tensor_type.HasField("shape")
    }


def _longest_sizes(proto: Any) -> float:
    """The longest list that shape inference would carry on, at most: a few operators could make any length."""
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    lengths: dict[str, float] = {name: _length(tensor) for name, tensor in tensors.items()}
    for node in proto.graph.node:
        given = [lengths.get(name, 0) for name in node.input]
        if node.op_type == "ConstantOfShape":
            known = tensors.get(node.input[0]) if node.input else None
            length = math.inf if known is None else float(math.prod(map(int, _array(known).reshape(-1))))
        elif node.op_type == "Constant":
            length = max((_length(entry.t) for entry in node.attribute), default=0)
        else:
            length = sum(given) if node.op_type == "Concat" else max(given, default=0)
        lengths.update(dict.fromkeys(node.output, length))
    return max(lengths.values(), default=0)


def _length(tensor: Any) -> int:
    """How many sizes a tensor may hold."""
    return math.prod(tensor.dims) if len(tensor.dims) < 2 and tensor.data_type in _INTEGERS else 0


def _name(node: Any, number: int, values: dict[str, Value]) -> str:
    """The name of the layer whose weight a node reads, as in ``layer1.0.conv1``; else that of the node."""
    for name in node.input[1:2]:
        if isinstance(values.get(name), np.ndarray) and re.fullmatch(r"\w+(\.\w+)*\.weight", name, flags=re.ASCII):
            return str(name.removesuffix(".weight"))
    return str(node.name).strip("/") or f"{node.op_type.lower()}_{number}"


def _check_parity(runtime: Any, file: Path, model: fx.GraphModule) -> None:
    """Run file and model side by side, on random inputs."""
    try:
        session = open_session(runtime, file)
    except ExportError as error:
        raise ArtefactError(f"path={str(file)!r}: onnxruntime cannot load it: {error.__cause__}") from error
    problems = []
    for example in _examples(model.meta["input_shapes"]):
        try:
            check: BatchCheck = compare_batch(session, model, "random", example)
        except ExportError as error:
            problems.append(error.message)
            continue
        if check.relative <= _TOLERANCE:
            return
        raise ArtefactError(
            f"path={str(file)!r}: torch reads another model than onnxruntime: on inputs of shape "
            f"{', '.join(map(str, example.shapes))} they part by {check.relative:.3g} of the largest output, more than "
            f"{_TOLERANCE:g}. Please report the file; build the model in torch meanwhile."
        )
    raise ArtefactError(f"path={str(file)!r} could not be run beside its reading in torch: {problems[0]}")


def _examples(shapes: Sequence[tuple[int | None, ...] | None]) -> Iterator[Example]:
    """Random inputs, with every guess at the sides that are open."""
    generator = torch.Generator().manual_seed(0)
    for side, batch in product(_OPEN_SIDES, (2, 1)):
        made: list[Tensor] = []
        for shape in shapes:
            known = shape or (None, 3, None, None)
            sides = [length or (batch if place == 0 else side) for place, length in enumerate(known)]
            if math.prod(sides) > _LARGEST_INPUT:
                raise Unreadable(f"it takes an input of shape {tuple(sides)}, so it cannot be run beside its reading")
            made.append(torch.randn(sides, generator=generator))
        yield Example(tuple(made))
