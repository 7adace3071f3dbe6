"""The teacher's answers, kept."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ghostify.distillation import Augment, DistillConfig, ImageBatches, answers, distill
from ghostify.errors import InputsError, OptionError

CONFIG = DistillConfig(lr=0.05, precision="fp32", cache_teacher=True, state_every=1)


class Counted(nn.Sequential):
    """Counts the examples that it is asked about in training."""

    asked = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        return super().forward(x)


def network(seed: int) -> Counted:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Counted(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def batches(**options) -> ImageBatches:
    pixels = torch.randint(0, 256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBatches(pixels, None, **{"batch_size": 16, "shuffle": True, "std": (0.25,), **options})


def learned(config: DistillConfig, data: ImageBatches | None = None, **options) -> tuple[Counted, Counted]:
    teacher, student = network(1), network(2)
    distill(student, teacher=teacher, data=data or batches(), epochs=3, config=config, **options)
    return student, teacher


def test_it_learns_the_same_and_every_example_is_asked_for_once() -> None:
    student, teacher = learned(CONFIG)
    other, asked_each_time = learned(DistillConfig(lr=0.05, precision="fp32"))
    assert teacher.asked == 16 + 50  # the first batch is looked at before
    assert asked_each_time.asked == 16 + 3 * 50
    assert all(
        torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip(student.parameters(), other.parameters())
    )
    assert not torch.allclose(student[4].weight, network(2)[4].weight, atol=1e-3)


def test_the_answer_belongs_to_the_example() -> None:
    teacher, inputs = network(1).eval(), torch.randn(9, 1, 8, 8)
    reader = answers.Reader(torch.device("cpu"), torch.float32, channels_last=True)
    known = answers.KnownAnswers(teacher, list(inputs.split(4)), 3, reader)
    order = torch.randperm(9)
    with torch.no_grad():
        assert torch.allclose(known(inputs[order]), teacher(inputs[order]), atol=1e-6)


def test_a_run_that_was_stopped_ends_with_the_same_weights(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Interrupted(ImageBatches):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__()):
                if self.epoch == 1 and step == 2:
                    raise Stopped
                yield batch

    whole, _ = learned(CONFIG)
    broken = batches()
    broken.__class__ = Interrupted
    with pytest.raises(Stopped):
        learned(CONFIG, broken, out=tmp_path)
    again, _ = learned(CONFIG, out=tmp_path, resume=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.parameters(), whole.parameters()))


def test_examples_that_change_are_refused() -> None:
    with pytest.raises(InputsError, match=r"cache_teacher=True: \d+ of 16 examples of a batch are others"):
        learned(CONFIG, batches(augment=Augment(padding=2)))


def test_answers_that_are_too_large_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MEMORY_LIMIT", 1000)
    with pytest.raises(OptionError, match="would take 1,024 bytes, and 1,000 are allowed"):
        learned(CONFIG)


@pytest.mark.parametrize("other", [{"mixup": 0.2}, {"features": "sites"}])
def test_what_needs_the_teacher_at_every_step_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"cache_teacher=True with {next(iter(other))}="):
        DistillConfig(cache_teacher=True, **other)
