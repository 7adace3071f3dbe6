"""The folded form of a Ghost unit makes the same maps, from convolutions and one concatenation alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ghostify.nn.folded import FoldedGhost, can_fold, folded
from ghostify.nn.ghost import GhostConv, GhostConv2d
from ghostify.spec import GhostSpec

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def randomised(module):
    for norm in module.modules():
        if isinstance(norm, tuple(NORMS.values())):
            nn.init.uniform_(norm.running_mean, -1, 1)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            if norm.affine:
                nn.init.uniform_(norm.weight, -2, 2)
                nn.init.uniform_(norm.bias, -1, 1)
    return module.eval()


@settings(deadline=None, max_examples=60)
@given(
    ratio=st.floats(1, 6),
    side=st.sampled_from([1, 3, 5]),
    fusion=st.sampled_from(["concat", "add"]),
    dims=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    with_norm=st.booleans(),
    n=st.integers(1, 13),
    seed=st.integers(0, 99),
)
def test_it_makes_the_same_maps(ratio, side, fusion, dims, bias, with_norm, n, seed):
    torch.manual_seed(seed)
    conv = CONVOLUTIONS[dims](3, n, 3, stride=2, padding=1, bias=bias).double()
    unit = GhostConv.from_conv(conv, GhostSpec(ratio, side, fusion), layout=torch.randperm(n)).eval()
    norm = randomised(NORMS[dims](n).double()) if with_norm else None
    x = torch.randn(2, 3, *(7,) * dims, dtype=torch.float64)
    wanted = unit(x) if norm is None else norm(unit(x))
    before = copy.deepcopy(unit.state_dict())
    small = folded(unit, norm)
    assert torch.allclose(small(x), wanted, atol=1e-9)
    assert all(torch.equal(value, unit.state_dict()[name]) for name, value in before.items())
    # Every convolution but the primary has one map a channel: the form that runtimes are fast at.
    for module in small.modules():
        if isinstance(module, CONVOLUTIONS[dims]) and module.in_channels != 3:
            assert module.groups == module.in_channels == module.out_channels


def test_branches_with_norms_of_their_own_take_them_in():
    conv, norm = nn.Conv2d(4, 10, 3, bias=False), randomised(nn.BatchNorm2d(10))
    unit = GhostConv.from_conv(conv, GhostSpec(3, placement="paper"), norm=norm, activation=nn.ReLU()).eval()
    x = torch.randn(2, 4, 8, 8)
    small = folded(unit)
    assert torch.allclose(small(x), unit(x), atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert isinstance(small.activation, nn.ReLU)


def test_no_map_is_sliced_where_some_parents_have_one_ghost_more():
    unit = GhostConv2d(4, 8, 3, spec=GhostSpec(1.5)).eval()
    small = folded(unit, randomised(nn.BatchNorm2d(8)))
    assert [conv.out_channels for conv in small.primary] == [2, 4]
    graph = torch.fx.symbolic_trace(small).graph
    assert {str(node.target).split(".")[0] for node in graph.nodes if node.op == "call_module"} == {
        "primary",
        "intrinsic",
        "cheap",
    }
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [torch.cat]


@pytest.mark.parametrize(
    ("conv", "spec"),
    [
        (nn.Conv2d(4, 8, 3), GhostSpec(2, fusion="mul")),
        (nn.Conv2d(4, 8, 3, groups=2), GhostSpec(2)),
        (nn.ConvTranspose2d(4, 8, 3), GhostSpec(2)),
    ],
)
def test_some_units_have_no_folded_form(conv, spec):
    assert not can_fold(GhostConv.from_conv(conv, spec))


def test_it_stays_in_evaluation_mode_and_can_be_copied():
    small = folded(GhostConv2d(4, 8, 3, spec=GhostSpec(2)).eval())
    x = torch.randn(1, 4, 6, 6)
    assert not small.training
    assert torch.equal(copy.deepcopy(small)(x), small(x))
    assert isinstance(small, FoldedGhost)
