"""Which layers share an order of channels, by small networks whose answer is plain to see."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ghostify.tracing import trace


class Net(nn.Module):
    """Three convolutions, joined by a function of the maps."""

    def __init__(self, join, channels=4, **modules):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.c = nn.Conv2d(channels, 5, 1)
        self.join = join
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.c(self.join(self, self.a(x), self.b(x)))


def streams(model):
    return trace(model, torch.randn(2, 3, 8, 8)).streams


def free(found, name):
    return found.made_by[name] not in found.fixed


def test_a_chain_with_its_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3))
    found = streams(model)
    made = found.made_by["0"]
    assert found.sizes[made] == 4
    assert (found.carried_by, found.read_by) == ({"1": (made,)}, {"3": (made,)})
    assert free(found, "0")
    assert not free(found, "3")  # the output


@pytest.mark.parametrize(
    "join",
    [
        lambda net, a, b: a + b,
        lambda net, a, b: a.add_(b),
        lambda net, a, b: torch.sigmoid(b.mean((2, 3), keepdim=True)) * a,
        lambda net, a, b: F.relu(F.max_pool2d(a, 2, 1)) - F.avg_pool2d(b, 2, 1),
        lambda net, a, b: F.pad(a, (1, 1))[:, :, ::2, 1:-1] / 2 + b[:, :, ::2, :],
    ],
)
def test_what_is_added_or_multiplied_is_one_stream(join):
    found = streams(Net(join))
    assert found.made_by["a"] == found.made_by["b"]
    assert found.read_by["c"] == (found.made_by["a"],)
    assert free(found, "a")


def test_a_gate_of_one_channel_is_another_stream():
    found = streams(Net(lambda net, a, b: a * net.one(b), one=nn.Conv2d(4, 1, 1)))
    assert found.made_by["a"] != found.made_by["b"]
    assert free(found, "a")


def test_what_is_concatenated_stays_several_streams():
    found = streams(Net(lambda net, a, b: net.norm(torch.cat([b, a], 1)), channels=8, norm=nn.BatchNorm2d(8)))
    both = (found.made_by["b"], found.made_by["a"])
    assert (found.read_by["c"], found.carried_by["norm"]) == (both, both)


@pytest.mark.parametrize(
    "join",
    [
        lambda net, a, b: a.flip(1) + b,  # who knows what flip does?
        lambda net, a, b: a + b[:, :1].expand_as(b),
        lambda net, a, b: a.view(a.shape[0], 2, 2, 8, 8).transpose(1, 2).flatten(1, 2) + b,
        lambda net, a, b: torch.cat([a[:, :2], b[:, :2]], 1),
        lambda net, a, b: a + b * net.gamma,
        lambda net, a, b: F.layer_norm(a.transpose(1, 3), (4,)).transpose(1, 3) + b,
        lambda net, a, b: net.group(a) + net.group(b),
        lambda net, a, b: torch.add(a, b, alpha=2),
    ],
)
def test_where_the_channels_do_not_stay_alike_their_order_is_fixed(join):
    model = Net(join, group=nn.GroupNorm(2, 4))
    model.gamma = nn.Parameter(torch.rand(4, 1, 1))
    found = streams(model)
    assert not free(found, "a")
    assert not free(found, "b")


class Swish(nn.Module):
    """Named as one of timm's, with a number of its own for every channel."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class HalfReLU(nn.ReLU):
    def forward(self, x):
        return torch.cat([super().forward(x[:, :2]), x[:, 2:]], 1)


class HalfNorm(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([super().forward(x)[:, :2], x[:, 2:]], 1)


class Shift(nn.Conv2d):
    def forward(self, x):
        return super().forward(torch.cat([x[:, :2].roll(1, 2), x[:, 2:]], 1))


class Named(nn.ReLU):
    """A class of one's own that does what its base class does."""


@pytest.mark.parametrize("follow", [Swish(), HalfReLU(), HalfNorm(4), Shift(4, 4, 1)])
def test_a_forward_that_somebody_else_wrote_fixes_the_order(follow):
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), follow, nn.Conv2d(4, 2, 1))), "0")
    assert free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), Named(), nn.Conv2d(4, 2, 1))), "0")


