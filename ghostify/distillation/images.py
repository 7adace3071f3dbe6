"""Images that fit memory: kept as bytes, given out as normalised and augmented batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ghostify.distillation.augmentation import Augment
from ghostify.distillation.epochs import EpochBatches
from ghostify.distillation.randomness import mix
from ghostify.errors import InputsError, OptionError


class ImageBatches(EpochBatches):
    """An iterable of ``(images, labels)`` batches, or of images alone, from one tensor of bytes.

    Every pass gives the same batches until ``set_epoch`` is called: order and augmentation depend on the seed, the
    epoch's number and the batch's only. All of it is computed on the whole batch, on the device of ``images``.
    ``starting_at`` and ``shard`` give views for a part of an epoch and for one of several processes.

    Args:
        images: ``(n, c, h, w)`` uint8.
        labels: Class ids ``(n,)``, or ``None``.
        batch_size: Images in a batch; the last one may have fewer.
        shuffle: Another order in every epoch.
        augment: Random changes, or ``None``.
        mean: Of each channel, of values from 0 to 1.
        std: The same.
        seed: Of order and augmentation.

    Raises:
        InputsError: ``images`` or ``labels`` of another kind.
        OptionError: Another option that cannot be used.

    Example:
        >>> images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
        >>> batches = ImageBatches(images, torch.arange(5), batch_size=2)
        >>> [(tuple(x.shape), y.tolist()) for x, y in batches]
        [((2, 1, 8, 8), [0, 1]), ((2, 1, 8, 8), [2, 3]), ((1, 1, 8, 8), [4])]
        >>> [y.tolist() for _, y in batches.shard(1, 2)], [y.tolist() for _, y in batches.starting_at(2)]
        ([[1], [3]], [[4]])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        augment: Augment | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        if images.dim() != 4 or images.dtype != torch.uint8 or len(images) == 0:
            raise InputsError(
                f"images has shape {tuple(images.shape)} and dtype {images.dtype}; (n, c, h, w) of uint8 is needed, "
                "n at least 1. Keep images as bytes, 0 to 255."
            )
        if labels is not None and tuple(labels.shape) != (len(images),):
            raise InputsError(
                f"labels has shape {tuple(labels.shape)} for {len(images)} images. Pass one class id for each."
            )
        super().__init__(images.shape[1], batch_size=batch_size, augment=augment, mean=mean, std=std, seed=seed)
        if augment is not None and augment.crop is not None:
            raise OptionError(
                f"crop={augment.crop} is done while images are decoded, and these are already. Pass crop=None; "
                "images from imagefolder:, hf: and wds: can have it."
            )
        self.images = images
        self.labels = None if labels is None else labels.to(images.device, torch.int64)
        self.shuffle = shuffle

    @property
    def total(self) -> int:
        """Images in an epoch of all processes together."""
        return len(self.images)

    def __repr__(self) -> str:
        return (
            f"ImageBatches({len(self.images)} images of {tuple(self.images.shape[1:])}, batch_size={self.batch_size})"
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        order = torch.randperm(self.total, generator=self._generator()) if self.shuffle else torch.arange(self.total)
        batches = torch.split(order, self.batch_size)
        for step in self._steps():
            rows = batches[step][self._own(len(batches[step]))].to(self.images.device, non_blocking=True)
            batch = self._finished(self.images[rows], self._draws(step))
            yield batch if self.labels is None else (batch, self.labels[rows])

    def sample(self, count: int) -> Tensor:
        """Some images as the models see them, never augmented: for calibration, tracing and timing.

        Args:
            count: How many; all there are if there are fewer.

        Returns:
            ``(count, c, h, w)`` float32, drawn with the seed, without repetition.
        """
        generator = torch.Generator().manual_seed(mix(self.seed, 0))
        chosen = torch.randperm(len(self.images), generator=generator)[:count]
        return self.normalised(self.images[chosen.to(self.images.device)])
