"""The teacher's answers, kept."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ghostify.distillation import Augment, DistillConfig, ImageBatches, answers, distill
from ghostify.distillation import loop as loop_module
from ghostify.errors import InputsError, OptionError, TrainingError

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


def test_the_teacher_is_asked_in_the_same_batches_whatever_epoch_the_data_stand_at() -> None:
    # What a network answers depends, in the last bits, on what else is in the batch.
    class Noting(Counted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return super().forward(x)

    runs = []
    for epoch in range(2):
        seen: list[torch.Tensor] = []
        teacher, data = network(1), batches()
        teacher.__class__ = Noting
        data.set_epoch(epoch)  # as another run, or one that was stopped, leaves them
        distill(network(2), teacher=teacher, data=data, epochs=3, config=CONFIG)
        runs.append(torch.cat(seen[1:]))
    assert torch.equal(*runs)


def test_an_example_that_was_left_out_is_told_of() -> None:
    images = torch.utils.data.TensorDataset(torch.randn(50, 1, 8, 8))
    loader = torch.utils.data.DataLoader(images, batch_size=16, shuffle=True, drop_last=True)
    with pytest.raises(InputsError, match=r"none left out \(drop_last=False\)"):
        distill(network(2), teacher=network(1), data=loader, epochs=2, config=CONFIG)


def known(teacher: nn.Module, data: list[torch.Tensor]) -> answers.KnownAnswers:
    return answers.KnownAnswers(teacher, data, len(data), answers.Reader(torch.device("cpu"), torch.float32, True))


def test_the_answer_belongs_to_the_example_and_is_that_of_evaluation() -> None:
    teacher, inputs = network(1), torch.randn(9, 1, 8, 8)
    told, order = known(teacher, list(inputs.split(4))), torch.randperm(9)
    assert teacher.training
    with torch.no_grad():
        assert torch.allclose(told(inputs[order]), teacher.eval()(inputs[order]), atol=1e-6)


class Sizes(nn.Module):
    """Says of what size its images are, in two numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tensor([x.shape[-2:]] * len(x))


def test_examples_of_the_same_content_and_another_shape_are_told_apart() -> None:
    black = [torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 8, 8)]
    told = known(Sizes(), black)
    assert [told(images).tolist() for images in black] == [[[4, 16]] * 2, [[8, 8]] * 2]


def test_answers_may_have_other_sizes_in_other_batches() -> None:
    teacher, data = nn.Conv2d(1, 3, 1), [torch.randn(2, 1, 4, 4), torch.randn(3, 1, 6, 6)]
    told = known(teacher, data)
    for images in data:
        # Kept from a pass that lays images out channels last, which rounds otherwise with several threads.
        torch.testing.assert_close(told(images), teacher(images).detach())


def test_examples_are_known_by_what_they_were_before_the_teacher_changed_them() -> None:
    def images() -> torch.Tensor:
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    assert known(nn.ReLU(inplace=True), [images()])(images()).equal(images().relu())


def test_of_answers_that_are_a_part_of_more_only_the_part_is_kept() -> None:
    class First(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x)[:, :2]

    told = known(First(5, 1000), [torch.randn(4, 5)])
    assert {answer.untyped_storage().nbytes() for answer in told._answers.values()} == {4 * 2 * 4}


def test_a_teacher_that_fails_or_gives_too_many_answers_is_named() -> None:
    with pytest.raises(TrainingError, match=r"teacher \(Linear\) does not run on a batch of data of shape \(3, 7\)"):
        known(nn.Linear(5, 2), [torch.randn(3, 5), torch.randn(3, 7)])
    with pytest.raises(OptionError, match="teacher gives 6 answers to 3 examples"):
        known(nn.Flatten(0, 1), [torch.randn(3, 2, 5)])


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
    _, teacher = learned(CONFIG, out=tmp_path, resume=True)
    assert teacher.asked == 16  # about the first batch: the run was done already


def test_examples_that_change_are_refused_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module.Learner, "update", lambda learner: pytest.fail("a step was taken"))
    with pytest.raises(InputsError, match=r"cache_teacher=True: \d+ of 16 examples of a batch are others"):
        learned(CONFIG, batches(augment=Augment(padding=2)))


def test_answers_that_are_too_large_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MEMORY_LIMIT", 1000)
    with pytest.raises(OptionError, match="would take 1,024 bytes, and 1,000 are allowed"):
        learned(CONFIG)
    with pytest.raises(OptionError, match="would take 1,200 bytes, and 1,000 are allowed"):
        known(nn.Identity(), [torch.randn(10, 1), torch.randn(140, 1), torch.randn(150, 1)])


@pytest.mark.parametrize("other", [{"mixup": 0.2}, {"features": "sites"}])
def test_what_needs_the_teacher_at_every_step_is_refused(other: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"cache_teacher=True with {next(iter(other))}="):
        DistillConfig(cache_teacher=True, **other)
