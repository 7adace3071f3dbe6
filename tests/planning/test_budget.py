"""Ratios by a budget: exact, met from below, and told what can be reached."""

import dataclasses
import itertools
import json
import os
import random
import re
import sys

import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ghostify
from ghostify import Plan
from ghostify.cli import main
from ghostify.errors import BudgetError, NothingToConvertError, OptionError
from ghostify.nn.cifar import CifarResNet
from ghostify.planning import budget, frontier, planner
from ghostify.planning.budget import least_damage
from ghostify.planning.keeping import RATIOS
from ghostify.planning.limits import absolute
from ghostify.tracing import trace

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return CifarResNet(1, width=8).eval().to(dtype)


def planned(limits, **options):
    return ghostify.plan(net(), budget=limits, calibration=IMAGES, **options)


@st.composite
def knapsacks(draw):
    """Damages and changes of every offer of every site, and limits near what some choice adds."""
    sizes, keys = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)), draw(st.integers(1, 3))
    damages = [[draw(st.integers(0, 50)) / 50 for _ in range(size)] for size in sizes]
    changes = [[[draw(st.integers(-99, 99)) for _ in range(keys)] for _ in range(size)] for size in sizes]
    some = [draw(st.integers(0, size - 1)) for size in sizes]
    limits = [sum(c[i][k] for c, i in zip(changes, some)) + draw(st.integers(-1, 1)) for k in range(keys)]
    return damages, changes, limits


@settings(max_examples=150, deadline=None)
@given(knapsacks(), st.sampled_from([1.0, 1e-9, 1e9]))
def test_the_choice_is_the_best_of_all(problem, unit):
    damages, changes, limits = problem
    damages = [[unit * damage for damage in some] for some in damages]

    def fits(choice):
        sums = [sum(some[i][k] for some, i in zip(changes, choice)) for k in range(len(limits))]
        return all(total <= limit for total, limit in zip(sums, limits))

    def damage(choice):
        return sum(some[i] for some, i in zip(damages, choice))

    best = min(map(damage, filter(fits, itertools.product(*(range(len(some)) for some in damages)))), default=None)
    found = least_damage(damages, changes, limits)
    if best is None:
        assert found is None
    else:
        choice, gap = found
        assert fits(choice)
        assert damage(choice) == pytest.approx(best, abs=1e-6 * unit)
        assert gap == 0


