"""What treats all channels alike, so that their order does not matter to it."""

from __future__ import annotations

import re

from torch import nn

from ghostify.tracing.graph import ACTIVATIONS

# Modules that treat every channel alike, and have no parameters.
ALIKE: tuple[type[nn.Module], ...] = (
    *ACTIVATIONS, nn.RReLU, nn.LogSigmoid, nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReplicationPad1d, nn.ReplicationPad2d,
)  # fmt: skip
# Those of torchvision and timm.
_ALIKE_BY_NAME = {
    "StochasticDepth", "DropPath", "Swish", "Mish", "Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "HardMish", "GELU",
    "GELUTanh", "QuickGELU",
}  # fmt: skip
# Functions and methods of one map, by name.
_ALIKE_CALLS = {
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "silu", "gelu", "mish", "hardtanh", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softplus", "clamp", "dropout", "dropout1d", "dropout2d", "dropout3d",
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d", "interpolate", "contiguous", "clone", "neg",
    "abs", "exp", "sqrt", "square", "float",
}  # fmt: skip
# Packages whose classes do what their base class or their name says.
_KNOWN = ("torch", "torchvision", "timm")


def is_known(module: nn.Module) -> bool:
    """Whether its forward is not one that somebody else wrote: that may do anything, whatever the class is called."""
    home = str(getattr(type(module).forward, "__module__", ""))
    return home.partition(".")[0] in _KNOWN and "forward" not in vars(module)


def is_alike(module: nn.Module, dims: int) -> bool:
    """Whether a module of a known class treats every channel of a map of so many dimensions alike."""
    name = type(module).__name__
    if name not in _ALIKE_BY_NAME:
        name = next((kind.__name__ for kind in ALIKE if isinstance(module, kind)), "")
    return bool(name) and _finds_places(name, dims)


def is_alike_call(name: str, dims: int) -> bool:
    """Whether a function or method of that name does."""
    return name in _ALIKE_CALLS and _finds_places(name, dims)


def _finds_places(name: str, dims: int) -> bool:
    """Whether what acts on 1 to 3 dimensions finds them behind the channels; else torch takes these for places."""
    places = re.search(r"([123])d$", name)
    return places is None or int(places[1]) + 2 == dims
