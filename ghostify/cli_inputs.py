"""Where the sub-commands take their inputs from: a data set, an option, the model's library, or a stored file."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ghostify.distillation import DataOptions, EpochBatches, Splits, load_data
from ghostify.errors import InputsError
from ghostify.zoo import input_shape


def example_for(model: nn.Module, name: str, shape: str | None) -> Tensor:
    """One random input of the shape that was given, or that the model's library tells."""
    if shape is None:
        known = input_shape(model, name)
        if known is None:
            raise InputsError(
                f"model={name!r} does not tell the shape of its inputs. Pass it: --input-shape 3,224,224."
            )
        sides = known
    else:
        sides = tuple(int(side) for side in re.split("[,x×]", shape))
    return torch.randn(1, *sides, generator=torch.Generator().manual_seed(0))


def sample(splits: Splits, images: int) -> Tensor:
    """Training images as the models see them, without augmentation where the data set can give them so."""
    if isinstance(splits.train, EpochBatches):
        return splits.train.sample(images)
    found: list[Tensor] = []
    for batch in splits.train:
        found.append(batch if isinstance(batch, Tensor) else batch[0])
        if sum(map(len, found)) >= images:
            break
    if not found:
        raise InputsError(f"data={splits.name!r} has no training images.")
    return torch.cat(found)[:images]


def calibration_images(data: str | None, images: int, seed: int) -> Tensor | None:
    """Some training images of a data set, ``(images, c, h, w)``; None without one."""
    return None if data is None else sample(load_data(data, DataOptions(seed=seed)), images)


def read_text(path: Path) -> str:
    """The text of a file that ghostify has written."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputsError(f"path={str(path)!r} cannot be read: {error}. Name a file that ghostify wrote.") from error
