"""Models whose torch.fx graph parts from what they compute, or holds what they do not."""

import types

import pytest
import torch
import torch.nn.functional as F
from odd_models import Base, X, converted, error, made
from torch import nn

import ghostify
from ghostify.conversion import INITIALISERS
from ghostify.tracing import trace


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
