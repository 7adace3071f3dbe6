"""The sweep over all models: its bookkeeping, one small model of the major families, and torchvision as a whole."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.coverage import sweep
from benchmarks.coverage.case import reason_class, run_case
from benchmarks.coverage.checks import CHECKS
from benchmarks.coverage.models import convolutions, import_torchvision, listed
from benchmarks.coverage.page import cause_class, page
from benchmarks.coverage.processes import Limits, in_process
from benchmarks.coverage.rows import (  # fmt: skip
    CONVERTED,
    FAILED,
    NO_CONVOLUTION,
    NOTHING_PAYS,
    OK,
    REFUSED,
    Row,
    append_row,
    document,
    read_rows,
)

REPOSITORY = Path(__file__).parents[1]
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


def converted_and_checked(library, name):
    """Everything that the sweep does with one model, but for ONNX."""
    (found,) = [row for row in listed(library) if row.name == name]
    run_case(found, lambda row: None, checks=[check for check in CHECKS if check != "onnx"])
    assert (found.status, found.cause) == (CONVERTED, "")
    assert found.replaced > 0
    assert not {check: told for check, told in found.outcomes.items() if told not in (OK, "not run: no values (meta)")}


# The smallest model of every family of timm; those that take longer are slow tests.
FAMILIES = """
starnet_s050 test_byobnet test_convnext test_efficientnet test_mambaout test_resnet
""".split()  # noqa: SIM905 - a list of words
LARGER_FAMILIES = """
coat_tiny convmixer_768_32 cpubone_nano crossvit_9_dagger_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny
densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvit_b0
efficientvit_m0 ese_vovnet19b_slim_dw fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny ghostnet_050 halonet_h1
hardcorenas_b hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mobilenetv3_small_050 mobilenetv5_base
mobilevit_xxs nasnetalarge nest_tiny nextvit_small pnasnet5large poolformerv2_s12 pvt_v2_b0 rdnet_tiny regnetx_002
repghostnet_050 repvit_m1 res2next50 resnest14d resnetv2_18 rexnet_100 samvit_base_patch16 selecsls42 sequencer2d_s
shvit_s1 skresnet18 swiftformer_xs test_coatnet test_nfnet tiny_vit_5m_224 tresnet_m twins_svt_small vgg11
visformer_tiny vit_tiny_r_s16_p8_224 vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905 - a list of words
TASKS = ["squeezenet1_1"]
LARGER_TASKS = ["mnasnet0_5", "shufflenet_v2_x0_5", "lraspp_mobilenet_v3_large", "raft_small", "r3d_18"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_model_of_a_family_of_timm(libraries, name):
    converted_and_checked("timm", name)


@pytest.mark.parametrize("name", TASKS)
def test_a_small_model_of_a_task_of_torchvision(libraries, name):
    converted_and_checked("torchvision", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER_FAMILIES)
def test_a_larger_model_of_a_family_of_timm(libraries, name):
    converted_and_checked("timm", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGER_TASKS)
def test_a_larger_model_of_a_task_of_torchvision(libraries, name):
    converted_and_checked("torchvision", name)


@pytest.mark.slow
def test_every_model_of_torchvision(libraries, tmp_path):
    """Converted, or nothing to convert; the checks are in docs/coverage.md."""
    rows = tmp_path / "rows.jsonl"
    report = ["--page", str(tmp_path / "page.md"), "--json", str(tmp_path / "page.json")]
    command = [sys.executable, "-m", "benchmarks.coverage", "--library", "torchvision", "--seconds", "300"]
    subprocess.run([*command, "--rows", str(rows), *report], cwd=REPOSITORY, check=True)
    found = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["rows"]
    assert len(found) > 100
    assert {row["status"] for row in found} == {CONVERTED, NOTHING_PAYS, NO_CONVOLUTION}
