"""Planned against uniform at equal MACs: accuracy right after conversion, and after a short distillation.

    python -m benchmarks.budgets --network resnet20 --ratio 2
    python -m benchmarks.budgets --network mobilenet_v2 --images 128 --ratio 1.25 --imagenet weights/
    python -m benchmarks.budgets --report-only

`uniform` is one ratio wherever it saves; `explained` and `measured` are budgets of as many MACs, by what each layer
loses of its variance or by what the network's answers lose. Networks, images and schedules are those of
benchmarks/initialisation.py. Rows go to docs/budgets.json, the table to docs/initialisation.md.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import ghostify
from benchmarks.initialisation import distilled
from benchmarks.networks import NETWORKS, SHARED, Case, accuracy, load
from benchmarks.pages import Row, add_rows, grouped, is_there, measured_on, options_of, read_rows, show, told
from ghostify.spec import Plan

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "budgets.json"
HOW = ("uniform", "explained", "measured")
CASE = ("network", "ratio", "how", "images", "seed", "epochs")


def planned(known: Case, case: Row, images: torch.Tensor) -> Plan:
    """A plan of one kind, of as many MACs as the uniform one has."""
    uniform = ghostify.plan(known.model, ratio=case["ratio"], example_inputs=images[:1])
    if case["how"] == "uniform":
        return uniform
    budget = {"macs": uniform.macs_after}
    return ghostify.plan(known.model, budget=budget, sensitivity=case["how"], calibration=images)


def rows_of(case: Row, epochs: list[int], known: Case) -> Iterator[Row]:
    """The start, and what a distillation of so many epochs makes of it."""
    images = known.sample(case["images"])
    began = time.perf_counter()
    plan = planned(known, case, images)
    between = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poor fits, which the table shows
        small = ghostify.apply(plan, known.model, calibration=images, seed=case["seed"]).eval()
    facts = {
        "units": len(plan.replaced),
        "params": plan.params_after,
        "macs": plan.macs_after,
        "left": plan.macs_after / plan.macs,
        "planning": between - began,
        "seconds": time.perf_counter() - between,
    }
    yield {**case, **facts, "epochs": 0, "test": accuracy(small, known.test())}
    for count in epochs:
        one = {**case, "epochs": count, "initialiser": "alternating"}
        yield {**facts, **one, **distilled(copy.deepcopy(small), one, known)}


def table_lines(rows: list[Row]) -> Iterator[list[str]]:
    starts = grouped([row for row in rows if not row["epochs"]], *CASE[:4])
    later = grouped([row for row in rows if row["epochs"]], *CASE[:4], "epochs")
    for (network, ratio, how, images), same in sorted(
        starts.items(), key=lambda item: (NETWORKS.index(item[0][0]), item[0][1], HOW.index(item[0][2]))
    ):
        trained = [later.get((network, ratio, how, images, epochs), []) for epochs in (1, 3)]
        yield [
            network,
            how if how != "uniform" else f"uniform {ratio:g}",
            f"{100 * same[0]['left']:.1f}",
            f"{same[0]['params'] / 1e6:.3f}M",
            str(same[0]["units"]),
            str(images),
            told([row["test"] for row in same]),
            *(f"{told([row['test'] for row in some])} ({len(some)})" if some else "" for some in trained),
            told(planning, 0) if (planning := [row["planning"] for row in same if row["planning"] is not None]) else "",
            str(len(same)),
        ]


def main() -> None:
    parser = options_of(__doc__, NETWORKS, SHARED)
    parser.add_argument("--ratio", type=float, default=2, help="of the uniform plan, whose MACs are the budget")
    parser.add_argument("--how", choices=HOW, nargs="+", default=HOW)
    parser.add_argument("--epochs", type=int, nargs="*", default=[], choices=(1, 3))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in [] if options.report_only else options.seeds:
        known = load(options.network, seed, options.shared, options.imagenet)
        for how in options.how:
            case = dict(zip(CASE, (options.network, options.ratio, how, options.images, seed)))
            wanted = [count for count in options.epochs if not is_there(ROWS, {**case, "epochs": count})]
            if wanted or not is_there(ROWS, {**case, "epochs": 0}):
                for row in rows_of(case, wanted, known):
                    if not is_there(ROWS, {name: row[name] for name in CASE}):
                        print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
                        add_rows(ROWS, [row | {"on": measured_on(options.threads)}], CASE)
    rows = read_rows(ROWS)
    headers = ["network", "plan", "MACs left %", "params", "units", "images", "test %", "1 epoch %", "3 epochs %"]
    show(
        DOCS / "initialisation.md", "benchmarks.budgets", [*headers, "planning, s", "seeds"], [*table_lines(rows)], rows
    )


if __name__ == "__main__":
    main()
