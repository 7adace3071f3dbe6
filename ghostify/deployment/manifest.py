"""The JSON half of an artefact: its schema, and reading it without trusting it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from ghostify.documents import first_problem
from ghostify.errors import ArtefactError
from ghostify.files import interrupted
from ghostify.spec import Plan

FORMAT = "ghostify-artefact"
VERSION = 1
PLAN_FILE = "plan.json"
WEIGHTS_FILE = "weights.safetensors"
# A plan of a thousand convolutions takes under a megabyte.
MAX_PLAN_BYTES = 32 * 2**20

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
_Count = Annotated[int, pydantic.Field(ge=0)]


class TensorEntry(pydantic.BaseModel):
    """One tensor of the model's state.

    Attributes:
        shape: Its shape.
        dtype: Its type, as in ``float32``.
        same_as: The name under which it is stored, where several names share one tensor.
    """

    model_config = _STRICT

    shape: tuple[_Count, ...]
    dtype: str
    same_as: str | None = None

    @staticmethod
    def of(tensor: Tensor, same_as: str | None = None) -> TensorEntry:
        """Describe a tensor."""
        return TensorEntry(shape=tuple(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."), same_as=same_as)

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


class Content(pydantic.BaseModel):
    """What the artefact says of itself.

    Attributes:
        ghostify: The version that wrote it.
        base: Class of the model, as in ``torchvision.models.resnet.ResNet``.
        plan: The plan that was carried out.
        tensors: Every tensor of the state, by name.
        weights_bytes: Size of the weights file in bytes.
        weights_sha256: Its SHA-256, in hexadecimal digits.
    """

    model_config = _STRICT

    ghostify: str
    base: str
    plan: Plan
    tensors: dict[str, TensorEntry]
    weights_bytes: _Count
    weights_sha256: str

    def stored(self) -> dict[str, TensorEntry]:
        """The tensors that are in the weights file."""
        return {name: entry for name, entry in self.tensors.items() if entry.same_as is None}


class _Header(pydantic.BaseModel):
    """The part that every version has: enough to tell a foreign or newer file from a damaged one."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")

    format: str
    version: int


class _Manifest(pydantic.BaseModel):
    model_config = _STRICT

    format: str
    version: int
    sha256: str
    content: Content


def write_manifest(file: Path, content: Content) -> None:
    """Write the JSON file.

    Args:
        file: Where to.
        content: What to say.
    """
    plain = content.model_dump(mode="json")
    document = {"format": FORMAT, "version": VERSION, "sha256": _digest(plain), "content": plain}
    file.write_text(json.dumps(document, indent=1, ensure_ascii=False), encoding="utf-8")


def read_manifest(folder: Path) -> Content:
    """Read and check the JSON file of an artefact; runs no code.

    Args:
        folder: The artefact.

    Raises:
        ArtefactError: It is missing, too large, foreign, newer, or damaged.
    """
    file = folder / PLAN_FILE
    where = f"path={str(folder)!r}"
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        older = interrupted(folder)
        hint = f" A save was interrupted: {str(older)!r} is the one before it; rename that." if older else ""
        raise ArtefactError(f"{where} {what}. Give the folder that `ghostify.save` wrote.{hint}")
    if not file.is_file():
        raise ArtefactError(
            f"{where} holds no {PLAN_FILE}: it is no artefact. Give the folder that `ghostify.save` wrote."
        )
    size = file.stat().st_size
    if size > MAX_PLAN_BYTES:
        raise ArtefactError(
            f"{where}: {PLAN_FILE} has {size:,} bytes, more than the {MAX_PLAN_BYTES:,} that any plan needs: "
            "it is not read. Save the model again."
        )
    text = read_bytes(file)
    try:
        header = _Header.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise ArtefactError(f"{where}: {PLAN_FILE} is damaged or foreign: {first_problem(error)}. {_AGAIN}") from error
    if header.format != FORMAT:
        raise ArtefactError(
            f"{where}: {PLAN_FILE} has format={header.format!r}, not {FORMAT!r}: another program wrote it."
        )
    if header.version > VERSION:
        raise ArtefactError(
            f"{where} has version={header.version} of the format; this ghostify reads up to {VERSION}. "
            "Upgrade ghostify."
        )
    try:
        manifest = _Manifest.model_validate_json(text)
    except pydantic.ValidationError as error:
        raise ArtefactError(f"{where}: {PLAN_FILE} is damaged: {first_problem(error)}. {_AGAIN}") from error
    # Of the JSON as it stands, not of the parsed objects: a later schema must not change an old file's digest.
    if manifest.version != VERSION or _digest(json.loads(text)["content"]) != manifest.sha256:
        raise ArtefactError(f"{where}: {PLAN_FILE} was changed after it was written: its checksum differs. {_AGAIN}")
    return manifest.content


def read_bytes(file: Path) -> bytes:
    """Read a file of an artefact.

    Raises:
        ArtefactError: The system refuses.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtefactError(f"path={str(file)!r} cannot be read: {error.strerror or error}.") from error


def sha256(data: bytes) -> str:
    """SHA-256 in hexadecimal digits.

    Example:
        >>> sha256(b"")[:8]
        'e3b0c442'
    """
    return hashlib.sha256(data).hexdigest()


def ghostify_version() -> str:
    """The version that is installed; ``unknown`` where the package runs from a bare folder."""
    try:
        return importlib.metadata.version("ghostify")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def dtype_of(name: str) -> torch.dtype | None:
    """The type of that name, ``None`` for any other attribute of torch."""
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None


_AGAIN = "Copy it again from where it was saved, or save it again."


def _digest(content: Any) -> str:
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
