"""How ghostify does on every model of torchvision, and of timm that holds a convolution.

    python -m benchmarks.coverage --seconds 300 --onnx family    # all of it, as docs/coverage.md was made
    python -m benchmarks.coverage --library torchvision --onnx all
    python -m benchmarks.coverage --only 'resnet*' --only convnext_atto
    python -m benchmarks.coverage --report-only

First every model is surveyed (how large, any convolution?), then each is planned, converted and checked; the smallest
of every family come first. Rows are kept at once in a file, and the same command goes on where it stopped. Needs the
extras models and onnx.
"""

from __future__ import annotations

import os
import subprocess
import warnings
from contextlib import suppress
from datetime import date
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import ghostify
from benchmarks.coverage.models import listed
from benchmarks.coverage.page import page
from benchmarks.coverage.processes import Limits
from benchmarks.coverage.rows import LISTED, document, read_rows
from benchmarks.coverage.sweep import Onnx, Sweep
from benchmarks.hardware import processor
from ghostify._torchvision import import_torchvision
from ghostify.files import atomic_file

ROOT = Path(__file__).parents[2]
COMMAND = "`python -m benchmarks.coverage --seconds 300 --onnx family`"


class Library(StrEnum):
    """Where the models come from."""

    torchvision = "torchvision"
    timm = "timm"
    all = "all"


def maker() -> dict[str, str]:
    """What makes the rows: versions, hardware, day."""
    torchvision = import_torchvision()
    import timm

    packages = {"ghostify": ghostify, "torch": torch, "torchvision": torchvision, "timm": timm}
    versions = {name: package.__version__ for name, package in packages.items()}
    with suppress(OSError, subprocess.CalledProcessError):  # not a checkout
        tree = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD:ghostify"], cwd=ROOT, capture_output=True, check=True
        )
        versions["ghostify"] += f" (tree {tree.stdout.decode().strip()})"
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "hardware": f"{processor()}, no GPU",
        "date": date.today().isoformat(),
    }


def write_report(file: Path, page_file: Path, json_file: Path) -> None:
    """The page and the JSON file from the rows."""
    known = read_rows(file)
    rows = [row for _, (row, _) in sorted(known.items())]
    facts = {"command": COMMAND}
    for name in ("versions", "hardware", "date"):
        facts[name] = "; ".join(sorted({made[name] for row, made in known.values() if row.status != LISTED}))
    for path, text in ((page_file, page(rows, facts)), (json_file, document(rows, facts))):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(rows)} models; {page_file} and {json_file} are written")


def main(
    library: Annotated[Library, typer.Option(help="whose models")] = Library.all,
    only: Annotated[list[str] | None, typer.Option(help="name or pattern, such as 'resnet*'; repeatable")] = None,
    onnx: Annotated[Onnx, typer.Option(help="which models to export; family: its smallest one")] = Onnx.none,
    seconds: Annotated[float, typer.Option(min=1, help="limit for one model")] = 120,
    memory_gib: Annotated[float, typer.Option(min=1, help="limit for one model")] = 10,
    threads: Annotated[int, typer.Option(min=1, help="of torch")] = 1,
    retry: Annotated[bool, typer.Option("--retry", help="do again what failed")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="write the page from the rows, run nothing")
    ] = False,
    rows: Annotated[Path, typer.Option(help="where the rows are kept")] = Path("coverage.jsonl"),
    page_file: Annotated[Path, typer.Option("--page")] = ROOT / "docs/coverage.md",
    json_file: Annotated[Path, typer.Option("--json")] = ROOT / "docs/coverage.json",
) -> None:
    """Sweep over the models of torchvision and timm, and write docs/coverage.md and docs/coverage.json."""
    warnings.simplefilter("ignore")
    if not report_only:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        libraries = ("torchvision", "timm") if library == Library.all else (library.value,)
        patterns = only or ["*"]
        chosen = [
            row
            for name in libraries
            for row in listed(name)
            if any(fnmatchcase(row.name, pattern) for pattern in patterns)
        ]
        sweep = Sweep(rows, maker(), Limits(seconds, memory_gib, threads))
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        # No refreshing from a thread of its own: processes are forked from this one.
        bar = Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True), auto_refresh=False)
        with bar:
            sweep.survey(chosen, bar)
            sweep.run({row.key for row in chosen}, onnx, retry=retry, bar=bar)
    write_report(rows, page_file, json_file)


if __name__ == "__main__":
    typer.run(main)
