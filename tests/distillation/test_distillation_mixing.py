"""MixUp: the blend of the paper, and nothing random but the generator."""

import pytest
import torch
from torch.nn import functional as F

from ghostify.distillation import cross_entropy, mixed
from ghostify.errors import InputsError, OptionError

IMAGES = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_example_is_blended_with_another_one() -> None:
    before = IMAGES.clone()
    blend = mixed(IMAGES, 0.4, seeded())
    assert 0 < blend.share < 1
    assert sorted(blend.permutation.tolist()) == list(range(6))
    for i, j in enumerate(blend.permutation.tolist()):
        torch.testing.assert_close(blend.inputs[i], blend.share * IMAGES[i] + (1 - blend.share) * IMAGES[j])
    assert torch.equal(IMAGES, before)


def test_the_generator_alone_decides() -> None:
    torch.manual_seed(1)
    first = mixed(IMAGES, 0.4, seeded(3))
    torch.manual_seed(2)
    again, other = mixed(IMAGES, 0.4, seeded(3)), mixed(IMAGES, 0.4, seeded(4))
    assert first.share == again.share != other.share
    assert torch.equal(first.inputs, again.inputs)
    torch.manual_seed(5)
    unnamed = mixed(IMAGES, 0.4)
    torch.manual_seed(5)
    assert torch.equal(unnamed.inputs, mixed(IMAGES, 0.4).inputs)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    generator, one = seeded(), torch.zeros(1)
    shares = torch.tensor([mixed(one, alpha, generator).share for _ in range(800)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.12)  # of Beta(α, α)


def test_labels_mixed_by_hand_are_the_papers_one_hot_labels() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = torch.randn(6, 3, generator=seeded())
    _, permutation, share = mixed(IMAGES, 1.0, seeded())
    one_hot = F.one_hot(labels, 3).float()
    expected = F.cross_entropy(scores, share * one_hot + (1 - share) * one_hot[permutation])
    loss = share * cross_entropy(scores, labels) + (1 - share) * cross_entropy(scores, labels[permutation])
    torch.testing.assert_close(loss, expected)


def test_type_and_memory_format_stay() -> None:
    images = IMAGES.to(torch.bfloat16, memory_format=torch.channels_last)
    blend = mixed(images, 0.4, seeded())
    assert blend.inputs.dtype == torch.bfloat16
    assert blend.inputs.is_contiguous(memory_format=torch.channels_last)


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(OptionError, match="alpha=0 must be a number above 0"):
        mixed(IMAGES, 0)
    with pytest.raises(InputsError, match=r"torch\.uint8"):
        mixed(IMAGES.byte(), 0.2)
