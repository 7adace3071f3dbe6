"""The command, run in the test's own process, and what it can be run on."""

import functools
import sys

import pytest
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry

from ghostify.cli import main
from ghostify.conversion import convert
from ghostify.deployment import save
from ghostify.nn.cifar import CifarResNet

NET = "from ghostify.nn.cifar import CifarResNet\ndef net():\n    return CifarResNet(1, in_channels=1)\n"
DATA = """
import torch
from ghostify.distillation import Splits
def images():
    batches = [(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    return Splits(train=batches, val=batches, load_test=lambda: batches, name="images")
"""


@pytest.fixture(scope="session", autouse=True)
def operators_read_once():
    """torch reads the sources of all its ONNX operators at every export, which takes most of a small network's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """Run the command in this process: status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(sys, "argv", ["ghostify", *map(str, arguments)])
        monkeypatch.setattr("warnings.showwarning", None)  # given back afterwards
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return call


@pytest.fixture
def student(tmp_path):
    """Beside the command a network ``nets.py:net``, data ``pictures:images``, and a converted network ``small``."""
    (tmp_path / "nets.py").write_text(NET)
    (tmp_path / "pictures.py").write_text(DATA)
    return save(
        convert(CifarResNet(1, in_channels=1), ratio=2, example_inputs=torch.zeros(1, 1, 8, 8)), tmp_path / "small"
    )
