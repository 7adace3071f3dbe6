"""The comparison of two models, as plain numbers; tables, plots and pages are views of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic

from ghostify.distillation.history import Epoch
from ghostify.documents import STRICT, read_document
from ghostify.errors import ArtefactError, OptionError
from ghostify.extras import require
from ghostify.files import atomic_file
from ghostify.reporting.page import html
from ghostify.reporting.rendering import csv_text, full_text, markdown, text
from ghostify.spec import Plan


@dataclass(frozen=True)
class ModelNumbers:
    """What one model costs.

    Attributes:
        name: Its class name.
        params: Numbers in its parameters, shared ones once.
        state_bytes: Bytes of all tensors in its state: parameters and persistent buffers.
        macs: Multiply-accumulates of convolutions and linear layers, batch 1, no bias.
        outside: Operations outside this definition, with their multiply-accumulates; ``None``
            where torch has no formula for them.
    """

    name: str
    params: int
    state_bytes: int
    macs: int
    outside: dict[str, int | None]

    __pydantic_config__ = STRICT

    @property
    def flops(self) -> int:
        """Floating-point operations, two for each multiply-accumulate, batch 1."""
        return 2 * self.macs


@dataclass(frozen=True)
class Timing:
    """Times of one model for the whole batch, in milliseconds.

    Attributes:
        median: Half of the runs were faster.
        q25: A quarter of the runs were faster.
        q75: Three quarters of the runs were faster.
        minimum: The fastest run.
    """

    median: float
    q25: float
    q75: float
    minimum: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Latency:
    """Latency of both models, run in turn.

    Attributes:
        original: Times of the original, ms.
        compressed: Times of the compressed model, ms.
        ratio: Median over all pairs of runs of original time / compressed time; above 1 is faster.
        ratio_q25: Its lower quartile.
        ratio_q75: Its upper quartile.
        pairs: Timed runs of each model.
        pairs_asked: Timed runs asked for; more than ``pairs`` where the time limit came first.
        warmup: Runs of each model before the first timed one.
        threads: Threads that torch used.
        backend: What ran them, with the device's name.
        dtype: Floating-point type of the parameters.
        channels_last: Whether models and inputs were in channels-last memory format.
        clock: ``wall``; or ``thread``: the own time of the one processor thread that worked.
    """

    original: Timing
    compressed: Timing
    ratio: float
    ratio_q25: float
    ratio_q75: float
    pairs: int
    pairs_asked: int
    warmup: int
    threads: int
    backend: str
    dtype: str
    channels_last: bool
    clock: Literal["wall", "thread"] = "wall"

    __pydantic_config__ = STRICT

    @property
    def is_clear(self) -> bool:
        """Whether the middle half of the pairs agrees on which model is the faster one."""
        return self.ratio_q25 > 1 or self.ratio_q75 < 1


@dataclass(frozen=True)
class Pair:
    """The same number of both models."""

    original: float
    compressed: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Accuracy:
    """Accuracy on the data given, as shares from 0 to 1.

    Attributes:
        examples: How many examples.
        classes: How many classes the models score.
        top1: Share of examples whose class has the highest score; ``None`` without targets.
        top5: Share of examples whose class is among the five highest; ``None`` without targets or
            with fewer than ten classes.
        agreement: Share of examples to which both models give the same class.
        output_difference: Mean absolute difference of the scores; ``None`` if some are not finite.
    """

    examples: int
    classes: int
    top1: Pair | None
    top5: Pair | None
    agreement: float
    output_difference: float | None

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Environment:
    """Where the numbers come from.

    Attributes:
        created: Date and time with the offset from UTC, ISO 8601.
        torch: Version of torch.
        python: Version of Python.
        system: Operating system and machine.
        device: Name of the processor that ran the models.
        threads: Threads that torch may use.
    """

    created: str
    torch: str
    python: str
    system: str
    device: str
    threads: int

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Report:
    """Original and compressed model side by side. Print it to read it; made by [ghostify.compare][].

    Attributes:
        original: What the original costs.
        compressed: What the compressed model costs.
        input_shapes: Shapes of the example inputs, with the batch dimension.
        latency: Measured latency; ``None`` if not asked for.
        accuracy: Measured accuracy; ``None`` without data, or where the outputs are no class scores.
        plan: What was done to every convolution; ``None`` if unknown.
        history: The epochs of the distillation run, if given.
        environment: Where the numbers come from.
        remarks: What a reader must know to trust the numbers; printed with them.
    """

    original: ModelNumbers
    compressed: ModelNumbers
    input_shapes: tuple[tuple[int, ...], ...]
    latency: Latency | None
    accuracy: Accuracy | None
    plan: Plan | None
    history: tuple[Epoch, ...]
    environment: Environment
    remarks: tuple[str, ...]

    __pydantic_config__ = STRICT

    def __str__(self) -> str:
        return text(self)

    def to_json(self) -> str:
        """The report as JSON text, for [Report.from_json][ghostify.Report.from_json]."""
        return _REPORT_ADAPTER.dump_json(self, indent=1).decode()

    @staticmethod
    def from_json(document: str | bytes) -> Report:
        """Read a report from JSON text; checks every field, runs no code.

        Raises:
            ArtefactError: The text is not a report.
        """
        return read_document(_REPORT_ADAPTER, document, kind="report", verb="compare", error=ArtefactError)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report in the format that the suffix names: .html, .md, .json, .csv or .txt.

        Args:
            path: The file; missing folders are made, and it appears complete or not at all.

        Raises:
            OptionError: The suffix is none of these.
            MissingExtraError: ``.html`` without the extra ``report``.
            OutputError: The file cannot be written.
        """
        check_format(path)
        content = _FORMATS[Path(path).suffix.lower()](self)
        with atomic_file(path) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="")


def check_format(path: str | os.PathLike[str]) -> None:
    """See that a report can be written to a file of this name, before there is one.

    Raises:
        OptionError: Its suffix names no format.
        MissingExtraError: ``.html`` without the extra ``report``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        raise OptionError(
            f"path={str(path)!r} ends in {suffix!r}, which names no format. Use one of {', '.join(_FORMATS)}."
        )
    for module in ("jinja2", "matplotlib") if suffix == ".html" else ():
        require(module, extra="report")


_FORMATS: dict[str, Callable[[Report], str]] = {
    ".html": html,
    ".md": markdown,
    ".json": Report.to_json,
    ".csv": csv_text,
    ".txt": full_text,
}

_REPORT_ADAPTER = pydantic.TypeAdapter(Report)
