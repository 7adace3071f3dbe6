"""How fast `ghostify.distill` trains, against the leanest loop for the same work and against torchdistill.

    python -m benchmarks.distillation
    python -m benchmarks.distillation --network resnet56 --batch 64 --steps 30 --rounds 7 --random

A network of CIFAR-10 teaches its Ghost version (ratio 2, started from the weights) for so many steps: knowledge
distillation at T = 4, SGD with Nesterov momentum, one-cycle learning rates, gradients clipped, inputs in channels_last,
one precision. All loops get copies of the same two models and the same augmented batches; making these counts, and
validation is in none. On a GPU ghostify's loop runs once more with CUDA graphs, which each round records anew.
torchdistill gets the batches as they are, without its loaders of single images. Rounds go
through the loops in turn, every second one backwards, and the mean loss shows that all did the same work, but for one
thing: torchdistill's settings cannot spare norms and biases the weight decay. The share of peak is that of the
multiply-accumulates of a product of large matrices on the same device, in the same precision.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import ghostify
from benchmarks.networks import SHARED, load
from benchmarks.pages import measured_on
from ghostify._torchvision import import_torchvision
from ghostify.distillation import Augment, ImageBatches
from ghostify.distillation.optimisation import learning_rate, settled_precision
from ghostify.nn import cifar
from ghostify.tracing.counting import count_macs

RATE, TEMPERATURE, CLIP = 0.1, 4.0, 5.0
SGD: dict[str, Any] = {"lr": RATE, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "fused": True}


@dataclass(frozen=True)
class Work:
    """What every loop is to do.

    Attributes:
        teacher: In evaluation mode.
        student: As it starts.
        batches: To train on, once.
        precision: As in ``DistillConfig``.
    """

    teacher: nn.Module
    student: nn.Module
    batches: ImageBatches
    precision: str

    def copies(self) -> tuple[nn.Module, nn.Module]:
        """A teacher, and a student in training mode, for one round."""
        teacher, student = copy.deepcopy(self.teacher), copy.deepcopy(self.student)
        images, _ = next(iter(self.batches))
        if images.is_cuda:
            teacher.to(memory_format=torch.channels_last), student.to(memory_format=torch.channels_last)
        with torch.no_grad(), self.autocast():  # as `distill` does before it begins: no loop starts colder than another
            teacher.eval()(images), student.eval()(images)
        return teacher, student.train()

    def autocast(self) -> torch.autocast:
        """The context that both run in."""
        device = self.batches.images.device
        return torch.autocast(device.type, torch.bfloat16, enabled=settled_precision(self.precision, device) == "bf16")

    def rates(self) -> dict[str, Any]:
        """The arguments of torch's LambdaLR."""
        steps, config = len(self.batches), ghostify.DistillConfig(lr=RATE)
        return {"lr_lambda": lambda step: learning_rate(step, steps, config) / RATE}


Speed = tuple[float, float]
"""Images per second, and the mean loss."""


def timed(batches: ImageBatches, step: Callable[[Tensor, Tensor], Tensor]) -> Speed:
    """Go through the batches once with a function that trains on one and gives its loss."""
    began = time.perf_counter()
    total = torch.zeros((), device=batches.images.device)
    for images, labels in batches:
        total += step(images.contiguous(memory_format=torch.channels_last), labels)
    loss = float(total) / len(batches)  # waits for the device
    return len(batches.images) / (time.perf_counter() - began), loss


def by_hand(work: Work) -> Speed:
    """Nothing but the work: no look at the loss, no check, no progress."""
    teacher, student = work.copies()
    parameters = list(student.parameters())
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if p.dim() > 1]}]
    groups += [{"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, **SGD)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, **work.rates())

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with work.autocast():
            with torch.no_grad():
                wanted = teacher(images)
            scores = student(images)
        loss = TEMPERATURE**2 * F.kl_div(
            F.log_softmax(scores.float() / TEMPERATURE, 1),
            F.softmax(wanted.float() / TEMPERATURE, 1),
            reduction="batchmean",
        )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        return loss.detach()

    return timed(work.batches, step)


def by_ghostify(work: Work, *, cuda_graphs: bool = False) -> Speed:
    """The training alone, as the run's history tells it."""
    teacher, student = work.copies()
    config = ghostify.DistillConfig(
        lr=RATE,
        temperature=TEMPERATURE,
        clip_norm=CLIP,
        precision=work.precision,
        progress=False,
        cuda_graphs=cuda_graphs,
    )
    run = ghostify.distill(student, teacher=teacher, data=work.batches, epochs=1, config=config)
    return run.history[0].images_per_second or 0.0, run.history[0].loss or 0.0


def by_torchdistill(work: Work) -> Speed:
    """A DistillationBox with the same settings, and the loop of its examples less their logging."""
    import_torchvision()  # torchdistill imports it, and its compiled operators may not fit the build of torch
    from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-untyped]

    teacher, student = work.copies()
    output = {"student_module_path": ".", "student_module_io": "output"}
    output |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    kd = {"key": "KDLoss", "kwargs": {**output, "temperature": TEMPERATURE, "alpha": 0.0}}
    settings = {
        "num_epochs": 1,
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": dict(SGD), "max_grad_norm": CLIP},
        "scheduler": {"key": "LambdaLR", "kwargs": work.rates(), "scheduling_step": 1},
        # without labels its KDLoss leaves T² out
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": TEMPERATURE**2}}},
        },
    }
    box = get_distillation_box(teacher, student, {}, settings, work.batches.images.device, None, False, 1)
    box.pre_epoch_process(epoch=0)

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with work.autocast():
            loss: Tensor = box.forward_process(images, labels, {})
        box.post_forward_process(loss=loss)
        return loss.detach()

    return timed(work.batches, step)


