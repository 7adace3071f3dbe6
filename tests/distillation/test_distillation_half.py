"""Distillation in half precision: the factor of the loss, and what is too large for it."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ghostify.distillation import DistillConfig, ImageBatches, distill
from ghostify.distillation import loop as loop_module
from ghostify.errors import NonFiniteLossError, OptionError


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))


def batches(batch_size: int = 16) -> ImageBatches:
    pixels = torch.randint(0, 256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBatches(pixels, None, batch_size=batch_size, mean=(0.5,), std=(0.25,))


def learned(precision: str, loss: object = "mse", lr: float = 0.02) -> tuple[nn.Module, list[float]]:
    student, config = network(2), DistillConfig(lr=lr, precision=precision, loss=loss)
    run = distill(student, teacher=network(1), data=batches(), epochs=4, config=config)
    return student, [epoch.loss for epoch in run.history]


def test_half_precision_learns_what_full_precision_does() -> None:
    kinds: set[torch.dtype] = set()

    def noting(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        kinds.update({student.dtype, teacher.dtype})
        return (student.float() - teacher.float()).square().mean()

    (_, half), (_, full) = learned("fp16", noting), learned("fp32")
    assert kinds == {torch.float16}
    assert half == pytest.approx(full, rel=0.02)
    assert half != full
    assert half[-1] < 0.5 * half[0]


def test_gradients_too_small_for_half_precision_are_not_lost() -> None:
    def faint(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return 1e-6 * (student.float() - teacher.float()).square().mean()

    student, start = network(2), network(2)
    config = DistillConfig(lr=100.0, precision="fp16", loss=faint, weight_decay=0.0)
    distill(student, teacher=network(1), data=batches(), epochs=1, config=config)
    assert all(not torch.equal(student[layer].weight, start[layer].weight) for layer in (0, 4))


def test_a_step_with_a_gradient_that_is_too_large_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def loud(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return 300 * (student.float() - teacher.float()).square().mean()

    scales: list[float] = []
    update = loop_module.Learner.update

    def noted(learner: loop_module.Learner) -> None:
        before = [parameter.detach().clone() for parameter in learner.parameters]
        update(learner)
        same = all(torch.equal(old, new) for old, new in zip(before, learner.parameters))
        scales.append(learner.scaler.get_scale())
        assert same == (scales[-1] < (scales[-2] if len(scales) > 1 else 65536))

    monkeypatch.setattr(loop_module.Learner, "update", noted)
    _, losses = learned("fp16", loud, lr=0.001)
    assert scales[0] == 32768 > scales[-1] == scales[-2]
    assert losses[-1] < losses[0]


def interrupt(*_: object) -> bool:
    raise KeyboardInterrupt


def broken(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    return (0 * student.float().sum()).sqrt()  # 0, and its gradient 0 / 0


def test_a_gradient_that_is_never_finite_ends_the_run() -> None:
    student, config = network(2), DistillConfig(precision="fp16", loss=broken)
    with pytest.raises(NonFiniteLossError, match=r"its gradient is not finite at epoch=2, step=1.*precision='fp32'"):
        distill(student, teacher=network(1), data=batches(batch_size=4), epochs=2, config=config)


def test_an_epoch_whose_steps_were_all_left_out_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        learned("fp16")
    assert "taught nothing" not in caplog.text
    student, config = network(2), DistillConfig(precision="fp16", loss=broken)
    with caplog.at_level(logging.WARNING):
        distill(student, teacher=network(1), data=batches(), epochs=1, config=config)
    assert torch.equal(student[0].weight, network(2)[0].weight)
    assert "epoch 1 taught nothing: in fp16" in caplog.text


def test_an_epoch_whose_steps_were_done_before_is_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*, resume: bool) -> None:
        config = DistillConfig(lr=0.02, state_every=1)
        distill(network(2), teacher=network(1), data=batches(), epochs=1, out=tmp_path, config=config, resume=resume)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module, "is_healthy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(resume=False)
    caplog.clear()
    run(resume=True)
    assert not caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_named(dtype: torch.dtype) -> None:
    config = DistillConfig(precision="fp16")
    with pytest.raises(OptionError, match=f"student's '0.weight' is {dtype}.*Pass both models as .float()"):
        distill(network(2).to(dtype), teacher=network(1).to(dtype), data=batches(), config=config)
