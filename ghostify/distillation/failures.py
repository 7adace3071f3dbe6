"""A student that stopped giving numbers: how it is noticed, and what is said of it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from ghostify.distillation.batches import Batch
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.history import Scores
from ghostify.distillation.learning import Learner
from ghostify.distillation.processes import Item
from ghostify.errors import NonFiniteLossError
from ghostify.tracing.running import evaluating


def is_healthy(learner: Learner, scores: Scores | None, batch: Batch) -> bool:
    """Whether a student still gives numbers: no loss has shown yet what the last step made of it."""
    if scores is not None:
        return math.isfinite(scores.loss)
    with evaluating(learner.kept), torch.no_grad(), learner.reader.autocast():
        return bool(torch.isfinite(learner.kept(batch.inputs)).all())


def non_finite(
    epoch: int,
    step: int,
    first: int,
    rate: float,
    item: Item,
    learner: Learner,
    teacher: nn.Module,
    folder: Path | None,
) -> NonFiniteLossError:
    """Say what went wrong at step ``first``, seen at ``step``; the batch at hand is to blame only if they are one."""
    config, inputs = learner.config, learner.reader.read(item.value, "data").inputs
    with torch.no_grad(), learner.reader.autocast():
        wanted = teacher(inputs)
    if step == first and not bool(torch.isfinite(inputs).all()):
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


def diverged(when: str, epoch: int, config: DistillConfig, folder: Path | None) -> NonFiniteLossError:
    """Say what became of a run whose last step broke the student."""
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
    if folder is None:
        return f"The student holds {state}."
    onward = " With resume=True the run goes on from there." if epoch > 1 else ""
    return f"The student holds {state} and so does {str(folder / 'last.safetensors')!r}.{onward}"
