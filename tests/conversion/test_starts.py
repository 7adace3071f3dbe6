"""What the starts are worth: each of them, and the rules that make one better."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from small_residual import IMAGES, X, error, net
from torch import nn

import ghostify
from ghostify import GhostConv2d, GhostSpec
from ghostify.conversion import INITIALISERS, refinement, walk
from ghostify.conversion.fits import Fit, with_fits
from ghostify.nn import GhostConv
from ghostify.nn.cifar import CifarResNet
from ghostify.nn.selection import select_channels


@pytest.mark.parametrize("name", INITIALISERS)
@pytest.mark.parametrize("fusion", ["concat", "add", "mul"])
@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_every_start(name, fusion, placement):
    model = net().train()
    model.layer2.eval()
    state = copy.deepcopy(model.state_dict())
    spec = GhostSpec(2, 3, fusion, placement)
    made = [
        ghostify.convert(model, spec=spec, example_inputs=X, calibration=IMAGES, initialiser=name, seed=3)
        for _ in range(2)
    ]
    small = made[0]
    assert type(small) is CifarResNet
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] != [False] * len(list(model.modules()))
    assert small.layer1.training
    assert not any(module.training for module in small.layer2.modules())
    assert all(torch.equal(a, b) for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values()))
    assert sum(p.numel() for p in small.parameters()) == small.ghostify_plan.params_after
    assert {key for key in state if key.startswith("linear")} <= set(small.state_dict())


def test_better_starts_are_better():
    model = net()
    errors = {
        name: error(ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser=name), model)
        for name in ("first", "least-squares", "sequential", "alternating")
    }
    assert errors["alternating"] < 0.8 * errors["sequential"]
    assert errors["sequential"] < errors["least-squares"] < errors["first"]


@pytest.mark.parametrize("name", ["least-squares", "sequential"])
def test_the_error_that_is_told_is_the_one_in_the_converted_model(name):
    model = net()
    small = ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser=name, overrides={"layer1.*": 4})
    site = [decision for decision in small.ghostify_plan.replaced if decision.site.name.endswith("conv1")][-1]
    maps = []
    for one in (model, small):
        layer = one.get_submodule(site.site.name)
        with torch.no_grad():
            handle = layer.register_forward_hook(lambda module, args, made: maps.append(made))
            one.eval()(IMAGES[:32])
            handle.remove()
    targets, made = maps
    made = made[:, small.get_submodule(site.site.name).output_channels.argsort()]
    norm = model.get_submodule(site.site.chain.norm)
    weight = (norm.weight / (norm.running_var + norm.eps).sqrt()).square().detach()
    missed, whole = ((weight * some.var((0, 2, 3))).sum() for some in (targets - made, targets))
    assert site.error == pytest.approx(float(missed / whole), rel=0.05)


def test_an_error_that_is_no_number_is_warned_of():
    plan = ghostify.plan(net(), example_inputs=X)
    with pytest.warns(UserWarning, match=r"1 of 2 Ghost units start with more than 50% .*layer1.0.conv1 \(nan%\)"):
        with_fits(plan, {"layer1.0.conv1": Fit(0.5, math.nan), "layer1.0.conv2": Fit(0.5, 0.1)})


def test_a_site_that_is_called_again_is_told_of():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.site, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.site(torch.relu(self.site(torch.relu(self.stem(x))))).mean((2, 3)))

    with pytest.warns(UserWarning, match="site='site' is called 2 times in a run: its unit is fitted to the first"):
        ghostify.convert(Twice(), calibration=IMAGES)


def test_a_refinement_that_may_cost_less_is_shorter_and_still_helps(monkeypatch):
    model, passes = net(), []
    step = refinement._step

    def counted(site, left, factors, steps):
        passes.append(steps)
        return step(site, left, factors, steps)

    monkeypatch.setattr(refinement, "_step", counted)
    small = ghostify.convert(model, example_inputs=X, calibration=IMAGES)
    sites = len(small.ghostify_plan.replaced)
    assert passes == [6] * 4 * sites
    passes.clear()
    monkeypatch.setattr(refinement, "_MOST_MACS", 1e6)
    limited = ghostify.convert(model, example_inputs=X, calibration=IMAGES)
    assert passes == [3] * sites
    sequential = ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser="sequential")
    assert error(small, model) < error(limited, model) < error(sequential, model)


class ShortcutThatDrifts(nn.Module):
    """A residual block whose shortcut starts with a convolution that is replaced."""

    def __init__(self):
        super().__init__()
        self.stem, self.before = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.closing, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.before(self.stem(x))
        return x + self.norm(self.closing(F.relu(x)))


def test_the_layer_that_closes_a_block_makes_up_for_its_shortcut(monkeypatch):
    """The other sign would double what is lost, and none at all would leave it."""
    torch.manual_seed(0)
    model = ShortcutThatDrifts().eval()
    tail_of = walk.tail_of
    errors = {}
    for name, sign in (("made up for", 1), ("left", 0), ("doubled", -1)):

        def signed(*args, sign=sign):
            tail = tail_of(*args)
            return replace(tail, drift=[sign * d for d in tail.drift or ()] or None)

        monkeypatch.setattr(walk, "tail_of", signed)
        small = ghostify.convert(model, example_inputs=X, calibration=IMAGES, overrides={"closing": 1.3})
        errors[name] = error(small, model)
    assert errors["made up for"] < 0.9 * errors["left"] < 0.9 * errors["doubled"]


class ShortcutAfterwards(nn.Module):
    """A residual block that computes its shortcut after its closing convolution, as torchvision's do."""

    def __init__(self):
        super().__init__()
        self.stem, self.before = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.closing, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        x = self.before(self.stem(x))
        closed = self.norm(self.closing(F.relu(x)))
        return F.relu(closed + self.shortcut(x))


