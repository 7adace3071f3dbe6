"""Writing down where a run is, and going on from there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.checkpoint import State, snapshot
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.history import read_history
from ghostify.distillation.learning import Learner
from ghostify.distillation.processes import alike
from ghostify.distillation.state import (
    Progress,
    clear_states,
    holds_unfinished,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    weights_digest,
    write_state,
)
from ghostify.errors import InputsError, OptionError, OutputError
from ghostify.states import versioned

log = logging.getLogger(__name__)

Found = tuple[Progress, dict[str, Tensor]]

# Settings that may change from one part of a run to the next.
_FREE = ("progress", "state_every", "tensorboard")


class States:
    """The states of one run, in the folder ``state`` of its own.

    Args:
        out: Folder of the run.
        student: The one that learns.
        teacher: The one that it learns from.
        epochs: Of the run.
        steps_per_epoch: Batches in each.
        batches_of_val: In a pass over the validation data; ``None`` without.
        config: Its settings.
    """

    def __init__(
        self,
        out: Path,
        student: nn.Module,
        teacher: nn.Module,
        epochs: int,
        steps_per_epoch: int,
        batches_of_val: int | None,
        config: DistillConfig,
    ) -> None:
        self.folder = out / "state"
        settings = {name: value for name, value in config.settings().items() if name not in _FREE}
        shapes = {name: list(value.shape) for name, value in student.state_dict().items() if isinstance(value, Tensor)}
        self.made_by: dict[str, Any] = {
            **settings,
            "epochs": epochs,
            "batches in an epoch": steps_per_epoch,
            "batches of val": batches_of_val,
            "teacher's weights": weights_digest(teacher),
            "student's shapes": shapes,
        }

    def write(self, progress: Progress, learner: Learner, *, last: State, best: State) -> None:
        """Write all that the run needs to go on.

        Extra state that is no tensor (``get_extra_state``) has no place in it; it is taken to be what the
        student has when the run goes on.

        Raises:
            OutputError: It cannot be written.
        """
        parts = {"student": snapshot(learner.student), "last": last, **({} if best is last else {"best": best})}
        if learner.average is not None:
            parts["average"] = snapshot(learner.average)
        parts["optimizer"] = optimizer_tensors(learner.optimizer)
        parts["scaler"] = {name: torch.tensor(value) for name, value in learner.scaler.state_dict().items()}
        tensors = {
            f"{part}:{name}": value
            for part, values in parts.items()
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        write_state(self.folder, progress, tensors, self.made_by)

    @property
    def exist(self) -> bool:
        """Whether there is any."""
        return self.folder.is_dir()

    def clear(self) -> None:
        """Remove all states."""
        clear_states(self.folder)

    def rewind(self, epoch: int) -> None:
        """Remove the states from inside an epoch, so that a run goes on at its beginning."""
        clear_states(self.folder, since=epoch)


def find_state(states: States | None, *, resume: bool) -> Found | None:
    """What there is to go on from.

    Raises:
        OptionError: ``resume`` without a folder, or with other settings than the run was begun with.
        OutputError: The folder holds a run that is not finished, and is not to go on; or it is to go on, and no
            state is left.
    """
    if states is None:
        if resume:
            raise OptionError("resume=True needs the folder of the run. Pass out.")
        return None
    if resume:
        found = read_state(states.folder, states.made_by)
        if found is None and (epochs := _epochs_told(states.folder.parent / "history.json")):
            raise OutputError(
                f"resume=True: {str(states.folder)!r} holds no state to go on from, and history.json beside it tells "
                f"of {epochs} epochs, which would be lost. Bring the states back, remove history.json to begin anew, "
                "or pass another folder as out."
            )
        return found
    if holds_unfinished(states.folder):
        raise OutputError(
            f"out={str(states.folder.parent)!r} holds a run that is not finished. Pass resume=True to go on with it, "
            f"another folder, or remove {str(states.folder)!r}."
        )
    return None


def _epochs_told(history: Path) -> int:
    try:
        return len(read_history(history.read_bytes()))
    except (OSError, InputsError):  # there is none, or none of ours
        return 0


def restore(found: Found, learner: Learner, begins: Tensor) -> tuple[Progress, State, State]:
    """Put a learner where a run was.

    Args:
        found: The state.
        learner: Changed in place.
        begins: Facts of the first batch of the data, which should be those that the run was begun with.

    Returns:
        How far it was, and the weights of its last and its best epoch.
    """
    progress, tensors = found
    if progress.begins and not alike(begins, torch.tensor(progress.begins, dtype=begins.dtype)):
        log.warning(
            "data begins with another batch than when the run was begun: it goes on, but not as it would have. Order "
            "and augmentation should come from the epoch's number or global random numbers of torch, NumPy or Python "
            "(persistent_workers keep their own)"
        )

    def part(name: str) -> dict[str, Tensor]:
        return {key.split(":", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{name}:")}

    student = learner.student

    def completed(values: dict[str, Tensor], model: nn.Module) -> State:
        """With the extra state that is in no file."""
        return versioned({**snapshot(model), **values}, model)

    student.load_state_dict(completed(part("student"), student))
    if learner.average is not None:
        learner.average.load_state_dict(completed(part("average"), learner.average))
    restore_optimizer(learner.optimizer, part("optimizer"))
    if scaler := part("scaler"):  # not where the run was begun in another precision
        learner.scaler.load_state_dict({name: value.item() for name, value in scaler.items()})
    last, best = part("last"), part("best")
    last_state = completed(last, student)
    return progress, last_state, completed(best, student) if best else last_state
