"""Layers as they are timed: with what follows them, and in widths that runtimes compute in."""

import pytest
import torch
from torch import nn

from ghostify.nn.cifar import CifarResNet
from ghostify.planning.layers import Layer, aligned
from ghostify.spec import GhostSpec
from ghostify.tracing import trace

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_widths_are_whole_blocks():
    site = next(site for site in trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 144, 1)), X).sites if site.order)
    for ratio in (1.1, 1.5, 2, 3, 4):
        spec = aligned(site, GhostSpec(ratio))
        assert spec.intrinsic_channels(144) % 16 == 0
        assert spec.intrinsic_channels(144) >= GhostSpec(ratio).intrinsic_channels(144)
    assert aligned(site, GhostSpec(144)).intrinsic_channels(144) == 16


@pytest.mark.parametrize("spec", [None, GhostSpec(2), GhostSpec(1.5, fusion="add"), GhostSpec(2, placement="paper")])
@pytest.mark.parametrize("fold", [False, True])
def test_a_layer_is_timed_with_what_follows_it(spec, fold):
    facts = trace(CifarResNet(1, width=16).eval(), X)
    sites = {site.name: site for site in facts.sites}
    inner, closing = (Layer.of(sites[f"layer1.0.conv{number}"], facts) for number in (1, 2))
    assert isinstance(inner.activation, nn.ReLU)
    assert not inner.follower.adds
    assert closing.follower.adds
    for layer in (inner, closing):
        example = layer.example(2)
        made = layer.network(spec, fold=fold)(*example.args)
        assert made.shape == (2, 16, 16, 16)
        assert len(example.args) == (2 if layer.follower.adds else 1)
    assert inner.key != closing.key
    assert inner.key == Layer.of(sites["layer1.0.conv1"], facts).key
