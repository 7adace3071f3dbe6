"""The forms in which a network may be deployed, side by side: original, Ghost and pruned, in float32 and in int8."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ghostify.backends.runners import Backend, device_name, onnx_session, running, session_run
from ghostify.backends.timing import Effort, Times, interleaved
from ghostify.deployment.onnx_export import export_onnx
from ghostify.deployment.onnx_notes import read_onnx
from ghostify.deployment.pruning import pruned
from ghostify.deployment.quantisation import UNGATED, QuantisationConfig, quantise_onnx
from ghostify.distillation.batches import check_labels
from ghostify.errors import InputsError, OptionError
from ghostify.extras import require
from ghostify.reporting.accuracy import class_numbers, split_batch
from ghostify.reporting.latency import timing_of
from ghostify.reporting.report import Timing
from ghostify.tracing.calibration import Calibration
from ghostify.tracing.counting import count_macs, count_params
from ghostify.tracing.example import Example, ExampleInputs, require_module


@dataclass(frozen=True)
class FormsConfig:
    """Which forms are compared, and how.

    Attributes:
        int8: Each network in 8 bits, too; this needs calibration images.
        pruning: The original pruned to the MACs of the Ghost network, too; this needs torch-pruning.
        threads: Processor threads of onnxruntime.
        repeats: Timed rounds at most; one round runs every form once.
        seconds: Timed rounds stop early after this time, not before ten of them.
        folder: Keep the ONNX files there, named after their forms; by default none is kept.
        quantisation: How 8 bits are reached. How far they are off is told, so nothing is asked for by default.

    Raises:
        OptionError: A value is outside its range.
    """

    int8: bool = True
    pruning: bool = False
    threads: int = 1
    repeats: int = 100
    seconds: float = 20.0
    folder: str | os.PathLike[str] | None = None
    quantisation: QuantisationConfig = UNGATED

    def __post_init__(self) -> None:
        Backend(threads=self.threads)  # which checks them
        if self.repeats < 5:
            raise OptionError(f"repeats={self.repeats!r} is too few for a median and quartiles. Use 5 or more.")
        if not self.seconds > 0:
            raise OptionError(f"seconds={self.seconds!r} is not a time. Use a positive number, such as 20.")


@dataclass(frozen=True)
class Form:
    """One network as it is deployed, in one ONNX file.

    Attributes:
        name: As in ``Ghost int8``.
        bytes: Size of the file: weights, graph, and what the file tells about itself.
        weight_bytes: What of it are weights, scales and other constants.
        params: Numbers in the network's parameters, of whatever type.
        macs: Multiply-accumulates of convolutions and linear layers, batch 1, of whatever type.
        top1: Share of the data that onnxruntime gives its class; ``None`` without targets or class scores.
        agreement: Share of the data that get the class that the first form gives; ``None`` without data or class
            scores.
        latency: Times for the whole batch of the example, in milliseconds.
        ratio: Median over all rounds of the first form's time / this form's time; above 1 is faster.
        ratio_q25: Its lower quartile.
        ratio_q75: Its upper quartile.
    """

    name: str
    bytes: int
    weight_bytes: int
    params: int
    macs: int
    top1: float | None
    agreement: float | None
    latency: Timing
    ratio: float
    ratio_q25: float
    ratio_q75: float


@dataclass(frozen=True)
class DeployedForms:
    """Several forms side by side. Print it to read it; made by `compare_deployed`.

    Attributes:
        forms: The original comes first.
        input_shapes: Shapes of the example inputs on which they were timed, with the batch dimension.
        examples: How many examples the shares are of; 0 without data.
        rounds: Timed runs of each form, all in turn.
        backend: What ran them, with version, threads and the processor's name.
        remarks: What a reader must know to trust the numbers; printed with them.
    """

    forms: tuple[Form, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    examples: int
    rounds: int
    backend: str
    remarks: tuple[str, ...]

    def __getitem__(self, name: str) -> Form:
        """The form of a name.

        Raises:
            KeyError: There is none.
        """
        return {form.name: form for form in self.forms}[name]

    def table(self, style: str = "simple") -> str:
        """A line for every form, in any format that tabulate knows."""
        first = self.forms[0]
        rows = [
            [
                form.name,
                f"{form.bytes / 1e3:,.0f}",
                f"{form.weight_bytes / 1e3:,.0f}",
                f"{first.bytes / form.bytes:.2f}×",
                f"{form.params:,}",
                f"{form.macs:,}",
                "" if form.top1 is None else f"{form.top1:.2%}",
                "" if form.agreement is None else f"{form.agreement:.2%}",
                f"{form.latency.median:.2f}",
                f"{form.ratio:.2f}× ({form.ratio_q25:.2f} … {form.ratio_q75:.2f})",
            ]
            for form in self.forms
        ]
        headers = ["form", "file kB", "weights kB", "smaller", "params", "MACs", "top-1", "agreement", "ms", "faster"]
        return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)

    def to_json(self) -> str:
        """Everything as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def __str__(self) -> str:
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        data = f"; shares of {self.examples:,} examples" if self.examples else ""
        head = f"As deployed: {self.backend}; inputs {shapes}, {self.rounds} rounds in turn{data}"
        return "\n".join([head, self.table(), *(f"* {remark}" for remark in self.remarks)])


