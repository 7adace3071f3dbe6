from __future__ import annotations

import copy
import errno
import importlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deployment_nets import SmallNet, make_net
from torch import Tensor, nn

from ghostify.deployment import ExportCheck, ExportConfig, export_onnx, onnx_export
from ghostify.deployment.parity import _largest_difference
from ghostify.errors import ExportError, InputsError, MissingExtraError, OptionError, OutputError, TraceError


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ExportCheck]:
    from ghostify.conversion import convert

    images = torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    small = convert(make_net(), ratio=2, example_inputs=images, initialiser="weights")
    small.train()
    return small, export_onnx(small, tmp_path_factory.mktemp("onnx") / "small.onnx", example_inputs=images)


def test_the_file_computes_the_same_on_a_batch_that_was_not_checked(exported: tuple[nn.Module, ExportCheck]) -> None:
    small, check = exported
    session = onnxruntime.InferenceSession(check.path)
    images = torch.randn(7, 3, 12, 12, generator=torch.Generator().manual_seed(2))
    (found,) = session.run(["output"], {"input": images.numpy()})
    with torch.no_grad():
        wanted = copy.deepcopy(small).eval()(images).numpy()
    assert found.shape == (7, 5)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_the_check_says_what_was_found(exported: tuple[nn.Module, ExportCheck]) -> None:
    _, check = exported
    assert [(b.source, b.batch) for b in check.batches] == [("random", 1), ("random", 2), ("random", 5), ("example", 3)]
    assert check.relative == max(b.relative for b in check.batches) <= check.tolerance == 1e-3
    assert all(b.top1 == 1.0 for b in check.batches)
    assert check.bytes == check.path.stat().st_size
    assert sum(check.ops.values()) == len(onnx.load(check.path).graph.node)
    assert "max rel error" in str(check)


def test_the_model_is_left_in_its_modes(exported: tuple[nn.Module, ExportCheck]) -> None:
    small, _ = exported
    assert all(module.training for module in small.modules())


def test_operators_are_those_of_a_ghost_network(exported: tuple[nn.Module, ExportCheck]) -> None:
    _, check = exported
    # No gather, since the order is folded; no transposition, no reshaping of feature maps.
    # A stem, and of each of two units the primary, its ghosts, and the norm of the intrinsic channels.
    assert check.ops["Conv"] == 7
    assert check.ops["Concat"] == 2
    assert "BatchNormalization" not in check.ops
    assert all(a.i == 1 for n in onnx.load(check.path).graph.node if n.op_type == "Concat" for a in n.attribute)
    assert not {"Gather", "Transpose", "Reshape", "Expand", "ScatterND", "Where", "Cast"} & set(check.ops)


