"""Operators that become torch's own layers: convolutions, norms, linear layers, pools, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ghostify.deployment.onnx_in.graph import Builder, Op, Unreadable

_CONVS = {"Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d)}
_CONVS["ConvTranspose"] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # type: ignore[assignment]
_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_INSTANCE_NORMS = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
_MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_AVG_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_GLOBAL = {
    "GlobalAveragePool": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    "GlobalMaxPool": (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
}


def convolution(build: Builder, op: Op) -> fx.Node:
    """``Conv`` and ``ConvTranspose``, with the file's weights."""
    weight, bias = op.needed(1), op.array(2)
    dims, groups = weight.dim() - 2, int(op.attributes.get("group", 1))
    if not 1 <= dims <= 3:
        raise Unreadable(f"a kernel of {dims} dimensions")
    transposed = op.kind == "ConvTranspose"
    side, stride, dilation = _window(op, weight.shape[2:])
    x, padding = _padded(build, op, side, stride, dilation, value=None if transposed else 0.0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias is not None}
    if transposed:
        if "output_shape" in op.attributes:
            raise Unreadable("attribute output_shape")
        channels = weight.shape[0], weight.shape[1] * groups
        options["output_padding"] = tuple(op.attributes.get("output_padding", [0] * dims))
    else:
        channels = weight.shape[1] * groups, weight.shape[0]
    if groups < 1 or not weight.numel() or (bias is not None and bias.size != channels[1]):
        raise Unreadable(f"a weight of shape {tuple(weight.shape)} with group={groups} and that bias")
    conv = _CONVS[op.kind][dims - 1](*channels, side, **options)  # type: ignore[arg-type]
    return build.module(op, _with(conv, weight=weight, bias=None if bias is None else op.needed(2)), x)


def batch_norm(build: Builder, op: Op) -> fx.Node:
    """``BatchNormalization`` in evaluation mode."""
    if op.outputs > 1 or op.attributes.get("training_mode", 0):
        raise Unreadable("a batch norm in training mode")
    kind = _NORMS.get(op.rank or 4, nn.BatchNorm2d)
    weight, bias, mean, variance = (op.needed(place) for place in range(1, 5))
    norm = kind(len(weight), eps=op.attributes.get("epsilon", 1e-5), momentum=1 - op.attributes.get("momentum", 0.9))
    return build.module(op, _with(norm, weight=weight, bias=bias, running_mean=mean, running_var=variance))


def instance_norm(build: Builder, op: Op) -> fx.Node:
    """``InstanceNormalization``."""
    weight = op.needed(1)
    norm = _INSTANCE_NORMS[op.rank or 4](len(weight), eps=op.attributes.get("epsilon", 1e-5), affine=True)
    return build.module(op, _with(norm, weight=weight, bias=op.needed(2)))


def linear(build: Builder, op: Op) -> fx.Node:
    """``Gemm`` with constant weights."""
    if op.attributes.get("transA", 0):
        raise Unreadable("attribute transA=1")
    weight = op.needed(1) * op.attributes.get("alpha", 1.0)
    bias = None if op.array(2) is None else op.needed(2).float() * op.attributes.get("beta", 1.0)
    return _linear(build, op, weight if op.attributes.get("transB", 0) else weight.T, bias)


def product(build: Builder, op: Op) -> fx.Node:
    """``MatMul``: a linear layer where the second factor is a constant matrix."""
    if isinstance(op.input(1), np.ndarray) and op.needed(1).dim() == 2:
        return _linear(build, op, op.needed(1).T, None)
    return build.call(torch.matmul, op.x, build.operand(op, 1))


def pool(build: Builder, op: Op) -> fx.Node:
    """``MaxPool`` and ``AveragePool``."""
    side, stride, dilation = _window(op, op.attributes["kernel_shape"])
    if op.outputs > 1 or op.attributes.get("storage_order", 0):
        raise Unreadable("indices of a pool")
    ceil = bool(op.attributes.get("ceil_mode", 0))
    if op.kind == "MaxPool":
        x, padding = _padded(build, op, side, stride, dilation, value=-math.inf)
        layer: nn.Module = _MAX_POOLS[len(side) - 1](side, stride, padding, dilation, ceil_mode=ceil)
        return build.module(op, layer, x)
    include = bool(op.attributes.get("count_include_pad", 0))
    x, padding = _padded(build, op, side, stride, dilation, value=0.0 if include else None)
    if any(step != 1 for step in dilation):
        raise Unreadable("attribute dilations")
    layer = _AVG_POOLS[len(side) - 1](side, stride, padding, ceil_mode=ceil, count_include_pad=include)  # type: ignore[arg-type]
    return build.module(op, layer, x)


def global_pool(build: Builder, op: Op) -> fx.Node:
    """``GlobalAveragePool`` and ``GlobalMaxPool``."""
    return build.module(op, _GLOBAL[op.kind][(op.rank or 4) - 3](1))


def clip(build: Builder, op: Op) -> fx.Node:
    """``Clip`` between two constants."""
    low, high = (
        op.attributes.get(name) if (given := op.array(place)) is None else given.item()
        for place, name in ((1, "min"), (2, "max"))
    )
    if low is None and high is None:
        return op.x
    if (low, high) == (0, 6):
        return build.module(op, nn.ReLU6())
    if low is None or high is None or math.isinf(low) or math.isinf(high) or not low < high:
        return build.call(torch.clamp, op.x, low, high)
    return build.module(op, nn.Hardtanh(low, high))


def hard_sigmoid(build: Builder, op: Op) -> fx.Node:
    """``HardSigmoid``: torch's own, or a line between two limits."""
    alpha, beta = op.attributes.get("alpha", 0.2), op.attributes.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return build.module(op, nn.Hardsigmoid())
    line = build.call(torch.add, build.call(torch.mul, op.x, alpha), beta)
    return build.call(torch.clamp, line, 0.0, 1.0)


