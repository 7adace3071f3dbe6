"""The Ghost unit's corners: orders, groups, fusions at their start, units without a batch, tracing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ghostify import GhostConv2d, GhostSpec
from ghostify.nn.layout import natural_layout, position_parents
from ghostify.nn.selection import select_channels
from ghostify.planning.cost import ghost_macs, ghost_params
from ghostify.tracing import count_macs, trace

FUSIONS = ["concat", "add", "mul"]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 3),
    ratio=st.floats(1, 8),
    fusion=st.sampled_from(FUSIONS),
    options=st.fixed_dictionaries(
        {
            "kernel_size": st.sampled_from([1, 3, (1, 3), (2, 3)]),
            "stride": st.sampled_from([1, 2, (2, 1)]),
            "padding": st.sampled_from([0, 1, (1, 0), "valid"]),
            "dilation": st.sampled_from([1, 2, (1, 2)]),
            "bias": st.booleans(),
            "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        }
    ),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_constructor_makes_what_conv2d_makes(n, groups, ratio, fusion, options, dtype):
    spec = GhostSpec(ratio, fusion=fusion)
    conv = nn.Conv2d(2 * groups, n * groups, groups=groups, dtype=dtype, **options)
    unit = GhostConv2d(2 * groups, n * groups, groups=groups, dtype=dtype, spec=spec, **options)
    x = torch.randn(2, 2 * groups, 9, 8, dtype=dtype)
    assert unit(x).shape == conv(x).shape
    assert unit(x).dtype == conv(x).dtype
    site = trace(nn.Sequential(conv), x).sites[0]
    assert ghost_params(site, spec) == sum(parameter.numel() for parameter in unit.parameters())
    assert ghost_macs(site, spec) == count_macs(unit, x).macs
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(unit, name) == getattr(conv, name)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(2, 12), ratio=st.floats(1, 6), fusion=st.sampled_from(FUSIONS), seed=st.integers(0, 9))
def test_nothing_is_computed_and_thrown_away(n, ratio, fusion, seed):
    """Every number of every parameter moves the output, and every output channel is one of its own."""
    torch.manual_seed(seed)
    unit = GhostConv2d(2, n, 3, padding=1, spec=GhostSpec(ratio, fusion=fusion), dtype=torch.float64)
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    unit.set_order(torch.randperm(n))
    made = unit(torch.randn(1, 2, 5, 5, dtype=torch.float64))
    made.square().sum().backward()
    assert all((parameter.grad != 0).all() for parameter in unit.parameters())
    assert torch.unique(made.flatten(2)[0], dim=0).shape[0] == n


@settings(deadline=None, max_examples=60)
@given(per_group=st.integers(1, 9), groups=st.integers(1, 4), ratio=st.floats(1, 9), fusion=st.sampled_from(FUSIONS))
def test_layouts_are_permutations_with_an_even_load(per_group, groups, ratio, fusion):
    spec, n = GhostSpec(ratio, fusion=fusion), per_group * groups
    m = spec.intrinsic_channels(n, groups)
    layout = natural_layout(spec, n, groups)
    assert layout.sort().values.tolist() == list(range(n))
    load = torch.bincount(position_parents(spec, n, groups), minlength=m)
    assert load.sum() == n
    assert load.max() - load.min() <= 1
    assert load.tolist() == sorted(load.tolist(), reverse=True)  # the first ones carry more, so no gather is needed
    assert torch.equal(position_parents(spec, n, groups)[:m], torch.arange(m))
    # The primary is a grouped convolution, so its rows stay in the group whose inputs they read.
    assert torch.equal(layout[:m] // per_group, torch.arange(m) // (m // groups))
    if groups == 1:
        assert torch.equal(layout, torch.arange(n))


@pytest.mark.parametrize("ratio", [2, 4])
def test_ghosts_of_a_grouped_unit_stay_in_their_group(ratio):
    spec = GhostSpec(ratio)
    layout, parents = natural_layout(spec, 12, 3), position_parents(spec, 12, 3)
    assert torch.equal(layout // 4, layout[parents] // 4)


@pytest.mark.parametrize("ratio", [1.25, 2, 3])
@pytest.mark.parametrize("fusion", ["add", "mul"])
def test_fusions_that_start_as_the_identity_repeat_the_primary(fusion, ratio):
    conv, spec = nn.Conv2d(3, 10, 3), GhostSpec(ratio, fusion=fusion)
    unit = GhostConv2d.from_conv(conv, spec)
    if fusion == "add":
        unit.cheap_operation.assign(torch.zeros(10, 3, 3), torch.zeros(10))
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(unit(x), conv(x)[:, unit.parents()], atol=1e-6)


def test_ghosts_are_depthwise_maps_of_their_parents():
    unit = GhostConv2d(3, 7, 3, spec=GhostSpec(3), bias=False)
    x = torch.randn(1, 3, 6, 6)
    primary, kernels = unit.primary_conv(x), unit.cheap_operation.kernels()
    for ghost, (parent, kernel) in enumerate(zip(unit.parents().tolist(), kernels)):
        wanted = F.conv2d(primary[:, [parent]], kernel[None, None], padding=1)
        assert torch.allclose(unit(x)[:, [3 + ghost]], wanted, atol=1e-6)


def test_a_unit_takes_a_map_without_a_batch():
    for fusion in FUSIONS:
        unit = GhostConv2d(3, 7, 3, spec=GhostSpec(1.5, fusion=fusion))
        unit.set_order(torch.randperm(7))
        x = torch.randn(3, 6, 6)
        assert torch.allclose(unit(x), unit(x[None])[0], atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("n", [6, 7])
def test_a_unit_can_be_traced(fusion, n):
    unit = GhostConv2d(3, n, 3, spec=GhostSpec(1.5, fusion=fusion))
    x = torch.randn(1, 3, 6, 6)
    assert torch.equal(fx.symbolic_trace(unit)(x), unit(x))


def test_a_state_of_other_layers_leaves_the_order_alone():
    model = nn.Sequential(GhostConv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
    model[0].set_order(torch.tensor([3, 1, 0, 2]))
    model.load_state_dict({"1.bias": torch.ones(2)}, strict=False)
    assert model[0].layout().tolist() == [3, 1, 0, 2]


def test_an_order_is_part_of_copies_and_states():
    unit = GhostConv2d(3, 4, 3)
    unit.set_order(torch.tensor([3, 1, 0, 2]))
    x = torch.randn(1, 3, 5, 5)
    for again in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(again(x), unit(x))
    assert "channel_order" in unit.state_dict()
    unit.set_order(torch.arange(4))
    assert "channel_order" not in unit.state_dict()


def test_other_channels_can_be_taken_later():
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)
    unit = GhostConv2d.from_conv(conv, GhostSpec(2, placement="paper"), norm=norm, activation=nn.ReLU())
    layout = torch.tensor([5, 0, 3, 1, 2, 4])
    unit.take_channels(conv, layout, norm)
    assert torch.equal(unit.primary_conv.weight, conv.weight[[5, 0, 3]])
    assert torch.equal(unit.primary_norm.weight, norm.weight[[5, 0, 3]])
    assert torch.equal(unit.cheap_norm.weight, norm.weight[[1, 2, 4]])
    x = torch.randn(2, 3, 5, 5)
    unit.eval(), norm.eval()
    assert torch.allclose(unit(x)[:, [0, 3, 5]], norm(conv(x))[:, [0, 3, 5]], atol=1e-5)


def test_paper_placement_norms_each_branch_once_and_feeds_the_cheap_one_with_activated_maps():
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    unit = GhostConv2d.from_conv(conv, GhostSpec(2, placement="paper"), norm=norm, activation=nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    primary = unit.primary_norm(unit.primary_conv(x))
    assert torch.equal(unit(x)[:, :3], primary)
    assert torch.allclose(unit(x)[:, 3:], unit.cheap_norm(unit.cheap_operation(primary.relu())))
    assert sum(parameter.numel() for m in (unit.primary_norm, unit.cheap_norm) for parameter in m.parameters()) == 12


class SamePadded(nn.Conv2d):
    """TensorFlow's padding, which depends on the size of the input."""

    def forward(self, x):
        for axis in (0, 1):
            size, k, s = x.shape[2 + axis], self.kernel_size[axis], self.stride[axis]
            pad = max((-(-size // s) - 1) * s + k - size, 0)
            x = F.pad(
                x, ((0, 0) * (1 - axis)) + (pad // 2, pad - pad // 2) if axis else (0, 0, pad // 2, pad - pad // 2)
            )
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Gained(nn.Conv2d):
    """Standardised weights with a learnt gain for every output channel."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1))

    def forward(self, x):
        weight = self.gain * (self.weight - self.weight.mean((1, 2, 3), keepdim=True))
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("kind", [SamePadded, Gained])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_subclass_keeps_its_meaning_for_its_intrinsic_rows(kind, groups):
    conv = kind(4, 8, 3, stride=2, groups=groups)
    spec = GhostSpec(2)
    layout = natural_layout(spec, 8, groups) if groups > 1 else torch.randperm(8)
    unit = GhostConv2d.from_conv(conv, spec, layout=layout)
    assert type(unit.primary_conv) is kind
    x = torch.randn(2, 4, 7, 6)
    rows = layout[: unit.intrinsic_channels]
    assert unit(x).shape == conv(x).shape
    assert torch.allclose(unit(x)[:, rows], conv(x)[:, rows], atol=1e-6)
    site = trace(nn.Sequential(conv), x).sites[0]
    assert ghost_params(site, spec) == sum(parameter.numel() for parameter in unit.parameters())


def test_what_is_frozen_and_in_another_format_stays_so():
    conv = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last).requires_grad_(False).eval()
    primary = GhostConv2d.from_conv(conv, GhostSpec(2)).primary_conv
    assert not primary.weight.requires_grad
    assert primary.weight.is_contiguous(memory_format=torch.channels_last)
    assert not primary.training
    assert primary.weight.untyped_storage().nbytes() == conv.weight.untyped_storage().nbytes() // 2


def test_selecting_from_a_norm():
    norm = nn.BatchNorm2d(5)
    norm.running_mean.copy_(torch.arange(5))
    chosen = select_channels(norm, torch.tensor([4, 2]))
    assert chosen.num_features == 2
    assert chosen.running_mean.tolist() == [4, 2]
    assert norm.running_mean.tolist() == [0, 1, 2, 3, 4]
    assert chosen.num_batches_tracked is not norm.num_batches_tracked
