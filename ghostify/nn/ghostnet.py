"""The GhostNet family for ImageNet-sized images, with the state-dict keys of the published weights.

Sources: GhostNet (Han et al., arXiv 1911.11907, Table 1), GhostNetV2 (Tang et al., arXiv 2211.12905), GhostNetV3
(Liu et al., arXiv 2404.11202). The three share one table of stages; V2 adds DFC attention, V3 adds the branches that
are folded away for deployment. Weights of the authors and of timm load; see
[from_official][ghostify.nn.ghostnet.from_official].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ghostify.errors import OptionError
from ghostify.nn.ghostnet_blocks import GhostBottleneck, GhostModule, fold, rounded_channels
from ghostify.nn.ghostnet_branches import ConvNorm, Form, is_number, require_form, require_whole

__all__ = [
    "GhostBottleneck",
    "GhostModule",
    "GhostNet",
    "fold",
    "from_official",
    "ghostnet",
    "ghostnet_v2",
    "ghostnet_v3",
]

# A line is a stage, an entry a bottleneck: kernel side, expansion size, output channels, SE ratio, stride.
_STAGES: tuple[tuple[tuple[int, int, int, float, int], ...], ...] = (
    ((3, 16, 16, 0, 1),),
    ((3, 48, 24, 0, 2),),
    ((3, 72, 24, 0, 1),),
    ((5, 72, 40, 0.25, 2),),
    ((5, 120, 40, 0.25, 1),),
    ((3, 240, 80, 0, 2),),
    ((3, 200, 80, 0, 1), (3, 184, 80, 0, 1), (3, 184, 80, 0, 1), (3, 480, 112, 0.25, 1), (3, 672, 112, 0.25, 1)),
    ((5, 672, 160, 0.25, 2),),
    ((5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1), (5, 960, 160, 0, 1), (5, 960, 160, 0.25, 1)),
)
_STEM, _LAST, _HEAD = 16, 960, 1280
# DFC attention begins with the third bottleneck: on the large maps before it would cost more than it brings.
_WITHOUT_ATTENTION = 2


class GhostNet(nn.Module):
    """GhostNet (Table 1) and its successors; made by ``ghostnet``, ``ghostnet_v2`` and ``ghostnet_v3``.

    Args:
        width: Factor of all channels but the head's 1,280; each number is rounded to a multiple of 4.
        num_classes: Classes.
        in_channels: Channels of the images.
        dropout: Probability of dropping a feature before the classifier while training.
        attention: Whether bottlenecks from the third on have DFC attention. Images must then be larger than 32×32.
        form: ``plain``, ``branched`` or ``folded``; see [ghostnet_blocks][ghostify.nn.ghostnet_blocks].

    Raises:
        OptionError: An argument is out of range.
    """

    # timm's name, by which ghostify finds the shape of an example.
    default_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 224, 224), "first_conv": "conv_stem"}

    def __init__(
        self,
        width: float = 1.0,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        *,
        attention: bool = False,
        form: Form = "plain",
    ) -> None:
        require_whole("GhostNet", num_classes=num_classes, in_channels=in_channels)
        require_form("GhostNet", form)
        if not (is_number(width) and 0 < width < math.inf):
            raise OptionError(
                f"width={width!r} in GhostNet is not a finite number above 0. Pass, for example, width=1.0."
            )
        if not (is_number(dropout) and 0 <= dropout < 1):
            raise OptionError(
                f"dropout={dropout!r} in GhostNet is not at least 0 and below 1. Pass 0.2, or 0 for none."
            )
        super().__init__()
        channels = rounded_channels(_STEM * width)
        self.conv_stem = nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        stages, made = [], 0
        for rows in _STAGES:
            stage = []
            for kernel, expansion, out, se_ratio, stride in rows:
                block = GhostBottleneck(
                    channels,
                    rounded_channels(expansion * width),
                    rounded_channels(out * width),
                    kernel,
                    stride,
                    se_ratio=se_ratio,
                    attention=attention and made >= _WITHOUT_ATTENTION,
                    form=form,
                )
                stage.append(block)
                channels, made = rounded_channels(out * width), made + 1
            stages.append(nn.Sequential(*stage))
        last = rounded_channels(_LAST * width)
        self.blocks = nn.Sequential(*stages, nn.Sequential(ConvNorm(channels, last, 1, relu=True)))
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.conv_head = nn.Conv2d(last, _HEAD, 1)
        self.act2 = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(_HEAD, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(n, in_channels, h, w)`` to class scores ``(n, num_classes)``."""
        maps = self.blocks(self.act1(self.bn1(self.conv_stem(x))))
        features = self.act2(self.conv_head(self.global_pool(maps))).flatten(1)
        scores: Tensor = self.classifier(self.dropout(features))
        return scores

    def fold(self) -> GhostNet:
        """Make the copy to deploy of a GhostNetV3; see [fold][ghostify.nn.ghostnet_blocks.fold].

        Its state dict fits ``ghostnet_v3(…, folded=True)``.

        Raises:
            OptionError: The network has no branches.
        """
        return fold(self)


