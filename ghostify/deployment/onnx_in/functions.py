"""Operators that become functions: arithmetic, shapes, and what moves numbers about."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ghostify.deployment.onnx_in.graph import Builder, Op, Sizes, Unreadable, Value

_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "Div": operator.truediv, "Pow": operator.pow,
}  # fmt: skip
_UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Neg": torch.neg, "Sqrt": torch.sqrt, "Exp": torch.exp, "Log": torch.log, "Erf": torch.erf,
    "Reciprocal": torch.reciprocal, "Floor": torch.floor, "Ceil": torch.ceil,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
}  # fmt: skip
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def arithmetic(build: Builder, op: Op) -> Value:
    """Two tensors, or a tensor and a constant."""
    return build.call(_ARITHMETIC[op.kind], build.operand(op, 0), build.operand(op, 1))


def many(build: Builder, op: Op) -> Value:
    """``Sum``, ``Max`` and ``Min`` of several tensors."""
    function = {"Sum": operator.add, "Max": torch.maximum, "Min": torch.minimum}[op.kind]
    result = op.x
    for place in range(1, len(op.inputs)):
        result = build.call(function, result, op.tensor(place))
    return result


def unary(build: Builder, op: Op) -> Value:
    """A function of every number alone."""
    return build.call(_UNARY[op.kind], op.x)


def reduction(build: Builder, op: Op) -> Value:
    """A mean, sum, largest or smallest value over axes, which became an input with version 18."""
    axes, keep = op.numbers(1, "axes"), bool(op.attributes.get("keepdims", 1))
    if not axes:
        if op.attributes.get("noop_with_empty_axes", 0):
            return op.x
        if op.rank is None:
            raise Unreadable("all axes of a tensor of unknown rank")
        axes = list(range(op.rank))
    return build.call(_REDUCTIONS[op.kind], op.x, axes, keep)


def flatten(build: Builder, op: Op) -> Value:
    """``Flatten``; behind the batch, as networks do it."""
    if (axis := op.attributes.get("axis", 1)) != 1:
        raise Unreadable(f"attribute axis={axis}")
    return build.call(torch.flatten, op.x, 1)


def reshape(build: Builder, op: Op) -> Value:
    """``Reshape``: a 0 stands for the side that is there.

    One that makes a matrix with a row for each example is a flattening: which torch knows, whatever the batch.
    """
    wanted = _sizes(op.input(1) if op.opset >= 5 else np.array(op.attributes["shape"]))
    sides = op.shape[1:] if op.shape is not None else (None,)
    if len(wanted) == 2 and None not in sides and not (op.attributes.get("allowzero", 0) and 0 in wanted):
        rows, columns = wanted
        whole = math.prod(side for side in sides if side is not None)
        kept = isinstance(rows, fx.Node) or rows in (0, -1) or rows == (op.shape or (None,))[0]
        if kept and (columns == whole or (columns == -1 and rows != -1)):
            return build.call(torch.flatten, op.x, 1)
    if not op.attributes.get("allowzero", 0):
        wanted = [
            build.call(torch.Tensor.size, op.x, place) if isinstance(side, int) and side == 0 else side
            for place, side in enumerate(wanted)
        ]
    return build.call(torch.reshape, op.x, wanted)


def transpose(build: Builder, op: Op) -> Value:
    """``Transpose``."""
    order = op.attributes.get("perm") or list(reversed(range(op.rank or 2)))
    return build.call(torch.permute, op.x, order)


def squeeze(build: Builder, op: Op) -> Value:
    """``Squeeze`` of named axes; of a list of sizes, nothing."""
    axes = op.numbers(1, "axes")
    value = op.input(0)
    if isinstance(value, list):
        return value
    if axes is None:
        raise Unreadable("no axes")
    return build.call(torch.squeeze, op.x, tuple(axes))


def unsqueeze(build: Builder, op: Op) -> Value:
    """``Unsqueeze``; a single size becomes a list of one, which it is here already."""
    value, axes = op.input(0), op.numbers(1, "axes") or []
    if isinstance(value, list):
        return value
    if len(axes) != 1:
        raise Unreadable(f"axes {axes}: one at a time is read")
    return build.call(torch.unsqueeze, op.x, axes[0])


def concat(build: Builder, op: Op) -> Value:
    """``Concat`` of tensors, or of lists of sizes."""
    if any(isinstance(value, list) for value in op.inputs):
        return [size for value in op.inputs for size in _sizes(value)]
    return build.call(torch.cat, [build.operand(op, place) for place in range(len(op.inputs))], op.attributes["axis"])


def split(build: Builder, op: Op) -> Sequence[Value]:
    """``Split`` into parts of given sizes, or of equal ones."""
    axis, sizes = op.attributes.get("axis", 0), op.numbers(1, "split")
    if sizes is None:
        whole = op.shape[axis] if op.shape is not None else None
        if whole is None:
            raise Unreadable("a side of unknown size in equal parts")
        largest = -(-whole // op.outputs)
        sizes = [min(largest, whole - start) for start in range(0, whole, largest)]
    parts = build.call(torch.split, op.x, sizes, axis)
    return [build.call(operator.getitem, parts, place) for place in range(op.outputs)]


def cut(build: Builder, op: Op) -> Value:
    """``Slice`` between constants, forwards."""
    starts, ends = op.numbers(1, "starts"), op.numbers(2, "ends")
    if starts is None or ends is None:
        raise Unreadable("no start or no end")
    axes, steps = op.numbers(3, "axes") or list(range(len(starts))), op.numbers(4, "steps") or [1] * len(starts)
    if any(step < 1 for step in steps):
        raise Unreadable("a slice backwards")
    value = op.input(0)
    if isinstance(value, list):
        return value[starts[0] : ends[0] : steps[0]]
    if op.rank is None and min(axes) < 0:
        raise Unreadable("axes counted from the end of a tensor of unknown rank")
    chosen = {axis % (op.rank or axis + 1): slice(*limits) for axis, *limits in zip(axes, starts, ends, steps)}
    index = tuple(chosen.get(axis, slice(None)) for axis in range(max(chosen) + 1))
    return build.call(operator.getitem, op.x, index)


def gather(build: Builder, op: Op) -> Value:
    """``Gather`` at constant places: channels in another order, or one of several sizes."""
    places, axis, value = op.needed(1), op.attributes.get("axis", 0), op.input(0)
    if isinstance(value, list):
        chosen = [value[int(place)] for place in places.reshape(-1)]
        return np.array(chosen[0]) if places.dim() == 0 and isinstance(chosen[0], int) else chosen
    if places.dim() == 0:
        return build.call(torch.select, op.x, axis, int(places))
    if places.dim() > 1:
        raise Unreadable("an index of several dimensions")
    if bool((places < 0).any()):
        side = op.shape[axis] if op.shape is not None else None
        if side is None:
            raise Unreadable("places counted from the end of a side of unknown size")
        places = places % side
    return build.call(torch.index_select, op.x, axis, build.constant(op, places))


def pad(build: Builder, op: Op) -> Value:
    """``Pad`` by constants."""
    pads, mode = op.numbers(1, "pads"), op.attributes.get("mode", "constant")
    if pads is None or mode not in _PAD_MODES:
        raise Unreadable(f"mode={mode!r}")
    given = op.array(2)
    value = op.attributes.get("value", 0.0) if given is None or not given.size else float(given.reshape(-1)[0])
    axes = op.numbers(3, "axes") or list(range(len(pads) // 2))
    rank = op.rank or len(axes)
    ends = {axis % rank: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    last = [end for axis in reversed(range(rank)) for end in ends.get(axis, (0, 0))]
    while len(last) > 2 * max(rank - 2, 0) and last[-2:] == [0, 0]:  # other modes know the sides of the map alone
        del last[-2:]
    return build.call(F.pad, op.x, last, _PAD_MODES[mode], value if mode == "constant" else None)


def resize(build: Builder, op: Op) -> Value:
    """``Resize`` and ``Upsample`` to constant sizes or by constant factors, in torch's ways of counting pixels."""
    mode = op.attributes.get("mode", "nearest")
    way = op.attributes.get("coordinate_transformation_mode", "half_pixel" if op.kind == "Resize" else "asymmetric")
    place = 1 if op.kind == "Upsample" or op.opset < 11 else 2
    scales = op.array(place) if op.kind == "Resize" or op.opset >= 9 else np.array(op.attributes["scales"])
    sizes = _sizes(op.input(3))
    axes = op.attributes.get("axes", list(range(op.rank or 4)))
    if axes[-2:] != [2, 3] and op.rank == 4:
        raise Unreadable(f"attribute axes={axes}")
    first = axes.index(2) if 2 in axes else 0
    options: dict[str, Any] = {"mode": {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}.get(mode)}
    if options["mode"] is None or (mode != "nearest" and op.rank != 4):
        raise Unreadable(f"mode={mode!r}")
    if mode != "nearest":
        options["align_corners"] = way == "align_corners"
    if sizes:
        return build.call(F.interpolate, op.x, size=sizes[first:], **options)
    if scales is None or not scales.size:
        raise Unreadable("neither sizes nor factors")
    return build.call(F.interpolate, op.x, scale_factor=[float(side) for side in scales[first:]], **options)


