"""What each start is worth: accuracy right after conversion and after a short distillation, seconds, memory.

    python -m benchmarks.initialisation --network resnet20 --ratio 2 --ratio 4
    python -m benchmarks.initialisation --network resnet20 --initialiser alternating --epochs 1 --epochs 3
    python -m benchmarks.initialisation --network mobilenet_v2 --images 128 --imagenet weights/
    python -m benchmarks.initialisation --report-only

ResNet-20 and ResNet-56 on CIFAR-10, every 3×3 convolution but the first; MobileNetV2 and EfficientNet-Lite0 on 1,000
photographs, every convolution that pays but the first (benchmarks/networks.py says where these are from). Images to
start from are unlabelled, and never those that score. Each case is run in a process of its own, rows are kept in
docs/initialisation.json, and a case that is there is not run again. The table and the plot of docs/initialisation.md
are made from it.
"""

from __future__ import annotations

import copy
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import nn

import ghostify
from benchmarks.networks import NETWORKS, SHARED, Case, accuracy, load
from benchmarks.pages import (
    Row,
    add_rows,
    drawing,
    grouped,
    is_there,
    measured_on,
    options_of,
    read_rows,
    show,
    told,
)
from ghostify.conversion import estimate_norms

ROOT = Path(__file__).parents[1]
ROWS, PAGE, PLOT = (ROOT / "docs" / f"initialisation.{kind}" for kind in ("json", "md", "svg"))
CASE = ("network", "initialiser", "ratio", "images", "seed", "epochs")

# Peak learning rates and warm-ups, found on the validation images: a good start wants a low peak soon.
LOSS = "mse"
SCHEDULES = {1: {"lr": 0.01, "warmup": 0.1}, 3: {"lr": 0.02, "warmup": 0.1}}
SCHEDULE_OF_RANDOM = {"lr": 0.05, "warmup": 0.3}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_known: list[Case] = []  # of the forked process, which gets it without a copy


def run(cases: list[Row], threads: int) -> list[Row]:
    """Cases that differ in their epochs alone, from one conversion; 0 epochs are the start itself."""
    torch.set_num_threads(threads)
    (known,) = _known
    case, teacher = cases[0], known.model
    images = known.sample(case["images"])
    before = peak_mib()
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poor fits, which the table shows
        small = ghostify.convert(
            teacher,
            ratio=case["ratio"],
            example_inputs=images[:1],
            calibration=images,
            initialiser=case["initialiser"],
            seed=case["seed"],
        ).eval()
    seconds, mib = time.perf_counter() - began, peak_mib() - before
    made = small.ghostify_plan
    facts = {"params": made.params_after, "macs": made.macs_after, "share": made.macs_after / made.macs}
    rows = []
    for one in cases:
        row = {**one, **facts}
        if one["epochs"]:
            row |= distilled(copy.deepcopy(small), one, known)
        else:
            row |= {"start": accuracy(small, known.test()), "seconds": seconds, "mib": mib}
            anew = copy.deepcopy(small)
            estimate_norms(anew, images.split(64))
            row["estimated"] = accuracy(anew, known.test())
        rows.append(row)
    return rows


def distilled(student: nn.Module, case: Row, known: Case) -> Row:
    """Distil a start; the test images score the epoch that the validation images chose."""
    schedule = SCHEDULE_OF_RANDOM if case["initialiser"] == "random" else SCHEDULES[case["epochs"]]
    began = time.perf_counter()
    done = ghostify.distill(
        student,
        teacher=known.model,
        data=known.train,
        val=known.val,
        epochs=case["epochs"],
        config=ghostify.DistillConfig(loss=LOSS, **schedule, seed=case["seed"]),
    )
    seconds = time.perf_counter() - began
    validation = [100 * (epoch.val_accuracy or 0) for epoch in done.history]
    return {
        "validation": validation,
        "test": accuracy(student.eval(), known.test()),
        "seconds": seconds,
        "loss": LOSS,
        **schedule,
    }


