"""Images streamed from tar files, for what fits neither memory nor disk: ``wds:TRAIN,VAL``."""

from __future__ import annotations

import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostify.distillation.pictures import (
    IMAGE_SUFFIXES,
    DecodedBatches,
    Encoded,
    Look,
    Order,
    look_at,
    usual_augment,
)
from ghostify.distillation.splits import DataOptions, Splits, usual_statistics
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require

# Encoded images that are held to be shuffled among each other, about 200 MB of ImageNet.
_BLOCK = 2_048
# From the first file, to see size and colours.
_LOOKED_AT = 100


def tar_shards(argument: str, options: DataOptions) -> Splits:
    """Stream ``wds:TRAIN,VAL`` or ``wds:TRAIN,VAL,TEST``, each a pattern such as ``train-{000..146}.tar``.

    Args:
        argument: The patterns: paths, URLs, or commands as ``pipe:aws s3 cp s3://bucket/{0..9}.tar -``. Without the
            third, the images for choices are those for the final figure.
        options: How to read them; ``val_size`` is not used.

    Raises:
        InputsError: A file is not there or not as described.
        MissingExtraError: webdataset or Pillow is not installed.
        OptionError: Not two or three patterns, or an option does not fit.
    """
    patterns = re.split(r",(?![^{]*\})", argument)  # a comma within braces is the pattern's own
    if not 2 <= len(patterns) <= 3 or not all(patterns):
        raise OptionError(
            f"data='wds:{argument}' has {len(patterns) if argument else 0} patterns. Pass two or three, for training, "
            "validation and test: data='wds:train-{000..146}.tar,val-{00..06}.tar'."
        )
    train, val, test = (TarFiles(pattern) for pattern in (*patterns, patterns[-1])[:3])
    first = [partial(_picture, sample) for sample in islice(train.samples(train.urls[0]), _LOOKED_AT)]
    if not first:
        raise InputsError(f"file={train.urls[0]!r} holds no image. Check the pattern.")
    look = look_at(first, options.image_size)
    mean, std = options.statistics(usual_statistics(look.channels))
    changes = options.changes(usual_augment(look, resident=False))
    shared: dict[str, Any] = {"batch_size": options.batch_size, "mean": mean, "std": std, "seed": options.seed}
    return Splits(
        name=f"wds:{argument}",
        train=ShardBatches(train, look, shuffle=True, augment=changes, **shared),
        val=ShardBatches(val, look, augment=None, **shared),
        load_test=lambda: ShardBatches(test, look, augment=None, **shared),
        mean=mean,
        std=std,
    )