def test_small_damages_are_told_apart():
    """Measured at the network's output they can be of 1e-9; the solver took all choices for equal."""
    generator = random.Random(1)
    damages = [[0.0, *sorted(generator.random() for _ in range(6))] for _ in range(20)]
    changes = [[[0], *([-int(1e6 * ratio * generator.random())] for ratio in range(1, 7))] for _ in range(20)]
    limits = [sum(min(change[0] for change in some) for some in changes) // 2]
    wanted = least_damage(damages, changes, limits)
    assert least_damage([[1e-9 * damage for damage in some] for some in damages], changes, limits) == wanted


def test_a_limit_holds_to_the_last_unit():
    huge = 10**9  # one more is far less than the solver's tolerance
    choice, _ = least_damage([[0.0, 0.5, 1.0], [0.0]], [[[0], [-huge + 1], [-huge]], [[huge]]], [0])
    assert choice == [2, 0]
    assert least_damage([[0.0, 1.0]], [[[0], [-huge]]], [-huge - 1]) is None


def test_lines_of_the_solver_do_not_get_between_json(monkeypatch, capfd):
    solve = scipy.optimize.milp

    def telling(*arguments, **options):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\n")
        return solve(*arguments, **options)

    monkeypatch.setattr("scipy.optimize.milp", telling)
    print("before")
    assert least_damage([[0.0, 1.0]], [[[0], [-2]]], [-1]) == ([1], 0.0)
    os.write(1, b"after\n")
    shown = capfd.readouterr()
    assert shown.out == "before\nafter\n"
    assert shown.err.startswith("HighsMip")


@pytest.mark.parametrize("limits", [{"macs": 0.7}, {"params": 0.5}, {"macs": 0.8, "params": 0.6, "size_bytes": 0.9}])
def test_every_limit_is_met_from_below_and_told(limits):
    plan = planned(limits)
    reached = {"macs": plan.macs_after / plan.macs, "params": plan.params_after / plan.params}
    assert all(reached[key] <= limit for key, limit in limits.items() if key in reached)
    assert min(limit - reached[key] for key, limit in limits.items() if key in reached) < 0.03
    assert len(plan.budget) == len(limits) + 1
    assert f"{next(iter(limits))} " in plan.summary()
    damage = sum(1 - d.explained for d in plan.replaced)
    assert f"damage {damage:.4g}" in plan.budget[-1]
    assert "no choice has less" in plan.budget[-1]
    assert {d.spec.ratio for d in plan.replaced} <= set(RATIOS)


def test_two_limits_cost_at_least_as_much_as_either():
    def damage(limits):
        return sum(1 - d.explained for d in planned(limits).replaced)

    one, other, both = ({"macs": 0.6}, {"params": 0.45}, {"macs": 0.6, "params": 0.45})
    assert damage(both) >= max(damage(one), damage(other)) - 1e-6


def test_bytes_are_those_of_the_dtype():
    model = net(torch.float64)
    size = sum(p.numel() * 8 for p in model.parameters())
    small = ghostify.convert(model, budget={"size_bytes": size * 3 // 5}, calibration=IMAGES.double())
    left = sum(p.numel() * p.element_size() for p in small.parameters())
    assert left <= size * 3 // 5
    assert small.ghostify_plan.budget[0].startswith(f"size_bytes {left:,} of at most {size * 3 // 5:,}, ")


def test_a_limit_out_of_reach_tells_the_smallest_that_is_not():
    with pytest.raises(BudgetError, match=r"smallest that can be reached is macs=") as told:
        planned({"macs": 0.01})
    fraction, least = re.search(r"macs=([\d.]+) \(([\d,]+) of", str(told.value)).groups()
    least = int(least.replace(",", ""))
    assert planned({"macs": least}).macs_after == least
    assert planned({"macs": float(fraction)}).macs_after == least
    with pytest.raises(BudgetError):
        planned({"macs": least - 1})
    with pytest.raises(BudgetError, match=r"\(each alone\) is macs=[\d.]+ .*params=[\d.]+ "):
        planned({"macs": 0.9, "params": 10})


def test_limits_that_can_be_met_but_not_together_are_told_so():
    facts, made = trace(net(), IMAGES[:1]), planned({"macs": 0.9}).replaced[0]
    saved = [(9_000, 1), (1_000, 9)]  # what saves most of the one saves least of the other
    options = [
        dataclasses.replace(made, macs_after=made.macs_before - macs, params_after=made.params_before - params)
        for macs, params in saved
    ]
    limits = {"macs": facts.count.macs - 8_000, "params": facts.params - 8}
    with pytest.raises(BudgetError, match=r"each of them can be met, but not together; the smallest .*\(each alone\)"):
        budget.within_budget([options], limits, facts)
    met = budget.within_budget([options], {"macs": limits["macs"]}, facts)
    assert (met.left["macs"] * facts.count.macs, met.decisions) == (facts.count.macs - 9_000, [options[0]])


def test_the_same_plan_every_time_and_through_json():
    plan = planned({"macs": 0.6})
    assert plan == planned({"macs": 0.6})
    assert Plan.from_json(plan.to_json()) == plan
    assert str(Plan.from_json(plan.to_json())) == str(plan)


def test_plans_that_were_stored_before_budgets_are_read():
    plan = ghostify.plan(net(), example_inputs=IMAGES[:1])
    stored = json.loads(plan.to_json())
    assert stored.pop("budget") == []
    assert Plan.from_json(json.dumps(stored)) == plan


def test_overrides_and_skip_stay_in_force():
    plan = planned({"macs": 0.75}, overrides={"layer1.0.conv1": 5, "layer2.0.*": None}, skip="layer3.0.conv1")
    found = {d.site.name: d for d in plan}
    assert found["layer1.0.conv1"].spec.ratio == 5
    assert found["layer2.0.conv1"].reason.startswith("kept by override")
    assert found["layer3.0.conv1"].reason.startswith("skipped by")
    assert plan.macs_after <= 0.75 * plan.macs
    only = planned({"macs": 0.999}, overrides={"layer*": 2}, skip="conv1")
    assert len(only.replaced) == 6  # nothing is left to choose


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": {"flops": 0.5}, "calibration": IMAGES}, "'flops': 0.5}: the key is unknown.*size_bytes"),
        ({"budget": {"macs": 0}, "calibration": IMAGES}, "'macs': 0} is no finite number above 0"),
        ({"budget": {"macs": float("nan")}, "calibration": IMAGES}, "is no finite number"),
        ({"budget": {"macs": True}, "calibration": IMAGES}, "is no finite number"),
        ({"budget": {"macs": "0.5"}, "calibration": IMAGES}, "'macs': '0.5'} is no number above 0 with a unit"),
        ({"budget": {"macs": "0 %"}, "calibration": IMAGES}, "is no number above 0 with a unit"),
        ({"budget": {"latency": "-1 ms"}, "calibration": IMAGES}, "is no number above 0 with a unit"),
        ({"budget": {"macs": "5 ms"}, "calibration": IMAGES}, "'macs': '5 ms'} is a time"),
        ({"budget": {"macs": 1.5}, "calibration": IMAGES}, "'macs': 1.5} is neither a fraction"),
        ({"budget": {}, "calibration": IMAGES}, "is not a dict of limits"),
        ({"budget": 0.5, "calibration": IMAGES}, "budget=0.5 is not a dict"),
        ({"budget": {"macs": 0.5}, "backend": "tensorrt"}, "backend='tensorrt' is unknown. Use one of torch"),
        ({"backend": "torch", "ratio": 2}, "backend='torch' is given without a budget"),
        ({"budget": {"macs": 0.5}, "keep": 0.9, "calibration": IMAGES}, "keep=0.9 are both given"),
        ({"budget": {"macs": 0.5}, "ratio": 2, "calibration": IMAGES}, "ratio=2 are both given"),
    ],
)
@pytest.mark.parametrize("verb", [ghostify.plan, ghostify.convert])
def test_options_that_cannot_be_used(verb, options, told):
    with pytest.raises(OptionError, match=told):
        verb(net(), example_inputs=IMAGES[:1], **options)


