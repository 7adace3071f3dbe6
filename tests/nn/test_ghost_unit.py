"""The Ghost unit against the convolution that it replaces, for any options of either."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ghostify import GhostSpec
from ghostify.errors import OptionError
from ghostify.nn import GhostConv, GhostConv1d, GhostConv2d, GhostConv3d
from ghostify.nn.layout import natural_layout, position_parents
from ghostify.planning.cost import ghost_macs, ghost_params
from ghostify.tracing import count_macs, trace

KINDS = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@st.composite
def convolutions(draw, dims=(2, 2, 2, 1, 3)):
    """Any convolution; a transposed one cannot pad by a rule."""
    dims, transposed = draw(st.sampled_from(dims)), draw(st.sampled_from([False, False, True]))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    same = not transposed and draw(st.booleans())
    options = {
        "stride": 1 if same else draw(st.integers(1, 2)),
        "padding": "same" if same else draw(st.tuples(*[st.integers(0, 2)] * dims)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["output_padding"] = draw(st.integers(0, max(options["stride"], options["dilation"]) - 1))
    else:
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    return KINDS[dims][transposed](
        groups * draw(st.integers(1, 4)),
        groups * draw(st.integers(1, 7)),
        draw(st.tuples(*[st.integers(1, 4)] * dims)),
        **options,
    )


def maps_for(conv, batch=2):
    return torch.randn(batch, conv.in_channels, *(9, 8, 7)[: len(conv.kernel_size)])


specs = st.builds(
    GhostSpec,
    st.one_of(st.integers(1, 6), st.floats(1, 6)),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(["concat", "add", "mul"]),
    st.sampled_from(["linear", "paper"]),
)


@settings(deadline=None, max_examples=150)
@given(conv=convolutions(), spec=specs)
def test_shape_cost_state_and_gradients(conv, spec):
    n, norm = conv.out_channels, NORMS[len(conv.kernel_size)]
    unit = GhostConv.from_conv(conv, spec, norm=norm(n), activation=nn.ReLU())
    x = maps_for(conv)
    made, wanted = unit(x), conv(x)
    assert made.shape == wanted.shape
    assert made.dtype == wanted.dtype
    made.square().sum().backward()
    assert all(parameter.grad is not None for parameter in unit.parameters())
    plain = GhostConv.from_conv(conv, GhostSpec(spec.ratio, spec.dw_size, spec.fusion))
    site = trace(nn.Sequential(conv), x).sites[0]
    assert ghost_params(site, plain.spec) == sum(parameter.numel() for parameter in plain.parameters())
    assert ghost_macs(site, plain.spec) == count_macs(plain, x).macs
    again = GhostConv.from_conv(conv, spec, norm=norm(n), activation=nn.ReLU())
    again.load_state_dict(unit.state_dict())
    assert torch.equal(again.eval()(x), unit.eval()(x))


@settings(deadline=None, max_examples=60)
@given(conv=convolutions(), spec=specs, seed=st.integers(0, 99))
def test_intrinsic_channels_are_the_originals_in_their_places(conv, spec, seed):
    spec = GhostSpec(spec.ratio, spec.dw_size, "mul" if spec.fusion == "mul" else "concat")
    n = conv.out_channels
    layout = natural_layout(spec, n, conv.groups)
    if conv.groups == 1:
        layout = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    unit = GhostConv.from_conv(conv, spec, layout=layout)
    rows = layout[: unit.intrinsic_channels]
    x = maps_for(conv)
    assert torch.allclose(unit(x)[:, rows], conv(x)[:, rows], atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(conv=convolutions())
def test_ratio_1_is_the_original(conv):
    x = maps_for(conv)
    assert torch.equal(GhostConv.from_conv(conv, GhostSpec(1))(x), conv(x))


@settings(deadline=None, max_examples=30)
@given(conv=convolutions(), ratio=st.floats(1, 6), seed=st.integers(0, 99))
def test_a_gate_starts_as_the_identity(conv, ratio, seed):
    """Every channel is its parent's primary map, so whole sets of equal channels come out."""
    spec, n = GhostSpec(ratio, fusion="mul"), conv.out_channels
    layout = natural_layout(spec, n, conv.groups)
    if conv.groups == 1:
        layout = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    unit = GhostConv.from_conv(conv, spec, layout=layout)
    x = maps_for(conv)
    parents = layout[position_parents(spec, n, conv.groups)]
    assert torch.allclose(unit(x)[:, layout], conv(x)[:, parents], atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(conv=convolutions(dims=[2]), spec=specs, seed=st.integers(0, 99))
def test_the_unit_computes_the_papers_formula(conv, spec, seed):
    """Written out channel by channel: primary map H, cheap maps G on it, met as concat, H + G or H · G."""
    spec, n = GhostSpec(spec.ratio, spec.dw_size, spec.fusion), conv.out_channels
    layout = natural_layout(spec, n, conv.groups)
    if conv.groups == 1:
        layout = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    unit = GhostConv.from_conv(conv, spec, layout=layout)
    x = maps_for(conv, 1)
    made, primary = unit(x), unit.primary_conv(x)
    if unit.cheap_operation is None:
        return
    bias = [part.bias for part in unit.cheap_operation]
    bias = None if bias[0] is None else torch.cat(bias)
    kernels, parents = unit.cheap_operation.kernels(), unit.parents()
    ghosts = F.conv2d(primary[:, parents], kernels[:, None], bias, padding=spec.dw_size // 2, groups=len(parents))
    stands_on = primary[:, position_parents(spec, n, conv.groups)]
    wanted = {
        "concat": lambda: torch.cat([primary, ghosts], 1),
        "add": lambda: stands_on + ghosts,
        "mul": lambda: stands_on * ghosts,
    }[spec.fusion]()
    assert torch.allclose(made[:, layout], wanted, atol=1e-5)


@pytest.mark.parametrize("fusion", ["concat", "add", "mul"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_type_memory_format_and_single_maps_are_the_convolutions(fusion, dtype):
    conv = nn.Conv2d(4, 7, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
    unit = GhostConv.from_conv(conv, GhostSpec(1.5, fusion=fusion), layout=torch.tensor([6, 1, 2, 3, 4, 5, 0]))
    x = torch.randn(2, 4, 6, 6, dtype=dtype)
    assert {parameter.dtype for parameter in unit.parameters()} == {dtype}
    assert unit.primary_conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert unit(x).dtype == dtype
    assert unit(x[0]).shape == conv(x[0]).shape
    assert torch.allclose(unit(x[0]), unit(x)[0], atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "conv"), [(GhostConv1d, nn.Conv1d), (GhostConv2d, nn.Conv2d), (GhostConv3d, nn.Conv3d)]
)
@pytest.mark.parametrize("placement", ["linear", "paper"])
def test_a_unit_made_by_hand_has_the_convolutions_signature(kind, conv, placement):
    options = {"stride": 2, "padding": 1, "groups": 2, "bias": False, "padding_mode": "circular"}
    unit = kind(4, 10, 3, **options, spec=GhostSpec(2, placement=placement))
    assert type(GhostConv.from_conv(conv(4, 10, 3, **options), GhostSpec(2))) is kind
    assert unit(maps_for(unit)).shape == conv(4, 10, 3, **options)(maps_for(unit)).shape


def test_the_original_is_copied_never_shared():
    conv = nn.Conv2d(3, 6, 3)
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    unit = GhostConv.from_conv(conv, GhostSpec(1))
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
    assert conv.out_channels == 6
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def test_a_frozen_convolution_gives_a_frozen_primary():
    conv = nn.Conv2d(3, 6, 3)
    conv.weight.requires_grad_(False)
    unit = GhostConv.from_conv(conv, GhostSpec(2))
    assert not unit.primary_conv.weight.requires_grad
    assert unit.primary_conv.bias.requires_grad


def test_a_state_without_an_order_loads_into_a_unit_with_one_and_back():
    conv, spec = nn.Conv2d(3, 6, 3), GhostSpec(2)
    ordered = GhostConv.from_conv(conv, spec, layout=torch.tensor([5, 3, 1, 0, 2, 4]))
    natural = GhostConv.from_conv(conv, spec)
    x = torch.randn(1, 3, 5, 5)
    before = ordered(x)
    copy = GhostConv.from_conv(conv, spec)
    copy.load_state_dict(ordered.state_dict())
    assert torch.equal(copy(x), before)
    copy.load_state_dict(natural.state_dict())
    assert torch.equal(copy(x), natural(x))


def test_a_subclass_keeps_its_own_forward():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, self.bias, self.stride)

    conv = Standardised(3, 6, 2)
    unit = GhostConv.from_conv(conv, GhostSpec(2))
    x = torch.randn(1, 3, 5, 5)
    assert torch.allclose(unit(x)[:, :3], conv(x)[:, :3], atol=1e-6)


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": "2"}, {"ratio": float("nan")}, {"ratio": True}])
def test_bad_ratios(options):
    with pytest.raises(OptionError, match="ratio="):
        GhostSpec(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"dw_size": 4}, "dw_size=4"), ({"fusion": "sum"}, "fusion='sum'"), ({"placement": "x"}, "placement='x'")],
)
def test_other_bad_options(options, told):
    with pytest.raises(OptionError, match=told):
        GhostSpec(**options)
