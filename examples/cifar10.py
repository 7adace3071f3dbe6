"""Ghost networks on CIFAR-10, and what they are to be compared with, at equal MACs and with the same distillation.

    python -m examples.cifar10 --network resnet20 --method ghost random narrow pruned --ratio 2 4 --seeds 0 1 2
    python -m examples.cifar10 --network resnet56 --ratio 3 --fusion add mul --device cuda --side-by-side 6
    python -m examples.cifar10 --network vgg16 --method teacher --epochs 200 --lr 0.1 --warmup 0.3
    python -m examples.cifar10 --report-only

Every run has a folder of its own in `--out`. One that was stopped goes on when the same command is given again; one
that is finished is not run again. 5,000 of the training images make every choice (`--val`); the test images are scored
once in a run, at its end. `--report-only` takes what is finished into docs/results.json, and makes the table and the
plot of docs/results.md from that. VGG-16 and MobileNetV2 have no weights before `--method teacher` has trained them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ghostify
from benchmarks.controls import NETWORKS, narrowed, plain
from benchmarks.networks import SHARED, accuracy
from benchmarks.pages import Row, measured_on
from benchmarks.results import hardware, write_page
from ghostify.deployment.pruning import pruned
from ghostify.distillation import LOSSES, DataOptions, Splits
from ghostify.distillation.checkpoint import snapshot, write_weights
from ghostify.distillation.optimisation import settled_precision
from ghostify.files import atomic_file
from ghostify.tracing.counting import count_macs, count_params


@dataclass(frozen=True)
class Case:
    """What one run is.

    Attributes:
        network: What the student is made of.
        teacher: The network that it learns from.
        method: How the student is made, a name in ``METHODS``.
        ratio: Of every Ghost unit, or of those whose MACs the student is to have.
        fusion: Of the same.
        epochs: Of training.
        images: Unlabelled training images to start from.
        seed: Of everything random.
        loss: As in ``DistillConfig``, as the rest.
        lr: Peak.
        warmup: Share of the steps before it.
        batch: Images in a batch.
    """

    network: str
    teacher: str
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
        taught = "" if self.teacher == self.network else f"-by-{self.teacher}"
        return f"{self.network}-{self.method}-s{self.ratio:g}{form}{taught}-{self.epochs}epochs-seed{self.seed}"

    def ghost(self, original: nn.Module, images: Tensor, initialiser: str) -> nn.Module:
        """The original with Ghost units."""
        return ghostify.convert(
            original,
            spec=self.spec,
            example_inputs=images[:1],
            calibration=images,
            initialiser=initialiser,
            seed=self.seed,
        )

    def macs(self, original: nn.Module, images: Tensor) -> int:
        """What the original would come down to with Ghost units."""
        return ghostify.plan(original, spec=self.spec, example_inputs=images[:1]).macs_after

    @property
    def spec(self) -> ghostify.GhostSpec:
        """The options of every Ghost unit."""
        return ghostify.GhostSpec(ratio=self.ratio, fusion=self.fusion)  # type: ignore[arg-type]


def started(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """Ghost units that start from the old weights."""
    return case.ghost(original, images, "alternating")


def planned(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """As many MACs, spent where the network's answers lose least."""
    budget = {"macs": case.macs(original, images)}
    return ghostify.convert(original, budget=budget, sensitivity="measured", calibration=images, seed=case.seed)


