"""Is a Ghost network smaller or faster than the original in 8 bits, or pruned? All as files in onnxruntime.

    python -m benchmarks.deployed --network resnet20 --images 512
    python -m benchmarks.deployed --report-only

Nothing is trained: `Ghost` is one ratio wherever it saves, started from unlabelled training images; 8-bit ranges come
from the same images; `pruned` has the MACs of Ghost, with the norms of the original or with norms estimated anew on the
same images (`norms anew`). All run in turn. Rows go to docs/deployed.json, the table to docs/deployment.md.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

import ghostify
from benchmarks.networks import NETWORKS, SHARED, Case, load
from benchmarks.pages import Row, add_rows, is_there, measured_on, options_of, read_rows, show
from ghostify.conversion import estimate_norms
from ghostify.deployment import FormsConfig, QuantisationConfig, compare_deployed, pruned
from ghostify.tracing.counting import count_macs

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "deployed.json"
CASE = ("network", "ratio", "images", "seed", "threads")


def rows_of(case: Row, known: Case) -> Iterator[Row]:
    """A row for every form, in the order of the table."""
    images = known.sample(case["images"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poor fits, which the table shows
        small = ghostify.convert(
            known.model, ratio=case["ratio"], calibration=images, example_inputs=images[:1], seed=case["seed"]
        )
    macs = count_macs(small, images[:1]).macs
    fewer = {name: pruned(known.model, macs, example_inputs=images[:1]) for name in ("pruned", "pruned, norms anew")}
    estimate_norms(fewer["pruned, norms anew"], images)
    config = FormsConfig(
        threads=case["threads"],
        repeats=200,
        seconds=40,
        quantisation=QuantisationConfig(images=case["images"], agreement=0.0),
    )
    forms = compare_deployed(
        known.model,
        small,
        example_inputs=images[:1],
        calibration=images,
        data=known.test(),
        others=fewer,
        config=config,
    )
    print(forms, flush=True)
    for place, form in enumerate(forms.forms):
        facts = dataclasses.asdict(form)
        faster = {name.replace("ratio", "faster"): facts.pop(name) for name in ("ratio", "ratio_q25", "ratio_q75")}
        yield {
            **case,  # whose ratio is that of the Ghost network
            "place": place,
            **facts,
            **faster,
            "examples": forms.examples,
            "rounds": forms.rounds,
            "on": f"{measured_on(case['threads'])}, {forms.backend.split(',')[0]}",
        }


def table_lines(rows: list[Row]) -> Iterator[list[str]]:
    for row in rows:
        first = next(other for other in rows if [other[k] for k in CASE] == [row[k] for k in CASE])
        yield [
            row["network"],
            row["name"],
            f"{row['bytes'] / 1e3:,.0f}",
            f"{first['bytes'] / row['bytes']:.2f}×",
            f"{row['weight_bytes'] / 1e3:,.0f}",
            f"{row['params']:,}",
            f"{row['macs'] / 1e6:.1f}M",
            f"{100 * row['top1']:.2f}",
            f"{row['latency']['median']:.2f}",
            f"{row['faster']:.2f}×",
            f"{row['faster_q25']:.2f} … {row['faster_q75']:.2f}",
        ]


def main() -> None:
    parser = options_of(__doc__, NETWORKS, SHARED)
    parser.add_argument("--ratio", type=float, default=2, help="of the Ghost network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in [] if options.report_only else options.seeds:
        case = dict(zip(CASE, (options.network, options.ratio, options.images, seed, options.threads)))
        if not is_there(ROWS, case):
            known = load(options.network, seed, options.shared, options.imagenet)
            add_rows(ROWS, list(rows_of(case, known)), (*CASE, "place"))
    rows = read_rows(ROWS)
    headers = ["network", "form", "file kB", "smaller", "weights kB", "params", "MACs", "test %", "ms", "faster"]
    show(DOCS / "deployment.md", "benchmarks.deployed", [*headers, "quartiles"], [*table_lines(rows)], rows)


if __name__ == "__main__":
    main()
