"""The cheap operation of a Ghost unit: depthwise maps of a primary map."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# By the number of spatial dimensions.
CONVOLUTIONS: dict[int, Callable[..., _ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class CheapOperation(nn.ModuleList):
    """Depthwise maps of a primary map (arXiv 1911.11907, eq. 3), stride 1, same size.

    Its parts are depthwise convolutions with one map for each channel: libraries run several of them
    much faster than one that makes several maps of each.

    Args:
        channels: Primary channels ``m``.
        maps: Maps to make: every channel has one in turn, from the first on, until there are so many.
        dims: Spatial dimensions, 1 to 3.
        dw_size: Side ``d`` of the depthwise kernels, odd.
        bias: Whether the maps have a bias.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        channels: int,
        maps: int,
        *,
        dims: int = 2,
        dw_size: int,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = [min(channels, maps - done) for done in range(0, maps, channels)]
        super().__init__(
            CONVOLUTIONS[dims](
                size, size, dw_size, padding=dw_size // 2, groups=size, bias=bias, device=device, dtype=dtype
            )
            for size in sizes
        )
        self.channels = channels
        self.has_bias = bias
        self.channel_dim = -(dims + 1)

    def forward(self, primary: Tensor) -> Tensor:
        """Map ``(b, m, …)`` to ``(b, maps, …)``."""
        made = self.parts(primary)
        return made[0] if len(made) == 1 else torch.cat(made, dim=self.channel_dim)

    def parts(self, primary: Tensor) -> list[Tensor]:
        """The maps of every convolution alone, each ``(b, ≤ m, …)``, to be put together by the caller."""
        return [
            conv(
                primary if conv.in_channels == self.channels else primary.narrow(self.channel_dim, 0, conv.in_channels)
            )
            for conv in self._convolutions()
        ]

    def kernels(self) -> Tensor:
        """All depthwise kernels in the order of the maps, ``(maps, d, …)``."""
        return torch.cat([conv.weight.squeeze(1) for conv in self._convolutions()])

    @torch.no_grad()
    def assign(self, kernels: Tensor, bias: Tensor | None = None) -> None:
        """Set all kernels ``(maps, d, …)`` and, where there is one, the bias ``(maps,)``."""
        start = 0
        for conv in self._convolutions():
            stop = start + conv.out_channels
            conv.weight.copy_(kernels[start:stop].unsqueeze(1))
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias[start:stop])
            start = stop

    def _convolutions(self) -> list[_ConvNd]:
        return cast(list[_ConvNd], list(self))
