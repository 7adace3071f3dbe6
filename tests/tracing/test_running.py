"""A model is run, and all around it is as it was."""

import copy
import os
import random
from array import array
from collections import OrderedDict, UserDict, UserList, deque, namedtuple

import numpy
import pytest
import torch
from torch import nn

import ghostify
from ghostify.nn.cifar import CifarResNet
from ghostify.tracing import running
from ghostify.tracing.running import full_precision, own_random_state, random_state, unmarked

NETWORK = nn.Linear(2, 2)


def test_a_model_on_a_gpu_is_run_in_full_precision(monkeypatch):
    with unmarked(NETWORK):
        assert torch.backends.cudnn.allow_tf32  # nothing to do
    monkeypatch.setattr(running, "gpus", lambda *models: [0])
    with full_precision(NETWORK):
        assert not torch.backends.cudnn.allow_tf32
        with full_precision(NETWORK):
            pass
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
    conv = torch.backends.cudnn.conv
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")  # torch's other switch
    with full_precision(NETWORK):
        assert conv.fp32_precision == "ieee"
    assert conv.fp32_precision == "tf32"


@pytest.mark.parametrize("home", [torch.backends, torch.backends.cudnn])
def test_full_precision_is_full_where_a_switch_for_all_says_otherwise(monkeypatch, home):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(running, "gpus", lambda *models: [0])
    monkeypatch.setattr(home, "fp32_precision", "tf32")
    with full_precision(NETWORK):
        assert cudnn.conv.fp32_precision == "ieee"
        with cudnn.flags(enabled=False):  # as a model may do
            pass
    assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "tf32"
    assert cudnn.allow_tf32


def test_what_a_forward_leaves_is_told():
    class Leaves(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.names, self.kept = [], {}, "kept"

    model = Leaves()
    with unmarked(model) as left:
        assert left() == []
        model.train()
        assert left() == []
        model.seen.append(1)
        model.names["a"] = 1
        model.new = model.kept
        del model.kept
        assert left() == ["Leaves.seen", "Leaves.names", "Leaves.new", "Leaves.kept"]
    assert (model.seen, model.names, model.kept) == ([], {}, "kept")


def test_random_numbers_drawn_by_a_model_count_for_nothing():
    torch.manual_seed(5)
    with unmarked(NETWORK):
        torch.rand(3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


@pytest.mark.parametrize("initialiser", ["random", "first", "alternating"])
def test_no_gpu_that_a_model_is_not_on_is_seeded(monkeypatch, initialiser):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("all GPUs were seeded"))
    model, images = CifarResNet(1).eval(), torch.randn(16, 3, 16, 16)
    small = ghostify.convert(model, ratio=2, calibration=images, initialiser=initialiser)
    ghostify.plan(model, budget={"macs": 0.8}, sensitivity="measured", calibration=images)
    ghostify.fold(small, example_inputs=images[:2])


class Log(dict):
    pass


Named = namedtuple("Named", "log")


@pytest.mark.parametrize(
    "held",
    [Log(log=[1]), Named([1]), UserDict(log=[1]), UserList([[1]]), deque([[1]]), ({"a": ([1],)},), OrderedDict(a=[1])],
)
def test_what_nests_in_what_a_model_holds_is_put_back(held):
    model = nn.Linear(2, 2)
    model.held, before = held, copy.deepcopy(held)

    def innermost(value):
        while not (type(value) is list and value == [1]):
            value = next(iter(value.values() if hasattr(value, "values") else value))
        return value

    with unmarked(model) as left:
        assert left() == []
        innermost(held).append(2)
        assert left() == ["Linear.held"]
    assert model.held is held
    assert held == before


def test_numbers_in_an_array_are_put_back():
    model = nn.Linear(2, 2)
    model.held = array("d", [1.5, float("nan")])
    before = model.held.tobytes()
    with unmarked(model) as left:
        assert left() == []
        model.held[0] = 3.0
        model.held.append(4.0)
        assert left() == ["Linear.held"]
    assert model.held.tobytes() == before


class Names(list):
    def __iter__(self):
        return (f"pre.{name}" for name in super().__iter__())


class Recent(OrderedDict):
    def __getitem__(self, key):
        self.move_to_end(key)
        return super().__getitem__(key)


class Refuses(UserDict):
    def __getitem__(self, key):
        raise RuntimeError(key)


class Doubles(dict):
    def values(self):
        return [2 * value for value in super().values()]


@pytest.mark.parametrize("held", [Names("ab"), Recent(b=[1], a=[2]), Refuses(a=[1]), Doubles(a=[1]), {"a", "b"}])
def test_no_code_of_a_users_container_runs(held):
    model = nn.Linear(2, 2)
    model.held = held

    def now():
        if isinstance(held, list):
            return list.copy(held)
        inside = held.data if isinstance(held, UserDict) else held
        return [(key, dict.__getitem__(inside, key)) for key in inside] if isinstance(inside, dict) else set(inside)

    before = now()
    with unmarked(model) as left:
        assert left() == []
        (held.data if isinstance(held, UserDict) else held).clear()
        assert left() == ["Linear.held"]
    assert now() == before


def test_an_array_that_others_look_at_is_put_back():
    model = nn.Linear(2, 2)
    model.held = array("f", [1.0, 2.0])
    model.seen = numpy.frombuffer(model.held, dtype=numpy.float32)
    with unmarked(model):
        model.held[0] = 3.0
    assert model.seen.tolist() == [1.0, 2.0]


class Key:
    def __init__(self, name):
        self.name = name

    def __hash__(self):
        return hash(self.name)


def test_a_key_may_have_another_hash_by_now():
    model, key = nn.Linear(2, 2), Key("a")
    model.held = {key: 1}
    key.name = "b"
    with unmarked(model) as left:
        assert left() == []


@pytest.mark.parametrize(("held", "other"), [(UserDict(a=1), {"b": 2}), (UserList([1]), [2])])
def test_what_such_a_container_holds_its_things_in_is_put_back(held, other):
    model = nn.Linear(2, 2)
    model.held, before = held, copy.deepcopy(held)
    with unmarked(model) as left:
        held.data = other
        assert left() == ["Linear.held"]
    assert held == before


def test_a_buffer_of_other_kinds_of_numbers_is_put_back():
    model = nn.Linear(2, 2)
    model.register_buffer("turned", torch.tensor([1 + 1j]).conj())
    model.register_buffer("small", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8))
    with unmarked(model):
        model.turned.fill_(1)
        model.small.copy_(torch.zeros(2))
    assert model.turned.item() == 1 - 1j
    assert model.small.dequantize().tolist() == [1.0, 1.0]


def test_a_buffer_is_not_written_to_where_it_holds_the_same():
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.tensor([float("nan"), 1.0]))
    with unmarked(model):
        pass
    assert model.scale._version == 0


def test_generators_in_what_a_model_holds_are_looked_at():
    model = nn.Linear(2, 2)
    model.held = {"drawn": [random.Random(0)]}
    before = random_state(model)
    assert random_state(model) == before
    model.held["drawn"][0].random()
    assert random_state(model) != before


def test_the_environment_is_left_alone():
    model = nn.Linear(2, 2)
    model.environment, before = os.environ, dict(os.environ)
    with unmarked(model):
        pass
    assert dict(os.environ) == before != {}


def test_all_random_states_are_given_back():
    before = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with own_random_state():
        random.random()
        numpy.random.rand()
        torch.rand(1)
    assert (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
