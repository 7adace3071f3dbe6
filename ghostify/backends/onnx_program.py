"""A model as an ONNX graph in memory, with a dynamic batch."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from ghostify.errors import ExportError
from ghostify.tracing.example import Example, evaluating

_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch._dynamo", "torch.fx", "onnxscript", "onnx_ir")


def onnx_program(plain: nn.Module, example: Example, *, opset: int | None = None, name: str) -> Any:
    """Trace a model into an ``onnx.ModelProto``.

    Args:
        plain: In float32 on the CPU; left as it was.
        example: Its inputs: every tensor whose first dimension is the batch gets a dynamic one.
        opset: Version of the operator set; by default the exporter's.
        name: Of the model, for errors.

    Raises:
        ExportError: It cannot be traced.
    """
    # torch.export takes a dimension of 1 for a constant.
    batch = max(example.batch, 2)
    traced = with_batch(example, batch)
    dimension = torch.export.Dim("batch")

    def dynamic(leaf: Any) -> dict[int, Any] | None:
        return {0: dimension} if has_batch(leaf, batch) else None

    by_parameter = inspect.signature(plain.forward).bind(*traced.args, **traced.kwargs).arguments
    try:
        with evaluating(plain), torch.no_grad(), torch.random.fork_rng(devices=[]), _quiet():
            outputs = named_outputs(plain(*traced.args, **traced.kwargs))
            program = torch.onnx.export(
                plain,
                traced.args,
                kwargs=traced.kwargs,
                dynamo=True,
                dynamic_shapes=tree_map(dynamic, dict(by_parameter)),
                output_names=list(outputs),
                opset_version=opset,
                external_data=False,
                verbose=False,
            )
    except Exception as error:  # the exporter's errors have no common class that is public
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), repr(cause))
        raise ExportError(
            f"{name} cannot be exported with a dynamic batch (opset={opset or 'default'}): {type(cause).__name__}: "
            f"{first} Usually its forward depends on values or on one batch size; the cause above says where."
        ) from error
    proto = program.model_proto  # type: ignore[union-attr]  # None only from the exporter of old
    _count_axes_from_the_front(proto.graph)
    return proto


def _count_axes_from_the_front(graph: Any) -> None:
    """Let every concatenation name its axis from the front: onnxruntime keeps its blocked layout only behind such."""
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        if node.op_type == "Concat" and node.output[0] in ranks:
            for attribute in node.attribute:
                if attribute.name == "axis" and attribute.i < 0:
                    attribute.i += ranks[node.output[0]]


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Every tensor of an output by its place in it: ``output``, ``output_1``, or the keys of a dict."""
    leaves, _ = tree_flatten_with_path(outputs)
    root = [] if isinstance(outputs, Mapping) else ["output"]
    return {
        "_".join([*root, *re.findall(r"\w+", keystr(place))]): leaf
        for place, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def with_batch(example: Example, batch: int, generator: torch.Generator | None = None) -> Example:
    """The example with another batch size: repeated, or (given a generator) with random floating-point values."""
    own = example.batch

    def resize(leaf: Any) -> Any:
        if not has_batch(leaf, own):
            return leaf
        if generator is not None and leaf.is_floating_point():
            return torch.randn((batch, *leaf.shape[1:]), generator=generator, dtype=leaf.dtype)
        return leaf[torch.arange(batch) % own]  # integers may be indices, so no random ones

    return Example(tree_map(resize, example.args), tree_map(resize, example.kwargs))


def has_batch(leaf: Any, batch: int) -> bool:
    """Whether an argument is a tensor whose first dimension is the batch."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and progress notes from the user; its errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
