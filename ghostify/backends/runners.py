"""What runs a model, by name: from a module and its inputs to a call that can be timed."""

from __future__ import annotations

import copy
import numbers
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.backends.memory import retained_memory
from ghostify.backends.onnx_program import onnx_program
from ghostify.backends.timing import Run
from ghostify.errors import OptionError
from ghostify.extras import require
from ghostify.tracing.example import Example


@dataclass(frozen=True)
class Backend:
    """What a model is to run on.

    Attributes:
        name: ``torch`` (eager), ``torch-compile``, or ``onnxruntime`` (CPU, the folded form).
        threads: Processor threads.

    Raises:
        OptionError: The name is unknown, or the number of threads is none.

    Example:
        >>> print(Backend("onnxruntime", threads=2))
        onnxruntime, 2 threads
    """

    name: str = "onnxruntime"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.name not in RUNNERS:
            raise OptionError(f"backend={self.name!r} is unknown. Use one of {', '.join(RUNNERS)}.")
        threads = self.threads
        if isinstance(threads, bool) or not isinstance(threads, numbers.Integral) or threads < 1:
            raise OptionError(f"threads={threads!r} is not a whole number ≥ 1. Use 1 for one core.")

    @staticmethod
    def of(value: Backend | str) -> Backend:
        """A backend as it is, or the one of a name on one thread.

        Raises:
            OptionError: It is neither.
        """
        if isinstance(value, str):
            return Backend(value)
        if not isinstance(value, Backend):
            raise OptionError(f"backend={value!r} is neither a name nor a Backend. Pass backend='onnxruntime'.")
        return value

    @property
    def folds(self) -> bool:
        """Whether models run in their folded form there."""
        return self.name == "onnxruntime"

    def __str__(self) -> str:
        return f"{self.name}, {self.threads} thread{'' if self.threads == 1 else 's'}"


def backend_installed(name: str) -> None:
    """Raise MissingExtraError unless what a backend needs beside torch is installed."""
    for module in ("onnx", "onnxscript", "onnxruntime") if name == "onnxruntime" else ():
        require(module, extra="onnx")


def runs_of(backend: Backend, modules: Sequence[nn.Module], example: Example) -> list[Run]:
    """Make calls that run each module on the same inputs.

    Args:
        backend: What runs them.
        modules: In evaluation mode, each giving one tensor.
        example: Their inputs.

    Raises:
        MissingExtraError: The backend is not installed.
        ExportError: A module cannot be exported.
    """
    return RUNNERS[backend.name](modules, example, backend.threads)


@contextmanager
def running(backend: Backend) -> Iterator[None]:
    """Give torch the backend's number of threads, no gradients, and memory that stays with the process.

    Beside another runtime it has one thread: threads of torch that wait for work would disturb the other's.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if backend.folds else backend.threads)
    try:
        with torch.inference_mode(), retained_memory(torch.device("cpu")):
            yield
    finally:
        torch.set_num_threads(before)


def device_name(device: torch.device) -> str:
    """The processor's name, as in ``NVIDIA H200`` or ``AMD EPYC 7763 64-Core Processor``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        facts = ""
    for line in facts.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lies; the CPU if it has none."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


def _torch_runs(modules: Sequence[nn.Module], example: Example, threads: int) -> list[Run]:
    return [_eager(module, example) for module in modules]


def _compiled_runs(modules: Sequence[nn.Module], example: Example, threads: int) -> list[Run]:
    return [_eager(module, example, torch.compile(_with_own_code(module), dynamic=False)) for module in modules]


def _with_own_code(module: nn.Module) -> Callable[..., Any]:
    """The module as a function with a code object of its own.

    torch counts compilations by code object, and after the eighth goes on uncompiled, without an error; layers that are
    timed are all of one class.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def _eager(module: nn.Module, example: Example, call: Callable[..., Any] | None = None) -> Run:
    moved, run = example.to(module), call or module
    return lambda: run(*moved.args, **moved.kwargs)


class _Together(nn.Module):
    """Several modules on the same inputs: they are exported at once, which is what takes the time."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, *args: Tensor) -> dict[str, Any]:
        return {f"output{number}": part(*args) for number, part in enumerate(self.parts)}


def _onnxruntime_runs(modules: Sequence[nn.Module], example: Example, threads: int) -> list[Run]:
    backend_installed("onnxruntime")
    plain = [copy.deepcopy(module).cpu().float() for module in modules]
    example = example.to(plain[0])
    if len(plain) == 1:
        parts = [onnx_program(plain[0], example, name="the model")]
    else:
        program = onnx_program(_Together(plain), example, name="a layer")
        extractor = require("onnx.utils", extra="onnx").Extractor(program)
        inputs = [entry.name for entry in program.graph.input]
        parts = [extractor.extract_model(inputs, [f"output{number}"]) for number in range(len(modules))]
    return [session_run(onnx_session(part.SerializeToString(), threads), example) for part in parts]


def onnx_session(source: bytes | str, threads: int) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU that can be timed beside others.

    Args:
        source: The model itself, or the path of its file.
        threads: Processor threads.

    Raises:
        MissingExtraError: The extra ``onnx`` is not installed.
    """
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Threads of one session that wait for work would slow the session that is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def session_run(session: Any, example: Example) -> Run:
    """A call that runs a session on the example, whose tensors are in the order of the session's inputs."""
    names = (entry.name for entry in session.get_inputs())
    feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, example.tensors(), strict=True)}
    return lambda: session.run(None, feed)


RUNNERS: dict[str, Callable[[Sequence[nn.Module], Example, int], list[Run]]] = {
    "torch": _torch_runs,
    "torch-compile": _compiled_runs,
    "onnxruntime": _onnxruntime_runs,
}
