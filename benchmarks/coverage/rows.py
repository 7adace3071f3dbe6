"""One line of the coverage table a model, and the file in which a sweep keeps them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

OK = "ok"
NOT_RUN = "not run"
NO_CONVOLUTION = "no convolution"
NOTHING_PAYS = "nothing pays"
CONVERTED = "converted"
REFUSED = "refused"
FAILED = "failed"
LISTED = "not run yet"

Key = tuple[str, str]


@dataclass
class Row:
    """What is known of one model.

    Attributes:
        library: ``torchvision`` or ``timm``.
        name: The model's name there.
        family: The module that its factory lives in.
        task: What it computes.
        status: ``converted``, ``nothing pays``, ``no convolution`` (none but a patch embedding), ``refused`` (ghostify
            says that it does not convert this kind), ``failed``; ``not run yet`` before all that.
        cause: Why it is not converted.
        stage: What is being done; where the process ended, if it ended early.
        inputs: Shapes of the example inputs.
        values: Whether it was built with values; without, it has shapes only (the meta device).
        params: Parameters of the original.
        params_after: The plan's promise.
        macs: Multiply-accumulates of the original.
        macs_after: The plan's promise.
        outside: Operations that the MACs leave out, with theirs where torch knows them.
        way: ``fx`` or ``recorded``.
        note: Why FX could not trace.
        sites: Convolutions.
        replaced: Those that became Ghost units.
        lifted: Convolutions that are called as functions, and became modules.
        kept: Reasons of the others, counted.
        outcomes: For every check ``ok``, or a cause, or "not run: why". A check that was not asked for is not there.
        seconds: What it took.
        peak_mib: The largest memory of its process, in MiB.
    """

    library: str
    name: str
    family: str
    task: str
    status: str = LISTED
    cause: str = ""
    stage: str = ""
    inputs: str = ""
    values: bool = True
    params: int = 0
    params_after: int = 0
    macs: int = 0
    macs_after: int = 0
    outside: dict[str, int | None] = field(default_factory=dict)
    way: str = ""
    note: str = ""
    sites: int = 0
    replaced: int = 0
    lifted: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_mib: int = 0

    @property
    def key(self) -> Key:
        """Library and name."""
        return self.library, self.name

    def end_early(self, cause: str) -> None:
        """Note that the process ended before its work was done."""
        if self.status == CONVERTED:
            self.outcomes[self.stage] = cause
        else:
            self.status, self.cause = FAILED, f"{self.stage}: {cause}"

    def failures(self) -> dict[str, str]:
        """What went wrong, by stage or check."""
        if self.status == FAILED:
            stage, _, cause = self.cause.partition(": ")
            return {stage: cause}
        return {check: told for check, told in self.outcomes.items() if told != OK and not told.startswith(NOT_RUN)}

    def compact(self) -> dict[str, Any]:
        """The row as JSON, without what says nothing."""
        defaults = {
            entry.name: entry.default if entry.default is not MISSING else entry.default_factory()
            for entry in fields(self)
            if entry.default is not MISSING or entry.default_factory is not MISSING
        }
        return {name: value for name, value in asdict(self).items() if name not in defaults or value != defaults[name]}


def one_line(error: BaseException, length: int = 300) -> str:
    """An exception as one line: its class and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}"[:length]


def append_row(file: Path, row: Row, made: dict[str, str]) -> None:
    """Keep a row at once, with what it was made by."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        print(json.dumps({"made": made, "row": row.compact()}, ensure_ascii=False), file=lines)


def read_rows(file: Path) -> dict[Key, tuple[Row, dict[str, str]]]:
    """The rows of a sweep so far, each with what it was made by; of several of one model the last."""
    found: dict[Key, tuple[Row, dict[str, str]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):  # half a line, where a sweep was killed
            record = json.loads(line)
            row = Row(**record["row"])
            found[row.key] = row, record["made"]
    return found


def document(rows: Iterable[Row], facts: dict[str, str]) -> str:
    """All rows as JSON text, one a line."""
    lines = ",\n".join(json.dumps(row.compact(), ensure_ascii=False, separators=(",", ":")) for row in rows)
    return f'{{"facts": {json.dumps(facts, ensure_ascii=False)},\n"rows": [\n{lines}\n]}}\n'
