"""Networks that are recorded, with a stand-in for what only a GPU can do: tests/test_gpu.py has the real one."""

import gc

import pytest
import torch
from torch import nn

from ghostify.distillation import DistillConfig, distill
from ghostify.distillation.batches import laid_out
from ghostify.distillation.preflight import explained
from ghostify.distillation.processes import Processes
from ghostify.distillation.recording import Recorded, check_recording
from ghostify.errors import OptionError, TrainingError
from ghostify.tracing.running import full_precision, unmarked

GPU = torch.device("cuda")


@pytest.fixture
def replays(monkeypatch):
    """The sizes of the batches that were replayed."""
    sizes = []

    def record(module, sample, **options):
        assert not torch.is_autocast_cache_enabled()
        for _ in range(4):
            module(*sample)
            torch.rand(1)

        def replay(inputs):
            sizes.append(len(inputs))
            return module(inputs)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    return sizes


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_batches_of_the_first_ones_size_are_replayed_and_others_run(replays):
    plain, model = network(), network()
    recorded = Recorded(model)
    for count in (6, 6, 2, 6):
        images = torch.randn(count, 3, 8, 8)
        assert torch.equal(recorded(images), plain(images))
    assert replays == [6, 6, 6]
    for name, value in plain.state_dict().items():  # the norm has seen every batch once
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.is_autocast_cache_enabled()


def test_recording_takes_no_random_numbers(replays):
    recorded = Recorded(network())
    torch.manual_seed(3)
    recorded(torch.zeros(2, 3, 8, 8))
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def gradient_node(weight):
    """The node of autograd's that adds up a weight's gradient; it lives as long as a graph that it is in."""
    return weight.view_as(weight).grad_fn.next_functions[0][0]


def test_nothing_holds_on_to_an_earlier_backward_pass(monkeypatch):
    def record(module, sample, **options):
        assert "earlier" not in gradient_node(model[0].weight).metadata
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    model = network()
    cycle = [model[0].weight.exp()]  # as a tool that pruned the model leaves it
    gradient_node(model[0].weight).metadata["earlier"] = True
    cycle.append(cycle)
    gc.disable()
    try:
        del cycle
        assert "earlier" in gradient_node(model[0].weight).metadata
        Recorded(model)(torch.zeros(2, 3, 8, 8))
    finally:
        gc.enable()


def test_what_cannot_be_recorded_is_told_as_such(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("operation not permitted\nwhen a stream is captured")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    images = torch.zeros(2, 3, 8, 8)
    with (
        pytest.raises(OptionError, match=r"what Sequential does cannot be recorded \(operation not permitted\)"),
        explained("student", images, "data"),
    ):
        Recorded(network())(images)
    with pytest.raises(TrainingError, match="student does not run"), explained("student", images, "data"):
        network()(images[:, :2])


def test_only_one_process_with_a_gpu_records():
    config = DistillConfig(cuda_graphs=True)
    check_recording(config, Processes(), GPU)
    with pytest.raises(OptionError, match="cuda_graphs=True with 2 processes"):
        check_recording(config, Processes(0, 2), GPU)
    images = [torch.randn(4, 3, 8, 8)]
    with pytest.raises(OptionError, match="cuda_graphs=True: student is on cpu"):
        distill(network(), teacher=network(), data=images, epochs=1, config=config)


def test_weights_lie_channels_last_for_a_while():
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with laid_out(model):
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert not model[0].weight.is_contiguous()
    assert model[0].weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.to(memory_format=torch.channels_last)
    with laid_out(model):
        pass
    assert not model[0].weight.is_contiguous()  # as it was


def test_a_model_is_run_in_full_precision():
    kinds = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    with unmarked(network()):
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
        with full_precision():
            pass
        assert [kind.fp32_precision for kind in kinds] == ["ieee", "ieee"]
    assert [kind.fp32_precision for kind in kinds] == before
    assert torch.backends.cudnn.allow_tf32 == (before[0] != "ieee")


def test_random_numbers_drawn_by_a_model_count_for_nothing():
    model = network()
    torch.manual_seed(5)
    with unmarked(model):
        torch.rand(3)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
