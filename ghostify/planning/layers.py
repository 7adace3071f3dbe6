"""A layer with what directly follows it, as a small network that can be timed alone.

A runtime does not run a convolution alone: it fuses it with the norm, the activation and the addition
behind it, and chooses memory layouts with its neighbours. So these are timed together, and a convolution with
few channels reads the result in place of the layer that does so in the network.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ghostify.backends.folding import folded_copy
from ghostify.nn.cheap import CONVOLUTIONS
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Chain, GhostSpec, Site
from ghostify.tracing import Example, Trace
from ghostify.tracing.graph import FUNCTIONS, Follower, follower_of

# Output channels of the convolution that reads a layer: what a runtime's blocked layout takes for one block or two.
_READER = 16


@dataclass(frozen=True)
class Layer:
    """A convolution and what directly follows it.

    Attributes:
        site: Its facts.
        conv: The original.
        norm: The batch norm behind it, if it alone reads the convolution.
        activation: A copy of the activation behind that.
        follower: How it is called.
    """

    site: Site
    conv: _ConvNd
    norm: nn.Module | None
    activation: nn.Module | None
    follower: Follower

    @staticmethod
    def of(site: Site, facts: Trace) -> Layer:
        """The layer of a site; without a graph it is the convolution alone."""
        conv = facts.model.get_submodule(site.name)
        assert isinstance(conv, _ConvNd)  # what a site is
        if facts.graph is None or site.chain is None:
            return Layer(site, conv, None, None, Follower())
        norm = facts.model.get_submodule(site.chain.norm) if site.chain.norm is not None else None
        follower = follower_of(site.chain.norm or site.name, facts.graph, facts.model)
        kind, _, name = follower.activation.partition(":")
        activation = None
        if name:
            activation = FUNCTIONS[name]() if kind == "function" else copy.deepcopy(facts.model.get_submodule(name))
        return Layer(site, conv, norm, activation, follower)

    @property
    def key(self) -> str:
        """All that its time depends on: layers with the same one are timed once."""
        call, calls = self.site.calls[0], len(self.site.calls)
        kinds = [repr(self.conv), str(tuple(self.conv.weight.shape)), str(self.conv.weight.dtype)]
        kinds += [str(self.conv.weight.stride())]  # channels last or not
        kinds += [repr(self.norm), repr(self.activation)]
        return " | ".join([*kinds, str(self.follower.own), str(self.follower.adds), str(call), str(calls)])

    def network(self, spec: GhostSpec | None, *, ordered: bool = False, fold: bool = False) -> nn.Module:
        """The layer as a network, with a Ghost unit in the place of the convolution if there is a spec.

        Args:
            spec: The unit, with random kernels.
            ordered: Whether the unit needs an index to put its channels in order.
            fold: Whether to take the folded form.
        """
        module: nn.Module = copy.deepcopy(self.conv)
        norm, activation = copy.deepcopy(self.norm), copy.deepcopy(self.activation)
        if spec is not None:
            inside = spec.placement == "paper"
            unit = GhostConv.from_conv(self.conv, spec, norm=norm if inside else None, activation=activation)
            if not inside:
                unit.activation = None
            if ordered:
                unit.set_order(torch.arange(unit.out_channels).flip(0))
            module, norm = unit, None if inside else norm
        network = _Network(module, norm, activation, self.follower.adds, self.site).eval().requires_grad_(False)
        if not fold:
            return network
        site = replace(self.site, name="conv", obstacle="", chain=Chain(norm="norm" if norm is not None else None))
        named = replace(self.follower, activation="module:activation" if activation is not None else "")
        return folded_copy(network, [site], {"conv": named})

    def example(self, batch: int) -> Example:
        """Random inputs of the size that the layer sees for a batch of so many examples."""
        call = self.site.calls[0]
        weight = self.conv.weight
        rows = max(1, round(call.rows * batch))
        generator = torch.Generator().manual_seed(0)
        shapes = [call.input_shape] + ([call.output_shape] if self.follower.adds else [])
        return Example(
            tuple(torch.randn(rows, *shape, generator=generator, dtype=torch.float32).to(weight) for shape in shapes),
            {},
        )


class _Network(nn.Module):
    """A layer, what follows it, and a convolution that reads the result."""

    def __init__(
        self, conv: nn.Module, norm: nn.Module | None, activation: nn.Module | None, adds: bool, site: Site
    ) -> None:
        super().__init__()
        weight = next(conv.parameters())
        self.conv, self.adds = conv, adds
        self.norm = nn.Identity() if norm is None else norm
        self.activation = nn.Identity() if activation is None else activation
        reader = CONVOLUTIONS[len(site.kernel_size)](site.out_channels, _READER, 1)
        self.reader = reader.to(weight.device, weight.dtype)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        maps = self.norm(self.conv(x))
        if shortcut is not None:
            maps = maps + shortcut
        read: Tensor = self.reader(self.activation(maps))
        return read


def aligned(site: Site, spec: GhostSpec) -> GhostSpec:
    """The nearest lower ratio at which the intrinsic channels are a multiple of 8, or of 16 in wide layers.

    Runtimes compute channels in blocks of so many, and a block that is not full costs what a full one does.
    """
    n, groups = site.out_channels, site.groups
    block = 16 if n >= 128 else 8
    if groups > 1 or n % block:
        return spec
    return replace(spec, ratio=n / min(n, -(-spec.intrinsic_channels(n) // block) * block))


def distinct(specs: Sequence[GhostSpec]) -> list[GhostSpec]:
    """Each spec once, in order."""
    return list(dict.fromkeys(specs))
