"""Timing side by side: how many rounds, and by which clock."""

import math
import time

import numpy as np
import torch

from ghostify.backends.timing import Effort, has_own_clock, interleaved


def test_rounds_stop_when_differences_are_known(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("ghostify.backends.timing.time.perf_counter", lambda: next(ticks) * 1e-3)
    effort = Effort(repeats=400, fewest=15, warmup=3, seconds=2.0, precision=0.01)
    assert len(interleaved([int, int, int], effort, torch.device("cpu"), threads=2)) == effort.fewest
    assert math.isclose(interleaved([int], effort, torch.device("cpu"), threads=2)[0, 0], 1.0)


def test_one_thread_has_a_clock_of_its_own():
    """Which stands still while it waits."""
    effort = Effort(repeats=3, fewest=3, warmup=0)
    times = [
        interleaved([lambda: time.sleep(0.02)], effort, torch.device("cpu"), threads=threads) for threads in (1, 2)
    ]
    assert np.median(times[0]) < 10 < np.median(times[1])


def test_the_clock_of_a_thread_is_too_coarse_on_windows(monkeypatch):
    assert has_own_clock(torch.device("cpu"), 1)
    monkeypatch.setattr("platform.system", lambda: "Windows")
    assert not has_own_clock(torch.device("cpu"), 1)
