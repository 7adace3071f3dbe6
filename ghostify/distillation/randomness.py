"""One seed for everything random in a run, and the caller's random state given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Give Python's, NumPy's and torch's global random states back as they were, also after an error."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def reseed(seed: int, epoch: int, step: int, device: torch.device) -> None:
    """Seed all global generators for one step.

    What a step draws thus depends on its number alone, and not on how often validation drew from the
    same generators, or on where a run was taken up again.

    Args:
        seed: Of the run.
        epoch: Its number.
        step: Its number in the epoch; 0 is what comes before the first one.
        device: Where the models are.
    """
    mixed = mix(mix(seed, epoch), step)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)


def mix(seed: int, epoch: int) -> int:
    """One 63-bit seed for a pair, well apart for neighbouring pairs.

    Example:
        >>> mix(0, 1) != mix(1, 0)
        True
    """
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63
