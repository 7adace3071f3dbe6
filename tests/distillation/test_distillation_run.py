"""What a run does: learning, choosing the best, storing, and leaving everything else as found."""

import copy
import json
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ghostify.distillation import Augment, DistillConfig, ImageBatches, distill, logit_mse
from ghostify.distillation import loop as loop_module


def network(seed: int = 0, classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )


def images(count: int = 96, *, seed: int = 0, labelled: bool = True, **options) -> ImageBatches:
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randint(0, 256, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)
    pixels = patches.repeat_interleave(4, 2).repeat_interleave(4, 3)
    labels = torch.randint(0, 4, (count,), generator=generator) if labelled else None
    return ImageBatches(pixels, labels, **{"batch_size": 32, "mean": (0.5,), "std": (0.25,), **options})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


FAST = DistillConfig(lr=0.1)


def test_the_student_learns_to_agree_with_the_teacher() -> None:
    teacher, student = network(1), network(2)
    data, config = images(256, shuffle=True), DistillConfig(lr=0.1)
    run = distill(student, teacher=teacher, data=data, val=images(128, seed=9), epochs=12, config=config)
    assert run.student is student
    assert run.start.agreement < 0.6 < 0.8 < run.history[run.best_epoch - 1].val_agreement
    assert run.history[-1].loss < 0.3 * run.history[0].loss


def test_labels_alone_can_teach() -> None:
    pixels = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(64) % 4
    for label, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        pixels[labels == label, :, row : row + 4, column : column + 4] = 255
    data = ImageBatches(pixels, labels, batch_size=16, shuffle=True)
    config = DistillConfig(lr=0.1, hard_weight=1.0)
    run = distill(network(2), teacher=network(1), data=data, val=data, epochs=6, config=config)
    assert run.history[run.best_epoch - 1].val_accuracy == 1.0


def test_history_is_what_happened() -> None:
    run = distill(network(2), teacher=network(1), data=images(), val=images(40, seed=3), epochs=3, config=FAST)
    assert [record.epoch for record in run.history] == [1, 2, 3]
    for record in run.history:
        assert record.val_accuracy * 40 == pytest.approx(round(record.val_accuracy * 40))
        assert 0 <= record.val_agreement <= 1
        assert 0 < record.images_per_second < float("inf")
        assert record.seconds >= 96 / record.images_per_second
    peak, last = run.history[0].lr, run.history[-1].lr
    assert last == pytest.approx(0.1 / 25e4)
    assert peak > last
    assert run.out is None


def test_validation_scores_are_right() -> None:
    teacher, student, val = network(1), network(2), images(40, seed=3)
    pixels, labels = (torch.cat(part) for part in zip(*val))
    with torch.no_grad():
        ours, theirs = student.eval()(pixels), teacher.eval()(pixels)
    config = DistillConfig(precision="fp32", loss="mse")
    start = distill(student, teacher=teacher, data=images(), val=val, epochs=1, config=config).start
    assert start.accuracy == pytest.approx((ours.argmax(1) == labels).float().mean().item())
    assert start.teacher_accuracy == pytest.approx((theirs.argmax(1) == labels).float().mean().item())
    assert start.agreement == pytest.approx((ours.argmax(1) == theirs.argmax(1)).float().mean().item())
    assert start.loss == pytest.approx(logit_mse(ours, theirs).item(), rel=1e-5)


def test_an_epoch_is_validated_in_evaluation_mode() -> None:
    teacher, student, val = network(1), network(2), images(40, seed=3)
    config = DistillConfig(precision="fp32", loss="mse")
    run = distill(student, teacher=teacher, data=images(), val=val, epochs=1, config=config)
    assert run.best_epoch == 1  # so that the student holds the weights that were scored
    with torch.no_grad():
        pixels = torch.cat([batch for batch, _ in val])
        expected = logit_mse(student.eval()(pixels), teacher.eval()(pixels)).item()
    assert run.history[0].val_loss == pytest.approx(expected, rel=1e-5)


