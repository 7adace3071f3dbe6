"""Backends run what they are given, as they are named."""

import functools

import pytest
import torch
from torch import nn

from ghostify.backends import runners
from ghostify.backends.runners import Backend
from ghostify.errors import OptionError
from ghostify.nn.cifar import CifarResNet
from ghostify.planning.layers import Layer
from ghostify.spec import GhostSpec
from ghostify.tracing import Example, trace

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_backends_run_what_they_are_given(backend):
    if backend == "onnxruntime":
        pytest.importorskip("onnxruntime")
    facts = trace(CifarResNet(1, width=16).eval(), X)
    layer = Layer.of(facts.sites[2], facts)
    networks = [layer.network(spec, fold=backend == "onnxruntime") for spec in (None, GhostSpec(2), GhostSpec(4))]
    example = layer.example(2)
    runs = runners.runs_of(Backend(backend), networks, example)
    for run, network in zip(runs, networks, strict=True):
        made = run()
        made = torch.from_numpy(made[0]) if backend == "onnxruntime" else made
        torch.testing.assert_close(made, network(*example.args), rtol=1e-3, atol=1e-4)


class Compiled(nn.Module):
    """Tells whether it runs compiled: adds a number of its own then."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number if torch.compiler.is_compiling() else x


def test_every_choice_is_compiled(monkeypatch):
    """torch compiles one forward for eight modules, and runs the ninth as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    runs = runners.runs_of(Backend("torch-compile"), [Compiled(number) for number in range(1, 12)], Example((X,)))
    assert [round(float((run() - X).mean())) for run in runs] == list(range(1, 12))


@pytest.mark.parametrize(("name", "threads"), [("tensorrt", 1), ("torch", 0), ("torch", True), ("torch", 1.5)])
def test_backends_that_cannot_be(name, threads):
    with pytest.raises(OptionError, match=r"backend=|threads="):
        Backend(name, threads)
