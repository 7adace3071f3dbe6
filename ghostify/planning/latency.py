"""What every choice at every layer saves on a backend, measured there, layer by layer.

The original and all its choices run in turn, so a busy machine disturbs all alike; what counts is the median of
the differences within the rounds. A product of matrices runs along as a reference: times are scaled by its own,
so that layers which were measured while the machine was slow can be added to others. Layers that are alike
are timed once, and every result is kept on disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import pydantic
import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from ghostify.backends.runners import Backend, device_name, device_of, running, runs_of
from ghostify.backends.timing import CONFIDENCE, Effort, Run, interleaved, median_and_error, outlier_share
from ghostify.documents import STRICT
from ghostify.extras import require
from ghostify.measurements import keep, place_of, recall
from ghostify.planning.layers import Layer
from ghostify.spec import Decision, Forecast, GhostSpec, Site
from ghostify.tracing import Trace, evaluating

# Of every layer: until the 95 % intervals of all differences are narrower than ± 1 % of it, for two seconds at most.
_LAYER = Effort(repeats=400, fewest=15, warmup=3, seconds=2.0, precision=0.01)
_NETWORK = Effort(repeats=40, fewest=9, warmup=3, seconds=10.0)
# Part of every key: what was measured in another way is not read.
_METHOD = 4
# Standard errors by which a choice must be faster to be on offer.
_SURE = 3
# Side of the matrices whose product is the reference.
_REFERENCE = 256


@dataclass(frozen=True)
class Saving:
    """What a choice saves, in milliseconds for the batch; negative where it is slower.

    Attributes:
        ms: Median of the original's time minus the choice's, round by round.
        error: Its standard error.
    """

    ms: float
    error: float

    __pydantic_config__ = STRICT

    @property
    def pays(self) -> bool:
        """Whether it is faster by more than the noise: three standard errors, as the best of many is picked."""
        return self.ms > _SURE * self.error


@dataclass(frozen=True)
class LayerTimes:
    """One layer, measured.

    Attributes:
        original: Milliseconds of the layer with what follows it, all calls, for the batch.
        savings: By the text of the spec.
        index: What putting the channels in order by an index adds, ms.
        reference: Milliseconds of the reference meanwhile.
        rounds: Timed rounds.
        outliers: Share of times far above the others.
    """

    original: float
    savings: dict[str, Saving]
    index: float
    reference: Annotated[float, pydantic.Field(gt=0)]
    rounds: int
    outliers: float

    __pydantic_config__ = STRICT


_ADAPTER = pydantic.TypeAdapter(LayerTimes)


@dataclass(frozen=True)
class LatencyTable:
    """The times of a network's layers on a backend.

    Attributes:
        backend: What ran them.
        device: Its name.
        batch: Examples in the batch.
        original: Milliseconds of the whole original for the batch.
        error: Its standard error.
        reference: Milliseconds of the reference meanwhile.
        layers: By the name of the site.
    """

    backend: Backend
    device: str
    batch: int
    original: float
    error: float
    reference: float
    layers: Mapping[str, LayerTimes]

    def saving(self, site: Site, spec: GhostSpec, *, ordered: bool) -> Saving:
        """What a choice saves at a site.

        Args:
            site: The site.
            spec: The choice.
            ordered: Whether it needs an index.
        """
        times = self.layers[site.name]
        found, pace = times.savings[str(spec)], self.reference / times.reference
        return Saving(pace * (found.ms - (times.index if ordered else 0.0)), pace * found.error)

    def timed(self, decisions: Sequence[Decision]) -> tuple[Decision, ...]:
        """The decisions with what each saves, given the order of its channels."""
        return tuple(
            replace(made, saved_ms=self._saving(made).ms) if made.spec is not None else made for made in decisions
        )

    def forecast(self, decisions: Sequence[Decision]) -> Forecast:
        """How long the whole network will take."""
        savings = [self._saving(made) for made in decisions if made.replaced]
        noise = CONFIDENCE * math.hypot(self.error, *(saving.error for saving in savings))
        return Forecast(
            backend=self.backend.name,
            threads=self.backend.threads,
            device=self.device,
            batch=self.batch,
            original_ms=self.original,
            converted_ms=max(0.0, self.original - sum(saving.ms for saving in savings)),
            noise_ms=noise,
        )

    def _saving(self, made: Decision) -> Saving:
        assert made.spec is not None  # of a replaced site
        return self.saving(made.site, made.spec, ordered=made.order == "index")


def latency_table(facts: Trace, choices: Mapping[str, Sequence[GhostSpec]], backend: Backend) -> LatencyTable:
    """Measure a network, and every choice at its layers.

    Args:
        facts: Of the original.
        choices: By the name of the site.
        backend: What to run on.

    Raises:
        MissingExtraError: The backend is not installed.
        ExportError: The network cannot be exported for it.
    """
    device = torch.device("cpu") if backend.folds else device_of(facts.model)
    batch, processor = facts.example.batch, device_name(device)
    layers = [Layer.of(site, facts) for site in facts.sites if choices.get(site.name)]
    measured: dict[str, LayerTimes] = {}
    found: dict[str, LayerTimes] = {}
    original, error, reference = _whole(facts, backend, device)
    bar = Console(stderr=True)
    for layer in track(layers, f"timing layers ({backend})", console=bar, transient=True, disable=not bar.is_terminal):
        name = layer.site.name
        specs = choices[name]
        key = " | ".join([layer.key, *map(str, specs), str(backend), processor, f"batch {batch}", _versions(backend)])
        if key not in measured:
            file = place_of("latency", key)
            known = recall(_ADAPTER, file)
            if known is not None and known.savings.keys() != set(map(str, specs)):
                known = None  # a file that something else has changed
            measured[key] = known or _measured(layer, specs, backend, device, batch)
            if known is None:
                keep(_ADAPTER, measured[key], file)
        found[name] = measured[key]
    return LatencyTable(backend, processor, batch, original, error, reference, found)


def _whole(facts: Trace, backend: Backend, device: torch.device) -> tuple[float, float, float]:
    """The median time of the original in milliseconds, its standard error, and the reference's time."""
    with evaluating(facts.model), running(backend):
        runs = [*runs_of(backend, [facts.model], facts.example), _reference(device)]
        times = interleaved(runs, _NETWORK, device, threads=backend.threads)
    return *median_and_error(times[:, 0]), float(np.median(times[:, 1]))


