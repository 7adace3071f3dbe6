"""Memory that every step of a training, or every run of a model, frees and asks for again stays with the process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Names of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The highest that glibc's own rule comes to on 64 bits, where a process that trains soon stands by itself.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = 32 << 20, 64 << 20
_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@contextmanager
def retained_memory(device: torch.device) -> Iterator[None]:
    """While it is open, glibc gives no freed memory back to the system; then it gives all of it back.

    The activations of a step or a run are freed in it, and the next asks for just as many. glibc returns such large
    blocks to the system, which then has to clear every page anew when it is touched; from which size on depends on all
    that the process did before, so that the same model takes another time in another process. Keeping them changes no
    result and does not raise the peak.

    Args:
        device: Of the work. Accelerators have allocators of their own, which keep memory anyway; so nothing is
            done there, nor with another C library, nor where the environment has settings for glibc's allocator.
    """
    chosen = any(name in os.environ for name in _SETTINGS)
    if device.type != "cpu" or chosen or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
        libc.malloc_trim(0)
