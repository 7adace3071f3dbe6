"""Models whose functional convolutions stay: a graph would lose what the forward does, or what the model holds."""

import copy
import random
from functools import partial

import numpy
import pytest
import torch
import torch.nn.functional as F
from odd_models import CallsAFunction, TakesOffItsMean, X, converted, made
from torch import nn

import ghostify
from ghostify.errors import PlanError


class ChoosesByABuffer(TakesOffItsMean):
    """What it computes hangs on a number, so FX has to see that and not a stand-in."""

    def forward(self, x):
        return super().forward(x if self.mean[0] < 0 else -x)


class ScalesByName(CallsAFunction):
    """FX does not see how it comes to these parameters."""

    def __init__(self):
        super().__init__()
        self.gains = nn.ParameterDict({"gain": nn.Parameter(torch.ones(8))})

    def forward(self, x):
        for _, gain in self.gains.named_parameters():
            x = x * gain.view(1, -1, 1, 1)
        return self.body(x)


class BranchesInTraining(CallsAFunction):
    def forward(self, x):
        return self.body(x + torch.randn_like(x) if self.training else x)


class DropsInTraining(CallsAFunction):
    def forward(self, x):
        return self.body(F.dropout(x, 0.1, self.training))


class ScalesByANumber(TakesOffItsMean):
    def forward(self, x):
        return super().forward(x * float(self.mean[-1]))


class ReadsWithoutAName(TakesOffItsMean):
    def forward(self, x):
        return self.body(x - self._buffers["mean"].view(1, -1, 1, 1))


class Counts(TakesOffItsMean):
    def forward(self, x):
        self.mean = self.mean * 0.9
        return self.body(x)


class Remembers(CallsAFunction):
    def forward(self, x):
        self.seen = x.mean()
        return self.body(x)


class MakesAnotherInTraining(CallsAFunction):
    def forward(self, x):
        return self.body(x + torch.tensor(5.0 if self.training else 1.0))


class DrawsInTraining(CallsAFunction):
    def forward(self, x):
        noise = torch.randn(1, 8, 1, 1) if self.training else torch.zeros(1, 8, 1, 1)
        return self.body(x + noise)


class LeavesOutAtRandom(CallsAFunction):
    def forward(self, x):
        return self.body(x if self.training and torch.rand(1).item() < 0.1 else 2 * x)


class LeavesOutByPython(CallsAFunction):
    def forward(self, x):
        return self.body(x if self.training and random.random() < 0.1 else 2 * x)


class IsFrozenInPart(CallsAFunction):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2
        return self.body(x)


class IsExactInPart(CallsAFunction):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = x * 2
        return self.body(x)


class IsRoughInTraining(CallsAFunction):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return self.body(x)


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class TurnsGradients(CallsAFunction):
    def forward(self, x):
        return self.body(Turned.apply(x))


class FreezesItsNorms(CallsAFunction):
    def forward(self, x):
        return self.body(x)

    def train(self, mode=True):
        super().train(mode)
        self.b1.eval()
        return self


