"""The main job on real data that comes with a package: from a trained network to a deployed Ghost network."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ghostify.conversion import convert
from ghostify.deployment import export_onnx, save
from ghostify.distillation import DistillConfig, ImageBatches, distill, load_data
from ghostify.distillation.randomness import preserved_random_state
from ghostify.nn.cifar import CifarResNet
from ghostify.reporting import Report, compare

TEACHER_EPOCHS = 15
STUDENT_EPOCHS = 15


def run_demo(out: str | os.PathLike[str] = "demo-run", *, seed: int = 0, say: Callable[[str], None] = print) -> Report:
    """Train a ResNet-8 on 5,000 MNIST digits, ghostify it at ratio 2, distil, compare, store, export.

    3,500 digits train, 500 choose the best epoch, and 1,000 that nothing has seen are scored once,
    at the end. Needs the extra ``demo``.

    Args:
        out: Folder for the report, the artefact and the ONNX file.
        seed: Of everything random.
        say: Gets a line of text at every step.

    Returns:
        The comparison on the test digits.

    Raises:
        MissingExtraError: The extra ``demo`` is not installed.
        OutputError: ``out`` cannot be written.
    """
    folder = Path(out)
    data = load_data("mnist")
    assert isinstance(data.train, ImageBatches)  # what "mnist" is made of
    say(f"1/6 Data: {data.name}, {len(data.train.images):,} digits to train on")
    with preserved_random_state(torch.device("cpu")):
        torch.manual_seed(seed)
        teacher = CifarResNet(1, num_classes=10, in_channels=1)
    train_classifier(teacher, data.train, epochs=TEACHER_EPOCHS, seed=seed)
    say(f"2/6 Teacher: a ResNet-8, trained for {TEACHER_EPOCHS} epochs")
    digits = data.train.sample(512)
    student = convert(teacher, ratio=2, example_inputs=digits[:1], calibration=digits, seed=seed)
    say(f"3/6 Converted, started from the old weights:\n{student.ghostify_plan}")
    settings = DistillConfig(lr=0.03, hard_weight=0.1, seed=seed)
    run = distill(
        student, teacher=teacher, data=data.train, val=data.val, epochs=STUDENT_EPOCHS, out=folder, config=settings
    )
    say(f"4/6 Distilled for {STUDENT_EPOCHS} epochs; the best is epoch {run.best_epoch}")
    report = compare(teacher, student, example_inputs=digits[:1], data=data.test, history=run)
    report.save(folder / "report.html")
    report.save(folder / "report.json")
    say(f"5/6 Compared on {len(data.test):,} batches of test digits that neither has seen:\n{report}")  # type: ignore[arg-type]
    save(student, folder / "student")
    check = export_onnx(student, folder / "student.onnx", example_inputs=digits[:1])
    say(f"6/6 Stored and exported; onnxruntime agrees:\n{check}")
    say(f"The page: {(folder / 'report.html').resolve()}")
    return report


def train_classifier(model: nn.Module, data: Iterable[Any], *, epochs: int, seed: int) -> None:
    """Train a small classifier from scratch, in place: SGD, one-cycle schedule, cross-entropy.

    Args:
        model: Gives class scores ``(n, classes)``; left in evaluation mode.
        data: Batches of images and class ids, with a length and ``set_epoch``.
        epochs: How often to go through the data.
        seed: Of the order.
    """
    steps = epochs * len(data)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        data.set_epoch(epoch + 1000 * seed)  # type: ignore[attr-defined]
        for images, labels in data:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval()
