"""Folding for inference: the same outputs from fewer operations, for whatever follows a convolution."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghostify
from ghostify.errors import ConversionError, InputsError
from ghostify.nn.folded import FoldedGhost, folded

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def randomised(model):
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            module.weight.data.uniform_(-2, 2, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval()


class Block(nn.Module):
    """A residual block with one activation for everything, as in torchvision, or with a module for each, as in timm."""

    def __init__(self, shared):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.act1 = self.relu if shared else nn.ReLU6(inplace=True)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.relu(self.bn0(self.stem(x)))
        y = self.act1(self.bn1(self.conv1(x)))
        return self.head(self.relu(self.bn2(self.conv2(y)) + x))


class Odd(nn.Module):
    """Norms that cannot go into a convolution: read twice, called twice, and a layer norm's relative."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.twice, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)

    def forward(self, x):
        x = self.twice(self.a(x))
        y = self.b(x)
        return self.group(self.c(self.twice(y))) + y


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("fusion", ["concat", "add", "mul"])
@pytest.mark.parametrize("ratio", [1.5, 2, 3])
@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_a_converted_model_folds(shared, fusion, ratio, placement):
    model = randomised(Block(shared))
    spec = ghostify.GhostSpec(ratio, fusion=fusion, placement=placement)
    small = ghostify.convert(model, spec=spec, example_inputs=X).train()
    before = copy.deepcopy(small.state_dict())
    deployed = ghostify.fold(small, example_inputs=X)
    assert type(deployed) is Block
    assert not deployed.training
    assert small.training
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in before.items())
    torch.testing.assert_close(deployed(X), small.eval()(X), rtol=1e-4, atol=1e-4)
    assert isinstance(deployed.bn0, nn.Identity)  # in a convolution that was kept
    if fusion == "concat" and placement == "linear":
        assert isinstance(deployed.conv1, FoldedGhost)
        # An activation of its own goes into the unit with the norm; one that is shared is fused with the norm.
        assert isinstance(deployed.act1, nn.Identity) != shared
        assert isinstance(deployed.bn1, nn.Identity) != shared
        assert isinstance(deployed.bn2, nn.BatchNorm2d)  # an addition follows


def test_norms_that_others_read_stay():
    model = randomised(Odd())
    deployed = ghostify.fold(model, example_inputs=X)
    assert isinstance(deployed.twice, nn.BatchNorm2d)
    torch.testing.assert_close(deployed(X), model(X))


@pytest.mark.parametrize("kind", ["torchvision.ops.FrozenBatchNorm2d", "timm.layers.BatchNormAct2d"])
def test_norms_of_libraries_fold(kind):
    package, _, name = kind.rpartition(".")
    ghostify.load_model("torchvision:resnet18")  # makes the imports below work beside a CPU build of torch
    norm = getattr(pytest.importorskip(package), name)
    layers = [nn.Conv2d(3, 8, 3), norm(8), nn.Conv2d(8, 8, 3), norm(8), nn.Conv2d(8, 4, 1)]
    model = randomised(nn.Sequential(*layers))
    small = ghostify.convert(model, ratio=2, example_inputs=X)
    for one in (model, small):
        deployed = ghostify.fold(one, example_inputs=X)
        torch.testing.assert_close(deployed(X), one.eval()(X), rtol=1e-4, atol=1e-4)
        assert not any(isinstance(module, norm) for module in deployed.modules())


def test_what_is_looked_on_stays():
    model = randomised(Block(True))
    seen = []
    model.bn0.register_forward_hook(lambda *_: seen.append(1))
    deployed = ghostify.fold(model, example_inputs=X)
    assert isinstance(deployed.bn0, nn.BatchNorm2d)
    seen.clear()
    deployed(X)
    assert seen


def test_one_dimension_and_transposed_convolutions_fold():
    model = randomised(nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)))
    deployed = ghostify.fold(model, example_inputs=X)
    assert isinstance(deployed[1], nn.Identity)
    torch.testing.assert_close(deployed(X), model(X), rtol=1e-4, atol=1e-4)
    line = torch.randn(2, 3, 12)
    model = randomised(nn.Sequential(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(8, 2, 1)))
    small = ghostify.convert(model, ratio=2, example_inputs=line)
    torch.testing.assert_close(
        ghostify.fold(small, example_inputs=line)(line), small.eval()(line), rtol=1e-4, atol=1e-4
    )


def test_a_change_of_the_outputs_is_an_error(monkeypatch):
    from ghostify.backends import folding

    monkeypatch.setattr(folding, "fuse_conv_bn_eval", lambda conv, norm, transpose: copy.deepcopy(conv))
    with pytest.raises(ConversionError, match=r"gives other outputs.*fold=False"):
        ghostify.fold(randomised(Block(True)), example_inputs=X)


@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_one_unit_is_left_in_its_mode(placement):
    unit = ghostify.convert(
        randomised(Block(True)).train(), spec=ghostify.GhostSpec(2, placement=placement), example_inputs=X
    ).conv1
    modes = [module.training for module in unit.modules()]
    assert any(modes)
    folded(unit)
    assert [module.training for module in unit.modules()] == modes


def test_wrappers_of_torch_come_off():
    small = ghostify.convert(randomised(Block(True)), ratio=2, example_inputs=X)
    deployed = ghostify.fold(nn.DataParallel(small), example_inputs=X)
    assert type(deployed) is Block
    assert isinstance(deployed.conv1, FoldedGhost)


def test_a_layer_that_was_exchanged_since_is_no_trap():
    small = ghostify.convert(randomised(Block(True)), ratio=2, example_inputs=X)
    small.bn1 = nn.Sequential(small.bn1, nn.Identity())
    torch.testing.assert_close(ghostify.fold(small, example_inputs=X)(X), small(X), rtol=1e-4, atol=1e-4)


def test_bad_arguments_are_told():
    with pytest.raises(InputsError, match="example_inputs"):
        ghostify.fold(Block(True), example_inputs=None)


def test_a_folded_model_is_no_artefact(tmp_path):
    small = ghostify.convert(Block(True), ratio=2, example_inputs=X)
    with pytest.raises(ghostify.GhostifyError, match=r"folded for inference.*fold\(…\)"):
        ghostify.save(ghostify.fold(small, example_inputs=X), tmp_path / "small")


def test_a_functional_activation_keeps_its_norm():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(F.relu(self.bn(self.conv(self.stem(x)))))

    small = ghostify.convert(randomised(Functional()), ratio=2, example_inputs=X)
    deployed = ghostify.fold(small, example_inputs=X)
    assert isinstance(deployed.bn, nn.BatchNorm2d)
    torch.testing.assert_close(deployed(X), small.eval()(X), rtol=1e-4, atol=1e-4)
