"""Convolutions that are called as functions: where a graph takes the model's place, and where it must not."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from odd_models import Base, CallsAFunction, TakesOffItsMean, X, converted, error, made
from torch import nn

import ghostify
from ghostify.tracing import trace
from ghostify.tracing.execution import run_graph


class Normalises(Base):
    """Its forward makes tensors that it holds nowhere."""

    def forward(self, x):
        return self.body((x - torch.linspace(-1, 1, 8).view(1, 8, 1, 1)) / torch.tensor(2.0))


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


def test_buffers_stay_the_models():
    model = made(TakesOffItsMean)
    small = converted(model)
    assert small.ghostify_plan.lifted
    before = small(X)
    assert not small.load_state_dict({"mean": model.mean + 1}, strict=False).unexpected_keys
    assert not torch.allclose(small(X), before)


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
