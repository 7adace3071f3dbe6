"""What the fits themselves must bear: odd batches, half precision."""

import pytest
import torch
from small_residual import IMAGES, X, error, net
from torch import nn

import ghostify
from ghostify.conversion import fitting
from ghostify.planning.statistics import channel_means, channel_moments


def test_batches_whose_inputs_differ_and_whose_outputs_agree():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 5),
    ).eval()
    batches = [torch.randn(16, 3, side, side) for side in (15, 16)]
    small = ghostify.convert(model, example_inputs=batches[0], calibration=batches)
    assert small.ghostify_plan.replaced[-1].error < 0.9


def test_a_norm_takes_the_exact_mean_of_half_precision_maps():
    maps = (3 + torch.randn(64, 2, 16, 16, generator=torch.Generator().manual_seed(0))).bfloat16()
    mean, variance = channel_moments([maps])
    assert torch.allclose(mean, maps.double().mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(variance, maps.double().var((0, 2, 3), correction=0), rtol=1e-4)


def test_the_variance_of_large_maps_is_exact():
    maps = torch.randn(1, 2, 1024, 1024, generator=torch.Generator().manual_seed(0)).relu()
    for some in (maps, maps.to(memory_format=torch.channels_last)):
        mean, variance = channel_moments([some])
        assert torch.allclose(mean, maps.double().mean((0, 2, 3)), rtol=1e-6)
        assert torch.allclose(variance, maps.double().var((0, 2, 3), correction=0), rtol=1e-6)
        assert torch.equal(channel_means([some]), mean)


@pytest.mark.parametrize("sizes", [(64,), (27, 27, 10), (1,) * 64, (3, 60, 1)])
def test_where_units_cost_much_every_nth_image_solves_the_kernels(monkeypatch, sizes):
    monkeypatch.setattr(fitting, "_CHEAP_MACS", 1)
    monkeypatch.setattr(fitting, "_FEWEST_CHEAP_IMAGES", 16)
    inputs = [maps.view(-1, 1, 1, 1) for maps in torch.arange(64.0).split(sizes)]
    some, same = fitting._thinned(nn.Conv2d(1, 1, 1), inputs, [2 * maps for maps in inputs])
    assert torch.cat(some).flatten().tolist() == list(range(0, 64, 4))
    assert torch.equal(torch.cat(same), 2 * torch.cat(some))


def test_a_start_from_fewer_images_for_its_kernels_is_nearly_as_good(monkeypatch):
    model, errors = net(), []
    for few in (64, 32):
        monkeypatch.setattr(fitting, "_FEWEST_CHEAP_IMAGES", few)
        monkeypatch.setattr(fitting, "_CHEAP_MACS", 1)
        small = ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser="sequential")
        errors.append(error(small, model))
    assert errors[0] != errors[1]
    assert errors[1] < 1.2 * errors[0]
