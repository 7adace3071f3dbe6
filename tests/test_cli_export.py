"""The sub-commands export and describe, and convert from and to ONNX."""

import json

import onnx
import pytest

from ghostify.deployment import quantisation, read_notes
from ghostify.deployment.parity import BatchCheck
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


INT8 = (*EXPORT[:3], "--out", "small.onnx", "--int8")


def test_int8_comes_from_images_and_passes_the_gate_on_others(called, tmp_path):
    status, out, error = called(*INT8, "--data", "pictures:images", "--images", "6", "--agreement", "0", "--json")
    assert status == 0, error
    check = json.loads(out)
    assert check["images"] == 6
    assert [(batch["source"], batch["batch"]) for batch in check["batches"]][-2:] == [("calibration", 6), ("data", 8)]
    graph = onnx.load(tmp_path / "small.onnx").graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == check["ops"]["QuantizeLinear"] > 5
    assert read_notes(tmp_path / "small.onnx").plan.replaced
    status, out, _ = called(*INT8, "--data", "pictures:images", "--agreement", "0", "--ranges", "percentile")
    assert status == 0
    assert "bytes in int8" in out
    assert "ranges percentile of 8 images" in out


@pytest.mark.parametrize("style", ["table", "json"])
def test_an_int8_gate_that_fails_shows_the_table_and_ends_with_status_1(called, tmp_path, style, monkeypatch):
    (tmp_path / "small.onnx").write_bytes(b"older")
    monkeypatch.setattr(quantisation, "compare_on_data", lambda *_: BatchCheck(8, "data", 1.0, 0.5, 0.25))
    status, out, error = called(*INT8, "--data", "pictures:images", *(["--json"] if style == "json" else []))
    assert status == 1
    assert error.count("\n") == 1
    assert error.startswith("ghostify: path='small.onnx' is not written: in 8 bits 25.00% of 8 images (data)")
    assert "agreement=0.9." in error
    if style == "json":
        assert json.loads(out)["batches"][-1]["top1"] == 0.25
    else:
        assert out.startswith("inputs       examples    max abs error")
    assert (tmp_path / "small.onnx").read_bytes() == b"older"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--int8",), "int8: 8-bit ranges come from images. Name a data set with --data"),
        (("--int8", "--data", "pictures:images", "--latency"), "--latency True would be ignored"),
        (("--int8", "--data", "pictures:images", "--opset", "18"), "--opset 18 would be ignored"),
        (("--int8", "--data", "pictures:images", "--input-shape", "1,8,8"), "--input-shape 1,8,8 would be ignored"),
        (("--images", "6", "--input-shape", "1,8,8"), "images=6 is of --int8 alone"),
        (("--ranges", "minmax", "--input-shape", "1,8,8"), "ranges='minmax' is of --int8 alone"),
    ],
    ids=lambda part: part[-2] if isinstance(part, tuple) and len(part) > 1 else None,
)
def test_options_that_do_not_go_with_int8_are_named(called, tmp_path, options, told):
    status, out, error = called(*EXPORT[:3], "--out", "small.onnx", *options)
    assert (status, out) == (1, "")
    assert told in error
    assert not (tmp_path / "small.onnx").exists()
