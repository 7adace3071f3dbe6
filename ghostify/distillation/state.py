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
from ghostify.errors import OptionError
from ghostify.files import atomic_file

log = logging.getLogger(__name__)

_KEPT = 2
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

    def end_epoch(self, record: Epoch, scores: Scores | None) -> None:
        """Note an epoch that is complete, and turn to the next."""
        self.history, self.scores = (*self.history, record), scores
        self.epoch, self.step, self.loss_sum, self.examples = record.epoch + 1, 0, 0.0, 0

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
    # Those of a process that was killed while it wrote are as large as a state.
    for old in (*_states(folder)[_KEPT:], *folder.glob(".[0-9]*-[0-9]*.safetensors")):
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
    """
    for path in _states(folder):
        try:
            header, tensors = _read(path)
            progress = _PROGRESS.validate_python(header["progress"])
        except Exception as error:  # whatever damage makes of a file
            log.warning("%s is damaged (%s): going back to the one before", path, str(error).splitlines()[0])
            continue
        then, now = _flat(header["made_by"]), _flat(json.loads(json.dumps(made_by)))
        for name in [name for name in {**now, **then} if now.get(name) != then.get(name)]:
            raise OptionError(
                f"resume=True: {name}={now.get(name)!r}, and the run in {str(folder.parent)!r} was begun with "
                f"{then.get(name)!r}. Pass what it was begun with, or another folder as out."
            )
        return progress, tensors
    return None


def clear_states(folder: Path) -> None:
    """Remove all states, and their folder if nothing else is in it."""
    for path in _states(folder):
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
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return _digest("", {name: value.detach().cpu().contiguous() for name, value in tensors.items()})[:16]


def _flat(made_by: dict[str, Any]) -> dict[str, Any]:
    """The same without dictionaries inside, so that what differs can be named."""
    inside = {name: value for name, value in made_by.items() if isinstance(value, dict)}
    named = {f"{name}: {key}": value for name, values in inside.items() for key, value in values.items()}
    return {name: value for name, value in made_by.items() if name not in inside} | named


def _states(folder: Path) -> list[Path]:
    """The states, the newest first."""
    return sorted(folder.glob("[0-9]*-[0-9]*.safetensors"), reverse=True)


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