LOOPS: dict[str, Callable[[Work], Speed]] = {
    "by hand": by_hand,
    "ghostify": by_ghostify,
    "ghostify, CUDA graphs": partial(by_ghostify, cuda_graphs=True),
    "torchdistill": by_torchdistill,
}


def measured(work: Work, loops: Iterable[str], rounds: int) -> dict[str, list[Speed]]:
    """What every loop came to in every round, after one that does not count."""
    loops = list(loops)
    found: dict[str, list[Speed]] = {name: [] for name in loops}
    for number in range(-1, rounds):
        for name in loops[:: 1 if number % 2 else -1]:
            speed = LOOPS[name](work)
            if number >= 0:
                found[name].append(speed)
    return found


def lines(found: dict[str, list[Speed]]) -> list[list[str]]:
    """A line for every loop: speeds, and how many times that of the loop by hand they are, round by round.

    The ratios are taken within a round, because other programs on the machine slow whole rounds down.
    """
    lean = [speed for speed, _ in found["by hand"]]
    table = []
    for name, rounds in found.items():
        speeds = [speed for speed, _ in rounds]
        ratios = [speed / other for speed, other in zip(speeds, lean)]
        table.append(
            [
                name,
                f"{statistics.median(speeds):.1f}",
                spread(speeds, 1),
                f"{max(speeds):.1f}",
                f"{statistics.median(ratios):.3f}",
                spread(ratios, 3),
                f"{statistics.mean(loss for _, loss in rounds):.4f}",
            ]
        )
    return table


def spread(values: list[float], digits: int) -> str:
    """Lower and upper quartile: a shared machine has outliers."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return f"{lower:.{digits}f} … {upper:.{digits}f}"


def macs_per_image(work: Work) -> int:
    """Of a step: the teacher's forward, and the student's with its backward, which costs twice as much."""
    image = next(iter(work.batches))[0][:1].cpu()
    teacher, student = (count_macs(copy.deepcopy(model).cpu(), image).macs for model in (work.teacher, work.student))
    return teacher + 3 * student


def peak_macs(work: Work, side: int, tries: int = 10) -> float:
    """Multiply-accumulates a second of a product of matrices: the fastest of several."""
    device = work.batches.images.device
    half = settled_precision(work.precision, device) == "bf16"
    matrix = torch.randn(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
    seconds = []
    for _ in range(tries + 1):  # the first one is to warm up
        began = time.perf_counter()
        with torch.no_grad():
            float((matrix @ matrix)[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    return side**3 / min(seconds[1:])


def prepared(options: argparse.Namespace) -> Work:
    """The models and the batches of a command line."""
    count, device = options.batch * options.steps, torch.device(options.device)
    batches = partial(ImageBatches, batch_size=options.batch, shuffle=True, augment=Augment())
    if options.random:
        torch.manual_seed(0)
        teacher = getattr(cifar, options.network)().eval()
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        data = batches(pixels.to(device), torch.randint(10, (count,)), mean=(0.5,), std=(0.25,))
    else:
        known = load(options.network, 0, options.shared)
        train = known.train
        if train is None or train.labels is None or count > len(train.images):
            raise SystemExit(f"--batch {options.batch} --steps {options.steps}: there are not so many training images")
        teacher = known.model
        data = batches(train.images[:count].to(device), train.labels[:count], mean=train.mean, std=train.std)
    student = ghostify.convert(teacher, ratio=2, example_inputs=data.sample(1).cpu(), initialiser="weights")
    return Work(teacher.to(device), student.to(device), data, options.precision)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["resnet20", "resnet56"], default="resnet20")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--shared", default=str(SHARED), help="folder of cifar10/ and weights/")
    parser.add_argument("--random", action="store_true", help="random images and weights; so where --shared is absent")
    options = parser.parse_args()
    if options.rounds < 2:
        raise SystemExit(f"--rounds {options.rounds}: a spread needs 2")
    options.random = options.random or not Path(options.shared).is_dir()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # that torchvision's compiled operators, which nothing here uses, do not fit
    loops = [name for name in LOOPS if name != "torchdistill" or importlib.util.find_spec("torchdistill")]
    if options.device == "cpu":
        loops.remove("ghostify, CUDA graphs")
    work = prepared(options)
    found = measured(work, loops, options.rounds)
    headers = ["loop", "images/s", "quartiles", "fastest", "÷ by hand", "quartiles", "mean loss"]
    print(tabulate(lines(found), headers=headers, tablefmt="github", disable_numparse=True))
    if "torchdistill" not in loops:
        print("torchdistill is not installed: pip install 'ghostify[bench]'")
    peak = peak_macs(work, side=2048 if options.device == "cpu" else 8192)
    done = macs_per_image(work) * statistics.median(speed for speed, _ in found["ghostify"])
    print(f"ghostify: {done / 1e9:,.1f} billion MACs a second, {100 * done / peak:.2g} % of {peak / 1e9:,.0f} billion")
    images = "random images" if options.random else "CIFAR-10"
    about = f"{options.network}, {images}, {options.rounds} rounds of {options.steps} batches of {options.batch}"
    precision = settled_precision(options.precision, torch.device(options.device))
    print(f"{about}, {precision}, {options.device}; {measured_on(options.threads)}")


if __name__ == "__main__":
    main()
