"""Models whose torch.fx graph parts from what they compute, or holds what they do not."""

import copy
import pickle
import random
import types

import pytest
import torch
import torch.nn.functional as F
from odd_models import Base, X, converted, error, made
from torch import nn

import ghostify
from ghostify.conversion import INITIALISERS
from ghostify.errors import PlanError
from ghostify.tracing import trace
from ghostify.tracing.execution import run_graph


class ScalesTensors(Base):
    """FX's stand-in is no tensor, so its graph leaves the scaling out."""

    def forward(self, x):
        return self.body(x / 255 if isinstance(x, torch.Tensor) else x)


class AddsInPlace(Base):
    """FX's stand-in knows no ``+=``: in its graph the alias keeps the old values."""

    def forward(self, x):
        x = F.relu(self.c0(x))
        shortcut = x
        x += 3 * self.c1(x)
        x = self.c2(F.relu(x)) + shortcut
        return self.head(x.mean((2, 3)))


def with_a_hook():
    model = made()
    model.register_forward_pre_hook(lambda module, args: (args[0] / 255,))
    return model


def with_a_forward_of_its_own():
    model = made()
    model.forward = types.MethodType(lambda self, x: self.body(x / 255), model)
    return model


@pytest.mark.parametrize("make", [lambda: made(ScalesTensors), with_a_hook, with_a_forward_of_its_own])
@pytest.mark.parametrize("name", ["least-squares", "alternating"])
def test_a_graph_that_is_not_the_model_is_not_used(make, name):
    model = make()
    assert trace(model, 255 * X).note.startswith("its graph gives other outputs")
    small = converted(model, example_inputs=255 * X, calibration=255 * X, initialiser=name)
    assert small.ghostify_plan.trace_way == "recorded"
    assert error(small, model, 255 * X) < 0.2


def test_a_graph_in_which_an_alias_is_lost_is_not_used():
    model = made(AddsInPlace)
    assert trace(model, X).graph is None
    assert error(converted(model), model) < 0.1


def test_a_graph_that_does_not_run_is_not_used():
    class Unpacks(Base):
        def forward(self, batch):
            return self.body(batch["image"] if isinstance(batch, dict) else batch)

    inputs = ({"image": X},)
    assert trace(made(Unpacks), inputs).note.startswith("its graph does not run: TypeError")
    small = ghostify.convert(made(Unpacks), example_inputs=inputs)
    assert small.ghostify_plan.trace_way == "recorded"


class Normalises(Base):
    """Its forward makes tensors that it holds nowhere."""

    def forward(self, x):
        return self.body((x - torch.linspace(-1, 1, 8).view(1, 8, 1, 1)) / torch.tensor(2.0))


class CallsAFunction(Base):
    """A convolution of its body is called as a function."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(0)) / 12)

    def body(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(F.conv2d(x, self.weight, padding=1)))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


class NormalisesAndCalls(Normalises, CallsAFunction):
    pass


@pytest.mark.parametrize("kind", [Normalises, NormalisesAndCalls])
def test_tensors_that_a_forward_makes_belong_to_the_graph(tmp_path, kind):
    model = made(kind)
    held = set(vars(model))
    small = converted(model)
    assert small.ghostify_plan.trace_way == "fx"
    assert set(vars(model)) == held
    assert bool(small.ghostify_plan.lifted) == (kind is NormalisesAndCalls)
    assert error(small, model) < 0.2
    again = ghostify.load(ghostify.save(small, tmp_path / "small"), base=made(kind)).eval()
    assert torch.equal(again(X), small(X))


class AddsToWhatItMakes(CallsAFunction):
    def forward(self, x):
        start = torch.zeros(1, 8, 1, 1)
        start.add_(x.mean((0, 2, 3), keepdim=True))
        return self.body(x + start)


class AddsToAView(CallsAFunction):
    def forward(self, x):
        start = torch.zeros(1, 8, 1, 1).to(x)
        start.add_(x.mean((0, 2, 3), keepdim=True))
        return self.body(x + start)


class WritesIntoWhatItMakes(CallsAFunction):
    def forward(self, x):
        made = torch.zeros_like(X)
        torch.add(x, 1.0, out=made)
        return self.body(made)


class DropsWhatItMakes(CallsAFunction):
    """By a module that works in place: only a run of the graph tells."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5, inplace=True)

    def forward(self, x):
        return self.body(x * self.drop(torch.ones(1, 8, 1, 1)))


