"""The GhostNet family against timm's, the published counts, and plain convolutions by hand."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import ghostify
from ghostify._torchvision import import_torchvision
from ghostify.errors import MissingExtraError, OptionError
from ghostify.nn import GhostConv2d
from ghostify.nn.ghostnet import (
    GhostBottleneck,
    GhostModule,
    fold,
    from_official,
    ghostnet,
    ghostnet_v2,
    ghostnet_v3,
)
from ghostify.tracing import count_macs

BUILDERS = {"ghostnet": ghostnet, "ghostnetv2": ghostnet_v2, "ghostnetv3": ghostnet_v3}
# timm's name: parameters and MACs at 224². Those of GhostNet and GhostNetV2 are the published ones (2.6M/42M,
# 5.2M/141M, 7.3M/226M; 6.1M/167M, 8.9M/269M, 12.3M/399M); GhostNetV3's are those of the network in training.
COUNTS = {
    "ghostnet_050": (2_587_292, 42_328_152),
    "ghostnet_100": (5_182_508, 141_150_512),
    "ghostnet_130": (7_358_820, 227_003_256),
    "ghostnetv2_100": (6_156_908, 167_048_288),
    "ghostnetv2_130": (8_960_404, 269_322_976),
    "ghostnetv2_160": (12_392_698, 398_607_224),
    "ghostnetv3_050": (3_395_384, 117_528_000),
    "ghostnetv3_100": (8_129_028, 404_128_320),
    "ghostnetv3_130": (12_217_720, 654_842_824),
    "ghostnetv3_160": (17_275_700, 971_574_612),
}
NAMES = list(COUNTS)
V3 = [name for name in NAMES if "v3" in name]
FAMILY = [ghostnet, ghostnet_v2, ghostnet_v3]


def build(name, **options):
    family, width = name.split("_")
    return BUILDERS[family](int(width) / 100, **options)


def randomised(model, x):
    """Norms whose every number matters, about the statistics of a run, so that maps neither grow nor vanish."""
    torch.manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        for norm in norms:
            norm.momentum = 0.1
            norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn(norm.num_features)
            norm.running_var *= 0.5 + torch.rand(norm.num_features)
            # A channel that hardly varies would be blown up, and the next images' rounding with it.
            norm.running_var += 0.05 * norm.running_var.mean()
    return model


def images(batch=4, side=64, dtype=torch.float32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1)).to(dtype)


def params(model):
    return sum(parameter.numel() for parameter in model.parameters())


def layers(model):
    return {name: str(module) for name, module in model.named_modules() if not list(module.children())}


@pytest.fixture(scope="module")
def timm():
    """timm, which is imported behind torchvision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import_torchvision()
        except MissingExtraError:
            pytest.skip("torchvision is not installed, and timm needs it")
        return pytest.importorskip("timm", reason="timm is not installed")