def test_shortcuts_are_known_before_the_layer_that_closes_the_block(monkeypatch):
    torch.manual_seed(0)
    model = ShortcutAfterwards().eval()
    tails = []
    tail_of = walk.tail_of
    monkeypatch.setattr(walk, "tail_of", lambda *args: tails.append(tail_of(*args)) or tails[-1])
    ghostify.convert(model, example_inputs=X, calibration=IMAGES, overrides={"closing": 2})
    before, closing = tails
    assert before.drift is before.addend is None
    assert before.norm is None  # two nodes read it
    assert closing.norm is model.norm
    assert closing.drift is not None
    assert closing.addend is not None
    assert (closing.low, closing.high) == (0, math.inf)


@pytest.mark.parametrize(
    ("activation", "limits"),
    [
        (nn.ReLU(inplace=True), (0, math.inf)),
        (nn.ReLU6(), (0, 6)),
        (nn.Hardtanh(-0.5, 0.5), (-0.5, 0.5)),
        (nn.Hardtanh(-100, 0), (-100, 0)),
        (nn.SiLU(), (-math.inf, math.inf)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_activation_cuts_off_need_not_be_right(monkeypatch, activation, limits):
    """With its limits known the error behind the activation is smaller than without them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), activation)
    model.train()(IMAGES)
    model.eval()
    aware = ghostify.convert(model, example_inputs=X, calibration=IMAGES, overrides={"1": 2})
    tails = []
    tail_of = walk.tail_of

    def linear(*args):
        tails.append(tail_of(*args))
        return replace(tails[-1], low=-math.inf, high=math.inf)

    monkeypatch.setattr(walk, "tail_of", linear)
    unaware = ghostify.convert(model, example_inputs=X, calibration=IMAGES, overrides={"1": 2})
    assert [(tail.low, tail.high) for tail in tails] == [limits]
    if math.inf in limits and 0 not in limits:
        assert error(aware, model) == error(unaware, model)
    else:
        assert error(aware, model) < error(unaware, model)


def test_without_calibration_the_weights_are_used():
    model = net()
    default = ghostify.convert(model, example_inputs=X)
    named = ghostify.convert(model, example_inputs=X, initialiser="weights")
    assert all(torch.equal(a, b) for a, b in zip(default.state_dict().values(), named.state_dict().values()))


@pytest.mark.parametrize("name", ["weights", "least-squares", "sequential", "alternating"])
def test_a_layer_that_can_be_represented_is_recovered(name):
    """Four filters and four multiples of them, shuffled: a Ghost unit can be exact, so it must be."""
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 8, 3, bias=False, padding=1)
    with torch.no_grad():
        conv.weight[4:] = conv.weight[:4] * torch.tensor([2.0, -1.0, 0.5, 3.0]).view(-1, 1, 1, 1)
        conv.weight.copy_(conv.weight[torch.randperm(8)])
    model = nn.Sequential(nn.Conv2d(3, 5, 1), conv, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 256, 2)).eval()
    small = ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser=name)
    assert isinstance(small[1], GhostConv2d)
    assert error(small, model) < 1e-4


@pytest.mark.parametrize("name", ["weights", "least-squares", "sequential", "alternating"])
@pytest.mark.parametrize("fusion", ["concat", "add"])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(8, 8, 3, bias=False, padding=1),
        nn.Conv3d(16, 8, (2, 3, 3), bias=False, padding=1, dilation=(1, 2, 1)),
        nn.ConvTranspose1d(16, 8, 4, stride=2, bias=False),
        nn.ConvTranspose2d(32, 8, 3, stride=2, groups=2, bias=False),
        nn.ConvTranspose3d(64, 8, 2, stride=2, bias=False),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_a_layer_of_any_kind_is_recovered(conv, fusion, name):
    """As above: the last channels of every group are multiples of the first ones."""
    torch.manual_seed(0)
    conv, dims = copy.deepcopy(conv), len(conv.kernel_size)
    channels = 1 if conv.transposed else 0
    per_group = conv.weight.shape[1] if conv.transposed else 8
    with torch.no_grad():
        first, last = conv.weight.chunk(2, channels) if per_group == 8 else conv.weight.chunk(2, 1)
        last.copy_(-2 * first)
    x, many = torch.randn(2, 3, *(9, 8, 7)[:dims]), torch.randn(48, 3, *(9, 8, 7)[:dims])
    stem = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](3, conv.in_channels, 1)
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims](8)
    model = nn.Sequential(stem, conv, norm, nn.Flatten(), nn.LazyLinear(2)).eval()
    model(x)
    small = ghostify.convert(
        model, spec=GhostSpec(2, fusion=fusion), example_inputs=x, calibration=many, initialiser=name
    )
    assert isinstance(small[1], GhostConv)
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=0.02 * float(model(x).std()))


def test_chosen_channels_are_copied_and_nothing_else():
    conv = nn.Conv2d(3, 8, 3)
    half = select_channels(conv, torch.tensor([7, 0]))
    assert torch.equal(half.weight, conv.weight[[7, 0]])
    assert torch.equal(half.bias, conv.bias[[7, 0]])
    assert half.weight.data_ptr() != conv.weight.data_ptr()


class NormAct(nn.BatchNorm2d):
    """As timm's: the activation is inside the norm."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.act = act

    def forward(self, x):
        return self.act(super().forward(x))


class FrozenNorm(nn.Module):
    """As torchvision's: buffers only."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight / (self.running_var + self.eps).sqrt()
        return x * scale.view(-1, 1, 1) + (self.bias - self.running_mean * scale).view(-1, 1, 1)


@pytest.mark.parametrize("norm", [NormAct(8, nn.ReLU()), NormAct(8, nn.Identity()), FrozenNorm(8)])
def test_norms_of_other_kinds_take_the_mean_too(norm):
    torch.manual_seed(0)
    norm.running_mean.normal_(0, 0.3)
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), conv, norm, nn.Flatten(), nn.Linear(8 * 256, 2)).eval()
    # The start that matches all values, not only those behind the activation.
    small = ghostify.convert(model, ratio=2, example_inputs=X, calibration=IMAGES, initialiser="sequential")
    (decision,) = small.ghostify_plan.replaced
    assert decision.site.chain.norm == "2"
    assert type(norm).__name__ in decision.site.chain.paper_obstacle
    with torch.no_grad():
        old, new = (owner[0:2](IMAGES).mean((0, 2, 3)) - owner[2].running_mean for owner in (model, small))
    # A norm of a class that nobody knows may treat channels by their places: their order stays.
    assert decision.order == "index"
    assert torch.allclose(old, new, atol=1e-4)
    assert not torch.equal(small[2].running_mean, norm.running_mean)