@pytest.mark.parametrize("kind", [AddsToWhatItMakes, AddsToAView, WritesIntoWhatItMakes, DropsWhatItMakes])
def test_what_is_made_anew_in_every_run_keeps_nothing_of_the_last_one(kind):
    model = made(kind)
    facts = trace(model, X, lift=False)
    assert run_graph(facts.graph, model, facts.example, facts.outputs) == ""  # once more
    small = converted(model)
    assert small.ghostify_plan.trace_way == "fx"
    assert small.ghostify_plan.lifted == ("weight_conv",)
    assert torch.equal(small(X), small(X))
    assert error(small, model) < 0.2
    again = ghostify.apply(small.ghostify_plan, model, calibration=X)
    assert torch.equal(again.eval()(X), small(X))


def test_what_is_handed_out_may_be_changed():
    class Tells(CallsAFunction):
        def forward(self, x):
            return {"scores": self.body(x), "classes": torch.arange(3.0)}

    small = converted(made(Tells))
    assert small.ghostify_plan.lifted
    small(X)["classes"].add_(5)
    assert small(X)["classes"].tolist() == [0, 1, 2]


class TakesOffItsMean(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, 8))

    def forward(self, x):
        return self.body(x - self.mean.view(1, -1, 1, 1))


def test_buffers_stay_the_models():
    model = made(TakesOffItsMean)
    small = converted(model)
    assert small.ghostify_plan.lifted
    before = small(X)
    assert not small.load_state_dict({"mean": model.mean + 1}, strict=False).unexpected_keys
    assert not torch.allclose(small(X), before)


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


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ChoosesByABuffer, "with buffers as a part of the graph it cannot be traced"),
        (ScalesByANumber, "with buffers as a part of the graph it cannot be traced"),
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
    told = f"convolutions that {kind.__name__} calls as functions stay as they are: {reason}"
    with pytest.warns(UserWarning, match=told):
        plan = ghostify.plan(model, example_inputs=X)
    assert plan.trace_way == "fx"
    assert not plan.lifted
    assert {decision.site.name for decision in plan.replaced} == {"c2"}
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_option_that_is_computed_stays():
    class PadsByItsSize(CallsAFunction):
        def body(self, x):
            x = F.relu(self.c0(x))
            x = F.relu(x + self.b1(F.conv2d(x, self.weight, padding=(x.shape[-1] - 11, 1))))
            return self.head((x + self.b2(self.c2(x))).mean((2, 3)))

        def forward(self, x):
            return self.body(x)

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


class HoldsMore(TakesOffItsMean):
    """Some of it is not read, one buffer is known by two names, and one is no part of the state."""

    def __init__(self):
        super().__init__()
        self.register_buffer("again", self.mean)
        self.register_buffer("classes", torch.arange(5))
        self.register_buffer("shift", torch.ones(8), persistent=False)
        self.register_buffer("matrix", torch.eye(3).to_sparse(), persistent=False)
        self.extra = nn.ModuleDict({"head": nn.Conv2d(3, 3, 1)})
        self.known = self.extra["head"]  # by another name
        self.norm = self.b1
        self.owner = nn.Conv2d(16, 16, 3, padding=1)  # whose bias is not read
        self.weight_conv = nn.Linear(3, 3)
        self.inner = nn.Module()
        self.inner.part = nn.BatchNorm2d(16)
        self.same = self.inner

    def forward(self, x, mask=None):
        start = torch.zeros(1, 8, 1, 1) if mask is None else mask
        start.add_(x.mean((0, 2, 3), keepdim=True))
        return super().forward(x + start + self.shift.view(1, -1, 1, 1))

    def body(self, x):
        x = F.relu(F.conv2d(self.c0(x), self.owner.weight, padding=1))
        x = F.relu(x + self.b1(self.inner.part(F.conv2d(x, self.weight, padding=1))))
        return self.head((x + self.b2(self.c2(x))).mean((2, 3)))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_what_is_lifted_is_whole_and_stays_so_in_copies_and_pickles(tmp_path, way):
    model = made(HoldsMore)
    small = converted(model)
    assert small.ghostify_plan.lifted
    replaced = {"weight", "owner.weight", "c2.weight", "c2.bias"}
    assert model.state_dict().keys() - small.state_dict().keys() == replaced
    assert torch.equal(small.owner.bias, model.owner.bias)
    assert type(small.weight_conv) is nn.Linear
    assert small.same.part is small.inner.part
    assert small.known is small.extra.head
    assert "shift" not in small.state_dict()
    again = way(small)
    assert type(again).__name__ == type(small).__name__
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in small.named_parameters()]
    assert trace(made(), X).graph is not None  # FX still works
    assert again.state_dict().keys() == small.state_dict().keys()
    for _ in range(2):
        assert torch.equal(again(X), small(X))
    other = {name: value * (1 + value.is_floating_point()) for name, value in small.state_dict().items()}
    for copied in (again, small):
        copied.load_state_dict(other)
    assert torch.equal(again(X), small(X))
    ghostify.save(again, tmp_path / "small")
    assert torch.equal(ghostify.load(tmp_path / "small", base=made(HoldsMore)).eval()(X), small(X))


