"""Counts of the published tables that a rule explains, and planned counts against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ghostify
from ghostify import GhostSpec
from ghostify.nn.cifar import resnet56, vgg16
from ghostify.planning.cost import ghost_macs, ghost_params

IMAGE = torch.zeros(1, 3, 32, 32)


def torchvision_model(name):
    return ghostify.load_model(f"torchvision:{name}").eval()


@pytest.mark.parametrize(
    ("ratio", "dw_size", "params", "macs"),
    [
        (2, 3, 7.650, 157.8),
        (3, 3, 5.218, 107.0),
        (4, 3, 3.982, 80.2),
        (5, 3, 3.270, 65.4),
        (2, 1, 7.634, 156.7),
        (2, 5, 7.684, 160.1),
        (2, 7, 7.735, 163.4),
    ],
)
def test_vgg16(ratio, dw_size, params, macs):
    """All 13 convolutions, the first too; params with both linear layers, MACs of the convolutions.

    The published units compute ``m·s - n`` maps that they throw away where s does not divide n; ours do
    not, so they are added here. Counted by the cost model, because no plan would make the first
    layer larger, as d=7 does.
    """
    spec = GhostSpec(ratio, dw_size)
    sites = [decision.site for decision in ghostify.plan(vgg16(), example_inputs=IMAGE)]
    assert len(sites) == 13
    thrown = [(spec.intrinsic_channels(site.out_channels) * ratio - site.out_channels) * dw_size**2 for site in sites]
    pixels = [site.calls[0].output_shape[1] * site.calls[0].output_shape[2] for site in sites]
    counted_params = sum(parameter.numel() for parameter in vgg16().parameters()) - sum(site.params for site in sites)
    counted_params += sum(ghost_params(site, spec) for site in sites) + sum(thrown)
    counted_macs = sum(ghost_macs(site, spec) for site in sites)
    counted_macs += sum(maps * size for maps, size in zip(thrown, pixels, strict=True))
    assert round(counted_params / 1e6, 3) == params
    assert round(counted_macs / 1e6, 1) == macs


@pytest.mark.parametrize(("spec", "macs"), [(GhostSpec(2), 157.8), (GhostSpec(4), 80.2), (GhostSpec(2, 5), 160.1)])
def test_vgg16_as_a_plan_with_the_first_layer_named(spec, macs):
    plan = ghostify.plan(vgg16(), spec=spec, overrides={"features.0": spec}, example_inputs=IMAGE)
    assert len(plan.replaced) == 13
    assert round(sum(decision.macs_after for decision in plan) / 1e6, 1) == macs
    assert plan.macs - sum(decision.macs_before for decision in plan) == 512 * 512 + 512 * 10


def test_vgg16_with_7x7_would_make_the_first_layer_larger_and_keeps_it():
    spec = GhostSpec(2, 7)
    first = next(iter(ghostify.plan(vgg16(), spec=spec, overrides={"features.0": spec}, example_inputs=IMAGE)))
    assert first.reason == "too small to pay: 1,728 parameters would become 2,432"


@pytest.mark.parametrize(
    ("spec", "overrides", "macs"),
    [
        (GhostSpec(2), {}, 65.3),
        (GhostSpec(2), {"conv1": 2}, 65.1),
        (GhostSpec(2, 1), {"conv1": GhostSpec(2, 1)}, 63.0),
    ],
)
def test_resnet56(spec, overrides, macs):
    """Params of convolutions and the linear layer, without norms; 63.0M MACs are reached only at d=1."""
    plan = ghostify.plan(resnet56(), spec=spec, overrides=overrides, example_inputs=IMAGE)
    if spec.dw_size == 3:
        assert round((sum(decision.params_after for decision in plan) + 650) / 1e6, 3) == 0.434
    assert round(plan.macs_after / 1e6, 1) == macs


@pytest.mark.parametrize(("ratio", "params", "macs"), [(2, 13.954, 2.151), (4, 8.152, 1.182)])
def test_resnet50(ratio, params, macs):
    plan = ghostify.plan(torchvision_model("resnet50"), ratio=ratio, example_inputs=torch.zeros(1, 3, 224, 224))
    assert round(plan.params_after / 1e6, 3) == params
    assert round(plan.macs_after / 1e9, 3) == macs


@pytest.mark.parametrize(
    ("name", "gains"),
    [
        ("resnet18", {2: (1.91, 1.86), 4: (3.49, 3.28)}),
        ("mobilenet_v2", {2: (1.41, 1.63), 4: (1.77, 2.37)}),
        ("vgg16_bn", {2: (1.06, 1.96), 4: (1.09, 3.78)}),
        ("densenet121", {2: (1.74, 1.88), 4: (2.75, 3.38)}),
        ("efficientnet_b0", {2: (1.51, 1.65), 4: (2.03, 2.43)}),
    ],
)
def test_gains(name, gains):
    model = torchvision_model(name)
    for ratio, (params, macs) in gains.items():
        plan = ghostify.plan(model, ratio=ratio, example_inputs=torch.zeros(1, 3, 224, 224))
        assert round(plan.params / plan.params_after, 2) == params
        assert round(plan.macs / plan.macs_after, 2) == macs


def counted(model, x):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "mobilenet_v2", "vgg16_bn", "densenet121", "efficientnet_b0", "vgg16", "resnet56"]
)
def test_planned_counts_are_the_real_ones(name):
    own = {"vgg16": vgg16, "resnet56": resnet56}
    model = own[name]().eval() if name in own else torchvision_model(name)
    x = torch.zeros(1, 3, 32 if name in own else 64, 32 if name in own else 64)
    small = ghostify.convert(model, ratio=2, example_inputs=x, initialiser="first")
    assert sum(isinstance(module, ghostify.GhostConv2d) for module in small.modules()) > 5
    plan = small.ghostify_plan
    assert (plan.macs, plan.macs_after) == (counted(model, x), counted(small, x))
    assert plan.params == sum(parameter.numel() for parameter in model.parameters())
    assert plan.params_after == sum(parameter.numel() for parameter in small.parameters())
