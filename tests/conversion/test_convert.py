"""Conversions, seen from outside: what comes back, from which start, and what is refused."""

import copy
import math
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify import GhostConv2d, GhostSpec
from ghostify.conversion import INITIALISERS, refinement, walk
from ghostify.conversion.initialisers import NEED_CALIBRATION
from ghostify.conversion.walk import walk_calls, walk_graph
from ghostify.errors import ConversionError, InputsError, OptionError, PlanMismatchError
from ghostify.nn import GhostConv
from ghostify.nn.cifar import CifarResNet, resnet20, resnet56
from ghostify.nn.selection import select_channels
from ghostify.tracing import Example, evaluating

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def net():
    """A small residual network whose norms have seen something."""
    torch.manual_seed(0)
    model = CifarResNet(1, width=8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def error(small, model):
    with torch.no_grad(), evaluating(small, model):
        return float((small(X) - model(X)).square().mean() / model(X).var())


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


@pytest.mark.parametrize("inputs", [IMAGES, [IMAGES[:40], IMAGES[40:]], [(IMAGES, torch.zeros(96))]])
def test_forms_of_calibration(inputs):
    small = ghostify.convert(net(), ratio=2, calibration=inputs)
    assert error(small, net()) < 0.5


@pytest.mark.parametrize(
    ("calibration", "told"),
    [([], "calibration is empty"), (IMAGES * float("nan"), "NaN"), ([3], "type int")],
)
def test_bad_calibration(calibration, told):
    with pytest.raises(InputsError, match=told):
        ghostify.convert(net(), example_inputs=X, calibration=calibration)


def test_unknown_initialiser_and_missing_calibration():
    with pytest.raises(OptionError, match="initialiser='best'"):
        ghostify.convert(net(), example_inputs=X, initialiser="best")
    with pytest.raises(OptionError, match="needs calibration"):
        ghostify.convert(net(), example_inputs=X, initialiser="sequential")


def test_a_plan_for_another_model():
    plan = ghostify.plan(resnet20(), example_inputs=torch.zeros(1, 3, 32, 32))
    with pytest.raises(PlanMismatchError, match="another model"):
        ghostify.apply(plan, net())
    with pytest.raises(PlanMismatchError, match="other parameters"):
        ghostify.apply(plan, resnet56())


@pytest.mark.parametrize("options", [{"stride": 2}, {"bias": False}, {"padding": 2, "dilation": 2}])
def test_a_plan_for_other_options_of_a_convolution(options):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 8, 3))
    plan = ghostify.plan(model, example_inputs=torch.zeros(1, 3, 16, 16))
    model[1] = nn.Conv2d(8, 32, 3, **{"padding": 1, **options})
    with pytest.raises(PlanMismatchError, match="another model"):
        ghostify.apply(plan, model)


def test_a_plan_that_was_changed_by_hand_must_add_up():
    model = resnet20()
    plan = ghostify.plan(model, example_inputs=torch.zeros(1, 3, 32, 32))
    first = next(decision for decision in plan if decision.replaced)

    def changed(**changes):
        decisions = [replace(first, **changes) if decision is first else decision for decision in plan]
        return replace(plan, decisions=tuple(decisions))

    for changes, told in [
        ({"spec": GhostSpec(3)}, "params_after=.* and s=3 gives"),
        ({"macs_after": 7}, "macs_after=7, and s=2 gives"),
        ({"spec": GhostSpec(2, 99_999)}, "too small to pay"),
    ]:
        with pytest.raises(PlanMismatchError, match=rf"does not add up at site='layer1\.0\.conv1': {told}"):
            ghostify.apply(changed(**changes), model)


def test_a_plan_for_placement_paper_must_fit_what_follows():
    model = resnet20()
    plan = ghostify.plan(model, example_inputs=torch.zeros(1, 3, 32, 32), spec=GhostSpec(2, placement="paper"))
    first = next(decision for decision in plan if decision.replaced)
    site = replace(first.site, chain=replace(first.site.chain, norm="fc"))
    decisions = [replace(first, site=site) if decision is first else decision for decision in plan]
    with pytest.raises(PlanMismatchError, match=r"is followed by .*bn1.* in this model, and by .*fc"):
        ghostify.apply(replace(plan, decisions=tuple(decisions)), model)


