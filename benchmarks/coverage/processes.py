"""One process a model, with a limit of time and of memory; whatever becomes of it, there is a row."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.coverage.rows import Row

# The parent computes nothing with torch and starts no thread, so a fork of it is a clean and cheap start.
PROCESSES = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Limits:
    """What one model may use.

    Attributes:
        seconds: Time.
        memory_gib: Memory that it writes to; not enforced on macOS.
        threads: Threads of torch.
    """

    seconds: float = 120
    memory_gib: float = 10
    threads: int = 1


def in_process(work: Callable[..., None], row: Row, limits: Limits, **options: Any) -> Row:
    """Do the work on a row in a process of its own.

    Args:
        work: Fills the row in, and reports it with the stage that comes next; an empty stage is the end.
        row: Names the model.
        limits: What it may use.
        options: For the work.

    Returns:
        The row that was reported last. Where the process ended early, it says how and at which stage.
    """
    began = time.monotonic()
    row.stage = "start"
    reports, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_child, args=(work, row, sender, limits, options), daemon=True)
    process.start()
    sender.close()
    cause = ""
    try:
        while not cause:
            if not reports.poll(max(0.0, began + limits.seconds - time.monotonic())):
                cause = f"over {limits.seconds:g} s"
            else:
                row = reports.recv()
    except EOFError:  # the process has ended, or is about to
        process.join(timeout=10)
    finally:
        process.kill()
        process.join()
        reports.close()
    if row.stage:
        row.end_early(cause or _end(process.exitcode))
        row.seconds = round(time.monotonic() - began, 2)
    return row


def _end(status: int | None) -> str:
    if status is not None and status < 0:
        return f"crash: {signal.Signals(-status).name}"
    return f"crash: exit status {status}"


def _child(work: Callable[..., None], row: Row, sender: Connection, limits: Limits, options: dict[str, Any]) -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    if sys.platform != "darwin":
        size = int(limits.memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))  # not RLIMIT_AS: libraries map more than they use
    warnings.simplefilter("ignore")
    torch.set_num_threads(limits.threads)
    torch.backends.mha.set_fastpath_enabled(False)  # no counter sees into it
    work(row, sender.send, **options)
