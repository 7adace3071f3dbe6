"""What `coverage.py` does with one model, in a process of its own: build, plan, convert, and check the result.

Every check is a plain function of a `Case`: it returns nothing if all is well, a text that begins
with "not run" where it does not apply, and raises or returns what went wrong.
"""

from __future__ import annotations

import copy
import hashlib
import math
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from coverage_models import Inputs, build, convolutions, for_training, smallest_inputs, with_values_if_small
from coverage_page import NOT_RUN, OK, Row, one_line, reason_class
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ghostify
from ghostify.conversion import rewriter
from ghostify.errors import NothingToConvertError
from ghostify.nn.ghost import GhostConv
from ghostify.planning.rules import HABITS, OBSTACLES, saves_nothing
from ghostify.tracing import Example, trace


@dataclass
class Case:
    """One converted model with all that its checks need.

    Attributes:
        row: What is known of it.
        model: The original.
        inputs: Makes its inputs; the smallest that it accepts.
        larger: The same for larger inputs, for models that need them in training.
        state_before: Hash of the original before anything was done with it.
        plan: The plan.
        small: The converted model.
        verified: Whether the library's own verification ran, once.
    """

    row: Row
    model: nn.Module
    inputs: Inputs
    larger: list[Inputs]
    state_before: str
    plan: ghostify.Plan
    small: nn.Module
    verified: bool


