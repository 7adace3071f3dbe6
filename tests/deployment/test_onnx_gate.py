"""What an exported file must pass beside random inputs: real images, another size, no operator promised away."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from deployment_nets import SmallNet, make_net
from torch import Tensor, nn

from ghostify.backends.onnx_program import onnx_program
from ghostify.conversion import convert
from ghostify.deployment import ExportConfig, export_onnx, parity
from ghostify.deployment.parity import _parting
from ghostify.errors import ExportError, InputsError
from ghostify.nn.ghost import GhostConv2d
from ghostify.spec import GhostSpec

ONE = ExportConfig(batch_sizes=(1,))


def real(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def test_real_images_are_compared_with_and_without_targets(
    converted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    data = [real(4), (real(3, seed=4), torch.zeros(3, dtype=torch.int64))]
    check = export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, data=data, config=ONE)
    last = check.batches[-1]
    assert (last.source, last.batch, last.top1) == ("data", 7, 1.0)
    assert 0 <= last.relative <= check.tolerance
    assert "data" in check.table()


class Unlike:
    """A session that names another class for the first images of every batch, by next to nothing."""

    def __init__(self, session: object, wrong: int) -> None:
        self.session, self.wrong = session, wrong

    def __getattr__(self, name: str) -> object:
        return getattr(self.session, name)

    def run(self, names: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        (scores,) = self.session.run(names, feed)  # type: ignore[attr-defined]
        for row in scores[: self.wrong]:
            best, second = np.argsort(row)[:-3:-1]
            row[second] = row[best] + 1e-6
        return [scores]


class Even(SmallNet):
    """Two classes that always have nearly the same score, so that an error within the tolerance changes the class."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        return torch.cat([scores[:, :1], scores[:, :1] + 1e-5, scores[:, :1] - 1], 1)


