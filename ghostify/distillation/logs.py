"""What a run writes down while it goes on, for people who look at it: CSV files, and TensorBoard's events.

Nothing reads them back: what a run goes on from is its state, and what it came to is its history.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any

from ghostify.distillation.history import Epoch, Scores
from ghostify.errors import OutputError
from ghostify.extras import require
from ghostify.files import atomic_file

log = logging.getLogger(__name__)

STEP_COLUMNS = ("step", "loss", "lr", "images_per_second")
EPOCH_COLUMNS = (*(field.name for field in fields(Epoch)), "teacher_accuracy", "step")


class RunLog:
    """``steps.csv``, ``epochs.csv`` and, if asked for, TensorBoard's events in ``tensorboard/``.

    Of what the folder holds already the rows up to ``steps`` and ``epochs`` stay, and those after them go: they
    are of steps that a run which goes on takes again. A run that begins keeps none. Every row is on its way to
    the disk when the call returns, so a killed run leaves at most its last line torn; that line goes, too.

    Use it as a context manager: the events are written out when it closes.

    Args:
        folder: Made if missing. ``None`` writes nothing.
        tensorboard: Write events, too. Each has the columns of its CSV file as ``step/…`` and ``epoch/…``, against
            the number of steps done.
        steps: Steps that the run has done already, over all epochs.
        epochs: Epochs that it has ended already.

    Raises:
        MissingExtraError: ``tensorboard`` is not installed, and is asked for.
        OutputError: The folder cannot be written, or the disk is full. So do the methods.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with RunLog(folder) as run_log:
        ...     run_log.step(20, loss=0.5, lr=0.1, images_per_second=900.0)
        >>> print((folder / "steps.csv").read_text())
        step,loss,lr,images_per_second
        20,0.5,0.1,900.0
    """

    def __init__(self, folder: Path | None, *, tensorboard: bool = False, steps: int = 0, epochs: int = 0) -> None:
        self._steps = self._epochs = self._events = None
        if folder is None:
            return
        writer = _summary_writer() if tensorboard else None  # a missing package is found before a file is touched
        self._steps = _Table(folder / "steps.csv", STEP_COLUMNS, done=steps)
        self._epochs = _Table(folder / "epochs.csv", EPOCH_COLUMNS, done=epochs)
        if writer is not None:
            self._events = _Events(folder / "tensorboard", writer, done=steps)

    def step(self, step: int, *, loss: float, lr: float, images_per_second: float) -> None:
        """Write down how training does; every so often, for the loss has to be read from the device for it.

        Args:
            step: Steps done, over all epochs.
            loss: Training loss.
            lr: Learning rate.
            images_per_second: Speed of the training.
        """
        row = {"step": step, "loss": loss, "lr": lr, "images_per_second": images_per_second}
        if self._steps is not None:
            self._steps.add(row)
        if self._events is not None:
            self._events.add("step", step, row)

    def epoch(self, step: int, record: Epoch, scores: Scores | None) -> None:
        """Write down what an epoch came to.

        Args:
            step: Steps done, over all epochs.
            record: Of the epoch.
            scores: On the validation data, if there are any.
        """
        row = {**asdict(record), "teacher_accuracy": scores.teacher_accuracy if scores else None, "step": step}
        if self._epochs is not None:
            self._epochs.add(row)
        if self._events is not None:
            self._events.add("epoch", step, row)
            self._events.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._events is None:
            return
        try:
            self._events.close()
        except OutputError as unwritten:
            if error is None:
                raise
            log.warning("%s", unwritten)  # what ended the run matters more


class _Table:
    """A CSV file that grows row by row. In between it is closed, so nothing waits in memory for a kill.

    Args:
        path: The file. Its first column counts upwards.
        columns: Its header.
        done: The last count whose row stays.
    """

    def __init__(self, path: Path, columns: Sequence[str], done: int) -> None:
        self._path, self._columns = path, columns
        with _reported(path):
            kept = [row for row in _whole_rows(path) if _count(row.get(columns[0])) <= done]
        with (
            atomic_file(path, sole_writer=True) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; ``None`` leaves its place empty."""
        with _reported(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)


class _Events:
    """TensorBoard's events, with every error of theirs told as one of the disk.

    Args:
        folder: Where they go. Events of steps after ``done``, of a run before, are marked as void.
        writer: torch's ``SummaryWriter``.
        done: Steps that stay.
    """

    def __init__(self, folder: Path, writer: Any, done: int) -> None:
        self._folder = folder
        with _reported(folder):
            self._writer = writer(str(folder), purge_step=done + 1, flush_secs=30)

    def add(self, group: str, step: int, row: Mapping[str, Any]) -> None:
        with _reported(self._folder):
            for name, value in row.items():
                if value is not None and name not in ("step", "epoch"):
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def flush(self) -> None:
        with _reported(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with _reported(self._folder):
            self._writer.close()


def _summary_writer() -> Any:
    require("tensorboard", extra="tensorboard")  # torch's module would not name the extra
    return require("torch.utils.tensorboard", extra="tensorboard").SummaryWriter


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file that a kill or a full disk may have torn anywhere."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [row for row in csv.DictReader(lines) if None not in row and None not in row.values()]


def _count(cell: str | None) -> float:
    """The number in a cell, or infinity: what cannot be read is of no step that stays."""
    return int(cell) if cell is not None and cell.isdecimal() else float("inf")


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """Turn an operating-system error into one that says what was being written and what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"path={str(path)!r} cannot be written: {error.strerror or error}. What was logged before is kept; "
            "free some space or name a folder that you may write to."
        ) from error


def expected_seconds(
    seconds_per_step: float, steps: int, *, seconds_per_validation: float = 0.0, validations: int = 0
) -> float:
    """How long a run will take, from what its first steps took.

    Args:
        seconds_per_step: Reading the batch included.
        steps: That are left.
        seconds_per_validation: Of one pass over the validation data.
        validations: That are left.

    Example:
        >>> expected_seconds(0.5, 1000, seconds_per_validation=20.0, validations=10)
        700.0
    """
    return seconds_per_step * steps + seconds_per_validation * validations


def expected_line(seconds: float, epochs: int, steps_per_epoch: int) -> str:
    """The expected time of a run in one line, for a log.

    Args:
        seconds: Of the whole.
        epochs: That are left.
        steps_per_epoch: Of each.

    Example:
        >>> expected_line(7790.0, 30, 352)
        'about 2 h 10 min: 30 epochs of 352 steps'
        >>> expected_line(0.2, 1, 1)
        'about 1 s: 1 epoch of 1 step'
    """
    epochs_told = f"{epochs} epoch{'s' * (epochs != 1)}"
    return f"about {_duration(seconds)}: {epochs_told} of {steps_per_epoch} step{'s' * (steps_per_epoch != 1)}"


def _duration(seconds: float) -> str:
    """A length of time in its two largest units, rounded."""
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
