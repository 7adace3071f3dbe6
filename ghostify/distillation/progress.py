"""Showing how far a run is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from ghostify.distillation.history import Epoch, Scores


@contextmanager
def progress_bar(shown: bool | None, epochs: int, steps: int) -> Iterator[Callable[..., Any] | None]:
    """A bar on the error stream, for as long as the context is open.

    Args:
        shown: ``None`` shows it on a terminal only.
        epochs: Of the run.
        steps: Of the run.

    Yields:
        A function that takes ``completed`` (steps), ``epoch``, ``loss``, ``rate`` (images per second)
        and ``val``; or ``None`` where nothing is shown, so that nothing need be read from the device for it.
    """
    console = Console(stderr=True, force_terminal=True if shown else None)
    if shown is False or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn(f"epoch {{task.fields[epoch]}}/{epochs}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rate]:,.0f} images/s"),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[val]}", table_column=Column(overflow="ellipsis", no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=console, refresh_per_second=4, expand=True) as progress:
        task = progress.add_task("distil", total=steps, epoch=1, rate=0.0, loss=float("nan"), val="")
        yield partial(progress.update, task)


def scores_line(scores: Scores | None) -> str:
    """Validation scores in a few words.

    Example:
        >>> scores_line(Scores(loss=0.2, agreement=0.95, accuracy=0.9, teacher_accuracy=0.917))
        'val 90.0 %, teacher 91.7 %'
        >>> scores_line(Scores(loss=0.2, agreement=0.95, accuracy=None, teacher_accuracy=None))
        'val agrees with the teacher on 95.0 %'
        >>> scores_line(Scores(loss=0.2, agreement=None, accuracy=None, teacher_accuracy=None))
        'val loss 0.2000'
    """
    if scores is None:
        return ""
    if scores.accuracy is None and scores.agreement is None:
        return f"val loss {scores.loss:.4f}"
    if scores.accuracy is None or scores.teacher_accuracy is None:
        return f"val agrees with the teacher on {scores.agreement:.1%}".replace("%", " %")
    return f"val {scores.accuracy:.1%}, teacher {scores.teacher_accuracy:.1%}".replace("%", " %")


def epoch_line(record: Epoch, epochs: int, scores: Scores | None) -> str:
    """One epoch in one line, for a log."""
    speed = f"{record.images_per_second:,.0f} images/s, {record.seconds:.1f} s"
    line = f"epoch {record.epoch}/{epochs}: loss {record.loss:.4f}, {speed}"
    return f"{line}, {scores_line(scores)}" if scores else line
