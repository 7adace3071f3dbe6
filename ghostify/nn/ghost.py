"""The Ghost unit: few channels by a real convolution, the rest by a cheap depthwise one.

Source: Han et al., "GhostNet: More Features from Cheap Operations" (arXiv 1911.11907), §3.1–3.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ghostify.nn.cheap import CONVOLUTIONS, CheapOperation
from ghostify.nn.layout import natural_layout, position_parents
from ghostify.nn.selection import select_channels
from ghostify.spec import GhostSpec

Size = int | tuple[int, ...]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

# Buffers that a unit has only where its channels are not in the original's order.
ORDERS = ("channel_order", "output_channels")
# By the number of spatial dimensions.
_NORMS: dict[int, Callable[..., _BatchNorm]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class GhostConv(nn.Module):
    """A convolution with the signature and output shape of torch's, at little more than 1/ratio of the cost.

    Its channels come in the order of the original's, unless that order was folded into the layers that read them
    (``output_channels`` tells).

    This is what [GhostConv1d][ghostify.nn.GhostConv1d], [GhostConv2d][ghostify.nn.GhostConv2d] and
    [GhostConv3d][ghostify.nn.GhostConv3d] have in common; in the place of a transposed convolution
    stands the same unit around a transposed primary.

    See [GhostConv2d][ghostify.nn.GhostConv2d] for the arguments.
    """

    dims: int
    primary_conv: nn.Module
    cheap_operation: CheapOperation | None
    primary_norm: nn.Module | None
    cheap_norm: nn.Module | None
    activation: nn.Module | None
    channel_order: Tensor | None
    output_channels: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        *,
        spec: GhostSpec | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        spec = spec or GhostSpec()
        channels = spec.intrinsic_channels(out_channels, groups)
        primary = CONVOLUTIONS[self.dims](
            in_channels, channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        super().__init__()
        self._assemble(primary, out_channels, spec)
        if spec.placement == "paper":
            norm = _NORMS[self.dims](out_channels, device=device, dtype=dtype)
            self._add_norms(norm, torch.arange(out_channels))
            self.activation = nn.ReLU()

    @staticmethod
    def from_conv(
        conv: _ConvNd,
        spec: GhostSpec,
        *,
        layout: Tensor | None = None,
        norm: nn.Module | None = None,
        activation: nn.Module | None = None,
    ) -> GhostConv:
        """Make the unit that takes the place of a trained convolution.

        The primary is a copy of ``conv`` with the rows of the chosen intrinsic channels. The cheap
        kernels start at random (``mul``: as the identity) and wait for an initialiser.

        Args:
            conv: The original; any subclass, left untouched.
            spec: The unit's options.
            layout: The original channel at every position of the unit's own layout, ``(n,)``, a
                permutation; by default the channels as they are.
            norm: For placement ``paper``: the original batch norm, whose channels are shared out to the branches.
            activation: For placement ``paper``: a copy of the activation that the cheap operation reads through.
        """
        kind = UNITS[len(conv.kernel_size)]
        unit = kind.__new__(kind)
        nn.Module.__init__(unit)
        layout = natural_layout(spec, conv.out_channels, conv.groups) if layout is None else layout
        rows = layout[: spec.intrinsic_channels(conv.out_channels, conv.groups)]
        unit._assemble(select_channels(conv, rows), conv.out_channels, spec)
        if spec.placement == "paper":
            if norm is not None:
                unit._add_norms(norm, layout)
            unit.activation = activation
        unit.set_order(layout)
        unit.train(conv.training)
        return unit

    def take_channels(self, conv: _ConvNd, layout: Tensor, norm: nn.Module | None = None) -> None:
        """Choose other intrinsic channels: copy the primary (and the norms) anew from the originals.

        Args:
            conv: The original, as given to [from_conv][ghostify.nn.ghost.GhostConv.from_conv].
            layout: The original channel at every position of the unit's own layout, ``(n,)``.
            norm: The original norm where this unit holds norms.
        """
        self.primary_conv = select_channels(conv, layout[: self.intrinsic_channels])
        if self.primary_norm is not None and norm is not None:
            self._add_norms(norm, layout)
        self.set_order(layout)

    def _assemble(self, primary: _ConvNd, out_channels: int, spec: GhostSpec) -> None:
        self.spec = spec
        self.in_channels, self.out_channels = primary.in_channels, out_channels
        self.kernel_size, self.stride, self.padding = primary.kernel_size, primary.stride, primary.padding
        self.dilation, self.groups, self.padding_mode = primary.dilation, primary.groups, primary.padding_mode
        self.primary_conv = primary
        m = primary.out_channels
        maps = out_channels - m if spec.fusion == "concat" else out_channels
        weight = next(primary.parameters())
        # A gate needs a constant to start as the identity; elsewhere the original decides.
        bias = spec.fusion == "mul" or primary.bias is not None
        self.cheap_operation = (
            CheapOperation(
                m,
                maps,
                dims=self.dims,
                dw_size=spec.dw_size,
                bias=bias,
                device=weight.device,
                dtype=weight.dtype,
            ).requires_grad_(weight.requires_grad)
            if maps
            else None
        )
        self.primary_norm = self.cheap_norm = self.activation = None
        self.register_buffer("channel_order", None)
        self.register_buffer("output_channels", None)
        if spec.fusion == "mul" and self.cheap_operation is not None:
            kernels = self.cheap_operation.kernels()
            self.cheap_operation.assign(torch.zeros_like(kernels), kernels.new_ones(len(kernels)))

    def _add_norms(self, norm: nn.Module, layout: Tensor) -> None:
        self.primary_norm = select_channels(norm, layout[: self.intrinsic_channels])
        if self.cheap_operation is not None:
            cheap = layout[self.intrinsic_channels :] if self.spec.fusion == "concat" else layout
            self.cheap_norm = select_channels(norm, cheap)

    @property
    def channel_dim(self) -> int:
        """The dimension of channels, counted from the end, so that it is the same with and without a batch."""
        return -(self.dims + 1)

    @property
    def intrinsic_channels(self) -> int:
        """Channels ``m`` of the primary convolution."""
        return self.spec.intrinsic_channels(self.out_channels, self.groups)

    def set_order(self, layout: Tensor) -> None:
        """Say which original channel stands at every position of the unit's own layout; the outputs are put in order.

        Args:
            layout: A permutation ``(n,)``; the identity needs no index when the unit runs.
        """
        self._keep_orders(torch.argsort(layout), torch.arange(len(layout)))

    def layout(self) -> Tensor:
        """The original channel at every position of the unit's own layout, ``(n,)``."""
        channels = torch.arange(self.out_channels)
        outputs = channels if self.output_channels is None else self.output_channels.cpu()
        if self.channel_order is None:
            return outputs
        return channels.index_copy(0, self.channel_order.cpu(), outputs)

    def emit(self, channels: Tensor) -> None:
        """Give the outputs in another order from now on; in the order of the own layout no index is needed.

        Args:
            channels: The original channel at every place of the output, a permutation ``(n,)``.
        """
        self._keep_orders(torch.argsort(self.layout())[channels], channels)

    def _keep_orders(self, index: Tensor, channels: Tensor) -> None:
        """Remember the index to apply, and which original channels come out then; nothing where all is as it was."""
        device = next(self.parameters()).device
        natural = torch.arange(self.out_channels)
        self.channel_order = None if torch.equal(index.cpu(), natural) else index.to(device)
        self.output_channels = None if torch.equal(channels.cpu(), natural) else channels.to(device)

    def parents(self) -> Tensor:
        """The primary channel that every map of the cheap operation reads, ``(n-m,)`` or ``(n,)``."""
        parents = position_parents(self.spec, self.out_channels, self.groups)
        return parents[self.intrinsic_channels :] if self.spec.fusion == "concat" else parents

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, c, …)`` or ``(c, …)`` to ``(b, n, …)`` or ``(n, …)``.

        Channels come in the original's order, or in that of ``output_channels`` where there is one.
        """
        primary = self.primary(x)
        maps = primary if self.cheap_operation is None else self.fuse(primary, self.cheap(primary))
        return maps if self.channel_order is None else maps.index_select(self.channel_dim, self.channel_order)

    def primary(self, x: Tensor) -> Tensor:
        """The primary maps ``(b, m, …)`` of an input ``(b, c, …)``."""
        maps: Tensor = self.primary_conv(x)
        return maps if self.primary_norm is None else self.primary_norm(maps)

    def cheap_input(self, primary: Tensor) -> Tensor:
        """What the cheap operation reads, ``(b, m, …)``.

        With placement ``paper`` that is the activated map; the primary map itself is activated by
        the network's own activation after this unit, together with the ghosts.
        """
        return primary if self.activation is None else self.activation(primary)

    def cheap(self, primary: Tensor) -> list[Tensor]:
        """The depthwise maps of primary maps ``(b, m, …)``, in as many parts as they are made in."""
        assert self.cheap_operation is not None  # callers ask only where there is one
        parts = self.cheap_operation.parts(self.cheap_input(primary))
        return parts if self.cheap_norm is None else [self.cheap_norm(self._joined(parts))]

    def fuse(self, primary: Tensor, cheap: list[Tensor]) -> Tensor:
        """Both branches as ``(b, n, …)`` in the unit's own layout."""
        if self.spec.fusion == "concat":
            return self._joined([primary, *cheap])
        repeated, maps = self._repeat(primary), self._joined(cheap)
        return repeated + maps if self.spec.fusion == "add" else repeated * maps

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.channel_dim)

    def _repeat(self, primary: Tensor) -> Tensor:
        """Every primary map once for each output that stands on it, ``(b, n, …)``."""
        copies, extra = divmod(self.out_channels, self.intrinsic_channels)
        maps = [primary] * copies
        if extra:
            maps.append(primary.narrow(self.channel_dim, 0, extra))
        return self._joined(maps)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A stored state of this unit has an order or has none, whatever the unit has now.
        if any(key.startswith(prefix) for key in state_dict):
            device = next(self.parameters()).device
            for name in ORDERS:
                stored = state_dict.get(f"{prefix}{name}")
                setattr(self, name, None if stored is None else torch.empty_like(stored, device=device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        order = "" if self.channel_order is None else ", reordered"
        order += "" if self.output_channels is None else ", order folded"
        return f"{self.in_channels}, {self.out_channels}, {self.spec}{order}"


class GhostConv1d(GhostConv):
    """A Ghost unit in the place of ``nn.Conv1d``: maps ``(b, c, l)`` to ``(b, n, l')``.

    See [GhostConv2d][ghostify.nn.GhostConv2d] for the arguments.
    """

    dims = 1


class GhostConv2d(GhostConv):
    """A Ghost unit in the place of ``nn.Conv2d``: maps ``(b, c, h, w)`` to ``(b, n, h', w')``.

    Args:
        in_channels: Input channels ``c``.
        out_channels: Output channels ``n``.
        kernel_size: As in ``nn.Conv2d``; so are the next six.
        stride: Stride of the primary convolution; the cheap operation has stride 1.
        padding: Padding of the primary convolution.
        dilation: Dilation of the primary convolution.
        groups: Groups of the primary convolution; every group gets the same number of intrinsic channels.
        bias: Whether there is a bias.
        padding_mode: Padding mode of the primary convolution.
        spec: Ratio, depthwise size, fusion and placement.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        OptionError: ``spec`` is out of range (raised when it is made).

    Example:
        >>> unit = GhostConv2d(16, 30, 3, padding=1, spec=GhostSpec(ratio=4))
        >>> unit(torch.zeros(2, 16, 8, 8)).shape, unit.primary_conv.out_channels
        (torch.Size([2, 30, 8, 8]), 8)
    """

    dims = 2


class GhostConv3d(GhostConv):
    """A Ghost unit in the place of ``nn.Conv3d``: maps ``(b, c, t, h, w)`` to ``(b, n, t', h', w')``.

    See [GhostConv2d][ghostify.nn.GhostConv2d] for the arguments.
    """

    dims = 3


UNITS: dict[int, type[GhostConv]] = {1: GhostConv1d, 2: GhostConv2d, 3: GhostConv3d}