def random(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """The same units, from random weights."""
    return case.ghost(original, images, "random")


def narrow(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """A narrower plain network, from random weights."""
    return narrowed(case.network, case.macs(original, images), images, case.seed)


def without_channels(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """The original without the channels that torch-pruning takes away."""
    return pruned(original, case.macs(original, images), example_inputs=images[:1])


def itself(case: Case, original: nn.Module, images: Tensor) -> nn.Module:
    """The original, or a network that is to become a teacher."""
    return plain(case.network, case.seed) if case.epochs else original


METHODS: dict[str, Callable[[Case, nn.Module, Tensor], nn.Module]] = {
    "teacher": itself,
    "ghost": started,
    "planned": planned,
    "undistilled": started,
    "labels": started,  # trained with these alone: distillation without a teacher
    "random": random,
    "narrow": narrow,
    "pruned": without_channels,
}
WITH_FUSION = ("ghost", "undistilled", "labels", "random")
OF_GHOST_UNITS = (*WITH_FUSION, "planned")
BY_LABELS = ("teacher", "labels")


def run(case: Case, options: argparse.Namespace) -> Row:
    """Make a student, train it, score it; go on where the same run was stopped."""
    folder: Path = options.out / str(case)
    made = begun(case, folder, options)
    data = ghostify.load_data(
        f"parquet:{options.data}",
        DataOptions(seed=case.seed, batch_size=case.batch, val_size=options.val, device=options.device),
    )
    # A network in training needs a teacher as well, though that one's answers count for nothing.
    taught_by_none = case.method == "teacher" and case.epochs
    teacher = weights_of("resnet20" if taught_by_none else case.teacher, options).to(options.device)
    original = teacher if case.teacher == case.network else weights_of(case.network, options).to(options.device)
    images = data.train.sample(case.images)  # type: ignore[attr-defined]

    student, seconds = start_of(case, original, images, folder)
    student.to(options.device)
    row: Row = {**asdict(case), "start_seconds": seconds}
    row |= {"params": count_params(student), "macs": count_macs(student, images[:1]).macs}
    if case.epochs:
        row |= trained(case, student, teacher, data, folder, progress=None if options.side_by_side == 1 else False)
    row |= {"test": accuracy(student.eval(), data.test)}
    row |= made if case.epochs else {name: made[name] for name in ("on", "hardware")}
    if case.method == "teacher" and case.epochs:
        write_weights(weights_file(options.out, case.network), snapshot(student))
    write(folder / "row.json", row)
    return row


def start_of(case: Case, original: nn.Module, images: Tensor, folder: Path) -> tuple[nn.Module, float]:
    """The student before its training, and the seconds that it took; Ghost units are made once, and then read again."""
    kept, told = folder / "start", folder / "start.json"
    if told.is_file():
        return ghostify.load(kept, base=original), json.loads(told.read_text(encoding="utf-8"))["seconds"]
    clock = time.perf_counter()
    student = METHODS[case.method](case, original, images)
    seconds = time.perf_counter() - clock
    if case.method in OF_GHOST_UNITS:
        ghostify.save(student, kept)
        write(told, {"seconds": seconds})
    return student, seconds


def rows_of(some: list[Case], options: argparse.Namespace) -> Iterator[Row]:
    """Run all of them, so many at a time as is asked for, each in a process of its own."""
    if options.side_by_side == 1:
        yield from (run(case, options) for case in some)
        return
    threads, one_of = (options.threads,), multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.side_by_side, one_of, torch.set_num_threads, threads) as pool:
        yield from pool.map(partial(run, options=options), some)


def trained(
    case: Case, student: nn.Module, teacher: nn.Module, data: Splits, folder: Path, progress: bool | None
) -> Row:
    """Train a student in place; the validation images choose the epoch."""
    config = ghostify.DistillConfig(
        loss=case.loss,
        lr=case.lr,
        warmup=case.warmup,
        hard_weight=float(case.method in BY_LABELS),
        seed=case.seed,
        progress=progress,
        cuda_graphs=next(student.parameters()).is_cuda,
    )
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
    }


def weights_file(folder: Path, network: str) -> Path:
    """Where a folder has the weights of a network, if it does."""
    return folder / f"cifar10_{network}.safetensors"


def weights_of(network: str, options: argparse.Namespace) -> nn.Module:
    """A teacher with the weights that were given, or else those that were trained here."""
    model = plain(network)
    for folder in (options.weights, options.out):
        if weights_file(folder, network).is_file():
            model.load_state_dict(load_file(weights_file(folder, network)))
            return model.eval()
    raise SystemExit(f"{weights_file(options.weights, network)} is not there. Train it: --method teacher")


def begun(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, str]:
    """Note what a run is and what on, when it begins and whenever it goes on, and refuse another one's folder."""
    places = {
        "on": measured_on(options.threads),
        "hardware": hardware(options.device, options.threads),
        "precision": settled_precision("auto", torch.device(options.device)),
    }
    file, now = folder / "case.json", {"case": asdict(case)} | {name: [place] for name, place in places.items()}
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["case"] != now["case"]:
            raise SystemExit(f"{folder} holds a run with other settings, see case.json in it. Pass another --out.")
        now |= {name: sorted({*before.get(name, ["unknown"]), place}) for name, place in places.items()}
    write(file, now)
    return {name: "; ".join(now[name]) for name in places}


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What the command line asks for; a setting that a method does not have counts once."""
    choices = (options.seeds, options.network, options.ratio, options.fusion, options.method)
    for seed, network, ratio, fusion, method in product(*choices):
        settings = (options.images, seed, options.loss, options.lr, options.warmup, options.batch)
        taught = method not in (*BY_LABELS, "undistilled")
        teacher = (options.teacher if taught else None) or network
        case = Case(network, teacher, method, ratio, fusion, options.epochs, *settings)
        known = method == "teacher" and weights_file(options.weights, network).is_file()
        if method == "undistilled" or known:
            case = replace(case, epochs=0)
        if method not in WITH_FUSION:
            case = replace(case, fusion="concat")
        yield replace(case, ratio=1.0, seed=0) if method == "teacher" else case  # all students learn from one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=["resnet20"])
    parser.add_argument("--teacher", choices=NETWORKS, help="the network to learn from, instead of the original")
    parser.add_argument("--method", choices=METHODS, nargs="+", default=["ghost"])
    parser.add_argument("--ratio", type=float, nargs="+", default=[2.0])
    parser.add_argument("--fusion", choices=["concat", "add", "mul"], nargs="+", default=["concat"])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1024, help="unlabelled training images to start from")
    parser.add_argument("--loss", choices=LOSSES, default="mse")
    parser.add_argument("--lr", type=float, default=0.05, help="peak learning rate")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps before the peak")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--val", type=int, default=5000, help="training images that are held out for every choice")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--side-by-side", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument("--data", type=Path, default=SHARED / "cifar10", help="train-*.parquet and test-*.parquet")
    parser.add_argument("--weights", type=Path, default=SHARED / "weights", help="cifar10_NETWORK.safetensors")
    parser.add_argument("--out", type=Path, default=Path("cifar10-run"))
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the page")
    options = parser.parse_args()
    if options.side_by_side < 1:
        parser.error(f"--side-by-side {options.side_by_side}: at least one run at a time")
    torch.set_num_threads(options.threads)
    if options.report_only:
        write_page(options.out)
        return
    left = [case for case in dict.fromkeys(cases(options)) if not (options.out / str(case) / "row.json").is_file()]
    teachers = [case for case in left if case.method == "teacher"]  # others need their weights
    for some in (teachers, [case for case in left if case not in teachers]):
        for row in rows_of(some, options):
            print(
                {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )


if __name__ == "__main__":
    main()
