"""The rows of the coverage table, and the page that is made of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

OK = "ok"
NOT_RUN = "not run"
MARKS = {
    "unchanged": ("u", "the original is unchanged afterwards: values, shapes, training flags, hooks"),
    "verified": ("v", "ghostify's own verification ran: stand-ins in the same places give the original's outputs"),
    "counts": ("c", "counted parameters and MACs of the converted model are those that the plan promised"),
    "macs": ("m", "the plan's MACs of the original are those of torch's FlopCounterMode"),
    "forward": ("f", "two other examples: the same shapes, finite where the original's outputs are"),
    "repeat": ("r", "a plan of the converted model finds nothing more to convert"),
    "deepcopy": ("d", "a deep copy gives the same outputs, to the bit"),
    "artefact": ("s", "saved, and loaded on a freshly built original: the same outputs, to the bit"),
    "backward": ("b", "one step in training mode: a finite gradient reaches every parameter of every Ghost unit"),
    "onnx": ("o", "exported, and equal in onnxruntime"),
}


@dataclass
class Row:
    """One model of the table.

    Attributes:
        library: ``torchvision`` or ``timm``.
        name: The model's name there.
        family: The module that its factory lives in.
        task: What it computes.
        status: ``converted``, ``nothing to convert``, ``no convolution`` (none but a patch embedding), ``failed``;
            ``running`` only while it is.
        cause: Why it is not converted.
        inputs: Shapes of the example inputs.
        values: Whether it was built with values; without, it has shapes only (the meta device).
        params: Parameters of the original.
        params_after: The plan's promise.
        macs: Multiply-accumulates of the original.
        macs_after: The plan's promise.
        outside: Operations that the MACs leave out, with theirs where torch knows them.
        functional_macs: MACs of convolutions that are no sites, because they are called as functions.
        way: ``fx`` or ``recorded``.
        note: Why FX could not trace.
        sites: Convolutions.
        replaced: Those that became Ghost units.
        lifted: Convolutions that are called as functions, and became modules.
        kept: Reasons of the others, counted.
        outcomes: For every check ``ok``, a cause, "not run: why", or "not run" alone if it was not asked for.
        seconds: What it took.
        peak_mib: The largest memory of the process, in MiB.
        stage: What is being done.
    """

    library: str
    name: str
    family: str
    task: str
    status: str = "running"
    cause: str = ""
    inputs: str = ""
    values: bool = True
    params: int = 0
    params_after: int = 0
    macs: int = 0
    macs_after: int = 0
    outside: dict[str, int | None] = field(default_factory=dict)
    functional_macs: int = 0
    way: str = ""
    note: str = ""
    sites: int = 0
    replaced: int = 0
    lifted: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_mib: int = 0
    stage: str = "build"

    def end_early(self, cause: str) -> None:
        """Note that the process ended before its work was done."""
        if self.status == "running":
            self.status, self.cause = "failed", f"{self.stage}: {cause}"
        else:
            self.outcomes[self.stage] = cause

    def failures(self) -> dict[str, str]:
        """What went wrong, by stage or check."""
        if self.status == "failed":
            stage, _, cause = self.cause.partition(": ")
            return {stage: cause}
        return {check: outcome for check, outcome in self.outcomes.items() if outcome != OK and not is_not_run(outcome)}

    def marks(self) -> str:
        """The outcomes as one letter a check: the letter, ``✗`` or ``·``."""
        if self.status != "converted":
            return ""
        return "".join(
            letter if (outcome := self.outcomes.get(check, NOT_RUN)) == OK else "·" if is_not_run(outcome) else "✗"
            for check, (letter, _) in MARKS.items()
        )


def is_not_run(outcome: str) -> bool:
    return outcome.startswith(NOT_RUN)


def one_line(error: BaseException, length: int = 300) -> str:
    """An exception as one line: its class and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:length]


def reason_class(reason: str) -> str:
    """A reason why a site is kept, without what differs from site to site.

    Example:
        >>> reason_class("too small to pay: 1,728 parameters would become 1,800")
        'too small to pay'
    """
    if ": not a kind" in reason:
        return reason
    short = re.sub(r" (is shared with|is used) .*", r" \1 …", reason.partition(":")[0])
    return re.sub(r"\d[\d,.]*", "N", short)


def cause_class(cause: str) -> str:
    """A cause without numbers and quoted names, so that like causes stand together."""
    return re.sub(r"\d[\d,.]*", "N", re.sub(r"'[^']*'", "'…'", cause))


