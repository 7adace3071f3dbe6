"""The state of a run, in memory and on disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ghostify.distillation.config import DistillConfig
from ghostify.distillation.history import Epoch, Scores
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
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_history(
    path: Path, *, history: Sequence[Epoch], start: Scores | None, best_epoch: int, config: DistillConfig
) -> None:
    """Write the records so far as JSON.

    Args:
        path: The file; it appears complete or not at all.
        history: The epochs so far.
        start: The scores before the first one.
        best_epoch: Which is the best so far.
        config: The settings of the run.

    Raises:
        OutputError: It cannot be written.
    """
    settings = dict(vars(config))
    if callable(config.loss):
        settings["loss"] = getattr(config.loss, "__qualname__", type(config.loss).__name__)
    record = {
        "config": settings,
        "start": None if start is None else asdict(start),
        "epochs": [asdict(epoch) for epoch in history],
        "best_epoch": best_epoch,
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