def test_classes_must_agree_on_real_images(tmp_path: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    open_session = parity.open_session
    monkeypatch.setattr(
        "ghostify.deployment.onnx_export.open_session", lambda *args: Unlike(open_session(*args), wrong=1)
    )
    net = Even().eval()
    with pytest.raises(ExportError, match=r"same class for 75\.00% of 8 examples .* agreement=0\.99") as caught:
        export_onnx(net, tmp_path / "m.onnx", example_inputs=images, data=[real(4), real(4, 5)], config=ONE)
    assert caught.value.check.batches[-1].top1 == 0.75
    assert "max rel error" in str(caught.value)
    assert not list(tmp_path.iterdir())
    loose = ExportConfig(batch_sizes=(1,), agreement=0.75)
    export_onnx(net, tmp_path / "m.onnx", example_inputs=images, data=[real(4), real(4, 5)], config=loose)


@pytest.mark.parametrize(
    ("data", "told"),
    [([], "holds no batch"), ([torch.zeros(3, 12, 12)], r"batch 0 holds a tensor of shape \(3, 12, 12\)"),
     (["images"], "batch 0 holds str")],
)  # fmt: skip
def test_data_that_do_not_fit_are_refused_before_anything_is_exported(
    data: list[object], told: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostify.deployment.onnx_export.onnx_program", lambda *_, **__: pytest.fail("exported"))
    with pytest.raises(InputsError, match=told):
        export_onnx(make_net(), tmp_path / "m.onnx", example_inputs=images, data=data, config=ONE)
    assert not list(tmp_path.iterdir())


def test_height_and_width_are_dynamic_if_asked(converted: nn.Module, images: Tensor, tmp_path: Path) -> None:
    config = ExportConfig(batch_sizes=(1,), dynamic_size=True)
    check = export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, config=config)
    assert "random 3×44×76" in [batch.source for batch in check.batches]
    (entry,) = onnx.load(check.path).graph.input
    assert [side.dim_param or side.dim_value for side in entry.type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    other = torch.randn(2, 3, 31, 17)
    (found,) = onnxruntime.InferenceSession(check.path).run(["output"], {"input": other.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, converted(other).numpy(), atol=1e-5)


class OneSize(SmallNet):
    """A classifier that reads every pixel, so that it takes one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(x)).flatten(1))


def test_a_model_of_one_size_is_refused_and_leaves_no_file(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"OneSize does not run .*3, 44, 76.*without dynamic_size"):
        export_onnx(OneSize(), tmp_path / "m.onnx", example_inputs=images, config=ExportConfig(dynamic_size=True))
    assert not list(tmp_path.iterdir())
    export_onnx(OneSize(), tmp_path / "m.onnx", example_inputs=images, config=ONE)


def test_a_size_that_the_file_has_not_learnt_is_found(
    converted: nn.Module, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ghostify.deployment.onnx_export.onnx_program",
        lambda *args, dynamic_size, **options: onnx_program(*args, **options),
    )
    with pytest.raises(ExportError, match=r"onnxruntime fails on a batch of 3 \(random 3×44×76\)"):
        export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, config=ExportConfig(dynamic_size=True))


def units(model: nn.Module) -> list[GhostConv2d]:
    return [unit for unit in model.modules() if isinstance(unit, GhostConv2d)]


@pytest.mark.parametrize("fold", [True, False])
def test_an_index_that_the_plan_promised_away_is_refused(
    fold: bool, converted: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    changed = copy.deepcopy(converted)
    unit = units(changed)[0]
    unit.emit(torch.randperm(unit.out_channels, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ExportError, match=r"1 operators .*\(Gather in 'features\.2'\).*Convert it anew"):
        export_onnx(changed, tmp_path / "m.onnx", example_inputs=images, config=ExportConfig(fold=fold))
    assert not list(tmp_path.iterdir())


def test_an_index_that_the_plan_tells_of_is_counted(images: Tensor, tmp_path: Path) -> None:
    class Residual(SmallNet):
        def forward(self, x: Tensor) -> Tensor:
            maps = self.features(self.stem(x))
            return self.head((maps + maps.flip(1)).mean((2, 3)))  # reads channels by their number

    small = convert(Residual(), ratio=2, example_inputs=images, initialiser="weights")
    assert [decision.order for decision in small.ghostify_plan.replaced] == ["folded", "index"]
    check = export_onnx(small, tmp_path / "m.onnx", example_inputs=images, config=ONE)
    assert check.ops["Gather"] == 1


def test_a_slice_is_in_no_folded_unit(images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = convert(make_net(), spec=GhostSpec(1.5), example_inputs=images, initialiser="weights")
    check = export_onnx(small, tmp_path / "m.onnx", example_inputs=images, config=ONE)
    assert not {"Slice", "Gather", "Transpose"} & set(check.ops)
    loose = export_onnx(
        small, tmp_path / "unfolded.onnx", example_inputs=images, config=ExportConfig(batch_sizes=(1,), fold=False)
    )
    assert loose.ops["Slice"] == 2  # told, and not refused: the unfolded unit needs it
    # Were these units folded ones, it would be.
    monkeypatch.setattr("ghostify.deployment.operators.FoldedGhost", GhostConv2d)
    with pytest.raises(ExportError, match=r"2 operators .*Slice in 'features\.2'"):
        export_onnx(small, tmp_path / "no.onnx", example_inputs=images, config=ExportConfig(fold=False))


def test_original_and_student_are_timed_in_onnxruntime(converted: nn.Module, images: Tensor, tmp_path: Path) -> None:
    check = export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, original=make_net(), config=ONE)
    timed = check.latency
    assert timed is not None
    assert timed.ratio_q25 <= timed.ratio <= timed.ratio_q75
    assert timed.pairs >= 5
    assert timed.backend.startswith("onnxruntime")
    assert f"{timed.ratio:.2f}× as fast" in str(check)
    with pytest.raises(InputsError, match="original='net'"):
        export_onnx(converted, tmp_path / "m.onnx", example_inputs=images, original="net", config=ONE)  # type: ignore[arg-type]


class Told(nn.Module):
    """Returns what a function makes of the maps of a convolution."""

    def __init__(self, told: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.told = told

    def forward(self, mask: Tensor) -> object:
        return self.told(self.conv(mask))


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (lambda maps: {"mean": maps.mean((2, 3)).exp(), "conv2d": maps.relu()}, ["mean", "conv2d"]),
        (lambda maps: {"input": maps, "logits": maps.mean((2, 3))}, ["output_input", "logits"]),
        (lambda maps: {"a": {"b": maps}, "a_b": maps.exp(), "a-b": -maps}, ["a_b", "a_b_", "a_b__"]),
        (lambda maps: (maps, None), ["output_0"]),
    ],
    ids=["operators", "input", "each other", "none"],
)
def test_outputs_keep_their_names_whatever_else_has_them(told, names, images: Tensor, tmp_path: Path) -> None:
    check = export_onnx(Told(told), tmp_path / "net.onnx", example_inputs=images)
    graph = onnx.load(check.path).graph
    assert [entry.name for entry in graph.output] == names
    assert [entry.name for entry in graph.input] == ["input"]


def test_a_number_among_the_outputs_is_named(images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Told returns a value of type int, at \[1\]"):
        export_onnx(Told(lambda maps: (maps, 3)), tmp_path / "net.onnx", example_inputs=images)


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.conv(batch["image"])


def test_a_dictionary_is_an_input_like_any_other(images: Tensor, tmp_path: Path) -> None:
    check = export_onnx(ByName(), tmp_path / "net.onnx", example_inputs=({"image": images},))
    assert [entry.name for entry in onnx.load(check.path).graph.input] == ["input"]


def test_of_whole_numbers_the_share_counts_that_differs() -> None:
    """Class 4998 in the place of 4999 is as wrong as any other."""
    classes = np.array([4999, 7, 3, 0])
    assert _parting(classes, classes) == (0, 0)
    assert _parting(classes, np.array([4998, 7, 3, 0])) == (1, 0.25)
    assert _parting(np.array([True, False]), np.array([True, True])) == (1, 0.5)
    assert _parting(np.array([10.0, 1.0]), np.array([10.0, 2.0])) == (1, 0.1)
    assert _parting(np.array([0.0]), np.array([2.0])) == (2, 2)


def test_a_network_without_convolutions_has_nothing_to_fold(images: Tensor, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 4))
    assert export_onnx(net, tmp_path / "net.onnx", example_inputs=images).ops["Gemm"] == 1