def _measured(
    layer: Layer, specs: Sequence[GhostSpec], backend: Backend, device: torch.device, batch: int
) -> LayerTimes:
    networks: list[nn.Module] = [layer.network(None, fold=backend.folds)]
    networks += [layer.network(spec, fold=backend.folds) for spec in specs]
    # What an index costs is asked of one choice for all: it depends on the size of the maps.
    networks.append(layer.network(specs[0], ordered=True, fold=backend.folds))
    with running(backend):
        runs = [*runs_of(backend, networks, layer.example(batch)), _reference(device)]
        times = interleaved(runs, _LAYER, device, threads=backend.threads)
    times, reference = times[:, :-1] * len(layer.site.calls), float(np.median(times[:, -1]))
    original, *choices, indexed = times.T
    return LayerTimes(
        original=float(np.median(original)),
        savings={
            str(spec): Saving(*median_and_error(original - choice)) for spec, choice in zip(specs, choices, strict=True)
        },
        index=max(0.0, float(np.median(indexed - choices[0]))),
        reference=reference,
        rounds=len(times),
        outliers=outlier_share(times),
    )


def _reference(device: torch.device) -> Run:
    """A product of matrices that takes some tenths of a millisecond on one core."""
    matrix = torch.ones(_REFERENCE, _REFERENCE, device=device)
    return lambda: matrix @ matrix


def _versions(backend: Backend) -> str:
    runtime = f"onnxruntime {require('onnxruntime', extra='onnx').__version__}, " if backend.folds else ""
    return f"{runtime}torch {torch.__version__}, method {_METHOD}"  # torch writes what the runtime runs
