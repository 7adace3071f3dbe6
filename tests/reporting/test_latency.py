"""Two models are timed in turn, fairly, and left alone."""

import itertools

import pytest
import torch
from torch import nn

from ghostify.backends import timing
from ghostify.errors import InputsError, OptionError
from ghostify.reporting import LatencyOptions, measure_latency


class Noted(nn.Module):
    def __init__(self, name, calls):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, self.training, torch.is_inference_mode_enabled(), x.shape))
        return self.layer(x)


@pytest.fixture
def calls():
    return []


@pytest.fixture
def pair(calls):
    return Noted("A", calls), Noted("B", calls)


def test_runs_alternate_and_change_their_order(pair, calls):
    measure_latency(*pair, example_inputs=torch.randn(2, 3, 8, 8), options=LatencyOptions(repeats=6, warmup=2))
    assert "".join(name for name, *_ in calls) == "ABAB" + "ABBA" * 3
    assert all(not training and inference and shape[0] == 2 for _, training, inference, shape in calls)
    assert all(model.training for model in pair)


def test_times_are_the_quartiles_of_what_the_clock_said(pair, monkeypatch):
    # One read per run's start and end: A takes 4 ms and B 2 ms, except one pair where A takes 40 ms.
    now = [0.0]
    duration = {"A": itertools.chain([0.040], itertools.repeat(0.004)), "B": itertools.repeat(0.002)}

    def forward(self, x):
        now[0] += next(duration[self.name])
        return x

    monkeypatch.setattr(Noted, "forward", forward)
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(timing.time, clock, lambda: now[0])
    found = measure_latency(*pair, example_inputs=torch.randn(1, 3, 8, 8), options=LatencyOptions(repeats=8, warmup=0))
    assert found.original.median == pytest.approx(4)
    assert found.original.minimum == pytest.approx(4)
    assert found.compressed.q75 == pytest.approx(2)
    assert (found.ratio, found.ratio_q25, found.ratio_q75) == pytest.approx((2, 2, 2))
    assert found.is_clear
    assert found.pairs == found.pairs_asked == 8


def test_the_time_limit_stops_early_but_not_before_five_pairs(pair, calls, monkeypatch):
    now = itertools.count()
    for clock in ("perf_counter", "thread_time"):
        monkeypatch.setattr(timing.time, clock, lambda: float(next(now)))
    options = LatencyOptions(repeats=100, warmup=50, seconds=1)
    found = measure_latency(*pair, example_inputs=torch.randn(1, 3, 8, 8), options=options)
    assert (found.pairs, found.pairs_asked) == (5, 100)
    assert len(calls) == 2 * (1 + 5)


def test_it_says_how_it_measured(pair):
    second = pair[1].to(torch.float64)
    found = measure_latency(
        pair[0], second, example_inputs=torch.randn(1, 3, 8, 8), options=LatencyOptions(repeats=5, warmup=1)
    )
    assert found.threads == torch.get_num_threads()
    assert found.backend.startswith("torch eager, ")
    assert found.dtype == "float32 (original), float64 (ghost)"
    assert found.warmup == 1
    assert found.clock == ("thread" if found.threads == 1 else "wall")


def test_channels_last_measures_copies(pair):
    strides = [model.layer.weight.stride() for model in pair]
    seen = []
    pair[0].layer.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    options = LatencyOptions(repeats=5, warmup=0, channels_last=True)
    found = measure_latency(*pair, example_inputs=torch.randn(2, 3, 8, 8), options=options)
    assert found.channels_last
    assert seen == [True] * 5
    assert [model.layer.weight.stride() for model in pair] == strides


def test_models_on_two_devices_are_refused(pair):
    with pytest.raises(InputsError, match=r"cpu and compressed on meta"):
        measure_latency(pair[0], pair[1].to("meta"), example_inputs=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("wrong", [{"repeats": 4}, {"warmup": -1}, {"seconds": 0}, {"seconds": float("nan")}])
def test_options_are_checked(wrong):
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}="):
        LatencyOptions(**wrong)