def compare_deployed(
    original: nn.Module,
    compressed: nn.Module,
    *,
    example_inputs: ExampleInputs | Example,
    calibration: Calibration | None = None,
    data: Iterable[Any] | None = None,
    others: Mapping[str, nn.Module] | None = None,
    config: FormsConfig | None = None,
) -> DeployedForms:
    """Write every form as a checked ONNX file, and measure size, answers and latency of these in onnxruntime.

    Args:
        original: The model before.
        compressed: The Ghost network that was made of it.
        example_inputs: A batch ``(n, c, h, w)``, or arguments as a tuple or a dict. Counts are told for one example,
            latency for the batch as given.
        calibration: Training images, of which 8-bit ranges are taken and on which the norms of a pruned network are
            estimated anew.
        data: Batches of ``(inputs, targets)`` with class numbers ``(n,)``, or of inputs alone (then agreement only),
            for models of one input tensor. Read once.
        others: More networks by their names, such as a pruned one that was trained again.
        config: Which forms, and how; see `FormsConfig`.

    Raises:
        BudgetError: The original cannot be pruned as far as asked for.
        ExportError: A network cannot be exported, or its file computes something else.
        InputsError: Inputs, data or images are missing, empty or do not fit.
        MissingExtraError: The extra ``onnx`` is not installed, or ``bench`` where pruning is asked for.
        OptionError: A name is taken twice.
        OutputError: The folder cannot be written.
    """
    config = config or FormsConfig()
    if config.int8 and calibration is None:
        raise InputsError(
            "calibration=None: 8-bit ranges come from images. Pass some hundred training images, or "
            "FormsConfig(int8=False)."
        )
    if calibration is not None and not isinstance(calibration, Tensor):
        calibration = list(calibration)  # it is read once for every network
    require_module(original, "original")
    require_module(compressed, "compressed")
    example = _as_files_take_it(Example.of(example_inputs), original)
    networks, remarks = _networks(original, compressed, others or {}, example, calibration, config)
    with _folder(config) as folder:
        files = dict(_files(networks, folder, example, calibration, config))
        sessions = {name: onnx_session(str(file), config.threads) for name, (file, _) in files.items()}
        top1, agreement, examples = _answers(list(sessions.values()), data, example)
        times = _times(list(sessions.values()), example, config)
        counts = {name: (count_params(model), count_macs(model, example).macs) for name, model in networks.items()}
        forms = [
            Form(
                name=name,
                bytes=file.stat().st_size,
                weight_bytes=sum(entry.ByteSize() for entry in read_onnx(file).graph.initializer),
                params=counts[network][0],
                macs=counts[network][1],
                top1=top1[column],
                agreement=agreement[column],
                latency=timing_of(times[:, column]),
                **_ratio(times[:, 0] / times[:, column]),
            )
            for column, (name, (file, network)) in enumerate(files.items())
        ]
    if data is not None and agreement[0] is None:
        remarks.append("Accuracy is left out: the first output is no table of class scores (n, classes).")
    version = require("onnxruntime", extra="onnx").__version__
    backend = f"{Backend(threads=config.threads)}, version {version}, {device_name(torch.device('cpu'))}"
    return DeployedForms(tuple(forms), example.shapes, examples, len(times), backend, tuple(remarks))


