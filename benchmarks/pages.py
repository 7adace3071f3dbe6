"""Rows of figures in a JSON file, and a page that shows them between two markers."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ghostify
from benchmarks.hardware import processor
from ghostify.files import atomic_file

Row = dict[str, Any]


def facts_of_this_machine(threads: int) -> dict[str, str]:
    """What figures depend on beside the command."""
    return {
        "ghostify": ghostify.__version__,
        "torch": str(torch.__version__),
        "hardware": f"{processor()}, {threads} thread{'s' * (threads > 1)}",
    }


def read_rows(file: Path) -> list[Row]:
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def add_rows(file: Path, rows: list[Row], key: Sequence[str], facts: dict[str, str]) -> None:
    """Add rows, and keep the file in the order of their keys."""
    ordered = sorted([*read_rows(file), *rows], key=lambda row: [row[name] for name in key])
    lines = ",\n".join(json.dumps(row) for row in ordered)
    with atomic_file(file) as temporary:
        temporary.write_text(f'{{"facts": {json.dumps(facts)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")


def is_there(file: Path, case: Row) -> bool:
    """Whether the file holds a row of this case."""
    return any(all(row[name] == value for name, value in case.items()) for row in read_rows(file))


def grouped(rows: list[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that agree in the named columns."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def told(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation, where there are several."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def show(page: Path, name: str, table: str, rows: Path) -> None:
    """Put a table and what it was measured on between the markers of a benchmark."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    facts = json.loads(rows.read_text(encoding="utf-8"))["facts"]
    about = ", ".join(f"{fact} {value}" for fact, value in facts.items())
    head, _, rest = page.read_text(encoding="utf-8").partition(begin)
    with atomic_file(page) as temporary:
        temporary.write_text(f"{head}{begin}\n\n{table}\n\n{about}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")
    print(table)
