"""What a run leaves for others to read: weights and history."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ghostify.distillation.config import DistillConfig
from ghostify.distillation.state import Progress
from ghostify.files import atomic_file
from ghostify.states import versioned

State = dict[str, Any]


def snapshot(model: nn.Module) -> State:
    """A copy of the model's state dict that further training does not change."""
    values = {
        name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in model.state_dict().items()
    }
    return versioned(values, model)


def write_weights(path: Path, state: State) -> None:
    """Write the tensors of a snapshot as safetensors; extra state that is no tensor has no place in such a file.

    Args:
        path: The file; it appears complete or not at all.
        state: What ``snapshot`` gave.

    Raises:
        OutputError: It cannot be written.
    """
    tensors = {name: value.contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    content = safetensors.torch.save(tensors)  # not save_file: a full disk is to be an OSError
    with atomic_file(path, sole_writer=True) as temporary:
        temporary.write_bytes(content)


def write_history(path: Path, *, progress: Progress, config: DistillConfig) -> None:
    """Write the records so far as JSON.

    Args:
        path: The file; it appears complete or not at all.
        progress: How far the run is.
        config: The settings of the run.

    Raises:
        OutputError: It cannot be written.
    """
    record = {
        "config": config.settings(),
        "start": None if progress.start is None else asdict(progress.start),
        "epochs": [asdict(epoch) for epoch in progress.history],
        "best_epoch": progress.best_epoch,
    }
    with atomic_file(path, sole_writer=True) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
