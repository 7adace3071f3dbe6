"""Timing several things side by side, so that a busy machine disturbs all alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Run = Callable[[], object]
Times = NDArray[np.float64]

# Of a normal distribution: the interquartile range, and the standard error of a median over that of a mean.
_IQR, _MEDIAN = 1.349, 1.2533
# Half-width of a 95 % interval in standard errors.
CONFIDENCE = 1.96


@dataclass(frozen=True)
class Effort:
    """How long is measured.

    Attributes:
        repeats: Timed rounds at most; one round runs everything once.
        fewest: Timed rounds at least, whatever the time.
        warmup: Rounds before the first timed one.
        seconds: Warm-up and timed rounds each stop early after this time.
        precision: Timed rounds stop early, too, when the 95 % interval of each difference to the first run is
            narrower than ± this share of the first; 0 for never.
    """

    repeats: int = 30
    fewest: int = 5
    warmup: int = 5
    seconds: float = 10.0
    precision: float = 0.0


def interleaved(runs: Sequence[Run], effort: Effort, device: torch.device, *, threads: int) -> Times:
    """Time everything in turn, forwards and backwards: A B C, C B A, and so on.

    Args:
        runs: Calls without arguments.
        effort: How long.
        device: Where they run: a GPU is waited for.
        threads: On how many threads. What one processor thread does is timed by that thread's own clock, which
            stands still while another program has the processor; everything else by the clock on the wall.

    Returns:
        Milliseconds, ``(rounds, runs)``.
    """
    now = time.thread_time if has_own_clock(device, threads) else time.perf_counter

    def timed(run: Run) -> float:
        _synchronise(device)
        start = now()
        run()
        _synchronise(device)
        return (now() - start) * 1e3

    start = time.perf_counter()
    for done in range(effort.warmup):
        if done and time.perf_counter() - start > effort.seconds:
            break
        for run in runs:
            timed(run)
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < effort.repeats:
        if len(rounds) >= effort.fewest and time.perf_counter() - start > effort.seconds:
            break
        if effort.precision and len(rounds) >= effort.fewest and _is_precise(np.array(rounds), effort.precision):
            break
        if len(rounds) % 2 == 0:
            rounds.append([timed(run) for run in runs])
        else:  # the other way round, so that none always follows the same other
            rounds.append([timed(run) for run in reversed(runs)][::-1])
    return np.array(rounds)


def has_own_clock(device: torch.device, threads: int) -> bool:
    """Whether what is timed is the work of one processor thread, which has a clock; that of Windows ticks in 16 ms."""
    return threads == 1 and device.type == "cpu" and platform.system() != "Windows"


def median_and_error(values: Times) -> tuple[float, float]:
    """The median over rounds and its standard error, from the quartiles: outliers do not count.

    Args:
        values: ``(rounds,)``.
    """
    q25, median, q75 = np.percentile(values, [25, 50, 75])
    return float(median), float(_MEDIAN * (q75 - q25) / _IQR / np.sqrt(len(values)))


def outlier_share(times: Times) -> float:
    """The share of all times that lie further above the third quartile than 1.5 times the quartiles' distance."""
    q25, q75 = np.percentile(times, [25, 75], axis=0)
    return float((times > q75 + 1.5 * (q75 - q25)).mean())


def _is_precise(times: Times, precision: float) -> bool:
    first = float(np.median(times[:, 0]))
    differences = (times[:, column] - times[:, 0] for column in range(1, times.shape[1]))
    return all(CONFIDENCE * median_and_error(difference)[1] <= precision * first for difference in differences)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