def test_a_budget_that_asks_for_nothing():
    with pytest.raises(NothingToConvertError, match=r"asks for nothing: the original has macs=[\d,]+, params="):
        planned({"macs": 1.0, "params": 10**9})


def test_the_frontier_is_measured_once_and_is_that_of_single_plans(monkeypatch):
    measured = []
    original = planner.measured
    monkeypatch.setattr(planner, "measured", lambda *options: measured.append(1) or original(*options))
    curve = frontier(net(), points=4, calibration=IMAGES)
    assert len(measured) == 1
    fractions, damages = [point.fraction for point in curve], [point.damage for point in curve]
    assert fractions == sorted(set(fractions))
    assert damages == sorted(damages, reverse=True)
    assert repr(curve).count("\n") == len(curve) + 1 == 5
    limit = int(curve.points[1].plan.budget[0].split("at most ")[1].split(", ")[0].replace(",", ""))
    assert planned({"macs": limit}) == curve.points[1].plan
    fixed = frontier(net(), key="params", points=[0.9, 0.5, 0.9], calibration=IMAGES)
    assert [point.fraction <= most for point, most in zip(fixed, (0.5, 0.9), strict=True)] == [True, True]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"key": "flops"}, "key=.flops. is unknown"),
        ({"points": 0}, "points=0 is neither"),
        ({"points": []}, r"points=\[\] is neither"),
        ({"points": [0.5, -1]}, "'macs': -1} is no finite"),
    ],
)
def test_frontiers_that_cannot_be(options, told):
    with pytest.raises(OptionError, match=told):
        frontier(net(), calibration=IMAGES, **options)
    with pytest.raises(NothingToConvertError):
        frontier(net(), calibration=IMAGES, skip="*")


