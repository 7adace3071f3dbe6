"""Writing a network in whole numbers of 8 bits, and only keeping the file if it still answers like the floats.

Static quantisation by onnxruntime (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html):
weights in 8 bits with a scale for every output channel; activations in 8 bits with one scale a tensor, whose range is
what calibration images reach. The file holds pairs of QuantizeLinear and DequantizeLinear around every operator; the
runtime makes 8-bit kernels of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.backends.onnx_program import with_batch
from ghostify.deployment.onnx_export import check_file, export_onnx
from ghostify.deployment.onnx_notes import opset_of, read_onnx
from ghostify.deployment.parity import BatchCheck, batches_table, compare_batch, compare_on_data, feeds, open_session
from ghostify.errors import ExportError, InputsError, OptionError
from ghostify.extras import require
from ghostify.files import atomic_file
from ghostify.tracing.calibration import Calibration, calibration_chunks
from ghostify.tracing.example import Example

# How the range of an activation comes from what the images reach, by its name in onnxruntime.
RANGES = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
# There is no 8-bit kernel for a norm: quantised it would lose precision, and be computed in floats all the same.
_IN_FLOATS = ("BatchNormalization",)
# The first operator set in which a tensor may have several scales.
_OPSET = 13


@dataclass(frozen=True)
class QuantisationConfig:
    """How a network is brought to 8 bits, and what the file must pass.

    Attributes:
        images: How many calibration images are enough.
        ranges: What becomes of the values that the images reach: ``minmax`` (all of them are in range), ``entropy`` or
            ``percentile`` (outliers are cut off; these take many times as long).
        reduce_range: Weights use 7 of their 8 bits. Processors without VNNI instructions, such as all with AVX2
            alone, add products in 16 bits, and full weights overflow there without notice.
        agreement: Least share of images to which floats and 8 bits must give the same class, in ``[0, 1]``; of the
            ``data`` if there are any, else of the calibration images. Told where the first output is class scores.
        tolerance: Largest difference from the floats, as a share of the largest output; of networks whose outputs are
            not class scores alone, such as maps. ``inf`` asks for none.
        batch_sizes: Batches of calibration images that are compared by themselves, because the batch is dynamic.

    Raises:
        OptionError: A value is outside its range.
    """

    images: int = 512
    ranges: str = "minmax"
    reduce_range: bool = True
    agreement: float = 0.9
    tolerance: float = 0.25
    batch_sizes: Sequence[int] = (1, 2, 5)

    def __post_init__(self) -> None:
        if isinstance(self.images, bool) or not isinstance(self.images, int) or self.images < 1:
            raise OptionError(f"images={self.images!r} is not a whole number ≥ 1. Use a few hundred.")
        if self.ranges not in RANGES:
            raise OptionError(f"ranges={self.ranges!r} is unknown. Use one of {', '.join(RANGES)}.")
        if not 0 <= self.agreement <= 1:
            raise OptionError(f"agreement={self.agreement!r} is a share of the images: use a number like 0.9.")
        if not self.tolerance > 0:
            raise OptionError(f"tolerance={self.tolerance!r} is a share of the largest output: use a number like 0.25.")
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.batch_sizes):
            raise OptionError(f"batch_sizes={self.batch_sizes!r} must be whole numbers ≥ 1, such as (1, 2, 5).")


# Differences are told, and the file is kept whatever they are.
UNGATED = QuantisationConfig(agreement=0.0, tolerance=float("inf"))


@dataclass(frozen=True)
class QuantisationCheck:
    """What an 8-bit file is, and how far it is from the floats. Print it to read it.

    Attributes:
        path: The file.
        bytes: Its size.
        float_bytes: The size of the same network's float32 file.
        opset: Version of the operator set.
        images: Calibration images that were used.
        ranges: How ranges of activations were chosen.
        agreement: Least share of images that had to be given the same class.
        batches: One entry for every comparison with the float32 file; the last one is of all ``data``, or else of all
            calibration images.
        ops: How often each operator occurs, most frequent first.
    """

    path: Path
    bytes: int
    float_bytes: int
    opset: int
    images: int
    ranges: str
    agreement: float
    batches: tuple[BatchCheck, ...]
    ops: dict[str, int]

    @property
    def relative(self) -> float:
        """The largest difference from the floats as a share of the largest output, of all batches."""
        return max(batch.relative for batch in self.batches)

    @property
    def top1(self) -> float | None:
        """Share of the data (or else of the calibration images) that get the same class; ``None`` without classes."""
        return self.batches[-1].top1

    def table(self, style: str = "simple") -> str:
        """The differences by batch, in any format that tabulate knows."""
        return batches_table(self.batches, style)

    def to_json(self) -> str:
        """Everything as JSON text; infinite errors as ``Infinity``."""
        return json.dumps(dataclasses.asdict(self), indent=1, default=str)

    def __str__(self) -> str:
        return (
            f"{self.path} ({self.bytes:,} bytes in int8, {self.float_bytes:,} in float32, opset {self.opset}; "
            f"ranges {self.ranges} of {self.images:,} images)\n{self.table()}\n"
            f"operators: {', '.join(f'{name} {count}' for name, count in self.ops.items())}"
        )


def quantise_onnx(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    calibration: Calibration,
    data: Iterable[Any] | None = None,
    config: QuantisationConfig | None = None,
) -> QuantisationCheck:
    """Write a network as an ONNX file of 8-bit weights and activations, compared with its float32 file in onnxruntime.

    A model is first exported as [export_onnx][ghostify.export_onnx] does, with the calibration images as its example:
    folded, and checked against torch. The file appears under its name only after the comparison.

    Args:
        model: A model of one input, converted or not; or the float32 file that ``export_onnx`` wrote of it.
        path: The file to write.
        calibration: A few hundred training images: a tensor ``(n, c, h, w)``, or batches; targets are not looked at.
        data: Other images to compare on, batches ``(n, …)`` or ``(inputs, targets)``; without them agreement is told
            on the calibration images, which were seen.
        config: Ranges, and what must be passed; see `QuantisationConfig`.

    Returns:
        Sizes, operators and differences.

    Raises:
        ArtefactError: The file given is none that can be read.
        ExportError: The network cannot be exported or quantised, or too few images get the same class; nothing
            is left under ``path`` then.
        InputsError: There are no images, or they do not fit; or ``model`` is neither a network nor a file.
        MissingExtraError: The extra ``onnx`` is not installed.
        OutputError: The file cannot be written.
    """
    config = config or QuantisationConfig()
    if not isinstance(model, nn.Module | str | os.PathLike):
        raise InputsError(f"model={model!r} is neither a network nor a file. Pass a torch.nn.Module, or a path.")
    onnx = require("onnx", extra="onnx")
    runtime = require("onnxruntime", extra="onnx")
    chunks = [_one_input(chunk) for chunk in calibration_chunks(calibration, nn.Identity(), config.images)]
    real = feeds(data, Example((chunks[0],))) if data is not None else None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float.onnx")
        if isinstance(model, nn.Module):
            _export(model, source, Path(path), chunks[0][:2])
        else:
            source.write_bytes(_self_contained(Path(model)).SerializeToString())
        name = type(model).__name__ if isinstance(model, nn.Module) else f"model={str(model)!r}"
        with atomic_file(path) as temporary:
            _quantise(source, Path(folder, "prepared.onnx"), temporary, chunks, config, name)
            check_file(onnx, temporary)
            proto = onnx.load(temporary)
            session, floats = open_session(runtime, temporary), _File(open_session(runtime, source))
            check = QuantisationCheck(
                path=Path(path),
                bytes=temporary.stat().st_size,
                float_bytes=(source if isinstance(model, nn.Module) else Path(model)).stat().st_size,
                opset=opset_of(proto),
                images=sum(map(len, chunks)),
                ranges=config.ranges,
                agreement=config.agreement,
                batches=tuple(_comparisons(session, floats, chunks, real, config)),
                ops=dict(Counter(node.op_type for node in proto.graph.node).most_common()),
            )
            _check_agreement(check, config, outputs=len(session.get_outputs()))
    return check


class _File(nn.Module):
    """A float32 file as a module, so that it can be the reference of a comparison."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.session.run(None, {self.session.get_inputs()[0].name: images.numpy()})
        names = [entry.name for entry in self.session.get_outputs()]
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}