def depth_to_space(build: Builder, op: Op) -> Value:
    """``DepthToSpace`` in torch's order of channels."""
    if op.attributes.get("mode", "DCR") != "CRD":
        raise Unreadable("attribute mode='DCR'")
    return build.module(op, nn.PixelShuffle(op.attributes["blocksize"]))


def shape(build: Builder, op: Op) -> Value:
    """``Shape``: the sides that the file tells, and those that are known only when the model runs."""
    if op.shape is None:
        raise Unreadable("the shape of a tensor of unknown rank")
    sides: Sizes = [
        side if side is not None and place > 0 else build.call(torch.Tensor.size, op.x, place)
        for place, side in enumerate(op.shape)
    ]
    return sides[op.attributes.get("start", 0) : op.attributes.get("end", len(sides))]


def cast(build: Builder, op: Op) -> Value:
    """``Cast``: sizes stay what they are; tensors only to float32, which all of them are."""
    if isinstance(op.input(0), list):
        return op.input(0)
    if op.attributes["to"] != 1:
        raise Unreadable(f"attribute to={op.attributes['to']}")
    return op.x


def same(build: Builder, op: Op) -> Value:
    """``Identity``, and ``Dropout`` when it is not trained."""
    return op.input(0)


def constant(build: Builder, op: Op) -> Value:
    """``Constant``."""
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in op.attributes:
            return np.asarray(op.attributes[name])
    raise Unreadable(f"attributes {sorted(op.attributes)}")


FUNCTIONS: dict[str, Callable[[Builder, Op], Value | Sequence[Value]]] = {
    **dict.fromkeys(_ARITHMETIC, arithmetic),
    **dict.fromkeys(("Sum", "Max", "Min"), many),
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(("Identity", "Dropout"), same),
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Flatten": flatten,
    "Reshape": reshape,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": cut,
    "Gather": gather,
    "Pad": pad,
    "DepthToSpace": depth_to_space,
    "Shape": shape,
    "Cast": cast,
    "Constant": constant,
}


def _sizes(value: Value) -> Sizes:
    """Sizes from a list of them, or from a constant."""
    if isinstance(value, list):
        return value
    if isinstance(value, np.ndarray):
        return [int(side) for side in value.reshape(-1)]
    if isinstance(value, fx.Node):
        raise Unreadable("sizes that are computed when the model runs")
    return []