@pytest.mark.parametrize("pool", [nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)), nn.AvgPool3d((3, 1, 1), 1, (1, 0, 0))])
def test_a_pool_that_takes_channels_for_places_fixes_the_order(pool):
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), pool, nn.Conv2d(4, 2, 1))), "0")
    found = streams(Net(lambda net, a, b: F.max_pool3d(a, (3, 1, 1), 1, (1, 0, 0)) + F.max_pool2d(b, 1)))
    assert not free(found, "a")


@pytest.mark.parametrize("groups", [1, 4])
def test_a_view_that_makes_examples_of_channels_fixes_the_order(groups):
    class Rows(Net):
        def forward(self, x):
            a = self.a(x)
            return self.head(a.view(a.size(0) * groups, -1) if groups > 1 else a.view(a.shape[0], -1))

    assert free(streams(Rows(None, head=nn.Linear(4 * 64 // groups, 2))), "a") == (groups == 1)


def test_a_flattened_map_of_one_channel_meets_channels():
    class Meets(Net):
        def forward(self, x):
            places = F.adaptive_avg_pool2d(self.one(x), 2).flatten(1)
            return self.head(places * self.a(x).mean((2, 3), keepdim=True).flatten(1))

    assert not free(streams(Meets(None, one=nn.Conv2d(3, 1, 1), head=nn.Linear(4, 2))), "a")


@pytest.mark.parametrize(
    "follow",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
        nn.Linear(6, 6),
        nn.Unflatten(1, (2, 2)),
    ],
)
def test_a_reader_that_cannot_follow_fixes_the_order(follow):
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), follow)), "0")


def test_a_reader_with_a_hook_fixes_the_order():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    assert free(streams(model), "0")
    model[1].register_forward_pre_hook(lambda module, args: None)
    assert not free(streams(model), "0")


def test_a_shared_module_or_parameter_fixes_the_order():
    norm, conv, twin = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Conv2d(4, 4, 1), norm)), "0")
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), conv, nn.ReLU(), conv, nn.Conv2d(4, 2, 1))), "0")
    twin.weight = conv.weight
    assert not free(streams(nn.Sequential(nn.Conv2d(3, 4, 3), conv, twin, nn.Conv2d(4, 2, 1))), "0")


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)),
        nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(4 * 36, 2)),
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.PReLU(4), nn.ConvTranspose2d(4, 2, 2)),
    ],
)
def test_heads(head):
    found = streams(nn.Sequential(nn.Conv2d(3, 4, 3), head))
    assert free(found, "0")
    assert found.read_by == {"1.2": (found.made_by["0"],)}


def test_maps_flattened_before_they_are_joined_keep_their_order():
    class Two(Net):
        def forward(self, x):
            a, b = self.a(x).flatten(1), F.max_pool2d(self.b(x), 4).flatten(1)
            return self.head(torch.cat([a, b], 1))

    found = streams(Two(None, head=nn.Linear(4 * 64 + 4 * 4, 2)))
    assert not free(found, "a")
    assert not free(found, "b")


def test_a_model_that_cannot_be_traced_has_no_streams():
    class Branching(Net):
        def forward(self, x):
            return self.c(self.a(x) if x.sum() > 0 else self.b(x))

    assert streams(Branching(None)).made_by == {}


@pytest.mark.parametrize(
    "training",
    [
        lambda net, a, b: net.aux(F.relu(a)),  # a head for the loss
        lambda net, a, b: a,  # an output for another loss
        lambda net, a, b: a * net.scale.weight.view(1, 4, 1, 1),
        lambda net, a, b: a if a.sum() > 0 else b,  # nothing is known of it
    ],
)
def test_what_is_read_in_training_alone_fixes_the_order(training):
    class Modal(Net):
        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return (self.head(b), self.c(a), training(self, a, b)) if self.training else (self.head(b), self.c(a))

    modules = {"head": nn.Conv2d(4, 2, 1), "aux": nn.Conv2d(4, 2, 1), "scale": nn.GroupNorm(1, 4)}
    model = Modal(None, **modules).eval()
    model.head.train()
    modes = [module.training for module in model.modules()]
    found = streams(model)
    assert not free(found, "a")
    assert free(found, "b") == ("sum" not in training.__code__.co_names)
    assert [module.training for module in model.modules()] == modes
