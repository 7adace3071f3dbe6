"""The page of examples/cifar10.py: its finished runs, a table, and a plot of accuracy against MACs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.controls import NETWORKS
from benchmarks.hardware import processor
from benchmarks.pages import Row, add_rows, drawing, grouped, is_there, read_rows, show, told

DOCS = Path(__file__).parents[1] / "docs"
CASE = ("network", "teacher", "method", "ratio", "fusion", "epochs", "images", "seed", "loss", "lr", "warmup", "batch")
SAME = tuple(name for name in CASE if name != "seed")  # of the runs that one line of the table is made of
METHODS = ("teacher", "ghost", "planned", "labels", "random", "narrow", "pruned", "undistilled")  # in order
HEADERS = (
    "network",
    "method",
    "ratio",
    "epochs",
    "params",
    "MACs",
    "test %",
    "seeds",
    "start, s",
    "training, h",
    "hardware",
)


def hardware(device: str, threads: int) -> str:
    """What a run took its time on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {threads} thread{'s' * (threads > 1)}"


def method_of(row: Row) -> str:
    """With what is not usual about it."""
    fusion = [] if row["fusion"] == "concat" else [f"`{row['fusion']}`"]
    taught = [] if row["teacher"] == row["network"] else [f"by {row['teacher']}"]
    return ", ".join([row["method"], *fusion, *taught])


def table_lines(rows: list[Row]) -> Iterator[list[str]]:
    """A line for all seeds of what is otherwise the same run; times only where all took theirs on the same machine."""

    def place(same: list[Row]) -> tuple[object, ...]:
        row = same[0]
        network, method = list(NETWORKS).index(row["network"]), METHODS.index(row["method"])
        return (network, row["ratio"], method, row["fusion"], row["teacher"], row["epochs"])

    for same in sorted(grouped(rows, *SAME).values(), key=place):
        row = same[0]
        machines = sorted({one["hardware"] for one in same})
        timed = same if len(machines) == 1 else []
        starts = [one["start_seconds"] for one in timed if row["method"] != "teacher"]
        hours = [one["seconds"] / 3600 for one in timed if one["epochs"]]
        yield [
            row["network"],
            method_of(row),
            f"{row['ratio']:g}",
            str(row["epochs"] or ""),
            f"{row['params'] / 1e6:.3f}M",
            f"{row['macs'] / 1e6:.1f}M",
            told([one["test"] for one in same]),
            str(len(same)),
            told(starts, 0) if starts else "",
            told(hours, 1) if hours else "",
            " or ".join(machines),
        ]


def draw(rows: list[Row], plot: Path) -> None:
    """Test accuracy against MACs, a panel for every network."""
    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    methods = list(dict.fromkeys(method_of(row) for row in rows))  # each in one colour in all panels
    lengths = sorted({row["epochs"] for row in rows})
    with drawing(plot, len(networks), (4.6, 3.8)) as panels:
        for panel, network in zip(panels, networks):
            mine = [row for row in rows if row["network"] == network]
            for name, same in grouped(mine, "method", "fusion", "teacher", "epochs").items():
                points = sorted(
                    (macs / 1e6, statistics.mean(row["test"] for row in some))
                    for (macs,), some in grouped(same, "macs").items()
                )
                label = method_of(same[0]) + (f", {name[-1]} epochs" if name[-1] else "")
                colour = f"C{methods.index(method_of(same[0]))}"
                marker = "os^Dv"[lengths.index(name[-1]) % 5]
                panel.plot(*zip(*points), marker=marker, markersize=4, color=colour, label=label.replace("`", ""))
            panel.set(title=network, xlabel="MACs, millions", xlim=(0, None))
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
        panels[0].set_ylabel("test accuracy, %")


def write_page(runs: Path, docs: Path = DOCS) -> None:
    """Take the rows of finished runs, put the table into the page, between its markers, and draw the plot."""
    file = docs / "results.json"
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(runs.glob("*/row.json"))]
    fresh = [row for row in found if not is_there(file, {name: row[name] for name in CASE})]
    if fresh:
        add_rows(file, fresh, CASE)
    rows = read_rows(file)
    show(docs / "results.md", "examples.cifar10", HEADERS, list(table_lines(rows)), rows)
    draw(rows, docs / "results.svg")
