"""What must hold of a converted model.

Every check is a plain function of a `Case`: it returns nothing if all is well, a text that begins with "not run" where
it does not apply, and raises or returns what went wrong. `CHECKS` lists them, with what each means in words.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ghostify
from benchmarks.coverage.models import Inputs, for_training
from benchmarks.coverage.rows import NOT_RUN, OK, Row, one_line
from ghostify.conversion import as_planned
from ghostify.errors import NothingToConvertError
from ghostify.tracing import Example, copier_memo

MACS = ("aten.convolution", "aten.mm", "aten.addmm")


@dataclass
class Case:
    """One converted model with all that its checks need.

    Attributes:
        row: What is known of it.
        model: The original.
        inputs: Makes its inputs.
        state_before: Hash of the original before anything was done with it.
        plan: The plan.
        small: The converted model.
        example: One input: the one that the plan was made on.
    """

    row: Row
    model: nn.Module
    inputs: Inputs
    state_before: str
    plan: ghostify.Plan
    small: nn.Module
    example: Example


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        run: What it does.
        letter: Its mark in the table.
        meaning: What holds where it is ok.
        needs_values: Whether it says nothing on the meta device.
    """

    run: Callable[[Case], str | None]
    letter: str
    meaning: str
    needs_values: bool = False

    def outcome(self, case: Case) -> str:
        """``ok``, what went wrong, or "not run: why"."""
        if self.needs_values and not case.row.values:
            return f"{NOT_RUN}: no values (meta)"
        try:
            return self.run(case) or OK
        except Exception as error:
            return one_line(error)


def unchanged(case: Case) -> str | None:
    return None if state_hash(case.model) == case.state_before else "the original was changed"


def exact(case: Case) -> str | None:
    originals = as_planned(case.plan, case.model)
    # Where an order is folded, the layers that read it would not fit the original convolution.
    decisions = tuple(dataclasses.replace(d, order="index" if d.replaced else "") for d in case.plan)
    plan = dataclasses.replace(case.plan, decisions=decisions)
    small = ghostify.apply(plan, case.model, example_inputs=case.example, initialiser="first")
    memo = copier_memo(small)
    for decision in plan.replaced:
        name = decision.site.name
        memo[id(small.get_submodule(name))] = originals.get_submodule(name)
    restored = copy.deepcopy(small, memo)
    return None if _equal_outputs(restored, case.model, case) else "with the originals back in, outputs differ"


def ratio_one(case: Case) -> str | None:
    try:
        made = ghostify.plan(case.model, ratio=1, example_inputs=case.example)
    except NothingToConvertError:
        return None
    return f"at ratio 1, {made.replaced[0].site.name} and {len(made.replaced) - 1} more would be replaced"


def counts(case: Case) -> str | None:
    params = sum(parameter.numel() for parameter in case.small.parameters())
    if params != case.plan.params_after:
        return f"it has {params:,} parameters, the plan says {case.plan.params_after:,}"
    return _macs_that_differ(case.small, case.plan.macs_after, case)


def macs(case: Case) -> str | None:
    return _macs_that_differ(case.model, case.plan.macs, case)


def forward(case: Case) -> str | None:
    inputs = Example.of(case.inputs(2))
    originals, outputs = _tensors(inputs.run(case.model)), _tensors(inputs.run(case.small))
    # How many objects a detector finds depends on values.
    if case.row.task != "detection" and [o.shape for o in outputs] != [o.shape for o in originals]:
        return "outputs have other shapes than the original's"
    if not _finite(outputs) and _finite(originals):
        return "outputs are not finite where the original's are"
    return None


def repeat(case: Case) -> str | None:
    try:
        again = ghostify.plan(case.small, ratio=2, example_inputs=case.example)
    except NothingToConvertError:
        return None
    return f"a second plan replaces {again.replaced[0].site.name} and {len(again.replaced) - 1} more"


def deepcopy(case: Case) -> str | None:
    return None if _equal_outputs(copy.deepcopy(case.small), case.small, case) else "the copy gives other outputs"


def artefact(case: Case) -> str | None:
    other = copy.deepcopy(case.model, copier_memo(case.model))
    with torch.no_grad():
        for value in other.state_dict().values():
            if value.is_floating_point():
                value.add_(1)
    with tempfile.TemporaryDirectory() as folder:
        ghostify.save(case.small, Path(folder, "small"))
        again = ghostify.load(Path(folder, "small"), base=other)
    return None if _equal_outputs(again, case.small, case) else "the loaded model gives other outputs"


