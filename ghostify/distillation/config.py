"""How to distil: every choice of a run that is not its data, its models or its length."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ghostify.distillation.features import FEATURE_LOSSES, FeatureLoss
from ghostify.distillation.losses import LOSSES, Loss
from ghostify.errors import OptionError

SCHEDULES = ("one-cycle", "cosine")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class DistillConfig:
    """The settings of a distillation.

    Attributes:
        lr: Peak learning rate. AdamW wants about a hundredth of what SGD does.
        schedule: ``"one-cycle"`` (a cosine up, a cosine down to nearly nothing) or ``"cosine"`` (a
            linear warm-up, a cosine down to 0).
        warmup: Share of the steps before the peak; ``None`` takes 0.3 for one-cycle, 0.05 for cosine.
        optimizer: ``"sgd"`` (with Nesterov momentum) or ``"adamw"``.
        momentum: SGD's momentum.
        weight_decay: On weights of two or more dimensions; norms and biases have none.
        loss: A name in ``LOSSES`` or a function ``(student_logits, teacher_logits, temperature)``.
        temperature: Softens both networks' answers before they are compared.
        hard_weight: Weight of the cross-entropy with labels, 0 to 1; ``loss`` has the rest.
        features: Layers whose maps are to be the teacher's too: ``"sites"`` (every Ghost unit), names of modules
            that are in both networks, or ``None`` for none.
        feature_loss: A name in ``FEATURE_LOSSES`` or a function ``(student, teacher)`` of one layer's outputs.
        feature_weight: What the feature loss counts beside the loss of the class scores.
        mixup: α of MixUp, which blends the images of a batch for both networks; 0 does not.
        ema: Decay of a moving average of the weights, above 0 and below 1, or ``None`` for none.
        cache_teacher: Ask the teacher once about every example and keep its answers, for data that are the same in
            every epoch: without augmentation.
        compile: Compile both networks with ``torch.compile``.
        cuda_graphs: Record what a GPU does for both networks once, and replay it: for networks so small that it would
            wait for Python. Whatever the networks decide or draw in Python is recorded with it. Batches that are
            smaller than the largest so far run as ever.
        patience: Stop after so many epochs without a better score on ``val``; ``None`` goes through all.
        accumulate: Compute a batch in so many parts, for one that is too large for the memory. What is learned is
            the same, but for what looks at several rows at once, and sees one part at a time: batch norms, the loss
            ``"dist"`` and the feature loss ``"mse"``.
        freeze_norms: Leave the batch norms' statistics as they came, for a good start and few images or small batches,
            whose own are poorer.
        sync_norms: With several processes, let batch norms see the rows of all of them (on GPUs only).
        state_every: With ``out``, steps after which the state of the run is written down, to go on from.
        tensorboard: With ``out``, write events for TensorBoard beside the CSV files.
        clip_norm: Longest gradient over all parameters, or ``None`` for no clipping.
        precision: ``"fp32"``, ``"bf16"``, or ``"fp16"`` (the loss is multiplied, as its range is small); ``"auto"``
            is bf16 where the hardware has it, else fp32.
        channels_last: Give 4-d inputs in the memory format that convolutions run fastest in.
        seed: Of everything random in the run.
        progress: Show a progress bar; ``None`` shows it on a terminal only.

    Raises:
        OptionError: A value that cannot be used.
    """

    lr: float = 0.05
    schedule: str = "one-cycle"
    warmup: float | None = None
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    loss: str | Loss = "kd"
    temperature: float = 4.0
    hard_weight: float = 0.0
    features: str | tuple[str, ...] | None = None
    feature_loss: str | FeatureLoss = "mse"
    feature_weight: float = 1.0
    mixup: float = 0.0
    ema: float | None = None
    cache_teacher: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    patience: int | None = None
    accumulate: int = 1
    freeze_norms: bool = False
    sync_norms: bool = False
    state_every: int = 1000
    tensorboard: bool = False
    clip_norm: float | None = 5.0
    precision: str = "auto"
    channels_last: bool = True
    seed: int = 0
    progress: bool | None = None

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("precision", self.precision, PRECISIONS)
        if not callable(self.loss):
            _one_of("loss", self.loss, LOSSES, otherwise=" or a function of (student, teacher, temperature)")
        if not callable(self.feature_loss):
            _one_of("feature_loss", self.feature_loss, FEATURE_LOSSES, otherwise=" or a function of (student, teacher)")
        object.__setattr__(self, "features", _layers(self.features))
        _number("lr", self.lr, above=0.0)
        _number("temperature", self.temperature, above=0.0)
        _number("momentum", self.momentum, least=0.0, below=1.0)
        _number("weight_decay", self.weight_decay, least=0.0)
        _number("hard_weight", self.hard_weight, least=0.0, most=1.0)
        _number("feature_weight", self.feature_weight, above=0.0)
        _number("mixup", self.mixup, least=0.0)
        if self.ema is not None:
            _number("ema", self.ema, above=0.0, below=1.0)
        for name in ("cache_teacher", "compile", "cuda_graphs", "freeze_norms", "sync_norms", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.patience is not None:
            _whole("patience", self.patience, least=1)
        _whole("accumulate", self.accumulate, least=1)
        _whole("state_every", self.state_every, least=1)
        if self.warmup is not None:
            _number("warmup", self.warmup, least=0.0, below=1.0)
        if self.clip_norm is not None:
            _number("clip_norm", self.clip_norm, above=0.0)
        _whole("seed", self.seed, least=0)
        if self.freeze_norms and self.sync_norms:
            raise OptionError(
                "freeze_norms=True with sync_norms=True: norms that are frozen see no rows. Leave one out."
            )
        if self.cuda_graphs and (self.compile or self.features or self.accumulate > 1):
            others = [f"compile={self.compile}", f"features={self.features!r}", f"accumulate={self.accumulate}"]
            other = others[0 if self.compile else 1 if self.features else 2]
            raise OptionError(
                f"cuda_graphs=True with {other}: what is replayed is not compiled, does not tell its layers' maps, and "
                "does not add to the gradients of another part. Leave one out."
            )
        if self.cache_teacher and (self.mixup or self.features):
            other = f"mixup={self.mixup}" if self.mixup else f"features={self.features!r}"
            raise OptionError(f"cache_teacher=True with {other}: the teacher is needed at every step. Leave one out.")
        if self.optimizer == "adamw" and self.lr >= 0.05:
            raise OptionError(
                f"lr={self.lr} with optimizer='adamw' diverges: Adam's steps are about lr long whatever the gradient. "
                "Pass lr=0.001 to lr=0.003."
            )

    @property
    def loss_function(self) -> Loss:
        """The function that ``loss`` stands for."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    def settings(self) -> dict[str, Any]:
        """All settings as JSON can hold them: functions by their names.

        Example:
            >>> DistillConfig(features=["conv1"], feature_loss=max).settings()["feature_loss"]
            'max'
        """
        return {
            name: getattr(value, "__qualname__", type(value).__name__) if callable(value) else value
            for name, value in vars(self).items()
        }


