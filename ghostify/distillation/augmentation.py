"""Random changes of training images, computed on the whole batch from numbers that were drawn beforehand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a random part's sides, width to height, and how often one is drawn anew that does not fit (Inception's habit).
_ASPECTS = (3 / 4, 4 / 3)
_TRIES = 10


@dataclass(frozen=True)
class Augment:
    """What is done to training images at random.

    Attributes:
        padding: Pixels of zeros (black) put around an image before a part of its own size is cut out; 0 does
            without. 4 is usual for 32×32 images (He et al. 2016, arXiv 1512.03385, §4.2).
        flip: Mirror every second image, on average, left to right.
        crop: Smallest share of the area of a random part that is cut out and scaled to the image size while the
            image is decoded; ``None`` does without. 0.08 is usual for ImageNet (Szegedy et al. 2015, arXiv
            1409.4842, §6). Images with it are decoded anew in every epoch.
    """

    padding: int = 4
    flip: bool = True
    crop: float | None = None


@dataclass(frozen=True)
class Draws:
    """Random numbers from 0 to 1 for the images of one batch, a row for each.

    Attributes:
        changes: ``(n, 3)``: offset down, offset right, mirrored or not.
        parts: ``(n, 10, 4)``: area, aspect, top and left of ten tries, or ``None`` where nothing is cut out.
    """

    changes: Tensor
    parts: Tensor | None

    def of(self, rows: slice) -> Draws:
        """The numbers of some of the images."""
        return Draws(self.changes[rows], None if self.parts is None else self.parts[rows])


def drawn(augment: Augment, count: int, generator: torch.Generator) -> Draws:
    """Draw what ``count`` images need.

    Args:
        augment: What will be done.
        count: Images.
        generator: On the CPU, so that the same is drawn whichever device the images are on.
    """
    changes = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    if augment.crop is None:
        return Draws(changes, None)
    return Draws(changes, torch.rand(count, _TRIES, 4, generator=generator, dtype=torch.float64))


def augmented(images: Tensor, augment: Augment, draws: Draws) -> Tensor:
    """Augment a batch, each image in its own way.

    Args:
        images: ``(n, c, h, w)``, of any dtype.
        augment: What to do; ``crop`` has been done already.
        draws: For these images.

    Returns:
        ``(n, c, h, w)`` of the same dtype.
    """
    count, _, height, width = images.shape
    device = images.device
    if augment.padding:
        shifts = 2 * augment.padding + 1
        top, left = (draws.changes[:, :2] * shifts).long().T.to(device, non_blocking=True)
        padded = F.pad(images, (augment.padding,) * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view (n, c, shifts, shifts, h, w)
        images = windows[torch.arange(count, device=device), :, top, left]
    if augment.flip:
        mirrored = (draws.changes[:, 2] < 0.5).to(device, non_blocking=True)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    return images


def random_part(width: int, height: int, crop: float, tries: Tensor) -> tuple[float, float, float, float]:
    """A random part of an image, as torchvision's ``RandomResizedCrop`` chooses it.

    Args:
        width: Of the image, in pixels.
        height: The same.
        crop: Smallest share of the area.
        tries: ``(t, 4)`` numbers from 0 to 1. The first try that fits is taken.

    Returns:
        Left, top, right and bottom in pixels; the middle of the image where no try fits.
    """
    low, high = map(math.log, _ASPECTS)
    for area, aspect, down, right in tries.tolist():
        pixels = width * height * (crop + (1 - crop) * area)
        ratio = math.exp(low + (high - low) * aspect)
        wide, tall = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            left, top = int(right * (width - wide + 1)), int(down * (height - tall + 1))
            return left, top, left + wide, top + tall
    wide = min(width, round(height * _ASPECTS[1]))
    tall = min(height, round(width / _ASPECTS[0]))
    left, top = (width - wide) // 2, (height - tall) // 2
    return left, top, left + wide, top + tall
