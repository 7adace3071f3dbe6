"""Measuring the original and the compressed model against each other."""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ghostify.backends.runners import Backend, device_name, device_of
from ghostify.distillation.history import Epoch
from ghostify.errors import InputsError
from ghostify.reporting.accuracy import NoClassScores, measure_accuracy
from ghostify.reporting.latency import LatencyOptions, measure_latency
from ghostify.reporting.report import Environment, Latency, ModelNumbers, Report
from ghostify.spec import Forecast, Plan
from ghostify.tracing.counting import count_macs, count_params, state_bytes
from ghostify.tracing.example import Example, ExampleInputs, require_module, same_shapes, shapes_of
from ghostify.tracing.running import own_random_state, put_back

_LATENCY_DEFAULTS = LatencyOptions()


def compare(
    original: nn.Module,
    compressed: nn.Module,
    *,
    example_inputs: ExampleInputs | Example,
    data: Iterable[Any] | None = None,
    plan: Plan | None = None,
    history: Any = (),
    latency: LatencyOptions | None = _LATENCY_DEFAULTS,
) -> Report:
    """Measure what was saved and what was lost. Both models are left as found.

    Args:
        original: The model before.
        compressed: The model after; it must give outputs of the same shapes.
        example_inputs: A batch ``(n, c, h, w)``, or arguments as a tuple or a dict. Counts are
            told for one example, latency for the batch as given.
        data: Batches of ``(inputs, targets)`` with class numbers ``(n,)``, or of inputs alone (then
            agreement only), for models of one input tensor.
        plan: What was done to every convolution, for the per-layer table; by default the one that
            the compressed model carries as ``ghostify_plan``, if any.
        history: The epochs of a distillation run (dataclasses or dicts with ``epoch``, ``loss``,
            ``val_accuracy``, …), or an object that has them as ``history``.
        latency: How to measure latency; ``None`` leaves it out.

    Raises:
        InputsError: Inputs or data are missing, empty or do not fit; or the models' outputs differ in shape.
        TraceError: A model does not run on the example inputs.
    """
    require_module(original, "original")
    require_module(compressed, "compressed")
    example = Example.of(example_inputs)
    if plan is None:
        carried = getattr(compressed, "ghostify_plan", None)
        plan = carried if isinstance(carried, Plan) else None
    remarks: list[str] = []
    with _left_as_found(original, compressed):
        _check_outputs(original, compressed, example)
        before, after = _numbers(original, example), _numbers(compressed, example)
        remarks += _remarks_on_counts(before, after, plan, example)
        accuracy = None
        if data is not None:
            try:
                dims = example.tensors()[0].dim()
                accuracy, more = measure_accuracy(original, compressed, data=data, input_dims=dims)
                remarks += more
            except NoClassScores as reason:
                remarks.append(f"Accuracy is left out: {reason}, and accuracy needs class scores (n, classes).")
        timed = None
        if latency is not None:
            forecast = None if plan is None else plan.latency
            if forecast is not None and latency.backend is None and not latency.channels_last:
                latency = dataclasses.replace(latency, backend=_backend_of(forecast))
            timed = measure_latency(original, compressed, example_inputs=example, options=latency)
            if plan is not None and forecast is not None and latency.backend == _backend_of(forecast):
                remarks.append(_remark_on_forecast(forecast, timed, plan.input_shapes, example.shapes))
    return Report(
        original=before,
        compressed=after,
        input_shapes=example.shapes,
        latency=timed,
        accuracy=accuracy,
        plan=plan,
        history=_epochs(history),
        environment=_environment(original),
        remarks=tuple(remarks),
    )


def _numbers(model: nn.Module, example: Example) -> ModelNumbers:
    count = count_macs(model, example)
    return ModelNumbers(
        name=type(model).__name__,
        params=count_params(model),
        state_bytes=state_bytes(model),
        macs=count.macs,
        outside=count.outside,
    )


