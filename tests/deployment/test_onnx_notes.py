"""What an ONNX file tells about itself, and reading it from a file that anybody may have written."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import onnx
import pytest
import torch
from deployment_nets import make_net
from torch import Tensor, nn

from ghostify.deployment import ExportCheck, ExportConfig, export_onnx, onnx_notes, read_notes
from ghostify.errors import ArtefactError, ExportError

ONE = ExportConfig(batch_sizes=(1,))


@pytest.fixture
def exported(converted: nn.Module, images: Tensor, tmp_path: Path) -> ExportCheck:
    return export_onnx(converted, tmp_path / "small.onnx", example_inputs=images, config=ONE)


def test_plan_versions_and_fingerprint_are_read_back(exported: ExportCheck, converted: nn.Module) -> None:
    notes = read_notes(exported.path)
    assert notes.plan == converted.ghostify_plan
    assert notes.base_fingerprint == converted.ghostify_plan.fingerprint
    assert (notes.model, notes.torch, notes.opset) == ("SmallNet", torch.__version__, exported.opset)
    assert notes.ghostify == importlib.metadata.version("ghostify")
    assert notes.inputs == {"input": "batch×3×12×12"}
    assert notes.outputs == {"output": "batch×5"}
    assert "features.2" in str(notes)
    assert '"base_fingerprint"' in notes.to_json()


def test_an_original_has_no_plan(images: Tensor, tmp_path: Path) -> None:
    notes = read_notes(export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images, config=ONE).path)
    assert (notes.plan, notes.base_fingerprint, notes.model) == (None, "", "SmallNet")


def test_names_are_the_same_at_every_export_and_in_every_form(
    exported: ExportCheck, converted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    forms = [
        (converted, ExportConfig(batch_sizes=(1,), fold=False)),
        (converted, ExportConfig(batch_sizes=(1,), dynamic_size=True)),
        (make_net(), ONE),
    ]
    first = read_notes(exported.path)
    for number, (model, config) in enumerate(forms):
        file = export_onnx(model, tmp_path / f"{number}.onnx", example_inputs=images, config=config).path
        again = read_notes(file)
        assert list(again.inputs) == list(first.inputs) == ["input"]
        assert list(again.outputs) == list(first.outputs) == ["output"]


def test_the_same_model_makes_the_same_bytes(
    exported: ExportCheck, converted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    again = export_onnx(converted, tmp_path / "again.onnx", example_inputs=images, config=ONE)
    assert again.path.read_bytes() == exported.path.read_bytes()


def changed(file: Path, key: str, value: str) -> Path:
    proto = onnx.load(file)
    (entry,) = (entry for entry in proto.metadata_props if entry.key == key)
    entry.value = value
    file.write_bytes(proto.SerializeToString())
    return file


@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"model": NaN}', "null"])
def test_a_damaged_plan_is_refused(text: str, exported: ExportCheck) -> None:
    with pytest.raises(ArtefactError, match=r"small\.onnx.*ghostify\.plan"):
        read_notes(changed(exported.path, "ghostify.plan", text))


def test_a_plan_that_is_too_large_is_neither_written_nor_read(
    exported: ExportCheck, converted: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_notes, "MAX_PLAN_BYTES", 100)
    with pytest.raises(ArtefactError, match="it is not read"):
        read_notes(exported.path)
    with pytest.raises(ExportError, match="more than the 100"):
        export_onnx(converted, tmp_path / "again.onnx", example_inputs=images, config=ONE)
    assert not (tmp_path / "again.onnx").exists()


@pytest.mark.parametrize("content", [b"", b"no protocol buffer at all", b"\x08\x0a"])
def test_what_is_no_onnx_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "x.onnx"
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match="no ONNX file"):
        read_notes(file)
    with pytest.raises(ArtefactError, match="is not a file"):
        read_notes(tmp_path / "nowhere.onnx")


def test_a_truncated_file_is_refused(exported: ExportCheck) -> None:
    exported.path.write_bytes(exported.path.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match="damaged"):
        read_notes(exported.path)


def test_a_file_of_another_program_tells_what_it_can(tmp_path: Path) -> None:
    kind = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["a"], ["b"])], "g", [kind("a", 1, ["n", None, 4])], [kind("b", 1, None)]
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "x.onnx")
    notes = read_notes(tmp_path / "x.onnx")
    assert notes.inputs == {"a": "n×?×4"}
    assert "not written by ghostify" in str(notes)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x)
        return torch.cond(x.sum() > 0, lambda maps: maps.relu() + 1, lambda maps: maps.exp(), (maps,))


def test_branches_tell_nothing_of_this_machine_either(images: Tensor, tmp_path: Path) -> None:
    check = export_onnx(Branches(), tmp_path / "net.onnx", example_inputs=images, config=ExportConfig(fold=False))
    assert check.ops["If"] == 1
    content = check.path.read_bytes()
    assert Path(__file__).name.encode() not in content
    assert b"stack_trace" not in content