def _one_input(chunk: Example) -> Tensor:
    tensors = chunk.tensors()
    if len(tensors) != 1:
        raise InputsError(
            f"calibration holds {len(tensors)} tensors for one call: only models of one input can be quantised here. "
            "Export the model, and give the file to onnxruntime.quantization."
        )
    return tensors[0].cpu().float().contiguous() if tensors[0].is_floating_point() else tensors[0].cpu()


def _export(model: nn.Module, source: Path, wanted: Path, images: Tensor) -> None:
    try:
        export_onnx(model, source, example_inputs=images)
    except ExportError as error:  # told of the file that was asked for: nobody knows the other
        raise ExportError(error.message.replace(str(source), str(wanted)), error.check) from error


def _self_contained(source: Path) -> Any:
    """The file's model with all weights in it, as weights alone: older files list them among the inputs, too."""
    proto = read_onnx(source, external_data=True)
    weights = {entry.name for entry in proto.graph.initializer}
    inputs = [entry for entry in proto.graph.input if entry.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in proto.graph.node):
        raise InputsError(f"model={str(source)!r} is quantised already. Give the float32 file that it was made from.")
    if len(inputs) != 1:
        raise InputsError(
            f"model={str(source)!r} takes {len(inputs)} inputs: only files of one input can be quantised "
            "here. Give it to onnxruntime.quantization."
        )
    if (opset := opset_of(proto)) < _OPSET:
        raise InputsError(
            f"model={str(source)!r} is written for opset {opset}, and a scale for every output channel needs {_OPSET} "
            "or later. Export it anew, or bring it there with onnx.version_converter."
        )
    return proto


