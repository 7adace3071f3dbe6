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

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def streams(monkeypatch):
    """The streams that were chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    monkeypatch.setattr(torch.cuda, "set_stream", chosen.append)
    return chosen


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


def test_batches_of_the_largest_size_are_replayed_and_smaller_ones_run(replays):
    plain, model = network(), network()
    recorded = Recorded(model)
    for count in (2, 6, 6, 2, 6):
        images = torch.randn(count, 3, 8, 8)
        assert torch.equal(recorded(images), plain(images))
    assert replays == [2, 6, 6, 6]  # what comes first may be the rest of an epoch
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


def test_what_cannot_be_recorded_is_told_as_such(monkeypatch, streams):
    def fail(*_, **__):
        try:
            raise RuntimeError("operation not permitted\nwhen a stream is captured")
        finally:  # as torch does where its recording was spoilt
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    images = torch.zeros(2, 3, 8, 8)
    with (
        pytest.raises(OptionError, match=r"what Sequential does cannot be recorded \(operation not permitted\)"),
        explained("student", images, "data"),
    ):
        Recorded(network())(images)
    assert streams == ["the caller's"]
    with pytest.raises(TrainingError, match="student does not run"), explained("student", images, "data"):
        network()(images[:, :2])


class Replaces(nn.Module):
    """Puts another tensor in the place of a buffer, which no replay would."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = network()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return self.inside(x)


def test_a_buffer_that_is_replaced_cannot_be_recorded(replays):
    with pytest.raises(OptionError, match=r"what Replaces does cannot be recorded .*buffer 'count'"):
        Recorded(Replaces())(torch.zeros(2, 3, 8, 8))


def test_a_lack_of_memory_is_told_as_such(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    with pytest.raises(torch.OutOfMemoryError):
        Recorded(network())(torch.zeros(2, 3, 8, 8))


def test_only_one_process_with_a_gpu_records():
    config = DistillConfig(cuda_graphs=True)
    check_recording(config, Processes(), GPU)
    with pytest.raises(OptionError, match="cuda_graphs=True with 2 processes"):
        check_recording(config, Processes(0, 2), GPU)
    teacher = network()
    teacher.register_forward_pre_hook(lambda *_: pytest.fail("work was begun"))
    with pytest.raises(OptionError, match="cuda_graphs=True: student is on cpu"):
        distill(network(), teacher=teacher, data=[torch.randn(4, 3, 8, 8)], epochs=1, config=config)


def test_weights_lie_channels_last_for_a_while():
    model = network()
    weight = model[0].weight
    before, place = weight.detach().clone(), weight.data_ptr()
    known = model.state_dict()["0.weight"]
    with laid_out(model):
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
        assert torch.equal(weight, before)
        with torch.no_grad():
            weight.add_(1)
    assert weight.is_contiguous()
    assert weight.data_ptr() == place
    assert torch.equal(weight, before + 1)
    assert torch.equal(known, before + 1)  # it shares the memory
    model.to(memory_format=torch.channels_last)
    with laid_out(model):
        pass
    assert not weight.is_contiguous()  # as it was


def test_weights_that_share_memory_or_cannot_be_written_to_stay():
    with torch.inference_mode():
        teacher = network()
    with laid_out(teacher):
        assert teacher[0].weight.is_contiguous()
    tied, whole, views = network(), torch.zeros(2, 4, 3, 3, 3), network()
    other = network()
    other[0].weight = nn.Parameter(tied[0].weight.data)
    views[0].weight = nn.Parameter(whole[1])
    with laid_out(tied, other, views):
        assert all(model[0].weight.is_contiguous() for model in (tied, other, views))


def test_a_layout_is_given_back_after_an_error(monkeypatch):
    model, plain, calls = nn.Sequential(network(), nn.Conv2d(3, 4, 3)), torch.Tensor.contiguous, []

    def contiguous(tensor, **options):
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    with pytest.raises(torch.OutOfMemoryError), laid_out(model):
        pytest.fail("there was no memory")
    assert all(weight.is_contiguous() for weight in (model[0][0].weight, model[1].weight))
