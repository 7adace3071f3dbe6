"""Writing a model as ONNX, and only keeping the file if onnxruntime computes what the model computes."""

from __future__ import annotations

import copy
import inspect
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.backends import folding
from ghostify.backends.onnx_program import onnx_program
from ghostify.deployment.onnx_notes import opset_of, write_notes
from ghostify.deployment.operators import check_operators
from ghostify.deployment.parity import (
    BatchCheck,
    ExportCheck,
    compare_on_data,
    compare_on_examples,
    feeds,
    open_session,
)
from ghostify.errors import ExportError, OptionError
from ghostify.extras import require
from ghostify.files import atomic_file
from ghostify.reporting import LatencyOptions
from ghostify.reporting.latency import measure_latency
from ghostify.spec import Plan
from ghostify.tracing.example import Example, ExampleInputs, require_module

# A protocol buffer cannot be larger, and the weights are kept inside the one file.
_MAX_BYTES = 2**31 - 1


@dataclass(frozen=True)
class ExportConfig:
    """How an ONNX file is written, and what it must pass.

    Attributes:
        batch_sizes: Batches of random inputs to compare on, beside the example itself.
        tolerance: Largest difference allowed, as a share of the largest value of that output.
        agreement: Least share of the ``data`` whose highest score must be the same class, in ``[0, 1]``.
        opset: Version of the operator set; by default the exporter's.
        fold: Export the [folded][ghostify.fold] form, which computes the same faster.
        dynamic_size: Let the sides of maps ``(n, c, …)`` among the inputs be dynamic, too; the file is then also
            compared at another size.

    Raises:
        OptionError: A value is outside its range.
    """

    batch_sizes: Sequence[int] = (1, 2, 5)
    tolerance: float = 1e-3
    agreement: float = 0.99
    opset: int | None = None
    fold: bool = True
    dynamic_size: bool = False

    def __post_init__(self) -> None:
        sizes = self.batch_sizes
        if not sizes or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
            raise OptionError(f"batch_sizes={sizes!r} must be whole numbers ≥ 1, such as (1, 2, 5).")
        if not 0 < self.tolerance < 1:
            raise OptionError(f"tolerance={self.tolerance!r} is a share of the largest output: use a number like 1e-3.")
        if not 0 <= self.agreement <= 1:
            raise OptionError(f"agreement={self.agreement!r} is a share of the data: use a number like 0.99.")


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs,
    data: Iterable[Any] | None = None,
    original: nn.Module | None = None,
    config: ExportConfig | None = None,
) -> ExportCheck:
    """Write a model as one ONNX file with a dynamic batch, checked against the model in onnxruntime.

    What is exported is a float32 copy on the CPU, in evaluation mode; the model is left as found.
    Weights or inputs in channels_last make the same file as others. A float32 model on the CPU is
    itself the reference of the comparison; one in half precision or elsewhere is represented by
    that copy, so that its own rounding does not count. The file appears under its name only after
    the comparison.

    A single input is named ``input``, several have the names of the forward's arguments; a single output is
    named ``output``, several by their place in what the model returns. The file carries the versions that wrote
    it and, of a converted model, the plan: see [read_notes][ghostify.deployment.read_notes].

    Args:
        model: Any model that ``torch.export`` can read, converted or not.
        path: The file to write.
        example_inputs: A tensor ``(n, c, h, w)``, a tuple of positional arguments, or a dict of
            keyword arguments. Every tensor whose first dimension is ``n`` gets a dynamic batch.
        data: Real inputs to compare on, too: batches ``(n, …)``, or ``(inputs, targets)``, for models of one
            input. Where the model gives class scores, the classes must agree as ``config`` says.
        original: The model before its conversion: both are then timed in turn in onnxruntime, on one thread, on the
            example inputs as given.
        config: How to write it, and what it must pass; see [ExportConfig][ghostify.ExportConfig].

    Returns:
        Sizes, operators and errors, and latencies if there is an original.

    Raises:
        ConversionError: The folded form gives other outputs.
        ExportError: The model cannot be exported, the file computes something else, or it holds operators that the
            plan promised away; nothing is left under ``path`` then.
        InputsError: There are no usable example inputs, or the data do not fit.
        MissingExtraError: The extra ``onnx`` is not installed.
        OutputError: The file cannot be written.
    """
    require_module(model, "model")
    if original is not None:
        require_module(original, "original")
    config = config or ExportConfig()
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    plain = _plain_copy(model)
    example = Example.of(example_inputs).to(plain)
    example.run(plain)  # whatever is wrong with the inputs is said here, not from inside the exporter
    # In the order of the signature: the exporter mixes up arguments that are given by name in another one.
    bound = inspect.signature(plain.forward).bind(*example.args, **example.kwargs)
    example = Example(bound.args, bound.kwargs)
    real = None if data is None else feeds(data, example)
    proto = _checked_program(model, plain, example, config)
    reference = model if _is_float32_cpu(model) else plain
    with atomic_file(path) as temporary:
        temporary.write_bytes(proto.SerializeToString())
        check_file(onnx, temporary)
        session = open_session(runtime, temporary)
        batches = compare_on_examples(session, reference, example, config.batch_sizes, config.dynamic_size)
        if real is not None:
            batches += (compare_on_data(session, reference, real),)
        check = ExportCheck(
            path=Path(path),
            bytes=temporary.stat().st_size,
            opset=opset_of(proto),
            tolerance=config.tolerance,
            agreement=config.agreement,
            batches=batches,
            ops=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
        )
        _check_parity(check, type(model).__name__)
    if original is None:
        return check
    # With the example as it was given: the original's forward may name its arguments in another way.
    options = LatencyOptions(backend="onnxruntime")
    return replace(check, latency=measure_latency(original, model, example_inputs=example_inputs, options=options))


