import platform
import resource

import pytest
import torch

from ghostify.distillation import memory
from ghostify.distillation.memory import retained_memory

# Above 32 MiB glibc asks the system for every block, unless told otherwise.
NUMBERS = 10 * 2**20

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")


def faults():
    """Pages that the system had to clear for one large tensor, once there was such a one before."""
    torch.ones(NUMBERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(NUMBERS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.fixture(autouse=True)
def without_settings(monkeypatch):
    for name in memory._SETTINGS:
        monkeypatch.delenv(name, raising=False)


@glibc_only
def test_memory_is_kept_while_it_is_open_and_no_longer():
    outside = faults()
    with retained_memory(torch.device("cpu")):
        inside = faults()
    assert inside < outside / 4
    assert faults() > outside / 2


@glibc_only
@pytest.mark.parametrize("name", memory._SETTINGS)
def test_settings_of_the_environment_stand(monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.check=0")
    with retained_memory(torch.device("cpu")):
        assert faults() > 100


@glibc_only
def test_memory_is_given_back_after_an_error():
    with pytest.raises(RuntimeError, match="stopped"), retained_memory(torch.device("cpu")):
        raise RuntimeError("stopped")
    assert faults() > 100


def test_accelerators_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("the allocator was asked"))
    with retained_memory(torch.device("cuda")):
        pass
