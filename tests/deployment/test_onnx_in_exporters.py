"""What other exporters write: shapes that are computed, shared weights, and files that no example can be made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_onnx_in import numbers, scalar, whole, written
from torch import Tensor, nn

from ghostify.deployment.onnx_in import read_model
from ghostify.errors import ArtefactError


class Net(nn.Module):
    """Two convolutions, and what a function makes of their maps."""

    def __init__(self, made: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.made = made

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x, self.second(F.max_pool2d(self.first(x), 2)))


def exported(net: nn.Module, file: Path, dynamic: dict[int, str], opset: int) -> Path:
    """The file that torch's older exporter writes."""
    options = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": dynamic}, "opset_version": opset}
    torch.onnx.export(net, (torch.randn(1, 3, 16, 16),), file, **options)
    return file


@pytest.mark.filterwarnings("ignore")
def test_channels_are_known_behind_a_size_that_is_computed(tmp_path: Path) -> None:
    """Which takes a shape inference that carries sizes on."""
    net = Net(lambda x, maps: torch.cat(F.interpolate(maps, size=x.shape[2:]).chunk(2, 1)[::-1], 1)).eval()
    model, x = read_model(exported(net, tmp_path / "net.onnx", {0: "n"}, 17)), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("dynamic", [{}, {0: "n"}, {0: "n", 2: "h", 3: "w"}], ids=["fixed", "batch", "size"])
@pytest.mark.parametrize(
    "made",
    [
        lambda x, maps: F.interpolate(maps, size=(12, 20), mode="bilinear"),
        lambda x, maps: F.interpolate(maps, size=x.shape[2:], mode="bilinear"),
        lambda x, maps: torch.cat(maps.chunk(2, 1)[::-1], 1),
    ],
    ids=["to a size", "to a size of another map", "chunks"],
)
def test_torch_s_older_exporter_computes_shapes(
    made: Callable[[Tensor, Tensor], Tensor], dynamic: dict[int, str], opset: int, tmp_path: Path
) -> None:
    net, file = Net(made).eval(), tmp_path / "net.onnx"
    model = read_model(exported(net, file, dynamic, opset))
    others = torch.randn(2, 3, 24, 32) if len(dynamic) > 1 else torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(others), net(others), rtol=1e-4, atol=1e-5)


def test_layers_that_share_a_weight_are_one_layer(tmp_path: Path) -> None:
    """Else its parameters were counted twice, and its copies trained apart."""
    weight, other = numbers(4, 4, 3, 3), numbers(4, 4, 3, 3)
    same = {"pads": [1, 1, 1, 1]}
    nodes = [("Conv", ["x", weight], ["a"], dict(same)), ("Conv", ["a", other], ["b"], dict(same))]
    nodes += [("Conv", ["b", "w0_1"], ["c"], dict(same)), ("Conv", ["c", "w0_1"], ["y"], {"pads": [0, 0, 0, 0]})]
    model = read_model(written(tmp_path, nodes))
    calls = [node.target for node in model.graph.nodes if node.op == "call_module"]
    assert calls[0] == calls[2]
    assert len(set(calls)) == 3  # with other options it is another layer
    assert sum(parameter.numel() for parameter in model.parameters()) == 3 * 4 * 4 * 9


def test_a_clip_without_limits_and_places_from_the_end(tmp_path: Path) -> None:
    nodes = [
        ("Clip", ["x"], ["c"], {}),
        ("Gather", ["c", whole(-1, 0, 1, -2)], ["y"], {"axis": 1}),
    ]
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(read_model(written(tmp_path, nodes))(x), x[:, [3, 0, 1, 2]])


def test_a_file_on_which_onnxruntime_crashes_is_not_run(tmp_path: Path) -> None:
    nodes = [
        ("Split", ["x", whole(1, 1, 2)], ["one", "", "two"], {"axis": 1}),
        ("Concat", ["two", "one"], ["y"], {"axis": 1}),
    ]
    with pytest.raises(ArtefactError, match=r"operator Split \(node 0\) leaves out an output"):
        read_model(written(tmp_path, nodes))


def test_the_sides_may_be_named_for_a_resize(tmp_path: Path) -> None:
    nodes = [("Resize", ["x", "", "", whole(9, 12)], ["y"], {"axes": [2, 3], "mode": "linear"})]
    assert read_model(written(tmp_path, nodes))(torch.zeros(1, 4, 6, 6)).shape == (1, 4, 9, 12)
    nodes[0][3]["axes"] = [1, 2]
    with pytest.raises(ArtefactError, match=r"axes=\[1, 2\]"):
        read_model(written(tmp_path, nodes))


@pytest.mark.parametrize("shape", [(2**40, 4, 6, 6), ("n", 4, 2**20, 2**20), (2**62, 4, 6, 2**62)])
def test_inputs_that_no_memory_holds_are_refused(shape: tuple[object, ...], tmp_path: Path) -> None:
    file = written(tmp_path, [("Add", ["x", scalar(1)], ["y"], {})], shape=shape)
    with pytest.raises(ArtefactError, match=r"net\.onnx.* takes an input of shape .* cannot be run beside"):
        read_model(file)


def test_a_failing_run_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """torch.fx prints a traceback of its own for every run that fails."""
    file = written(tmp_path, [("Gather", ["x", whole(9)], ["y"], {"axis": 1})])
    with pytest.raises(ArtefactError, match="out of DATA bounds"):
        read_model(file)
    assert capfd.readouterr() == ("", "")
