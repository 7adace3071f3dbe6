"""Batches that depend on seed, epoch and number alone: begun anywhere and shared among processes they stay the same."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor

from ghostify.distillation.augmentation import Augment, Draws, augmented, drawn
from ghostify.distillation.randomness import mix
from ghostify.errors import OptionError


class EpochBatches(ABC):
    """An iterable of ``(images, labels)`` batches; every pass gives the same ones until ``set_epoch`` is called.

    Args:
        channels: Of an image.
        batch_size: Images in a batch of all processes together; the last one may have fewer.
        augment: Random changes, or ``None``.
        mean: Of each channel, of values from 0 to 1.
        std: The same.
        seed: Of order and augmentation.

    Raises:
        OptionError: One of these cannot be used.
    """

    def __init__(
        self,
        channels: int,
        *,
        batch_size: int,
        augment: Augment | None,
        mean: Sequence[float],
        std: Sequence[float],
        seed: int,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"batch_size={batch_size!r} must be a whole number of at least 1. Pass, e.g., 128.")
        if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
            raise OptionError(
                f"mean={tuple(mean)}, std={tuple(std)} do not fit images of {channels} channels. "
                "Pass one number for each channel, std above 0."
            )
        if augment is not None and augment.crop is not None and not 0 < augment.crop <= 1:
            raise OptionError(f"crop={augment.crop!r} is no share of an area. Pass a number above 0, at most 1.")
        self.batch_size = batch_size
        self.augment = augment
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed
        self.epoch = 0
        self._first = 0
        self._part = (0, 1)

    @property
    @abstractmethod
    def total(self) -> int:
        """Images in an epoch of all processes together."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]: ...

    def __len__(self) -> int:
        full, rest = divmod(self.total, self.batch_size)
        own = self._own(rest)
        return max(0, full + int(own.stop > own.start) - self._first)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the passes that follow."""
        self.epoch = epoch

    def starting_at(self, step: int) -> Self:
        """The same batches without the first ones, which are not read: to go on inside an epoch.

        Args:
            step: Number of the first batch, from 0.

        Returns:
            A view with an epoch of its own, this one's until its ``set_epoch`` is called.
        """
        if step < 0:
            raise OptionError(f"step={step} is before the epoch's first batch. Pass a number of at least 0.")
        view = copy.copy(self)
        view._first = step
        return view

    def shard(self, index: int, count: int) -> Self:
        """What one of several processes reads; together they read every image of an epoch once.

        Every batch is cut into ``count`` parts of equal size, give or take one image. Only if the epoch's last
        batch has fewer than ``count`` images do processes differ in length: the last ones have one batch less.

        Args:
            index: Number of the process, from 0.
            count: How many there are.

        Returns:
            A view with an epoch of its own, this one's until its ``set_epoch`` is called.
        """
        if not 0 <= index < count <= self.batch_size:
            raise OptionError(
                f"index={index}, count={count}: batches of batch_size={self.batch_size} cannot be cut so. "
                "Pass 0 ≤ index < count ≤ batch_size."
            )
        if self._part != (0, 1):
            raise OptionError(
                f"index={index}, count={count}: these batches are already part {self._part[0]} of {self._part[1]}. "
                "Call shard on the whole."
            )
        view = copy.copy(self)
        view._part = (index, count)
        return view

    def normalised(self, pixels: Tensor) -> Tensor:
        """Map bytes ``(n, c, h, w)`` to float32 of the data set's mean 0 and deviation 1."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(pixels.device, non_blocking=True)
            for values in (self.mean, self.std)
        )
        return pixels.float().mul_(1 / (255 * std)).add_(-mean / std)

    @abstractmethod
    def sample(self, count: int) -> Tensor:
        """Some images as the models see them, never augmented: ``(count, c, h, w)`` float32."""

    def _steps(self) -> range:
        """Numbers of the batches of this pass."""
        return range(self._first, self._first + len(self))

    def _own(self, size: int) -> slice:
        """Which images of a batch of ``size`` are this process's."""
        index, count = self._part
        each, more = divmod(size, count)
        start = index * each + min(index, more)
        return slice(start, start + each + (index < more))

    def _generator(self, *number: int) -> torch.Generator:
        """Of the epoch, or of one thing in it that has a number."""
        mixed = mix(self.seed, self.epoch)
        for part in number:
            mixed = mix(mixed, part + 1)
        return torch.Generator().manual_seed(mixed)

    def _draws(self, step: int) -> Draws | None:
        """For this process's images of a batch: drawn for the whole batch, so that each image has the same anyway."""
        if self.augment is None:
            return None
        size = min(self.batch_size, self.total - step * self.batch_size)
        return drawn(self.augment, size, self._generator(step)).of(self._own(size))

    def _finished(self, pixels: Tensor, draws: Draws | None) -> Tensor:
        if self.augment is not None and draws is not None:
            pixels = augmented(pixels, self.augment, draws)
        return self.normalised(pixels)
