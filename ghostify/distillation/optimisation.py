"""The optimiser, its learning rate step by step, and the precision of the arithmetic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ghostify.distillation.config import DistillConfig

_START_DIVISOR = 25.0  # one-cycle begins at lr / 25 and ends at lr / 250,000, as torch's OneCycleLR does
_END_DIVISOR = 25e4


def learning_rate(step: int, steps: int, config: DistillConfig) -> float:
    """The learning rate of one step: a pure function, so that a run can go on from anywhere.

    One-cycle is Smith and Topin 2017, arXiv 1708.07120, with cosine arcs up and down; cosine is
    Loshchilov and Hutter 2016, arXiv 1608.03983, eq. 5 without restarts, after a linear warm-up.

    Args:
        step: Steps done before this one; beyond the last it stays at the end.
        steps: Steps of the whole run.
        config: Its ``lr``, ``schedule`` and ``warmup`` count.

    Example:
        >>> [round(learning_rate(step, 5, DistillConfig(lr=1.0, warmup=0.25)), 3) for step in range(5)]
        [0.04, 1.0, 0.75, 0.25, 0.0]
    """
    position = min(step / max(steps - 1, 1), 1.0)
    if config.schedule == "one-cycle":
        warmup, first, last = 0.3, config.lr / _START_DIVISOR, config.lr / _END_DIVISOR
    else:
        warmup, first, last = 0.05, 0.0, 0.0
    warmup = warmup if config.warmup is None else config.warmup
    if position < warmup:
        if config.schedule == "one-cycle":
            return _cosine(first, config.lr, position / warmup)
        # one step further than the position, so that the first step is not spent at a rate of 0
        return config.lr * min((step + 1) / (warmup * max(steps - 1, 1) + 1), 1.0)
    return _cosine(config.lr, last, (position - warmup) / (1 - warmup))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights, which decay, and norms' and biases' parameters, which do not.

    Args:
        model: Parameters with ``requires_grad=False`` are left out.
        weight_decay: Of the first group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: DistillConfig) -> torch.optim.Optimizer:
    """The optimiser that the configuration names, over the model's trainable parameters."""
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    # One kernel for all parameters instead of several for each; but torch's fused SGD spoils its momentum in steps that
    # half precision leaves out.
    fused = True if devices <= {"cpu", "cuda"} and config.precision != "fp16" else None
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    nesterov = config.momentum > 0  # torch refuses Nesterov without momentum
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def settled_precision(precision: str, device: torch.device) -> str:
    """The precision to compute in: ``"fp32"``, ``"bf16"`` or ``"fp16"``.

    Args:
        precision: One of ``PRECISIONS``. Automatic means bfloat16 where the hardware multiplies it itself, which is
            more than ten times faster than float32 for a ResNet-20 on such a CPU and several times slower where it has
            to be emulated; and float32 elsewhere.
        device: Where the models are.
    """
    if precision != "auto":
        return precision
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        has_bf16 = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16" if has_bf16 else "fp32"
