"""What is done with one model, in a process of its own: build, plan, convert, check."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from torch import nn

import ghostify
from benchmarks.coverage.checks import CHECKS, Case, state_hash
from benchmarks.coverage.models import Inputs, build, build_on_meta, convolutions, small_inputs
from benchmarks.coverage.rows import CONVERTED, FAILED, NO_CONVOLUTION, NOTHING_PAYS, REFUSED, Row, one_line
from ghostify.errors import GhostifyError, NothingToConvertError
from ghostify.planning.rules import HABITS, OBSTACLES, saves_nothing
from ghostify.tracing import Example, trace

Report = Callable[[Row], None]


def survey(row: Row, report: Report) -> None:
    """Find out how large a model is, and whether it has convolutions."""
    try:
        model = build_on_meta(row)
    except Exception as error:
        row.status, row.cause = FAILED, f"build: {one_line(error)}"
    else:
        row.params = sum(parameter.numel() for parameter in model.parameters())
        if not convolutions(model):
            row.status = NO_CONVOLUTION
    row.stage = ""
    report(row)


def run_case(row: Row, report: Report, *, checks: Iterable[str], values_below: float = 150e6) -> None:
    """Do everything with one model.

    Args:
        row: Names the model; filled in on the way.
        report: Called with the row before every stage, so that something is known if the process ends there, and at
            the end, when the stage is empty.
        checks: Names of the checks to run.
        values_below: A model with more parameters is built without values, on the meta device.
    """
    began = time.perf_counter()

    def enter(stage: str) -> None:
        row.stage = stage
        row.seconds = round(time.perf_counter() - began, 2)
        per_mib = 2**20 if sys.platform == "darwin" else 2**10
        row.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // per_mib
        report(row)

    enter("build")
    try:
        case = _converted(row, values_below, enter)
    except NothingToConvertError as error:
        row.status, row.cause = NOTHING_PAYS, one_line(error)
    except Exception as error:
        row.status, row.cause = FAILED, f"{row.stage}: {one_line(error)}"
        if row.task == "quantised" and isinstance(error, GhostifyError):
            row.status = REFUSED
    else:
        row.status = CONVERTED
        for name in checks:
            enter(name)
            row.outcomes[name] = CHECKS[name].outcome(case)
    enter("")


def _converted(row: Row, values_below: float, enter: Callable[[str], None]) -> Case:
    model, inputs = _model_that_runs(row, values_below)
    example = Example.of(inputs(1))
    row.params = sum(parameter.numel() for parameter in model.parameters())
    row.inputs = ", ".join("×".join(map(str, shape)) for shape in example.shapes)
    state_before = state_hash(model)
    enter("plan")
    try:
        plan = ghostify.plan(model, ratio=2, example_inputs=example)
    except NothingToConvertError:
        _facts_without_plan(row, model, example)
        raise
    row.params_after, row.macs, row.macs_after = plan.params_after, plan.macs, plan.macs_after
    row.outside, row.way, row.note = plan.uncounted, plan.trace_way, plan.trace_note[:300]
    row.sites, row.replaced, row.lifted = len(plan), len(plan.replaced), len(plan.lifted)
    row.kept = dict(Counter(reason_class(decision.reason) for decision in plan if not decision.replaced))
    enter("convert")
    small = ghostify.convert(model, ratio=2, example_inputs=example, initialiser="first")
    return Case(row, model, inputs, state_before, plan, small, example)


def _model_that_runs(row: Row, values_below: float) -> tuple[nn.Module, Inputs]:
    """The model with small inputs; a large one without values, unless it runs with values only."""
    if row.params > values_below:
        with suppress(Exception):  # its forward may make tensors on the CPU
            model = build_on_meta(row).to("meta")
            inputs, row.values = small_inputs(row, model), False
            return model, inputs
    model = build(row)
    return model, small_inputs(row, model)


def _facts_without_plan(row: Row, model: nn.Module, example: Any) -> None:
    """The same facts where every convolution is kept, of which no plan is made."""
    facts, spec = trace(model, example), ghostify.GhostSpec(2)
    row.macs, row.outside, row.way, row.note = facts.count.macs, facts.count.outside, facts.way, facts.note[:300]
    row.sites = len(facts.sites)
    reasons = (
        next(filter(None, (rule(site) for rule in (*OBSTACLES, *HABITS))), "") or saves_nothing(site, spec)
        for site in facts.sites
    )
    row.kept = dict(Counter(map(reason_class, reasons)))


def reason_class(reason: str) -> str:
    """A reason why a site is kept, without what differs from site to site: "too small to pay", and not by how much."""
    short = re.sub(r" (is shared with|is used) .*", r" \1 …", reason.partition(":")[0])
    return re.sub(r"\d[\d,.]*", "N", short)
