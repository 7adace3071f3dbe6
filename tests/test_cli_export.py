"""The sub-commands export and describe, and convert from and to ONNX."""

import json

import onnx
import pytest

from ghostify.deployment import read_notes
from ghostify.spec import Plan

EXPORT = ("export", "nets.py:net", "small", "--input-shape", "1,8,8", "--out", "small.onnx")

pytestmark = pytest.mark.usefixtures("student")


def test_export_on_data_with_dynamic_size_and_describe(called, tmp_path):
    status, out, error = called(*EXPORT, "--data", "pictures:images", "--dynamic-size", "--latency", "--json")
    assert status == 0, error
    check = json.loads(out)
    assert [batch["source"] for batch in check["batches"]][-3:] == ["random 1×40×72", "example", "data"]
    assert check["batches"][-1]["top1"] == 1.0
    assert check["latency"]["pairs"] >= 5
    sides = onnx.load(tmp_path / "small.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [side.dim_param for side in sides] == ["batch", "", "height", "width"]
    status, out, _ = called("describe", "small.onnx")
    assert status == 0
    assert "input   input  batch×1×height×width" in out
    assert "CifarResNet: 6 of 7 convolutions become Ghost units" in out
    status, out, _ = called("describe", "small.onnx", "--json")
    assert Plan.from_json(json.dumps(json.loads(out)["plan"])).replaced


@pytest.mark.parametrize("style", ["table", "json"])
def test_a_gate_that_fails_shows_the_table_and_ends_with_status_1(called, tmp_path, style):
    status, out, error = called(*EXPORT, "--tolerance", "1e-12", *(["--json"] if style == "json" else []))
    assert status == 1
    assert error.startswith("ghostify: path='small.onnx' is not written")
    assert error.count("\n") == 1
    if style == "json":
        assert json.loads(out)["tolerance"] == 1e-12
    else:
        assert out.startswith("inputs    examples    max abs error")
        assert len(out.splitlines()) == 6
    assert not (tmp_path / "small.onnx").exists()


def test_what_is_no_onnx_is_an_error_in_one_line(called):
    status, out, error = called("describe", "nets.py")
    assert (status, out) == (1, "")
    assert "no ONNX file" in error


def test_an_onnx_file_becomes_a_smaller_one(called, tmp_path):
    status, _, error = called(*EXPORT)
    assert status == 0, error
    (tmp_path / "small.onnx").rename(tmp_path / "net.onnx")
    status, out, error = called("convert", "net.onnx", "--out", "ghost.onnx", "--ratio", "4")
    assert status == 0, error
    assert "random" not in error  # its weights are in the file
    assert "become Ghost units" in out
    assert "max rel error" in out
    notes = read_notes(tmp_path / "ghost.onnx")
    assert notes.plan.replaced
    assert notes.inputs == {"input": "batch×1×8×8"}
    assert called("plan", "onnx:net.onnx", "--json")[0] == 0


def test_an_onnx_file_and_its_student_are_compared(called, tmp_path):
    assert called(*EXPORT)[0] == 0
    assert called("convert", "small.onnx", "--out", "smaller", "--json")[0] == 0
    status, out, error = called("compare", "small.onnx", "smaller", "--json")
    assert status == 0, error
    report = json.loads(out)
    assert report["compressed"]["params"] < report["original"]["params"]