def test_an_error_leaves_the_model_alone():
    model = net().train()
    state = copy.deepcopy(model.state_dict())

    def broken(conversion):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        ghostify.convert(model, example_inputs=X, initialiser=broken)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_converted_model_has_nothing_left_to_convert():
    small = ghostify.convert(net(), example_inputs=X)
    with pytest.raises(ghostify.GhostifyError, match="inside a Ghost unit"):
        ghostify.convert(small, example_inputs=X)


@pytest.mark.parametrize("fault", ["shape", "nan"])
def test_a_unit_that_breaks_its_promise_is_caught(fault, monkeypatch):
    forward = GhostConv2d.forward

    def wrong(self, x):
        made = forward(self, x)
        return made[:, :, 1:] if fault == "shape" else made * float("nan")

    monkeypatch.setattr(GhostConv2d, "forward", wrong)
    with pytest.raises(ConversionError):
        ghostify.convert(net(), example_inputs=X)


class Forgetful(nn.Module):
    """Copies of it forget a number that is no parameter."""

    def __init__(self):
        super().__init__()
        self.net, self.scale = net(), 1.0

    def forward(self, x):
        return self.net(x) * self.scale

    def __deepcopy__(self, memo):
        made = Forgetful()
        made.net = copy.deepcopy(self.net, memo)
        return made


class Counting(Forgetful):
    """Gives something else every time."""

    def forward(self, x):
        Counting.calls = getattr(Counting, "calls", 0) + 1
        return self.net(x) + Counting.calls


@pytest.mark.parametrize("kind", [Forgetful, Counting])
def test_what_cannot_be_verified_is_an_error(kind):
    """Shapes are right, and nothing else tells that the copy is not the model any more."""
    model = kind().eval()
    model.scale = 2.0
    with pytest.raises(ConversionError, match="With stand-ins that compute what the original convolutions compute"):
        ghostify.convert(model, example_inputs=X)


def test_a_model_that_cannot_be_copied():
    model = net()
    model.lock = threading.Lock()
    with pytest.raises(ConversionError, match=r"CifarResNet cannot be copied: TypeError: .*lock.*Take what cannot"):
        ghostify.convert(model, example_inputs=X)


@pytest.mark.parametrize("name", list(INITIALISERS))
def test_broken_weights_are_named(name):
    model = net()
    model.layer2[0].bn1.running_var[3] = float("nan")
    with pytest.raises(InputsError, match=r"model: layer2\.0\.bn1\.running_var holds NaN"):
        ghostify.convert(model, example_inputs=X, calibration=IMAGES, initialiser=name)


@pytest.mark.parametrize("name", sorted(NEED_CALIBRATION))
def test_maps_that_overflow_are_named(name):
    model = net()
    model.bn1.weight.data *= 1e38
    with pytest.raises(InputsError, match=r"site='layer1\.0\.conv1': on the calibration inputs, its maps hold NaN"):
        ghostify.convert(model, example_inputs=X, calibration=IMAGES * 100, initialiser=name)


def test_conversion_inside_inference_mode_can_be_trained():
    with torch.inference_mode():
        small = ghostify.convert(net(), example_inputs=X, calibration=IMAGES)
    small.train()(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x) if x.sum() > -1e9 else x


def test_what_fx_cannot_trace_is_converted_from_a_recorded_run():
    model = Untraceable().eval()
    small = ghostify.convert(model, example_inputs=X, calibration=IMAGES)
    assert small.ghostify_plan.trace_way == "recorded"
    assert "FX could not trace" in str(small.ghostify_plan)
    assert len(small.ghostify_plan.replaced) == 6
    plain = ghostify.convert(model, example_inputs=X, initialiser="first")
    assert error(small, model) < error(plain, model)