def _quantise(
    source: Path, prepared: Path, target: Path, chunks: list[Tensor], config: QuantisationConfig, label: str
) -> None:
    """Prepare the graph, find the ranges, and write the 8-bit file."""
    require("onnxruntime.quantization", extra="onnx")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = read_onnx(source).graph.input[0].name

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]  # a class of the optional package
        def __init__(self) -> None:
            self.left = iter(chunks)

        def get_next(self) -> dict[str, Any] | None:
            images = next(self.left, None)
            return None if images is None else {name: images.numpy()}

    try:
        with _quiet():
            # Shapes are in the exporter's file; the symbolic inference would ask for another package.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            floats = [node.name for node in read_onnx(prepared).graph.node if node.op_type in _IN_FLOATS]
            quantization.quantize_static(
                prepared,
                target,
                Images(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                reduce_range=config.reduce_range,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                nodes_to_exclude=floats,
                calibrate_method=quantization.CalibrationMethod[RANGES[config.ranges]],
            )
    except Exception as error:  # the quantiser's errors have no common class
        raise ExportError(
            f"{label} cannot be quantised on images of shape {tuple(chunks[0].shape[1:])}: "
            f"{type(error).__name__}: {error}. Look whether the images fit the model, or try other ranges."
        ) from error
    if not any(node.op_type == "QuantizeLinear" for node in read_onnx(target).graph.node):
        raise ExportError("The file holds no operator that onnxruntime computes in 8 bits. Deploy it in float32.")


def _comparisons(
    session: Any, floats: nn.Module, chunks: list[Tensor], real: Iterable[Tensor] | None, config: QuantisationConfig
) -> Iterator[BatchCheck]:
    """Small batches, all calibration images, and the data."""
    for size in config.batch_sizes:
        yield compare_batch(session, floats, "calibration", with_batch(Example((chunks[0],)), size))
    seen = compare_on_data(session, floats, chunks)
    yield dataclasses.replace(seen, source="calibration")
    if real is not None:
        yield compare_on_data(session, floats, real)


def _check_agreement(check: QuantisationCheck, config: QuantisationConfig, *, outputs: int) -> None:
    last, top1 = check.batches[-1], check.top1
    where = f"path={str(check.path)!r} is not written: in 8 bits"
    if top1 is not None and top1 < check.agreement:
        raise ExportError(
            f"{where} {top1:.2%} of {last.batch:,} images ({last.source}) get the class that they get in float32, less "
            f"than agreement={check.agreement:g}. Give more calibration images like the data, try ranges='percentile', "
            "or lower agreement.",
            check,
        )
    if check.relative == float("inf"):
        raise ExportError(f"{where} some outputs are not finite. Look at the calibration images.", check)
    if (top1 is None or outputs > 1) and check.relative > config.tolerance:
        raise ExportError(
            f"{where} the outputs part from float32 by {check.relative:.3g} of the largest, more than "
            f"tolerance={config.tolerance:g}. Give more calibration images like the data, try ranges='percentile', or "
            "raise tolerance.",
            check,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the user what the quantiser prints and logs; its errors still come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
