"""What the fits themselves must bear: odd batches, half precision."""

import torch
from torch import nn

import ghostify
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