class InPlace(nn.Module):
    """Adds in place to tensors that both branches read."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        shared = self.stem(x)
        out = self.norm(self.a(shared))
        view = shared[:, :4]
        shared.add_(out)  # not +=, which FX makes an addition that is not in place
        shared.relu_()
        shared.add_(self.b(F.relu(shared)))
        shared = torch.cat([view, shared[:, 4:]], 1)
        return self.head(shared.mean((2, 3)))


def test_the_walk_computes_what_the_models_compute():
    torch.manual_seed(0)
    model = InPlace().eval()
    seen = {}

    def spy(conversion):
        graph, student = conversion.facts.graph, conversion.student
        with torch.no_grad():
            for visit in walk_graph(graph, model, student, conversion.decisions, conversion.chunks):
                seen[visit.decision.site.name] = (visit.inputs[0].clone(), visit.targets[0].clone())

    small = ghostify.convert(model, example_inputs=X, calibration=X, initialiser=spy)
    caught = {}
    for owner, side in ((small, 0), (model, 1)):
        for name in ("a", "b"):
            owner.get_submodule(name).register_forward_hook(
                lambda module, args, output, key=(name, side): caught.update(
                    {key: (args[0] if key[1] == 0 else output).clone()}
                )
            )
        with torch.no_grad():
            owner(X)
    for name, (inputs, targets) in seen.items():
        assert torch.allclose(inputs, caught[name, 0], atol=1e-5)
        assert torch.allclose(targets, caught[name, 1], atol=1e-5)
    assert set(seen) == {"a", "b"}


class Narrowing(nn.Module):
    """Maps become smaller; nothing is replaced before the first pooling."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3)
        self.c, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 2)

    def forward(self, x):
        x = F.max_pool2d(self.a(F.relu_(self.stem(x))), 2)
        x = F.relu(self.b(x), inplace=True)
        x = x + self.c(x)
        return self.head(x.mean((2, 3)))


def test_where_maps_are_large_fewer_images_are_on_their_way(monkeypatch):
    """Six chunks: two fit at first, the others join as maps shrink, and are what they would have been."""
    torch.manual_seed(0)
    model = Narrowing().eval()

    def visits(memory):
        seen = {}

        def spy(conversion):
            student = conversion.student
            with torch.no_grad():
                for visit in walk_graph(
                    conversion.facts.graph, model, student, conversion.decisions, conversion.chunks, memory
                ):
                    name = visit.decision.site.name
                    seen[name] = [tuple(map(torch.clone, pair)) for pair in zip(visit.inputs, visit.targets)]
                    student.get_submodule(name).primary_conv.weight.mul_(1.1)  # as a fit changes it

        ghostify.convert(
            model, example_inputs=X, calibration=[IMAGES[i : i + 16] for i in range(0, 96, 16)], initialiser=spy
        )
        return seen

    everything = visits(2**30)
    assert {name: len(chunks) for name, chunks in everything.items()} == {"a": 6, "b": 6, "c": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        some = visits(2 * 4 * 32 * (8 * 14 * 14 + 16 * 12 * 12 + 100))
    counts = {name: len(chunks) for name, chunks in some.items()}
    assert counts == {"a": 2, "b": 6, "c": 6}
    for name, chunks in some.items():
        for pair, wanted in zip(chunks, everything[name]):
            assert all(map(torch.equal, pair, wanted))
    with pytest.warns(UserWarning, match="uses 16 of 96 inputs"):
        assert {name: len(chunks) for name, chunks in visits(1).items()} == {"a": 1, "b": 1, "c": 1}


def test_without_a_graph_only_what_fits_is_used():
    torch.manual_seed(0)
    model = Narrowing().eval()
    decisions = {d.site.name: d for d in ghostify.plan(model, example_inputs=X).replaced}
    chunks = [Example.of(IMAGES[i : i + 16]) for i in range(0, 96, 16)]
    memory = 8 * 40 * (8 * 14 * 14 + 16 * 12 * 12)
    with torch.no_grad():
        counts = {
            visit.decision.site.name: len(visit.inputs) for visit in walk_calls(model, model, decisions, chunks, memory)
        }
    assert counts == {"a": 2, "b": 6, "c": 6}


def test_how_many_images_are_used():
    read = []

    def batches():
        for start in range(0, 96, 8):
            read.append(start)
            yield IMAGES[start : start + 8]

    sizes = []
    ghostify.convert(
        net(),
        example_inputs=X,
        calibration=batches(),
        images=20,
        initialiser=lambda conversion: sizes.extend(chunk.batch for chunk in conversion.chunks),
    )
    assert (read, sizes) == ([0, 8, 16], [8, 8, 8])
    with pytest.raises(OptionError, match="images=0 is not a whole number"):
        ghostify.convert(net(), example_inputs=X, calibration=IMAGES, images=0)


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
