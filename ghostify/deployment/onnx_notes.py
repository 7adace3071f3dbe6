"""What an ONNX file of ghostify tells about itself: versions, the original's fingerprint, the plan."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import nn

from ghostify.backends.onnx_program import graphs_of
from ghostify.deployment.manifest import MAX_PLAN_BYTES, ghostify_version
from ghostify.errors import ArtefactError, ExportError, PlanError
from ghostify.extras import require
from ghostify.spec import Plan

_PLAN = "ghostify.plan"
_FINGERPRINT = "ghostify.base_fingerprint"


@dataclass(frozen=True)
class OnnxNotes:
    """What an ONNX file tells about itself. Print it to read it.

    Attributes:
        path: The file.
        model: Class of the exported model; empty if ghostify did not write the file.
        ghostify: Version that wrote it; empty if ghostify did not.
        torch: Version of torch that it was traced with; empty if ghostify did not write it.
        opset: Version of the operator set.
        inputs: Name and shape of every input, as in ``batch×3×32×32``.
        outputs: The same of every output.
        base_fingerprint: Hash of the original model's structure; empty if the model is not a converted one.
        plan: The plan that was carried out; ``None`` if the model is not a converted one.
    """

    path: Path
    model: str
    ghostify: str
    torch: str
    opset: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    base_fingerprint: str
    plan: Plan | None

    def to_json(self) -> str:
        """Everything as JSON text."""
        return pydantic.TypeAdapter(OnnxNotes).dump_json(self, indent=1).decode()

    def __str__(self) -> str:
        made = f"{self.model}, written by ghostify {self.ghostify} with torch {self.torch}"
        lines = [
            f"{self.path}: {made if self.ghostify else 'not written by ghostify'}, opset {self.opset}",
            *(f"input   {name}  {shape}" for name, shape in self.inputs.items()),
            *(f"output  {name}  {shape}" for name, shape in self.outputs.items()),
        ]
        if self.plan is not None:
            lines += [f"base    fingerprint {self.base_fingerprint[:12]}", "", str(self.plan)]
        return "\n".join(lines)


def write_notes(proto: Any, model: nn.Module) -> None:
    """Say who wrote a file and what the model is; drop the exporter's notes, which hold paths of this machine.

    Args:
        proto: The ``onnx.ModelProto``; changed in place.
        model: What is exported; a converted one carries its plan.

    Raises:
        ExportError: The plan is larger than any that would be read back.
    """
    for whole in (proto.graph, *proto.functions):
        for number, graph in enumerate(graphs_of(whole)):
            parts = [graph, *graph.node, *graph.value_info]
            if number or whole is proto.graph:  # inputs of a function are names
                parts += [*graph.input, *graph.output, *graph.initializer]
            for part in parts:
                del part.metadata_props[:]
                part.doc_string = ""
    plan = getattr(model, "ghostify_plan", None)
    properties = {
        "ghostify.version": ghostify_version(),
        "ghostify.model": type(model).__name__,
        "ghostify.torch": str(torch.__version__),
    }
    if isinstance(plan, Plan):
        properties[_FINGERPRINT] = plan.fingerprint
        properties[_PLAN] = json.dumps(json.loads(plan.to_json()), separators=(",", ":"))
        if (size := len(properties[_PLAN].encode())) > MAX_PLAN_BYTES:
            raise ExportError(
                f"The plan of {type(model).__name__} has {size:,} bytes, more than the {MAX_PLAN_BYTES:,} that would "
                "be read back. Delete model.ghostify_plan to export without it."
            )
    for key, value in properties.items():
        proto.metadata_props.add(key=key, value=value)


def read_notes(path: str | os.PathLike[str]) -> OnnxNotes:
    """Read what an ONNX file tells about itself; runs no code, and reads no file beside it.

    Args:
        path: Any ONNX file; one that ghostify has not written tells its inputs, outputs and opset alone.

    Raises:
        ArtefactError: The file is missing, no ONNX, or its plan is damaged.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    proto = read_onnx(path)
    found = {entry.key: entry.value for entry in proto.metadata_props}
    plan = None
    if (text := found.get(_PLAN)) is not None:
        if len(text.encode()) > MAX_PLAN_BYTES:
            raise ArtefactError(
                f"path={str(path)!r}: its plan has {len(text):,} characters, more than any plan needs: it is not read. "
                "Export the model again."
            )
        try:
            plan = Plan.from_json(text)
        except PlanError as error:
            raise ArtefactError(f"path={str(path)!r}: {_PLAN}: {error} Or export the model again.") from error
    return OnnxNotes(
        path=Path(path),
        model=found.get("ghostify.model", ""),
        ghostify=found.get("ghostify.version", ""),
        torch=found.get("ghostify.torch", ""),
        opset=opset_of(proto),
        inputs=_shapes(proto.graph.input),
        outputs=_shapes(proto.graph.output),
        base_fingerprint=found.get(_FINGERPRINT, ""),
        plan=plan,
    )


def read_onnx(path: str | os.PathLike[str], *, external_data: bool = False) -> Any:
    """Read an ``onnx.ModelProto``.

    Args:
        path: The file.
        external_data: Whether weights that lie in files beside it are read, too.

    Raises:
        ArtefactError: The file is missing or no ONNX.
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    onnx = require("onnx", extra="onnx")
    file = Path(path)
    if not file.is_file():
        raise ArtefactError(f"path={str(file)!r} is not a file. Give an ONNX file.")
    try:
        proto = onnx.load(file, load_external_data=external_data)
    except OSError as error:
        raise ArtefactError(f"path={str(file)!r} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # the parser's errors have no common class that is public
        raise ArtefactError(f"path={str(file)!r} is damaged, or no ONNX file: {error}. Export it again.") from error
    if not proto.graph.node or not proto.opset_import or not _is_text(proto):
        raise ArtefactError(
            f"path={str(file)!r} is damaged, or no ONNX file: it holds no graph that can be read. Export it again."
        )
    return proto


def _is_text(message: Any) -> bool:
    """Whether all text in a message is text: the parser hands out bytes for what is no UTF-8."""
    for kind, value in message.ListFields():
        parts = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
        if kind.type == kind.TYPE_STRING and not all(isinstance(part, str) for part in parts):
            return False
        if kind.type == kind.TYPE_MESSAGE and not all(_is_text(part) for part in parts):
            return False
    return True


def opset_of(proto: Any) -> int:
    """The version of ONNX's own operator set that a model is written for; 0 if it uses none of its operators."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def _shapes(values: Iterable[Any]) -> dict[str, str]:
    """Names and shapes of values, with the names of dynamic dimensions in them."""
    return {
        value.name: "×".join(
            (side.dim_param or "?") if side.WhichOneof("value") != "dim_value" else str(side.dim_value)
            for side in value.type.tensor_type.shape.dim
        )
        for value in values
    }
