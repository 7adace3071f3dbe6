"""Rows of figures in a JSON file, and a page that shows them between two markers."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import ghostify
from benchmarks.hardware import processor
from ghostify.files import atomic_file

Row = dict[str, Any]


def measured_on(threads: int) -> str:
    """What figures depend on beside the command."""
    made = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    version = f"commit {made.stdout.strip()}" if made.returncode == 0 else ghostify.__version__
    about = f"ghostify {version}, torch {torch.__version__}, {processor()}"
    return f"{about}, {threads} thread{'s' * (threads > 1)}"


def read_rows(file: Path) -> list[Row]:
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.is_file() else []


def add_rows(file: Path, rows: list[Row], key: Sequence[str]) -> None:
    """Add rows, and keep the file in the order of their keys."""
    ordered = sorted([*read_rows(file), *rows], key=lambda row: [row[name] for name in key])
    lines = ",\n".join(json.dumps(row) for row in ordered)
    with atomic_file(file) as temporary:
        temporary.write_text(f'{{"rows": [\n{lines}\n]}}\n', encoding="utf-8")


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


def show(page: Path, name: str, headers: Sequence[str], lines: list[list[str]], rows: list[Row]) -> None:
    """Put a table, and what its rows were measured on, between the markers of a benchmark."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    head, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not found or not ended:
        raise SystemExit(f"{page} lacks the lines {begin} and {end}, between which the table belongs")
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    about = "; ".join(dict.fromkeys(part for row in rows for part in row["on"].split("; ")))
    with atomic_file(page) as temporary:
        temporary.write_text(f"{head}{begin}\n\n{table}\n\n{about}\n\n{end}{after}", encoding="utf-8")
    print(table)


@contextmanager
def drawing(file: Path, panels: int, size: tuple[float, float]) -> Iterator[list[Any]]:
    """Panels beside each other to draw on, stored as an SVG that is the same for the same rows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ghostify"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(size[0] * panels, size[1]), squeeze=False)
    yield list(axes[0])
    figure.tight_layout()
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def options_of(description: str | None, networks: Sequence[str], shared: Path) -> argparse.ArgumentParser:
    """The options that the benchmarks of trained networks have in common."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=networks, default=networks[0])
    parser.add_argument("--images", type=int, default=512, help="images to start from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", default=str(shared), help="folder of cifar10/, weights/ and imagenet-sample/")
    parser.add_argument("--imagenet", default=".", help="folder of the unpacked packages with weights for ImageNet")
    parser.add_argument("--report-only", action="store_true", help="run nothing, write the page")
    return parser
