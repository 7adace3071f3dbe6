"""Images stored as tests need them."""

import io
import tarfile
from pathlib import Path

import pytest
import torch


def encoded(image: torch.Tensor) -> bytes:
    """PNG of ``(c, h, w)`` uint8."""
    pillow = pytest.importorskip("PIL.Image")
    array = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(file, "PNG")
    return file.getvalue()


def plain(value: int, height: int = 4, width: int = 6, channels: int = 3) -> torch.Tensor:
    """An image of one brightness."""
    return torch.full((channels, height, width), value, dtype=torch.uint8)


def tar(path: Path, samples: list[tuple[torch.Tensor, int]]) -> None:
    """A shard of WebDataset."""
    files = {}
    for number, (image, label) in enumerate(samples):
        files |= {f"{number:04}.png": encoded(image), f"{number:04}.cls": str(label).encode()}
    tar_of(path, files)


def tar_of(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
