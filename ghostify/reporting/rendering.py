"""A report as text, Markdown and CSV: all from the same rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tabulate import tabulate

from ghostify.spec import Decision

if TYPE_CHECKING:
    from ghostify.reporting.report import Latency, Report

DEFINITIONS = (
    "MACs: multiply-accumulates of convolutions and linear layers for one example, without bias, measured while the "
    "model runs. FLOPs = 2 × MACs.",
    "Size: the bytes of all tensors in the state (parameters and buffers), not of a file. 1 MB = 1,000,000 bytes.",
    "Agreement: the share of examples to which both models give the same class.",
)
HEADERS = ("", "original", "ghost", "change")
_CSV_HEADERS = (
    "scope",
    "name",
    "quantity",
    "unit",
    "original",
    "ghost",
    "original/ghost",
    "shape",
    "decision",
    "reason",
    "dw_size",
    "ratio",
)
LAYER_HEADERS = ("site", "shape", "decision", "params", "MACs", "reason")


@dataclass(frozen=True)
class Row:
    """One quantity of both models.

    Attributes:
        quantity: Its name.
        unit: ``number``, ``bytes``, ``ms``, ``share`` (0 to 1) or ``score``.
        original: The original's value, if it has one.
        compressed: The compressed model's value.
        ratio: Original / compressed, where a ratio is meant.
        note: What else belongs beside the change.
        better: What a ratio above 1 is called, and one below.
    """

    quantity: str
    unit: str
    original: float | None
    compressed: float
    ratio: float | None = None
    note: str = ""
    better: tuple[str, str] = ("", "")

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row as a reader sees it, in the order of ``HEADERS``."""
        first = "" if self.original is None else amount(self.original, self.unit)
        return self.quantity, first, amount(self.compressed, self.unit), self.change

    @property
    def change(self) -> str:
        """``1.94× fewer`` for a ratio, ``−0.80 points`` for a share."""
        if self.ratio is not None:
            return f"{ratio_text(self.ratio, *self.better)}{self.note}"
        if self.original is not None and self.unit == "share":
            return f"{points(self.compressed - self.original)} points"
        return self.note


def comparison_rows(report: Report) -> list[Row]:
    """Everything that was measured, one row for each quantity."""
    first, second = report.original, report.compressed
    fewer = ("fewer", "more")
    rows = [
        Row("parameters", "number", first.params, second.params, _ratio(first.params, second.params), "", fewer),
        Row("MACs", "number", first.macs, second.macs, _ratio(first.macs, second.macs), "", fewer),
        Row("FLOPs (2 × MACs)", "number", first.flops, second.flops, _ratio(first.flops, second.flops), "", fewer),
        Row(
            "size of the tensors",
            "bytes",
            first.state_bytes,
            second.state_bytes,
            _ratio(first.state_bytes, second.state_bytes),
            "",
            ("smaller", "larger"),
        ),
    ]
    if report.latency is not None:
        rows += _latency_rows(report.latency)
    if report.accuracy is not None:
        found = report.accuracy
        for name, pair in (("top-1 accuracy", found.top1), ("top-5 accuracy", found.top5)):
            if pair is not None:
                rows.append(Row(name, "share", pair.original, pair.compressed))
        rows.append(Row("agreement", "share", None, found.agreement, note=f"of {found.examples:,} examples"))
        if found.output_difference is not None:
            rows.append(Row("output difference", "score", None, found.output_difference, note="mean absolute"))
    return rows


def _latency_rows(latency: Latency) -> Iterator[Row]:
    a, b = latency.original, latency.compressed
    note = f" ({latency.ratio_q25:.2f} to {latency.ratio_q75:.2f})"
    if not latency.is_clear:
        note += ", no clear difference"
    words = ("faster", "slower") if latency.is_clear else ("", "")
    yield Row("latency, median", "ms", a.median, b.median, latency.ratio, note, words)
    yield Row("latency, interquartile range", "ms", a.q75 - a.q25, b.q75 - b.q25)
    yield Row("latency, minimum", "ms", a.minimum, b.minimum)


def layer_rows(report: Report) -> list[tuple[str, ...]]:
    """The plan's sites in the order of ``LAYER_HEADERS``; empty if the plan is unknown."""
    return [
        (
            d.site.name,
            d.site.shape,
            decision_text(d),
            _arrow(d.params_before, d.params_after),
            _arrow(d.macs_before, d.macs_after),
            d.reason,
        )
        for d in report.plan or ()
    ]


def decision_text(decision: Decision) -> str:
    """``ghost s=2`` or ``keep``."""
    return f"ghost {decision.spec}" if decision.spec else "keep"


def measured_lines(report: Report) -> list[str]:
    """How the numbers came about, one sentence a line."""
    shapes = ", ".join("×".join(map(str, shape)) for shape in report.input_shapes)
    lines = [f"Inputs: {shapes} (batch first); counts are for one example."]
    if report.latency is not None:
        found = report.latency
        early = f", stopped by the time limit before {found.pairs_asked}" if found.pairs < found.pairs_asked else ""
        form = ", channels-last" if found.channels_last else ""
        clock = ", by that thread's own clock (not the wall's)" if found.clock == "thread" else ""
        lines.append(
            f"Latency: of the whole batch, {found.backend}, {found.threads} thread{'s'[: found.threads != 1]}{clock}, "
            f"{found.dtype}{form}; {found.pairs} runs of each model in turn after {found.warmup} to warm up{early}; "
            "the change is the median of the pairwise ratios (with their quartiles)."
        )
    if report.accuracy is not None:
        lines.append(f"Accuracy: {report.accuracy.examples:,} examples, {report.accuracy.classes:,} classes.")
    e = report.environment
    lines.append(f"Environment: {e.created}, torch {e.torch}, Python {e.python}, {e.system}, {e.device}.")
    return lines