def backward(case: Case) -> str | None:
    try:
        lost = _without_gradient(case.small, case)
    except Exception:
        try:
            _without_gradient(case.model, case)
        except Exception as error:
            return f"{NOT_RUN}: the original does not train on this input either: {one_line(error)}"
        raise
    if lost:  # a layer that the original's training does not use either is no fault of the conversion
        unused = _without_gradient(as_planned(case.plan, case.model), case)
        lost = {site: parts for site, parts in lost.items() if site not in unused}
    return f"no finite gradient in {len(lost)} units, as {next(iter(lost.items()))}" if lost else None


def onnx(case: Case) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        ghostify.export_onnx(case.small, Path(folder, "small.onnx"), example_inputs=case.example)
    return None


CHECKS = {
    "unchanged": Check(unchanged, "u", "the original is as before: values, shapes, training flags, hooks"),
    "exact": Check(exact, "e", "with the original convolutions put back, the original's outputs to the bit", True),
    "ratio 1": Check(ratio_one, "1", "at ratio 1 nothing is replaced"),
    "counts": Check(counts, "c", "parameters, and MACs by torch's FlopCounterMode, are those that the plan promised"),
    "macs": Check(macs, "m", "the plan's MACs of the original are those of torch's FlopCounterMode"),
    "forward": Check(forward, "f", "two other examples: the same shapes, finite where the original's outputs are"),
    "repeat": Check(repeat, "r", "a plan of the converted model finds nothing more to convert"),
    "deep copy": Check(deepcopy, "d", "a deep copy gives the same outputs to the bit", True),
    "save, load": Check(artefact, "s", "loaded on an original of other weights: the same outputs to the bit", True),
    "backward": Check(backward, "b", "a finite gradient reaches every parameter of every Ghost unit in training"),
    "onnx": Check(onnx, "o", "exported, and equal in onnxruntime on several batch sizes", True),
}


def state_hash(model: nn.Module) -> str:
    """Hash of a model's values, shapes, classes, training flags, attributes and hooks."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if not value.is_meta:
                digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        digest.update(f"{name} {type(module).__qualname__} {module.training} {hooks} {sorted(vars(module))}".encode())
    return digest.hexdigest()


def _macs_that_differ(model: nn.Module, promised: int, case: Case) -> str | None:
    """What torch's own counter says otherwise than the plan, operation by operation."""
    with FlopCounterMode(display=False) as counter:
        case.example.run(model)
    flops = counter.get_flop_counts().get("Global", {})
    found = Counter({str(operation): count // 2 for operation, count in flops.items()})
    inside = sum(found[name] for name in MACS)
    if inside != promised:
        return f"torch counts {inside:,} MACs ({inside - promised:+,}), the plan {promised:,}: {dict(found)}"
    told = {name: count for name, count in case.plan.uncounted.items() if name in found}
    outside = {name: count for name, count in found.items() if name not in MACS}
    return None if told == outside else f"outside the MACs torch counts {outside}, the plan {told}"


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _finite(outputs: list[Tensor]) -> bool:
    return all(output.is_meta or bool(torch.isfinite(output).all()) for output in outputs)


def _equal_outputs(one: nn.Module, other: nn.Module, case: Case) -> bool:
    found = [_tensors(case.example.run(model)) for model in (one, other)]
    return [o.shape for o in found[0]] == [o.shape for o in found[1]] and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(*found, strict=True)
    )


def _without_gradient(model: nn.Module, case: Case) -> dict[str, list[str]]:
    """Train a copy for one step; at every replaced site the parameters that no finite gradient reaches."""
    student = copy.deepcopy(model, copier_memo(model)).train()
    torch.manual_seed(1)
    example = Example.of(for_training(case.row, case.inputs(2))).to(student)
    outputs = [output for output in _tensors(student(*example.args, **example.kwargs)) if output.requires_grad]
    # A random direction: what comes out of a norm or a softmax has a constant sum, and no gradient.
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    lost: dict[str, list[str]] = {}
    for decision in case.plan.replaced:
        for part, parameter in student.get_submodule(decision.site.name).named_parameters():
            if parameter.requires_grad and (parameter.grad is None or not _finite([parameter.grad])):
                lost.setdefault(decision.site.name, []).append(part)
    return lost