class ReadsInsideALayer(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.shift = nn.Identity()
        self.shift.register_buffer("by", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.body(self.shift(x) + self.shift.by + torch.eye(1).to_sparse().to_dense())


def test_a_model_keeps_its_state_when_its_convolutions_are_lifted():
    model = made(ReadsInsideALayer)
    keys, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    small = converted(model)
    assert small.ghostify_plan.lifted
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert "shift.by" not in small.state_dict()


def test_batches_do_not_share_a_buffer_that_the_forward_writes_to():
    class Centres(Base):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x):
            return self.body(x - self.mean.copy_(x.mean((0, 2, 3))).view(1, -1, 1, 1))

    model = made(Centres)
    assert trace(model, X).note.startswith("it changes buffers")
    assert not model.mean.any()


class HasSuchAName(CallsAFunction):
    def __init__(self):
        super().__init__()
        self.register_buffer("_tensor_constant0", torch.full((1, 8, 1, 1), 7.0))

    def forward(self, x):
        return self.body(x - torch.linspace(-1, 1, 8).view(1, 8, 1, 1) + self._tensor_constant0)


def test_names_are_the_same_every_time(tmp_path):
    model = made(HasSuchAName)
    small = converted(model)
    assert small.ghostify_plan.lifted
    assert ghostify.plan(model, example_inputs=X).fingerprint == small.ghostify_plan.fingerprint
    again = ghostify.load(ghostify.save(small, tmp_path / "small"), base=made(HasSuchAName)).eval()
    assert torch.equal(again(X), small(X))


class MixesClasses(Base):
    """A sparse tensor is the model's, another is made."""

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.eye(16).to_sparse())

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + self.b1(self.c1(x))).mean((2, 3)).t()
        return self.head(torch.sparse.mm(torch.eye(16).to_sparse(), torch.sparse.mm(self.matrix, x)).t())


def test_sparse_tensors_stay_as_they_are():
    model = made(MixesClasses)
    assert error(converted(model), model) < 0.2


class ReadsItsNorm(Base):
    """What a norm has learnt is used beside the norm."""

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = F.relu(x + F.relu(self.b1(self.c1(x))) + self.b1.running_var.view(1, -1, 1, 1))
        return self.head(F.relu(x + self.b2(self.c2(x)) * self.b2.weight.view(1, -1, 1, 1)).mean((2, 3)))


@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_a_norm_that_is_read_beside_its_call_stays(placement):
    model = made(ReadsItsNorm)
    small = converted(model, spec=ghostify.GhostSpec(placement=placement))
    assert small.ghostify_plan.trace_way == "fx"
    for network in (model, small):
        torch.testing.assert_close(ghostify.fold(network, example_inputs=X)(X), network(X))


class Half(nn.Module):
    def forward(self, x):
        return x.mul_(0.5)


class Accumulate(nn.Module):
    def forward(self, a, b):
        a += b
        return a


class ModulesInPlace(Base):
    """Modules without an attribute ``inplace`` that change what they read all the same."""

    def __init__(self):
        super().__init__()
        self.halve, self.accumulate = Half(), Accumulate()

    def forward(self, x):
        x = F.relu(self.c0(x))
        x = self.accumulate(x, self.b1(self.c1(x)))
        y = self.b2(self.c2(x))
        x = F.avg_pool2d(self.halve(x), 3, 1, 1)
        return self.head(F.relu(y + x).mean((2, 3)))


def test_modules_that_work_in_place_are_seen_to_do_so():
    model = made(ModulesInPlace)
    seen = {}

    def note(name):
        return lambda module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in ("c1", "c2")]
    model(X)
    for handle in handles:
        handle.remove()
    visits = {}

    def fit(conversion):
        for visit in INITIALISERS["least-squares"].__globals__["_visits"](conversion, conversion.facts.model):
            visits[visit.decision.site.name] = (visit.inputs[0].clone(), visit.targets[0].clone())

    converted(model, initialiser=fit)
    for name, pair in seen.items():
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(visits[name], pair)), name