class HasAGraph(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.meta = nn.Linear(2, 2)

    def forward(self, x):
        return self.body(x)


class IsWatched(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, args, output: None)

    def forward(self, x):
        return self.body(x)


class IsOtherWithAutocast(CallsAFunction):
    def forward(self, x):
        return self.body(x * 3 if torch.is_autocast_enabled("cpu") else x)


class LeavesOutByItsOwn(CallsAFunction):
    """Three kinds of generators; nobody else draws from them."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        draw = getattr(self.generator, "random", None) or partial(self.draw, self.generator)
        return self.body(x if self.training and float(draw()) < 0.1 else 2 * x)

    @staticmethod
    def draw(generator):
        return torch.rand(1, generator=generator)


class AsksWhatItIsGiven(CallsAFunction):
    def forward(self, x):
        return self.body(x * 2 if self.training and isinstance(x, torch.Tensor) else x)


class IsGated(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("gate", torch.tensor(0.0))

    def forward(self, x):
        return self.body(-x if dict(self.named_buffers())["gate"] > 0.5 else x)


class CastsToItsOwn(CallsAFunction):
    def forward(self, x):
        return self.body(x.to(next(self.parameters()).dtype))


class LogsDeepInside(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.log = {"means": []}

    def forward(self, x):
        self.log["means"].append(x.mean())
        return self.body(x)


class WantsTargets(CallsAFunction):
    def forward(self, x, targets=None):
        if self.training and targets is None:
            raise ValueError("targets are needed in training")
        return self.body(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (IsOtherWithAutocast, "the forward does something else where autocast is on"),
        (partial(LeavesOutByItsOwn, random.Random(0)), "the forward draws random numbers"),
        (partial(LeavesOutByItsOwn, numpy.random.default_rng(0)), "the forward draws random numbers"),
        (partial(LeavesOutByItsOwn, numpy.random.RandomState(0)), "the forward draws random numbers"),
        (partial(LeavesOutByItsOwn, torch.Generator()), "the forward draws random numbers"),
        (AsksWhatItIsGiven, "in training a graph gives other outputs"),
        (IsGated, "what it does depends on"),
        (CastsToItsOwn, "what it does depends on"),
        (LogsDeepInside, "the forward changes LogsDeepInside.log"),
        (WantsTargets, "in training, or .* it cannot be traced .*targets are needed"),
        (ChoosesByABuffer, "in training, or with buffers as a part of the graph, it cannot be traced"),
        (ScalesByANumber, "in training, or with buffers as a part of the graph, it cannot be traced"),
        (ScalesByName, "what it does depends on"),
        (ReadsWithoutAName, "what it does depends on"),
        (Counts, "the forward changes Counts._buffers"),
        (Remembers, "the forward changes Remembers.seen"),
        (BranchesInTraining, "what it does depends on"),
        (DropsInTraining, "what it does depends on"),
        (MakesAnotherInTraining, "what it does depends on"),
        (DrawsInTraining, "the forward draws random numbers"),
        (LeavesOutAtRandom, "the forward draws random numbers"),
        (LeavesOutByPython, "the forward draws random numbers"),
        (IsFrozenInPart, "a part of the forward has no gradients"),
        (IsExactInPart, "a part of the forward has .* a precision of its own"),
        (IsRoughInTraining, "a part of the forward has .* a precision of its own"),
        (TurnsGradients, "a part of the forward has .* gradients of its own"),
        (FreezesItsNorms, "the model itself has a train of its own"),
        (HasAGraph, "a graph has a 'meta' of its own"),
        (IsWatched, "the model itself carries hooks"),
    ],
)
@torch.no_grad()
def test_nothing_is_lifted_where_a_graph_would_lose_what_the_model_holds_or_does(kind, reason):
    model = made(kind)
    before, parameters = copy.deepcopy(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    told = f"convolutions that {type(model).__name__} calls as functions stay as they are: {reason}"
    with pytest.warns(UserWarning, match=told):
        plan = ghostify.plan(model, example_inputs=X)
    assert plan.trace_way == "fx"
    assert not plan.lifted
    assert {decision.site.name for decision in plan.replaced} == {"c2"}
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def own(name):
    """A model with a method of its own, which does what torch's does."""

    def method(self, *args, **kwargs):
        return getattr(CallsAFunction, name)(self, *args, **kwargs)

    return type("HasItsOwn", (CallsAFunction,), {name: method, "forward": lambda self, x: self.body(x)})()


@pytest.mark.parametrize("name", ["__call__", "eval", "_apply", "to", "state_dict", "load_state_dict"])
def test_nothing_is_lifted_where_the_model_has_a_way_of_its_own(name):
    with pytest.warns(UserWarning, match=f"stay as they are: the model itself has a {name} of its own"):
        assert not ghostify.plan(own(name), example_inputs=X).lifted


@pytest.mark.parametrize(
    "register",
    [
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ],
)
def test_nothing_is_lifted_where_hooks_change_what_is_stored(register):
    model = own("forward")
    getattr(model, register)(lambda *args: None)
    with pytest.warns(UserWarning, match="stay as they are: the model itself carries hooks"):
        assert not ghostify.plan(model, example_inputs=X).lifted


def test_numbers_of_another_kind_are_tried_in_double_precision_too():
    with pytest.warns(UserWarning, match="stay as they are: what it does depends on"):
        assert not ghostify.plan(made(CastsToItsOwn).double(), example_inputs=X.double()).lifted


def test_tracing_leaves_nothing_in_what_a_model_holds_however_deep():
    model = made(LogsDeepInside)
    with pytest.warns(UserWarning, match="stay as they are"):
        ghostify.plan(model, example_inputs=X)
    assert model.log == {"means": []}


def test_an_option_that_is_computed_stays():
    class PadsByItsSize(CallsAFunction):
        def body(self, x):
            x = F.relu(self.c0(x))
            x = F.relu(x + self.b1(F.conv2d(x, self.weight, padding=(x.shape[-1] - 11, 1))))
            return self.head((x + self.b2(self.c2(x))).mean((2, 3)))

        def forward(self, x):
            return self.body(x)

    with pytest.warns(UserWarning, match="a weight is used more than once, or a bias or an option is computed"):
        small = converted(made(PadsByItsSize))
    assert not small.ghostify_plan.lifted
    assert small.ghostify_plan.trace_way == "fx"


def test_a_model_of_functions_alone_is_told_why_it_cannot_be_converted():
    class OnlyFunctions(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, 8, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.weight * 1 if self.training else self.weight)

    with pytest.raises(PlanError, match=r"has no convolution module.*cannot be made modules: what it does depends on"):
        ghostify.plan(OnlyFunctions(), example_inputs=X)
