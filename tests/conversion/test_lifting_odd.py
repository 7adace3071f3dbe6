"""Odd models whose convolutions are called as functions: they are lifted and whole, or told and left alone."""

import copy
import pickle
import types
import warnings
from typing import Annotated

import pytest
import torch
import torch.nn.functional as F
from odd_models import Base, CallsAFunction, TakesOffItsMean, X, made
from torch import nn

import ghostify
from ghostify.tracing import trace


class OfItsOwn(nn.Module):
    """A convolution; some cannot be entered."""

    def __init__(self, channels, *, bad=False):
        super().__init__()
        self.weight, self.bad = nn.Parameter(torch.randn(channels, channels, 3, 3) / 12), bad

    def forward(self, x):
        if self.bad and x.sum() > 1e9:
            x = -x
        return F.conv2d(x, self.weight, padding=1)


class Annotates(TakesOffItsMean):
    def __init__(self):
        super().__init__()
        self.pre = nn.Identity()
        self.pre.register_buffer("by", torch.ones(1), persistent=False)

    def forward(self, x: Annotated[torch.Tensor, "b c h w"]):
        return super().forward(self.pre(x) * self.pre.by)


class AnnotatesByName(CallsAFunction):
    def forward(self, x: "Tensor"):  # noqa: F821 - as in a file that imports annotations
        return self.body(x)


class HasATensorAsDefault(CallsAFunction):
    def forward(self, x, factor=1.0, scale=torch.ones(1)):  # noqa: B008 - that is what is odd
        return self.body(x * scale * factor)


@pytest.mark.parametrize("kind", [Annotates, AnnotatesByName, HasATensorAsDefault])
def test_annotations_and_defaults_are_no_part_of_a_graph(kind):
    model = made(kind)
    more = {"factor": 3.0, "scale": torch.full((1,), 2.0)}
    given = {"x": X} | (more if kind is HasATensorAsDefault else {})
    keys = list(model.state_dict())
    small = ghostify.convert(model, ratio=2, example_inputs=given)
    assert small.ghostify_plan.lifted
    assert list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(small))
    assert torch.equal(again(**given), small(**given))
    lifted = trace(model, given).model
    assert torch.equal(lifted(**given), model(**given))


class KeepsATensorOnALayer(TakesOffItsMean):
    def __init__(self):
        super().__init__()
        self.pre, self.other = nn.Identity(), nn.Identity()
        self.pre.register_buffer("shift", torch.ones(1), persistent=False)
        self.other.by = torch.ones(1)

    def forward(self, x):
        return super().forward(self.other(self.pre(x) * self.pre.shift) * self.other.by)


class ReadsAnOddName(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.code = torch.ones(8, 1, 1)

    def forward(self, x):
        return self.body(x * self.code)


class SetsData(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        self.gain.data = self.gain.data.clamp(0, 1)
        return self.body(x * self.gain)


class SeedsItself(CallsAFunction):
    def forward(self, x):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            x = F.dropout(x, 0.5)
        return self.body(x)


class HasItsOwnHalf(CallsAFunction):
    def half(self):
        super().half()
        self.b1.float()
        return self


class IsPatched(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.train = types.MethodType(lambda self, mode=True: self, self)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (KeepsATensorOnALayer, "torch cannot make a module of its graph"),
        (ReadsAnOddName, "a graph has a 'code' of its own"),
        (SetsData, "a part of the forward has no gradients"),
        (SeedsItself, r"there is no graph \(its graph gives other outputs"),
        (HasItsOwnHalf, "the model itself has a half of its own"),
        (IsPatched, "the model itself has a train of its own"),
    ],
)
def test_what_a_graph_would_lose_is_told_and_stays(kind, reason):
    model = made(kind)
    state = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f"calls as functions stay as they are: {reason}"):
        plan = ghostify.plan(model, example_inputs=X)
    assert not plan.lifted
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class LeavesItsMean(TakesOffItsMean):
    def forward(self, x):
        if isinstance(x, torch.Tensor):  # and not a stand-in
            self.mean.mul_(0.5)
        return self.body(x)


