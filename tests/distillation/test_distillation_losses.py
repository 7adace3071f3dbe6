"""The losses against their formulas."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ghostify.distillation import LOSSES, DistillConfig, cross_entropy, dist_loss, distillation_loss, logit_mse
from ghostify.distillation.batches import Batch
from ghostify.distillation.learning import objective


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_is_the_formula_of_hinton_written_out(temperature: float) -> None:
    student, teacher = scores(5, 7, seed=1), scores(5, 7, seed=2)
    total = 0.0
    for row in range(5):
        p = [math.exp(z / temperature) for z in teacher[row].tolist()]
        q = [math.exp(z / temperature) for z in student[row].tolist()]
        total += sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q))
    expected = temperature**2 * total / 5
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)


def test_kd_gradient_is_equation_2() -> None:
    # eq. 2: dC/dz = (q - p) / T for one example; times T², and a batch mean, in ours
    student, teacher = scores(3, 4, seed=1).requires_grad_(), scores(3, 4, seed=2)
    distillation_loss(student, teacher, 5.0).backward()
    expected = 5.0 * (F.softmax(student.detach() / 5, 1) - F.softmax(teacher / 5, 1)) / 3
    torch.testing.assert_close(student.grad, expected)


def test_kd_at_a_high_temperature_is_mse_of_centred_scores() -> None:
    # eq. 4: (z - v) / (N T²) as the gradient, hence (z - v)² / 2N as the loss
    student, teacher = scores(4, 6, seed=1), scores(4, 6, seed=2)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    high = distillation_loss(student.double(), teacher.double(), 300.0)
    assert high.item() == pytest.approx(logit_mse(student, teacher, 300.0).item() / 2, rel=0.02)


def test_kd_of_maps_takes_every_pixel_as_an_example() -> None:
    student, teacher = scores(2, 3, 4, 5, seed=1), scores(2, 3, 4, 5, seed=2)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (student, teacher)]
    torch.testing.assert_close(distillation_loss(student, teacher, 2.0), distillation_loss(*flat, 2.0))


def probabilities(logits: torch.Tensor, temperature: float) -> np.ndarray:
    powers = np.exp(logits.double().numpy() / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_equations_8_to_10(temperature: float) -> None:
    student, teacher = scores(6, 5, seed=1), scores(6, 5, seed=2)
    p, q = (probabilities(z, temperature) for z in (student, teacher))
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(6)])
    intra = np.mean([1 - np.corrcoef(p[:, j], q[:, j])[0, 1] for j in range(5)])
    assert dist_loss(student, teacher, temperature).item() == pytest.approx(inter + intra, rel=1e-5)


def test_dist_of_one_example_has_no_part_over_the_batch() -> None:
    student, teacher = scores(1, 5, seed=1), scores(1, 5, seed=2)
    p, q = (probabilities(z, 2.0) for z in (student, teacher))
    assert dist_loss(student, teacher, 2.0).item() == pytest.approx(1 - np.corrcoef(p[0], q[0])[0, 1], rel=1e-5)


def test_dist_of_maps_takes_every_pixel_as_an_example() -> None:
    student, teacher = scores(2, 3, 4, 5, seed=1), scores(2, 3, 4, 5, seed=2)
    flat = [z.permute(0, 2, 3, 1).reshape(-1, 3) for z in (student, teacher)]
    torch.testing.assert_close(dist_loss(student, teacher, 2.0), dist_loss(*flat, 2.0))


def test_dist_is_nothing_between_equals_and_has_a_gradient_everywhere() -> None:
    teacher = scores(4, 6)
    for start in (teacher.clone(), torch.zeros(4, 6), torch.full((4, 6), 7.3)):
        student = start.requires_grad_()
        loss = dist_loss(student, teacher, 4.0)
        loss.backward()
        assert torch.isfinite(student.grad).all()
        assert loss.item() == pytest.approx(0.0, abs=1e-6) or torch.unique(start).numel() == 1
    constant = dist_loss(torch.zeros(4, 6), teacher, 4.0)
    assert constant.item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_compute_in_float32_under_autocast(name: str) -> None:
    student, teacher = scores(8, 10, seed=1).bfloat16(), scores(8, 10, seed=2).bfloat16()
    expected = LOSSES[name](student.float(), teacher.float(), 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](student, teacher, 4.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)


def test_mse_and_cross_entropy_are_means() -> None:
    assert logit_mse(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]), 9.0).item() == 5.0
    uniform = cross_entropy(torch.zeros(2, 4, dtype=torch.bfloat16), torch.tensor([0, 3]))
    assert uniform.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_hard_weight_shares_out_the_objective(weight: float) -> None:
    student, teacher, labels = scores(6, 3, seed=1), scores(6, 3, seed=2), torch.tensor([0, 1, 2, 0, 1, 2])
    config = DistillConfig(hard_weight=weight, temperature=2.0)
    soft, hard = distillation_loss(student, teacher, 2.0), F.cross_entropy(student, labels)
    torch.testing.assert_close(
        objective(student, teacher, Batch(student, labels), config), (1 - weight) * soft + weight * hard
    )