def text(report: Report) -> str:
    """The comparison as a table, with how it was measured and what to beware of."""
    rows = [row.cells for row in comparison_rows(report)]
    align = ("left", "right", "right", "left")
    table = tabulate(rows, headers=HEADERS, tablefmt="simple", disable_numparse=True, colalign=align)
    lines = [*measured_lines(report), *(f"Remark: {remark}" for remark in report.remarks)]
    return "\n".join([title(report), "", table, "", *lines])


def full_text(report: Report) -> str:
    """The comparison, then every layer, then the definitions."""
    parts = [text(report)]
    if report.plan is not None:
        parts.append(tabulate(layer_rows(report), headers=LAYER_HEADERS, tablefmt="simple", disable_numparse=True))
    parts.append("\n".join(DEFINITIONS))
    return "\n\n".join(parts) + "\n"


def markdown(report: Report) -> str:
    """The same in GitHub's Markdown."""

    def table(rows: list[tuple[str, ...]], headers: tuple[str, ...], align: tuple[str, ...]) -> str:
        safe = [[_markdown_safe(cell) for cell in row] for row in rows]
        return tabulate(safe, headers=headers, tablefmt="github", disable_numparse=True, colalign=align)

    compared: list[tuple[str, ...]] = [row.cells for row in comparison_rows(report)]
    parts = [f"# {_markdown_safe(title(report))}", table(compared, HEADERS, ("left", "right", "right", "left"))]
    if report.remarks:
        parts += ["## Remarks", _markdown_list(report.remarks)]
    if report.plan is not None and len(report.plan):
        align = ("left", "left", "left", "right", "right", "left")
        parts += ["## Layers", table(layer_rows(report), LAYER_HEADERS, align)]
    parts += ["## How it was measured", _markdown_list(measured_lines(report))]
    parts += ["## Definitions", _markdown_list(DEFINITIONS)]
    return "\n\n".join(parts) + "\n"


def csv_text(report: Report) -> str:
    """One line for each number: those of every layer, then those of the whole model, unrounded."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV_HEADERS)
    for d in report.plan or ():
        facts: list[object] = [d.site.shape, "ghost" if d.replaced else "keep", _csv_safe(d.reason)]
        facts += [d.spec.dw_size, d.spec.ratio] if d.spec else ["", ""]
        for quantity, before, after in (
            ("parameters", d.params_before, d.params_after),
            ("MACs", d.macs_before, d.macs_after),
        ):
            numbers: list[object] = ["number", before, after, _ratio(before, after)]
            writer.writerow(["layer", _csv_safe(d.site.name), quantity, *numbers, *facts])
    name = _csv_safe(report.original.name)
    for row in comparison_rows(report):
        writer.writerow(
            ["model", name, row.quantity, row.unit, row.original, row.compressed, row.ratio, *([""] * 5)],
        )
    return stream.getvalue()


def title(report: Report) -> str:
    """``ResNet: original and ghost``."""
    return f"{report.original.name}: original and ghost"


def amount(value: float, unit: str) -> str:
    """A value as a reader sees it.

    Example:
        >>> amount(40551040, "number"), amount(1091048, "bytes"), amount(0.9173, "share")
        ('40,551,040', '1.091 MB', '91.73 %')
    """
    if unit == "number":
        return f"{value:,.0f}"
    if unit == "bytes":
        return f"{value / 1e6:,.3f} MB"
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit == "ms":
        return f"{value:,.3f} ms" if value < 10 else f"{value:,.2f} ms"
    return f"{value:.4g}"


def ratio_text(ratio: float, above: str, below: str) -> str:
    """A ratio, and its direction in a word.

    Example:
        >>> ratio_text(1.94, "fewer", "more"), ratio_text(0.8, "faster", "slower")
        ('1.94× fewer', '0.80×, slower')
    """
    if round(ratio, 2) == 1 or not above:
        return f"{ratio:.2f}×"
    return f"{ratio:.2f}× {above}" if ratio > 1 else f"{ratio:.2f}×, {below}"


def points(difference: float) -> str:
    """A difference of shares in percentage points, with its sign.

    Example:
        >>> points(-0.008), points(0.0)
        ('−0.80', '0.00')
    """
    shown = f"{100 * abs(difference):.2f}"
    if float(shown) == 0:
        return shown
    return f"{'−' if difference < 0 else '+'}{shown}"


def _ratio(before: float, after: float) -> float | None:
    return before / after if after else None


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _markdown_list(lines: tuple[str, ...] | list[str]) -> str:
    return "\n".join(f"- {_markdown_safe(line)}" for line in lines)


def _markdown_safe(value: str) -> str:
    """Names come from the model: they must not end a cell, start a tag or format anything."""
    for character in "\\|`<*[]":
        value = value.replace(character, f"\\{character}")
    return " ".join(value.split())


def _csv_safe(value: str) -> str:
    """A spreadsheet runs a cell that starts with one of these as a formula; a leading apostrophe prevents it."""
    return f"'{value}" if value[:1] in tuple("=+-@\t\r") else value
