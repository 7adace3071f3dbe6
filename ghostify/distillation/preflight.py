"""What is looked at before the first step, so that nothing is found out after hours."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ghostify.distillation.batches import Batch, Reader, check_labels
from ghostify.distillation.config import DistillConfig
from ghostify.distillation.history import Scores
from ghostify.errors import InputsError, OptionError, TrainingError, first_line
from ghostify.nn.ghost import GhostConv
from ghostify.tracing.example import require_module
from ghostify.tracing.running import evaluating

# Labels from which on a teacher that does no better than a guess is no accident.
_ENOUGH_LABELS = 200
# Fewer answers choose the best epoch by chance.
_FEW_ANSWERS = 100
# A loss that rounding alone may leave.
_NOTHING = 1e-8

log = logging.getLogger(__name__)


def check_models(student: nn.Module, teacher: nn.Module, epochs: int, precision: str) -> None:
    """See that there is something to train, and that training it leaves the teacher alone.

    Raises:
        InputsError: One of them is no module.
        OptionError: ``epochs`` is not a whole number of at least 1, or ``precision`` does not suit the weights.
        TrainingError: The two are one model, share tensors, or are on different devices; or nothing is trainable.
    """
    require_module(student, "student")
    require_module(teacher, "teacher")
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise OptionError(f"epochs={epochs!r} must be a whole number of at least 1. Pass, for example, epochs=10.")
    if student is teacher:
        raise TrainingError(
            "student is teacher: a model has nothing to learn from itself. "
            "Pass the converted model as student and the original as teacher."
        )
    for role, model in (("student", student), ("teacher", teacher)):
        state = (*model.named_parameters(), *model.named_buffers())
        lazy = [name for name, value in state if isinstance(value, UninitializedParameter | UninitializedBuffer)]
        if lazy:
            raise TrainingError(f"{role}'s {lazy[0]!r} is lazy and has no shape yet. Run {role} once on real inputs.")
    parameters = dict(student.named_parameters())
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    if not trainable:
        raise TrainingError(
            f"student ({type(student).__name__}) has {len(parameters)} parameters and none with requires_grad=True. "
            "Call student.requires_grad_(True)."
        )
    units = {name: module for name, module in student.named_modules() if isinstance(module, GhostConv)}
    frozen = [name for name, unit in units.items() if not any(p.requires_grad for p in unit.parameters())]
    if frozen:
        log.warning(
            "%d of %d Ghost units of student do not learn, as the layers that they replace were frozen (%r is the "
            "first). student.requires_grad_(True) lets them",
            len(frozen),
            len(units),
            frozen[0],
        )
    halves = {name: p.dtype for name, p in trainable.items() if p.dtype in (torch.float16, torch.bfloat16)}
    if precision == "fp16" and halves:
        name, dtype = next(iter(halves.items()))
        raise OptionError(
            f"precision='fp16' computes in half precision from full weights, and student's {name!r} is {dtype}. Pass "
            "both models as .float(), or precision='fp32', which leaves the kind of numbers to the models."
        )
    written = {**trainable, **{name: b for name, b in student.named_buffers() if b.is_floating_point()}}
    owned = {_memory(tensor) for tensor in (*teacher.parameters(), *teacher.buffers()) if tensor.numel()}
    shared = [name for name, tensor in written.items() if tensor.numel() and _memory(tensor) in owned]
    if shared:
        raise TrainingError(
            f"student shares {len(shared)} tensors with teacher (the first is {shared[0]!r}), so training would "
            "change the teacher. Pass copy.deepcopy(student)."
        )
    devices = {str(p.device) for model in (student, teacher) for p in model.parameters()}
    if len(devices) > 1:
        raise TrainingError(
            f"student and teacher lie on several devices: {', '.join(sorted(devices))}. Move both to one with .to(...)."
        )


def check_storable(student: nn.Module) -> None:
    """See that the state of a student can be written to files.

    Raises:
        TrainingError: It cannot.
    """
    tensors = {name: value for name, value in student.state_dict().items() if isinstance(value, Tensor)}
    sparse = [name for name, value in tensors.items() if value.layout is not torch.strided]
    if sparse:
        raise TrainingError(
            f"student's state holds {sparse[0]!r}, a sparse tensor, which safetensors files do not know. Register it "
            "with persistent=False, or pass out=None."
        )


def check_batch(student: nn.Module, teacher: nn.Module, batch: Batch, *, name: str, config: DistillConfig) -> int:
    """Run both models once and see that their answers can be compared with each other and with the labels.

    Args:
        student: Run in evaluation mode; left as found.
        teacher: The same.
        batch: The first one.
        name: ``data`` or ``val``, for messages.
        config: Labels are needed where ``hard_weight`` is above 0, and are not looked at in ``data`` where it is 0.

    Returns:
        How many classes the models tell apart.

    Raises:
        TrainingError: A model does not run, gives no class scores, or scores of another shape than the other.
        OptionError: ``hard_weight`` asks for labels that are not there, or the loss is no function of two tensors and a
            number that gives one number.
        InputsError: Labels that do not fit the scores.
    """
    wanted = _scores(teacher, batch.inputs, f"teacher ({type(teacher).__name__})", name)
    scores = _scores(student, batch.inputs, f"student ({type(student).__name__})", name)
    if scores.shape != wanted.shape:
        raise TrainingError(
            f"student gives scores of shape {tuple(scores.shape)} and teacher {tuple(wanted.shape)} for the same "
            f"inputs {tuple(batch.inputs.shape)}. Pass models with the same classes."
        )
    if not bool(torch.isfinite(wanted).all()):
        raise TrainingError(
            f"teacher ({type(teacher).__name__}) gives scores that are not finite on the first batch of {name}. "
            "Check its weights and the normalisation of the inputs, or pass precision='fp32'."
        )
    if not bool(torch.isfinite(scores).all()):
        raise TrainingError(
            f"student ({type(student).__name__}) gives scores that are not finite on the first batch of {name}, before "
            "any training. Check its weights, or convert the original anew."
        )
    if callable(config.loss):
        # As it is called: outside autocast, and in training with gradients.
        with torch.autocast(scores.device.type, enabled=False), torch.set_grad_enabled(name == "data"):
            _check_loss(scores.detach().clone().requires_grad_(name == "data"), wanted, config)
    if name == "data" and config.hard_weight == 0:
        return scores.shape[1]
    if batch.labels is not None:
        check_labels(batch.labels, scores, name)
    elif name == "data":
        raise OptionError(
            f"hard_weight={config.hard_weight} needs labels, and data yields none that are whole numbers. "
            "Pass hard_weight=0, or batches (input, class ids)."
        )
    return scores.shape[1]


def _check_loss(scores: Tensor, wanted: Tensor, config: DistillConfig) -> None:
    told = config.settings()["loss"]
    try:
        loss = config.loss_function(scores, wanted, config.temperature)
    except Exception as error:  # whatever a user's function raises
        raise OptionError(
            f"loss={told!r} does not run on class scores {tuple(scores.shape)} of student and teacher and the "
            f"temperature: {first_line(error).rstrip('.')}. Pass a function of these three."
        ) from error
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        made = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise OptionError(
            f"loss={told!r} gives {made}, and one number for the whole batch is needed, as a tensor. Take its mean."
        )


def check_classes(classes: int, config: DistillConfig) -> None:
    """See that there is something to learn from the class scores.

    Args:
        classes: How many the models tell apart.
        config: Its ``loss`` counts.

    Raises:
        OptionError: The loss compares probabilities, and that of the only class is 1 whatever the models say.
    """
    if classes == 1 and config.loss in ("kd", "dist"):
        raise OptionError(
            f"loss={config.loss!r} compares how probable classes are, and these models give one score, (n, 1, ...): "
            "it would be 0 from the first step, and nothing learned. Pass loss='mse'."
        )


def check_start(start: Scores | None, classes: int) -> None:
    """See that the teacher knows better than a guess what the labels of the validation data say.

    A student that answers as the teacher does already is told of, as it may be a copy that was never converted; and
    so are labels that are too few to choose an epoch by.

    Args:
        start: The scores before the first step.
        classes: Among which is guessed.

    Raises:
        TrainingError: It is not two standard deviations better, on at least 200 labels.
    """
    if start is not None and start.agreement in (1, None) and abs(start.loss) < _NOTHING:
        log.warning("student answers val exactly as teacher does: is it a converted model? There is nothing to learn")
    if start is not None and start.labelled and start.labelled < _FEW_ANSWERS:
        log.warning(
            "val has labels for %d answers: accuracies on so few are off by %.0f points (one standard deviation, at "
            "most), and choose the best epoch by chance. Hold out more, or pass val=None to keep the last one",
            start.labelled,
            50 / math.sqrt(start.labelled),
        )
    if start is None or start.teacher_accuracy is None or start.labelled < _ENOUGH_LABELS:
        return
    guess = 1 / classes
    luck = 2 * math.sqrt(guess * (1 - guess) / start.labelled)
    if start.teacher_accuracy <= guess + luck:
        raise TrainingError(
            f"teacher is right on {100 * start.teacher_accuracy:.1f} % of {start.labelled:,} answers of val, and "
            f"guessing is on {100 * guess:.1f} %. Check that the inputs are normalised as the teacher expects, that "
            "its weights are loaded, and that the labels count classes as it does; or give val without labels."
        )


def first_batch(data: Iterable[Any], reader: Reader, name: str) -> Batch:
    """Read one batch.

    Raises:
        InputsError: There is none, or it cannot be read.
    """
    for item in data:
        batch = reader.read(item, name)
        target = item[1] if isinstance(item, tuple | list) and len(item) == 2 else None
        if name == "val" and target is not None and batch.labels is None:
            log.warning(
                "val yields targets that are no class ids (%s): they are left alone, and epochs are compared by how "
                "far the student answers as the teacher does. Class ids are whole numbers",
                getattr(target, "dtype", type(target).__name__),
            )
        return batch
    raise InputsError(f"{name} is empty: it has a length but yields no batch. Check its sampler.")


def _scores(model: nn.Module, inputs: Tensor, role: str, name: str) -> Tensor:
    with evaluating(model), torch.no_grad(), explained(role, inputs, name):
        scores = model(inputs)
    if not isinstance(scores, Tensor) or not scores.is_floating_point() or scores.dim() < 2:
        shape = f" of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else ""
        raise TrainingError(
            f"{role} gives a {type(scores).__name__}{shape}; class scores (n, classes, ...) are needed. "
            "Wrap it in a module whose forward returns them."
        )
    return scores


@contextmanager
def explained(role: str, inputs: Tensor, name: str) -> Iterator[None]:
    """Turn whatever a model's forward raises into a TrainingError that names model and batch.

    Args:
        role: Which model.
        inputs: What it is run on.
        name: ``data`` or ``val``.
    """
    try:
        yield
    except OptionError:  # not the model's
        raise
    except Exception as error:
        raise TrainingError(
            f"{role} does not run on a batch of {name} of shape {tuple(inputs.shape)}: "
            f"{first_line(error).rstrip('.')}. Pass inputs that the model accepts."
        ) from error


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)
