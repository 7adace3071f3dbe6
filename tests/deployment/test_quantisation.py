"""Networks in 8 bits, and the gate that they pass."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deployment_nets import SmallNet, make_net
from torch import Tensor, nn

from ghostify.conversion import convert
from ghostify.deployment import QuantisationCheck, QuantisationConfig, export_onnx, quantise_onnx, read_notes
from ghostify.errors import ArtefactError, ExportError, InputsError, OptionError


def digits(count: int, seed: int = 0) -> Tensor:
    """Images on which the network's answers are not all the same."""
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * torch.linspace(
        0.2, 3, count
    ).view(-1, 1, 1, 1)


def answers(file: Path, images: Tensor) -> np.ndarray:
    found: np.ndarray = onnxruntime.InferenceSession(file).run(None, {"input": images.numpy()})[0]
    return found


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, QuantisationCheck]:
    images = digits(96)
    net = make_net(width=24)
    net(images)  # norms get statistics
    small = convert(net, ratio=2, example_inputs=images[:2], initialiser="weights").train()
    path = tmp_path_factory.mktemp("int8") / "small.onnx"
    data = [(digits(40, seed=1), torch.zeros(40, dtype=torch.int64))]
    return small, quantise_onnx(small, path, calibration=images, data=data)


def test_the_file_answers_like_the_floats(quantised: tuple[nn.Module, QuantisationCheck]) -> None:
    small, check = quantised
    images = digits(33, seed=2)
    assert all(module.training for module in small.modules())
    wanted = small.eval()(images).detach().numpy()
    small.train()
    found = answers(check.path, images)
    assert 0 < np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_weights_and_activations_are_bytes(quantised: tuple[nn.Module, QuantisationCheck]) -> None:
    _, check = quantised
    proto = onnx.load(check.path)
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    maps = [value for value in weights.values() if value.ndim == 4]
    assert maps
    assert {value.dtype for value in maps} == {np.dtype(np.int8)}
    assert max(np.abs(value.astype(int)).max() for value in maps) <= 64  # 7 of 8 bits
    scales = [value for name, value in weights.items() if name.endswith("weight_scale") or "_scale" in name]
    assert any(value.ndim == 1 and len(value) > 1 for value in scales)  # one for each output channel
    assert check.ops["QuantizeLinear"] > 5
    assert check.bytes == check.path.stat().st_size < 0.6 * check.float_bytes
    assert [entry.name for entry in check.path.parent.iterdir()] == ["small.onnx"]


def test_the_check_says_what_was_compared(quantised: tuple[nn.Module, QuantisationCheck]) -> None:
    _, check = quantised
    compared = [(batch.source, batch.batch) for batch in check.batches]
    assert compared == [("calibration", n) for n in (1, 2, 5, 96)] + [("data", 40)]
    assert check.images == 96
    assert check.top1 == check.batches[-1].top1
    assert 0.9 <= check.top1 <= 1
    assert 0 < check.relative < 0.2
    assert "bytes in int8" in str(check)
    assert json.loads(check.to_json())["float_bytes"] == check.float_bytes


def test_the_plan_stays_in_the_file(quantised: tuple[nn.Module, QuantisationCheck]) -> None:
    small, check = quantised
    notes = read_notes(check.path)
    assert notes.plan == small.ghostify_plan
    assert notes.inputs == {"input": "batch×3×12×12"}


def test_a_file_is_taken_too_and_quantised_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=digits(2))
    config = QuantisationConfig(images=16, agreement=0.0, batch_sizes=(3,))
    check = quantise_onnx(tmp_path / "net.onnx", tmp_path / "small.onnx", calibration=[digits(10)] * 9, config=config)
    assert check.images == 20  # the batch that reaches 16 is the last one
    assert check.float_bytes == (tmp_path / "net.onnx").stat().st_size
    assert capsys.readouterr().out == ""
    assert not logging.root.manager.disable
    with pytest.raises(InputsError, match="quantised already"):
        quantise_onnx(tmp_path / "small.onnx", tmp_path / "again.onnx", calibration=digits(10))
    with pytest.raises(ArtefactError, match=r"none\.onnx"):
        quantise_onnx(tmp_path / "none.onnx", tmp_path / "again.onnx", calibration=digits(10))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["net.onnx", "small.onnx"]