def page(rows: Sequence[Row], facts: dict[str, str]) -> str:
    """The whole table as Markdown.

    Args:
        rows: One a model.
        facts: What the page says about its making: command, versions, hardware, date.
    """
    rows = sorted(rows, key=lambda row: (row.library, row.name))
    parts = [
        "# Coverage",
        "How ghostify does on every model of torchvision and timm that holds a convolution, with random weights, on "
        "the smallest inputs that the model accepts: planned at s=2, converted without calibration, and checked. "
        "Nothing here tells about accuracy.",
        "\n".join(f"* {name}: {value}" for name, value in facts.items()),
        "## Summary",
        _summary(rows),
        _ways(rows),
        "## Failures",
        _failures(rows),
        "## Checks that were not run",
        _not_run(rows),
        "## Networks in which no standard convolution pays",
        "They are not converted: `NothingToConvertError` says so, with these reasons.",
        _table(
            ([row.library, row.name, _counts(row.kept)] for row in rows if row.status == "nothing to convert"),
            ["library", "model", "convolutions kept, by reason"],
        ),
        "## Networks without a convolution",
        "None but the patch embedding, which cuts the image into tiles.",
        _table(_without_convolution(rows), ["library", "family", "models"]),
        "## Families",
        "Gains are original / converted at s=2, from the least to the most.",
        _table(
            _families(rows), ["library", "family", "models", "converted", "all ok", "way", "params gain", "MACs gain"]
        ),
        "## Models",
        _legend(),
        _table(
            map(_model, (row for row in rows if row.status != "no convolution")),
            [
                "model",
                "input",
                "params",
                "MACs",
                "way",
                "sites",
                "ghost",
                "params gain",
                "MACs gain",
                "checks",
                "s",
                "MiB",
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(lines: Iterable[Iterable[object]], headers: Sequence[str]) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True) if cells else "None."


def _summary(rows: Sequence[Row]) -> str:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.library, row.task].append(row)
    lines = [[library, task, *_line(members)] for (library, task), members in sorted(groups.items())]
    headers = ["library", "task", "models", "with convolutions", "converted", "share", "every check ok", "nothing pays"]
    return _table([*lines, ["all", "", *_line(rows)]], [*headers, "failed"])


def _line(rows: Sequence[Row]) -> list[object]:
    statuses = Counter(row.status for row in rows)
    eligible = len(rows) - statuses["no convolution"]
    converted = statuses["converted"]
    share = f"{100 * converted / eligible:.1f} %" if eligible else ""
    flawless = sum(row.status == "converted" and not row.failures() for row in rows)
    return [len(rows), eligible, converted, share, flawless, statuses["nothing to convert"], statuses["failed"]]


def _ways(rows: Sequence[Row]) -> str:
    ways = Counter(row.way for row in rows if row.way)
    lifted = sum(row.lifted > 0 for row in rows)
    meta = sum(not row.values and row.status != "no convolution" for row in rows)
    text = (
        f"Facts by FX: {ways['fx']} models; by a recorded run alone: {ways['recorded']}. Convolutions called as "
        f"functions became modules in {lifted}. Too large to be built with values, and therefore done on the meta "
        f"device: {meta}."
    )
    notes: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.way == "recorded":
            notes[cause_class(row.note)[:150]].append(row.name)
    lines = [[len(names), _names(names), note] for note, names in _by_size(notes)]
    return f"{text}\n\n{_table(lines, ['models', 'as', 'why FX could not trace'])}" if lines else text


def _failures(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        for stage, cause in row.failures().items():
            found[stage, cause_class(cause)].append(row)
    lines = [
        [stage, len(members), _names([row.name for row in members]), members[0].failures()[stage]]
        for (stage, _), members in _by_size(found)
    ]
    return _table(lines, ["at", "models", "as", "cause (of the first)"])


def _not_run(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for check, outcome in row.outcomes.items():
            if is_not_run(outcome) and outcome != NOT_RUN:  # alone: it was not asked for
                found[check, cause_class(outcome.removeprefix(f"{NOT_RUN}: "))].append(row.name)
    lines = [[check, len(names), _names(names), why] for (check, why), names in _by_size(found)]
    return _table(lines, ["check", "models", "as", "why"])


def _by_size(groups: dict) -> list[tuple]:
    return sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0])))


def _names(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _counts(counts: dict[str, int]) -> str:
    return "; ".join(f"{name} ({count})" for name, count in sorted(counts.items(), key=lambda item: -item[1]))


def _without_convolution(rows: Sequence[Row]) -> list[list[object]]:
    found = Counter((row.library, row.family) for row in rows if row.status == "no convolution")
    return [[library, family, count] for (library, family), count in sorted(found.items())]


def _families(rows: Sequence[Row]) -> list[list[object]]:
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.status != "no convolution":
            groups[row.library, row.family].append(row)
    lines = []
    for (library, family), members in sorted(groups.items()):
        converted = [row for row in members if row.status == "converted"]
        flawless = sum(not row.failures() for row in converted)
        ways = ", ".join(sorted({row.way for row in members if row.way}))
        params = _range([row.params / row.params_after for row in converted])
        macs = _range([row.macs / row.macs_after for row in converted if row.macs_after])
        lines.append([library, family, len(members), len(converted), flawless, ways, params, macs])
    return lines


def _range(gains: Sequence[float]) -> str:
    if not gains:
        return ""
    least, most = f"{min(gains):.2f}", f"{max(gains):.2f}"
    return f"{least}×" if least == most else f"{least}–{most}×"


def _legend() -> str:
    letters = "\n".join(f"* `{letter}` {meaning}" for letter, meaning in MARKS.values())
    return (
        "Parameters in millions, MACs in millions of the input shown (batch 1), `sites` convolutions of which `ghost` "
        "became Ghost units, seconds and memory of all checks together in a process of its own. An asterisk: on the "
        "meta device, without values. The checks, in this order, each its letter if all is well, `✗` if not (see "
        f"Failures), `·` if it was not run:\n\n{letters}"
    )


def _model(row: Row) -> list[object]:
    gains = ["", ""]
    if row.status == "converted":
        gains = [f"{row.params / row.params_after:.2f}×", f"{row.macs / max(row.macs_after, 1):.2f}×"]
    return [
        f"{row.library}:{row.name}{'' if row.values else ' *'}",
        row.inputs,
        f"{row.params / 1e6:.2f}",
        f"{row.macs / 1e6:,.1f}" if row.macs else "",
        row.way,
        row.sites or "",
        row.replaced or "",
        *gains,
        row.marks() or row.status,
        f"{row.seconds:.1f}",
        row.peak_mib,
    ]