def _networks(
    original: nn.Module,
    compressed: nn.Module,
    others: Mapping[str, nn.Module],
    example: Example,
    calibration: Calibration | None,
    config: FormsConfig,
) -> tuple[dict[str, nn.Module], list[str]]:
    """All networks by name, and what must be said about them."""
    networks = {"original": original, "Ghost": compressed}
    remarks = []
    if config.int8:
        seen = config.quantisation
        bits = ", weights in 7 of 8 bits" if seen.reduce_range else ""
        remarks.append(
            f"int8: static, by onnxruntime, ranges {seen.ranges} of up to {seen.images:,} calibration images{bits}; "
            "not trained for it."
        )
    if config.pruning:
        macs = count_macs(compressed, example).macs
        networks["pruned"] = pruned(original, macs, example_inputs=example, calibration=calibration)
        norms = "as they were" if calibration is None else "estimated anew on the calibration images"
        remarks.append(
            f"pruned: by torch-pruning, channels of least norm first, to the MACs of Ghost; norms {norms}; not trained "
            "again, which pruning lives on. Train it and pass it as others={…} for what it can do."
        )
    for name, model in others.items():
        if name in networks or name.removesuffix(" int8") != name:
            raise OptionError(f"others={name!r} is the name of another form. Choose one beside {', '.join(networks)}.")
        require_module(model, f"others[{name!r}]")
        networks[name] = model
    return networks, remarks


def _as_files_take_it(example: Example, model: nn.Module) -> Example:
    """On the CPU, in float32, and in the order of the model's arguments."""

    def plain(leaf: Any) -> Any:
        return (leaf.cpu().float() if leaf.is_floating_point() else leaf.cpu()) if isinstance(leaf, Tensor) else leaf

    args, kwargs = tree_map(plain, (example.args, example.kwargs))
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    return Example(bound.args, bound.kwargs)


def _files(
    networks: Mapping[str, nn.Module],
    folder: Path,
    example: Example,
    calibration: Calibration | None,
    config: FormsConfig,
) -> Iterator[tuple[str, tuple[Path, str]]]:
    """By the name of each form its file and its network."""
    for name, model in networks.items():
        file = folder / f"{name}.onnx"
        export_onnx(model, file, example_inputs=example.args or example.kwargs)
        yield name, (file, name)
        if config.int8 and calibration is not None:
            small = folder / f"{name} int8.onnx"
            quantise_onnx(file, small, calibration=calibration, config=config.quantisation)
            yield f"{name} int8", (small, name)


def _answers(
    sessions: Sequence[Any], data: Iterable[Any] | None, example: Example
) -> tuple[list[float | None], list[float | None], int]:
    """Of every session the share of right answers and of those that the first gives, and of how many examples."""
    unknown: list[float | None] = [None] * len(sessions)
    if data is None:
        return unknown, unknown, 0
    if len(example.tensors()) != 1:
        raise InputsError(f"data are for models of one input; this one takes {len(example.tensors())}. Pass data=None.")
    name, dims = sessions[0].get_inputs()[0].name, example.tensors()[0].dim()
    right, same = np.zeros(len(sessions), int), np.zeros(len(sessions), int)
    examples = labelled = 0
    for index, item in enumerate(data):
        inputs, given = split_batch(item, index, dims)
        feed = {name: inputs.cpu().to(example.tensors()[0].dtype).numpy()}
        scores = [torch.from_numpy(session.run(None, feed)[0]) for session in sessions]
        if scores[0].dim() != 2 or scores[0].shape[1] < 2:
            return unknown, unknown, 0
        targets, best = class_numbers(given, inputs, index), [score.argmax(1) for score in scores]
        examples += len(inputs)
        same += [int((answer == best[0]).sum()) for answer in best]
        if targets is not None:
            check_labels(targets, scores[0], "data")
            labelled += len(targets)
            right += [int((answer == targets).sum()) for answer in best]
    if not examples or labelled not in (0, examples):
        raise InputsError(
            f"data holds {examples:,} examples, {labelled:,} of them with targets. Give all batches as (inputs, "
            "targets), or all as inputs alone; an iterator that was used up before must be made anew."
        )
    return [r / examples if labelled else None for r in right.tolist()], [s / examples for s in same.tolist()], examples


def _times(sessions: Sequence[Any], example: Example, config: FormsConfig) -> Times:
    effort = Effort(config.repeats, fewest=10, warmup=5, seconds=config.seconds)
    with running(Backend(threads=config.threads)):
        return interleaved(
            [session_run(session, example) for session in sessions], effort, torch.device("cpu"), threads=config.threads
        )


def _ratio(ratios: Times) -> dict[str, float]:
    q25, median, q75 = np.percentile(ratios, [25, 50, 75])
    return {"ratio": float(median), "ratio_q25": float(q25), "ratio_q75": float(q75)}


@contextmanager
def _folder(config: FormsConfig) -> Iterator[Path]:
    """Where the files are written: the folder that was asked for, or one that goes away again."""
    if config.folder is not None:
        yield Path(config.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
