"""A data set in three parts, and how they are made from tensors or from stored images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ghostify.distillation.augmentation import Augment
from ghostify.distillation.images import ImageBatches
from ghostify.distillation.pictures import Look, PictureBatches, Pictures, decode_all, look_at, usual_augment
from ghostify.errors import OptionError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fixed, and not the caller's seed: what one run held out, another must never train on.
SPLIT_SEED = 20_191_127

# Bytes of decoded pixels, for each part of a set of stored images: up to here they stay in memory.
MEMORY_LIMIT = 2 * 2**30

Statistics = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Splits:
    """A data set in three parts that share no image (``wds:`` with two patterns has one part for choices and test).

    Attributes:
        name: As in ``load_data(name)``.
        train: Batches to train on, usually ``ImageBatches``.
        val: Batches for every choice.
        load_test: Reads the batches for the final figure; called when ``test`` is first asked for.
        num_classes: Classes, or ``None`` if unknown.
        mean: Of each channel, of values from 0 to 1, that the batches are normalised with.
        std: The same.
    """

    name: str
    train: Iterable[Any]
    val: Iterable[Any]
    load_test: Callable[[], Iterable[Any]]
    num_classes: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    @cached_property
    def test(self) -> Iterable[Any]:
        """Batches for the final figure, read at the first use and kept."""
        return self.load_test()


@dataclass(frozen=True)
class DataOptions:
    """How to read a data set; what is ``None`` is the data set's own habit.

    Attributes:
        batch_size: Images in a batch.
        val_size: Training images held out for validation, where the data set has no images of its own for it.
        augment: Random changes of the training images, or ``False`` for none.
        mean: Of each channel.
        std: The same.
        seed: Of order and augmentation; the parts are the same for every seed.
        image_size: Side in pixels to which ``imagefolder:``, ``hf:`` and ``wds:`` scale and cut images; ``None``
            keeps images that are all of one size as they are, and takes 224 for others.
        device: Where images that fit memory are kept, and augmented batch by batch.
    """

    batch_size: int = 128
    val_size: int | None = None
    augment: Augment | bool = True
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    seed: int = 0
    image_size: int | None = None
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise OptionError(f"image_size={self.image_size} is no side of an image. Pass, for example, 224.")

    def changes(self, usual: Augment) -> Augment | None:
        """The augmentation asked for, which may be the data set's usual one."""
        return (usual if self.augment is True else self.augment) or None

    def statistics(self, usual: Statistics) -> Statistics:
        """Mean and deviation asked for, which may be the data set's usual ones."""
        return self.mean or usual[0], self.std or usual[1]


def usual_statistics(channels: int) -> Statistics:
    """ImageNet's, that trained networks expect more often than the data set's own; for grey images a half."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,), (0.5,))


def from_tensors(
    name: str,
    known: tuple[Tensor, Tensor],
    train: Tensor,
    val: Tensor,
    read_test: Callable[[], tuple[Tensor, Tensor]],
    usual: Statistics,
    augment: Augment,
    options: DataOptions,
) -> Splits:
    """Make splits of images in memory.

    Args:
        name: Of the data set.
        known: Images ``(n, c, h, w)`` uint8 and class ids ``(n,)``.
        train: Rows to train on.
        val: Rows for every choice.
        read_test: Gives other images and class ids, for the final figure.
        usual: Mean and deviation, unless options say otherwise.
        augment: Unless options say otherwise.
        options: What the caller asks for.
    """
    images, labels = known
    mean, std = options.statistics(usual)

    def fixed(images: Tensor, labels: Tensor) -> ImageBatches:
        return ImageBatches(images.to(options.device), labels, batch_size=options.batch_size, mean=mean, std=std)

    return Splits(
        name=name,
        train=ImageBatches(
            images[train].to(options.device),
            labels[train],
            batch_size=options.batch_size,
            shuffle=True,
            augment=options.changes(augment),
            mean=mean,
            std=std,
            seed=options.seed,
        ),
        val=fixed(images[val], labels[val]),
        load_test=lambda: fixed(*read_test()),
        num_classes=int(labels.max()) + 1,
        mean=mean,
        std=std,
    )


def from_pictures(name: str, parts: Mapping[str, Pictures], num_classes: int, options: DataOptions) -> Splits:
    """Make splits of stored images: decoded once if they fit memory, else for every batch.

    Args:
        name: Of the data set.
        parts: ``train`` and, where the data set has them, ``val`` and ``test``.
        num_classes: Classes.
        options: What the caller asks for.

    Raises:
        InputsError: An image cannot be read.
        OptionError: The images to hold out are more than there are.
    """
    train, val, test = _three(name, parts, options.val_size)
    look = look_at(train.readers(), options.image_size)
    mean, std = options.statistics(usual_statistics(look.channels))
    changes = options.changes(usual_augment(look, resident=_fits(train, look)))

    def batches(pictures: Pictures, augment: Augment | None, shuffle: bool) -> ImageBatches | PictureBatches:
        chosen = {
            "batch_size": options.batch_size,
            "shuffle": shuffle,
            "augment": augment,
            "mean": mean,
            "std": std,
            "seed": options.seed,
        }
        if _fits(pictures, look) and (augment is None or augment.crop is None):
            decoded = decode_all(pictures, look).to(options.device)
            return ImageBatches(decoded, pictures.labels, **chosen)  # type: ignore[arg-type]
        return PictureBatches(pictures, look, **chosen)  # type: ignore[arg-type]

    return Splits(
        name=name,
        train=batches(train, changes, shuffle=True),
        val=batches(val, None, shuffle=False),
        load_test=lambda: batches(test, None, shuffle=False),
        num_classes=num_classes,
        mean=mean,
        std=std,
    )


def usual_val_size(count: int) -> int:
    """How many of so many training images are held out where nothing is said: a tenth, at most 5,000."""
    return max(1, min(5_000, count // 10))


def _three(name: str, parts: Mapping[str, Pictures], val_size: int | None) -> tuple[Pictures, Pictures, Pictures]:
    """Train, val and test; what is missing is held out of train."""
    train, val, test = parts["train"], parts.get("val"), parts.get("test")
    if test is None and val is not None:
        # The only images that a trained network has never seen: they are for the final figure, not for choices.
        val, test = None, val
    count, missing = len(train), (val is None) + (test is None)
    if not missing:
        assert val is not None  # as missing says; mypy does not count
        assert test is not None
        return train, val, test
    held_out = usual_val_size(count) if val_size is None else val_size
    if held_out < 1 or held_out * missing >= count:
        raise OptionError(
            f"val_size={held_out} cannot be held out of the {count} training images of {name!r} "
            f"{'once' if missing == 1 else 'twice, for val and test'}. Pass fewer, or add images."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    chosen = order[held_out * missing :]
    val = val or train.only(order[:held_out])
    return train.only(chosen), val, test or train.only(order[held_out : 2 * held_out])


def _fits(pictures: Pictures, look: Look) -> bool:
    return look.bytes(len(pictures)) <= MEMORY_LIMIT