def table_lines(rows: list[Row]) -> Iterator[list[str]]:
    later = grouped([row for row in rows if row["epochs"]], *CASE[:4], "epochs")
    starts = grouped([row for row in rows if not row["epochs"]], "network", "ratio", "initialiser", "images")
    order = {name: place for place, name in enumerate((*NETWORKS, *ghostify.conversion.INITIALISERS))}
    for key, same in sorted(starts.items(), key=lambda item: (order[item[0][0]], item[0][1], order[item[0][2]])):
        network, ratio, initialiser, images = key
        trained = [later.get((network, initialiser, ratio, images, epochs), []) for epochs in SCHEDULES]
        yield [
            network,
            f"{ratio:g}",
            f"{same[0]['params'] / 1e6:.2f}M",
            f"{same[0]['macs'] / 1e6:.1f}M",
            f"`{initialiser}`",
            str(images),
            told([row["start"] for row in same]),
            told([row["estimated"] for row in same]),
            *(f"{told([row['test'] for row in some])} ({len(some)})" if some else "" for some in trained),
            told([row["seconds"] for row in same], 0),
            told([row["mib"] for row in same], 0),
            str(len(same)),
        ]


def draw(rows: list[Row]) -> None:
    """Accuracy right after conversion against the share of MACs that is left, a panel for every network."""
    starts = [row for row in rows if not row["epochs"]]
    networks = [name for name in NETWORKS if any(row["network"] == name for row in starts)]
    with drawing(PLOT, len(networks), (4.2, 3.6)) as panels:
        for panel, network in zip(panels, networks):
            mine = [row for row in starts if row["network"] == network]
            for initialiser in ghostify.conversion.INITIALISERS:
                points = sorted(
                    (100 * same[0]["share"], statistics.mean(row["start"] for row in same))
                    for (name, *_), same in grouped(mine, "initialiser", "ratio", "images").items()
                    if name == initialiser
                )
                if points:
                    panel.plot(*zip(*points), marker="o", markersize=4, label=initialiser)
            panel.axhline(mine[0]["teacher"], color="0.5", linestyle="--", linewidth=1)
            panel.set(title=network, xlabel="MACs left, %", ylim=(0, 100))
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("accuracy right after conversion, %")
        panels[-1].legend(fontsize=8)


def write_page() -> None:
    """Put the table into the page, between its markers, and draw the plot."""
    rows = read_rows(ROWS)
    headers = ["network", "ratio", "params", "MACs", "start", "images", "test %", "norms anew %"]
    headers += [*(f"{epochs} epoch{'s' * (epochs > 1)} %" for epochs in SCHEDULES), "s", "MiB", "seeds"]
    show(PAGE, "benchmarks.initialisation", headers, list(table_lines(rows)), rows)
    draw(rows)


def main() -> None:
    parser = options_of(__doc__, NETWORKS, SHARED)
    parser.add_argument("--initialiser", action="append", help="repeatable; all by default")
    parser.add_argument("--ratio", type=float, action="append", help="repeatable; 2 by default")
    parser.add_argument("--epochs", type=int, action="append", choices=SCHEDULES, help="distil for so long, too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # what forks must not have threads of its own
    names = options.initialiser or list(ghostify.conversion.INITIALISERS)
    for seed in [] if options.report_only else options.seeds:
        known = load(options.network, seed, options.shared, options.imagenet)
        about = {"teacher": accuracy(known.model, known.test()), "on": measured_on(options.threads)}
        for ratio, name in product(options.ratio or [2.0], names):
            conversion = (options.network, name, ratio, options.images, seed)
            cases = [dict(zip(CASE, (*conversion, epochs), strict=True)) for epochs in (0, *(options.epochs or ()))]
            cases = [case for case in cases if not is_there(ROWS, case)]
            if not cases:
                continue
            # A process of its own, so that its peak of memory is its own; it begins with the data read already.
            with multiprocessing.get_context("fork").Pool(1, _known.append, (known,)) as pool:
                rows = [row | about for row in pool.apply(run, (cases, options.threads))]
            for row in rows:
                print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            add_rows(ROWS, rows, CASE)
    write_page()


if __name__ == "__main__":
    main()