def _plain_copy(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model).cpu().float()
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*plain.parameters(), *plain.buffers()))
    if size > _MAX_BYTES:
        raise ExportError(
            f"{type(model).__name__} has {size:,} bytes of weights: one ONNX file holds at most {_MAX_BYTES:,}. "
            "Convert it with a higher ratio."
        )
    if isinstance(plan := getattr(model, "ghostify_plan", None), Plan):
        plain.ghostify_plan = plan  # type: ignore[assignment]  # which a copied GraphModule has lost
    return plain


def _checked_program(model: nn.Module, plain: nn.Module, example: Example, config: ExportConfig) -> Any:
    """The ``onnx.ModelProto``, with operators and version as they should be, and with its notes."""
    name = type(model).__name__
    exported = folding.fold(plain, example_inputs=example) if config.fold else plain
    proto = onnx_program(exported, example, opset=config.opset, dynamic_size=config.dynamic_size, name=name)
    if config.opset is not None and (written := opset_of(proto)) != config.opset:
        raise ExportError(
            f"opset={config.opset} cannot be had: the exporter writes opset {written} for {name} and "
            "cannot bring that down. Leave opset out, or pass a later one."
        )
    plan = getattr(model, "ghostify_plan", None)
    check_operators(proto.graph, exported, plan if isinstance(plan, Plan) else None)
    write_notes(proto, model)
    if (size := proto.ByteSize()) > _MAX_BYTES:
        raise ExportError(f"{name} takes {size:,} bytes: one ONNX file holds at most {_MAX_BYTES:,}.")
    return proto


def _is_float32_cpu(model: nn.Module) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(t.device.type == "cpu" and (t.dtype == torch.float32 or not t.is_floating_point()) for t in tensors)


def check_file(onnx: Any, file: Path) -> None:
    """Refuse a file that is no valid ONNX.

    Args:
        onnx: The module ``onnx``.
        file: The ONNX file.

    Raises:
        ExportError: Its operators, types or shapes do not fit each other.
    """
    try:
        onnx.checker.check_model(file, full_check=True)  # with shape inference
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"The exporter wrote invalid ONNX: {error}. Try another opset.") from error


def _check_parity(check: ExportCheck, name: str) -> None:
    where = f"path={str(check.path)!r} is not written: onnxruntime and {name}"
    if not check.relative <= check.tolerance:
        raise ExportError(
            f"{where} part by {check.relative:.3g} of the largest output, more than tolerance={check.tolerance:g}. "
            "Try another opset, or raise the tolerance if the model is chaotic by nature.",
            check,
        )
    seen: BatchCheck | None = next((batch for batch in check.batches if batch.source == "data"), None)
    if seen is not None and seen.top1 is not None and seen.top1 < check.agreement:
        raise ExportError(
            f"{where} tell the same class for {seen.top1:.2%} of {seen.batch:,} examples of the data, less than "
            f"agreement={check.agreement:g}. Look whether the model's scores are nearly equal there; else lower "
            "agreement, or try another opset.",
            check,
        )
