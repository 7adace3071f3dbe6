"""The cheap operation of a Ghost unit: depthwise maps of a primary map."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# By the number of spatial dimensions.
CONVOLUTIONS: dict[int, Callable[..., _ConvNd]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class CheapOperation(nn.Module):
    """Depthwise maps of a primary map (arXiv 1911.11907, eq. 3), stride 1, same size.

    Args:
        channels: Primary channels ``m``.
        copies: Depthwise maps of every primary channel.
        extra: The first ``extra`` primary channels get one more.
        dims: Spatial dimensions, 1 to 3.
        dw_size: Side ``d`` of the depthwise kernels, odd.
        bias: Whether the maps have a bias.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        channels: int,
        copies: int,
        extra: int,
        *,
        dims: int = 2,
        dw_size: int,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.copies = copies
        self.extra = extra
        self.has_bias = bias
        self.channel_dim = -(dims + 1)

        def depthwise(inputs: int, outputs: int) -> _ConvNd:
            return CONVOLUTIONS[dims](
                inputs, outputs, dw_size, padding=dw_size // 2, groups=inputs, bias=bias, device=device, dtype=dtype
            )

        self.every = depthwise(channels, copies * channels) if copies else None
        self.first = depthwise(extra, extra) if extra else None

    def forward(self, primary: Tensor) -> Tensor:
        """Map ``(b, m, …)`` to ``(b, copies·m + extra, …)``."""
        if self.every is None:
            return self._of_first(primary)
        maps: Tensor = self.every(primary)
        return torch.cat([maps, self._of_first(primary)], dim=self.channel_dim) if self.extra else maps

    def _of_first(self, primary: Tensor) -> Tensor:
        assert self.first is not None  # the layout guarantees it: extra > 0
        some = primary.narrow(self.channel_dim, 0, self.extra) if self.extra < self.channels else primary
        maps: Tensor = self.first(some)
        return maps

    def kernels(self) -> Tensor:
        """All depthwise kernels in the order of the maps, ``(copies·m + extra, d, …)``."""
        return torch.cat([conv.weight.squeeze(1) for conv in (self.every, self.first) if conv is not None])

    @torch.no_grad()
    def assign(self, kernels: Tensor, bias: Tensor | None = None) -> None:
        """Set all kernels ``(maps, d, …)`` and, where there is one, the bias ``(maps,)``."""
        start = 0
        for conv in (self.every, self.first):
            if conv is None:
                continue
            stop = start + conv.out_channels
            conv.weight.copy_(kernels[start:stop].unsqueeze(1))
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias[start:stop])
            start = stop