def run_case(
    row: Row,
    *,
    values_below: float = 60e6,
    ratio: float = 2.0,
    onnx: bool = False,
    report: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Do everything with one model.

    Args:
        row: Names the model; filled in on the way.
        values_below: A model with more parameters is built without values, on the meta device.
        ratio: The ratio of every unit.
        onnx: Whether to export it too.
        report: Called with the row before every stage, so that something is known if the process ends there.
    """
    began = time.perf_counter()

    def enter(stage: str) -> None:
        row.stage = stage
        row.seconds = round(time.perf_counter() - began, 2)
        row.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
            2**20 if sys.platform == "darwin" else 2**10
        )
        report(row)

    enter("build")
    try:
        case = _converted(row, values_below, ratio, enter)
    except NothingToConvertError as error:
        row.status, row.cause = "nothing to convert", one_line(error)
    except Exception as error:
        row.status, row.cause = "failed", f"{row.stage}: {one_line(error)}"
    else:
        if case is not None:
            row.status = "converted"
            for name, check in CHECKS.items():
                enter(name)
                row.outcomes[name] = _outcome(check, case) if onnx or name != "onnx" else NOT_RUN
    enter("done")
    return row


def _outcome(check: Callable[[Case], str | None], case: Case) -> str:
    try:
        return check(case) or OK
    except Exception as error:
        return one_line(error)


def _converted(row: Row, values_below: float, ratio: float, enter: Callable[[str], None]) -> Case | None:
    """Build, plan and convert; ``None`` where there is no convolution to speak of."""
    model, row.values = with_values_if_small(row, values_below)
    row.params = sum(parameter.numel() for parameter in model.parameters())
    if row.library == "timm" and not getattr(model, "num_classes", 0):
        row.task = "features"
    if not convolutions(model):
        row.status, row.cause = "no convolution", "none but the patch embedding"
        return None
    enter("inputs")
    inputs, larger = smallest_inputs(row, model)
    row.inputs = ", ".join("×".join(map(str, shape)) for shape in Example.of(inputs(1)).shapes)
    state_before = state_hash(model)
    enter("plan")
    try:
        plan = ghostify.plan(model, ratio=ratio, example_inputs=inputs(1))
    except NothingToConvertError:
        _facts_without_plan(row, model, inputs(1), ratio)
        raise
    row.params_after, row.macs, row.macs_after = plan.params_after, plan.macs, plan.macs_after
    row.outside, row.way, row.note = plan.uncounted, plan.trace_way, plan.trace_note[:300]
    row.sites, row.replaced, row.lifted = len(plan), len(plan.replaced), len(plan.lifted)
    row.kept = dict(Counter(reason_class(decision.reason) for decision in plan if not decision.replaced))
    enter("convert")
    with mock.patch.object(rewriter, "verify", wraps=rewriter.verify) as verify:
        small = ghostify.convert(model, ratio=ratio, example_inputs=inputs(1), initialiser="first")
    return Case(row, model, inputs, larger, state_before, plan, small, verify.call_count == 1)


def _facts_without_plan(row: Row, model: nn.Module, example: tuple[Any, ...], ratio: float) -> None:
    """The same facts where every convolution is kept, of which no plan is made."""
    facts, spec = trace(model, example), ghostify.GhostSpec(ratio)
    facts = facts.unlifted or facts
    row.macs = row.macs_after = facts.count.macs
    row.outside, row.way, row.note = facts.count.outside, facts.way, facts.note[:300]
    row.sites, row.params_after = len(facts.sites), row.params
    reasons = (
        next(filter(None, (rule(site) for rule in (*OBSTACLES, *HABITS))), "") or saves_nothing(site, spec)
        for site in facts.sites
    )
    row.kept = dict(Counter(map(reason_class, reasons)))


def unchanged(case: Case) -> str | None:
    """The original is what it was: values, shapes, training flags, hooks."""
    return None if state_hash(case.model) == case.state_before else "the original was changed"


def verified(case: Case) -> str | None:
    """The library verified the conversion by running it."""
    return None if case.verified else "the verification did not run"


def counts(case: Case) -> str | None:
    """The converted model has the parameters and MACs that the plan promised."""
    found = sum(parameter.numel() for parameter in case.small.parameters()), _counted(case.small, case)
    promised = case.plan.params_after, case.plan.macs_after
    return None if found == promised else f"params and MACs are {found}, promised {promised}"


def macs(case: Case) -> str | None:
    """The plan's MACs of the original are those of torch's own counter, its sites' those of all convolutions."""
    by_operation = _operations(case.model, case)
    inside = _counted(case.model, case)
    sites = sum(decision.macs_before for decision in case.plan)
    if inside != case.plan.macs:
        return f"the plan says {case.plan.macs:,} MACs, torch {inside:,}: {dict(by_operation)}"
    known = {name: count for name, count in case.plan.uncounted.items() if name in by_operation}
    outside = {name: count for name, count in by_operation.items() if name not in COUNTED}
    if known != outside:
        return f"outside the MACs the plan names {known}, torch {outside}"
    case.row.functional_macs = by_operation["aten.convolution"] - sites
    if case.row.functional_macs < 0:
        return f"the sites have {sites:,} MACs, all convolutions {by_operation['aten.convolution']:,}"
    return None


def forward(case: Case) -> str | None:
    """Two other examples: outputs of the same shapes, finite where the original's are."""
    inputs = Example.of(case.inputs(2))
    originals, outputs = _tensors(inputs.run(case.model)), _tensors(inputs.run(case.small))
    if case.row.task == "detection":  # how many objects are found depends on values
        finite = all(torch.isfinite(output).all() for output in outputs)
        return None if finite else "outputs are not finite"
    if [output.shape for output in outputs] != [original.shape for original in originals]:
        return "outputs have other shapes than the original's"
    for output, original in zip(outputs, originals, strict=True):
        if not original.is_meta and torch.isfinite(original).all() and not torch.isfinite(output).all():
            return "outputs are not finite where the original's are"
    return None


def repeat(case: Case) -> str | None:
    """A plan of the converted model finds nothing more to convert."""
    try:
        again = ghostify.plan(case.small, ratio=case.plan.replaced[0].spec.ratio, example_inputs=case.inputs(1))
    except NothingToConvertError:
        return None
    return f"a second plan replaces {', '.join(decision.site.name for decision in again.replaced[:3])}"


def deepcopy(case: Case) -> str | None:
    """A deep copy computes the same."""
    if not case.row.values:
        return f"{NOT_RUN}: no values (meta)"
    return None if _same_outputs(copy.deepcopy(case.small), case) else "the copy gives other outputs"


def artefact(case: Case) -> str | None:
    """Saved and loaded on a freshly built original, it computes the same."""
    if not case.row.values:
        return f"{NOT_RUN}: no values (meta)"
    with tempfile.TemporaryDirectory() as folder:
        ghostify.save(case.small, Path(folder, "small"))
        again = ghostify.load(Path(folder, "small"), base=build(case.row))
    return None if _same_outputs(again, case) else "the loaded model gives other outputs"


def backward(case: Case) -> str | None:
    """In training mode a gradient reaches every trainable parameter of every Ghost unit."""
    for inputs in (case.inputs, *case.larger):
        try:
            lost = _without_gradient(case.small, case, inputs)
        except Exception:
            try:
                _without_gradient(case.model, case, inputs)
            except Exception as error:
                cause = one_line(error)
                continue
            raise
        return f"{len(lost)} parameters have none, as {lost[0]}" if lost else None
    return f"{NOT_RUN}: the original does not train either: {cause}"


def onnx(case: Case) -> str | None:
    """ghostify.export_onnx, which compares with onnxruntime."""
    if not case.row.values:
        return f"{NOT_RUN}: no values (meta)"
    with tempfile.TemporaryDirectory() as folder:
        ghostify.export_onnx(case.small, Path(folder, "small.onnx"), example_inputs=case.inputs(1))
    return None


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "unchanged": unchanged,
    "verified": verified,
    "counts": counts,
    "macs": macs,
    "forward": forward,
    "repeat": repeat,
    "deepcopy": deepcopy,
    "artefact": artefact,
    "backward": backward,
    "onnx": onnx,
}
COUNTED = ("aten.convolution", "aten.mm", "aten.addmm")


