"""Measurements that are kept on disk, to be used again: one file for each, named by a hash of what it depends on."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import TypeVar

import pydantic

from ghostify.errors import OutputError
from ghostify.files import atomic_file

T = TypeVar("T")


def place_of(kind: str, key: str | bytes) -> Path:
    """The file of a measurement, in ``$GHOSTIFY_CACHE`` or ``~/.cache/ghostify``.

    Args:
        kind: A folder for all of its kind.
        key: All that it depends on.
    """
    folder = Path(os.environ.get("GHOSTIFY_CACHE") or Path.home() / ".cache" / "ghostify")
    name = hashlib.sha256(key.encode() if isinstance(key, str) else key).hexdigest()
    return folder / kind / f"{name}.json"


def recall(adapter: pydantic.TypeAdapter[T], file: Path) -> T | None:
    """What was measured earlier; ``None`` if nothing was, or if it cannot be read."""
    try:
        return adapter.validate_json(file.read_bytes())
    except (OSError, pydantic.ValidationError):
        return None


def keep(adapter: pydantic.TypeAdapter[T], value: T, file: Path) -> None:
    """Keep a measurement; where that is not possible, say so and go on without."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as temporary:
            temporary.write_bytes(adapter.dump_json(value, indent=1))
    except (OSError, OutputError) as error:
        warnings.warn(
            f"Measurements cannot be kept in {str(file.parent)!r} ({error}), and will be made again next time. Name a "
            "folder that can be written in the environment variable GHOSTIFY_CACHE.",
            stacklevel=2,
        )
