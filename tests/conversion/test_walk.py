"""Original and student on their way through the network, layer by layer: the values, and how many images fit."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_residual import IMAGES, X
from torch import nn

import ghostify
from ghostify.conversion.walk import walk_calls, walk_graph
from ghostify.tracing import Example


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
