"""Images that do not fit memory: decoded for every batch, by threads that work ahead."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghostify.distillation.augmentation import Augment, Draws, random_part
from ghostify.distillation.epochs import EpochBatches
from ghostify.distillation.randomness import mix
from ghostify.errors import InputsError
from ghostify.extras import require

# A whole image is scaled until its middle of this share of the sides has the size wanted: ImageNet's 224 of 256.
_MIDDLE = 224 / 256
# Batches that are decoded while another is used.
_AHEAD = 2
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# As many images tell size and colours of a set. Reading a million headers would take minutes.
_LOOKED_AT = 100


@dataclass(frozen=True)
class Encoded:
    """An image as it is stored.

    Attributes:
        name: For messages; the path where ``content`` is ``None``.
        content: What a file of it holds.
    """

    name: str
    content: bytes | None = None


@dataclass(frozen=True)
class Pictures:
    """Stored images and their classes.

    Attributes:
        read: Gives the stored image of a row; called from several threads at once.
        rows: ``(n,)``.
        labels: Class ids ``(n,)``.
    """

    read: Callable[[int], Encoded]
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def only(self, chosen: Tensor) -> Pictures:
        """Some of them, by their places."""
        return Pictures(self.read, self.rows[chosen], self.labels[chosen])

    def readers(self) -> list[Callable[[], Encoded]]:
        """One function for each image, that reads it."""
        return [lambda row=row: self.read(row) for row in self.rows.tolist()]  # type: ignore[misc]


@dataclass(frozen=True)
class Look:
    """What images are decoded to.

    Attributes:
        mode: Pillow's: ``RGB``, or ``L`` for grey.
        size: Height and width in pixels.
        uniform: The images looked at have that size already.
    """

    mode: str
    size: tuple[int, int]
    uniform: bool

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.mode == "L" else 3

    def bytes(self, count: int) -> int:
        """Memory for ``count`` decoded images."""
        return count * self.channels * self.size[0] * self.size[1]


def look_at(readers: Sequence[Callable[[], Encoded]], image_size: int | None) -> Look:
    """See what the images of a set are.

    Args:
        readers: One for each image; a hundred of them, evenly spread, are looked at.
        image_size: Side in pixels; ``None`` keeps the images' own size if it is one, and else takes 224.

    Raises:
        InputsError: An image cannot be read.
    """
    sizes, modes = [], []
    for place in range(0, len(readers), max(1, len(readers) // _LOOKED_AT)):
        with _opened(readers[place]()) as picture:
            sizes.append((picture.height, picture.width))
            modes.append(picture.mode)
    size = (image_size or 224,) * 2
    if image_size is None and len(set(sizes)) == 1:
        size = sizes[0]
    return Look(colours(modes[0]), size, set(sizes) == {size})


def colours(mode: str) -> str:
    """The mode, of 8 bits a channel, that pictures of a mode of Pillow's are decoded to: ``L`` or ``RGB``."""
    return "L" if mode in ("L", "1") or mode.startswith("I;16") else "RGB"


