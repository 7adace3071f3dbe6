"""One step: what the student is told, what it answers, and what it makes of the difference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ghostify.distillation.answers import KnownAnswers
from ghostify.distillation.batches import Batch, Reader, check_labels
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.features import FeatureTaps
from ghostify.distillation.losses import cross_entropy
from ghostify.distillation.mixing import mixed
from ghostify.distillation.optimisation import build_optimizer
from ghostify.distillation.preflight import explained
from ghostify.distillation.processes import Item, Processes
from ghostify.distillation.recording import Recorded
from ghostify.errors import InputsError, OptionError, TrainingError


@dataclass(frozen=True)
class Step:
    """What one step came to, over all processes.

    Attributes:
        loss_sum: Sum of the examples' losses.
        finite: 1 where loss and gradient are numbers, else 0.
        examples: How many there were.
        stops: Above 0 where a process was asked to stop.
    """

    loss_sum: Tensor
    finite: Tensor
    examples: int
    stops: Tensor


class Learner:
    """The student with all that it learns with.

    Args:
        student: Changed in place.
        teacher: In evaluation mode.
        config: The settings.
        processes: Who this process is.
        reader: Reads batches.
        taps: Of the layers that are compared, entered already: what is compiled before them does not know them.
        answers: The teacher's, if they are known already.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        config: DistillConfig,
        processes: Processes,
        reader: Reader,
        taps: FeatureTaps | None,
        answers: KnownAnswers | None,
    ) -> None:
        self.student, self.config, self.processes, self.reader, self.taps = student, config, processes, reader, taps
        self.parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(student, config)
        self.optimizer.zero_grad()
        # In half precision small gradients would vanish: the loss is multiplied, and the gradients are divided again.
        self.scaler = torch.amp.GradScaler(reader.device.type, enabled=reader.precision == "fp16")
        self.updates = 0  # without those that were left out
        self.average = (
            None
            if config.ema is None
            else AveragedModel(student, multi_avg_fn=_averaging(config.ema), use_buffers=True)
        )
        self.wrapped = processes.wrapped(student)
        if config.freeze_norms and not self._norms:
            raise OptionError(
                f"freeze_norms=True: student ({type(student).__name__}) has no batch norm that could be left as it is. "
                "Pass freeze_norms=False."
            )
        self.forward: Callable[[Tensor], Any] = self._prepared(self.wrapped)
        self.teacher: Callable[[Tensor], Any] = answers or self._prepared(teacher)

    def _prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """What is called in a network's place."""
        if self.config.cuda_graphs:
            return Recorded(model)
        return torch.compile(model) if self.config.compile else model

    @property
    def kept(self) -> nn.Module:
        """The network that is scored and kept: the average if there is one."""
        return self.student if self.average is None else self.average.module

    def train(self) -> None:
        """Put the student into training mode, but for norms that are to stay as they are."""
        self.student.train()
        for norm in self._norms if self.config.freeze_norms else ():
            norm.training = False

    @property
    def _norms(self) -> list[nn.Module]:
        return [module for module in self.student.modules() if isinstance(module, _BatchNorm)]

    def step(self, item: Item, rate: float, *, stop: bool) -> Step:
        """Compute the gradients of one batch.

        Args:
            item: The batch.
            rate: Learning rate of the update that follows.
            stop: Whether this process was asked to stop.

        Raises:
            InputsError: The batch cannot be read.
            TrainingError: The student does not run on it, or has parameters that take no part where processes share.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.reader.read(item.value, "data")
        if not item.is_part:
            batch = batch.rows(self.processes.rows(len(batch.inputs)))
        own = len(batch.inputs) if item.counts else 0
        if not len(batch.inputs):  # every process takes part in every step: with a row that does not count
            batch = self.reader.read(item.value, "data").rows(slice(0, 1))
        everyone = own if self.processes.count == 1 else int(self.processes.sum(torch.tensor(own, device=batch.device)))
        if self.config.mixup:
            blend = mixed(batch.inputs, self.config.mixup)
            others = None if batch.labels is None else batch.labels[blend.permutation]
            batch = replace(batch, inputs=blend.inputs, others=others, share=blend.share)

        loss_sum = torch.zeros((), dtype=torch.float64, device=batch.device)
        parts = batch.parts(self.config.accumulate)
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with self._all_taking_part() if last else self.processes.apart(self.wrapped):
                loss = self._loss(part)
                # The gradients of processes are averaged, those of parts added up; examples are to count alike.
                weight = len(part.inputs) * self.processes.count / everyone if own else 0.0
                self.scaler.scale(loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
            loss_sum += loss.detach() * (len(part.inputs) if own else 0)
        norm = self._clipped_norm()
        finite = torch.isfinite(loss_sum if self._may_overflow else loss_sum + norm)
        if self.processes.count == 1:
            return Step(loss_sum, finite, everyone, torch.tensor(int(stop)))
        sums = self.processes.sum(torch.stack([loss_sum, (~finite).double(), torch.full_like(loss_sum, float(stop))]))
        return Step(sums[0], sums[1] == 0, everyone, sums[2])

    def update(self) -> None:
        """Take the step whose gradients are there; in half precision not where one of them was too large."""
        factor = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += self.scaler.get_scale() >= factor
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.student)

    def _loss(self, batch: Batch) -> Tensor:
        with self.reader.autocast(), explained("student", batch.inputs, "data"):
            output = self.forward(batch.inputs)
        if self.config.hard_weight == 1 and self.taps is None:  # labels alone: nobody looks at the teacher's answers
            wanted = output
        else:
            with torch.no_grad(), self.reader.autocast():
                wanted = self.teacher(batch.inputs)
        loss = objective(output, wanted, batch, self.config)
        if self.taps is not None:
            loss = loss + self.config.feature_weight * self.taps.loss(self.config.feature_loss)
        if loss.numel() != 1:
            raise OptionError(
                f"loss={self.config.settings()['loss']!r} gives a tensor of shape {tuple(loss.shape)}, and one number "
                "for the whole batch is needed. Take its mean."
            )
        return loss

    @contextmanager
    def _all_taking_part(self) -> Iterator[None]:
        """Where processes share gradients every parameter must get one; torch would leave out those beside it, too.

        Raises:
            TrainingError: One got none in the backward pass inside.
        """
        if self.processes.count == 1:
            yield
            return
        missing = {name: p for name, p in self.student.named_parameters() if p.requires_grad}
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _, name=name: missing.pop(name, None)
            )
            for name, parameter in list(missing.items())
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if missing:
            idle = list(missing)
            raise TrainingError(
                f"student has {len(idle)} parameters that its answer did not depend on in this step "
                f"({', '.join(idle[:3])}{', …' if len(idle) > 3 else ''}), and several processes cannot share "
                "gradients then. Call requires_grad_(False) on those that never take part, or use one process."
            )

    @property
    def _may_overflow(self) -> bool:
        """Whether a gradient that is not finite may be due to the factor of the loss, which is then halved."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _clipped_norm(self) -> Tensor:
        """The length of the whole gradient before it is clipped, if it is."""
        self.scaler.unscale_(self.optimizer)
        if self.config.clip_norm is not None:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])


