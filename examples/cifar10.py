"""Ghost networks on CIFAR-10, and what they are to be compared with, at equal MACs and with the same distillation.

    python -m examples.cifar10 --network resnet20 --method ghost --ratio 2 --epochs 30 --seeds 0 1 2
    python -m examples.cifar10 --network resnet56 --method ghost --ratio 3 --fusion add

Every run has a folder of its own in `--out`. One that was stopped goes on when the same command is given again; one that
is finished is not run again. 5,000 of the training images make every choice (`--val`); the test images are scored once
in a run, at its end.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ghostify
from benchmarks.networks import SHARED, accuracy
from benchmarks.pages import Row, measured_on
from ghostify.distillation import DataOptions
from ghostify.distillation.optimisation import uses_bf16
from ghostify.files import atomic_file
from ghostify.nn import cifar
from ghostify.tracing.counting import count_macs, count_params


@dataclass(frozen=True)
class Case:
    """What one run is.

    Attributes:
        network: Of the teacher.
        method: How the student is made, a name in ``METHODS``.
        ratio: Of every Ghost unit, or of those whose MACs the student is to have.
        fusion: Of the same.
        epochs: Of distillation.
        images: Unlabelled training images to start from.
        seed: Of everything random.
        loss: As in ``DistillConfig``, as the rest.
        lr: Peak.
        warmup: Share of the steps before it.
        batch: Images in a batch.
    """

    network: str
    method: str
    ratio: float
    fusion: str
    epochs: int
    images: int
    seed: int
    loss: str
    lr: float
    warmup: float
    batch: int

    def __str__(self) -> str:
        form = "" if self.fusion == "concat" else f"-{self.fusion}"
        return f"{self.network}-{self.method}-s{self.ratio:g}{form}-{self.epochs}epochs-seed{self.seed}"

    @property
    def spec(self) -> ghostify.GhostSpec:
        """The options of every Ghost unit."""
        return ghostify.GhostSpec(ratio=self.ratio, fusion=self.fusion)  # type: ignore[arg-type]


def ghost(case: Case, teacher: nn.Module, images: Tensor) -> nn.Module:
    """Ghost units that start from the old weights, on unlabelled images."""
    return _converted(case, teacher, images, "alternating")


def random(case: Case, teacher: nn.Module, images: Tensor) -> nn.Module:
    """The same units, from random weights."""
    return _converted(case, teacher, images, "random")


def _converted(case: Case, teacher: nn.Module, images: Tensor, initialiser: str) -> nn.Module:
    return ghostify.convert(
        teacher,
        spec=case.spec,
        example_inputs=images[:1],
        calibration=images,
        initialiser=initialiser,
        seed=case.seed,
    )


METHODS: dict[str, Callable[[Case, nn.Module, Tensor], nn.Module]] = {"ghost": ghost, "random": random}


def run(case: Case, options: argparse.Namespace) -> Row:
    """Make a student, distil it, score it; go on where the same run was stopped."""
    folder: Path = options.out / str(case)
    on = _begun(case, folder, options.threads)
    data = ghostify.load_data(
        f"parquet:{options.data}", DataOptions(seed=case.seed, batch_size=case.batch, val_size=options.val)
    )
    teacher = getattr(cifar, case.network)()
    teacher.load_state_dict(load_file(options.weights / f"cifar10_{case.network}.safetensors"))
    teacher.eval()
    images = data.train.sample(case.images)  # type: ignore[attr-defined]

    began = time.perf_counter()
    student = METHODS[case.method](case, teacher, images)
    row: Row = {**asdict(case), "start_seconds": time.perf_counter() - began}
    row |= {"params": count_params(student), "macs": count_macs(student, images[:1]).macs}
    row |= distilled(case, student, teacher, data, folder) if case.epochs else {}
    row |= {"test": accuracy(student.eval(), data.test), "threads": options.threads, "on": on}
    _write(folder / "row.json", row)
    return row


def distilled(case: Case, student: nn.Module, teacher: nn.Module, data: Any, folder: Path) -> Row:
    """Distil a student in place; the validation images choose the epoch."""
    config = ghostify.DistillConfig(loss=case.loss, lr=case.lr, warmup=case.warmup, seed=case.seed)
    done = ghostify.distill(
        student,
        teacher=teacher,
        data=data.train,
        val=data.val,
        epochs=case.epochs,
        out=folder,
        config=config,
        resume=True,
    )
    assert done.start is not None  # there are validation images
    return {
        "start": 100 * (done.start.accuracy or 0),
        "validation": [100 * (epoch.val_accuracy or 0) for epoch in done.history],
        "best_epoch": done.best_epoch,
        "seconds": sum(epoch.seconds or 0 for epoch in done.history),
        "precision": "bf16" if uses_bf16(config.precision, next(student.parameters()).device) else "fp32",
    }


def _begun(case: Case, folder: Path, threads: int) -> str:
    """Note what a run is, when it begins and whenever it goes on, and refuse another one's folder."""
    file, now = folder / "case.json", {"case": asdict(case), "on": [measured_on(threads)]}
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["case"] != now["case"]:
            raise SystemExit(f"{folder} holds a run with other settings, see case.json in it. Pass another --out.")
        now["on"] = list(dict.fromkeys([*before["on"], *now["on"]]))
    _write(file, now)
    return "; ".join(now["on"])


def _write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], nargs="+", default=["resnet20"])
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["ghost"])
    parser.add_argument("--ratio", type=float, nargs="+", default=[2.0])
    parser.add_argument("--fusion", choices=["concat", "add", "mul"], nargs="+", default=["concat"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1024, help="unlabelled training images to start from")
    parser.add_argument("--loss", default="mse", help="kd, mse or dist")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps before the peak")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--val", type=int, default=5000, help="training images that are held out for every choice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=SHARED / "cifar10", help="train-*.parquet and test-*.parquet")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights", help="cifar10_NETWORK.safetensors")
    parser.add_argument("--out", type=Path, default=Path("cifar10-run"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    for seed, network, ratio, fusion, method in product(
        options.seeds, options.network, options.ratio, options.fusion, options.method
    ):
        settings = (options.images, seed, options.loss, options.lr, options.warmup, options.batch)
        case = Case(network, method, ratio, fusion, options.epochs, *settings)
        if not (options.out / str(case) / "row.json").is_file():
            print({name: value for name, value in run(case, options).items() if name != "validation"}, flush=True)


if __name__ == "__main__":
    main()
