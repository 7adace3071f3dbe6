"""Plots of a report as SVG text (extra ``report``); the same numbers always give the same text."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ghostify.extras import require

if TYPE_CHECKING:
    from ghostify.distillation.history import Epoch
    from ghostify.spec import Plan

ORIGINAL = "#b4bfca"
GHOST = "#1f5f9e"
ACCENT = "#c4622d"
INK = "#27303a"
FAINT = "#dde3e9"

_WIDTH = 10.3  # inches: the text width of the page

_STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": "#8b96a1",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called $x$
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",  # looks the same wherever it is opened
}


@dataclass(frozen=True)
class Point:
    """A labelled point beside the two of a report, such as a published network.

    Attributes:
        label: What stands beside it.
        macs: Multiply-accumulates of one example.
        accuracy: Top-1 accuracy, a share from 0 to 1.
    """

    label: str
    macs: float
    accuracy: float


def layer_macs(plan: Plan) -> str:
    """MACs of every site before and after, as horizontal bars in order of execution.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    decisions = plan.decisions
    factor, unit = _scale(max((d.macs_before for d in decisions), default=0))
    names = [_shortened(d.site.name) for d in decisions]
    places = range(len(decisions))
    with _figure("layers", _WIDTH, 0.95 + 0.22 * max(len(decisions), 3)) as (figure, save):
        axes = figure.add_subplot()
        axes.barh(places, [d.macs_before / factor for d in decisions], 0.78, color=ORIGINAL, label="original")
        colours = [GHOST if d.replaced else "#8b96a1" for d in decisions]
        bars = axes.barh(places, [d.macs_after / factor for d in decisions], 0.4, color=colours)
        axes.set_yticks(places, names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(decisions) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{unit} (one example)")
        axes.grid(axis="x")
        shown = {d.replaced: bar for d, bar in zip(decisions, bars, strict=True)}
        labels = [(shown[key], label) for key, label in ((True, "ghost"), (False, "kept as it was")) if key in shown]
        handles = [axes.containers[0], *(bar for bar, _ in labels)]
        figure.legend(
            handles, ["original", *(label for _, label in labels)], loc="outside upper left", ncols=3, borderpad=0
        )
        return save()


def site_fits(plan: Plan) -> str:
    """What every started Ghost unit can express of its layer and what it misses, as horizontal bars.

    Args:
        plan: That of a converted model whose start has measured them.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    measured = [d for d in plan.replaced if d.explained is not None and d.error is not None]
    places = range(len(measured))
    with _figure("fits", _WIDTH, 0.95 + 0.22 * max(len(measured), 3)) as (figure, save):
        axes = figure.add_subplot()
        lost = [100 * (1 - (d.explained or 0)) for d in measured]
        axes.barh(places, lost, 0.78, color=ORIGINAL, label="not expressible by the chosen channels and cheap kernels")
        axes.barh(places, [100 * (d.error or 0) for d in measured], 0.4, color=ACCENT, label="missed in its place")
        axes.set_yticks(places, [_shortened(d.site.name) for d in measured])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(measured) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("share of the layer's variance (%)")
        axes.grid(axis="x")
        figure.legend(loc="outside upper left", ncols=2, borderpad=0)
        return save()


def accuracy_against_macs(points: Sequence[Point]) -> str:
    """Top-1 accuracy over MACs; the first point is the original, the second the ghost.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    factor, unit = _scale(max(point.macs for point in points))
    colours = ["#6f7c89", GHOST, *([ACCENT] * (len(points) - 2))]
    with _figure("accuracy", _WIDTH, 3.8) as (figure, save):
        axes = figure.add_subplot()
        x = [point.macs / factor for point in points]
        y = [100 * point.accuracy for point in points]
        axes.plot(x[1::-1], y[1::-1], color=FAINT, linewidth=2, zorder=1)
        axes.scatter(x, y, s=64, c=colours, zorder=2)
        spread = max(max(y) - min(y), 1.0)
        axes.set_xlim(0, 1.3 * max(x) or 1)
        axes.set_ylim(min(y) - 0.3 * spread, max(y) + 0.3 * spread)
        axes.set_xlabel(f"{unit} (one example)")
        axes.set_ylabel("top-1 accuracy (%)")
        axes.grid()
        offsets = _label_offsets(axes, [(a, b, point.label) for a, b, point in zip(x, y, points, strict=True)])
        for a, b, point, colour, (dx, dy, side) in zip(x, y, points, colours, offsets, strict=True):
            axes.annotate(
                f"{point.label}, {100 * point.accuracy:.2f} %",
                (a, b),
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                color=colour if colour != "#6f7c89" else INK,
            )
        return save()


def training_curves(history: Sequence[Epoch], original_accuracy: float | None = None) -> str:
    """Loss, and accuracy and agreement on validation data, by epoch.

    Args:
        history: The epochs; what was not recorded is not drawn.
        original_accuracy: The original's accuracy as a dashed line, a share from 0 to 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels: list[tuple[str, list[tuple[str, str, str, float]]]] = [
        ("loss", [("loss", "training", GHOST, 1), ("val_loss", "validation", ACCENT, 1)]),
        (
            "validation (%)",
            [("val_accuracy", "accuracy", GHOST, 100), ("val_agreement", "agreement with the original", ACCENT, 100)],
        ),
    ]
    shown = [(title, lines) for title, lines in panels if any(_curve(history, name, 1)[0] for name, *_ in lines)]
    with _figure("training", _WIDTH / 2 * max(len(shown), 1), 3.3) as (figure, save):
        ticker = require("matplotlib.ticker", extra="report")
        for position, (title, lines) in enumerate(shown, start=1):
            axes = figure.add_subplot(1, len(shown), position)
            for name, label, colour, factor in lines:
                epochs, values = _curve(history, name, factor)
                if epochs:
                    axes.plot(epochs, values, color=colour, label=label, marker="o", markersize=4, linewidth=1.8)
            if title.startswith("validation") and original_accuracy is not None:
                axes.axhline(
                    100 * original_accuracy,
                    color=INK,
                    linestyle=(0, (4, 3)),
                    linewidth=1.2,
                    label="original, on this report's data",
                )
            axes.set_xlabel("epoch")
            axes.set_ylabel(title)
            axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
            axes.margins(x=0.04, y=0.1)
            axes.grid(axis="y")
            axes.legend(loc="best", handlelength=1.6)
        return save()


def _curve(history: Sequence[Epoch], name: str, factor: float) -> tuple[list[int], list[float]]:
    pairs = [(e.epoch, factor * getattr(e, name)) for e in history if getattr(e, name) is not None]
    return [epoch for epoch, _ in pairs], [value for _, value in pairs]


def _scale(largest: float) -> tuple[float, str]:
    for factor, unit in ((1e9, "billion MACs"), (1e6, "million MACs"), (1e3, "thousand MACs")):
        if largest >= factor:
            return factor, unit
    return 1.0, "MACs"


def _shortened(name: str, longest: int = 44) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _label_offsets(axes: Any, points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """For each point the first place for its label that no other label or point has, in points of 1/72 inch."""
    across, up = 72 * (_WIDTH - 0.8), 72 * (3.8 - 0.9)  # about the axes' size, in points
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    centres = [(across * (x - left) / (right - left), up * (y - bottom) / (top - bottom)) for x, y, _ in points]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in centres]
    offsets = []
    for (cx, cy), (_, _, label) in zip(centres, points, strict=True):
        width = 5.4 * (len(label) + 9)
        chosen = None
        for dx, dy, side in (
            *((9.0, 0.0, "left"), (-9.0, 0.0, "right"), (0.0, 14.0, "center"), (0.0, -14.0, "center")),
            *((9.0, 13.0, "left"), (9.0, -13.0, "left"), (-9.0, 13.0, "right"), (-9.0, -13.0, "right")),
        ):
            start = cx + dx - {"left": 0.0, "right": width, "center": width / 2}[side]
            box = (start, cy + dy - 6, start + width, cy + dy + 6)
            if box[0] >= 0 and box[2] <= across + 20 and not any(_overlap(box, other) for other in taken):
                chosen = (dx, dy, side, box)
                break
        if chosen is None:  # too crowded: better on top of another than missing
            chosen = (9.0, 0.0, "left", (cx, cy, cx, cy))
        taken.append(chosen[3])
        offsets.append(chosen[:3])
    return offsets


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure of ``width`` × ``height`` inches, and a function that gives it as SVG; no global state is touched."""
    matplotlib = require("matplotlib", extra="report")
    # The caller's own style must not leak in; a change of backend would close the caller's figures.
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    with matplotlib.rc_context({**defaults, **_STYLE, "svg.hashsalt": name}):  # the salt: the same ids in every run
        figure = require("matplotlib.figure", extra="report").Figure((width, height), layout="constrained")
        figure.patch.set_alpha(0)

        def save() -> str:
            stream = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure.savefig(stream, format="svg", metadata=nothing)
            return _inline(stream.getvalue(), name)

        yield figure, save


def _inline(svg: str, name: str) -> str:
    """The ``<svg>`` element alone, with ids that are its own and a width that follows the page."""
    svg = svg[svg.index("<svg") :]
    width = re.search(r'\swidth="([\d.]+)pt"', svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    limit = float(width.group(1)) * 4 / 3 if width else 800
    return svg.replace("<svg", f'<svg role="img" style="max-width:{limit:.0f}px"', 1)
