"""The page of the coverage, every figure of it from the rows."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from statistics import median

from tabulate import tabulate

from benchmarks.coverage.checks import CHECKS
from benchmarks.coverage.rows import (
    CONVERTED,
    FAILED,
    LISTED,
    NO_CONVOLUTION,
    NOT_RUN,
    NOTHING_PAYS,
    OK,
    REFUSED,
    Row,
)

INTRODUCTION = """\
How ghostify does on every model of torchvision, and on every model of timm that holds a convolution beside a patch
embedding: built with random weights, on small inputs that the model accepts (96², else 128², else its own size),
planned at s=2, converted with `initialiser="first"`, and checked. Nothing here tells about accuracy. Every model has a
process of its own with a limit of time and of memory; whatever ended one early is among the failures.

Models of more than 150 million parameters are built without values, on torch's meta device, if they run there; checks
that need values are not run for them. Parameters that are zero at the start are drawn at random, so that no branch
hides behind a zero. torchvision's compiled operators may not fit the build of torch: then `nms` is replaced by one in
plain torch, and `roi_align` runs in torchvision's own Python version. Detectors with regions of interest look at their
20 best proposals of each level, without suppression. How many boxes go on to their heads still depends on values, so
the MACs of a converted one can differ from its plan's, which were counted on the original's boxes."""


def page(rows: Iterable[Row], facts: dict[str, str]) -> str:
    """The whole page as Markdown.

    Args:
        rows: One a model.
        facts: What the page says about its making: command, versions, hardware, date.
    """
    rows = sorted(rows, key=lambda row: row.key)
    torchvision = [row for row in rows if row.library == "torchvision" and row.status != NO_CONVOLUTION]
    parts = [
        "# Coverage",
        INTRODUCTION,
        "\n".join(f"* {name}: {value}" for name, value in facts.items()),
        "## Summary",
        _summary(rows),
        _gains(rows),
        "## Checks",
        _checks(rows),
        "## Failures",
        _failures(rows),
        "## Checks that were not run",
        _checks_not_run(rows),
        "## How the facts were found",
        _ways(rows),
        "## Refused",
        _table(_by_cause(row for row in rows if row.status == REFUSED), ["models", "as", "cause"]),
        "## Nothing pays",
        "`NothingToConvertError` says so: no convolution of these is left to replace, for these reasons.",
        _table(_nothing_pays(rows), ["library", "family", "models", "convolutions kept, by reason"]),
        "## No convolution but the patch embedding",
        _without_convolution(rows),
        "## Not run yet",
        _names([f"{row.library}:{row.name}" for row in rows if row.status == LISTED], most=2000) or "None.",
        "## timm by family",
        "Models with convolutions; gains (original / converted) are medians.",
        _table(_families(rows), ["family", "models", "run", "converted", "all ok", "FX", "recorded", "params", "MACs"]),
        "## torchvision by model",
        _legend(),
        _table(
            map(_model, torchvision),
            ["model", "input", "params", "MACs", "way", "sites", "ghost", "params gain", "MACs gain", "checks", "s"],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def cause_class(cause: str) -> str:
    """A cause without numbers and quoted names, so that like causes stand together."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'", "'…'", cause))


def _table(lines: Iterable[Iterable[object]], headers: Sequence[str]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) if cells else "None."