def test_the_epochs_loss_is_a_mean_over_images_not_batches() -> None:
    data = [torch.zeros(6, 1), torch.ones(2, 1) * 2]  # inputs alone
    teacher, student = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
    nn.init.ones_(teacher.weight)
    nn.init.zeros_(student.weight)
    config = DistillConfig(loss="mse", lr=1e-9, precision="fp32")
    run = distill(student, teacher=teacher, data=data, epochs=1, config=config)
    assert run.history[0].loss == pytest.approx((6 * 0 + 2 * 4) / 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_two_runs_are_bit_identical_and_another_seed_is_not(precision: str) -> None:
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.initial_seed() + 1)  # the caller's random state has no part in it
        data = images(shuffle=True, augment=Augment(2), seed=5)
        student, config = network(2), DistillConfig(seed=seed, precision=precision)
        run = distill(student, teacher=network(1), data=data, epochs=2, config=config)
        results.append((state(student), [record.loss for record in run.history]))
    assert same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert not same(results[0][0], results[2][0])


def test_validation_does_not_change_the_training() -> None:
    def loader(seed: int) -> torch.utils.data.DataLoader:  # draws its order from the global generator
        dataset = torch.utils.data.TensorDataset(*(torch.cat(part) for part in zip(*images(seed=seed))))
        return torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)

    runs = [
        distill(network(2), teacher=network(1), data=loader(0), val=val, epochs=2, config=FAST)
        for val in (None, loader(1))
    ]
    assert [record.loss for record in runs[0].history] == [record.loss for record in runs[1].history]


class Drawn:
    """Batches without a length, drawn from the global random numbers."""

    def __iter__(self):
        return iter([torch.randn(8, *next(iter(images()))[0].shape[1:]) for _ in range(2)])


def test_batches_that_are_counted_draw_nothing_of_the_callers_random_numbers() -> None:
    rng = torch.get_rng_state()
    distill(network(2), teacher=network(1), data=Drawn(), val=Drawn(), epochs=1, config=FAST)
    assert torch.equal(torch.get_rng_state(), rng)


def test_everything_else_is_left_as_found() -> None:
    teacher, student = network(1), network(2)
    teacher.train()
    teacher[1].eval()
    student.eval()
    student[3].train()
    frozen = student[0].weight.requires_grad_(False).clone()
    teacher[6].bias.grad = torch.ones(4)
    flags = [[m.training for m in model.modules()] for model in (teacher, student)]
    before, strides = state(teacher), [p.stride() for p in (*teacher.parameters(), *student.parameters())]
    random.seed(123)  # a state that no earlier run can have left behind
    np.random.seed(123)
    python, numpy, rng = random.getstate(), np.random.get_state(), torch.get_rng_state()

    distill(student, teacher=teacher, data=images(), val=images(32), epochs=2)

    assert same(state(teacher), before)
    assert [[m.training for m in model.modules()] for model in (teacher, student)] == flags
    assert torch.equal(teacher[6].bias.grad, torch.ones(4))
    assert all(p.grad is None for p in (*student.parameters(), *list(teacher.parameters())[:-1]))
    assert [p.stride() for p in (*teacher.parameters(), *student.parameters())] == strides
    assert torch.equal(student[0].weight, frozen)
    assert random.getstate() == python
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state()[1:], numpy[1:]))
    assert torch.equal(torch.get_rng_state(), rng)


def test_a_teacher_in_training_mode_teaches_as_in_evaluation() -> None:
    losses = []
    for training in (True, False):
        run = distill(network(2), teacher=network(1).train(training), data=images(), epochs=1, config=FAST)
        losses.append(run.history[0].loss)
    assert losses[0] == losses[1]


def test_the_best_weights_are_kept_and_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # accuracies are dictated, so that the second of three epochs is the best one
    accuracies = iter([0.1, 0.5, 0.9, 0.3])
    ends: list[dict[str, torch.Tensor]] = []

    def dictated(student: nn.Module, **_) -> loop_module.Scores:
        ends.append(state(student))
        return loop_module.Scores(loss=1.0, agreement=0.5, accuracy=next(accuracies), teacher_accuracy=0.9)

    monkeypatch.setattr(loop_module, "validate", dictated)
    student = network(2)
    run = distill(student, teacher=network(1), data=images(), val=images(32), epochs=3, out=tmp_path / "run")
    assert run.best_epoch == 2
    assert not same(ends[2], ends[3])
    assert same(state(student), ends[2])
    assert same(load_file(tmp_path / "run/best.safetensors"), ends[2])
    assert same(load_file(tmp_path / "run/last.safetensors"), ends[3])
    found = {p.name for p in run.out.iterdir()}
    assert found == {"best.safetensors", "epochs.csv", "history.json", "last.safetensors", "state", "steps.csv"}
    record = json.loads((tmp_path / "run/history.json").read_text())
    assert [epoch["val_accuracy"] for epoch in record["epochs"]] == [0.5, 0.9, 0.3]
    assert (record["best_epoch"], record["config"]["temperature"]) == (2, 4.0)


