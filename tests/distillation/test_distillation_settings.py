"""The configuration, the schedule and the optimiser."""

import json
from itertools import pairwise

import pytest
import torch
from torch import nn

from ghostify.distillation import DistillConfig, distillation_loss
from ghostify.distillation.optimisation import build_optimizer, learning_rate, parameter_groups, settled_precision
from ghostify.errors import OptionError


def rates(config: DistillConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps, config) for step in range(steps)]


def test_one_cycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=41, pct_start=0.25)
    expected = []
    for _ in range(41):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 41:
            schedule.step()
    # torch counts pct_start · total − 1 steps to the peak, we a share of the intervals: 9.25 of 40
    assert rates(DistillConfig(lr=0.2, warmup=9.25 / 40), 41) == pytest.approx(expected, rel=1e-6)


def test_cosine_warms_up_in_a_line_and_ends_at_nothing() -> None:
    got = rates(DistillConfig(lr=1.0, schedule="cosine", warmup=0.1), 101)
    differences = [b - a for a, b in pairwise(got[:11])]
    assert differences == pytest.approx([differences[0]] * 10)
    assert got[0] > 0
    assert got[10] == max(got) == 1.0
    assert got[55] == pytest.approx(0.5)
    assert got[100] == pytest.approx(0.0, abs=1e-12)
    assert all(b < a for a, b in pairwise(got[10:]))


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_every_step_of_any_length_has_a_usable_rate(schedule: str, steps: int) -> None:
    for warmup in (None, 0.0, 0.9):
        config = DistillConfig(lr=0.5, schedule=schedule, warmup=warmup)
        assert all(0 <= rate <= 0.5 for rate in rates(config, steps))
        assert learning_rate(0, steps, config) > 0
        assert learning_rate(steps + 7, steps, config) == learning_rate(max(steps - 1, 1), steps, config)


def test_norms_and_biases_do_not_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    model[3].weight.requires_grad_(False)
    decaying, rest = parameter_groups(model, 0.1)
    assert [id(p) for p in decaying["params"]] == [id(model[0].weight)]
    assert {id(p) for p in rest["params"]} == {
        id(p) for p in (model[0].bias, model[1].weight, model[1].bias, model[3].bias)
    }
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {"optimizer": "sgd", "momentum": 0.0}])
def test_a_step_decays_weights_only(settings: dict) -> None:
    model = nn.Linear(2, 2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, DistillConfig(lr=0.5, weight_decay=0.1, **settings))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrink = 1 - 0.5 * 0.1 * (1 + settings.get("momentum", 0.9))  # Nesterov looks one momentum further
    torch.testing.assert_close(model.weight.detach(), before[0] * shrink)
    assert torch.equal(model.bias, before[1])


def test_adamw_is_built_with_its_groups() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), DistillConfig(optimizer="adamw", lr=1e-3, weight_decay=0.3))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_precision_follows_the_hardware_only_when_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": True})
    assert settled_precision("auto", cpu) == "bf16"
    assert settled_precision("fp32", cpu) == "fp32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert settled_precision("auto", cpu) == "fp32"
    assert [settled_precision(name, cpu) for name in ("bf16", "fp16")] == ["bf16", "fp16"]


def test_a_function_is_taken_where_a_loss_is_named() -> None:
    def own(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
        return (student - teacher).abs().mean() * temperature

    assert DistillConfig(loss=own).loss_function is own
    assert DistillConfig(loss="kd").loss_function is distillation_loss


def test_layers_are_a_tuple_and_settings_are_json() -> None:
    def own(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return (student - teacher).abs().mean()

    class Own:
        def __call__(self, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
            return student.sum()

    config = DistillConfig(features=["conv1", "conv2"], feature_loss=own, loss=Own(), mixup=0.2, ema=0.999, patience=1)
    assert config.features == ("conv1", "conv2")
    hash(config)
    record = json.loads(json.dumps(config.settings(), allow_nan=False))
    assert record.keys() == vars(config).keys()
    assert (record["loss"], record["feature_loss"].split(".")[-1]) == ("Own", "own")
    assert (record["features"], record["ema"], record["lr"]) == (["conv1", "conv2"], 0.999, config.lr)
    assert DistillConfig(features="sites").features == "sites"
    assert DistillConfig().features is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, r"lr=0\.0 cannot be used\. Pass a number above 0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": True}, "lr=True"),
        ({"temperature": -1}, "temperature=-1"),
        ({"momentum": 1.0}, "momentum=1.0.* of at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"hard_weight": 1.5}, "hard_weight=1.5.* of at least 0 and of at most 1"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"clip_norm": 0}, "clip_norm=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"schedule": "onecycle"}, "schedule='onecycle'.*Did you mean 'one-cycle'"),
        ({"optimizer": "adam"}, "optimizer='adam'.*Did you mean 'adamw'"),
        ({"precision": "fp64"}, "precision='fp64'.*'fp32'"),
        ({"loss": "kdd"}, "loss='kdd'.*Did you mean 'kd'"),
        ({"loss": None}, "loss=None"),
        ({"features": "site"}, "features='site' cannot be used. Pass 'sites'"),
        ({"features": ()}, r"features=\(\) cannot"),
        ({"features": ("conv1", 2)}, r"features=\('conv1', 2\) cannot"),
        ({"feature_loss": "attenton"}, r"feature_loss='attenton'.*\(student, teacher\).*Did you mean 'attention'"),
        ({"feature_weight": 0}, "feature_weight=0 cannot be used. Pass a number above 0"),
        ({"mixup": -0.1}, "mixup=-0.1.* of at least 0"),
        ({"ema": 1.0}, "ema=1.0.* above 0 and below 1"),
        ({"ema": 0}, "ema=0"),
        ({"compile": 1}, "compile=1 must be True or False"),
        ({"cuda_graphs": "yes"}, "cuda_graphs='yes' must be True or False"),
        ({"cuda_graphs": True, "compile": True}, "cuda_graphs=True with compile=True"),
        ({"cuda_graphs": True, "features": "sites"}, "cuda_graphs=True with features='sites'"),
        ({"cuda_graphs": True, "accumulate": 2}, "cuda_graphs=True with accumulate=2"),
        ({"patience": 0}, "patience=0 must be a whole number of at least 1"),
        ({"patience": 2.0}, "patience=2.0"),
        ({"optimizer": "adamw"}, "lr=0.05 with optimizer='adamw'.*lr=0.001"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DistillConfig(**settings)