def _names(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _grouped(rows: Iterable[Row], *attributes: str) -> list[tuple[tuple[str, ...], list[Row]]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(getattr(row, attribute) for attribute in attributes)].append(row)
    return sorted(groups.items())


def _summary(rows: Sequence[Row]) -> str:
    shown = (CONVERTED, NOTHING_PAYS, REFUSED, FAILED, LISTED)
    groups = [
        *_grouped(rows, "library", "task"),
        *((("all of", *of), members) for of, members in _grouped(rows, "library")),
    ]
    lines = []
    for names, members in groups:
        statuses = Counter(row.status for row in members)
        flawless = sum(row.status == CONVERTED and not row.failures() for row in members)
        eligible = len(members) - statuses[NO_CONVOLUTION]
        lines.append([" ".join(names), len(members), eligible, *(statuses[status] for status in shown), flawless])
    return _table(lines, ["", "models", "with convolutions", *shown, "converted, and no check failed"])


def _gains(rows: Sequence[Row]) -> str:
    lines = []
    for (library,), members in _grouped((row for row in rows if row.status == CONVERTED), "library"):
        for what, gains in (("params", _params_gains(members)), ("MACs", _macs_gains(members))):
            lines.append([library, what, f"{median(gains):.2f}×", f"{min(gains):.2f}×", f"{max(gains):.2f}×"])
    return _table(lines, ["gain of the converted models", "", "median", "least", "most"])


def _params_gains(rows: Iterable[Row]) -> list[float]:
    return [row.params / row.params_after for row in rows]


def _macs_gains(rows: Iterable[Row]) -> list[float]:
    return [row.macs / row.macs_after for row in rows]


def _checks(rows: Sequence[Row]) -> str:
    converted = [row for row in rows if row.status == CONVERTED]
    lines = []
    for name, check in CHECKS.items():
        told = [row.outcomes[name] for row in converted if name in row.outcomes]
        ok, not_run = told.count(OK), sum(outcome.startswith(NOT_RUN) for outcome in told)
        lines.append([name, check.meaning, ok, len(told) - ok - not_run, not_run, len(converted) - len(told)])
    return _table(lines, ["check", "means", "ok", "failed", "could not be run", "not asked for"])


def _failures(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        for stage, cause in row.failures().items():
            found[stage, cause_class(cause)].append(row)
    lines = [
        [stage, len(members), _names([row.name for row in members], most=12), members[0].failures()[stage]]
        for (stage, _), members in _by_size(found)
    ]
    return _table(lines, ["at", "models", "as", "cause (of the first)"])


def _checks_not_run(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for check, outcome in row.outcomes.items():
            if outcome.startswith(NOT_RUN):
                found[check, cause_class(outcome.removeprefix(f"{NOT_RUN}: "))].append(row.name)
    lines = [[check, len(names), _names(names), why] for (check, why), names in _by_size(found)]
    asked = sum("onnx" in row.outcomes for row in rows)
    told = f"ONNX was asked for in {asked} of {sum(row.status == CONVERTED for row in rows)} converted models."
    return f"{told}\n\n{_table(lines, ['check', 'models', 'as', 'why'])}"


def _ways(rows: Sequence[Row]) -> str:
    ways = Counter(row.way for row in rows if row.way)
    text = (
        f"By FX and a recorded run: {ways['fx']} models; by a recorded run alone: {ways['recorded']}. Convolutions "
        f"called as functions became modules in {sum(row.lifted > 0 for row in rows)}. On the meta device, without "
        f"values: {sum(not row.values for row in rows)}."
    )
    notes: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.way == "recorded":
            notes[cause_class(row.note)[:120]].append(row.name)
    lines = [[len(names), _names(names), note] for note, names in _by_size(notes)]
    return f"{text}\n\n{_table(lines, ['models', 'as', 'why FX could not trace'])}"


def _by_cause(rows: Iterable[Row]) -> list[list[object]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[cause_class(row.cause)].append(row)
    return [[len(members), _names([r.name for r in members], 12), members[0].cause] for _, members in _by_size(found)]


def _by_size(groups: dict) -> list[tuple]:
    return sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0])))


def _nothing_pays(rows: Sequence[Row]) -> list[list[object]]:
    lines = []
    for (library, family), members in _grouped(
        (row for row in rows if row.status == NOTHING_PAYS), "library", "family"
    ):
        kept = sum((Counter(row.kept) for row in members), Counter())
        reasons = "; ".join(f"{reason} ({count})" for reason, count in kept.most_common())
        lines.append([library, family, len(members), reasons])
    return lines


def _without_convolution(rows: Sequence[Row]) -> str:
    lines = []
    for (library,), members in _grouped((row for row in rows if row.status == NO_CONVOLUTION), "library"):
        families = Counter(row.family for row in members)
        told = ", ".join(f"{family} ({count})" for family, count in sorted(families.items()))
        lines.append(f"* {library}, {len(members)} models: {told}")
    return "\n".join(lines) or "None."


def _families(rows: Sequence[Row]) -> list[list[object]]:
    lines = []
    with_convolutions = (row for row in rows if row.library == "timm" and row.status != NO_CONVOLUTION)
    for (family,), members in _grouped(with_convolutions, "family"):
        converted = [row for row in members if row.status == CONVERTED]
        ways = Counter(row.way for row in members)
        lines.append(
            [
                family,
                len(members),
                sum(row.status != LISTED for row in members),
                len(converted),
                sum(not row.failures() for row in converted),
                ways["fx"],
                ways["recorded"],
                f"{median(_params_gains(converted)):.2f}×" if converted else "",
                f"{median(_macs_gains(converted)):.2f}×" if converted else "",
            ]
        )
    return lines


def _legend() -> str:
    letters = ", ".join(f"`{check.letter}` {name}" for name, check in CHECKS.items())
    return (
        "Parameters in millions, MACs in millions of the input shown, `sites` convolutions of which `ghost` became "
        "Ghost units, seconds of everything together. An asterisk: on the meta device. The checks, each its letter if "
        f"all is well, `✗` if not, `·` if it was not run: {letters}."
    )


def _mark(row: Row, check: str) -> str:
    told = row.outcomes.get(check, NOT_RUN)
    return CHECKS[check].letter if told == OK else "·" if told.startswith(NOT_RUN) else "✗"


def _model(row: Row) -> list[object]:
    converted = row.status == CONVERTED
    return [
        row.name + ("" if row.values else " *"),
        row.inputs,
        f"{row.params / 1e6:.2f}",
        f"{row.macs / 1e6:,.1f}" if row.macs else "",
        row.way,
        row.sites or "",
        row.replaced or "",
        f"{row.params / row.params_after:.2f}×" if converted else "",
        f"{row.macs / row.macs_after:.2f}×" if converted else "",
        "".join(_mark(row, check) for check in CHECKS) if converted else row.status,
        f"{row.seconds:.1f}",
    ]
