"""A plan as text: the table of all convolutions, and the totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tabulate import tabulate

if TYPE_CHECKING:
    from ghostify.spec import Forecast, Plan


def table(plan: Plan, style: str) -> str:
    """All sites, in any format that tabulate knows."""
    measured = [name for name in _MEASURED if any(getattr(d, name) is not None for d in plan)]
    rows = [
        [
            d.site.name,
            d.site.shape,
            *(("ghost", str(d.spec)) if d.spec else ("keep", "")),
            *(_arrow(*pair) for pair in ((d.params_before, d.params_after), (d.macs_before, d.macs_after))),
            d.order,
            *(_MEASURED[name][1](getattr(d, name)) for name in measured),
            d.reason,
        ]
        for d in plan.decisions
    ]
    names = [_MEASURED[name][0] for name in measured]
    headers = ["site", "shape", "decision", "ratio", "params", "MACs", "order", *names, "reason"]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def summary(plan: Plan) -> str:
    """The totals, and everything a reader must know to trust them."""
    lines = [
        f"{plan.model}: {len(plan.replaced)} of {len(plan.decisions)} convolutions become Ghost units",
        f"params  {_total(plan.params, plan.params_after)}",
        f"MACs    {_total(plan.macs, plan.macs_after)}   (batch 1, convolutions and linear layers)",
    ]
    lines += [f"budget  {line}" for line in plan.budget]
    if plan.latency is not None:
        lines.append(_forecast(plan.latency))
    if plan.trace_way == "recorded":
        lines.append(f"facts   from a recorded run, because FX could not trace the model: {plan.trace_note}")
        lines.append("        (shapes and costs are as sure as with FX; what follows a layer is not known, so")
        lines.append("        norms stay outside the units, and the output layer is not recognised)")
    if plan.lifted:
        lines.append(
            f"graph   changed: {len(plan.lifted)} convolutions are called as functions, and become modules of a "
            f"torch.fx.GraphModule: {', '.join(plan.lifted)}"
        )
    if plan.uncounted:
        parts = (f"{name} ({'unknown' if count is None else f'{count:,}'})" for name, count in plan.uncounted.items())
        lines.append(f"beside  operations outside this definition of MACs: {', '.join(parts)}")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _arrow(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} → {after:,}"


def _total(before: int, after: int) -> str:
    return f"{before:,} → {after:,}   ({before / after:.2f}× fewer)" if after else f"{before:,} → {after:,}"


def _milliseconds(saved: float | None) -> str:
    return "" if saved is None else f"{saved:.3f}"


def _small(number: float | None) -> str:
    return "" if number is None else f"{number:.2g}"


def _forecast(latency: Forecast) -> str:
    # Layers that were timed alone can save more in sum than a small network takes.
    speed = (
        f"{latency.original_ms / latency.converted_ms:.2f}× as fast" if latency.converted_ms else "no telling how fast"
    )
    return (
        f"latency {latency.original_ms:.2f} → {latency.converted_ms:.2f} ± {latency.noise_ms:.2f} ms expected   "
        f"({speed} on {latency.backend}, threads {latency.threads}, "
        f"batch {latency.batch}, {latency.device})"
    )


# Columns that only some plans have: the field of a decision, its header, its form.
_MEASURED = {
    "explained": ("explained", _percent),
    "error": ("error", _percent),
    "damage": ("damage", _small),
    "saved_ms": ("saved, ms", _milliseconds),
}