def test_the_file_is_described_and_tells_nothing_of_this_machine(exported: tuple[nn.Module, ExportCheck]) -> None:
    small, check = exported
    proto = onnx.load(check.path)
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    assert properties["ghostify.model"] == "SmallNet"
    assert properties["ghostify.base_fingerprint"] == small.ghostify_plan.fingerprint
    assert properties["ghostify.version"]
    assert [entry.name for entry in proto.graph.input] == ["input"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert str(Path(__file__).parent).encode() not in check.path.read_bytes()


def test_one_file_and_nothing_beside_it(exported: tuple[nn.Module, ExportCheck]) -> None:
    _, check = exported
    assert [entry.name for entry in check.path.parent.iterdir()] == ["small.onnx"]


def test_a_file_that_computes_something_else_is_not_kept(
    tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = make_net().eval()
    plain_copy = onnx_export._plain_copy

    def broken(model: nn.Module) -> nn.Module:
        plain = plain_copy(model)
        with torch.no_grad():
            plain.head.weight.mul_(1.01)
        return plain

    older = tmp_path / "net.onnx"
    older.write_bytes(b"older")
    monkeypatch.setattr(onnx_export, "_plain_copy", broken)
    with pytest.raises(ExportError) as caught:
        export_onnx(net, older, example_inputs=images)
    assert "max abs error" in str(caught.value)
    assert "tolerance=0.001" in str(caught.value)
    assert older.read_bytes() == b"older"
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


class Many(nn.Module):
    """Two batched inputs, one that is not, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor, scale: Tensor, *, shift: Tensor) -> dict[str, object]:
        maps = self.conv(image) * scale + shift[:, :, None, None]
        return {"pooled": maps.mean((2, 3)), "rest": (maps, maps.sum())}


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    arguments = {"image": torch.randn(2, 3, 6, 6), "shift": torch.randn(2, 4), "scale": torch.tensor(3.0)}
    check = export_onnx(Many(), tmp_path / "many.onnx", example_inputs=arguments)
    graph = onnx.load(check.path).graph
    assert {entry.name for entry in graph.input} == {"image", "scale", "shift"}
    assert [entry.name for entry in graph.output] == ["pooled", "rest_0", "rest_1"]
    assert check.relative < 1e-4


class Indexed(nn.Module):
    """Reads a table at whole numbers: random ones would lie outside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.table = nn.Embedding(3, 4)

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.conv(image) + self.table(label)[:, :, None, None]
        return maps, maps.amax((2, 3))


def test_whole_numbers_are_repeated_and_not_invented(tmp_path: Path) -> None:
    inputs = (torch.randn(2, 3, 6, 6), torch.tensor([2, 0]))
    check = export_onnx(Indexed(), tmp_path / "indexed.onnx", example_inputs=inputs)
    assert [entry.name for entry in onnx.load(check.path).graph.output] == ["output_0", "output_1"]
    assert check.batches[0].top1 is None


def test_half_precision_and_channels_last_become_a_plain_float32_file(tmp_path: Path, images: Tensor) -> None:
    net = make_net().to(torch.bfloat16, memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    check = export_onnx(net, tmp_path / "net.onnx", example_inputs=images, config=ExportConfig(batch_sizes=[2]))
    graph = onnx.load(check.path).graph
    assert {entry.data_type for entry in graph.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    export_onnx(
        make_net(), tmp_path / "plain.onnx", example_inputs=images.contiguous(), config=ExportConfig(batch_sizes=[2])
    )
    assert graph.node == onnx.load(tmp_path / "plain.onnx").graph.node
    assert net.head.weight.dtype == torch.bfloat16
    assert not net.stem.weight.is_contiguous()


class LooksAtValues(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_a_model_that_cannot_be_exported_is_refused_and_leaves_no_file(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(ExportError, match=r"LooksAtValues cannot be exported .*data-dependent.*depends on values"):
        export_onnx(LooksAtValues(), tmp_path / "net.onnx", example_inputs=images)
    assert not list(tmp_path.iterdir())


class AtMostThree(SmallNet):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 3:
            raise ValueError("at most three images")
        return super().forward(x)


def test_a_batch_that_the_model_does_not_take_is_named(tmp_path: Path, images: Tensor) -> None:
    with pytest.raises(ExportError, match=r"fails on a batch of 5 .*at most three images.*batch_sizes"):
        export_onnx(AtMostThree(), tmp_path / "net.onnx", example_inputs=images)
    assert not list(tmp_path.iterdir())


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"\(1, 4, 12, 12\)"):
        export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=torch.zeros(1, 4, 12, 12))
    with pytest.raises(InputsError, match="example_inputs=None"):
        export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=None)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"tolerance": 0.0}, {"agreement": 99.0}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        ExportConfig(**options)


def test_a_full_disk_leaves_nothing(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images, config=ExportConfig(batch_sizes=[1]))
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed_and_loggers_keep_their_levels(
    tmp_path: Path, images: Tensor, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("torch.onnx").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images, config=ExportConfig(batch_sizes=[1]))
    out, err = capfd.readouterr()
    assert out + err == ""
    assert logging.getLogger("torch.onnx").level == level


def test_exporting_leaves_the_random_state_alone(tmp_path: Path, images: Tensor) -> None:
    before = torch.get_rng_state()
    export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images, config=ExportConfig(batch_sizes=[1]))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_missing_package_names_the_extra(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"ghostify\[onnx\]"):
        export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=images)


def test_differences_that_are_no_numbers_are_infinite() -> None:
    nan, inf = float("nan"), float("inf")
    assert _largest_difference(np.array([1.0, inf]), np.array([1.5, inf])) == 0.5
    assert _largest_difference(np.array([nan]), np.array([nan])) == inf
    assert _largest_difference(np.array([1.0]), np.array([inf])) == inf
    assert _largest_difference(np.array([-inf]), np.array([inf])) == inf


def test_importing_the_stage_imports_no_optional_package() -> None:
    code = "import sys, ghostify.deployment; print([m for m in ('onnx', 'onnxruntime', 'timm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_operator_set_is_what_was_asked_for_or_an_error(
    converted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    check = export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, config=ExportConfig(opset=20))
    assert check.opset == onnx.load(tmp_path / "m.onnx").opset_import[0].version == 20
    with pytest.raises(ExportError, match="opset=9 cannot be had: the exporter writes opset 18"):
        export_onnx(converted, tmp_path / "old.onnx", example_inputs=images, config=ExportConfig(opset=9))
    assert not (tmp_path / "old.onnx").exists()
