"""Writing a model as ONNX, and only keeping the file if onnxruntime computes what the model computes."""

from __future__ import annotations

import copy
import inspect
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.backends import folding
from ghostify.backends.onnx_program import onnx_program
from ghostify.deployment.manifest import ghostify_version
from ghostify.deployment.parity import ExportCheck, compare_in_onnxruntime
from ghostify.errors import ExportError, OptionError
from ghostify.extras import require
from ghostify.files import atomic_file
from ghostify.spec import Plan
from ghostify.tracing.example import Example, ExampleInputs, require_module

# A protocol buffer cannot be larger, and the weights are kept inside the one file.
_MAX_BYTES = 2**31 - 1


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs,
    batch_sizes: Sequence[int] = (1, 2, 5),
    tolerance: float = 1e-3,
    opset: int | None = None,
    fold: bool = True,
) -> ExportCheck:
    """Write a model as one ONNX file with a dynamic batch, checked against the model in onnxruntime.

    What is exported is a float32 copy on the CPU, in evaluation mode; the model is left as found.
    Weights or inputs in channels_last make the same file as others. A float32 model on the CPU is
    itself the reference of the comparison; one in half precision or elsewhere is represented by
    that copy, so that its own rounding does not count. The file appears under its name only after
    the comparison.

    Args:
        model: Any model that ``torch.export`` can read, converted or not.
        path: The file to write.
        example_inputs: A tensor ``(n, c, h, w)``, a tuple of positional arguments, or a dict of
            keyword arguments. Every tensor whose first dimension is ``n`` gets a dynamic batch.
        batch_sizes: Batches of random inputs to compare on, beside the example itself.
        tolerance: Largest difference allowed, as a share of the largest value of that output.
        opset: Version of the operator set; by default the exporter's.
        fold: Export the [folded][ghostify.fold] form, which computes the same faster.

    Returns:
        Sizes, operators and errors.

    Raises:
        ConversionError: The folded form gives other outputs.
        ExportError: The model cannot be exported, or the file computes something else; nothing is
            left under ``path`` then.
        InputsError: There are no usable example inputs.
        OptionError: ``batch_sizes`` or ``tolerance`` is out of range.
        MissingExtraError: The extra ``onnx`` is not installed.
        OutputError: The file cannot be written.
    """
    require_module(model, "model")
    _check_options(batch_sizes, tolerance)
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    plain = _plain_copy(model)
    example = Example.of(example_inputs).to(plain)
    example.run(plain)  # whatever is wrong with the inputs is said here, not from inside the exporter
    # In the order of the signature: the exporter mixes up arguments that are given by name in another one.
    bound = inspect.signature(plain.forward).bind(*example.args, **example.kwargs)
    example = Example(bound.args, bound.kwargs)
    exported = folding.fold(plain, example_inputs=example) if fold else plain
    proto = onnx_program(exported, example, opset=opset, name=type(model).__name__)
    written = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and written != opset:
        raise ExportError(
            f"opset={opset} cannot be had: the exporter writes opset {written} for {type(model).__name__} and "
            "cannot bring that down. Leave opset out, or pass a later one."
        )
    _describe(proto, model)
    reference = model if _is_float32_cpu(model) else plain
    with atomic_file(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        _check_file(onnx, temporary)
        batches = compare_in_onnxruntime(runtime, temporary, reference, example, batch_sizes)
        check = ExportCheck(
            path=Path(path),
            bytes=temporary.stat().st_size,
            opset=written,
            tolerance=tolerance,
            batches=batches,
            ops=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        )
        if not check.relative <= tolerance:
            raise ExportError(
                f"path={str(path)!r} is not written: onnxruntime and {type(model).__name__} part by "
                f"{check.relative:.3g} of the largest output, more than tolerance={tolerance:g}.\n{check.table()}\n"
                "Try another opset, or raise the tolerance if the model is chaotic by nature."
            )
    return check


def _check_options(batch_sizes: Sequence[int], tolerance: float) -> None:
    if not batch_sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in batch_sizes):
        raise OptionError(f"batch_sizes={batch_sizes!r} must be whole numbers ≥ 1, such as (1, 2, 5).")
    if not 0 < tolerance < 1:
        raise OptionError(f"tolerance={tolerance!r} is a share of the largest output: use a number like 1e-3.")


def _plain_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model).cpu().float()
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*plain.parameters(), *plain.buffers()))
    if size > _MAX_BYTES:
        raise ExportError(
            f"{type(model).__name__} has {size:,} bytes of weights: one ONNX file holds at most {_MAX_BYTES:,}. "
            "Convert it with a higher ratio."
        )
    return plain


def _is_float32_cpu(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)


def _describe(proto: Any, model: nn.Module) -> None:
    """Say who wrote the file; drop the exporter's notes, which hold paths and source lines of this machine."""
    graphs = [proto.graph, *proto.functions]
    for graph in graphs:
        parts = [*graph.node, *graph.value_info]
        if graph is proto.graph:
            parts += [*graph.input, *graph.output, *graph.initializer]
        for part in (graph, *parts):
            del part.metadata_props[:]
            part.doc_string = ""
    plan = getattr(model, "ghostify_plan", None)
    properties = {"ghostify.version": ghostify_version(), "ghostify.model": type(model).__name__}
    if isinstance(plan, Plan):
        properties["ghostify.base_fingerprint"] = plan.fingerprint
    for key, value in properties.items():
        proto.metadata_props.add(key=key, value=value)


def _check_file(onnx: Any, file: Path) -> None:
    try:
        onnx.checker.check_model(file, full_check=True)  # with shape inference
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exporter wrote invalid ONNX: {error}. Try another opset.") from error
