"""The sweep over all models: its bookkeeping, one small model of the major families, and torchvision as a whole."""

import importlib.util
import json
import os
import signal
import time
import warnings

import pytest
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.coverage import sweep
from benchmarks.coverage.case import reason_class, run_case
from benchmarks.coverage.models import convolutions, import_torchvision
from benchmarks.coverage.page import cause_class, page
from benchmarks.coverage.processes import Limits, in_process
from benchmarks.coverage.rows import (  # fmt: skip
    CONVERTED,
    FAILED,
    NO_CONVOLUTION,
    NOTHING_PAYS,
    REFUSED,
    Row,
    append_row,
    document,
    read_rows,
)

MADE = {"versions": "1", "hardware": "this", "date": "today"}


def row(name="net", family="nets", **known):
    return Row("timm", name, family, "classification", **known)


def converted(name="net", **known):
    return row(name, status=CONVERTED, params=100, params_after=50, macs=10, macs_after=8, **known)


# One process a model.


def finishes(row, report):
    row.status, row.stage = CONVERTED, ""
    report(row)


def sleeps(row, report):
    row.stage = "plan"
    report(row)
    time.sleep(60)


def sleeps_late(row, report):
    row.status, row.stage = CONVERTED, "backward"
    row.outcomes["forward"] = "ok"
    report(row)
    time.sleep(60)


def is_killed(row, report):
    os.kill(os.getpid(), signal.SIGKILL)


def raises(row, report):
    raise RuntimeError


def grows(row, report):
    row.stage = "build"
    report(row)
    bytearray(4 * 2**30)


@pytest.mark.parametrize(
    ("work", "limits", "cause"),
    [
        (sleeps, Limits(seconds=0.5), "plan: over 0.5 s"),
        (is_killed, Limits(), "start: crash: SIGKILL"),
        (raises, Limits(), "start: crash: exit status 1"),
        (grows, Limits(memory_gib=3), "build: crash: exit status 1"),
    ],
)
def test_what_ends_a_process_becomes_a_row(work, limits, cause):
    found = in_process(work, row(), limits)
    assert (found.status, found.cause) == (FAILED, cause)
    stage, _, told = cause.partition(": ")
    assert found.failures() == {stage: told}


def test_what_ends_a_check_leaves_the_rest_of_the_row():
    found = in_process(sleeps_late, row(), Limits(seconds=0.5))
    assert found.status == CONVERTED
    assert found.outcomes == {"forward": "ok", "backward": "over 0.5 s"}


def test_a_row_that_is_done_has_no_cause():
    assert in_process(finishes, row(), Limits()) == row(status=CONVERTED)


def test_a_model_that_cannot_be_built_becomes_a_row_with_its_cause():
    made = in_process(run_case, row("no_such_model"), Limits(), checks=[])
    assert made.status == FAILED
    assert made.cause.startswith("build: ModelNotFoundError: timm has no model name='no_such_model'")
    surveyed = in_process(sweep.survey, row("no_such_model"), Limits())
    assert surveyed.cause == made.cause


# Going on where a sweep stopped.


def test_rows_are_read_as_they_were_kept(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_rows(file) == {}
    for kept in (row("a"), converted("b", outcomes={"macs": "ok"}), row("a", status=NO_CONVOLUTION)):
        append_row(file, kept, MADE)
    with file.open("a") as lines:
        lines.write('{"made": {}, "row": {"lib')  # killed at this point
    assert read_rows(file) == {
        ("timm", "a"): (row("a", status=NO_CONVOLUTION), MADE),
        ("timm", "b"): (converted("b", outcomes={"macs": "ok"}), MADE),
    }


@pytest.fixture
def swept(tmp_path, monkeypatch):
    """Runs a sweep in which nothing is computed, and gives what it did, in order."""
    done = []
    sizes = {"a": 3, "b": 1, "c": 5, "vit": 4, "x": 2, "d": 4, "e": 1, "f": 3, "g": 9}

    def pretend(work, row, limits, checks=()):
        done.append((row.name, "survey" if work is sweep.survey else "onnx" if "onnx" in checks else "checks"))
        row.params = sizes[row.name]
        if row.name == "vit":
            row.status = NO_CONVOLUTION
        elif work is not sweep.survey:
            row.status, row.outcomes = CONVERTED, dict.fromkeys(checks, "ok")
            if row.name == "a":
                row.end_early("crash")
        return row

    monkeypatch.setattr(sweep, "in_process", pretend)

    def run(names="abc", onnx=sweep.Onnx.none, retry=False):
        done.clear()
        made = sweep.Sweep(tmp_path / "rows.jsonl", MADE, Limits())
        rows = [row(name, family="second" if name in "cg" else "first") for name in names]
        bar = Progress(console=Console(quiet=True), auto_refresh=False)
        made.survey(rows, bar)
        made.run({row.key for row in rows}, onnx, retry=retry, bar=bar)
        return list(done)

    return run


def test_each_once_and_the_smallest_of_every_family_first(swept):
    surveys = [(name, "survey") for name in "xab"]
    assert swept("xab") == [*surveys, ("b", "checks"), ("x", "checks"), ("a", "checks")]
    assert swept("abc") == [("c", "survey"), ("c", "checks")]
    assert swept("abcx") == []
    assert [name for name, _ in swept("defg")[4:]] == ["e", "g", "f", "d"]


def test_what_failed_is_done_again_if_asked_for(swept):
    swept("abc")
    assert swept("abc", retry=True) == [("a", "checks")]


def test_what_has_no_convolution_is_only_surveyed(swept):
    assert swept(["vit"]) == [("vit", "survey")]


def test_onnx_of_the_smallest_of_each_family(swept):
    assert swept("abc", onnx=sweep.Onnx.family)[3:] == [("b", "onnx"), ("c", "onnx"), ("a", "checks")]


def test_onnx_is_made_up_for(swept):
    swept("abc")
    assert swept("abc", onnx=sweep.Onnx.family) == [("b", "onnx"), ("c", "onnx")]
    assert swept("abc", onnx=sweep.Onnx.all) == [("a", "onnx")]


# Models, reasons, the page.


def test_a_patch_embedding_is_no_convolution():
    tiles = nn.Conv2d(3, 8, 4, stride=4)
    assert convolutions(nn.Sequential(tiles, nn.Linear(8, 8))) == []
    assert convolutions(nn.Sequential(tiles, nn.Conv2d(8, 8, 2, stride=2))) == ["1"]
    assert convolutions(nn.Sequential(nn.Conv2d(3, 8, 1))) == ["0"]
    assert convolutions(nn.Sequential(nn.Conv2d(3, 8, 7, stride=4))) == ["0"]
    assert convolutions(nn.Sequential(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)))) == []
    assert convolutions(nn.Sequential(nn.ConvTranspose2d(8, 8, 2, stride=2))) == ["0"]


