"""What is checked after every conversion, by running it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_structure

from ghostify.errors import ConversionError, TraceError
from ghostify.nn.ghost import GhostConv
from ghostify.spec import Plan
from ghostify.tracing import Trace, copier_memo, difference, same_shapes, shapes_of, tensors_in


def verify(student: nn.Module, plan: Plan, facts: Trace) -> None:
    """Check a converted model on the example inputs of its trace.

    Every Ghost unit is called as often, and gives maps of the same shape and type, as its
    convolution did; so do the outputs; and a stand-in that only passes calls on to the original
    convolutions, put into the same places, gives the original's outputs exactly.

    Args:
        student: The converted model.
        plan: What was promised.
        facts: The original and what it computed.

    Raises:
        ConversionError: One of these does not hold.
    """
    calls = {site.name: [call.output_shape for call in site.calls] for site in facts.sites}
    expected = {decision.site.name: calls[decision.site.name] for decision in plan.replaced}
    made, outputs = _run_recorded(student, facts, list(expected))
    for name, shapes in expected.items():
        if not made[name]:
            raise ConversionError(
                f"site={name!r} is not called in the converted model. A copy of {type(student).__name__} probably "
                "still calls the original's modules, through a function that was made in its constructor. Call them "
                f"as self.{name}, or keep the site (skip={name!r})."
            )
        if made[name] != shapes:
            raise ConversionError(
                f"site={name!r} gives maps of shape {made[name]} after conversion, and {shapes} before. "
                f"Keep it (skip={name!r}), and please report the model."
            )
    _compare_structure(outputs, facts.outputs)
    _check_places(plan, facts)


def _run_recorded(student: nn.Module, facts: Trace, names: list[str]) -> tuple[dict[str, list[tuple[int, ...]]], Any]:
    """Run the student; the shapes that the named modules make, without the batch dimension, and the outputs."""
    made: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    handles = []
    for name in names:

        def record(unit: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = name) -> None:
            assert isinstance(unit, GhostConv)  # what the plan put there
            made[name].append(tuple(output.shape[unit.channel_dim :]))

        handles.append(student.get_submodule(name).register_forward_hook(record))
    try:
        outputs = facts.example.run(student)
    except TraceError as error:
        raise ConversionError(
            f"The converted {type(student).__name__} does not run, and the original does: {error.__cause__!r}. "
            "It probably uses a convolution in another way than by calling it; keep that one with skip=..."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return made, outputs


def _compare_structure(outputs: Any, originals: Any) -> None:
    structure, original_structure = tree_structure(outputs), tree_structure(originals)
    if structure != original_structure:
        raise ConversionError(f"The converted model returns {structure}, the original {original_structure}.")
    if not same_shapes(outputs, originals):
        made, wanted = (shapes_of(run) for run in (outputs, originals))
        raise ConversionError(f"The converted model returns tensors of shapes {made}, the original {wanted}.")
    if not shapes_of(originals):
        warnings.warn(
            f"What the model returns ({type(originals).__name__}) holds no tensor that can be found, so that the "
            "converted model is not compared with it. Let it return tensors, or a dict, tuple or dataclass of them.",
            stacklevel=2,
        )
    for leaf, original in zip(tensors_in(outputs), tensors_in(originals), strict=True):
        if leaf.dtype != original.dtype:
            raise ConversionError(f"The converted model returns {leaf.dtype}, the original {original.dtype}.")
        if not original.is_meta and torch.isfinite(original).all() and not torch.isfinite(leaf).all():
            raise ConversionError(
                "The converted model returns NaN or infinite numbers where the original does not. "
                "Convert at a lower ratio, or without calibration, and please report the model."
            )


class _PassOn(nn.Module):
    """Calls a module that is not its child, so a copy of it still calls that very module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._modules_passed_to = (module,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules_passed_to[0](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # a model may read the convolution's stride
        return getattr(self.__dict__["_modules_passed_to"][0], name)


def _check_places(plan: Plan, facts: Trace) -> None:
    """Put stand-ins at all sites of a structural copy, and compare its outputs with the original's."""
    model = facts.model
    shared = copier_memo(model)
    shared.update({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for decision in plan.replaced:
        module = model.get_submodule(decision.site.name)
        shared[id(module)] = _PassOn(module)
    outputs = facts.example.run(copy.deepcopy(model, shared))
    parted = difference(outputs, facts.outputs)
    if parted:
        raise ConversionError(
            "With stand-ins that compute what the original convolutions compute, the copied model gives other "
            f"outputs than the original (largest difference {parted:.3g}). It is not "
            "deterministic in evaluation mode, or reaches a convolution in another way than by its name."
        )