class Functional(nn.Module):
    """Two convolutions that are modules, and one that is a function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(F.conv2d(self.one(self.stem(x)), self.weight).mean((2, 3)))


def test_a_point_of_the_frontier_that_leaves_functions_alone_leaves_the_class():
    model = Functional().eval()
    curve = frontier(model, points=[0.7, 0.9], calibration=IMAGES, skip="weight*")
    for point, limit in zip(curve, (0.7, 0.9)):
        assert point.plan == ghostify.plan(model, budget={"macs": limit}, calibration=IMAGES, skip="weight*")
        assert type(ghostify.apply(point.plan, model)) is Functional
    (graph,) = frontier(model, points=[0.5], calibration=IMAGES)
    assert graph.plan.lifted


class Flat(nn.Module):
    """Two equal layers: which one changes is a tie."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.two.load_state_dict(self.one.state_dict())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head((self.one(x) + self.two(x)).mean((2, 3)))


def test_no_choice_gives_way_to_a_shared_order():
    flat = Flat().eval()
    assert [d.order for d in ghostify.plan(flat, ratio=4, example_inputs=IMAGES)] == ["", "shared", "shared"]
    plan = ghostify.plan(flat, budget={"macs": 0.47}, calibration=IMAGES)
    assert [str(d.spec) for d in plan] == ["None", "s=3", "s=3"]
    assert [d.order for d in plan] == ["", "index", "index"]


def test_ties_are_broken_alike():
    limits = {"macs": 0.85}
    plans = [ghostify.plan(Flat().eval(), budget=limits, calibration=IMAGES) for _ in range(2)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--budget", "macs=0.9", "--budget", "params=0.95", "--calibration", "digits"], 0, "params "),
        (["--budget", "macs=90%", "--budget", "params=95 %", "--input-shape", "1,8,8"], 0, "params "),
        (["--budget", "macs", "--calibration", "digits"], 1, "budget='macs' is not KEY=VALUE"),
        (["--budget", "macs=half", "--input-shape", "1,8,8"], 1, "'half'} is no number above 0 with a unit"),
        (["--budget", "macs=0.9", "--input-shape", "1,8,8"], 0, "macs "),
        (["--threads", "2", "--input-shape", "1,8,8"], 1, "threads=2 is given without a backend"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "convert"])
def test_the_command_takes_budgets(command, arguments, status, told, tmp_path, monkeypatch, capsys):
    (tmp_path / "grey_net.py").write_text(
        "from ghostify.nn.cifar import CifarResNet\ndef grey():\n    return CifarResNet(1, width=8, in_channels=1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", None)  # given back afterwards
    out = ["--out", "small"] if command == "convert" else ["--json"]
    monkeypatch.setattr(sys, "argv", ["ghostify", command, "grey_net.py:grey", "--images", "16", *arguments, *out])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr()
    assert ended.value.code == status
    assert told in (shown.err if status else shown.out)
    if not status and command == "plan":
        plan = Plan.from_json(shown.out)
        assert plan.macs_after <= 0.9 * plan.macs
        assert plan.params_after <= 0.95 * plan.params


def test_a_fraction_is_meant_in_decimals():
    assert absolute("macs", 0.29, 100) == 29
    assert absolute("macs", 1e-9, 100) == 0
    assert absolute("macs", 2e6, 100) == 2_000_000
    assert absolute("macs", 10**400, 100) == 10**400


def test_a_unit_says_what_a_number_is():
    assert absolute("latency", "0.8 ms", 5_000) == 800
    assert absolute("latency", "12.5ms", 5_000) == 12_500
    assert absolute("macs", "29%", 100) == 29
    assert absolute("latency", ".5 %", 5_000) == 25
    assert planned({"macs": "70 %"}).decisions == planned({"macs": 0.7}).decisions
    assert [p.fraction for p in frontier(net(), points=["90 %", 0.5], calibration=IMAGES)] == sorted(
        planned({"macs": limit}).macs_after / planned({"macs": limit}).macs for limit in (0.9, 0.5)
    )


def test_the_frontier_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curve = frontier(net(), points=3, calibration=IMAGES)
    curve.plot(tmp_path / "curve.svg")
    curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.svg").read_text().startswith("<?xml")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OptionError, match=r"curve\.pdf' ends neither in \.svg"):
        curve.plot(tmp_path / "curve.pdf")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "curve.svg"]
