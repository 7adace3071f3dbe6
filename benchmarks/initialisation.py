"""What each start is worth, without one gradient step: accuracy right after conversion, seconds, memory.

    python -m benchmarks.initialisation --network resnet20 --ratio 2 --ratio 4
    python -m benchmarks.initialisation --network resnet56 --images 512 --initialiser alternating
    python -m benchmarks.initialisation --report-only

ResNet-20 and ResNet-56 on CIFAR-10 (parquet files and trained weights, `--data` and `--weights`), every 3×3 convolution
but the first. Images to start from are unlabelled training images; the score is that of the test images. Each case is
run in a process of its own, rows are kept in docs/initialisation.json, and a case that is there is not run again. The
table in docs/initialisation.md is written from it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tabulate import tabulate
from torch import nn

import ghostify
from benchmarks.hardware import processor
from ghostify.distillation import DataOptions
from ghostify.files import atomic_file
from ghostify.nn import cifar

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
ROWS, PAGE = ROOT / "docs/initialisation.json", ROOT / "docs/initialisation.md"
BEGIN, END = "<!-- begin: benchmarks.initialisation -->", "<!-- end -->"
CASE = ("network", "initialiser", "ratio", "images", "seed")


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    right = total = 0
    with torch.inference_mode():
        for images, labels in batches:
            right += int((model(images).argmax(1) == labels).sum())
            total += len(labels)
    return 100 * right / total


def estimate_norms(model: nn.Module, images: torch.Tensor) -> None:
    """Take the batch norms' statistics anew, as means over batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for batch in images.split(128):
            model(batch)
    model.eval()


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(case: dict[str, Any], data: str, weights: str, threads: int) -> dict[str, Any]:
    """One start: everything that is known of it."""
    torch.set_num_threads(threads)
    teacher = getattr(cifar, case["network"])()
    teacher.load_state_dict(load_file(Path(weights) / f"cifar10_{case['network']}.safetensors"))
    teacher.eval()
    splits = ghostify.load_data(f"parquet:{data}", DataOptions(seed=case["seed"]))
    images = splits.train.sample(case["images"])
    test = list(splits.test)
    before = peak_mib()
    began = time.perf_counter()
    small = ghostify.convert(
        teacher,
        ratio=case["ratio"],
        example_inputs=images[:1],
        calibration=images,
        initialiser=case["initialiser"],
        seed=case["seed"],
    ).eval()
    seconds = time.perf_counter() - began
    row = {
        **case,
        "teacher": accuracy(teacher, test),
        "start": accuracy(small, test),
        "seconds": seconds,
        "mib": peak_mib() - before,
        "params": small.ghostify_plan.params_after,
        "macs": small.ghostify_plan.macs_after,
    }
    estimate_norms(small, images)
    return {**row, "estimated": accuracy(small, test)}


def read_rows() -> list[dict[str, Any]]:
    return json.loads(ROWS.read_text(encoding="utf-8"))["rows"] if ROWS.is_file() else []


def write_rows(rows: list[dict[str, Any]], facts: dict[str, str]) -> None:
    ordered = sorted(rows, key=lambda row: [row[name] for name in CASE])
    lines = ",\n".join(json.dumps(row) for row in ordered)
    with atomic_file(ROWS) as temporary:
        temporary.write_text(f'{{"facts": {json.dumps(facts)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def told(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation, where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table_lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    together: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        together[tuple(row[name] for name in CASE[:-1])].append(row)
    for (network, initialiser, ratio, images), same in sorted(together.items(), key=lambda item: item[0][0::2]):
        yield [
            network,
            f"{ratio:g}",
            f"{same[0]['params'] / 1e3:,.0f}k",
            f"{same[0]['macs'] / 1e6:.1f}M",
            f"`{initialiser}`",
            str(images),
            told([row["start"] for row in same]),
            told([row["estimated"] for row in same]),
            told([row["seconds"] for row in same], 0),
            told([row["mib"] for row in same], 0),
            str(len(same)),
        ]


def write_page() -> None:
    """Put the table into the page, between its markers."""
    headers = ["network", "ratio", "params", "MACs", "start", "images", "test %", "norms anew %", "s", "MiB", "seeds"]
    table = tabulate(list(table_lines(read_rows())), headers=headers, tablefmt="github", disable_numparse=True)
    facts = json.loads(ROWS.read_text(encoding="utf-8"))["facts"]
    about = ", ".join(f"{name} {value}" for name, value in facts.items())
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    with atomic_file(PAGE) as temporary:
        temporary.write_text(f"{head}{BEGIN}\n\n{table}\n\n{about}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--initialiser", action="append", help="repeatable; all by default")
    parser.add_argument("--ratio", type=float, action="append", help="repeatable; 2 by default")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", default=str(SHARED / "cifar10"), help="folder of train-*.parquet and test-*.parquet")
    parser.add_argument("--weights", default=str(SHARED / "weights"), help="folder of cifar10_NETWORK.safetensors")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    facts = {
        "ghostify": ghostify.__version__,
        "torch": str(torch.__version__),
        "hardware": f"{processor()}, {options.threads} thread",
    }
    names = options.initialiser or list(ghostify.conversion.INITIALISERS)
    cases = [
        dict(zip(CASE, (options.network, name, ratio, options.images, seed), strict=True))
        for ratio in options.ratio or [2.0]
        for name in names
        for seed in options.seeds
    ]
    for case in [] if options.report_only else cases:
        if any(all(row[name] == case[name] for name in CASE) for row in read_rows()):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(run, (case, options.data, options.weights, options.threads))
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in row.items()}, flush=True)
        write_rows([*read_rows(), row], facts)
    write_page()


if __name__ == "__main__":
    main()
