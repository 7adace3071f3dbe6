"""What the student is to make inside: the teacher's maps, layer by layer.

A Ghost unit stands under the name of the convolution that it replaces and gives maps of the same
shape, so every replaced site has a twin in the teacher. [FeatureTaps][ghostify.distillation.FeatureTaps]
listens to both and compares them; labels are never needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghostify.errors import OptionError, TrainingError
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Plan
from ghostify.tracing.example import unwrapped

FeatureLoss = Callable[[Tensor, Tensor], Tensor]


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """The share of the teacher's map that the student's misses: ``‖s - t‖² / ‖t - mean(t)‖²``.

    It is 0 where both are equal and 1 for a student that gives the teacher's mean everywhere, however
    large the maps of a layer are. To the variance of one number, 1e-5 is added, as batch norms do, so
    that a teacher's map that is constant does no harm.

    Args:
        student: Outputs ``(n, c, ...)`` of a layer.
        teacher: Outputs of the same shape.

    Returns:
        A float32 scalar.

    Example:
        >>> maps = torch.tensor([[[0.0, 2.0]]])
        >>> round(feature_mse(torch.ones(1, 1, 2), maps).item(), 4)
        1.0
    """
    wanted = teacher.float()
    return F.mse_loss(student.float(), wanted) / (wanted.var(correction=0) + 1e-5)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """How far apart two layers are in *where* they respond, whatever their channels are.

    Zagoruyko and Komodakis 2017, arXiv 1612.03928, §3.1: the attention map is the sum over the channels
    of the squares, ``Q = vec(Σ A_c²)``; the loss is ``‖Q_s / ‖Q_s‖₂ - Q_t / ‖Q_t‖₂‖₂`` (eq. 2, with
    p = 2 and without β/2), mean over the examples. Maps of one position have but one attention, so their loss is 0.

    Args:
        student: Maps ``(n, c, ...)`` of a layer, with at least one dimension of positions.
        teacher: Maps ``(n, channels, ...)`` with the same positions.

    Returns:
        A float32 scalar between 0 and √2.

    Raises:
        OptionError: There are no positions.

    Example:
        >>> left, right = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
        >>> round(attention_transfer(left, right).item(), 4), attention_transfer(2 * left, left).item()
        (1.4142, 0.0)
    """
    if student.dim() < 3:
        raise OptionError(
            f"feature_loss='attention' compares positions, and outputs of shape {tuple(student.shape)} have none. "
            "Name layers that give maps (n, c, ...), or pass feature_loss='mse'."
        )
    apart: Tensor = torch.linalg.vector_norm(_attention(student) - _attention(teacher), dim=1)
    return apart.mean()


def _attention(maps: Tensor) -> Tensor:
    """``(n, c, ...)`` as ``(n, positions)``, each row of length 1."""
    return F.normalize(maps.float().square().sum(dim=1).flatten(start_dim=1), dim=1)


FEATURE_LOSSES: dict[str, FeatureLoss] = {"mse": feature_mse, "attention": attention_transfer}
# Those that give the same whatever order the channels are in.
ORDERLESS: set[FeatureLoss] = {attention_transfer}


@dataclass(frozen=True)
class _Tap:
    """A layer of the student, its twin in the teacher, and what both gave in the last forward, call by call."""

    name: str
    student: nn.Module
    teacher: nn.Module
    given: list[Any] = field(default_factory=list)
    wanted: list[Any] = field(default_factory=list)


class FeatureTaps:
    """Listens to layers of student and teacher, and compares what both gave for the same batch.

    Hooks are on the modules between ``with`` and its end, also if that is an error. What a forward gave is
    held until ``loss``, ``clear`` or the next forward of the same model. Run the teacher and the student
    once each, in any order, then ask for the loss.

    Ghost units are compared in the original's channel order, also where theirs is folded into the layers
    that follow. A unit of placement ``paper`` holds its norm, so its twin is the teacher's norm. Layers that
    are called several times are compared call by call.

    With ``torch.compile`` enter the ``with`` first, compile then, and stay inside it for the whole run:
    a compiled model keeps the hooks that it was compiled with, and does not learn of others.

    Args:
        student: The network; a wrapper of torch's (``DistributedDataParallel``, ``torch.compile``) may be around it.
        teacher: The same.
        features: ``"sites"`` (every Ghost unit of the student) or names of modules that are in both.

    Raises:
        OptionError: ``features`` names nothing, or a module that one of the two lacks.
        TrainingError: There is no Ghost unit, or a unit's twin in the teacher cannot be told.

    Example:
        >>> from ghostify import convert
        >>> from ghostify.nn.cifar import resnet20
        >>> teacher, x = resnet20(), torch.randn(4, 3, 32, 32)
        >>> student = convert(teacher, ratio=2, example_inputs=x)
        >>> with FeatureTaps(student, teacher) as taps:
        ...     wanted, output = teacher(x), student(x)
        ...     taps.loss("mse").backward()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, features: str | Sequence[str] = "sites") -> None:
        self._student, self._teacher = unwrapped(student), unwrapped(teacher)
        names = _units(self._student) if features == "sites" else (features,) if isinstance(features, str) else features
        if not names:
            raise OptionError(f"features={features!r} names no layer. Pass 'sites' or names of modules.")
        self._taps = [_tap(name, self._student, self._teacher) for name in names]
        modules = (*self._student.modules(), *self._teacher.modules())
        self._has_folded = any(isinstance(m, GhostConv) and m.output_channels is not None for m in modules)
        self._hooks = ExitStack()

    def __enter__(self) -> FeatureTaps:
        for model, forget in ((self._student, self._forget_given), (self._teacher, self._forget_wanted)):
            # A plain function: a copy of the model would copy a method with all that it belongs to, the teacher too.
            self._hooks.callback(model.register_forward_pre_hook(lambda *_, forget=forget: forget()).remove)
        for tap in self._taps:
            self._hooks.callback(tap.student.register_forward_hook(_keeper(tap.student, tap.given)).remove)
            self._hooks.callback(tap.teacher.register_forward_hook(_keeper(tap.teacher, tap.wanted)).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()
        self.clear()

    def clear(self) -> None:
        """Forget what the last forwards gave."""
        self._forget_given()
        self._forget_wanted()

    def loss(self, feature_loss: str | FeatureLoss = "mse") -> Tensor:
        """Compare what both gave, and forget it.

        Args:
            feature_loss: A name in ``FEATURE_LOSSES``, or a function of the student's and the teacher's output of
                one layer that gives a scalar. The teacher's has no gradient.

        Returns:
            The mean over the layers, and over each layer's calls before: a float32 scalar.

        Raises:
            OptionError: The loss is unknown, or compares channels of layers whose order of channels is not known.
            TrainingError: A layer did not run, did not run equally often in both, or gave what cannot be compared.
        """
        if isinstance(feature_loss, str) and feature_loss not in FEATURE_LOSSES:
            raise OptionError(
                f"feature_loss={feature_loss!r} is unknown. Pass {', '.join(map(repr, FEATURE_LOSSES))} or a function "
                "of (student, teacher)."
            )
        compare = FEATURE_LOSSES[feature_loss] if isinstance(feature_loss, str) else feature_loss
        try:
            return torch.stack([self._compared(tap, compare) for tap in self._taps]).mean()
        finally:
            self.clear()

    def _compared(self, tap: _Tap, compare: FeatureLoss) -> Tensor:
        if self._has_folded and compare not in ORDERLESS and not isinstance(tap.student, GhostConv):
            raise OptionError(
                f"features={tap.name!r} cannot be compared channel by channel: Ghost units have folded their channel "
                "order into the layers around it. Pass feature_loss='attention', name Ghost units, or pass "
                "features='sites'."
            )
        if not tap.given or len(tap.given) != len(tap.wanted):
            raise TrainingError(
                f"features={tap.name!r} ran {len(tap.given)} times in student and {len(tap.wanted)} times in teacher. "
                "Run both once inside the `with`, on the same batch; compile a model inside it; name layers that run."
            )
        calls = zip(tap.given, tap.wanted, strict=True)
        return torch.stack([compare(*_comparable(tap, given, wanted)) for given, wanted in calls]).mean()

    def _forget_given(self, *_: object) -> None:
        for tap in self._taps:
            tap.given.clear()

    def _forget_wanted(self, *_: object) -> None:
        for tap in self._taps:
            tap.wanted.clear()


def _units(student: nn.Module) -> list[str]:
    names = [name for name, module in student.named_modules() if isinstance(module, GhostConv)]
    if not names:
        raise TrainingError(
            f"features='sites' compares Ghost units, and student ({type(student).__name__}) has none. Pass a model "
            "that ghostify.convert gave, or names of modules that student and teacher have in common."
        )
    return names


def _tap(name: str, student: nn.Module, teacher: nn.Module) -> _Tap:
    layers, twins = dict(student.named_modules()), dict(teacher.named_modules())
    plan = getattr(student, "ghostify_plan", None)
    if name not in layers or name not in twins:
        role, model = ("student", student) if name not in layers else ("teacher", teacher)
        lifted = isinstance(plan, Plan) and name in plan.lifted
        remedy = (
            "There it is called as a function: pass ghostify.conversion.as_planned(student.ghostify_plan, teacher) "
            "as teacher."
            if lifted
            else "Pass names that student.named_modules() and teacher.named_modules() have in common."
        )
        raise OptionError(f"features={name!r} is no module of {role} ({type(model).__name__}). {remedy}")
    layer, twin = layers[name], twins[name]
    if isinstance(layer, GhostConv) and layer.primary_norm is not None and not isinstance(twin, GhostConv):
        norms = {d.site.name: d.site.chain.norm for d in plan if d.site.chain} if isinstance(plan, Plan) else {}
        norm = norms.get(name)
        if norm not in twins:
            raise TrainingError(
                f"features={name!r} is a Ghost unit of student that holds its norm, and which norm of teacher that is "
                "cannot be told: it takes the plan, student.ghostify_plan. Pass the model that ghostify.convert or "
                "ghostify.load gave."
            )
        twin = twins[norm]
    return _Tap(name, layer, twin)


def _keeper(layer: nn.Module, outputs: list[Any]) -> Callable[..., None]:
    """A hook that remembers what a layer gives; not what its twin in a copy of the model, an average, gives."""

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if module is layer:
            # A copy: what follows may change the map in place, as ReLU(inplace=True) does.
            outputs.append(output.clone() if isinstance(output, Tensor) else output)

    return keep


def _comparable(tap: _Tap, given: Any, wanted: Any) -> tuple[Tensor, Tensor]:
    """One call's outputs of student and teacher in the original's channel order; the teacher's without gradient."""
    for role, output in (("student", given), ("teacher", wanted)):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = f"tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise TrainingError(
                f"features={tap.name!r} gives a {kind} in {role}, which cannot be compared. Name a layer that gives "
                "one tensor of floating-point numbers."
            )
    if given.shape != wanted.shape:
        raise TrainingError(
            f"features={tap.name!r} gives shape {tuple(given.shape)} in student and {tuple(wanted.shape)} in teacher. "
            "Run both on the same batch, and name layers that give the same shape."
        )
    return _in_order(given, tap.student), _in_order(wanted.detach(), tap.teacher)


def _in_order(maps: Tensor, layer: nn.Module) -> Tensor:
    if isinstance(layer, GhostConv) and layer.output_channels is not None:
        return maps.index_select(layer.channel_dim, torch.argsort(layer.output_channels))
    return maps
