"""The start from the weights alone: what counts, and what a norm knows of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify import GhostSpec
from ghostify.tracing.sites import filters_of


class Net(nn.Module):
    """One layer amid others; its norm knows what the layer makes."""

    def __init__(self, channels=4, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.site, self.norm = nn.Conv2d(6, channels, 3, padding=1, bias=bias), nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.site(torch.relu(self.stem(x))))).mean((2, 3)))


IMAGES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def settled(model):
    """With norms that hold the statistics of the images."""
    model.norm.momentum = None
    model.train()(IMAGES)
    return model.eval()


def started(model, ratio=2.0):
    return ghostify.convert(model, spec=GhostSpec(ratio), example_inputs=IMAGES[:2]).eval()


def test_channels_count_as_their_norm_lets_them_not_by_the_length_of_their_filters():
    model = Net()
    with torch.no_grad():
        directions = torch.linalg.qr(torch.randn(54, 54))[0]
        likenesses = (1.0, 0.8), (1e-2, 0.95)  # length of a pair of filters, cosine between them
        for place, (length, cosine) in enumerate(likenesses):
            one, other = directions[2 * place], directions[2 * place + 1]
            model.site.weight[2 * place] = length * one.view(6, 3, 3)
            model.site.weight[2 * place + 1] = length * (cosine * one + (1 - cosine**2) ** 0.5 * other).view(6, 3, 3)
    layout = started(settled(model), ratio=4 / 3).site.layout()
    assert int(layout[-1]) in (2, 3)  # of the pair that is more alike, though its maps are the smaller ones


def test_a_filter_that_hardly_answers_stands_for_no_other():
    model = Net(channels=16)
    with torch.no_grad():
        model.site.weight[3] *= 1e-8
    small = started(settled(model))
    assert 3 not in small.site.layout()[small.site.parents()].tolist()
    assert small.site.cheap_operation.kernels().abs().max() < 100


def test_a_norm_finds_the_mean_that_it_takes_off_with_a_bias_too():
    model = settled(Net(channels=16, bias=True))
    moved = copy.deepcopy(model)  # the same function, its bias in the norm
    with torch.no_grad():
        moved.norm.running_mean -= model.site.bias
        moved.site.bias = None
    assert torch.allclose(moved(IMAGES), model(IMAGES), atol=1e-5)
    for one in (model, moved):
        small = started(one)
        mean = small.norm(small.site(torch.relu(small.stem(IMAGES)))).mean((0, 2, 3)) - small.norm.bias
        assert mean.abs().max() < 0.1


def test_a_norm_that_was_folded_away_knows_no_mean():
    model = Net(channels=16, bias=True).eval()  # mean 0, variance 1
    with torch.no_grad():
        model.site.weight[8:] = 2 * model.site.weight[:8]
    assert torch.allclose(started(model)(IMAGES), model(IMAGES), atol=1e-3)


class Standardised(nn.Conv2d):
    """Convolves with its filters less their means, at the same length, and pads by itself."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / weight.std((1, 2, 3), keepdim=True) / 8
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, None, self.stride) + self.bias.view(-1, 1, 1)


class Normalised(nn.ConvTranspose2d):
    """Convolves with filters of length 1."""

    def forward(self, x):
        lengths = self.weight.square().sum((0, 2, 3), keepdim=True).sqrt()
        return F.conv_transpose2d(x, weight=self.weight / lengths, stride=self.stride, padding=1)


class Adapted(nn.Conv2d):
    """Adds what the mirrored filters make."""

    def forward(self, x):
        return super().forward(x) + F.conv2d(x, self.weight.flip(2), padding=1)


@pytest.mark.parametrize(
    ("site", "shift"),
    [(Standardised(6, 16, 3), 1), (Standardised(6, 16, 3, stride=2), 1), (Normalised(6, 16, 3, bias=False), 0)],
    ids=["standardised", "with a stride", "transposed"],
)
def test_the_filters_that_count_are_those_that_a_layer_applies(site, shift):
    model = Net(channels=16)
    model.site = site
    with torch.no_grad():  # every second one is applied as the one before it, and held as another
        filters = site.weight.transpose(0, 1) if site.transposed else site.weight
        factors, terms = torch.linspace(0.1, 2, 8), shift * torch.linspace(-1, 1, 8)
        filters[1::2] = filters[::2] * factors.view(-1, 1, 1, 1) + terms.view(-1, 1, 1, 1)
    settled(model)
    assert torch.allclose(started(model)(IMAGES), model(IMAGES), atol=2e-3)


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 1e-7)])
def test_a_bias_that_is_added_afterwards_is_no_filter_and_tiny_filters_are(dtype, size, recwarn):
    site = Standardised(6, 16, 3).to(dtype)
    with torch.no_grad():
        site.bias *= 10
    assert torch.allclose(filters_of(site).float().mean((1, 2, 3)), torch.zeros(16), atol=1e-2)
    assert not recwarn
    adapted = Adapted(6, 16, 3, padding=1, bias=False).to(dtype)
    with torch.no_grad():
        adapted.weight *= size
    with pytest.warns(UserWarning, match="Adapted does more"):
        filters_of(adapted)


def test_a_layer_that_does_more_than_convolve_is_told_of():
    model = Net(channels=16)
    model.site = Adapted(6, 16, 3, padding=1)
    with pytest.warns(UserWarning, match="Adapted does more than to convolve with a weight, so the weights alone"):
        started(settled(model))
