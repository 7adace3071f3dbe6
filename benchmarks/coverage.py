"""How ghostify does on every model of torchvision and timm that holds a convolution.

    python benchmarks/coverage.py --library torchvision --onnx none
    python benchmarks/coverage.py --models 'resnet*' 'convnext_atto' --onnx family

Every model is built with random weights, planned, converted, checked, and written to the table, in
a process of its own with a limit of time and of memory; what ends a process early is a line of the
table. Each line is kept at once in a file beside the output (`coverage.jsonl`), and a second run
goes on where the first stopped. Lines of another version of ghostify, torch, torchvision or timm,
or of other settings, are made anew. Needs the extras models and onnx.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shlex
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from coverage_case import run_case
from coverage_page import Row, page
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import ghostify
from ghostify._torchvision import import_torchvision
from ghostify.files import atomic_file

# The parent computes nothing with torch and starts no thread, so a fork of it is a clean and cheap start.
PROCESSES = multiprocessing.get_context("fork")
POLL_SECONDS = 0.05
TASKS = {"segmentation": "segmentation", "detection": "detection", "video": "video", "optical_flow": "optical flow"}


@dataclass(frozen=True)
class Task:
    """One model to do.

    Attributes:
        row: Names it.
        onnx: Whether it is exported too.
    """

    row: Row
    onnx: bool


@dataclass
class Running:
    """A process at work on a task.

    Attributes:
        task: The task.
        process: The process.
        reports: Where its rows come from, one before each stage.
        began: When it was started, in seconds of the monotonic clock.
        row: The last that it reported.
    """

    task: Task
    process: Any
    reports: Connection
    began: float
    row: Row


def listed(library: str) -> list[Row]:
    """A row for every model of a library, by name, with nothing filled in yet."""
    torchvision = import_torchvision()
    if library == "timm":
        import timm

        homes = timm.models._registry._model_to_module
        return [Row("timm", name, homes[name], "classification") for name in timm.list_models()]
    rows = []
    for name in torchvision.models.list_models():
        *_, package, family = torchvision.models.get_model_builder(name).__module__.split(".")
        rows.append(Row("torchvision", name, family, TASKS.get(package, "classification")))
    return rows


def work(task: Task, reports: Connection, options: dict[str, Any], case: Callable[..., Row]) -> None:
    """What the process of one model does: silently, and telling every stage."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.backends.mha.set_fastpath_enabled(False)  # no counter sees into it
    case(task.row, onnx=task.onnx, report=lambda row: reports.send(asdict(row)), **options)


def results(
    tasks: Iterable[Task],
    *,
    jobs: int = 1,
    seconds: float = 180,
    memory_gib: float = 6,
    options: dict[str, Any] | None = None,
    case: Callable[..., Row] = run_case,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Task, Row]]:
    """Do the tasks, so many at a time; a row for each, whatever becomes of its process.

    Args:
        tasks: What to do.
        jobs: Processes at a time.
        seconds: Limit for one.
        memory_gib: Limit of its resident memory, which is looked at twenty times a second (Linux only).
        options: For ``case``.
        case: What a process does.
        waiting: Called now and then.
    """
    queue = iter(tasks)
    at_work: list[Running] = []
    try:
        while True:
            while len(at_work) < jobs and (task := next(queue, None)) is not None:
                reports, sender = PROCESSES.Pipe(duplex=False)
                process = PROCESSES.Process(target=work, args=(task, sender, options or {}, case), daemon=True)
                process.start()
                sender.close()
                at_work.append(Running(task, process, reports, time.monotonic(), task.row))
            if not at_work:
                return
            waiting()
            multiprocessing.connection.wait([running.process.sentinel for running in at_work], POLL_SECONDS)
            for running in list(at_work):
                if (row := _ended(running, seconds, memory_gib)) is not None:
                    at_work.remove(running)
                    yield running.task, row
    finally:
        for running in at_work:
            running.process.kill()
            running.process.join()


def _ended(running: Running, seconds: float, memory_gib: float) -> Row | None:
    """The row of a process that has ended, or that is ended here because it is over a limit."""
    alive = running.process.is_alive()  # before reading, so that nothing is sent after it
    with suppress(EOFError):
        while running.reports.poll():
            running.row = Row(**running.reports.recv())
    if running.row.stage == "done":
        cause = ""
    elif alive and time.monotonic() - running.began > seconds:
        cause = f"timeout: over {seconds:g} s"
    elif alive and _resident_gib(running.process.pid) > memory_gib:
        cause = f"memory: over {memory_gib:g} GiB"
    elif alive:
        return None
    else:
        status = running.process.exitcode
        cause = f"crash: {signal.Signals(-status).name if status < 0 else f'exit status {status}'}"
    running.process.kill()
    running.process.join()
    running.reports.close()
    if cause:
        running.row.end_early(cause)
        running.row.seconds = round(time.monotonic() - running.began, 2)
    return running.row


