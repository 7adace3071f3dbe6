"""Stopping a run from outside, between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stop:
    """Whether a run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def error(self) -> BaseException:
        """What ends the program as the signal would have: as ``Ctrl-C``, or with the exit code that a shell gives."""
        return KeyboardInterrupt() if self.signal in (None, signal.SIGINT) else SystemExit(128 + int(self.signal or 0))


@contextmanager
def watched_signals(*, watch: bool, alone: bool) -> Iterator[Stop]:
    """Note SIGTERM and SIGINT instead of dying of them, so that there is time to write down the state.

    A second SIGTERM changes nothing: whoever is in a hurry sends SIGKILL. A second SIGINT, from an impatient
    hand, does what it always did, but not in one of several processes, each of which gets a signal twice:
    from the terminal and from its launcher. A signal that is ignored stays so, as SIGINT is where a script started the
    run in the background. Python lets only the main thread do this; elsewhere, and without ``watch``, signals are left
    alone.

    Args:
        watch: Whether there is anything to write.
        alone: Whether this is the only process of the run.

    Yields:
        What came.
    """
    stop = Stop()
    if not watch or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    found = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in found.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: Any) -> None:
        stop.signal = number
        if alone and number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])

    try:
        for number in before:
            signal.signal(number, note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
