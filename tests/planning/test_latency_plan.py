"""Plans that keep to a latency: what is measured, what is on offer, and what the plan promises.

Times are made up where a rule is tested: a runner that takes as long as a table says.
"""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

import ghostify
from ghostify.backends.runners import Backend
from ghostify.cli import main
from ghostify.errors import BudgetError, MissingExtraError, NothingToConvertError, OptionError
from ghostify.nn.cifar import CifarResNet
from ghostify.nn.folded import FoldedGhost
from ghostify.nn.ghost import GhostConv
from ghostify.planning import latency, planner
from ghostify.spec import GhostSpec, Plan
from ghostify.tracing import trace

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def net(blocks=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CifarResNet(blocks, width=16).eval()


class Clock:
    """Stands in for the timing of modules: a Ghost unit takes what ``unit`` says, all else one millisecond."""

    def __init__(self, monkeypatch, unit, noise=0.0):
        self.unit, self.noise, self.modules, self.pace = unit, noise, [], 1.0
        monkeypatch.setattr(latency, "runs_of", self.runs)
        monkeypatch.setattr(latency, "interleaved", self.times)

    def runs(self, backend, modules, example):
        self.modules += modules
        return list(modules)

    def times(self, runs, effort, device, threads):
        generator = np.random.default_rng(0)
        own = np.array([self.of(run) for run in runs])
        return self.pace * (own + self.noise * generator.standard_normal((25, len(runs))))

    def of(self, run):
        if not isinstance(run, nn.Module):
            return 0.5  # the reference
        if isinstance(run, CifarResNet):
            return 10.0
        units = [module for module in run.modules() if isinstance(module, (GhostConv, FoldedGhost))]
        return self.unit(units[0]) if units else 1.0


def by_share(unit):
    """Faster the fewer intrinsic channels there are; an index costs a tenth of a millisecond."""
    conv = unit.primary_conv if isinstance(unit, GhostConv) else unit.primary[0]
    rows = conv.out_channels if isinstance(unit, GhostConv) else sum(part.out_channels for part in unit.primary)
    return 0.2 + 0.8 * rows / 64 + (0.1 if unit.channel_order is not None else 0.0)


def planned(limit, blocks=1, **options):
    return ghostify.plan(net(blocks), budget={"latency": limit}, example_inputs=X, **options)


def test_the_forecast_is_the_original_less_what_the_layers_save(monkeypatch):
    Clock(monkeypatch, by_share)
    plan = planned(0.85)
    assert plan.latency.original_ms == 10.0
    assert plan.latency.converted_ms == pytest.approx(10.0 - sum(made.saved_ms for made in plan.replaced))
    assert plan.latency.left <= 0.85
    assert (plan.latency.backend, plan.latency.threads, plan.latency.batch) == ("onnxruntime", 1, 2)
    assert all(made.saved_ms > 0 for made in plan.replaced)
    assert "expected" in str(plan)
    assert "saved, ms" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan


def test_milliseconds_are_a_limit_too(monkeypatch):
    Clock(monkeypatch, by_share)
    assert planned(8.5).latency == planned(0.85).latency
    assert planned(8.5).replaced == planned(0.85).replaced
    assert planned("8.5 ms") == planned(8.5)
    with pytest.raises(BudgetError, match=r"'0.85 ms'} cannot be met"):  # of 10 ms; 0.85 is a fraction
        planned("0.85 ms")
    with pytest.raises(NothingToConvertError, match=r"'0.8 ms' for milliseconds"):
        planned(1)


def test_a_site_that_does_not_pay_is_never_replaced(monkeypatch):
    Clock(monkeypatch, lambda unit: 1.3 if unit_width(unit) == 16 else by_share(unit))
    plan = planned(0.95)
    kept = [made for made in plan if made.site.out_channels == 16 and made.site.order > 0]
    assert kept
    assert not any(made.replaced for made in kept)
    assert all("no ratio pays on onnxruntime, 1 thread: the best saves" in made.reason for made in kept)


def unit_width(unit):
    return unit.out_channels if isinstance(unit, GhostConv) else 2 * sum(part.out_channels for part in unit.primary)


def test_what_is_within_the_noise_does_not_pay(monkeypatch):
    Clock(monkeypatch, lambda unit: 0.99, noise=0.2)
    with pytest.raises(BudgetError, match="cannot be met"):
        planned(0.99)


def test_a_latency_out_of_reach_names_the_least(monkeypatch):
    Clock(monkeypatch, by_share)
    with pytest.raises(BudgetError, match=r"latency=0\.\d+ \(\d\.\d+ ms of 10\.000 ms\)") as refused:
        planned(0.1)
    least = float(str(refused.value).split("latency=")[1].split()[0])
    assert planned(least).latency.left <= least + 1e-9
    with pytest.raises(BudgetError):
        planned(least - 0.001)
    with pytest.raises(NothingToConvertError, match=r"latency=10\.000 ms"):
        planned(1.0)


def test_where_nothing_pays_it_is_told_why(monkeypatch):
    Clock(monkeypatch, lambda unit: 1.5)
    with pytest.raises(BudgetError, match=r"no layer that may change saves any\. Kept are: .*no ratio pays on onnx"):
        planned(0.9)
    with pytest.raises(NothingToConvertError, match=r"that may change saves latency.*no ratio pays on onnxruntime"):
        ghostify.frontier(net(), key="latency", points=3, example_inputs=X)


def test_overrides_that_cost_more_than_all_else_saves_leave_no_curve(monkeypatch):
    """Fractions above 1 would have been read as milliseconds."""
    Clock(monkeypatch, lambda unit: 1.5)
    with pytest.raises(NothingToConvertError, match=r"saves latency: the original has as little as any plan"):
        ghostify.frontier(net(), key="latency", points=3, example_inputs=X, overrides={"layer1.*": 2})


def test_a_forecast_of_nothing_is_printed(monkeypatch):
    """Layers that take more alone than the network as a whole."""
    Clock(monkeypatch, lambda unit: -9.0)
    plan = planned(0.1)
    assert plan.latency.converted_ms == 0
    assert "10.00 → 0.00 ± " in plan.summary()
    assert "no telling how fast" in plan.summary()


def test_a_backend_that_is_missing_is_told_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(planner, "measured", lambda *options: pytest.fail("measured first"))
    with pytest.raises(MissingExtraError, match="module='onnxruntime'"):
        planned(0.9)


def test_an_index_counts_where_one_is_needed(monkeypatch):
    """Layers that write one residual stream with different ratios cannot all have their own order."""
    Clock(monkeypatch, by_share)
    plan = planned(0.8)
    indexed = [made for made in plan.replaced if made.order == "index"]
    plain = {str(made.spec): made.saved_ms for made in plan.replaced if made.order != "index"}
    for made in indexed:
        if str(made.spec) in plain:
            assert made.saved_ms == pytest.approx(plain[str(made.spec)] - 0.1)
    facts = trace(net(), X)
    some = next(site for site in facts.sites if site.order == 1)
    table = latency.latency_table(facts, {some.name: [GhostSpec(2)]}, Backend())
    saved = [table.saving(some, GhostSpec(2), ordered=ordered).ms for ordered in (False, True)]
    assert saved[0] - saved[1] == pytest.approx(0.1)


def test_layers_that_were_measured_on_a_slow_machine_are_scaled(monkeypatch, cache):
    clock = Clock(monkeypatch, by_share)
    calm = planned(0.85)
    times = clock.times
    monkeypatch.setattr(
        latency, "interleaved", lambda runs, *rest, **more: times(runs, *rest, **more) * (3 if len(runs) > 2 else 1)
    )
    monkeypatch.setenv("GHOSTIFY_CACHE", str(cache / "elsewhere"))
    assert [made.saved_ms for made in planned(0.85)] == pytest.approx([made.saved_ms for made in calm])


def test_alike_layers_are_timed_once_and_results_are_kept(monkeypatch, cache):
    clock = Clock(monkeypatch, by_share)
    first = planned(0.85, blocks=2)
    layers = [module for module in clock.modules if not isinstance(module, CifarResNet)]
    units = [module for module in layers if any(isinstance(part, FoldedGhost) for part in module.modules())]
    different = len(layers) - len(units)
    assert 0 < different < len([made for made in first if made.site.order > 0])
    assert len(list((cache / "latency").iterdir())) == different
    clock.modules.clear()
    assert planned(0.85, blocks=2) == first
    assert all(isinstance(module, CifarResNet) for module in clock.modules)
    next((cache / "latency").iterdir()).write_text("{broken")
    assert planned(0.85, blocks=2) == first
    assert not all(isinstance(module, CifarResNet) for module in clock.modules)


def test_kept_results_that_were_changed_are_measured_anew(monkeypatch, cache):
    Clock(monkeypatch, by_share)
    first = planned(0.85)
    file = next((cache / "latency").iterdir())
    kept = json.loads(file.read_text())
    for changed in ({**kept, "savings": dict(list(kept["savings"].items())[1:])}, {**kept, "reference": 0.0}):
        file.write_text(json.dumps(changed))
        assert planned(0.85) == first
        assert json.loads(file.read_text()) == kept


def test_layers_in_another_memory_format_are_timed_anew(monkeypatch, cache):
    Clock(monkeypatch, by_share)
    planned(0.85)
    different = len(list((cache / "latency").iterdir()))
    other = net().to(memory_format=torch.channels_last)
    ghostify.plan(other, budget={"latency": 0.85}, example_inputs=X)
    assert len(list((cache / "latency").iterdir())) == 2 * different


def test_several_budgets_hold_together(monkeypatch):
    Clock(monkeypatch, by_share)
    plan = ghostify.plan(net(), budget={"latency": 0.9, "macs": 0.6}, example_inputs=X, backend=Backend("torch", 2))
    assert plan.latency.left <= 0.9
    assert plan.macs_after <= 0.6 * plan.macs
    assert plan.latency.threads == 2


def test_a_backend_alone_keeps_what_does_not_pay(monkeypatch):
    Clock(monkeypatch, lambda unit: 2.0 if unit_width(unit) == 16 else by_share(unit))
    plan = ghostify.plan(net(), budget={"macs": 0.8}, backend="torch", example_inputs=X)
    assert all(made.site.out_channels > 16 for made in plan.replaced)
    assert plan.latency.backend == "torch"


def test_calibration_sharpens_what_is_lost(monkeypatch):
    Clock(monkeypatch, by_share)
    images = torch.randn(32, 3, 16, 16)
    measured = ghostify.plan(net(), budget={"latency": 0.85}, calibration=images)
    assert [made.explained for made in measured.replaced] != [made.explained for made in planned(0.85).replaced]


def test_the_frontier_of_latency(monkeypatch):
    Clock(monkeypatch, by_share)
    curve = ghostify.frontier(net(), key="latency", points=4, example_inputs=X)
    fractions = [point.plan.latency.left for point in curve]
    assert fractions == sorted(fractions)
    assert [point.damage for point in curve] == sorted((point.damage for point in curve), reverse=True)


def test_a_real_latency_is_planned_and_measured(capsys):
    pytest.importorskip("onnxruntime")
    model = CifarResNet(1, width=32).eval()
    x = torch.randn(1, 3, 32, 32)
    curve = ghostify.frontier(model, key="latency", points=1, example_inputs=x, skip=["layer[12].*", "layer3.0.conv1"])
    plan = next(iter(curve)).plan
    small = ghostify.apply(plan, model, example_inputs=x)
    report = ghostify.compare(model, small, example_inputs=x, latency=ghostify.LatencyOptions(repeats=5, seconds=1))
    assert report.latency.backend.startswith("onnxruntime")
    assert any(remark.startswith("Latency was planned: ") and "is measured." in remark for remark in report.remarks)
    elsewhere = dataclasses.replace(plan, latency=dataclasses.replace(plan.latency, device="Abacus"))
    quick = ghostify.LatencyOptions(repeats=5, seconds=0.1)
    report = ghostify.compare(model, small, plan=elsewhere, example_inputs=torch.cat([x, x]), latency=quick)
    assert report.latency.backend.startswith("onnxruntime")
    (told,) = (remark for remark in report.remarks if remark.startswith("Latency was planned"))
    assert told.startswith("Latency was planned on Abacus for inputs of shape 1×3×32×32: ")
    assert told.endswith("is measured here.")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": {"latency": -1}}, "'latency': -1} is no finite number above 0"),
        ({"budget": {"latency": 0.5}, "backend": 3}, "backend=3 is neither a name nor a Backend"),
        ({"keep": 0.9, "backend": "torch"}, "is given without a budget"),
    ],
)
def test_options_that_cannot_be_used(options, told):
    with pytest.raises(OptionError, match=told):
        ghostify.plan(net(), example_inputs=X, **options)


def test_the_command_plans_a_latency(monkeypatch, tmp_path, capsys):
    Clock(monkeypatch, by_share)
    (tmp_path / "made.py").write_text(
        "from ghostify.nn.cifar import CifarResNet\ndef net():\n    return CifarResNet(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", None)  # given back afterwards
    command = "plan made.py:net --budget latency=0.85 --backend torch --threads 2 --input-shape 3,16,16 --json"
    monkeypatch.setattr(sys, "argv", ["ghostify", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)["latency"]
    assert (told["backend"], told["threads"]) == ("torch", 2)
    assert told["converted_ms"] <= 0.85 * told["original_ms"]


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(monkeypatch, tmp_path):
    Clock(monkeypatch, by_share)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"cannot be kept in .*GHOSTIFY_CACHE"):
        assert planned(0.85).latency.left <= 0.85
