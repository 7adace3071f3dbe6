"""The whole way on a GPU, where there is one: what it gives there is what it gives on the CPU."""

import copy
import logging

import pytest
import torch
from torch import nn

import ghostify
from ghostify.distillation import DistillConfig, ImageBatches, distill
from ghostify.errors import NonFiniteLossError, OptionError
from ghostify.nn.cifar import CifarResNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GPU = torch.device("cuda")


def network(seed: int = 0, device: torch.device | str = GPU) -> nn.Module:
    """A small ResNet whose norms have seen something."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CifarResNet(1, in_channels=1, num_classes=4)
        for _ in range(3):
            model(torch.randn(64, 1, 16, 16))
    return model.eval().to(device)


def images(count: int = 128) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def batches(count: int = 90, device: torch.device | str = GPU) -> ImageBatches:
    pixels = torch.randint(0, 256, (count, 1, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.no_grad():
        labels = network(1, "cpu")((pixels - 127.5) / 64).argmax(1)
    return ImageBatches(pixels.to(device), labels, batch_size=32, shuffle=True, mean=(0.5,), std=(0.25,))


def differing(a: nn.Module, b: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        first, second = (model.eval().cpu()(x) for model in (a, b))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("initialiser", ["weights", "least-squares", "sequential", "alternating"])
def test_a_start_is_the_one_of_the_cpu(initialiser: str) -> None:
    made = [
        ghostify.convert(
            network(device=device), ratio=2, example_inputs=images(2), calibration=images(), initialiser=initialiser
        )
        for device in (GPU, "cpu")
    ]
    assert next(made[0].parameters()).is_cuda
    assert differing(*made, images(16)) < 0.02


def test_the_random_numbers_of_the_gpu_are_as_found() -> None:
    torch.cuda.manual_seed(7)
    before = torch.cuda.get_rng_state()
    ghostify.convert(network(), ratio=2, example_inputs=images(2), initialiser="random")
    ghostify.convert(network(), ratio=2, calibration=images())
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("sensitivity", ["explained", "measured"])
def test_a_budget_is_spent_as_on_the_cpu(sensitivity: str) -> None:
    budget = {"macs": 0.6}
    plans = [
        ghostify.plan(network(device=device), budget=budget, sensitivity=sensitivity, calibration=images())
        for device in (GPU, "cpu")
    ]
    assert plans[0].macs_after == pytest.approx(plans[1].macs_after, rel=0.03)


def test_a_latency_is_planned_for_and_compared() -> None:
    layers = [nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 4)).eval().to(GPU)
    x = torch.randn(16, 3, 56, 56)
    plan = ghostify.plan(model, budget={"latency": 0.9}, backend="torch", calibration=x)
    assert plan.latency.device == torch.cuda.get_device_name()
    report = ghostify.compare(model, ghostify.apply(plan, model), example_inputs=x)
    assert torch.cuda.get_device_name() in report.latency.backend
    assert report.latency.ratio > 1


def test_a_model_on_the_gpu_is_stored_and_exported(tmp_path) -> None:
    model = network()
    small = ghostify.convert(model, ratio=2, example_inputs=images(2))
    again = ghostify.load(ghostify.save(small, tmp_path / "small"), base=network(3))
    assert differing(copy.deepcopy(small), again, images(4)) == 0
    assert ghostify.export_onnx(small, tmp_path / "small.onnx", example_inputs=images(2))
    assert next(small.parameters()).is_cuda


@pytest.mark.parametrize("held", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "fp32"},
        {"precision": "fp16"},
        {"optimizer": "adamw", "lr": 0.003},
        {"ema": 0.9, "mixup": 0.2, "hard_weight": 0.5},
        {"features": "sites", "accumulate": 2},
        {"freeze_norms": True, "channels_last": False},
        {"loss": "dist", "schedule": "cosine"},
        {"sync_norms": True},
        {"cuda_graphs": True},
        {"cuda_graphs": True, "ema": 0.9, "mixup": 0.2, "hard_weight": 0.5},
        {"cuda_graphs": True, "precision": "fp16", "freeze_norms": True},
    ],
    ids=str,
)
def test_a_student_learns(settings: dict[str, object], held: str, tmp_path) -> None:
    teacher, data = network(1), batches(device=held)
    student = ghostify.convert(teacher, ratio=2, example_inputs=images(2), calibration=images(), initialiser="random")
    run = distill(
        student, teacher=teacher, data=data, val=data, epochs=8, out=tmp_path, config=DistillConfig(**settings)
    )
    assert run.history[-1].loss < run.history[0].loss
    assert run.history[-1].val_agreement > 0.5
    assert next(student.parameters()).is_cuda


@pytest.mark.parametrize("setting", ["compile", "cuda_graphs"])
def test_compiled_or_recorded_networks_learn_the_same(setting: str) -> None:
    teacher, students = network(1), [network(2) for _ in range(2)]
    losses = []
    for student, wanted in zip(students, (False, True)):
        config = DistillConfig(**{setting: wanted}, precision="fp32", lr=0.01)
        run = distill(student, teacher=teacher, data=batches(), val=batches(), epochs=3, config=config)
        losses.append([epoch.loss for epoch in run.history])
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert differing(*students, images(16)) < 0.05


@pytest.mark.parametrize("graphs", [True, False])
def test_a_run_that_was_stopped_goes_on(graphs: bool, tmp_path, caplog) -> None:
    teacher, whole, stopped = network(1), network(2), network(2)
    config = DistillConfig(lr=0.01, precision="fp32", state_every=1, cuda_graphs=graphs)
    distill(whole, teacher=teacher, data=batches(), epochs=4, config=config)

    class Stops(ImageBatches):
        left = 7

        def __iter__(self):
            for batch in super().__iter__():
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
                yield batch

    data, stops = batches(), batches()
    stops.__class__ = Stops
    with pytest.raises(KeyboardInterrupt):
        distill(stopped, teacher=teacher, data=stops, epochs=4, out=tmp_path, config=config)
    with caplog.at_level(logging.INFO):
        distill(stopped, teacher=teacher, data=data, epochs=4, out=tmp_path, config=config, resume=True)
    assert differing(stopped, whole, images(16)) < 1e-3


def test_what_cannot_be_recorded_is_told() -> None:
    class Looks(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x) if float(x.sum()) > -1e9 else x

    with pytest.raises(OptionError, match="cuda_graphs=True: what Looks does cannot be recorded"):
        distill(Looks(network(2)), teacher=network(1), data=batches(), epochs=1, config=DistillConfig(cuda_graphs=True))


def test_a_loss_that_is_no_number_is_noticed(tmp_path) -> None:
    with pytest.raises(NonFiniteLossError, match="lr="):
        distill(
            network(2),
            teacher=network(1),
            data=batches(),
            epochs=30,
            config=DistillConfig(lr=1e30, clip_norm=None, precision="fp32"),
        )
