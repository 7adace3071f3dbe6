"""The state of a run in the middle, on disk: enough to go on as if it had never been stopped.

A state is one safetensors file: weights, averages and the optimiser's memory as tensors, all else as
JSON in its header, with a SHA-256 over both. The last two are kept, so that a damaged one is no loss.
Random numbers need not be stored: every step draws its own from the seed, the epoch and its number.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pydantic
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ghostify.distillation.history import Epoch, Scores
from ghostify.errors import OptionError, OutputError
from ghostify.files import atomic_file

log = logging.getLogger(__name__)

_KEPT = 2
# Settings that may be others when a run goes on, which is told: what is tried where it diverged, and what not every
# machine has.
_MAY_CHANGE = ("lr", "clip_norm", "precision", "cuda_graphs")
_VERSION = 1


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        epoch: The one that is being gone through, from 1.
        step: Its steps that are done.
        loss_sum: Of all examples of the epoch so far.
        examples: Their number.
        best_epoch: The epoch that was best so far.
        start: The scores before the first step.
        best: The scores of the best epoch.
        scores: The last ones.
        history: The epochs that are complete.
        finished: Whether there is nothing more to do.
        seconds_per_validation: What the last one took.
        begins: Facts of the first batch of all, by which other data are noticed.
    """

    epoch: int = 1
    step: int = 0
    loss_sum: float = 0.0
    examples: int = 0
    best_epoch: int = 0
    start: Scores | None = None
    best: Scores | None = None
    scores: Scores | None = None
    history: tuple[Epoch, ...] = ()
    finished: bool = False
    seconds_per_validation: float = 0.0
    begins: tuple[float, ...] = ()

    def end_epoch(self, record: Epoch, scores: Scores | None) -> None:
        """Note an epoch that is complete, and turn to the next."""
        self.history, self.scores = (*self.history, record), scores
        self.epoch, self.step, self.loss_sum, self.examples = record.epoch + 1, 0, 0.0, 0

    def line(self, epochs: int, steps_per_epoch: int) -> str:
        """Where a run goes on, for a log.

        Example:
            >>> Progress(epoch=3, step=20).line(epochs=30, steps_per_epoch=352)
            'going on at epoch 3 of 30, step 20 of 352'
            >>> Progress(epoch=31, finished=True).line(epochs=30, steps_per_epoch=352)
            'finished already, after epoch 30 of 30'
        """
        if self.finished:
            return f"finished already, after epoch {self.epoch - 1} of {epochs}"
        return f"going on at epoch {self.epoch} of {epochs}, step {self.step} of {steps_per_epoch}"

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid", allow_inf_nan=True)


_PROGRESS = pydantic.TypeAdapter(Progress)


def write_state(folder: Path, progress: Progress, tensors: dict[str, Tensor], made_by: dict[str, Any]) -> None:
    """Write a state; older ones than the one before are removed.

    Args:
        folder: Of the states; made if missing.
        progress: How far the run is.
        tensors: All that it holds.
        made_by: What decides how it goes on: settings, lengths, models. JSON.

    Raises:
        OutputError: It cannot be written.
    """
    header = json.dumps({"version": _VERSION, "made_by": made_by, "progress": asdict(progress)})
    packed = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    content = safetensors.torch.save(packed, {"state": header, "sha256": _digest(header, packed)})
    with atomic_file(folder / f"{progress.epoch:06d}-{progress.step:09d}.safetensors") as temporary:
        temporary.write_bytes(content)
    # Beside the last ones that of the last complete epoch stays, to go back to if the student diverges.
    states = _states(folder)
    complete = [path for path in states if _place(path)[1] == 0][:1]
    # Those of a process that was killed while it wrote are as large as a state.
    for old in (*states[_KEPT:], *folder.glob(".[0-9]*-[0-9]*.safetensors")):
        if old not in complete:
            old.unlink(missing_ok=True)