def ghostnet(width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> GhostNet:
    """GhostNet (arXiv 1911.11907, Table 1); 5.2M parameters, 141M MACs. Published at widths 0.5, 1.0 and 1.3.

    Args:
        width: Factor of the channels.
        num_classes: Classes.
        in_channels: Channels of the images.
        dropout: Probability of dropping a feature before the classifier while training.

    Raises:
        OptionError: An argument is out of range.

    Example:
        >>> sum(p.numel() for p in ghostnet().parameters())
        5182508
    """
    return GhostNet(width, num_classes, in_channels, dropout)


def ghostnet_v2(width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2) -> GhostNet:
    """GhostNetV2 (arXiv 2211.12905): GhostNet with DFC attention. Published at widths 1.0, 1.3 and 1.6.

    Args:
        width: Factor of the channels.
        num_classes: Classes.
        in_channels: Channels of the images, which must be larger than 32×32.
        dropout: Probability of dropping a feature before the classifier while training.

    Raises:
        OptionError: An argument is out of range.
    """
    return GhostNet(width, num_classes, in_channels, dropout, attention=True)


def ghostnet_v3(
    width: float = 1.0, num_classes: int = 1000, in_channels: int = 3, dropout: float = 0.2, *, folded: bool = False
) -> GhostNet:
    """GhostNetV3 (arXiv 2404.11202): GhostNetV2, trained with branches. Published at widths 0.5, 1.0, 1.3 and 1.6.

    Args:
        width: Factor of the channels.
        num_classes: Classes.
        in_channels: Channels of the images, which must be larger than 32×32.
        dropout: Probability of dropping a feature before the classifier while training.
        folded: Make the network in the form to deploy, for the weights that ``fold`` has made.

    Raises:
        OptionError: An argument is out of range.

    Example:
        >>> deployed = ghostnet_v3(0.5, folded=True)
        >>> deployed.load_state_dict(ghostnet_v3(0.5).fold().state_dict())
        <All keys matched successfully>
    """
    form: Form = "folded" if folded else "branched"
    return GhostNet(width, num_classes, in_channels, dropout, attention=True, form=form)


def from_official(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the authors' repository the keys of these networks.

    GhostNet and GhostNetV2 have them already. In GhostNetV3 the norms of the branches have another name, and a file
    may hold the tallies of an operation counter.

    Args:
        state_dict: As stored by the authors' code, with or without branches.

    Example:
        >>> import torch
        >>> list(from_official({"a.dw_rpr_conv.0.bn.weight": torch.ones(1), "a.total_ops": torch.zeros(1)}))
        ['a.dw_rpr_conv.0.bn1.weight']
    """
    return {
        key.replace(".bn.", ".bn1."): value
        for key, value in state_dict.items()
        if not key.endswith(("total_ops", "total_params"))
    }
