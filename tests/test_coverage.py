"""The sweep over all models: its bookkeeping, and one small model of the major families."""

import importlib.util
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
from torch import nn

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.append(BENCHMARKS)  # last, and not for long: a package named coverage exists too
try:
    from coverage_case import run_case
    from coverage_models import convolutions
    from coverage_page import Row, cause_class, page, reason_class

    _found = importlib.util.spec_from_file_location("coverage_sweep", f"{BENCHMARKS}/coverage.py")
    sweep = importlib.util.module_from_spec(_found)
    sys.modules["coverage_sweep"] = sweep
    _found.loader.exec_module(sweep)
finally:
    sys.path.remove(BENCHMARKS)


def row(name="net", **known):
    return Row("timm", name, "family", "classification", **known)


def done(**known):
    return row(status="converted", stage="done", params=100, params_after=50, macs=10, macs_after=8, **known)


# One process a model.


def finishes(row, *, onnx, report):
    row.status, row.stage = "converted", "done"
    report(row)


def sleeps(row, *, onnx, report):
    row.stage = "plan"
    report(row)
    time.sleep(60)


def sleeps_late(row, *, onnx, report):
    row.status, row.stage = "converted", "backward"
    row.outcomes["forward"] = "ok"
    report(row)
    time.sleep(60)


def aborts(row, *, onnx, report):
    report(row)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(row, *, onnx, report):
    os._exit(3)


def grows(row, *, onnx, report):
    report(row)
    kept = []
    while len(kept) < 2000:
        kept.append(b"x" * 2**20)
    time.sleep(60)


@pytest.mark.parametrize(
    ("case", "limits", "cause"),
    [
        (sleeps, {"seconds": 0.5}, "plan: timeout: over 0.5 s"),
        (aborts, {}, "build: crash: SIGKILL"),
        (exits, {}, "build: crash: exit status 3"),
        pytest.param(
            grows,
            {"memory_gib": 1.2},
            "build: memory: over 1.2 GiB",
            marks=pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not tell"),
        ),
    ],
)
def test_what_ends_a_process_becomes_a_row(case, limits, cause):
    ((_, found),) = sweep.results([sweep.Task(row(), False)], case=case, **limits)
    assert (found.status, found.cause) == ("failed", cause)


def test_what_ends_a_check_leaves_the_rest_of_the_row():
    ((_, found),) = sweep.results([sweep.Task(row(), False)], case=sleeps_late, seconds=0.5)
    assert found.status == "converted"
    assert found.outcomes == {"forward": "ok", "backward": "timeout: over 0.5 s"}


def test_one_that_fails_does_not_end_the_sweep():
    tasks = [sweep.Task(row(name), False) for name in "abc"]
    found = [(task.row.name, made.status) for task, made in sweep.results(tasks, case=finishes, jobs=2)]
    assert sorted(found) == [("a", "converted"), ("b", "converted"), ("c", "converted")]


# Going on where a sweep stopped.


def written(path, *records):
    lines = [json.dumps({"stamp": stamp, "onnx": onnx, "row": sweep.asdict(made)}) for stamp, onnx, made in records]
    path.write_text("\n".join(lines) + '\n{"stamp": "half a li', encoding="utf-8")
    return path


def test_rows_that_are_done_are_skipped(tmp_path):
    file = written(tmp_path / "rows.jsonl", ("now", False, row("a", status="converted")), ("then", False, row("b")))
    known = sweep.read_rows(file, "now")
    tasks = sweep.left_to_do([row("a"), row("b")], known, onnx=False, retry_failed=False)
    assert [task.row.name for task in tasks] == ["b"]


def test_no_file_is_no_rows(tmp_path):
    assert sweep.read_rows(tmp_path / "rows.jsonl", "now") == {}


def test_failures_are_done_again_if_asked_for(tmp_path):
    records = [
        ("now", False, row("a", status="failed", cause="plan: X")),
        ("now", False, done()),
        ("now", True, row("c", status="converted", outcomes={"onnx": "X"})),
    ]
    known = sweep.read_rows(written(tmp_path / "rows.jsonl", *records), "now")
    rows = [row("a"), row("net"), row("c")]
    assert sweep.left_to_do(rows, known, onnx=False, retry_failed=False) == []
    tasks = sweep.left_to_do(rows, known, onnx=False, retry_failed=True)
    assert [(task.row.name, task.onnx) for task in tasks] == [("a", False), ("c", True)]