class Turns(LeavesItsMean):
    """Only the imaginary part is another."""

    def __init__(self):
        super().__init__()
        self.mean = torch.zeros(3, dtype=torch.complex64)

    def forward(self, x):
        if isinstance(x, torch.Tensor):
            self.mean.add_(1j)
        return self.body(x)


class Widens(LeavesItsMean):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            self.mean = self.mean.double()
        return self.body(x)


@pytest.mark.parametrize("kind", [LeavesItsMean, Turns, Widens])
def test_what_a_training_run_leaves_in_buffers_is_compared(kind):
    with pytest.warns(UserWarning, match=r"in training a graph leaves something else in mean"):
        assert not ghostify.plan(made(kind), example_inputs=X).lifted


def test_a_model_on_meta_is_lifted():
    with torch.device("meta"):
        model = CallsAFunction().eval()
    assert ghostify.plan(model, example_inputs=X.to("meta")).lifted


class CopiesItsInput(CallsAFunction):
    def forward(self, x):
        return self.body(copy.copy(x))


def test_a_forward_may_copy_what_it_is_given():
    assert ghostify.plan(made(CopiesItsInput), example_inputs=X).lifted


class Standardised(CallsAFunction):
    def body(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return super(CallsAFunction, self).body(x + F.conv2d(F.relu(self.c0(x)), weight, padding=1)[:, :8])


class Blurs(Base):
    def body(self, x):
        return super().body(x + F.conv2d(x.mean(1, keepdim=True), torch.ones(1, 1, 3, 3) / 9, padding=1))


def test_convolutions_whose_weights_are_computed_are_told():
    with pytest.warns(UserWarning, match=r"stay as they are: weights are computed \(calls: 1\)"):
        assert not ghostify.plan(made(Standardised), example_inputs=X).lifted
    with warnings.catch_warnings():  # not those inside a convolution module, nor a blur
        warnings.simplefilter("error")
        trace(made(Blurs), X)
        trace(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))), X)


def test_only_those_that_cannot_be_entered_are_told_and_the_others_are_lifted():
    model = nn.Sequential(*(OfItsOwn(8, bad=place == 5) for place in range(12))).eval()
    with pytest.warns(UserWarning, match=r"stay as they are: 5 \(5: FX cannot trace what is inside"):
        plan = ghostify.plan(model, example_inputs=X)
    assert len(plan.lifted) == 11
    assert "5" not in plan.lifted


class TrainsItsOwnWay(nn.Sequential):
    def train(self, mode=True):
        return super().train(mode)


def test_a_reason_that_all_share_is_told_once():
    model = TrainsItsOwnWay(nn.Conv2d(8, 8, 3, padding=1), *(OfItsOwn(8) for _ in range(6))).eval()
    with pytest.warns(UserWarning, match="stay as they are: the model itself has a train of its own$"):
        trace(model, X)


def test_a_copy_that_shares_its_parts_is_whole():
    model = made(Annotates)
    small = ghostify.convert(model, ratio=2, example_inputs=X)
    keys = list(small.state_dict())
    small.meta["note"] = "kept"
    again = copy.copy(small)
    assert again.meta == small.meta
    assert list(again.state_dict()) == list(small.state_dict()) == keys
    assert again.ghostify_plan is small.ghostify_plan
    assert again.head is small.head
    assert torch.equal(again(X), small(X))
    assert type(again).__name__ == type(copy.deepcopy(small)).__name__ == "Annotates"


@pytest.mark.parametrize(
    "options", [{"stride": (2,)}, {"padding": (1,)}, {"dilation": (2,)}, {"stride": (2,), "padding": (1,)}]
)
def test_options_of_one_number_count_for_all_sides(options):
    images = torch.randn(64, 8, 12, 12)
    made_of = []
    for given in (options, {name: number * 2 for name, number in options.items()}):
        torch.manual_seed(0)
        convolutions = [nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, **given), nn.Conv2d(16, 4, 1)]
        model = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2]).eval()
        made_of.append(ghostify.convert(model, ratio=1.25, calibration=images)(images))
    assert torch.equal(*made_of)
