"""The training loop: a student learns to answer like its teacher. Read `distill` from top to bottom."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.backends.memory import retained_memory
from ghostify.distillation.answers import KnownAnswers
from ghostify.distillation.batches import Batch, Reader, count_batches
from ghostify.distillation.checkpoint import snapshot, write_history, write_weights
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.failures import diverged, non_finite
from ghostify.distillation.features import FeatureTaps
from ghostify.distillation.history import Epoch, Run, Scores
from ghostify.distillation.learning import Learner, synchronised_norms
from ghostify.distillation.logs import RunLog, expected_line, expected_seconds
from ghostify.distillation.optimisation import learning_rate, settled_precision
from ghostify.distillation.preflight import check_batch, check_classes, check_models, check_start, first_batch
from ghostify.distillation.processes import Processes, batch_facts, begin_epoch, launched, read_epoch
from ghostify.distillation.progress import epoch_line, progress_bar, scores_line
from ghostify.distillation.randomness import preserved_random_state
from ghostify.distillation.resuming import States, find_state, restore
from ghostify.distillation.state import Progress
from ghostify.distillation.stopping import Stop, watched_signals
from ghostify.distillation.validation import validate
from ghostify.errors import InputsError, NonFiniteLossError, OptionError, TrainingError
from ghostify.tracing.example import evaluating

log = logging.getLogger(__name__)

# Steps between two rows of the log, and those that are timed to foretell how long the run will take.
_STEPS_PER_ROW = _STEPS_TIMED = 20


def distill(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: Iterable[Any],
    val: Iterable[Any] | None = None,
    epochs: int = 10,
    out: str | os.PathLike[str] | None = None,
    config: DistillConfig | None = None,
    resume: bool = False,
) -> Run:
    """Train a student, in place, to give the teacher's class scores.

    With validation data the student ends with the weights of its best epoch: the highest accuracy, or
    without labels the highest agreement with the teacher, among equals the lowest loss. The start counts
    as epoch 0, so that training never makes it worse by that measure. Without validation data it ends
    with the last weights. When the run is stopped, by an error or by hand, the student goes back to the
    end of the last complete epoch. All else is left as found: the teacher, both models' training
    flags and the global random state; the student's gradients are cleared.

    With ``out`` there are, from the start and after every epoch, ``best.safetensors``, ``last.safetensors``
    (state dicts) and ``history.json`` in it, replaced one by one and never half-written. The state of the run
    is in ``state/``, written after every epoch, every ``state_every`` steps and at SIGTERM or SIGINT; with
    ``resume`` a run that was stopped or killed goes on from there, inside the epoch, and on a CPU ends with
    the very weights that it would have had. Of data of one's own that takes batches in an order that depends on
    the epoch's number or on torch's, NumPy's or Python's global random numbers alone.

    Started by ``torchrun`` or ``accelerate launch``, each of several processes calls this with models on its
    own device and with the same data (no DistributedSampler); it learns from its rows of every batch, so the batch size
    is that of all of them together. What looks at several rows at once sees those of its own process: batch norms,
    MixUp, ``loss="dist"`` and the features' ``"mse"``.

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
        resume: Go on with the run in ``out``, if there is one.

    Returns:
        The record of the run, with the student.

    Raises:
        OptionError: A setting that cannot be used, or ``hard_weight`` above 0 for data without labels.
        InputsError: Data that are empty, of a wrong kind, usable once only, or not the same in every process; labels
            that do not fit.
        TrainingError: Models that cannot be teacher and student.
        NonFiniteLossError: The loss, its gradient or the student's scores became NaN or infinite.
        OutputError: ``out`` cannot be written, or holds a run that is not finished, and ``resume`` is false.
        MissingExtraError: There are several processes, and accelerate is not installed.

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
    check_models(student, teacher, epochs, config.precision)
    parameter = next(parameter for parameter in student.parameters() if parameter.requires_grad)
    device = parameter.device
    with preserved_random_state(device):  # what has no length is gone through, and may draw
        steps_per_epoch = count_batches(data, "data")
        batches_of_val = None if val is None else count_batches(val, "val")
        if val is None and config.patience is not None:
            raise OptionError(f"patience={config.patience} needs validation data. Pass val, or patience=None.")
    steps = epochs * steps_per_epoch
    processes = launched(device)
    reader = Reader(device, parameter.dtype, config.channels_last, settled_precision(config.precision, device))
    steps_per_look = _steps_per_look(device)
    states = (
        None if folder is None else States(folder, student, teacher, epochs, steps_per_epoch, batches_of_val, config)
    )
    found = find_state(states, resume=resume)
    processes.check_position(*((found[0].epoch, found[0].step) if found else (1, 0)), device)

    def soft_loss(scores: Tensor, wanted: Tensor) -> Tensor:
        return config.loss_function(scores, wanted, config.temperature)

    def scored(model: nn.Module, stop: Stop | None = None) -> Scores | None:
        processes.agree(model)
        if val is None:
            return None
        return validate(model, teacher=teacher, val=val, reader=reader, loss=soft_loss, processes=processes, stop=stop)

    def store(*, is_best: bool) -> None:
        if folder is not None and processes.is_main:
            write_weights(folder / "last.safetensors", last)
            if is_best:
                write_weights(folder / "best.safetensors", best)
            write_history(folder / "history.json", progress=progress, config=config)

    def remember() -> None:
        if states is not None and processes.is_main:
            progress.loss_sum = float(loss_sum)
            states.write(progress, learner, last=last, best=best)

    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(device))
        stack.enter_context(retained_memory(device))
        stack.enter_context(synchronised_norms(student, wanted=config.sync_norms, device=device))
        stack.enter_context(evaluating(student, teacher))  # also gives the flags back at the end
        stack.enter_context(torch.enable_grad())
        taps = stack.enter_context(FeatureTaps(student, teacher, config.features)) if config.features else None
        show = stack.enter_context(progress_bar(config.progress if processes.is_main else False, epochs, steps))
        begin_epoch(data, 1, seed=config.seed, device=device)
        with reader.autocast():
            for name, batches in (("data", data), ("val", val)):
                if batches is not None:
                    batch = first_batch(batches, reader, name)
                    processes.check_data(batch, name)
                    if name == "data":
                        begins = batch_facts(batch).cpu()
                    classes = check_batch(student, teacher, batch, name=name, hard_weight=config.hard_weight)
                    check_classes(classes, config)
                    if taps is not None:
                        with torch.no_grad():
                            taps.loss(config.feature_loss)

        answers = None
        if config.cache_teacher and not (found and found[0].finished):
            # As in the last epoch: so the answers are the same to the bit in every run, and what is not the same in
            # every epoch is found at the first step.
            items = read_epoch(data, epochs, 0, processes=Processes(), seed=config.seed, device=device)
            answers = KnownAnswers(teacher, (item.value for item in items), steps_per_epoch, reader)
        learner = Learner(student, teacher, config, processes, reader, taps, answers)
        if found is None:
            # Epoch 0: the student as it came.
            began = time.perf_counter()
            start = scored(student)
            progress = Progress(
                start=start, best=start, scores=start, seconds_per_validation=time.perf_counter() - began
            )
            progress.begins = tuple(begins.tolist())
            check_start(start, classes)
            if start is not None and not math.isfinite(start.loss):
                raise TrainingError(
                    "student gives scores on val that are NaN or infinite, before any training. Check its weights."
                )
            last = best = snapshot(student)
            if states is not None and processes.is_main:
                states.clear()
        else:
            progress, last, best = restore(found, learner, begins)
            log.info("%s", progress.line(epochs, steps_per_epoch))
        store(is_best=True)  # to the folder before any work is spent, or what a kill left out after the state

        # Until here there was nothing to write down; signals did what they always do.
        stop = stack.enter_context(watched_signals(watch=states is not None, alone=processes.count == 1))
        steps_before = (progress.epoch - 1) * steps_per_epoch + progress.step
        steps_timed = min(_STEPS_TIMED, steps_per_epoch - progress.step)
        settled = False  # whether what there is now is the state after a step
        journal = stack.enter_context(
            RunLog(
                folder if processes.is_main else None,
                tensorboard=config.tensorboard,
                steps=steps_before,
                epochs=len(progress.history),
            )
        )
        try:
            while not progress.finished:
                epoch, step = progress.epoch, progress.step - 1
                rate = learning_rate(max(0, (epoch - 1) * steps_per_epoch + step), steps, config)
                began, examples_before, updates_before = time.perf_counter(), progress.examples, learner.updates
                learner.train()
                loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
                finite = torch.tensor(progress.step, device=device)  # steps that were

                for item in read_epoch(
                    data, epoch, progress.step, processes=processes, seed=config.seed, device=device
                ):
                    step, settled = item.step, False
                    done = (epoch - 1) * steps_per_epoch + step + 1
                    rate = learning_rate(done - 1, steps, config)
                    made = learner.step(item, rate, stop=bool(stop))
                    loss_sum += made.loss_sum
                    finite += made.finite
                    progress.examples += made.examples
                    look = done % steps_per_look == 0 or step + 1 == steps_per_epoch
                    if look and int(finite) <= step:
                        raise non_finite(epoch, step, int(finite), rate, item, learner, folder)
                    spent = time.perf_counter() - began
                    if look and (show or done % _STEPS_PER_ROW == 0):
                        loss, speed = float(loss_sum) / progress.examples, (progress.examples - examples_before) / spent
                        if show:
                            show(completed=done, epoch=epoch, loss=loss, rate=speed, val=scores_line(progress.scores))
                        if done % _STEPS_PER_ROW == 0:
                            journal.step(done, loss=loss, lr=rate, images_per_second=speed)
                    if done - steps_before == steps_timed and processes.is_main:
                        left = expected_seconds(
                            spent / steps_timed,
                            steps - done,
                            seconds_per_validation=progress.seconds_per_validation,
                            validations=epochs - epoch + 1,
                        )
                        log.info("this will take %s", expected_line(left, epochs - epoch + 1, steps_per_epoch))
                    learner.update()
                    progress.step, settled = step + 1, True
                    if look and int(made.stops):
                        remember()
                        processes.wait()  # the first one to go would take the others along
                        settled = False
                        raise stop.error()
                    if done % config.state_every == 0:
                        remember()

                if step < 0:
                    raise InputsError(
                        f"data yields no batch in epoch {epoch}. Pass something that can be iterated anew."
                    )
                if int(finite) <= step:
                    raise non_finite(epoch, step, int(finite), rate, item, learner, folder)
                if epoch == 1 and step + 1 != steps_per_epoch:
                    log.warning(
                        "data says that it has %d batches and yields %d: the learning rate follows the former",
                        steps_per_epoch,
                        step + 1,
                    )
                if learner.updates == updates_before and progress.examples > examples_before and processes.is_main:
                    log.warning(
                        "epoch %d taught nothing: in fp16 the gradients of every step were too large, or no numbers. "
                        "If this goes on, pass precision='fp32'",
                        epoch,
                    )
                trained = time.perf_counter()
                scores = scored(learner.kept, stop)
                progress.seconds_per_validation = time.perf_counter() - trained
                if not _is_healthy(learner, scores, batch):
                    raise diverged(f"after epoch={epoch}, lr={rate:.3g}", epoch, config, folder)
                settled = False
                last = snapshot(learner.kept)
                is_best = scores is None or progress.best is None or scores.rank > progress.best.rank
                if is_best:
                    best, progress.best, progress.best_epoch = last, scores, epoch
                record = Epoch(
                    epoch=epoch,
                    loss=float(loss_sum) / progress.examples,
                    lr=rate,
                    val_accuracy=scores.accuracy if scores else None,
                    val_agreement=scores.agreement if scores else None,
                    val_loss=scores.loss if scores else None,
                    seconds=time.perf_counter() - began,
                    images_per_second=(progress.examples - examples_before) / (trained - began),
                )
                progress.end_epoch(record, scores)
                loss_sum = torch.zeros(())
                waited = config.patience is not None and epoch - progress.best_epoch >= config.patience
                progress.finished = epoch == epochs or waited
                # In this order a kill leaves out nothing: who goes on drops rows after the state, and stores anew.
                journal.epoch((epoch - 1) * steps_per_epoch + step + 1, record, scores)
                remember()
                store(is_best=is_best)
                if processes.is_main:
                    log.info(epoch_line(record, epochs, scores))
                if waited and epoch < epochs:
                    log.info("no epoch was better on val than epoch %d: stopping after %d", progress.best_epoch, epoch)
                if stop and processes.count == 1:
                    raise stop.error()
        except NonFiniteLossError:  # what may have spoilt the student is taken back, complete epochs are not
            if states is not None and processes.is_main:
                states.rewind(progress.epoch)
            student.load_state_dict(last)
            raise
        except BaseException:  # by hand, or because the data cannot be read
            if settled:
                remember()
            if states is not None and states.exist and processes.is_main:
                log.warning("stopped: with resume=True (--resume) it goes on from %s", states.folder)
            student.load_state_dict(last)
            raise
        finally:
            learner.optimizer.zero_grad()

        student.load_state_dict(best)
        if progress.best_epoch == 0 and processes.is_main:
            log.warning(
                "no epoch was better on val than the start, which is kept; a lower lr than %g may help", config.lr
            )
    return Run(student, progress.history, progress.start, progress.best_epoch, folder)


def _steps_per_look(device: torch.device) -> int:
    """How often the loss is looked at.

    Reading a number from an accelerator makes it idle, so there it is not done every step. A diverged run
    that goes on for these few does no harm: the last good weights are put back either way.
    """
    return 1 if device.type == "cpu" else 20


def _is_healthy(learner: Learner, scores: Scores | None, batch: Batch) -> bool:
    """Whether a student still gives numbers: no loss has shown yet what the last step made of it."""
    if scores is not None:
        return math.isfinite(scores.loss)
    with evaluating(learner.kept), torch.no_grad(), learner.reader.autocast():
        return bool(torch.isfinite(learner.kept(batch.inputs)).all())