def test_onnx_is_done_where_it_was_not(tmp_path):
    records = [
        ("now", False, row("a", status="converted")),
        ("now", True, row("b", status="converted")),
        ("now", False, row("c", status="no convolution")),
    ]
    known = sweep.read_rows(written(tmp_path / "rows.jsonl", *records), "now")
    tasks = sweep.left_to_do([row("a"), row("b"), row("c")], known, onnx=True, retry_failed=False)
    assert [task.row.name for task in tasks] == ["a"]


def test_the_smallest_of_a_family():
    known = {
        ("timm", "a"): (row("a", status="converted", params=3), False),
        ("timm", "b"): (row("b", status="converted", params=2), False),
        ("timm", "c"): (row("c", status="failed", params=1), False),
    }
    found = sweep.smallest_of_families([row("a"), row("b"), row("c")], known)
    assert found == [row("b")]


def test_every_family_comes_before_the_second_of_any():
    rows = [Row("timm", name, name[0], "") for name in ("a1", "a2", "a3", "b1", "c1", "c2")]
    assert [row.name for row in sweep.families_first(rows)] == ["a1", "b1", "c1", "a2", "c2", "a3"]


# Models, reasons, the page.


def test_a_patch_embedding_is_no_convolution():
    tiles = nn.Conv2d(3, 8, 4, stride=4)
    assert convolutions(nn.Sequential(tiles, nn.Linear(8, 8))) == []
    assert convolutions(nn.Sequential(tiles, nn.Conv2d(8, 8, 2, stride=2))) == ["1"]
    assert convolutions(nn.Sequential(nn.Conv2d(3, 8, 1))) == ["0"]
    assert convolutions(nn.Sequential(nn.Conv2d(3, 8, 7, stride=4))) == ["0"]
    assert convolutions(nn.Sequential(nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)))) == []


def test_reasons_and_causes_are_put_together():
    assert reason_class("too small to pay: 1,728 parameters would become 1,800") == "too small to pay"
    assert reason_class("called 5 times with different shapes") == "called N times with different shapes"
    assert reason_class("its weight is shared with layer.1") == "its weight is shared with …"
    assert cause_class("no 'a.b' of (3, 4.5)") == cause_class("no 'c' of (12, 1)")


def test_the_page():
    rows = [
        done(outcomes={"unchanged": "ok", "counts": "params are 1 | 2", "onnx": "not run"}, way="fx", values=False),
        row("lost", status="failed", cause="build: crash: SIGSEGV"),
        row("deep", status="nothing to convert", kept={"depthwise": 3, "first layer": 1}),
        row("vit", status="no convolution"),
    ]
    text = page(rows, {"date": "today"})
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "* date: today" in text
    assert "| u·✗······· " in lines["timm:net *"]
    assert "2.00×" in lines["timm:net *"]
    assert "1.25×" in lines["timm:net *"]
    assert "params are 1 \\| 2" in lines["counts"]
    assert "crash: SIGSEGV" in lines["build"]
    assert "depthwise (3); first layer (1)" in text
    assert "timm:vit" not in text
    assert [cell.strip() for cell in lines["all"].split("|")[3:-1]] == ["4", "3", "1", "33.3 %", "0", "1", "1"]


def test_a_page_of_nothing():
    assert "## Models" in page([], {})


# One small model of the major families.


@pytest.fixture
def libraries(monkeypatch):
    """Both libraries; what the sweep puts in the place of a missing operator is taken away again."""
    if not all(map(importlib.util.find_spec, ("torchvision", "timm"))):
        pytest.skip("needs torchvision and timm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchvision = sweep.import_torchvision()
    monkeypatch.setattr(torchvision.ops.boxes, "nms", torchvision.ops.boxes.nms)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet10t",
        "timm:convnext_atto",
        "timm:repvgg_a0",
        "timm:edgenext_xx_small",
        "timm:resnetv2_18",
        "timm:tf_mixnet_s",
        "torchvision:squeezenet1_1",
        "torchvision:googlenet",
        "torchvision:mnasnet0_5",
        "torchvision:lraspp_mobilenet_v3_large",
        "torchvision:raft_small",
    ],
)
def test_a_small_model_of_the_family(name, libraries):
    library, _, model = name.partition(":")
    (known,) = [row for row in sweep.listed(library) if row.name == model]
    found = run_case(known)
    assert (found.status, found.cause) == ("converted", "")
    assert found.failures() == {}
    assert found.outcomes.pop("onnx") == "not run"
    assert set(found.outcomes.values()) == {"ok"}