class Cliff(SmallNet):
    """Its classes differ in the fifth digit of a score, which 8 bits do not hold."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e-5 * super().forward(x) + 1.0


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "net.onnx").write_bytes(b"older")
    with pytest.raises(ExportError, match=r"is not written: in 8 bits .* of 40 images \(data\)") as caught:
        quantise_onnx(Cliff(), tmp_path / "net.onnx", calibration=digits(32), data=[digits(40, seed=1)])
    assert caught.value.check.top1 < 0.9
    assert "same top-1" in str(caught.value)
    assert (tmp_path / "net.onnx").read_bytes() == b"older"
    with pytest.raises(ExportError, match=r"of 32 images \(calibration\)"):
        quantise_onnx(Cliff(), tmp_path / "net.onnx", calibration=digits(32))
    assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]


class Drowned(nn.Module):
    """Maps that come from a few units on top of three hundred, which 8 bits cannot tell apart."""

    def __init__(self, classes: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.classes = classes

    def forward(self, x: Tensor) -> object:
        maps = self.conv(x + 300) - 300 * self.conv.weight.sum((1, 2, 3)).view(1, -1, 1, 1)
        return (x.mean((2, 3)), maps) if self.classes else maps


@pytest.mark.parametrize("classes", [False, True])
def test_what_are_no_class_scores_must_be_near_the_floats(classes: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "net.onnx"
    with pytest.raises(ExportError, match=r"part from float32 by .*, more than tolerance=0\.25") as caught:
        quantise_onnx(Drowned(classes), file, calibration=digits(32))
    assert caught.value.check.relative > 0.3
    assert not file.exists()
    config = QuantisationConfig(tolerance=float("inf"))
    assert quantise_onnx(Drowned(classes), file, calibration=digits(32), config=config).relative > 0.3


def test_a_file_of_an_older_operator_set_is_named(tmp_path: Path) -> None:
    check = export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=digits(2))
    proto = onnx.load(check.path)
    proto.opset_import[0].version = 11
    onnx.save(proto, check.path)
    with pytest.raises(InputsError, match=r"written for opset 11, .* 13 or later"):
        quantise_onnx(check.path, tmp_path / "small.onnx", calibration=digits(10))


def test_weights_may_be_listed_among_the_inputs(tmp_path: Path) -> None:
    check = export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=digits(2))
    proto = onnx.load(check.path)
    for weight in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    onnx.save(proto, check.path)
    config = QuantisationConfig(agreement=0.0)
    small = quantise_onnx(check.path, tmp_path / "small.onnx", calibration=digits(10), config=config)
    assert small.ops["QuantizeLinear"] > 5
    assert small.bytes < 0.6 * small.float_bytes


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputsError, match="model=5 is neither a network nor a file"):
        quantise_onnx(5, tmp_path / "small.onnx", calibration=digits(10))


def test_images_that_do_not_fit_are_named(tmp_path: Path) -> None:
    export_onnx(make_net(), tmp_path / "net.onnx", example_inputs=digits(2))
    with pytest.raises(ExportError, match=r"cannot be quantised on images of shape \(4, 12, 12\)"):
        quantise_onnx(tmp_path / "net.onnx", tmp_path / "small.onnx", calibration=torch.zeros(2, 4, 12, 12))
    with pytest.raises(InputsError, match="2 tensors for one call"):
        quantise_onnx(tmp_path / "net.onnx", tmp_path / "small.onnx", calibration=[{"a": digits(2), "b": digits(2)}])
    with pytest.raises(InputsError, match="calibration is empty"):
        quantise_onnx(tmp_path / "net.onnx", tmp_path / "small.onnx", calibration=[])


@pytest.mark.parametrize(
    "wrong",
    [{"images": 0}, {"ranges": "widest"}, {"agreement": 90}, {"tolerance": 0}, {"batch_sizes": (0,)}],
    ids=lambda w: next(iter(w)),
)
def test_options_out_of_range_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(wrong))}="):
        QuantisationConfig(**wrong)  # type: ignore[arg-type]
