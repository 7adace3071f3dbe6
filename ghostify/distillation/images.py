"""Images that fit memory: kept as bytes, given out as normalised and augmented batches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ghostify.distillation.randomness import mix
from ghostify.errors import InputsError, OptionError


@dataclass(frozen=True)
class Augment:
    """What is done to training images at random.

    Attributes:
        padding: Pixels of zeros (black) put around an image before a part of its own size is cut out; 0 does
            without. 4 is usual for 32×32 images (He et al. 2016, arXiv 1512.03385, §4.2).
        flip: Mirror every second image, on average, left to right.
    """

    padding: int = 4
    flip: bool = True


class ImageBatches:
    """An iterable of ``(images, labels)`` batches, or of images alone, from one tensor of bytes.

    Every pass gives the same batches until ``set_epoch`` is called: order and augmentation depend on
    the seed and the epoch's number only. All of it is computed on the whole batch, on the device of ``images``.

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
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise OptionError(f"batch_size={batch_size!r} must be a whole number of at least 1. Pass, e.g., 128.")
        channels = images.shape[1]
        if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
            raise OptionError(
                f"mean={tuple(mean)}, std={tuple(std)} do not fit images of {channels} channels. "
                "Pass one number for each channel, std above 0."
            )
        self.images = images
        self.labels = None if labels is None else labels.to(images.device, torch.int64)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __repr__(self) -> str:
        return (
            f"ImageBatches({len(self.images)} images of {tuple(self.images.shape[1:])}, batch_size={self.batch_size})"
        )

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the passes that follow."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor] | Tensor]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        count, device = len(self.images), self.images.device
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        for chosen in torch.split(order, self.batch_size):
            rows = chosen.to(device)
            pixels = self.images[rows]
            if self.augment is not None:
                pixels = augmented(pixels, self.augment, generator)
            batch = self.normalised(pixels)
            yield batch if self.labels is None else (batch, self.labels[rows])

    def normalised(self, pixels: Tensor) -> Tensor:
        """Map bytes ``(n, c, h, w)`` to float32 of the data set's mean 0 and deviation 1."""
        scale = 1 / (255 * torch.tensor(self.std, device=pixels.device))
        shift = -torch.tensor(self.mean, device=pixels.device) / torch.tensor(self.std, device=pixels.device)
        return pixels.float().mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))

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


def augmented(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """Augment a batch, each image in its own way.

    Args:
        images: ``(n, c, h, w)``, of any dtype.
        augment: What to do.
        generator: On the CPU, so that the same is drawn whichever device the images are on.

    Returns:
        ``(n, c, h, w)`` of the same dtype.
    """
    count, _, height, width = images.shape
    device = images.device
    if augment.padding:
        shifts = 2 * augment.padding + 1
        top, left = torch.randint(shifts, (2, count), generator=generator).to(device)
        padded = F.pad(images, (augment.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (n, c, shifts, shifts, h, w)
        images = windows[torch.arange(count, device=device), :, top, left]
    if augment.flip:
        mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images