def _resident_gib(pid: int) -> float:
    """Resident memory of a process; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def read_rows(file: Path, stamp: str) -> dict[tuple[str, str], tuple[Row, bool]]:
    """Rows that are done, with whether their model was exported; the last of a model counts."""
    done: dict[tuple[str, str], tuple[Row, bool]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):  # half a line, where a sweep was killed
            record = json.loads(line)
            if record["stamp"] == stamp:
                row = Row(**record["row"])
                done[row.library, row.name] = row, record["onnx"]
    return done


def left_to_do(
    rows: Iterable[Row], done: dict[tuple[str, str], tuple[Row, bool]], *, onnx: bool, retry_failed: bool
) -> list[Task]:
    """The tasks that are not done, not done with ONNX where that is wanted, or failed and to be tried again."""
    tasks = []
    for row in rows:
        found, exported = done.get((row.library, row.name), (None, False))
        lacks_onnx = onnx and not exported and (found is None or found.status == "converted")
        if found is None or lacks_onnx or (retry_failed and found.failures()):
            tasks.append(Task(row, onnx or exported))
    return tasks


def smallest_of_families(rows: Iterable[Row], done: dict[tuple[str, str], tuple[Row, bool]]) -> list[Row]:
    """The smallest converted model of each family, as new rows."""
    smallest: dict[tuple[str, str], Row] = {}
    for row in rows:
        found, _ = done.get((row.library, row.name), (None, False))
        if found is None or found.status != "converted" or not found.values:
            continue
        known = smallest.get((row.library, row.family))
        if known is None or found.params < known.params:
            smallest[row.library, row.family] = found
    return [Row(row.library, row.name, row.family, row.task) for row in smallest.values()]


def families_first(rows: Iterable[Row]) -> list[Row]:
    """One model of every family, then a second one of each, so that a sweep that is stopped has seen all."""
    seen: Counter[tuple[str, str]] = Counter()
    rounds = []
    for row in rows:
        seen[row.library, row.family] += 1
        rounds.append((seen[row.library, row.family], row))
    return [row for _, row in sorted(rounds, key=lambda pair: pair[0])]


def versions() -> dict[str, str]:
    torchvision = import_torchvision()
    import timm

    packages = {"ghostify": ghostify, "torch": torch, "torchvision": torchvision, "timm": timm}
    return {name: package.__version__ for name, package in packages.items()}


def hardware() -> str:
    """The processor's name and what is used of it."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, one thread a model"


def sweep(tasks: list[Task], file: Path, stamp: str, console: Console, **limits: Any) -> None:
    """Do the tasks, and append every row to a file as soon as it is there."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    file.parent.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    # No refreshing from a thread of its own: processes are forked from this one.
    bar = Progress(*columns, TextColumn("{task.description}"), console=console, auto_refresh=False, transient=True)
    bar.disable = not console.is_terminal
    with bar, file.open("a", encoding="utf-8") as lines:
        shown = bar.add_task("", total=len(tasks))
        for task, row in results(tasks, waiting=bar.refresh, **limits):
            record = {"stamp": stamp, "onnx": task.onnx, "row": asdict(row)}
            print(json.dumps(record, ensure_ascii=False), file=lines, flush=True)
            counts[row.status] += 1
            counts["checks failed"] += row.status == "converted" and bool(row.failures())
            text = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
            bar.update(shown, advance=1, description=f"{text}; last {row.library}:{row.name}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("torchvision", "timm", "all"), default="all")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", default=["*"], help="names, as in 'resnet*'")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=180, help="limit for one model")
    parser.add_argument("--memory-gib", type=float, default=6, help="limit for one model")
    parser.add_argument("--values-below", type=float, default=60e6, help="parameters; larger ones go to meta")
    parser.add_argument("--onnx", choices=("none", "family", "all"), default="none", help="family: its smallest model")
    parser.add_argument("--retry-failed", action="store_true", help="do again what failed")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    for ending in (signal.SIGINT, signal.SIGTERM):  # nohup leaves the first ignored
        signal.signal(ending, signal.default_int_handler)
    warnings.simplefilter("ignore")
    known = versions()
    settings = {"values_below": options.values_below}
    stamp = hashlib.sha256(json.dumps([known, settings], sort_keys=True).encode()).hexdigest()[:12]
    file = options.out.with_suffix(".jsonl")
    libraries = ("torchvision", "timm") if options.library == "all" else (options.library,)
    rows = families_first(
        row
        for library in libraries
        for row in listed(library)
        if any(fnmatchcase(row.name, pattern) for pattern in options.models)
    )
    limits = {
        "jobs": options.jobs,
        "seconds": options.seconds,
        "memory_gib": options.memory_gib,
        "options": settings,
    }
    try:
        tasks = left_to_do(rows, read_rows(file, stamp), onnx=options.onnx == "all", retry_failed=options.retry_failed)
        sweep(tasks, file, stamp, Console(stderr=True), **limits)
        if options.onnx == "family":
            done = read_rows(file, stamp)
            tasks = left_to_do(smallest_of_families(rows, done), done, onnx=True, retry_failed=False)
            sweep(tasks, file, stamp, Console(stderr=True), **limits)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
    finished = sorted((row for row, _ in read_rows(file, stamp).values()), key=lambda row: (row.library, row.name))
    facts = {
        "command": f"`{shlex.join(['python', 'benchmarks/coverage.py', *sys.argv[1:]])}`",
        "versions": ", ".join(f"{name} {version}" for name, version in known.items()),
        "hardware": hardware(),
        "date": date.today().isoformat(),
        "limits": f"{options.seconds:g} s and {options.memory_gib:g} GiB a model",
    }
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in finished)  # a line a model, to search in
    for path, text in (
        (options.out, f'{{"facts": {json.dumps(facts, ensure_ascii=False)},\n"rows": [\n{lines}\n]}}\n'),
        (options.page, page(finished, facts)),
    ):
        with atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(f"{len(finished)} models; {options.out} and {options.page} are written")


if __name__ == "__main__":
    main()