def _check_outputs(original: nn.Module, compressed: nn.Module, example: Example) -> None:
    runs = [example.run(model) for model in (original, compressed)]
    if not same_shapes(*runs):
        first, second = (", ".join(map(str, shapes_of(run))) or "no tensor" for run in runs)
        raise InputsError(
            f"The outputs differ in shape: original {first}, compressed {second}. "
            "Compare a model with one that was made from it."
        )


def _remarks_on_counts(before: ModelNumbers, after: ModelNumbers, plan: Plan | None, example: Example) -> Iterator[str]:
    for word, numbers in (("original", before), ("ghost", after)):
        if numbers.macs == 0:
            yield f"No convolution or linear layer was seen in the {word} model: a compiled or scripted one hides them."
        for name, macs in numbers.outside.items():
            size = "a number unknown to torch" if macs is None else f"{macs:,}"
            yield f"Outside this definition of MACs, {word}: {name}, {size}."
    if plan is None:
        return
    planned = {"params": (plan.params, plan.params_after), "MACs": (plan.macs, plan.macs_after)}
    if plan.input_shapes != example.shapes:
        del planned["MACs"]
        yield (
            f"The per-layer MACs are for inputs of shape {_shapes(plan.input_shapes)}, and the totals for "
            f"{_shapes(example.shapes)}."
        )
    measured = {"params": (before.params, after.params), "MACs": (before.macs, after.macs)}
    for what, (first, second) in planned.items():
        if (first, second) != measured[what]:
            yield (
                f"The plan counts {first:,} → {second:,} {what}, and the models have {measured[what][0]:,} → "
                f"{measured[what][1]:,}: the plan is another model's, or "
                "the model was changed since."
            )


def _backend_of(forecast: Forecast) -> Backend:
    return Backend(forecast.backend, forecast.threads)


def _remark_on_forecast(
    forecast: Forecast, timed: Latency, planned: tuple[tuple[int, ...], ...], given: tuple[tuple[int, ...], ...]
) -> str:
    """What was expected when the plan was made, beside what was measured."""
    elsewhere = "" if timed.backend.endswith(f", {forecast.device}") else f" on {forecast.device}"
    if planned != given:
        elsewhere += f" for inputs of shape {_shapes(planned)}"
    return (
        f"Latency was planned{elsewhere}: {forecast.left:.3f} of the original was expected ("
        f"{forecast.original_ms:.2f} → {forecast.converted_ms:.2f} ms, layers timed one by one), "
        f"{1 / timed.ratio:.3f} is measured{' here' if elsewhere else ''}."
    )


def _shapes(shapes: tuple[tuple[int, ...], ...]) -> str:
    return ", ".join("×".join(map(str, shape)) for shape in shapes)


def _epochs(history: Any) -> tuple[Epoch, ...]:
    """The epochs from whatever holds them; fields that a report does not show are passed over."""
    records = getattr(history, "history", history)
    wanted = [field.name for field in dataclasses.fields(Epoch) if field.name != "epoch"]
    epochs = []
    for position, record in enumerate(records, start=1):
        fields = record if isinstance(record, Mapping) else {name: getattr(record, name, None) for name in wanted}
        number = fields.get("epoch") if isinstance(record, Mapping) else getattr(record, "epoch", None)
        values = {name: fields.get(name) for name in wanted}
        epochs.append(
            Epoch(
                epoch=position if number is None else int(number),
                **{name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)},
            )
        )
    return tuple(epochs)


def _environment(model: nn.Module) -> Environment:
    return Environment(
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        torch=str(torch.__version__),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        device=device_name(device_of(model)),
        threads=torch.get_num_threads(),
    )


@contextmanager
def _left_as_found(*models: nn.Module) -> Iterator[None]:
    """Restore every buffer and the random number generators; a forward may change them in any mode."""
    held = [
        (module, name, buffer, buffer.clone())
        for model in models
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    try:
        with own_random_state(*models):
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in held:
                setattr(module, name, buffer)
                put_back(buffer, before)