def test_reasons_and_causes_are_put_together():
    assert reason_class("too small to pay: 1,728 parameters would become 1,800") == "too small to pay"
    assert reason_class("called 5 times with different shapes") == "called N times with different shapes"
    assert reason_class("its weight is shared with layer.1") == "its weight is shared with …"
    assert cause_class("no 'a.b' of (3, 4.5)") == cause_class("no 'c' of (12, 1)")


ROWS = [
    converted(
        outcomes={"unchanged": "ok", "exact": "not run: no values (meta)", "counts": "1 | 2"}, way="fx", values=False
    ),
    Row("torchvision", "wide", "wide", "video", CONVERTED, params=90, params_after=30, macs=9, macs_after=9),
    row("lost", status=FAILED, cause="build: crash: SIGSEGV"),
    row("deep", status=NOTHING_PAYS, kept={"depthwise": 3, "first layer": 1}),
    row("int", status=REFUSED, cause="plan: TraceError: quantised"),
    row("vit", status=NO_CONVOLUTION),
    row("late"),
]


def cells(text, section, first):
    """The cells of the one line of a section's tables that begins with this."""
    lines = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0].replace("\\|", "¦").splitlines()
    (found,) = (line for line in lines if line.split("|")[1:2] and line.split("|")[1].strip() == first)
    return [cell.strip() for cell in found.split("|")[2:-1]]


def test_the_page_tells_of_every_row():
    text = page(ROWS, {"date": "today"})
    assert "* date: today" in text
    assert cells(text, "Summary", "all of timm") == ["6", "5", "1", "1", "1", "1", "1", "0"]
    assert cells(text, "Summary", "torchvision video") == ["1", "1", "1", "0", "0", "0", "0", "1"]
    assert cells(text, "Checks", "unchanged")[1:] == ["1", "0", "0", "1"]
    assert cells(text, "Checks", "counts")[1:] == ["0", "1", "0", "1"]
    assert cells(text, "Checks", "exact")[1:] == ["0", "0", "1", "1"]
    assert cells(text, "Failures", "build") == ["1", "lost", "crash: SIGSEGV"]
    assert cells(text, "Failures", "counts") == ["1", "net", "1 ¦ 2"]
    assert cells(text, "Checks that were not run", "exact") == ["1", "net", "no values (meta)"]
    assert cells(text, "Refused", "1") == ["int", "plan: TraceError: quantised"]
    assert cells(text, "Nothing pays", "timm") == ["nets", "1", "depthwise (3); first layer (1)"]
    assert "* timm, 1 models: nets (1)" in text
    assert "timm:late" in text
    assert cells(text, "timm by family", "nets") == ["5", "4", "1", "0", "1", "0", "2.00×", "1.25×"]
    assert cells(text, "torchvision by model", "wide")[6:9] == ["3.00×", "1.00×", "···········"]


def test_a_page_of_nothing():
    assert "## torchvision by model" in page([], {})


def test_the_json_holds_every_row():
    read = json.loads(document(ROWS, {"date": "today"}))
    assert [Row(**entry) for entry in read["rows"]] == ROWS
    assert "seconds" not in read["rows"][0]


# Models.


@pytest.fixture
def libraries(monkeypatch):
    """Both libraries; what the sweep puts in the place of a missing operator is taken away again."""
    if not all(map(importlib.util.find_spec, ("torchvision", "timm"))):
        pytest.skip("needs torchvision and timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision = import_torchvision()
    for home in (torchvision.ops, torchvision.ops.boxes):
        monkeypatch.setattr(home, "nms", home.nms)
    return torchvision
