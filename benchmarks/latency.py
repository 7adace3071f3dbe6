"""Is a network that was planned for a backend ever slower there? Predicted and measured latency of many networks.

    python -m benchmarks.latency --network torchvision:mobilenet_v2
    python -m benchmarks.latency --report-only

For each network: the fastest plan that can be reached (`tightest`), a plan half way to it (`half way`), and every
convolution that saves MACs at ratio 2 and 4 (`uniform`), all folded and run in turn with the original, one thread, one
image. Weights do not change a latency, so they are random. Rows go to docs/latency.json, the table to docs/latency.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

import ghostify
from benchmarks.pages import Row, add_rows, drawing, is_there, measured_on, read_rows, show
from ghostify.backends.runners import running, runs_of
from ghostify.backends.timing import Effort, interleaved
from ghostify.errors import GhostifyError
from ghostify.spec import Plan
from ghostify.tracing import Example
from ghostify.zoo import input_shape

NETWORKS = (
    "torchvision:resnet18", "torchvision:resnet34", "torchvision:resnet50", "torchvision:vgg16_bn",
    "torchvision:densenet121", "timm:mobilenetv1_100", "torchvision:mobilenet_v2", "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0", "timm:efficientnet_lite0", "torchvision:regnet_y_400mf",
    "torchvision:resnext50_32x4d", "torchvision:shufflenet_v2_x1_0", "torchvision:mnasnet1_0",
    "torchvision:convnext_tiny", "timm:ghostnet_100", "torchvision:squeezenet1_1", "torchvision:inception_v3",
    "timm:dm_nfnet_f0", "torchvision:deeplabv3_mobilenet_v3_large",
)  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs"
KEY = ("network", "backend", "threads", "plan")
_NETWORK_EFFORT = Effort(repeats=60, fewest=15, warmup=3, seconds=60)


def measured(network: str, backend: ghostify.Backend) -> Iterator[Row]:
    """A row for every plan of a network."""
    model = ghostify.load_model(network).eval()
    x = torch.randn(1, *(input_shape(model, network) or (3, 224, 224)), generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    plans: dict[str, Plan] = {}
    try:
        points = list(ghostify.frontier(model, key="latency", points=2, backend=backend, example_inputs=x))
        plans = dict(zip(("tightest", "half way"), (point.plan for point in points), strict=False))
    except GhostifyError as refusal:
        print(f"{network}: {refusal}", flush=True)
    seconds = time.perf_counter() - began
    for ratio in (2, 4):
        plans[f"uniform {ratio}"] = ghostify.plan(model, ratio=ratio, example_inputs=x)
    small = {name: ghostify.apply(plan, model, example_inputs=x, initialiser="first") for name, plan in plans.items()}
    networks: list[nn.Module] = [model, *small.values()]
    if backend.folds:
        networks = [ghostify.fold(one, example_inputs=x) for one in networks]
    with running(backend):
        runs = [runs_of(backend, [one.eval()], Example.of(x))[0] for one in networks]
        times = interleaved(runs, _NETWORK_EFFORT, torch.device("cpu"), threads=backend.threads)
    for column, (name, plan) in enumerate(plans.items(), start=1):
        left = np.percentile(times[:, column] / times[:, 0], [25, 50, 75])
        yield {
            "network": network,
            "backend": backend.name,
            "threads": backend.threads,
            "plan": name,
            "image": x.shape[-1],
            "units": len(plan.replaced),
            "convolutions": len(plan),
            "macs": plan.macs,
            "macs_left": plan.macs_after / plan.macs,
            "params_left": plan.params_after / plan.params,
            "original_ms": float(np.median(times[:, 0])),
            "left": float(left[1]),
            "left_q25": float(left[0]),
            "left_q75": float(left[2]),
            "predicted": None if plan.latency is None else plan.latency.left,
            "predicted_noise": None if plan.latency is None else plan.latency.noise_ms / plan.latency.original_ms,
            "rounds": len(times),
            "seconds": seconds,
            "on": measured_on(backend.threads),
        }


def report(rows: list[Row]) -> None:
    """Write table and plot."""
    lines = [
        [
            row["network"],
            row["backend"],
            row["plan"],
            f"{row['units']} of {row['convolutions']}",
            f"{1 / row['macs_left']:.2f}×",
            "" if row["predicted"] is None else f"{1 / row['predicted']:.2f}×",
            f"{1 / row['left']:.2f}×",
            f"{1 / row['left_q75']:.2f} … {1 / row['left_q25']:.2f}",
            f"{row['original_ms']:.1f}",
        ]
        for row in rows
    ]
    headers = ["network", "backend", "plan", "Ghost units", "fewer MACs", "predicted", "measured", "quartiles", "ms"]
    show(DOCS / "latency.md", "benchmarks.latency", headers, lines, rows)
    with drawing(DOCS / "latency.svg", panels=1, size=(6, 5)) as (axis,):
        for plan, marker in (("tightest", "o"), ("half way", "s"), ("uniform 2", "^"), ("uniform 4", "v")):
            some = [row for row in rows if row["plan"] == plan]
            axis.scatter(
                [1 / row["macs_left"] for row in some], [1 / row["left"] for row in some], marker=marker, label=plan
            )
        axis.axline((1, 1), slope=1, color="grey", linewidth=0.7)
        axis.axhline(1, color="grey", linewidth=0.7, linestyle=":")
        axis.set(xlabel="times fewer MACs", ylabel="times as fast (measured)")
        axis.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=NETWORKS)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=Path, default=DOCS / "latency.json")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    backend = ghostify.Backend(options.backend, options.threads)
    for network in () if options.report_only else options.network:
        case = {"network": network, "backend": backend.name, "threads": backend.threads}
        if not is_there(options.rows, case):
            add_rows(options.rows, list(measured(network, backend)), KEY)
    report(read_rows(options.rows))


if __name__ == "__main__":
    main()