def read_state(folder: Path, made_by: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]] | None:
    """Read the newest state that is whole; damaged ones are told of and passed over.

    Args:
        folder: Of the states.
        made_by: Of the run that is to go on.

    Returns:
        ``None`` if there is none.

    Raises:
        OptionError: The state is of a run with other settings.
        OutputError: All of them are damaged.
    """
    states = _states(folder)
    for path in states:
        try:
            header, tensors = _read(path)
            progress = _PROGRESS.validate_python(header["progress"])
        except Exception as error:  # whatever damage makes of a file
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("%s is damaged (%s), and passed over", path, reason)
            continue
        then, now = _flat(header["made_by"]), _flat(json.loads(json.dumps(made_by)))
        others = [name for name in {**now, **then} if now.get(name) != then.get(name)]
        for name in others:
            if name not in _MAY_CHANGE:
                raise OptionError(
                    f"resume=True: {name}={now.get(name)!r}, and the run in {str(folder.parent)!r} was begun with "
                    f"{then.get(name)!r}. Pass what it was begun with, or another folder as out."
                )
        for name in others:
            if name in then and then[name] != "auto":  # an earlier version knew less, or wrote that down
                log.warning("from here on %s=%r; the run was begun with %r", name, now.get(name), then[name])
        return progress, tensors
    if states:
        raise OutputError(
            f"resume=True: all {len(states)} states in {str(folder)!r} are damaged, and nothing can go on from them. "
            "Remove that folder and history.json to begin anew, or pass another folder as out."
        )
    return None


def clear_states(folder: Path, *, since: int = 0) -> None:
    """Remove the states from inside an epoch on, and their folder if nothing else is in it.

    Args:
        folder: Of the states.
        since: Number of the epoch; its very beginning, which is the end of the one before, stays.
    """
    for path in _states(folder):
        if _place(path) > (since, 0):
            path.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def holds_unfinished(folder: Path) -> bool:
    """Whether there is the state, whole or not, of a run that was stopped."""
    for path in _states(folder):
        try:
            return not _read(path)[0]["progress"]["finished"]
        except Exception:  # whatever damage makes of a file
            continue
    return bool(_states(folder))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of each parameter, by number and name."""
    remembered = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": value
        for number, values in remembered.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser its memory back, each tensor laid out in memory as its parameter is."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    remembered: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, name = key.split(".", 1)
        like = parameters[int(number)]
        alike = value.shape == like.shape
        laid_out = torch.empty_like(like, dtype=value.dtype).copy_(value) if alike else value
        remembered.setdefault(int(number), {})[name] = laid_out
    optimizer.load_state_dict({"state": remembered, "param_groups": optimizer.state_dict()["param_groups"]})


def weights_digest(model: nn.Module) -> str:
    """A short name for a model's weights: the same weights have the same."""
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.layout is not torch.strided:
            sparse = value.detach().cpu().to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            tensors |= {f"{name}.indices": sparse.indices(), f"{name}.values": sparse.values().contiguous()}
        elif isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
    return _digest("", tensors)[:16]


def _flat(made_by: dict[str, Any]) -> dict[str, Any]:
    """The same without dictionaries inside, so that what differs can be named."""
    inside = {name: value for name, value in made_by.items() if isinstance(value, dict)}
    named = {f"{name}: {key}": value for name, values in inside.items() for key, value in values.items()}
    return {name: value for name, value in made_by.items() if name not in inside} | named


def _states(folder: Path) -> list[Path]:
    """The states, the newest first."""
    return sorted(folder.glob("[0-9]*-[0-9]*.safetensors"), reverse=True)


def _place(path: Path) -> tuple[int, int]:
    """Epoch and steps of it that were done, from the name of a state."""
    epoch, step = path.stem.split("-")
    return int(epoch), int(step)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safetensors.safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    if _digest(metadata["state"], tensors) != metadata["sha256"]:
        raise ValueError("its numbers are not those that were written")
    header: dict[str, Any] = json.loads(metadata["state"])
    if header["version"] != _VERSION:
        raise ValueError(f"it is of version {header['version']}, and this ghostify reads version {_VERSION}")
    return header, tensors


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        hashed.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        hashed.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
