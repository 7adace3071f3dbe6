"""A student learns to answer like its teacher: `distill` checks what it is given, and lets the loop run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ghostify.backends.memory import retained_memory
from ghostify.distillation.answers import KnownAnswers
from ghostify.distillation.batches import Reader, count_batches, laid_out
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.features import FeatureTaps
from ghostify.distillation.history import Run
from ghostify.distillation.learning import Learner, synchronised_norms
from ghostify.distillation.logs import RunLog
from ghostify.distillation.loop import Loop
from ghostify.distillation.optimisation import settled_precision
from ghostify.distillation.preflight import check_batch, check_classes, check_models, check_storable, first_batch
from ghostify.distillation.processes import Processes, begin_epoch, launched, read_epoch
from ghostify.distillation.progress import progress_bar
from ghostify.distillation.randomness import preserved_random_state
from ghostify.distillation.recording import check_recording
from ghostify.distillation.resuming import States, find_state
from ghostify.distillation.stopping import watched_signals
from ghostify.errors import OptionError
from ghostify.tracing.running import evaluating

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
    the very weights that it would have had. For that, data of your own must yield batches in an order that depends on
    the epoch's number or on torch's, NumPy's or Python's global random numbers alone.

    Started by ``torchrun`` or ``accelerate launch``, each of several processes calls this with models on its
    own device and with the same data (no DistributedSampler); it learns from its rows of every batch, so the batch size
    is that of all of them together. What looks at several rows at once sees those of its own process: batch norms,
    MixUp, ``loss="dist"`` and the features' ``"mse"``.

    Args:
        student: Gives class scores ``(n, classes, ...)``. Parameters with ``requires_grad=False`` stay as they are
            (the statistics of norms do with ``freeze_norms`` alone).
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
    if folder is not None:
        check_storable(student)
    parameter = next(parameter for parameter in student.parameters() if parameter.requires_grad)
    device = parameter.device
    with preserved_random_state(device):  # what has no length is gone through, and may draw
        steps_per_epoch = count_batches(data, "data")
        batches_of_val = None if val is None else count_batches(val, "val")
    if val is None and config.patience is not None:
        raise OptionError(f"patience={config.patience} needs validation data. Pass val, or patience=None.")
    processes = launched(device)
    # Settled before it is written down: where the run goes on, a machine that computes otherwise is told of.
    config = replace(config, precision=settled_precision(config.precision, device))
    check_recording(config, processes, device)
    reader = Reader(device, parameter.dtype, config.channels_last, config.precision)
    states = (
        None if folder is None else States(folder, student, teacher, epochs, steps_per_epoch, batches_of_val, config)
    )
    found = find_state(states, resume=resume)
    processes.check_position(*((found[0].epoch, found[0].step) if found else (1, 0)), device)

    with ExitStack() as stack:
        stack.enter_context(preserved_random_state(device))
        stack.enter_context(retained_memory(device))
        stack.enter_context(synchronised_norms(student, wanted=config.sync_norms, device=device))
        stack.enter_context(evaluating(student, teacher))  # also gives the flags back at the end
        stack.enter_context(torch.enable_grad())
        stack.enter_context(laid_out(student, teacher, wanted=reader.channels_last and device.type == "cuda"))
        taps = stack.enter_context(FeatureTaps(student, teacher, config.features)) if config.features else None
        show = stack.enter_context(
            progress_bar(config.progress if processes.is_main else False, epochs, epochs * steps_per_epoch)
        )
        begin_epoch(data, 1, seed=config.seed, device=device)
        with reader.autocast():
            for name, batches in (("data", data), ("val", val)):
                if batches is not None:
                    batch = first_batch(batches, reader, name)
                    processes.check_data(batch, name)
                    if name == "data":
                        first = batch
                    classes = check_batch(student, teacher, batch, name=name, config=config)
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
        loop = Loop(
            Learner(student, teacher, config, processes, reader, taps, answers),
            teacher,
            data,
            val,
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            first=first,
            folder=folder,
            states=states,
            show=show,
        )
        if found is None:
            loop.begin(classes)
        else:
            loop.resume(found)
        # Until here there was nothing to write down; signals did what they always do.
        stop = stack.enter_context(watched_signals(watch=states is not None, alone=processes.count == 1))
        journal = stack.enter_context(
            RunLog(
                folder if processes.is_main else None,
                tensorboard=config.tensorboard,
                steps=loop.steps_done,
                epochs=len(loop.progress.history),
            )
        )
        loop.run(journal, stop)
        done = loop.progress
        if done.best_epoch == 0 and processes.is_main:
            log.warning(
                "no epoch was better on val than the start, which is kept; a lower lr than %g may help", config.lr
            )
    return Run(student, done.history, done.start, done.best_epoch, folder)
