"""Images in folders, one for each class: ``imagefolder:PATH``."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ghostify.distillation.pictures import IMAGE_SUFFIXES, Encoded, Pictures
from ghostify.distillation.splits import DataOptions, Splits, from_pictures
from ghostify.errors import InputsError, OptionError


def image_folder(argument: str, options: DataOptions) -> Splits:
    """Read ``PATH/train/CLASS/*.jpg``, and ``val`` and ``test`` where they are.

    Args:
        argument: The path.
        options: How to read it.

    Raises:
        InputsError: The folders are not as described, or an image cannot be read.
        OptionError: No path, or an option does not fit.
    """
    if not argument:
        raise OptionError("data='imagefolder' names no folder. Pass, for example, data='imagefolder:data/flowers'.")
    root = Path(argument)
    found = {split: _classes(root / split) for split in ("train", "val", "test") if (root / split).is_dir()}
    if "train" not in found:
        raise InputsError(f"folder={argument!r} holds no folder train. Arrange images as train/CLASS/NAME.jpg.")
    classes = list(found["train"])
    for split, files in found.items():
        if list(files) != classes:
            lacking, foreign = sorted({*classes} - {*files}), sorted({*files} - {*classes})
            raise InputsError(
                f"folder={argument!r}: the classes of {split} are not those of train: "
                f"{len(lacking)} lacking ({_some(lacking)}), {len(foreign)} more ({_some(foreign)}). "
                "Give both the same folders."
            )
    parts = {split: _pictures(files) for split, files in found.items()}
    return from_pictures(f"imagefolder:{argument}", parts, len(classes), options)


def _classes(folder: Path) -> dict[str, list[str]]:
    """Paths of the images of each class, both sorted by name: class ids must not depend on the file system."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputsError(f"folder={str(folder)!r} holds no folder for a class. Arrange images as CLASS/NAME.jpg.")
    found = {name: _images(folder / name) for name in names}
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise InputsError(
            f"folder={str(folder)!r}: {len(empty)} of {len(names)} classes hold no image ({_some(empty)}). Add images "
            f"({', '.join(suffix[1:] for suffix in IMAGE_SUFFIXES)}), or remove the folders from all parts."
        )
    return found


def _images(folder: Path) -> list[str]:
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


def _pictures(files: dict[str, list[str]]) -> Pictures:
    paths = [path for images in files.values() for path in images]
    labels = torch.repeat_interleave(torch.tensor([len(images) for images in files.values()]))
    return Pictures(lambda row: Encoded(paths[row]), torch.arange(len(paths)), labels)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
