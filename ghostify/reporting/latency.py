"""Latency of two models, measured side by side so that a busy machine disturbs both alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghostify.backends.folding import fold
from ghostify.backends.runners import Backend, device_name, device_of, running, runs_of
from ghostify.backends.timing import Effort, has_own_clock, interleaved
from ghostify.errors import InputsError, OptionError
from ghostify.reporting.report import Latency, Timing
from ghostify.tracing.example import Example, ExampleInputs
from ghostify.tracing.running import evaluating

_FEWEST_PAIRS = 5  # quartiles of fewer say nothing
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LatencyOptions:
    """How latency is measured.

    Attributes:
        repeats: Timed runs of each model.
        warmup: Runs of each model before the first timed one.
        seconds: Warm-up and timed runs each stop early after this time, the timed ones not before 5 pairs.
        channels_last: Measure copies of both models, and the inputs, in channels-last memory format.
        backend: What to run both models on, a [Backend][ghostify.Backend] or its name; by default that for which the
            plan was made, or else torch as it is set up.

    Raises:
        OptionError: A value is outside its range.
    """

    repeats: int = 30
    warmup: int = 5
    seconds: float = 10.0
    channels_last: bool = False
    backend: Backend | str | None = None

    def __post_init__(self) -> None:
        if self.repeats < _FEWEST_PAIRS:
            raise OptionError(f"repeats={self.repeats!r} is too few for a median and quartiles. Use 5 or more.")
        if self.warmup < 0:
            raise OptionError(f"warmup={self.warmup!r} is negative. Use 0 or more runs.")
        if self.backend is not None:
            object.__setattr__(self, "backend", Backend.of(self.backend))
            if self.channels_last:
                raise OptionError(f"channels_last=True is torch's: backend={self.backend} chooses its own layout.")
        if not self.seconds > 0:
            raise OptionError(f"seconds={self.seconds!r} is not a time. Use a positive number, such as 10.")


def measure_latency(
    original: nn.Module,
    compressed: nn.Module,
    *,
    example_inputs: ExampleInputs | Example,
    options: LatencyOptions | None = None,
) -> Latency:
    """Time both models in turn (A B, B A, A B, …) in evaluation and inference mode.

    Args:
        original: The model to compare with.
        compressed: The smaller one, on the same device.
        example_inputs: The batch to run on, as given: its batch size is kept.
        options: Repeats, warm-up, time limit, memory format.

    Returns:
        Times in milliseconds for the whole batch, and their ratio pair by pair.

    Raises:
        InputsError: The models are on different devices.
    """
    options = options or LatencyOptions()
    example = Example.of(example_inputs)
    device = _shared_device(original, compressed)
    models = (original, compressed)
    if options.channels_last:
        models = (_channels_last_copy(original), _channels_last_copy(compressed))
    effort = Effort(options.repeats, _FEWEST_PAIRS, options.warmup, options.seconds)
    backend = Backend("torch", torch.get_num_threads()) if options.backend is None else Backend.of(options.backend)
    if backend.folds:
        models, device = (fold(original, example_inputs=example), fold(compressed, example_inputs=example)), _CPU
    with evaluating(*models), running(backend):
        if options.channels_last:
            runs = [_channels_last_run(model, example) for model in models]
        else:
            runs = [runs_of(backend, [model], example)[0] for model in models]
        times = interleaved(runs, effort, device, threads=backend.threads)
    ratio = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
    return Latency(
        original=timing_of(times[:, 0]),
        compressed=timing_of(times[:, 1]),
        ratio=float(ratio[1]),
        ratio_q25=float(ratio[0]),
        ratio_q75=float(ratio[2]),
        pairs=len(times),
        pairs_asked=options.repeats,
        warmup=options.warmup,
        threads=backend.threads,
        backend=f"{'torch eager' if backend.name == 'torch' else backend.name}, {device_name(device)}",
        dtype=_dtypes(models),
        channels_last=options.channels_last,
        clock="thread" if has_own_clock(device, backend.threads) else "wall",
    )


def _shared_device(original: nn.Module, compressed: nn.Module) -> torch.device:
    device, other = device_of(original), device_of(compressed)
    if device != other:
        raise InputsError(
            f"original is on {device} and compressed on {other}: their latencies cannot be compared. "
            "Move both to one device, or pass latency=None."
        )
    return device


def _channels_last_run(model: nn.Module, example: Example) -> Callable[[], object]:
    moved = example.to(model)
    args, kwargs = tree_map(_to_channels_last, (moved.args, moved.kwargs))
    return lambda: model(*args, **kwargs)


def _to_channels_last(leaf: object) -> object:
    if isinstance(leaf, Tensor) and leaf.dim() == 4:
        return leaf.to(memory_format=torch.channels_last)
    return leaf


def _channels_last_copy(model: nn.Module) -> nn.Module:
    # Module.to changes the module that it is called on, and this one is the caller's.
    return copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def timing_of(milliseconds: np.ndarray) -> Timing:
    """Median, quartiles and minimum of times ``(runs,)`` in milliseconds."""
    q25, median, q75 = np.percentile(milliseconds, [25, 50, 75])
    return Timing(median=float(median), q25=float(q25), q75=float(q75), minimum=float(milliseconds.min()))


def _dtypes(models: Sequence[nn.Module]) -> str:
    names = []
    for model in models:
        parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
        names.append("none" if parameter is None else str(parameter.dtype).removeprefix("torch."))
    return names[0] if names[0] == names[1] else f"{names[0]} (original), {names[1]} (ghost)"
