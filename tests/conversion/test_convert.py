"""Conversions, seen from outside: what comes back, and what is refused."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from small_residual import IMAGES, X, error, net
from torch import nn

import ghostify
from ghostify import GhostConv2d, GhostSpec
from ghostify.conversion import INITIALISERS
from ghostify.errors import ConversionError, InputsError, OptionError, PlanMismatchError
from ghostify.nn.cifar import resnet20, resnet56


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


@pytest.mark.parametrize("name", ["alternating", "least-squares", "sequential"])
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