def _averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """What a moving average does at a step; counts and the order of channels are taken as they are."""
    average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], steps: Tensor | int) -> None:
        if averages[0].is_floating_point():  # they come by their kind of numbers
            average(averages, values, steps)
        else:
            for kept, value in zip(averages, values, strict=True):
                kept.copy_(value)

    return update


def objective(output: Tensor, wanted: Tensor, batch: Batch, config: DistillConfig) -> Tensor:
    """The training loss: ``(1 - w) · loss(student, teacher) + w · cross-entropy``, w being ``hard_weight``.

    Args:
        output: The student's class scores ``(n, classes, ...)``.
        wanted: The teacher's.
        batch: Its labels are looked at only where w is above 0.
        config: Its ``loss``, ``temperature`` and ``hard_weight`` count.

    Raises:
        InputsError: Labels are needed and are missing or do not fit.
    """
    weight = config.hard_weight
    if weight == 0:
        return config.loss_function(output, wanted, config.temperature)
    if batch.labels is None:
        raise InputsError(f"data yields a batch without labels, and hard_weight={weight} needs them in every batch.")
    if batch.device.type == "cpu":  # on an accelerator a look would make it wait; the first batch was looked at
        check_labels(batch.labels, output, "data")
    hard = cross_entropy(output, batch.labels)
    if batch.others is not None:
        hard = batch.share * hard + (1 - batch.share) * cross_entropy(output, batch.others)
    if weight == 1:
        return hard
    return (1 - weight) * config.loss_function(output, wanted, config.temperature) + weight * hard


@contextmanager
def synchronised_norms(student: nn.Module, *, wanted: bool, device: torch.device) -> Iterator[None]:
    """While it is open, torch's batch norms see the rows of all processes; then the student's own are back.

    Args:
        student: Its norms are replaced by ones that share their parameters and statistics.
        wanted: Whether to do so.
        device: Where it is.

    Raises:
        OptionError: It is not on a GPU: torch's synchronised norms are for those alone.
    """
    if not wanted:
        yield
        return
    if device.type == "cpu":
        raise OptionError("sync_norms=True: torch synchronises batch norms on GPUs only. Pass sync_norms=False.")
    with swapped_norms(student):
        yield


@contextmanager
def swapped_norms(student: nn.Module) -> Iterator[None]:
    """Put ``SyncBatchNorm`` in the place of every batch norm of torch's, and take it away in the end."""
    homes = [
        (parent, name, norm)
        for parent in student.modules()
        for name, norm in parent.named_children()
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    ]
    for parent, name, norm in homes:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(norm))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for parent, name, norm in homes:
            setattr(parent, name, norm)
