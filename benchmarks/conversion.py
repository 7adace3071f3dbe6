"""How long a conversion takes, against `copy.deepcopy` of the model plus one trace of it; prints a table.

    python benchmarks/conversion.py --model torchvision:resnet50 --size 224

Both sides are run in turn in one process; times are medians, with the quartiles. Needs the extra models.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from tabulate import tabulate

import ghostify
from ghostify.tracing import trace


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    model = ghostify.load_model(options.model).eval()
    x = torch.randn(1, 3, options.size, options.size)
    work: dict[str, Callable[[], object]] = {
        "deepcopy": lambda: copy.deepcopy(model),
        "trace": lambda: trace(model, x),
        "convert, no calibration": lambda: ghostify.convert(model, ratio=2, example_inputs=x),
        "convert, first filters": lambda: ghostify.convert(model, ratio=2, example_inputs=x, initialiser="first"),
    }
    for run in work.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(options.rounds):
        for name, run in work.items():
            times[name].append(seconds(run))
    times["deepcopy + trace"] = [a + b for a, b in zip(times["deepcopy"], times["trace"], strict=True)]
    rows = [
        [name, *(f"{1000 * value:.0f} ms" for value in statistics.quantiles(found, n=4))]
        for name, found in times.items()
    ]
    for name in ("convert, no calibration", "convert, first filters"):
        pairs = zip(times[name], times["deepcopy + trace"], strict=True)
        quartiles = statistics.quantiles([converted / baseline for converted, baseline in pairs], n=4)
        rows.append([f"{name} / (deepcopy + trace)", *(f"{value:.2f}" for value in quartiles)])
    print(f"{options.model}, {options.size}², {torch.get_num_threads()} threads, {options.rounds} rounds")
    print(tabulate(rows, headers=["", "lower quartile", "median", "upper quartile"], disable_numparse=True))


if __name__ == "__main__":
    main()
