"""Data sets of the Hugging Face hub and its library's folders: ``hf:NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ghostify.distillation.pictures import Encoded, Pictures
from ghostify.distillation.splits import DataOptions, Splits, from_pictures
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require

# What data sets of the hub call their parts.
_PARTS = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}


def hub_images(argument: str, options: DataOptions) -> Splits:
    """Read a data set with the library ``datasets``.

    Args:
        argument: A name on the hub such as ``uoft-cs/cifar10``, or a folder: one that ``save_to_disk`` wrote, or one
            that ``load_dataset`` reads.
        options: How to read it.

    Raises:
        InputsError: The data set cannot be reached or is not as described.
        MissingExtraError: datasets or Pillow is not installed.
        OptionError: No name, or an option does not fit.
    """
    if not argument:
        raise OptionError("data='hf' names no data set. Pass, for example, data='hf:uoft-cs/cifar10'.")
    stored = _loaded(argument)
    parts: dict[str, Pictures] = {}
    num_classes = 0
    for part, names in _PARTS.items():
        name = next((name for name in names if name in stored), None)
        if name is None:
            continue
        pictures = _pictures(stored[name], f"hf:{argument} {name}")
        if int(pictures.labels.max()) < 0 and part != "train":
            continue  # some data sets keep their test labels to themselves, and store -1
        if int(pictures.labels.min()) < 0:
            raise InputsError(f"data='hf:{argument}': {name} has labels below 0. Number the classes from 0.")
        parts[part] = pictures
        num_classes = max(num_classes, int(pictures.labels.max()) + 1)
    if "train" not in parts:
        raise InputsError(f"data='hf:{argument}' has the parts {', '.join(stored)}; train is needed. Rename one.")
    return from_pictures(f"hf:{argument}", parts, num_classes, options)


def _loaded(name: str) -> Any:
    library = require("datasets", extra="data")
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return library.load_from_disk(name)
        if (Path(name) / "state.json").is_file():  # of a single part
            return {"train": library.load_from_disk(name)}
        return library.load_dataset(name)
    except ConnectionError as error:
        raise InputsError(
            f"data='hf:{name}': the hub cannot be reached ({error}), and there is no such folder or copy here. "
            "Connect, or read local files with data='parquet:FOLDER' or data='hf:FOLDER'."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise InputsError(f"data='hf:{name}' cannot be read: {error} Check the name or the folder.") from error


def _pictures(table: Any, name: str) -> Pictures:
    column = next((column for column in ("img", "image") if column in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise InputsError(
            f"data={name!r} has the columns {', '.join(table.column_names)}; img or image, and label, are needed. "
            "Rename them."
        )
    if len(table) == 0:
        raise InputsError(f"data={name!r} is empty. Check the files.")
    try:
        labels = torch.tensor(table["label"][:])
        if labels.is_floating_point():
            raise ValueError(f"they are fractions, such as {float(labels[0]):g}")
    except (TypeError, ValueError) as error:
        raise InputsError(f"data={name!r} has labels that are no class ids: {error}. Number the classes.") from error
    images = table.select_columns([column])
    kind = require("datasets", extra="data").Image
    if isinstance(images.features[column], kind):
        images = images.cast_column(column, kind(decode=False))  # decoded by us, with the image's name in errors

    def read(row: int) -> Encoded:
        entry = images[row][column]
        if not isinstance(entry, dict) or not (entry.get("bytes") or entry.get("path")):
            raise InputsError(f"data={name!r}: row {row} of {column} holds no stored image. Store images as such.")
        return Encoded(f"{name} row {row}", entry["bytes"]) if entry.get("bytes") else Encoded(entry["path"])

    return Pictures(read, torch.arange(len(table)), labels.long())
