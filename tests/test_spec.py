"""Plain data: the options of a unit, the facts of a site, the plan and its way through JSON."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ghostify
from ghostify import GhostSpec, Plan
from ghostify.errors import OptionError, PlanError
from ghostify.nn.cifar import CifarResNet
from ghostify.spec import Call, Site


@pytest.fixture(scope="module")
def plan():
    return ghostify.plan(CifarResNet(1, width=8), ratio=1.5, example_inputs=torch.zeros(2, 3, 8, 8))


@given(n=st.integers(1, 300), groups=st.integers(1, 4), ratio=st.floats(1, 1e9))
def test_intrinsic_channels_are_the_fewest_that_keep_the_ratio(n, groups, ratio):
    spec = GhostSpec(ratio)
    per_group = spec.intrinsic_channels(n * groups, groups) / groups
    assert per_group == int(per_group)
    assert 1 <= per_group <= n
    assert per_group * ratio >= n - 1e-6 * ratio
    assert per_group == 1 or (per_group - 1) * ratio < n
    assert spec.cheap_channels(n * groups, groups) == groups * (n - per_group)
    assert GhostSpec(ratio, fusion="add").cheap_channels(n * groups, groups) == n * groups


@pytest.mark.parametrize(("n", "ratio", "m"), [(21, 1.4, 15), (57, 1.14, 50), (69, 2.3, 30), (10, 3, 4), (5, 1e9, 1)])
def test_rounding_in_the_division_costs_no_channel(n, ratio, m):
    assert GhostSpec(ratio).intrinsic_channels(n) == m


@pytest.mark.parametrize("value", [0.99, 0, -2, float("nan"), float("inf"), "2", None, True, [2], 2j])
def test_a_ratio_that_is_none(value):
    with pytest.raises(OptionError, match="ratio="):
        GhostSpec(value)


@pytest.mark.parametrize("value", [0, 2, 4, -1, 3.0, "3", None, True])
def test_a_depthwise_size_that_is_none(value):
    with pytest.raises(OptionError, match="dw_size="):
        GhostSpec(2, value)


def test_what_a_spec_says():
    assert str(GhostSpec()) == "s=2"
    assert str(GhostSpec(1.25, 5, "add", "paper")) == "s=1.25, d=5, add, paper"
    with pytest.raises(dataclasses.FrozenInstanceError):
        GhostSpec().ratio = 3


def test_what_a_site_says():
    call = Call((3, 8, 8), (8, 4, 4))
    site = Site("a", "Conv2d", 4, 8, (3, 5), (2, 2), 2, False, 1, 1, (call,), 0)
    assert site.shape == "4→8 3×5 /2 g2 @4×4"
    assert dataclasses.replace(site, stride=(1, 2), groups=1, calls=()).shape == "4→8 3×5 /1×2"


def test_a_plan_makes_the_round_trip(plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)
    assert Plan.from_json(plan.to_json().encode()) == plan


def _edited(plan, edit):
    data = json.loads(plan.to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda data: data.update(more=1), "more"),
        (lambda data: data["decisions"][1].update(more=1), "decisions.1.more"),
        (lambda data: data["decisions"][1]["site"].update(more=1), "decisions.1.site.more"),
        (lambda data: data["decisions"][1]["site"]["calls"][0].update(more=1), "calls.0.more"),
        (lambda data: data["decisions"][1]["site"]["chain"].update(more=1), "chain.more"),
        (lambda data: data["decisions"][1]["spec"].update(more=1), "spec.more"),
        (lambda data: data["decisions"][1]["spec"].update(ratio=0.5), "ratio=0.5"),
        (lambda data: data["decisions"][1]["spec"].update(dw_size=2), "dw_size=2"),
        (lambda data: data["decisions"][1]["spec"].update(fusion="sum"), "fusion"),
        (lambda data: data.pop("fingerprint"), "fingerprint"),
        (lambda data: data.update(trace_way="guessed"), "trace_way"),
        (lambda data: data.update(params="many"), "params"),
        (lambda data: data.update(decisions=None), "decisions"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(plan, edit, where):
    with pytest.raises(PlanError, match=where):
        Plan.from_json(_edited(plan, edit))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": NaN}', b"\xff\xfe"])
def test_what_is_no_document_is_refused(text):
    with pytest.raises(PlanError, match="not a ghostify plan"):
        Plan.from_json(text)


def test_totals_are_the_sum_of_the_decisions(plan):
    saved = sum(decision.params_before - decision.params_after for decision in plan)
    assert plan.params - plan.params_after == saved > 0
    assert plan.macs - plan.macs_after == sum(d.macs_before - d.macs_after for d in plan) > 0
    assert len(plan) == len(list(plan)) == 7
    assert all(decision.replaced == (decision.spec is not None) for decision in plan)
    assert all(decision.reason for decision in plan if not decision.replaced)


def test_the_table_comes_in_other_styles(plan):
    assert plan.table("github").startswith("| site")
    assert "<table>" in plan.table("html")
    assert all(decision.site.name in plan.table() for decision in plan)


def test_numbers_of_numpy_are_numbers():
    spec = GhostSpec(np.float32(1.5), np.int64(5))
    assert spec == GhostSpec(1.5, 5)
    assert (type(spec.ratio), type(spec.dw_size)) == (float, int)
