"""The CIFAR-10 networks of the published tables, with the state-dict keys of their trained weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with a parameter-free shortcut (He et al. 2016, arXiv 1512.03385, §4.2, option A).

    Where the block halves the map and widens it, the shortcut takes every second pixel and pads
    the new channels with zeros, the same number on both sides (of an odd number one more behind).
    """

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride = stride
        left = (planes - in_planes) // 2
        self.padding = (0, 0, 0, 0, left, planes - in_planes - left)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, in_planes, h, w)`` to ``(n, planes, ⌈h/stride⌉, ⌈w/stride⌉)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x
        if self.stride != 1:
            shortcut = x[:, :, :: self.stride, :: self.stride]
        if any(self.padding):
            shortcut = F.pad(shortcut, self.padding)
        return F.relu(out + shortcut)


class CifarResNet(nn.Module):
    """The 6n+2-layer ResNet for 32×32 images (He et al. 2016, arXiv 1512.03385, §4.2).

    Args:
        blocks: Blocks in each of the three stages (``n``).
        num_classes: Classes.
        width: Channels of the first stage, which every further one doubles; or of all three, never fewer than before.
        in_channels: Channels of the images.
    """

    def __init__(
        self, blocks: int, num_classes: int = 10, width: int | Sequence[int] = 16, in_channels: int = 3
    ) -> None:
        super().__init__()
        first, second, third = (width, 2 * width, 4 * width) if isinstance(width, int) else width
        self.conv1 = nn.Conv2d(in_channels, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = self._stage(first, first, blocks, 1)
        self.layer2 = self._stage(first, second, blocks, 2)
        self.layer3 = self._stage(second, third, blocks, 2)
        self.linear = nn.Linear(third, num_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_planes, planes, stride)
        return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, h, w)`` to class scores ``(n, num_classes)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        scores: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return scores


class CifarVGG(nn.Module):
    """VGG with batch norm for 32×32 images, with the classifier 512→512→10 of the GhostNet paper's table.

    Args:
        plan: Channels of each 3×3 convolution; 0 stands for a 2×2 max pooling.
        num_classes: Classes.
    """

    def __init__(self, plan: Sequence[int], num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in plan:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(inplace=True),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(channels, 512), nn.ReLU(inplace=True), nn.Linear(512, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, 3, 32, 32)`` to class scores ``(n, num_classes)``."""
        out: Tensor = self.classifier(self.features(x).flatten(1))
        return out


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet-20: 0.27M parameters, 40.6M MACs.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        269722
    """
    return CifarResNet(3, num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet-56: 0.85M parameters, 125M MACs."""
    return CifarResNet(9, num_classes)


def vgg16(num_classes: int = 10) -> CifarVGG:
    """VGG-16 for CIFAR: 15.0M parameters, 313M MACs of convolutions."""
    plan = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]
    return CifarVGG(plan, num_classes)
