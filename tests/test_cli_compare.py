"""The sub-command compare with --with."""

import json
import sys

import pytest

from ghostify import cli_compare

pytestmark = pytest.mark.usefixtures("student")
COMPARE = ("compare", "nets.py:net", "small", "--data", "pictures:images")


def test_int8_stands_under_a_key_of_its_own(called, tmp_path):
    status, out, error = called(*COMPARE, "--with", "int8", "--images", 8, "--onnx", "files", "--json")
    assert status == 0, error
    told = json.loads(out)
    names = [form["name"] for form in told["deployed"]["forms"]]
    assert names == ["original", "original int8", "Ghost", "Ghost int8"]
    assert told["original"]["params"] == told["deployed"]["forms"][0]["params"]
    assert told["deployed"]["examples"] == 8
    assert sorted(file.stem for file in (tmp_path / "files").iterdir()) == sorted(names)


@pytest.mark.slow
def test_the_table_follows_the_report(called):
    pytest.importorskip("torch_pruning")
    status, out, error = called(*COMPARE, "--with", "int8,pruning", "--images", 8)
    assert status == 0, error
    report, table = out.split("\nAs deployed: ")
    assert "MACs" in report
    assert "norms estimated anew on the calibration images" in table
    assert [line.split("  ")[0] for line in table.splitlines()[5:9]] == ["Ghost", "Ghost int8", "pruned", "pruned int8"]


def test_what_cannot_be_compared_is_told_before_anything_is_measured(called):
    status, out, error = called(*COMPARE, "--with", "int4")
    assert (status, out) == (1, "")
    assert "with='int4': 'int4' is unknown" in error
    status, out, error = called("compare", "nets.py:net", "small", "--with", "int8", "--input-shape", "1,8,8")
    assert (status, out) == (1, "")
    assert "--data" in error


def test_options_of_deployed_forms_need_these(called):
    status, out, error = called(*COMPARE, "--onnx", "files", "--images", 7)
    assert (status, out) == (1, "")
    assert "--onnx files, --images 7 would be ignored without --with" in error


@pytest.mark.parametrize(
    ("missing", "arguments", "told"),
    [
        ("torch_pruning", ("--with", "pruning"), "ghostify[bench]"),
        ("onnxruntime", ("--with", "int8"), "ghostify[onnx]"),
        ("jinja2", ("--out", "page.html"), "ghostify[report]"),
        ("nothing", ("--out", "page.doc"), "ends in '.doc', which names no format"),
        ("nothing", ("--history", "nowhere.json"), "nowhere.json"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_read(called, monkeypatch, missing, arguments, told):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(cli_compare, "trained", lambda *given: pytest.fail("a network was read"))
    status, out, error = called(*COMPARE, *arguments)
    assert (status, out) == (1, "")
    assert told in error
