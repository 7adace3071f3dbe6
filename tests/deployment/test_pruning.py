"""The original without some of its channels, at given MACs."""

from __future__ import annotations

import pytest
import torch
from deployment_nets import make_net
from torch import Tensor, nn

import ghostify
from ghostify.deployment import pruned
from ghostify.errors import BudgetError, InputsError, OptionError
from ghostify.nn.cifar import CifarResNet
from ghostify.tracing.counting import count_macs, count_params

pytest.importorskip("torch_pruning")


def test_macs_come_down_and_the_original_stays_where_a_padded_shortcut_ties_channels() -> None:
    torch.manual_seed(0)
    model, images = CifarResNet(1).train(), torch.randn(2, 3, 16, 16)
    macs, before = ghostify.plan(model, ratio=2, example_inputs=images).macs_after, model.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    small = pruned(model, macs, example_inputs=images)
    assert 0.95 * macs <= count_macs(small, images[:1]).macs <= macs
    assert small(images).shape == (2, 10)
    assert small.layer1[0].conv2.out_channels == 16  # what a padded shortcut is added to
    assert small.layer1[0].conv1.out_channels < 16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_every_channel_that_a_known_layer_reads_can_go(images: Tensor) -> None:
    model = make_net()
    small = pruned(model, count_macs(model, images).macs // 3, example_inputs=images)
    assert {small.stem.out_channels < 8, small.features[2].out_channels < 16} == {True}
    assert small(images).shape == (3, 5)
    assert count_params(small) < count_params(model) // 2


def test_norms_are_estimated_on_images_if_there_are_any(images: Tensor) -> None:
    model = make_net().eval()
    macs = count_macs(model, images).macs // 2
    with pytest.warns(UserWarning, match="mean 0 and variance 1"):
        small = pruned(model, macs, example_inputs=images, calibration=5 + images)
    assert small.features[0].running_mean.abs().max() > 0.1
    assert pruned(model, macs, example_inputs=images).features[0].running_mean.abs().max() == 0


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x if x.sum() > 0 else -x)


def test_what_cannot_be_pruned_is_refused(images: Tensor) -> None:
    with pytest.raises(BudgetError, match=r"macs=10 is out of reach: torch-pruning leaves SmallNet"):
        pruned(make_net(), 10, example_inputs=images)
    with pytest.raises(InputsError, match=r"LooksAtValues has no graph .* others="):
        pruned(LooksAtValues(), 1000, example_inputs=images)
    with pytest.raises(OptionError, match=r"macs=0\.5"):
        pruned(make_net(), 0.5, example_inputs=images)  # type: ignore[arg-type]
