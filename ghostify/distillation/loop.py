"""The training loop: epochs of steps, and what is written down between them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ghostify.distillation.batches import Batch
from ghostify.distillation.checkpoint import State, snapshot, write_history, write_weights
from ghostify.distillation.failures import diverged, is_healthy, non_finite
from ghostify.distillation.history import Epoch, Scores
from ghostify.distillation.learning import Learner
from ghostify.distillation.logs import RunLog, expected_line, expected_seconds
from ghostify.distillation.optimisation import learning_rate
from ghostify.distillation.preflight import check_start
from ghostify.distillation.processes import Item, batch_facts, read_epoch
from ghostify.distillation.progress import epoch_line, scores_line
from ghostify.distillation.resuming import Found, States, restore
from ghostify.distillation.state import Progress
from ghostify.distillation.stopping import Stop
from ghostify.distillation.validation import validate
from ghostify.errors import InputsError, NonFiniteLossError, TrainingError

log = logging.getLogger(__name__)

# Steps between two rows of the log, and those that are timed to foretell how long the run will take.
_STEPS_PER_ROW = _STEPS_TIMED = 20


@dataclass
class _Tally:
    """What an epoch has come to so far.

    Attributes:
        loss_sum: Of its examples.
        finite: Steps whose loss and gradient were numbers, on the device.
        examples_before: That were done when it was begun or gone on with; what is timed is what came after.
        updates_before: The same, of updates.
        began: When that was.
        step: The last one, from 0; -1 before the first.
        rate: The learning rate of that one.
    """

    loss_sum: Tensor
    finite: Tensor
    examples_before: int
    updates_before: int
    began: float
    step: int
    rate: float


class Loop:
    """A run from its first step, or from where it was stopped, to its end.

    ``begin`` or ``resume`` come first, then ``run``.

    Args:
        learner: The student with all that it learns with.
        teacher: In evaluation mode.
        data: Gone through every epoch.
        val: Scores the student after each; ``None`` does without.
        epochs: Of the whole run.
        steps_per_epoch: Batches in each.
        first: The first batch of ``data``.
        folder: For the checkpoints, if there are to be any.
        states: The states in it.
        show: Is told how far the run is, if anybody watches.
    """

    progress: Progress
    last: State  # of the last complete epoch
    best: State
    tally: _Tally
    journal: RunLog
    stop: Stop

    def __init__(
        self,
        learner: Learner,
        teacher: nn.Module,
        data: Iterable[Any],
        val: Iterable[Any] | None,
        *,
        epochs: int,
        steps_per_epoch: int,
        first: Batch,
        folder: Path | None,
        states: States | None,
        show: Callable[..., Any] | None,
    ) -> None:
        self.learner, self.teacher, self.data, self.val = learner, teacher, data, val
        self.epochs, self.steps_per_epoch, self.first = epochs, steps_per_epoch, first
        self.folder, self.states, self.show = folder, states, show
        self.student, self.config, self.processes = learner.student, learner.config, learner.processes
        self.device = learner.reader.device
        self.steps_per_look = _steps_per_look(self.device)
        self.steps = epochs * steps_per_epoch

    def begin(self, classes: int) -> None:
        """Score the student as it came, which is epoch 0.

        Args:
            classes: That the models tell apart.

        Raises:
            TrainingError: Its scores are no numbers, or the teacher's are no better than a guess.
        """
        began = time.perf_counter()
        start = self._scores(self.student)
        self.progress = Progress(
            start=start,
            best=start,
            scores=start,
            seconds_per_validation=time.perf_counter() - began,
            begins=tuple(batch_facts(self.first).tolist()),
        )
        check_start(start, classes)
        if start is not None and not math.isfinite(start.loss):
            raise TrainingError(
                "student gives scores on val that are NaN or infinite, before any training. Check its weights."
            )
        self.last = self.best = snapshot(self.student)
        if self.states is not None and self.processes.is_main:
            self.states.clear()
        self._store(is_best=True)  # to the folder before any work is spent

    def resume(self, found: Found) -> None:
        """Put everything where a run was."""
        self.progress, self.last, self.best = restore(found, self.learner, batch_facts(self.first).cpu())
        log.info("%s", self.progress.line(self.epochs, self.steps_per_epoch))
        self._store(is_best=True)  # what a kill left out after the state

    @property
    def steps_done(self) -> int:
        """Of all epochs."""
        return (self.progress.epoch - 1) * self.steps_per_epoch + self.progress.step

    def run(self, journal: RunLog, stop: Stop) -> None:
        """Go through the epochs that are left; the student ends with its best weights, or after an error its last.

        Args:
            journal: Is told of steps and epochs.
            stop: Looked at between steps.
        """
        self.journal, self.stop = journal, stop
        self.steps_before = self.steps_done
        self.settled = False  # whether what there is now is the state after a step
        try:
            while not self.progress.finished:
                self._train()
                self._end_epoch()
        except NonFiniteLossError:  # what may have spoilt the student is taken back, complete epochs are not
            if self.states is not None and self.processes.is_main:
                self.states.rewind(self.progress.epoch)
            self.student.load_state_dict(self.last)
            raise
        except BaseException:  # by hand, or because the data cannot be read
            if self.settled:
                self._remember()
            if self.states is not None and self.states.exist and self.processes.is_main:
                log.warning("stopped: with resume=True (--resume) it goes on from %s", self.states.folder)
            self.student.load_state_dict(self.last)
            raise
        finally:
            self.learner.optimizer.zero_grad()
        self.student.load_state_dict(self.best)

    def _train(self) -> None:
        """Take the steps of an epoch that are left."""
        progress, learner = self.progress, self.learner
        self.tally = tally = _Tally(
            loss_sum=torch.tensor(progress.loss_sum, dtype=torch.float64, device=self.device),
            finite=torch.tensor(progress.step, device=self.device),
            examples_before=progress.examples,
            updates_before=learner.updates,
            began=time.perf_counter(),
            step=progress.step - 1,
            rate=learning_rate(max(0, self.steps_done - 1), self.steps, self.config),
        )
        learner.train()
        item = None  # there may be no step left
        for item in read_epoch(
            self.data,
            progress.epoch,
            progress.step,
            processes=self.processes,
            seed=self.config.seed,
            device=self.device,
        ):
            self._step(item)
        if tally.step < 0:
            raise InputsError(
                f"data yields no batch in epoch {progress.epoch}. Pass something that can be iterated anew."
            )
        if item is not None:
            self._check_finite(item)
        if progress.epoch == 1 and tally.step + 1 != self.steps_per_epoch:
            log.warning(
                "data says that it has %d batches and yields %d: the learning rate follows the former",
                self.steps_per_epoch,
                tally.step + 1,
            )
        learned = learner.updates > tally.updates_before or progress.examples == tally.examples_before
        if not learned and self.processes.is_main:
            log.warning(
                "epoch %d taught nothing: in fp16 the gradients of every step were too large, or no numbers. "
                "If this goes on, pass precision='fp32'",
                progress.epoch,
            )

    def _step(self, item: Item) -> None:
        """Learn from one batch."""
        progress, tally = self.progress, self.tally
        self.settled = False
        tally.step = item.step
        done = (progress.epoch - 1) * self.steps_per_epoch + item.step + 1
        tally.rate = learning_rate(done - 1, self.steps, self.config)
        made = self.learner.step(item, tally.rate, stop=bool(self.stop))
        tally.loss_sum += made.loss_sum
        tally.finite += made.finite
        progress.examples += made.examples
        look = done % self.steps_per_look == 0 or item.step + 1 == self.steps_per_epoch
        if look:
            self._check_finite(item)
        self._tell(done, look=look)
        self.learner.update()
        progress.step, self.settled = item.step + 1, True
        if look and int(made.stops):
            self._remember()
            self.processes.wait()  # the first one to go would take the others along
            self.settled = False
            raise self.stop.error()
        if done % self.config.state_every == 0:
            self._remember()

    def _check_finite(self, item: Item) -> None:
        """See that all steps gave numbers.

        Raises:
            NonFiniteLossError: One did not.
        """
        finite, tally, epoch = int(self.tally.finite), self.tally, self.progress.epoch
        if finite <= tally.step:
            raise non_finite(epoch, tally.step, finite, tally.rate, item, self.learner, self.teacher, self.folder)

    def _tell(self, done: int, *, look: bool) -> None:
        """Show a step and write it down, where it is time to; foretell once how long the run will take."""
        progress, tally = self.progress, self.tally
        spent = time.perf_counter() - tally.began
        row = done % _STEPS_PER_ROW == 0
        if look and (self.show or row):
            loss, speed = float(tally.loss_sum) / progress.examples, (progress.examples - tally.examples_before) / spent
            if self.show:
                self.show(completed=done, epoch=progress.epoch, loss=loss, rate=speed, val=scores_line(progress.scores))
            if row:
                self.journal.step(done, loss=loss, lr=tally.rate, images_per_second=speed)
        steps_timed = min(_STEPS_TIMED, self.steps_per_epoch - self.steps_before % self.steps_per_epoch)
        if done - self.steps_before == steps_timed and self.processes.is_main:
            epochs_left = self.epochs - progress.epoch + 1
            left = expected_seconds(
                spent / steps_timed,
                self.steps - done,
                seconds_per_validation=progress.seconds_per_validation,
                validations=epochs_left,
            )
            log.info("this will take %s", expected_line(left, epochs_left, self.steps_per_epoch))

    def _end_epoch(self) -> None:
        """Score the student and write the epoch down."""
        progress, epoch, learner, tally = self.progress, self.progress.epoch, self.learner, self.tally
        trained = time.perf_counter()
        scores = self._scores(learner.kept, self.stop)
        progress.seconds_per_validation = time.perf_counter() - trained
        if not is_healthy(learner, scores, self.first):
            raise diverged(f"after epoch={epoch}, lr={tally.rate:.3g}", epoch, self.config, self.folder)
        self.settled = False
        self.last = snapshot(learner.kept)
        is_best = scores is None or progress.best is None or scores.rank > progress.best.rank
        if is_best:
            self.best, progress.best, progress.best_epoch = self.last, scores, epoch
        record = Epoch(
            epoch=epoch,
            loss=float(tally.loss_sum) / progress.examples,
            lr=tally.rate,
            val_accuracy=scores.accuracy if scores else None,
            val_agreement=scores.agreement if scores else None,
            val_loss=scores.loss if scores else None,
            seconds=time.perf_counter() - tally.began,
            images_per_second=(progress.examples - tally.examples_before) / (trained - tally.began),
        )
        progress.end_epoch(record, scores)
        tally.loss_sum.zero_()
        waited = self.config.patience is not None and epoch - progress.best_epoch >= self.config.patience
        progress.finished = epoch == self.epochs or waited
        # In this order a kill leaves out nothing: who goes on drops rows after the state, and stores anew.
        self.journal.epoch((epoch - 1) * self.steps_per_epoch + tally.step + 1, record, scores)
        self._remember()
        self._store(is_best=is_best)
        if self.processes.is_main:
            log.info(epoch_line(record, self.epochs, scores))
        if waited and epoch < self.epochs:
            log.info("no epoch was better on val than epoch %d: stopping after %d", progress.best_epoch, epoch)
        if self.stop and self.processes.count == 1:
            raise self.stop.error()

    def _scores(self, model: nn.Module, stop: Stop | None = None) -> Scores | None:
        self.processes.agree(model)
        if self.val is None:
            return None
        return validate(
            model,
            teacher=self.teacher,
            val=self.val,
            reader=self.learner.reader,
            loss=lambda scores, wanted: self.config.loss_function(scores, wanted, self.config.temperature),
            processes=self.processes,
            stop=stop,
        )

    def _store(self, *, is_best: bool) -> None:
        """Write what others read."""
        if self.folder is not None and self.processes.is_main:
            write_weights(self.folder / "last.safetensors", self.last)
            if is_best:
                write_weights(self.folder / "best.safetensors", self.best)
            write_history(self.folder / "history.json", progress=self.progress, config=self.config)

    def _remember(self) -> None:
        """Write what the run goes on from."""
        if self.states is not None and self.processes.is_main:
            self.progress.loss_sum = float(self.tally.loss_sum)
            self.states.write(self.progress, self.learner, last=self.last, best=self.best)


def _steps_per_look(device: torch.device) -> int:
    """How often the loss is looked at.

    Reading a number from an accelerator makes it idle, so there it is not done every step. A diverged run
    that goes on for these few does no harm: the last good weights are put back either way.
    """
    return 1 if device.type == "cpu" else 20
