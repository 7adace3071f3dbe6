"""A report as one HTML page that needs nothing else: no network, no script (extra ``report``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from ghostify.extras import require
from ghostify.reporting import figures, rendering
from ghostify.reporting.figures import Point

if TYPE_CHECKING:
    from ghostify.reporting.report import Report


@dataclass(frozen=True)
class Headline:
    """One of the numbers at the top of the page."""

    value: str
    label: str
    detail: str


def html(report: Report, *, points: Sequence[Point] = ()) -> str:
    """The whole page.

    Args:
        report: What to show.
        points: Other networks for the plot of accuracy against MACs.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
    """
    jinja2 = require("jinja2", extra="report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("ghostify.reporting").joinpath("page.html.jinja").read_text(encoding="utf-8")
    top1 = report.accuracy.top1 if report.accuracy else None
    plots: list[tuple[str, str]] = []
    if report.plan is not None and len(report.plan):
        plots.append(("MACs of every convolution, in order of execution", figures.layer_macs(report.plan)))
        if any(decision.error is not None for decision in report.plan):
            plots.append(("What every Ghost unit missed of its layer at the start", figures.site_fits(report.plan)))
    if top1 is not None:
        pair = (
            Point("original", report.original.macs, top1.original),
            Point("ghost", report.compressed.macs, top1.compressed),
        )
        plots.append(("Accuracy against MACs", figures.accuracy_against_macs([*pair, *points])))
    if report.history:
        curves = figures.training_curves(report.history, top1.original if top1 else None)
        plots.append(("Distillation, epoch by epoch", curves))
    page: str = environment.from_string(source).render(
        title=rendering.title(report),
        subtitle=_subtitle(report),
        headlines=headlines(report),
        headers=rendering.HEADERS,
        rows=[row.cells for row in rendering.comparison_rows(report)],
        remarks=report.remarks,
        plots=plots,
        plan=report.plan,
        decision_text=rendering.decision_text,
        measured=[line.partition(": ")[::2] for line in rendering.measured_lines(report)],
        definitions=[line.partition(": ")[::2] for line in rendering.DEFINITIONS],
    )
    return page


def headlines(report: Report) -> list[Headline]:
    """The few numbers that answer whether it was worth it."""
    first, second = report.original, report.compressed
    found = []
    for label, before, after, unit in (
        ("parameters", first.params, second.params, "number"),
        ("MACs", first.macs, second.macs, "number"),
        ("bytes of tensors", first.state_bytes, second.state_bytes, "bytes"),
    ):
        if before and after:
            larger, word = (before / after, "fewer") if before >= after else (after / before, "more")
            detail = f"{rendering.amount(before, unit)} → {rendering.amount(after, unit)}"
            found.append(Headline(f"{larger:.2f}×", f"{word} {label}", detail))
    if report.latency is not None:
        ratio = report.latency.ratio
        word = "latency, no clear difference"
        if report.latency.is_clear:
            word = "faster" if ratio > 1 else "slower"
            ratio = max(ratio, 1 / ratio)
        times = [rendering.amount(t.median, "ms") for t in (report.latency.original, report.latency.compressed)]
        found.append(Headline(f"{ratio:.2f}×", word, " → ".join(times)))
    if report.accuracy is not None:
        if report.accuracy.top1 is not None:
            pair = report.accuracy.top1
            shares = [rendering.amount(share, "share") for share in (pair.original, pair.compressed)]
            difference = rendering.points(pair.compressed - pair.original)
            found.append(Headline(difference, "points of top-1 accuracy", " → ".join(shares)))
        agreement = rendering.amount(report.accuracy.agreement, "share")
        found.append(Headline(agreement, "agreement", f"of {report.accuracy.examples:,} examples"))
    return found


def _subtitle(report: Report) -> str:
    measured = f"measured {report.environment.created[:16].replace('T', ' ')}"
    if report.plan is None:
        return measured
    made = f"{len(report.plan.replaced)} of {len(report.plan)} convolutions became Ghost units"
    return f"{made} · {measured}"
