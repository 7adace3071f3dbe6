from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from deployment_nets import SmallNet, make_net
from torch import Tensor, nn

from ghostify.conversion import convert
from ghostify.deployment import save


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def base() -> SmallNet:
    """Another network of the same class: only its structure may matter."""
    return make_net(seed=99)


@pytest.fixture
def converted(images: Tensor) -> nn.Module:
    """Converted with channels reordered, and with statistics that are not the initial ones."""
    net = make_net()
    net(images)
    return convert(net, ratio=2, example_inputs=images, initialiser="weights").eval()


@pytest.fixture
def stored(converted: nn.Module, tmp_path: Path) -> Path:
    return save(converted, tmp_path / "artefact")


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stored model that nobody changes."""
    net = convert(make_net(), ratio=2, example_inputs=torch.zeros(1, 3, 12, 12), initialiser="weights")
    return save(net, tmp_path_factory.mktemp("intact") / "artefact")


@pytest.fixture(scope="module")
def scratch(intact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it for the tests to damage."""
    return Path(shutil.copytree(intact, tmp_path_factory.mktemp("scratch") / "artefact"))