def state_hash(model: nn.Module) -> str:
    """Hash of a model's values, shapes, training flags and hooks."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            if not value.is_meta:
                digest.update(value.contiguous().view(torch.uint8).numpy() if value.dim() else repr(value).encode())
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        digest.update(f"{name} {type(module).__qualname__} {module.training} {hooks} {sorted(vars(module))}".encode())
    return digest.hexdigest()


def _operations(model: nn.Module, case: Case) -> Counter[str]:
    """Multiply-accumulates by operation, by torch's counter alone."""
    with FlopCounterMode(display=False) as counter:
        Example.of(case.inputs(1)).run(model)
    totals = counter.get_flop_counts().get("Global", {})
    return Counter({str(operation): flops // 2 for operation, flops in totals.items()})


def _counted(model: nn.Module, case: Case) -> int:
    by_operation = _operations(model, case)
    return sum(by_operation[name] for name in COUNTED)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _same_outputs(other: nn.Module, case: Case) -> bool:
    torch.manual_seed(1)
    inputs = Example.of(case.inputs(1))
    pairs = zip(_tensors(inputs.run(case.small)), _tensors(inputs.run(other)), strict=True)
    return all(torch.equal(a.nan_to_num(math.pi), b.nan_to_num(math.pi)) for a, b in pairs)


def _without_gradient(model: nn.Module, case: Case, inputs: Inputs) -> list[str]:
    """Train a copy for one step; parameters of the Ghost units that it called and that no finite gradient reaches."""
    student = copy.deepcopy(model).train()
    called: dict[str, nn.Module] = {}
    for name, module in student.named_modules():
        if isinstance(module, GhostConv):
            module.register_forward_hook(lambda unit, *_, name=name: called.update({name: unit}) and None)
    torch.manual_seed(1)
    example = Example.of(for_training(case.row, inputs(2))).to(student)
    outputs = [output for output in _tensors(student(*example.args, **example.kwargs)) if output.requires_grad]
    # A random direction: what comes out of a norm or a softmax has a constant sum, and no gradient.
    sum((output.float() * torch.randn_like(output.float())).sum() for output in outputs).backward()
    return [
        f"{name}.{part}"
        for name, unit in called.items()
        for part, parameter in unit.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not (parameter.is_meta or torch.isfinite(parameter.grad).all()))
    ]
