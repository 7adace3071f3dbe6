"""Statistics of batch norms, estimated anew."""

import pytest
import torch
from torch import nn

from ghostify.conversion import estimate_norms
from ghostify.errors import InputsError
from ghostify.nn.cifar import resnet20

IMAGES = 3 + 2 * torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def made():
    """Two convolutions with norms that know other statistics than theirs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    for norm in (layers[1], layers[4]):
        norm.running_mean.fill_(0.3)
        norm.running_var.fill_(5.0)
    return layers.eval()


def test_every_norm_gets_the_mean_and_variance_of_what_it_really_reads():
    layers = made()
    assert estimate_norms(layers, [IMAGES]) == ()
    first = layers[0](IMAGES)
    assert torch.allclose(layers[1].running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(layers[1].running_var, first.var((0, 2, 3)), rtol=1e-4)
    with torch.no_grad():
        second = layers[3](layers[2](layers[1](first)))  # in evaluation mode now
    assert torch.allclose(layers[4].running_mean, second.mean((0, 2, 3)), atol=1e-3)


def test_every_example_counts_alike():
    norm = nn.BatchNorm2d(3)
    images = torch.randn(66, 3, 8, 8)
    images[64:] += 10
    with pytest.warns(UserWarning, match="look folded"):
        estimate_norms(norm, images)
    assert torch.allclose(norm.running_mean, images.mean((0, 2, 3)), atol=1e-4)
    estimate_norms(norm, images[:1])
    assert torch.allclose(norm.running_var, images[0].var((1, 2)), rtol=1e-4)


class Odd(nn.Module):
    """A norm that is not reached, one that is frozen, one that counts nothing, one without statistics; marks."""

    def __init__(self):
        super().__init__()
        self.frozen, self.uncounted, self.bare = (
            Frozen(3),
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3, track_running_stats=False),
        )
        self.uncounted.num_batches_tracked = None
        self.unreached = nn.BatchNorm1d(3)
        self.calls = 0
        for norm in (self.frozen, self.uncounted, self.unreached):
            norm.running_mean.fill_(7.0)

    def forward(self, x):
        self.calls += 1
        return self.bare(self.uncounted(self.frozen(x + torch.rand(1))))


class Frozen(nn.BatchNorm2d):
    def train(self, mode=True):
        return super().train(False)


def test_odd_norms_and_models():
    model = Odd()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    estimate_norms(model, IMAGES)
    assert torch.equal(torch.rand(1), expected)
    assert model.calls == 0
    assert model.unreached.running_mean.tolist() == [7.0] * 3
    assert torch.allclose(model.frozen.running_mean, IMAGES.mean((0, 2, 3)) + 0.5, atol=0.5)
    assert model.uncounted.running_mean.abs().max() < 0.1
    assert model.uncounted.num_batches_tracked is None
    assert not model.uncounted._forward_hooks


def test_images_are_enough_when_they_say_so():
    layers, fewer = made(), made()
    estimate_norms(layers, IMAGES, images=64)
    estimate_norms(fewer, IMAGES[:64])
    assert all(torch.equal(a, b) for a, b in zip(layers.state_dict().values(), fewer.state_dict().values()))
    assert not torch.equal(layers[1].running_mean, made()[1].running_mean)


def test_nothing_else_changes():
    model = resnet20()
    model.bn1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    with pytest.warns(UserWarning, match="19 of 19"):
        estimate_norms(model, IMAGES)
    assert [module.training for module in model.modules()] == flags
    assert model.bn1.momentum == 0.1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rsplit(".", 1)[1] for name in changed} == {"running_mean", "running_var"}


def test_norms_that_look_folded_are_named():
    layers = made()
    layers[4].running_mean.zero_()
    layers[4].running_var.fill_(1.0)
    with pytest.warns(UserWarning, match=r"1 of 2 batch norms hold mean 0 and variance 1 in every channel \(4\)"):
        assert estimate_norms(layers, IMAGES) == ("4",)
    assert estimate_norms(layers, IMAGES) == ()  # they have statistics now


def test_after_an_error_the_old_statistics_are_back():
    layers = made()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    with pytest.raises(RuntimeError):
        estimate_norms(layers, [IMAGES, torch.zeros(4, 5, 16, 16)])
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    assert layers[1].momentum == 0.1
    with pytest.raises(InputsError, match="too small"):
        estimate_norms(nn.BatchNorm1d(3), [torch.randn(8, 3), torch.randn(1, 3)])
    with pytest.raises(InputsError, match="None"):
        estimate_norms(layers, None)