def converted(picture: Any, mode: str) -> Any:
    """A picture of Pillow's in ``L`` or ``RGB``; of 16 bits the higher ones are kept.

    Raises:
        ValueError: Its numbers have no range that is known; Pillow would cut them off at 255.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"its mode {picture.mode} has numbers of any size; store 8 or 16 bits a channel, as PNG")
    if picture.mode.startswith("I;16"):
        values = (np.asarray(picture).astype(np.uint32) + 128) // 257
        picture = require("PIL.Image", extra="data").fromarray(values.astype(np.uint8))
    return picture.convert(mode)


def decode(stored: Encoded, look: Look, crop: float | None = None, tries: Tensor | None = None) -> Tensor:
    """Decode one image.

    Args:
        stored: The image.
        look: Size and colours wanted. An image of another size is scaled and its middle cut out.
        crop: Smallest share of a random part's area; with ``tries``.
        tries: ``(t, 4)`` numbers to choose a random part with, or ``None`` for the whole image.

    Returns:
        ``(c, h, w)`` uint8.

    Raises:
        InputsError: It cannot be read.
    """
    height, width = look.size
    with _opened(stored) as opened:
        try:
            picture = converted(opened, look.mode)
        except Exception as error:  # Pillow's decoders raise what they like
            raise _unreadable(stored, error) from error
    bilinear = require("PIL.Image", extra="data").Resampling.BILINEAR
    if crop is not None and tries is not None:
        picture = picture.resize((width, height), bilinear, random_part(picture.width, picture.height, crop, tries))
    elif picture.size != (width, height):
        scale = min(picture.width / width, picture.height / height) * _MIDDLE
        wide, tall = scale * width, scale * height
        left, top = (picture.width - wide) / 2, (picture.height - tall) / 2
        picture = picture.resize((width, height), bilinear, (left, top, left + wide, top + tall))
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, -1).permute(2, 0, 1)


def decode_all(pictures: Pictures, look: Look) -> Tensor:
    """Decode images whole: ``(n, c, h, w)`` uint8."""
    decoded = torch.empty(len(pictures), look.channels, *look.size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        for place, image in enumerate(pool.map(lambda read: decode(read(), look), pictures.readers())):
            decoded[place] = image
    return decoded


@dataclass(frozen=True)
class Order:
    """A batch that is to be decoded.

    Attributes:
        readers: One for each image.
        labels: Class ids ``(n,)``.
        draws: For the augmentation, or ``None``.
    """

    readers: Sequence[Callable[[], Encoded]]
    labels: Tensor
    draws: Draws | None


class DecodedBatches(EpochBatches):
    """Batches of ``(images, labels)`` that are decoded when they are needed.

    Args:
        look: Size and colours.
        options: ``batch_size``, ``augment``, ``mean``, ``std`` and ``seed``, as for ``ImageBatches``.
    """

    def __init__(self, look: Look, **options: Any) -> None:
        super().__init__(look.channels, **options)
        self.look = look

    def _decoded(self, orders: Iterable[Order]) -> Iterator[tuple[Tensor, Tensor]]:
        crop = None if self.augment is None else self.augment.crop
        pool = ThreadPoolExecutor()
        waiting: deque[tuple[Order, list[Future[Tensor]]]] = deque()

        def finished() -> tuple[Tensor, Tensor]:
            order, images = waiting.popleft()
            return self._finished(torch.stack([image.result() for image in images]), order.draws), order.labels

        def decoded(read: Callable[[], Encoded], tries: Tensor | None) -> Tensor:
            return decode(read(), self.look, crop, tries)

        try:
            for order in orders:
                parts = None if order.draws is None else order.draws.parts
                tries = [None] * len(order.readers) if parts is None else list(parts)
                waiting.append((order, list(map(pool.submit, [decoded] * len(tries), order.readers, tries))))
                if len(waiting) > _AHEAD:
                    yield finished()
            while waiting:
                yield finished()
        finally:  # also when a pass is left early
            pool.shutdown(cancel_futures=True)


class PictureBatches(DecodedBatches):
    """Batches of stored images that can be read in any order, such as files in a folder.

    Every pass gives the same batches until ``set_epoch`` is called. See ``ImageBatches`` for the options.
    """

    def __init__(self, pictures: Pictures, look: Look, *, shuffle: bool = False, **options: Any) -> None:
        super().__init__(look, **options)
        self.pictures = pictures
        self.shuffle = shuffle

    @property
    def total(self) -> int:
        """Images in an epoch of all processes together."""
        return len(self.pictures)

    def __repr__(self) -> str:
        return f"PictureBatches({self.total} images, decoded to {self.look.size}, batch_size={self.batch_size})"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._decoded(self._orders())

    def sample(self, count: int) -> Tensor:
        """Some images as the models see them, never augmented: ``(count, c, h, w)`` float32, drawn with the seed."""
        generator = torch.Generator().manual_seed(mix(self.seed, 0))
        chosen = torch.randperm(self.total, generator=generator)[:count]
        return self.normalised(decode_all(self.pictures.only(chosen), self.look))

    def _orders(self) -> Iterator[Order]:
        order = torch.randperm(self.total, generator=self._generator()) if self.shuffle else torch.arange(self.total)
        batches = torch.split(order, self.batch_size)
        for step in self._steps():
            chosen = self.pictures.only(batches[step][self._own(len(batches[step]))])
            yield Order(chosen.readers(), chosen.labels, self._draws(step))


def usual_augment(look: Look, *, resident: bool) -> Augment:
    """The augmentation of a set: an eighth of the side as padding, or random parts where images are cut anyway."""
    if look.uniform or resident:
        return Augment(padding=min(look.size) // 8)  # 4 for 32×32
    return Augment(padding=0, crop=0.08)


def _opened(stored: Encoded) -> Any:
    images = require("PIL.Image", extra="data")
    try:
        return images.open(stored.name if stored.content is None else io.BytesIO(stored.content))
    except Exception as error:
        raise _unreadable(stored, error) from error


def _unreadable(stored: Encoded, error: Exception) -> InputsError:
    return InputsError(f"image={stored.name!r} cannot be decoded: {error}. Replace it or take it out.")