def test_a_start_that_no_epoch_beats_is_given_back(caplog: pytest.LogCaptureFixture) -> None:
    teacher = network(1)
    student = copy.deepcopy(teacher)
    before = state(student)
    config = DistillConfig(lr=3.0, weight_decay=0.3, loss="mse")
    run = distill(student, teacher=teacher, data=images(), val=images(64), epochs=1, config=config)
    assert run.best_epoch == 0
    assert same(state(student), before)
    assert "no epoch was better" in caplog.text


def test_among_equally_accurate_epochs_the_lower_loss_is_best() -> None:
    scores = loop_module.Scores
    assert scores(0.5, 0.1, 0.9, None).rank > scores(0.6, 0.9, 0.9, None).rank > scores(0.1, 0.9, 0.8, None).rank
    assert scores(0.5, 0.9, None, None).rank > scores(0.1, 0.8, None, None).rank  # without labels: agreement


def test_without_validation_the_last_weights_stay(tmp_path: Path) -> None:
    student = network(2)
    run = distill(student, teacher=network(1), data=images(), epochs=2, out=tmp_path)
    assert run.start is None
    assert run.best_epoch == 2
    assert run.history[1].val_accuracy is run.history[1].val_agreement is run.history[1].val_loss is None
    assert same(load_file(tmp_path / "best.safetensors"), state(student))


@pytest.mark.parametrize(
    "data",
    [
        images(labelled=False),
        [batch for batch, _ in images()],
        [[batch] for batch, _ in images()],  # what a DataLoader over a TensorDataset of one tensor gives
        [(batch, None) for batch, _ in images()],
        [(batch, {"boxes": []}) for batch, _ in images()],
    ],
    ids=["batches", "tensors", "singletons", "none", "foreign targets"],
)
def test_inputs_alone_are_enough(data) -> None:
    run = distill(network(2), teacher=network(1), data=data, val=data, epochs=2, config=FAST)
    labelled = distill(network(2), teacher=network(1), data=images(), epochs=2, config=FAST)
    assert [record.loss for record in run.history] == [record.loss for record in labelled.history]
    assert run.start.accuracy is run.history[0].val_accuracy is None
    assert run.history[0].val_agreement > 0


def test_set_epoch_is_called_and_data_without_a_length_are_counted() -> None:
    class Stream:
        epochs: list[int] = []

        def __iter__(self):
            return iter([torch.randn(4, 1, 8, 8)] * 3)

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    run = distill(network(2), teacher=network(1), data=Stream(), epochs=2, config=FAST)
    assert Stream.epochs == [0, 0, 1]  # the first batch is looked at beforehand
    assert run.history[-1].lr == pytest.approx(0.1 / 25e4)  # the schedule ends with the data


def test_4d_inputs_run_in_channels_last_if_wanted() -> None:
    seen: list[bool] = []

    class Watcher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = network(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.inside(x)

    data = [torch.randn(4, 3, 8, 8)]
    teacher = Watcher()
    teacher.inside[0] = nn.Conv2d(3, 8, 3)
    student = copy.deepcopy(teacher)
    for channels_last in (True, False):
        seen.clear()
        distill(student, teacher=teacher, data=data, epochs=1, config=DistillConfig(channels_last=channels_last))
        assert set(seen) == {channels_last}


def test_a_log_line_an_epoch_and_a_quiet_pipe(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, "ghostify"):
        distill(network(2), teacher=network(1), data=images(), val=images(32), epochs=2, config=FAST)
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert [line.split(":")[0] for line in lines] == ["this will take about 1 s", "epoch 1/2", "epoch 2/2"]
    assert "images/s" in lines[1]
    assert "teacher" in lines[1]
    assert capsys.readouterr() == ("", "")


def test_the_progress_bar_shows_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    config = DistillConfig(progress=True)
    distill(network(2), teacher=network(1), data=images(), val=images(32), epochs=2, config=config)
    out, shown = capsys.readouterr()
    assert out == ""
    assert "epoch 2/2" in shown
    assert "images/s" in shown
    assert "teacher" in shown


@pytest.mark.parametrize(("answers", "told"), [(64, True), (128, False)])
def test_labels_that_are_too_few_to_choose_by_are_told_of(answers, told, caplog):
    distill(network(2), teacher=network(1), data=images(), val=images(answers), epochs=1)
    assert (f"val has labels for {answers} answers" in caplog.text) == told
