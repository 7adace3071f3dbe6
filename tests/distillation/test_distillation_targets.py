"""What validation data tell beside the labels, and what a student cannot learn."""

import pytest
import torch
from torch import nn

import ghostify
from ghostify.distillation import DistillConfig, distill
from ghostify.distillation.batches import Reader
from ghostify.distillation.history import Scores
from ghostify.distillation.processes import Processes
from ghostify.distillation.validation import validate
from ghostify.errors import InputsError, OptionError

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


@pytest.mark.parametrize("ids", [Y.tolist(), Y.numpy(), Y.to(torch.uint8)])
def test_class_ids_are_read_from_lists_and_arrays(ids: object) -> None:
    student, teacher = (nn.Linear(4, 3), nn.Linear(4, 3))
    run = distill(student, teacher=teacher, data=[X], val=[(X, ids)], epochs=1)
    assert run.history[0].val_accuracy == float((student(X).argmax(1) == Y).float().mean())


@pytest.mark.parametrize(("target", "told"), [(Y.float(), "torch.float32"), (["a cat"] * 8, "list"), ([Y, Y], "list")])
def test_targets_that_choose_no_epoch_are_told_of(target: object, told: str, caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = (nn.Linear(4, 3), nn.Linear(4, 3))
    assert distill(student, teacher=teacher, data=[X], val=[(X, target)], epochs=1).history[0].val_accuracy is None
    assert f"val yields targets that are no class ids ({told}): they are left alone" in caplog.text


def test_several_targets_of_a_last_single_example_are_no_labels() -> None:
    val = [(X, [Y, Y]), (X[:1], [Y[:1], Y[:1]])]
    run = distill(nn.Linear(4, 3), teacher=nn.Linear(4, 3), data=[X], val=val, epochs=1)
    assert run.history[0].val_accuracy is None


def test_a_loss_is_tried_as_it_is_called() -> None:
    seen = []

    def penalised(scores: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        loss = (scores - wanted).square().mean()
        (slope,) = torch.autograd.grad(loss, scores, create_graph=True)
        return loss + slope.square().sum()

    config = DistillConfig(loss=penalised, precision="bf16")
    distill(nn.Linear(4, 3), teacher=nn.Linear(4, 3), data=[X], epochs=1, config=config)
    assert seen == [False, False]
    one = DistillConfig(loss=lambda scores, wanted, _: (scores - wanted).mean().view(1))
    with pytest.raises(OptionError, match=r"gives a tensor of shape \(1,\), and one number"):
        distill(nn.Linear(4, 3), teacher=nn.Linear(4, 3), data=[X], epochs=1, config=one)


def test_answers_without_a_label_do_not_count() -> None:
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    some = torch.where(torch.arange(8) < 5, Y, -100)
    run = distill(student, teacher=teacher, data=[X], val=[(X, some), (X, torch.full((8,), -100))], epochs=1)
    assert run.history[0].val_accuracy == pytest.approx(float((student(X).argmax(1) == Y)[:5].float().mean()))
    with pytest.raises(
        InputsError, match=r"val yields labels from 0 to 255, .* Renumber the labels \(-100 where there is"
    ):
        distill(student, teacher=teacher, data=[X], val=[(X, torch.where(some < 0, 255, some))], epochs=1)
    with pytest.raises(InputsError, match="data yields labels from -100 to 2"):
        distill(student, teacher=teacher, data=[(X, some)], epochs=1, config=DistillConfig(hard_weight=0.5))


def test_of_a_single_score_there_is_no_agreement(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = nn.Linear(4, 1), nn.Linear(4, 1)
    with caplog.at_level("INFO"):
        run = distill(student, teacher=teacher, data=[X], val=[X], epochs=2, config=DistillConfig(loss="mse"))
    assert [epoch.val_agreement for epoch in run.history] == [None, None]
    assert run.best_epoch == min(run.history, key=lambda epoch: epoch.val_loss).epoch
    assert "agrees" not in caplog.text


def test_a_process_without_a_row_of_its_own_scores_what_the_others_do() -> None:
    class Second(Processes):
        """One of two; the other has the only example, and both of its models agree."""

        def sum(self, numbers: torch.Tensor) -> torch.Tensor:
            return numbers + torch.ones_like(numbers) * (numbers.dtype == torch.int64) + self.theirs(numbers)

        @staticmethod
        def theirs(numbers: torch.Tensor) -> torch.Tensor:
            theirs = torch.zeros_like(numbers)
            if numbers.dtype == torch.float64:
                theirs[[1, 6]] = 1.0  # agreeing, and among several classes
            return theirs

    model, reader = nn.Linear(4, 3), Reader(torch.device("cpu"), torch.float32, channels_last=False)
    scores = validate(
        model, teacher=model, val=[X[:1]], reader=reader, loss=nn.functional.mse_loss, processes=Second(1, 2)
    )
    assert scores.agreement == 1


def test_scores_of_a_run_from_before_agreement_was_left_out_are_compared_by_their_loss() -> None:
    before, now = (Scores(loss, agreement, None, None) for loss, agreement in ((0.5, 1.0), (0.4, None)))
    assert now.rank > before.rank


def test_ghost_units_that_cannot_learn_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).requires_grad_(False)
    teacher, x = nn.Sequential(body, nn.Flatten(), nn.Linear(128, 3)), torch.randn(2, 3, 8, 8)
    student = ghostify.convert(teacher, ratio=2, example_inputs=x)
    distill(student, teacher=teacher, data=[x], epochs=1)
    assert (
        "1 of 1 Ghost units of student do not learn, as the layers that they replace were frozen ('0.2'" in caplog.text
    )
    caplog.clear()
    distill(student.requires_grad_(True), teacher=teacher, data=[x], epochs=1)
    assert "do not learn" not in caplog.text