def _one_of(name: str, value: Any, allowed: Collection[str], otherwise: str = "") -> None:
    if isinstance(value, str) and value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"{name}={value!r} is unknown. Pass {', '.join(map(repr, allowed))}{otherwise}.{guess}")


def _layers(features: Any) -> str | tuple[str, ...] | None:
    """The setting ``features``, lists as tuples."""
    if features is None or (isinstance(features, str) and features == "sites"):
        return features
    if isinstance(features, list | tuple) and features and all(isinstance(name, str) for name in features):
        return tuple(features)
    raise OptionError(
        f"features={features!r} cannot be used. Pass 'sites' for every Ghost unit, names of modules as in "
        "('layer1.0.conv1',), or None."
    )


def _whole(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(
            f"{name}={value!r} must be a whole number of at least {least}. Pass, for example, {name}={least}."
        )


def _number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    limits = [
        (above, "above", operator.gt),
        (least, "of at least", operator.ge),
        (below, "below", operator.lt),
        (most, "of at most", operator.le),
    ]
    given = [(limit, words, holds) for limit, words, holds in limits if limit is not None]
    real = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not real or not all(holds(value, limit) for limit, _, holds in given):
        wanted = " and ".join(f"{words} {limit:g}" for limit, words, _ in given)
        raise OptionError(f"{name}={value!r} cannot be used. Pass a number {wanted}.")
