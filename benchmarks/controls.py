"""The networks of examples/cifar10.py in any width, narrowed as near to given MACs as their channels allow.

The other control, pruned at those MACs, is ghostify.deployment.pruning.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ghostify._torchvision import import_torchvision
from ghostify.nn.cifar import CifarResNet, CifarVGG
from ghostify.tracing.counting import count_macs

Widths = Sequence[int]


@dataclass(frozen=True)
class Network:
    """A network for 32×32 images.

    Attributes:
        build: Makes one with random weights from the widths of its stages.
        widths: As published.
    """

    build: Callable[[Widths], nn.Module]
    widths: Widths


def _vgg16(widths: Widths) -> nn.Module:
    depths = (2, 2, 3, 3, 3)
    plan = [[width] * depth + [0] for width, depth in zip((*widths, widths[-1]), depths, strict=True)]
    return CifarVGG(list(itertools.chain.from_iterable(plan)))


def _mobilenet_v2(widths: Widths) -> nn.Module:
    """torchvision's, with the strides usual for small images; the stem and the last convolution keep their widths."""
    shapes = ((1, 1, 1), (6, 2, 1), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
    setting = [[t, width, n, stride] for width, (t, n, stride) in zip(widths, shapes, strict=True)]
    models = import_torchvision().models
    model: nn.Module = models.MobileNetV2(num_classes=10, inverted_residual_setting=setting, round_nearest=1)
    model.get_submodule("features.0.0").stride = (1, 1)  # type: ignore[assignment]
    return model


NETWORKS: dict[str, Network] = {
    "resnet20": Network(lambda widths: CifarResNet(3, width=widths), (16, 32, 64)),
    "resnet56": Network(lambda widths: CifarResNet(9, width=widths), (16, 32, 64)),
    "vgg16": Network(_vgg16, (64, 128, 256, 512)),
    "mobilenet_v2": Network(_mobilenet_v2, (16, 24, 32, 64, 96, 160, 320)),
}


def plain(name: str, seed: int = 0) -> nn.Module:
    """A network as published, with random weights."""
    torch.manual_seed(seed)
    return NETWORKS[name].build(NETWORKS[name].widths)


def narrowed(name: str, macs: int, images: Tensor, seed: int = 0) -> nn.Module:
    """A narrower network with random weights, whose MACs come as near as its stages allow.

    All stages are narrowed by one factor and rounded, down or up, whichever comes nearest together.
    """
    network = NETWORKS[name]

    def scaled(factor: float) -> list[int]:
        return [max(1, int(factor * width)) for width in network.widths]

    def excess(widths: Widths) -> int:
        return count_macs(network.build(widths), images[:1]).macs - macs

    low, high = 0.0, 1.0
    for _ in range(12):  # halvings: a channel in 4,096
        middle = (low + high) / 2
        low, high = (low, middle) if excess(scaled(middle)) > 0 else (middle, high)
    roundings = itertools.product((0, 1), repeat=len(network.widths))
    choices = [[width + more for width, more in zip(scaled(low), rounding)] for rounding in roundings]
    widths = min(choices, key=lambda widths: abs(excess(widths)))
    torch.manual_seed(seed)
    return network.build(widths)
