"""MACs against an independent counter, on ten networks."""

import logging

import pytest
import torch

import ghostify
from ghostify.tracing import count_macs

NETWORKS = {
    "resnet18": {},
    "mobilenet_v2": {},
    "densenet121": {},
    "vgg11": {},
    "squeezenet1_1": {},
    "shufflenet_v2_x0_5": {},
    "mnasnet0_5": {},
    "regnet_y_400mf": {},
    "googlenet": {"init_weights": False},
    "efficientnet_b0": {},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fvcore_counts_the_same(name):
    torchvision = pytest.importorskip("ghostify._torchvision").import_torchvision()
    fvcore = pytest.importorskip("fvcore.nn")
    model = torchvision.models.get_model(name, weights=None, **NETWORKS[name]).eval()
    x = torch.randn(1, 3, 96, 96)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    by_operator = fvcore.FlopCountAnalysis(model, x).by_operator()
    macs = by_operator["conv"] + by_operator["linear"]
    assert count_macs(model, x).macs == macs
    assert ghostify.plan(model, example_inputs=x).macs == macs
