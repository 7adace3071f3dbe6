"""A sweep over many models: what is left to do, in which order, and keeping what is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import StrEnum
from pathlib import Path

from rich.progress import Progress

from benchmarks.coverage.case import run_case, survey
from benchmarks.coverage.checks import CHECKS
from benchmarks.coverage.processes import Limits, in_process
from benchmarks.coverage.rows import CONVERTED, LISTED, NO_CONVOLUTION, Key, Row, append_row, read_rows


class Onnx(StrEnum):
    """Which models are exported: none, the smallest of each family, all."""

    none = "none"
    family = "family"
    all = "all"


class Sweep:
    """A sweep with what is done so far.

    Args:
        file: Where the rows are kept.
        made: What they are made by; told with every row.
        limits: What one model may use.
    """

    def __init__(self, file: Path, made: dict[str, str], limits: Limits) -> None:
        self.file, self.made, self.limits = file, made, limits
        self.rows = {key: row for key, (row, _) in read_rows(file).items()}

    def survey(self, listed_rows: Iterable[Row], bar: Progress) -> None:
        """Find out how large the models are, and which hold convolutions."""
        unknown = [row for row in listed_rows if row.key not in self.rows]
        for row in _shown(unknown, bar, "survey"):
            self._keep(in_process(survey, row, self.limits))

    def run(self, keys: set[Key], onnx: Onnx, *, retry: bool, bar: Progress) -> None:
        """Do what is left of the models, the smallest of every family first, then the smallest first."""
        due = [row for key, row in self.rows.items() if key in keys and row.status != NO_CONVOLUTION]
        due = _in_order(row for row in due if self._is_left(row, onnx, retry))
        counts: Counter[str] = Counter()
        for row in _shown(due, bar, "convert"):
            if not self._is_left(row, onnx, retry):
                continue  # a smaller one of its family has been exported meanwhile
            exported = self._wants_onnx(row, onnx) or "onnx" in row.outcomes
            checks = [name for name in CHECKS if exported or name != "onnx"]
            fresh = Row(row.library, row.name, row.family, row.task, params=row.params)
            done = in_process(run_case, fresh, self.limits, checks=checks)
            self._keep(done)
            counts[done.status] += 1
            counts["with a failed check"] += done.status == CONVERTED and bool(done.failures())
            bar.console.print(f"{done.library}:{done.name} {done.status} {done.seconds:.1f} s {done.failures() or ''}")
        bar.console.print(dict(counts))

    def _is_left(self, row: Row, onnx: Onnx, retry: bool) -> bool:
        return row.status == LISTED or (retry and bool(row.failures())) or self._wants_onnx(row, onnx)

    def _wants_onnx(self, row: Row, onnx: Onnx) -> bool:
        if onnx == Onnx.none or "onnx" in row.outcomes or row.status not in (LISTED, CONVERTED):
            return False
        family = [other for other in self.rows.values() if (other.library, other.family) == (row.library, row.family)]
        return onnx == Onnx.all or not any("onnx" in other.outcomes for other in family)

    def _keep(self, row: Row) -> None:
        self.rows[row.key] = row
        append_row(self.file, row, self.made)


def _in_order(rows: Iterable[Row]) -> list[Row]:
    """By size; the smallest of every family come before all others, so that a part of a sweep tells of each."""
    by_size = sorted(rows, key=lambda row: row.params)
    smallest = {(row.library, row.family): row.key for row in reversed(by_size)}
    return sorted(by_size, key=lambda row: smallest[row.library, row.family] != row.key)


def _shown(rows: list[Row], bar: Progress, what: str) -> Iterator[Row]:
    """The rows, one after the other, with a bar that says how far they are."""
    shown = bar.add_task(what, total=len(rows))
    for row in rows:
        bar.update(shown, description=f"{what} {row.library}:{row.name}", refresh=True)
        yield row
        bar.advance(shown)
