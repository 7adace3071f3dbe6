"""What can be had for free: accuracy against MACs saved with `plan(keep=…)`, without one step of training.

    python -m benchmarks.keeping --network resnet20
    python -m benchmarks.keeping --network mobilenet_v2 --images 128 --imagenet weights/ --keep 0.99 --keep 0.995
    python -m benchmarks.keeping --report-only

Every layer gets the largest ratio at which the given share of its output's variance can still be expressed. Networks
and images as in benchmarks/networks.py. Rows are kept in docs/keeping.json, and a case that is there is not run again;
the table and the plot of docs/initialisation.md are made from it.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import ghostify
from benchmarks import pages
from benchmarks.networks import NETWORKS, SHARED, Case, accuracy, load
from ghostify.errors import NothingToConvertError

DOCS = Path(__file__).parents[1] / "docs"
ROWS, PAGE, PLOT = DOCS / "keeping.json", DOCS / "initialisation.md", DOCS / "keeping.svg"
CASE = ("network", "keep", "images", "seed")


def run(case: pages.Row, known: Case) -> pages.Row:
    """Plan by one share, convert, and score."""
    images = known.sample(case["images"])
    began = time.perf_counter()
    try:
        plan = ghostify.plan(known.model, keep=case["keep"], calibration=images)
    except NothingToConvertError:  # no layer keeps so much
        seconds, test = time.perf_counter() - began, accuracy(known.model, known.test())
        return {**case, "sites": 0, "saved": 0.0, "test": test, "seconds": seconds}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poor fits, which the table shows
        small = ghostify.apply(plan, known.model, calibration=images, seed=case["seed"]).eval()
    return {
        **case,
        "sites": len(plan.replaced),
        "saved": 100 * (1 - plan.macs_after / plan.macs),
        "seconds": time.perf_counter() - began,
        "test": accuracy(small, known.test()),
    }


def table_lines(rows: list[pages.Row]) -> Iterator[list[str]]:
    """A line for every share, least saved first."""
    for (network, keep, images), same in sorted(
        pages.grouped(rows, *CASE[:3]).items(), key=lambda item: (NETWORKS.index(item[0][0]), -item[0][1])
    ):
        yield [
            network,
            f"{keep:g}",
            str(images),
            pages.told([row["sites"] for row in same], 0),
            pages.told([*map(_saved, same)], 1),
            pages.told([row["test"] for row in same]),
            pages.told([*map(_lost, same)]),
            pages.told([row["seconds"] for row in same], 0),
            str(len(same)),
        ]


def _saved(row: pages.Row) -> float:
    return row["saved"]


def _lost(row: pages.Row) -> float:
    return row["teacher"] - row["test"]


def draw(rows: list[pages.Row]) -> None:
    """Points of accuracy lost against the share of MACs saved."""
    with pages.drawing(PLOT, 1, (6.4, 4)) as (panel,):
        for network in [name for name in NETWORKS if any(row["network"] == name for row in rows)]:
            mine = pages.grouped([row for row in rows if row["network"] == network], "keep", "images").values()
            saved, lost = ([statistics.mean(how(row) for row in same) for same in mine] for how in (_saved, _lost))
            panel.plot(*zip((0.0, 0.0), *sorted(zip(saved, lost))), marker="o", markersize=4, label=network)
        panel.set(xlabel="MACs saved, %", ylabel="points of accuracy lost", yscale="symlog")
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)


def write_page() -> None:
    """Put the table into the page, between its markers, and draw the plot."""
    rows = pages.read_rows(ROWS)
    headers = ["network", "keep", "images", "Ghost units", "MACs saved %", "accuracy %", "points lost", "s", "seeds"]
    pages.show(PAGE, "benchmarks.keeping", headers, list(table_lines(rows)), rows)
    draw(rows)


def main() -> None:
    parser = pages.options_of(__doc__, NETWORKS, SHARED)
    parser.add_argument("--keep", type=float, action="append", help="repeatable; 0.8, 0.9, 0.95, 0.98, 0.99 by default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in [] if options.report_only else options.seeds:
        known = load(options.network, seed, options.shared, options.imagenet)
        about = {"teacher": accuracy(known.model, known.test()), "on": pages.measured_on(options.threads)}
        for keep in options.keep or [0.8, 0.9, 0.95, 0.98, 0.99]:
            case = dict(zip(CASE, (options.network, keep, options.images, seed), strict=True))
            if not pages.is_there(ROWS, case):
                row = run(case, known) | about
                print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                pages.add_rows(ROWS, [row], CASE)
    write_page()


if __name__ == "__main__":
    main()
