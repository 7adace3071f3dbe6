"""The training loop: a student learns to answer like its teacher. Read `distill` from top to bottom."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import Batch, Reader, check_labels, count_batches
from ghostify.distillation.checkpoint import snapshot, write_history, write_weights
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.history import Epoch, Run, Scores
from ghostify.distillation.losses import cross_entropy
from ghostify.distillation.optimisation import build_optimizer, learning_rate, uses_bf16
from ghostify.distillation.preflight import check_batch, check_models, explained, first_batch
from ghostify.distillation.progress import epoch_line, progress_bar, scores_line
from ghostify.distillation.randomness import preserved_random_state, reseed
from ghostify.distillation.validation import validate
from ghostify.errors import InputsError, NonFiniteLossError, TrainingError
from ghostify.tracing.example import evaluating

log = logging.getLogger(__name__)


def distill(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: Iterable[Any],
    val: Iterable[Any] | None = None,
    epochs: int = 10,
    out: str | os.PathLike[str] | None = None,
    config: DistillConfig | None = None,
) -> Run:
    """Train a student, in place, to give the teacher's class scores.

    With validation data the student ends with the weights of its best epoch: the highest accuracy, or
    without labels the highest agreement with the teacher, among equals the lowest loss. The start counts
    as epoch 0, so that training never makes it worse by that measure. Without validation data it ends
    with the last weights. When the run is stopped, by an error or by hand, the student goes back to the
    end of the last complete epoch. All else is left as found: the teacher, both models' training
    flags and the global random state; the student's gradients are cleared.

    With ``out`` there are, from the start and after every epoch, ``best.safetensors``, ``last.safetensors``
    (state dicts) and ``history.json`` in it, replaced one by one and never half-written.

    Args:
        student: Gives class scores ``(n, classes, ...)``. Parameters with ``requires_grad=False`` stay as they are.
        teacher: Gives class scores of the same shape; run in evaluation mode.
        data: An iterable of ``(input, target)`` or of inputs alone, gone through anew every epoch; if it has
            ``set_epoch``, that is called with the epoch's number from 0. One without a length is gone
            through once more, before the first epoch, to count its batches.
        val: The same, to choose the best epoch by; ``None`` does without.
        epochs: How often to go through the data.
        out: Folder for the checkpoints; made if missing.
        config: All other settings.

    Returns:
        The record of the run, with the student.

    Raises:
        OptionError: A setting that cannot be used, or ``hard_weight`` above 0 for data without labels.
        InputsError: Data that are empty, of a wrong kind, or usable once only; labels that do not fit.
        TrainingError: Models that cannot be teacher and student.
        NonFiniteLossError: The loss, its gradient or the student's scores became NaN or infinite.
        OutputError: ``out`` cannot be written.

    Example:
        >>> from torch import nn
        >>> teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> run = distill(student, teacher=teacher, data=[torch.randn(32, 4)], epochs=50)
        >>> run.history[-1].loss < 0.1 * run.history[0].loss
        True
    """
    config = config or DistillConfig()
    folder = None if out is None else Path(out)

    # What can be known beforehand is checked beforehand.
    check_models(student, teacher, epochs)
    steps_per_epoch = count_batches(data, "data")
    if val is not None:
        count_batches(val, "val")
    steps = epochs * steps_per_epoch
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    device = parameters[0].device
    reader = Reader(device, parameters[0].dtype, config.channels_last)
    bf16 = uses_bf16(config.precision, device)
    steps_per_look = _steps_per_look(device)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def soft_loss(scores: Tensor, wanted: Tensor) -> Tensor:
        return config.loss_function(scores, wanted, config.temperature)

    def scored() -> Scores | None:
        if val is None:
            return None
        return validate(student, teacher=teacher, val=val, reader=reader, loss=soft_loss, autocast=autocast)

    def store(*, is_best: bool) -> None:
        if folder is not None:
            write_weights(folder / "last.safetensors", last)
            if is_best:
                write_weights(folder / "best.safetensors", best)
            write_history(folder / "history.json", history=history, start=start, best_epoch=best_epoch, config=config)

    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(device))
        stack.enter_context(evaluating(student, teacher))  # also gives the flags back at the end
        stack.enter_context(torch.enable_grad())
        reseed(config.seed, 0, device)
        with autocast():
            for name, batches in (("data", data), ("val", val)):
                if batches is not None:
                    batch = first_batch(batches, reader, name)
                    check_batch(student, teacher, batch, name=name, hard_weight=config.hard_weight)

        # Epoch 0: the student as it came.
        history: list[Epoch] = []
        start = best_scores = scores = scored()
        if start is not None and not math.isfinite(start.loss):
            raise TrainingError(
                "student gives scores on val that are NaN or infinite, before any training. Check its weights."
            )
        last = best = snapshot(student)
        best_epoch = 0
        store(is_best=True)  # writes to the folder before any work is spent
        optimizer = build_optimizer(student, config)
        optimizer.zero_grad()
        show = stack.enter_context(progress_bar(config.progress, epochs, steps))

        try:
            for epoch in range(1, epochs + 1):
                began = time.perf_counter()
                reseed(config.seed, epoch, device)
                if callable(set_epoch := getattr(data, "set_epoch", None)):
                    set_epoch(epoch - 1)
                student.train()
                total = torch.zeros((), dtype=torch.float64, device=device)
                finite = torch.zeros((), dtype=torch.int64, device=device)  # steps that were
                images, step = 0, -1

                for step, item in enumerate(data):
                    batch = reader.read(item, "data")
                    rate = learning_rate((epoch - 1) * steps_per_epoch + step, steps, config)
                    for group in optimizer.param_groups:
                        group["lr"] = rate

                    with torch.no_grad(), autocast():
                        wanted = teacher(batch.inputs)
                    with autocast(), explained("student", batch.inputs, "data"):
                        output = student(batch.inputs)
                    loss = objective(output, wanted, batch.labels, config)
                    loss.backward()  # type: ignore[no-untyped-call]
                    norm = _clipped_norm(parameters, config.clip_norm)

                    total += loss.detach() * len(batch.inputs)
                    finite += torch.isfinite(loss.detach() + norm)
                    images += len(batch.inputs)
                    if (step + 1) % steps_per_look == 0:
                        if int(finite) <= step:
                            raise _non_finite(epoch, step, int(finite), rate, batch, wanted, config, folder)
                        if show:
                            show(
                                completed=(epoch - 1) * steps_per_epoch + step + 1,
                                epoch=epoch,
                                loss=float(total) / images,
                                rate=images / (time.perf_counter() - began),
                                val=scores_line(scores),
                            )
                    optimizer.step()
                    optimizer.zero_grad()

                if step < 0:
                    raise InputsError(
                        f"data yields no batch in epoch {epoch}. Pass something that can be iterated anew."
                    )
                if int(finite) <= step:
                    raise _non_finite(epoch, step, int(finite), rate, batch, wanted, config, folder)
                if epoch == 1 and step + 1 != steps_per_epoch:
                    log.warning(
                        "data says that it has %d batches and yields %d: the learning rate follows the former",
                        steps_per_epoch,
                        step + 1,
                    )
                mean_loss, trained = float(total) / images, time.perf_counter()
                scores = scored()
                if not _is_healthy(student, scores, batch, autocast):
                    raise _diverged(f"after epoch={epoch}, lr={rate:.3g}", epoch, config, folder)
                last = snapshot(student)
                is_best = scores is None or best_scores is None or scores.rank > best_scores.rank
                if is_best:
                    best, best_scores, best_epoch = last, scores, epoch
                record = Epoch(
                    epoch=epoch,
                    loss=mean_loss,
                    lr=rate,
                    val_accuracy=scores.accuracy if scores else None,
                    val_agreement=scores.agreement if scores else None,
                    val_loss=scores.loss if scores else None,
                    seconds=time.perf_counter() - began,
                    images_per_second=images / (trained - began),
                )
                history.append(record)
                store(is_best=is_best)
                log.info(epoch_line(record, epochs, scores))
        except BaseException:  # by hand too: what is in memory is then what is on disk
            student.load_state_dict(last)
            raise
        finally:
            optimizer.zero_grad()

        student.load_state_dict(best)
        if best_epoch == 0:
            log.warning(
                "no epoch was better on val than the start, which is kept; a lower lr than %g may help", config.lr
            )
    return Run(student, tuple(history), start, best_epoch, folder)


def objective(output: Tensor, wanted: Tensor, labels: Tensor | None, config: DistillConfig) -> Tensor:
    """The training loss: ``(1 - w) · loss(student, teacher) + w · cross-entropy``, w being ``hard_weight``.

    Args:
        output: The student's class scores ``(n, classes, ...)``.
        wanted: The teacher's.
        labels: Class ids ``(n, ...)``; looked at only where w is above 0.
        config: Its ``loss``, ``temperature`` and ``hard_weight`` count.

    Raises:
        InputsError: Labels are needed and are missing or do not fit.
    """
    weight = config.hard_weight
    if weight == 0:
        return config.loss_function(output, wanted, config.temperature)
    if labels is None:
        raise InputsError(f"data yields a batch without labels, and hard_weight={weight} needs them in every batch.")
    if labels.device.type == "cpu":  # on an accelerator a look would make it wait; the first batch was looked at
        check_labels(labels, output, "data")
    hard = cross_entropy(output, labels)
    if weight == 1:
        return hard
    return (1 - weight) * config.loss_function(output, wanted, config.temperature) + weight * hard


def _steps_per_look(device: torch.device) -> int:
    """How often the loss is looked at.

    Reading a number from an accelerator makes it idle, so there it is not done every step. A diverged run
    that goes on for these few does no harm: the last good weights are put back either way.
    """
    return 1 if device.type == "cpu" else 20


def _clipped_norm(parameters: list[nn.Parameter], clip_norm: float | None) -> Tensor:
    """The length of the whole gradient before it is clipped, if it is."""
    if clip_norm is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def _non_finite(
    epoch: int,
    step: int,
    first: int,
    rate: float,
    batch: Batch,
    wanted: Tensor,
    config: DistillConfig,
    folder: Path | None,
) -> NonFiniteLossError:
    """Say what went wrong at step ``first``, seen at ``step``; the batch at hand is to blame only if they are one."""
    if step == first and not bool(torch.isfinite(batch.inputs).all()):
        cause = "the batch itself holds NaN or infinite inputs. Clean the data."
    elif step == first and not bool(torch.isfinite(wanted).all()):
        cause = "the teacher's scores are not finite. Check its weights and the normalisation of the inputs."
    else:
        culprit = "the student diverged" if step == first else "the student diverged or a batch is not finite"
        cause = f"{culprit}. {_calmer(config)}"
    return NonFiniteLossError(
        f"the loss or its gradient is not finite at epoch={epoch}, step={first + 1}, lr={rate:.3g}: {cause} "
        f"{_kept(epoch, folder)}"
    )


def _is_healthy(
    student: nn.Module, scores: Scores | None, batch: Batch, autocast: Callable[[], AbstractContextManager[Any]]
) -> bool:
    """Whether a student still gives numbers: no loss has shown yet what the last step made of it."""
    if scores is not None:
        return math.isfinite(scores.loss)
    with evaluating(student), torch.no_grad(), autocast():
        return bool(torch.isfinite(student(batch.inputs)).all())


def _diverged(when: str, epoch: int, config: DistillConfig, folder: Path | None) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"the student's scores are not finite {when}: it diverged. {_calmer(config)} {_kept(epoch, folder)}"
    )


def _calmer(config: DistillConfig) -> str:
    """What keeps the next run from diverging."""
    clip = "" if config.clip_norm is not None else " or set clip_norm=5.0"
    precision = "" if config.precision == "fp32" else "; if that does not help, pass precision='fp32'"
    return f"Lower lr to {config.lr / 3:.2g}{clip}{precision}."


def _kept(epoch: int, folder: Path | None) -> str:
    """What the student holds after an epoch that failed."""
    state = "the weights that it came with" if epoch == 1 else f"the weights of the end of epoch {epoch - 1}"
    file = f" and so does {str(folder / 'last.safetensors')!r}" if folder else ""
    return f"The student holds {state}{file}."