class TarFiles:
    """The tar files of a pattern, in the layout of WebDataset: files of one sample follow each other and share a name.

    Args:
        pattern: Paths or URLs, with braces as a shell has them.

    Raises:
        InputsError: A local file is not there.
    """

    def __init__(self, pattern: str) -> None:
        self.urls = list(require("braceexpand", extra="wds").braceexpand(pattern))
        self._library = require("webdataset.tariterators", extra="wds")
        missing = [url for url in self.urls if _is_local(url) and not Path(url).is_file()]
        if missing:
            raise InputsError(
                f"pattern={pattern!r}: {len(missing)} of {len(self.urls)} files are not there, for example "
                f"{missing[0]!r}. Check the folder and the numbers in braces."
            )

    @cached_property
    def counts(self) -> list[int]:
        """Samples in each file: of local files the headers are read, others are streamed once."""
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self._count, self.urls))

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """What one file holds, in its order: ``{"__key__": name, "__url__": url, "jpg": bytes, "cls": bytes}``."""
        try:
            yield from self._library.tarfile_samples([{"url": url}])
        except Exception as error:  # of the archive, the network, or a command
            raise InputsError(f"file={url!r} cannot be read: {error}. Fetch or write it anew.") from error

    def stream(self, order: Sequence[int], start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Samples ``start`` to ``stop`` of all files in an order; files outside of that are not opened."""
        begin = 0
        for file in order:
            end = begin + self.counts[file]
            if begin < stop and end > start:
                yield from islice(self.samples(self.urls[file]), max(0, start - begin), min(end, stop) - begin)
            begin = end

    def _count(self, url: str) -> int:
        if not _is_local(url):
            return sum(1 for _ in self.samples(url))
        count, before = 0, None
        try:
            with tarfile.open(url) as archive:
                for member in archive:
                    key, _ = self._library.base_plus_ext(member.name)
                    # As the library groups files, and leaves out those that describe the archive.
                    if member.isreg() and key is not None and not re.match(r"__[^/]*__($|/)", member.name):
                        count += key != before
                        before = key
        except (OSError, tarfile.TarError) as error:
            raise InputsError(f"file={url!r} cannot be read: {error}. Fetch or write it anew.") from error
        return count


class ShardBatches(DecodedBatches):
    """Batches of images streamed from tar files; an epoch has every sample once.

    With ``shuffle``, every epoch takes the files in another order, and shuffles some two thousand samples at a time:
    write samples to the files in random order. A process of several (``shard``) reads a stretch of that stream, so
    it opens its share of the files only. The first ``len`` or pass counts the samples of every file.
    """

    def __init__(self, files: TarFiles, look: Look, *, shuffle: bool = False, **options: Any) -> None:
        super().__init__(look, **options)
        self.files = files
        self.shuffle = shuffle

    @property
    def total(self) -> int:
        """Images in an epoch of all processes together."""
        return sum(self.files.counts)

    def __repr__(self) -> str:
        return f"ShardBatches({len(self.files.urls)} files, decoded to {self.look.size}, batch_size={self.batch_size})"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._decoded(self._orders())

    def sample(self, count: int) -> Tensor:
        """Some training images as the models see them, never augmented: ``(count, c, h, w)`` float32."""
        plain = ShardBatches(
            self.files,
            self.look,
            shuffle=self.shuffle,
            batch_size=self.batch_size,
            augment=None,
            mean=self.mean,
            std=self.std,
            seed=self.seed,
        )
        wanted = islice(plain, math.ceil(count / self.batch_size))
        return torch.cat([images for images, _ in wanted])[:count]

    def _orders(self) -> Iterator[Order]:
        full, rest = divmod(self.total, self.batch_size)
        own, last = self._own(self.batch_size), self._own(rest)
        size = own.stop - own.start
        start = full * own.start + last.start
        stop = start + full * size + last.stop - last.start
        block = max(1, _BLOCK // size)  # in batches
        steps = self._steps()
        at = steps.start // block * block
        samples = self.files.stream(self._file_order(), start + at * size, stop)
        while at < steps.stop:
            held = list(islice(samples, block * size))
            if self.shuffle:
                # Each block by itself, so that a pass can begin at any of them. Numbers below 0: no batch has them.
                places = torch.randperm(len(held), generator=self._generator(-2 - at // block))
                held = [held[place] for place in places.tolist()]
            for step in range(max(at, steps.start), min(at + block, steps.stop)):
                chosen = held[(step - at) * size : (step - at + 1) * size]
                labels = torch.tensor([_label(sample) for sample in chosen])
                yield Order([partial(_picture, sample) for sample in chosen], labels, self._draws(step))
            at += block

    def _file_order(self) -> list[int]:
        count = len(self.files.urls)
        order: list[int] = torch.randperm(count, generator=self._generator()).tolist()
        return order if self.shuffle else list(range(count))


def _picture(sample: dict[str, Any]) -> Encoded:
    content = next((sample[kind[1:]] for kind in IMAGE_SUFFIXES if kind[1:] in sample), None)
    if content is None:
        raise InputsError(f"{_place(sample)} has no image, but {_contents(sample)}. Store it as jpg or png.")
    return Encoded(f"{sample['__url__']} {sample['__key__']}", content)


def _label(sample: dict[str, Any]) -> int:
    try:
        return int(sample["cls"])
    except (KeyError, ValueError):
        raise InputsError(
            f"{_place(sample)} has no class id in .cls, but {_contents(sample)}. Store it as a whole number, in text."
        ) from None


def _place(sample: dict[str, Any]) -> str:
    return f"file={sample['__url__']!r}, sample={sample['__key__']!r}"


def _contents(sample: dict[str, Any]) -> str:
    return ", ".join(kind for kind in sample if not kind.startswith("__")) or "nothing"


def _is_local(url: str) -> bool:
    return not url.startswith("pipe:") and "://" not in url