def prelu(build: Builder, op: Op) -> fx.Node:
    """``PRelu`` with one slope, or one for each channel."""
    slope = op.needed(1)
    if slope.numel() not in (1, slope.shape[0]):
        raise Unreadable("slopes of other than one for each channel")
    return build.module(op, _with(nn.PReLU(slope.numel()), weight=slope.reshape(-1)))


def softmax(build: Builder, op: Op) -> fx.Node:
    """``Softmax`` and ``LogSoftmax``; before version 13 they knew matrices alone."""
    axis = op.attributes.get("axis", -1 if op.opset >= 13 else 1)
    if op.opset < 13 and op.rank != 2:
        raise Unreadable("the form before opset 13, of a tensor that is no matrix")
    return build.module(op, nn.Softmax(axis) if op.kind == "Softmax" else nn.LogSoftmax(axis))


def local_response_norm(build: Builder, op: Op) -> fx.Node:
    """``LRN``."""
    known = op.attributes
    layer = nn.LocalResponseNorm(
        known["size"], known.get("alpha", 1e-4), known.get("beta", 0.75), known.get("bias", 1.0)
    )
    return build.module(op, layer)


# Activations without weights, and how the attributes give their arguments.
_ACTIVATIONS: dict[str, Callable[[Op], nn.Module]] = {
    "Relu": lambda op: nn.ReLU(),
    "LeakyRelu": lambda op: nn.LeakyReLU(op.attributes.get("alpha", 0.01)),
    "Elu": lambda op: nn.ELU(op.attributes.get("alpha", 1.0)),
    "Celu": lambda op: nn.CELU(op.attributes.get("alpha", 1.0)),
    "Selu": lambda op: nn.SELU(),
    "Sigmoid": lambda op: nn.Sigmoid(),
    "Tanh": lambda op: nn.Tanh(),
    "HardSwish": lambda op: nn.Hardswish(),
    "Softplus": lambda op: nn.Softplus(),
    "Softsign": lambda op: nn.Softsign(),
    "Mish": lambda op: nn.Mish(),
    "Gelu": lambda op: nn.GELU(op.attributes.get("approximate", "none")),
}


def activation(build: Builder, op: Op) -> fx.Node:
    """An activation that is a layer of torch."""
    return build.module(op, _ACTIVATIONS[op.kind](op))


LAYERS: dict[str, Callable[[Builder, Op], fx.Node]] = {
    "Conv": convolution,
    "ConvTranspose": convolution,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "Gemm": linear,
    "MatMul": product,
    "MaxPool": pool,
    "AveragePool": pool,
    "GlobalAveragePool": global_pool,
    "GlobalMaxPool": global_pool,
    "Clip": clip,
    "HardSigmoid": hard_sigmoid,
    "PRelu": prelu,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "LRN": local_response_norm,
    **dict.fromkeys(_ACTIVATIONS, activation),
}


def _with(module: nn.Module, **tensors: torch.Tensor | None) -> nn.Module:
    """The module with the file's numbers in its parameters and buffers, in evaluation mode."""
    with torch.no_grad():
        for name, value in tensors.items():
            if value is not None:
                getattr(module, name).copy_(value)
    return module.eval()


def _linear(build: Builder, op: Op, weight: torch.Tensor, bias: torch.Tensor | None) -> fx.Node:
    if bias is not None and bias.numel() not in (1, len(weight)):
        raise Unreadable(f"a bias of shape {tuple(bias.shape)}")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return build.module(op, _with(layer, weight=weight, bias=None if bias is None else bias.reshape(-1)))


def _window(op: Op, kernel: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and dilation."""
    stride, dilation = (op.attributes.get(name) or [1] * len(kernel) for name in ("strides", "dilations"))
    return tuple(kernel), tuple(stride), tuple(dilation)


def _padded(
    build: Builder,
    op: Op,
    side: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    *,
    value: float | None,
) -> tuple[fx.Node, tuple[int, ...]]:
    """The input, and the padding of the layer; where both ends differ, the input is padded before.

    ``value`` is what it is then padded with; ``None`` where that would not be the same.
    """
    dims, auto = len(side), op.attributes.get("auto_pad", "NOTSET")
    pads = list(op.attributes.get("pads", [0] * (2 * dims)))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same(op, side, stride, dilation, lower=auto == "SAME_LOWER")
    before, after = pads[:dims], pads[dims:]
    # torch pads a pool by half its side at most.
    if before == after and (op.kind not in ("MaxPool", "AveragePool") or all(2 * p <= k for p, k in zip(before, side))):
        return op.x, tuple(before)
    if value is None:
        raise Unreadable("padding that differs between the two ends")
    ends = [end for pair in zip(reversed(before), reversed(after), strict=True) for end in pair]
    return build.call(F.pad, op.x, ends, "constant", value), (0,) * dims


def _same(op: Op, side: Sequence[int], stride: Sequence[int], dilation: Sequence[int], *, lower: bool) -> list[int]:
    """The padding of ``auto_pad``, which for strides depends on the size of the map."""
    shape = op.shape[2:] if op.shape is not None else (None,) * len(side)
    before, after = [], []
    for size, k, step, spread in zip(shape, side, stride, dilation, strict=True):
        extent = spread * (k - 1) + 1
        if step == 1:
            total = extent - 1
        elif size is not None:
            total = max((math.ceil(size / step) - 1) * step + extent - size, 0)
        else:
            raise Unreadable("auto_pad with a stride, on maps of unknown size")
        small, large = total // 2, total - total // 2
        before.append(large if lower else small)
        after.append(small if lower else large)
    return before + after