def narrow_ones(names):
    """Those of other widths are slow tests."""
    narrow = ("ghostnet_050", "ghostnetv2_100", "ghostnetv3_050")
    return [name if name in narrow else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", narrow_ones(NAMES))
def test_keys_and_outputs_are_timms(timm, name):
    """In double precision, so that a norm over few values does not blow rounding up."""
    theirs = randomised(timm.create_model(name, drop_rate=0.0), images()).double()
    ours = build(name, dropout=0.0).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = images(dtype=torch.float64)
    with torch.no_grad():
        for training in (False, True):
            expected, scores = theirs.train(training)(x), ours.train(training)(x)
            assert expected.std(dim=0).mean() > 1e-3, "outputs that hardly depend on the image prove nothing"
            torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    # The training run has moved the statistics of every norm, also of those in a branch.
    torch.testing.assert_close(dict(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", narrow_ones(V3))
def test_folding_is_timms(timm, name):
    theirs = randomised(timm.create_model(name), images()).eval().double()
    ours = build(name).eval().double()
    ours.load_state_dict(theirs.state_dict())
    theirs.convert_to_deploy()
    folded = ours.fold()
    torch.testing.assert_close(dict(folded.state_dict()), dict(theirs.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_counts(name):
    model = build(name).eval()
    macs = count_macs(model, torch.zeros(1, 3, 224, 224)).macs
    assert (params(model), macs) == COUNTS[name]


@pytest.mark.parametrize(
    ("name", "published"),
    [("ghostnet_050", (2.587, 42.3)), ("ghostnet_100", (5.183, 141.2)), ("ghostnet_130", (7.359, 227.0))],
)
def test_counts_are_the_published(name, published):
    assert (round(COUNTS[name][0] / 1e6, 3), round(COUNTS[name][1] / 1e6, 1)) == published


@pytest.mark.parametrize("width", [1.0, 1.3, 1.6])
def test_folded_v3_costs_what_v2_costs(width):
    x = torch.zeros(1, 3, 224, 224)
    macs = count_macs(ghostnet_v3(width, folded=True).eval(), x).macs
    assert macs == COUNTS[f"ghostnetv2_{round(width * 100)}"][1]


def test_the_networks_of_other_tasks():
    model = ghostnet(0.5, num_classes=7, in_channels=1, dropout=0.0).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.dropout.p == 0


# --- the modules on their own


def normed(x, norm):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


@pytest.mark.parametrize(("ratio", "n", "kernel", "stride", "dw_size"), [(2, 12, 1, 1, 3), (3, 10, 3, 2, 5)])
@pytest.mark.parametrize("relu", [True, False])
def test_ghost_module_by_hand(ratio, n, kernel, stride, dw_size, relu):
    module = randomised(
        GhostModule(6, n, kernel, stride, ratio=ratio, dw_size=dw_size, relu=relu), torch.randn(8, 6, 9, 8)
    ).eval()
    (conv, norm, _), (cheap, cheap_norm, _) = module.primary_conv, module.cheap_operation
    activate = torch.relu if relu else (lambda x: x)
    x = torch.randn(2, 6, 9, 8)
    primary = activate(normed(F.conv2d(x, conv.weight, stride=stride, padding=kernel // 2), norm))
    m = -(-n // ratio)
    ghosts = [
        F.conv2d(primary[:, [i // (ratio - 1)]], cheap.weight[[i]], padding=dw_size // 2)
        for i in range(m * (ratio - 1))
    ]
    expected = torch.cat([primary, activate(normed(torch.cat(ghosts, 1), cheap_norm))], 1)[:, :n]
    assert primary.shape[1] == m
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_a_gate_from_half_the_size():
    module = randomised(GhostModule(4, 6, attention=True), torch.randn(8, 4, 6, 10)).eval()
    plain = GhostModule(4, 6).eval()
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if "short_conv" not in key})
    x = torch.randn(2, 4, 6, 10)
    point, norm, rows, rows_norm, columns, columns_norm = module.short_conv
    gate = normed(F.conv2d(F.avg_pool2d(x, 2), point.weight), norm)
    gate = normed(F.conv2d(gate, rows.weight, padding=(0, 2), groups=6), rows_norm)
    gate = normed(F.conv2d(gate, columns.weight, padding=(2, 0), groups=6), columns_norm).sigmoid()
    expected = plain(x) * gate.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "branched", "folded"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("se_ratio", "attention"), [(0, False), (0.25, True)])
def test_bottleneck_shapes(form, stride, se_ratio, attention):
    block = GhostBottleneck(8, 24, 12, 5, stride, se_ratio=se_ratio, attention=attention, form=form)
    assert block(torch.randn(2, 8, 11, 14)).shape == (2, 12, -(-11 // stride), -(-14 // stride))


def test_a_bottleneck_of_one_shape_passes_its_input_on():
    block = GhostBottleneck(8, 24, 8).eval()
    nn.init.zeros_(block.ghost2.primary_conv[1].weight)
    nn.init.zeros_(block.ghost2.cheap_operation[1].weight)
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(block(x), x)


# --- folding


@pytest.mark.parametrize("width", [0.5, 1.3])
def test_fold_keeps_the_outputs_and_the_model(width):
    model = randomised(ghostnet_v3(width, num_classes=10), images()).eval()
    before = copy.deepcopy(model.state_dict())
    x = images()
    with torch.no_grad():
        expected, folded = model(x), model.fold()
        # Random weights of many norms blow single precision up; in double the two are equal.
        torch.testing.assert_close(folded(x), expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(
            copy.deepcopy(model).double().fold()(x.double()), model.double()(x.double()), rtol=1e-10, atol=1e-10
        )
    model.float()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fresh = ghostnet_v3(width, num_classes=10, folded=True).eval()
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert layers(fresh) == layers(folded)
    assert fresh(x).equal(folded(x))
    assert not any("rpr" in name for name, _ in folded.named_modules())


@pytest.mark.parametrize(
    "block",
    [
        GhostModule(6, 10, 3, 2, ratio=3, dw_size=5, form="branched"),
        GhostModule(6, 10, attention=True, form="branched"),
        GhostBottleneck(6, 12, 8, 5, 3, se_ratio=0.25, form="branched"),
        nn.Sequential(GhostBottleneck(6, 12, 6, form="branched"), nn.Conv2d(6, 6, 1)),
    ],
    ids=["module", "attention", "bottleneck", "held by another"],
)
def test_fold_of_blocks(block):
    block = randomised(block, torch.randn(8, 6, 9, 9)).eval().double()
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(fold(block)(x), block(x), rtol=1e-10, atol=1e-10)


def test_fold_keeps_type_mode_and_frozen_weights():
    block = GhostBottleneck(6, 12, 8, stride=2, form="branched").bfloat16().requires_grad_(False)
    folded = fold(block)
    assert folded.training
    assert {(p.dtype, p.requires_grad) for p in folded.parameters()} == {(torch.bfloat16, False)}


def test_there_must_be_something_to_fold():
    for model in (ghostnet(0.5), ghostnet_v3(0.5, folded=True)):
        with pytest.raises(OptionError, match=r"model=GhostNet has no block of form='branched'"):
            model.fold()


def test_a_converted_branch_is_refused():
    block = nn.Sequential(GhostBottleneck(6, 12, 8, form="branched"))
    block[0].ghost2.primary_rpr_conv[1].conv = GhostConv2d(12, 4, 1)
    with pytest.raises(OptionError, match=r"0\.ghost2 has a branch of GhostConv2d and BatchNorm2d.*Fold .* first"):
        fold(block)


# --- what any network must do


@pytest.mark.parametrize("make", FAMILY)
def test_traced_copied_stored_and_trained(make):
    model = randomised(make(0.5, num_classes=5), images()).eval()
    x = images()
    expected = model(x)
    traced = fx.symbolic_trace(model)
    for side in (64, 96):
        torch.testing.assert_close(traced(images(side=side)), model(images(side=side)))
    again = make(0.5, num_classes=5).eval()
    again.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), again):
        assert twin(x).equal(expected)
    F.cross_entropy(model.train()(x), torch.tensor([0, 1, 2, 3])).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def export(model, path, x):
    pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")
    ghostify.export_onnx(randomised(model, x).eval(), path / "m.onnx", example_inputs=x[:1])  # raises unless they agree


@pytest.mark.parametrize("form", ["plain", "branched"])
def test_export_of_a_bottleneck(tmp_path, form):
    block = GhostBottleneck(8, 24, 12, stride=2, se_ratio=0.25, attention=True, form=form)
    export(block if form == "plain" else fold(block), tmp_path, torch.randn(4, 8, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [ghostnet(0.5), ghostnet_v2(0.5), ghostnet_v3(0.5, folded=True)], ids=["v1", "v2", "v3"]
)
def test_export_of_a_network(tmp_path, model):
    export(model, tmp_path, images())


@pytest.mark.parametrize("make", FAMILY)
def test_by_name_and_planned(make):
    model = ghostify.load_model(f"ghostify.nn.ghostnet:{make.__name__}", width=0.5, in_channels=1)
    assert ghostify.zoo.input_shape(model) == (1, 224, 224)
    plan = ghostify.plan(model, example_inputs=torch.zeros(1, 1, 64, 64))
    assert plan.trace_way == "fx"
    assert plan.replaced


@pytest.mark.parametrize("make", FAMILY)
def test_official_keys(make):
    """The authors' code names a branch's norm `bn`; an operation counter has left its tallies in some of the files."""
    model = make(0.5)
    official = {}
    for key, value in model.state_dict().items():
        branch = "_rpr_conv." in key or "_rpr_scale." in key
        official[key.replace(".bn1.", ".bn.") if branch else key] = value
        official[f"{key.rpartition('.')[0]}.total_ops"] = torch.zeros(1)
    assert ("blocks.0.0.ghost1.cheap_rpr_scale.bn.weight" in official) == (make is ghostnet_v3)
    model.load_state_dict(from_official(official), strict=True)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ghostnet(0), r"width=0 in GhostNet .* Pass"),
        (lambda: ghostnet_v2(float("nan")), "width=nan"),
        (lambda: ghostnet_v3("1.0"), "width='1.0'"),
        (lambda: ghostnet(num_classes=0), r"num_classes=0 in GhostNet .* Pass, for example, num_classes=1"),
        (lambda: ghostnet(in_channels=3.0), "in_channels=3.0"),
        (lambda: ghostnet(dropout=1.0), "dropout=1.0"),
        (lambda: GhostModule(4, 8, 2), r"kernel_size=2 in GhostModule is not an odd number"),
        (lambda: GhostModule(4, 8, dw_size=4), "dw_size=4"),
        (lambda: GhostModule(4, 8, ratio=1), r"ratio=1 .* at least 2"),
        (lambda: GhostModule(4, 8, form="fused"), r"form='fused' .* plain, branched, folded"),
        (lambda: GhostBottleneck(4, 8, 4, stride=0), "stride=0 in GhostBottleneck"),
        (lambda: GhostBottleneck(4, 8, 4, se_ratio=4), "se_ratio=4"),
    ],
)
def test_bad_options(make, told):
    with pytest.raises(OptionError, match=told):
        make()
