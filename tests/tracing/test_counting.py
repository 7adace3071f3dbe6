"""Counts against numbers worked out by hand and published ones."""

import pytest
import torch
from torch import nn

from ghostify.errors import InputsError
from ghostify.nn.cifar import resnet20
from ghostify.tracing import count_macs, count_params, state_bytes, trace


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(3, 2, 3, bias=False), (1, 3, 224, 224), 2_661_336),
        (nn.Conv2d(3, 2, 3, bias=True), (1, 3, 224, 224), 2_661_336),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), (1, 8, 10, 10), 8 * 9 * 100),
        (nn.Conv2d(4, 6, 3, stride=2, dilation=2, groups=2), (3, 4, 15, 15), 6 * 2 * 9 * 6 * 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(7, 5), (4, 7), 35),
        (nn.Linear(7, 5, bias=False), (4, 9, 7), 9 * 35),
        (resnet20(), (1, 3, 32, 32), 40_551_040),
        (resnet20(), (3, 3, 32, 32), 40_551_040),
    ],
)
def test_macs_of_one_example(model, shape, macs):
    count = count_macs(model, torch.randn(shape))
    assert count.macs == macs
    assert count.flops == 2 * macs
    assert count.outside == {}


def test_attention_products_are_listed_and_the_projections_counted():
    width, length = 16, 5
    layer = nn.TransformerEncoderLayer(width, 2, dim_feedforward=32, batch_first=True)
    enabled = torch.backends.mha.get_fastpath_enabled()
    count = count_macs(layer, torch.randn(2, length, width))
    assert count.macs == length * (4 * width * width + 2 * width * 32)
    assert sum(count.outside.values()) == 2 * length * length * width
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_an_operation_without_a_formula_is_named():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4)
            self.vector = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return self.lstm(x)[0][0] @ self.vector

    outside = count_macs(Recurrent(), torch.randn(2, 3, 4)).outside
    assert outside["aten.mv"] is None
    assert len(outside) == 2  # and the LSTM, whose name depends on the backend


def test_nothing_is_left_on_the_model():
    model = resnet20().train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, torch.randn(2, 3, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_shared_tensors_count_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert count_params(model) == 16 + 4 + 4
    assert state_bytes(model) == 4 * (16 + 4 + 4)


def test_bytes_follow_the_type_and_leave_out_passing_buffers():
    model = nn.BatchNorm2d(5)
    model.register_buffer("passing", torch.zeros(100), persistent=False)
    assert state_bytes(model) == 4 * 5 * 4 + 8
    assert state_bytes(model.half()) == 4 * 5 * 2 + 8


def test_inputs_are_needed():
    with pytest.raises(InputsError, match="example_inputs"):
        count_macs(resnet20(), None)


def test_a_list_of_images_is_a_batch_of_so_many():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, images):
            return self.conv(torch.stack(images))

    images = [torch.zeros(3, 16, 16), torch.zeros(3, 16, 16)]
    for example in ((images,), {"images": tuple(images)}):
        assert count_macs(Detector(), example).macs == 3 * 8 * 9 * 16 * 16


@pytest.mark.parametrize(("kind", "shape"), [(nn.Conv1d, (3, 9)), (nn.Conv2d, (3, 9, 9)), (nn.Conv3d, (3, 9, 9, 9))])
def test_inputs_without_a_batch_are_refused(kind, shape):
    """torch's convolutions take them, and three channels would count as three examples."""
    model = nn.Sequential(kind(3, 8, 3), nn.ReLU(), kind(8, 16, 3))
    with pytest.raises(InputsError, match=r"has no batch dimension.*x\[None\]"):
        count_macs(model, torch.zeros(shape))
    with pytest.raises(InputsError, match="has no batch dimension"):
        trace(model, torch.zeros(shape))
    assert not model[0]._forward_pre_hooks
    assert count_macs(model, torch.zeros(1, *shape)).macs == count_macs(model, torch.zeros(5, *shape)).macs
