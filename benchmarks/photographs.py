"""What can be had of a network whose training data are gone: a budget, and a distillation on a few photographs.

    python -m benchmarks.photographs --imagenet weights/ --left 0.9 --epochs 34
    python -m benchmarks.photographs --report-only

Of the 1,000 photographs (benchmarks/networks.py) one half scores. Of the other, 420 (`--images`) without their labels
plan a `measured` budget of so many of the MACs, start the units and teach them: both networks see random parts of them,
mirrored at random and blended with each other. No epoch is chosen, the last one counts: so few labels as are left
would choose by chance. A run that was stopped goes on when its command is given again. Rows go to
docs/photographs.json, the table to docs/initialisation.md.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import ghostify
from benchmarks.networks import IMAGENET_WEIGHTS, SHARED, accuracy, halves, imagenet_model, photographs
from benchmarks.pages import Row, add_rows, grouped, is_there, measured_on, options_of, read_rows, show, told
from ghostify.distillation import Augment, ImageBatches
from ghostify.distillation.pictures import Encoded, Look, PictureBatches, Pictures
from ghostify.extras import require

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "photographs.json"
CASE = ("network", "left", "images", "epochs", "lr", "mixup", "crop", "batch", "seed")
_SIDE = 224


def stored(shared: str | Path, rows: Tensor, labels: Tensor) -> Pictures:
    """Photographs as they lie in their file, 256×256, to cut parts out of."""
    parquet = require("pyarrow.parquet", extra="data")
    files = sorted((Path(shared) / "imagenet-sample").glob("test-*.parquet"))
    contents = [image["bytes"] for file in files for image in parquet.read_table(file)["img"].to_pylist()]
    return Pictures(lambda row: Encoded(f"photograph {row}", contents[row]), rows, labels[rows])


def run(case: Row, shared: str | Path, weights: Path, out: Path) -> Row:
    """Plan, convert, distil, score."""
    teacher, mean, std = imagenet_model(case["network"], weights)
    teacher.eval()
    images, labels = photographs(shared)
    start, score = halves(len(images))
    learn = start[: case["images"]]
    normal = {"batch_size": case["batch"], "mean": mean, "std": std, "seed": case["seed"]}
    calibration = ImageBatches(images[learn], None, **normal).sample(case["images"])
    test = ImageBatches(images[score], labels[score], **normal)

    began = time.perf_counter()
    plan = ghostify.plan(teacher, budget={"macs": case["left"]}, sensitivity="measured", calibration=calibration)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of poor fits, which the table shows
        student = ghostify.apply(plan, teacher, calibration=calibration, seed=case["seed"])
    seconds = time.perf_counter() - began
    row = {
        **case,
        "units": len(plan.replaced),
        "share": plan.macs_after / plan.macs,
        "params": plan.params_after,
        "teacher": accuracy(teacher, test),
        "start": accuracy(student.eval(), test),
        "start_seconds": seconds,
    }
    return (
        row
        | distilled(case, student, teacher, stored(shared, learn, labels), normal, out)
        | {"test": accuracy(student.eval(), test)}
    )


def distilled(case: Row, student: nn.Module, teacher: nn.Module, learn: Pictures, normal: Row, out: Path) -> Row:
    """Teach the student in place; its labels are not looked at."""
    augment = Augment(padding=0, crop=case["crop"])
    data = PictureBatches(learn, Look("RGB", (_SIDE, _SIDE), uniform=False), shuffle=True, augment=augment, **normal)
    done = ghostify.distill(
        student,
        teacher=teacher,
        data=data,
        epochs=case["epochs"],
        out=out / "-".join(str(case[name]) for name in CASE),
        config=ghostify.DistillConfig(
            loss="mse", lr=case["lr"], mixup=case["mixup"], freeze_norms=True, seed=case["seed"]
        ),
        resume=True,
    )
    return {
        "losses": [epoch.loss for epoch in done.history],
        "seconds": sum(epoch.seconds or 0 for epoch in done.history),
    }


def table_lines(rows: list[Row]) -> Iterator[list[str]]:
    for same in grouped(rows, *CASE[:-1]).values():
        first = same[0]
        yield [
            first["network"],
            f"{100 * first['share']:.1f}",
            f"{first['params'] / 1e6:.3f}M",
            str(first["units"]),
            *(told([row[name] for row in same], 1) for name in ("teacher", "start")),
            str(first["epochs"]),
            f"{first['lr']:g}",
            told([row["test"] for row in same], 1),
            told([row["teacher"] - row["test"] for row in same], 1),
            told([row["seconds"] / 60 for row in same], 0),
            str(len(same)),
        ]


def main() -> None:
    parser = options_of(__doc__, tuple(IMAGENET_WEIGHTS), SHARED)
    parser.set_defaults(images=420)
    parser.add_argument("--left", type=float, default=0.9, help="share of the MACs")
    parser.add_argument("--epochs", type=int, default=34)
    parser.add_argument("--lr", type=float, default=0.003, help="peak learning rate")
    parser.add_argument("--mixup", type=float, default=0.4)
    parser.add_argument("--crop", type=float, default=0.35, help="smallest share of a photograph's area")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder for the runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in [] if options.report_only else options.seeds:
        case = {name: getattr(options, name) for name in CASE[:-1]} | {"seed": seed}
        if not is_there(ROWS, case):
            row = run(case, options.shared, Path(options.imagenet), options.out) | {"on": measured_on(options.threads)}
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            add_rows(ROWS, [row], CASE)
    headers = ["network", "MACs left %", "params", "units", "original %", "start %", "epochs", "peak"]
    headers += ["distilled %", "points lost", "training, min", "seeds"]
    rows = read_rows(ROWS)
    show(DOCS / "initialisation.md", "benchmarks.photographs", headers, list(table_lines(rows)), rows)


if __name__ == "__main__":
    main()
