"""What starting a large network costs: seconds and memory against the number of images.

    python -m benchmarks.calibration
    python -m benchmarks.calibration --network torchvision:resnet18 --images 64 --images 128

The network has random weights and reads random images, which cost what real ones do. Each number of images is run in a
process of its own; `MiB` is how far the peak of its memory rose over that of the model and the images.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings

import torch
from tabulate import tabulate

import ghostify
from benchmarks.pages import measured_on


def run(network: str, images: int, ratio: float, threads: int) -> tuple[int, float, float]:
    """Images, seconds and MiB of one start."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # random weights fit poorly, and a limit of memory is what is looked at
    torch.manual_seed(0)
    model = ghostify.load_model(network).eval()
    inputs = torch.randn(images, 3, 224, 224)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    ghostify.convert(model, ratio=ratio, calibration=inputs)
    seconds = time.perf_counter() - began
    return images, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="torchvision:resnet50")
    parser.add_argument("--images", type=int, action="append", help="repeatable; 64, 128 and 256 by default")
    parser.add_argument("--ratio", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = []
    for images in options.images or [64, 128, 256]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, (options.network, images, options.ratio, options.threads)))
        print(rows[-1], flush=True)
    print(tabulate(rows, headers=["images", "s", "MiB"], tablefmt="github", floatfmt=".0f"))
    print(measured_on(options.threads))


if __name__ == "__main__":
    main()
