import contextlib
import os
import platform
import subprocess
import sys

import pytest
import torch

from ghostify.backends import memory, runners
from ghostify.backends.memory import retained_memory

# Pages that the system has to clear for a large tensor. A process of its own: what an allocator does depends on all
# that was freed in it. Above 32 MiB glibc asks the system for every block, unless told otherwise. The least of some
# counts, as a small block in between may take its place from a large one.
FAULTS = """
import contextlib, resource, torch
from ghostify.backends.memory import retained_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(6)))
with contextlib.suppress(RuntimeError), retained_memory(torch.device("cpu")):
    print(min(faults() for _ in range(6)))
    raise RuntimeError("also after an error")
print(faults())
"""


def faults(**settings):
    """How many before, inside and after."""
    env = {name: value for name, value in os.environ.items() if name not in memory._SETTINGS} | settings
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_is_kept_while_it_is_open_and_no_longer():
    before, inside, after = faults()
    assert inside < before / 4
    assert after > before / 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_settings_of_the_environment_stand():
    before, inside, _ = faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert inside > before / 2


@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_what_is_timed_runs_with_memory_that_is_kept(monkeypatch, name):
    opened = []

    @contextlib.contextmanager
    def noted(device):
        opened.append(device.type)
        yield
        opened.append("closed")

    monkeypatch.setattr(runners, "retained_memory", noted)
    with runners.running(runners.Backend(name)):
        assert opened == ["cpu"]
    assert opened == ["cpu", "closed"]


def test_accelerators_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the allocator was asked"))
    with retained_memory(torch.device("cuda")):
        pass
