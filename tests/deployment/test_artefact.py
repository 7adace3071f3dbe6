from __future__ import annotations

import copy
import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from deployment_nets import SmallNet, make_net
from torch import Tensor, nn

from ghostify.conversion import convert
from ghostify.deployment import load, save
from ghostify.errors import ArtefactError, OutputError
from ghostify.nn.ghost import GhostConv2d
from ghostify.spec import GhostSpec


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_round_trip_keeps_outputs_state_and_plan(
    converted: nn.Module, stored: Path, base: SmallNet, images: Tensor
) -> None:
    again = load(stored, base=base)
    assert type(again) is SmallNet
    assert same_state(again, converted)
    assert again.ghostify_plan == converted.ghostify_plan
    assert torch.equal(again(images), converted(images))
    assert not any(module.training for module in again.modules())


def test_the_example_really_has_reordered_channels(converted: nn.Module) -> None:
    orders = [m.output_channels for m in converted.modules() if isinstance(m, GhostConv2d)]
    assert len(orders) == 2
    assert any(order is not None for order in orders)


def test_the_folder_holds_two_files_of_json_and_safetensors(stored: Path, converted: nn.Module) -> None:
    assert sorted(file.name for file in stored.iterdir()) == ["plan.json", "weights.safetensors"]
    document = json.loads((stored / "plan.json").read_text())
    assert (document["format"], document["version"]) == ("ghostify-artefact", 1)
    assert document["content"]["base"].endswith(".SmallNet")
    assert document["content"]["weights_bytes"] == (stored / "weights.safetensors").stat().st_size
    tensors = safetensors.torch.load_file(stored / "weights.safetensors")
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        name: list(t.shape) for name, t in converted.state_dict().items()
    }
    assert document["content"]["tensors"]["head.weight"] == {"shape": [5, 16], "dtype": "float32", "same_as": None}


def test_load_leaves_the_base_as_it_was(stored: Path, base: SmallNet) -> None:
    base.train()
    base.features[1].training = False
    before = copy.deepcopy(base.state_dict())
    flags = [module.training for module in base.modules()]
    load(stored, base=base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert [module.training for module in base.modules()] == flags
    assert not hasattr(base, "ghostify_plan")


def test_save_leaves_the_model_as_it_was(converted: nn.Module, tmp_path: Path) -> None:
    converted.train()
    before = copy.deepcopy(converted.state_dict())
    save(converted, tmp_path / "out")
    assert converted.training
    assert all(torch.equal(value, before[name]) for name, value in converted.state_dict().items())


@pytest.mark.parametrize("spec", [GhostSpec(1.25), GhostSpec(3, fusion="add"), GhostSpec(2, dw_size=5, fusion="mul")])
def test_every_fusion_comes_back(spec: GhostSpec, base: SmallNet, images: Tensor, tmp_path: Path) -> None:
    # A wide map, so that a unit of any ratio saves something.
    net = make_net(width=16)
    small = convert(net, spec=spec, example_inputs=images).eval()
    again = load(save(small, tmp_path / "out"), base=make_net(width=16, seed=3))
    assert torch.equal(again(images), small(images))


def test_paper_placement_comes_back(images: Tensor, tmp_path: Path) -> None:
    small = convert(make_net(), spec=GhostSpec(2, placement="paper"), example_inputs=images).eval()
    again = load(save(small, tmp_path / "out"), base=make_net(seed=3))
    assert torch.equal(again(images), small(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_stored_type_comes_back_whatever_the_base_has(
    dtype: torch.dtype, converted: nn.Module, base: SmallNet, tmp_path: Path
) -> None:
    again = load(save(converted.to(dtype), tmp_path / "out"), base=base)
    assert again.head.weight.dtype == dtype
    assert isinstance(again.head.weight, nn.Parameter)
    assert same_state(again, converted)


def test_channels_last_weights_are_stored_by_value(
    converted: nn.Module, base: SmallNet, images: Tensor, tmp_path: Path
) -> None:
    expected = copy.deepcopy(converted.state_dict())
    converted.to(memory_format=torch.channels_last)
    assert not converted.stem.weight.is_contiguous()
    again = load(save(converted, tmp_path / "out"), base=base)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


class Tied(nn.Module):
    """One convolution under two names, and a classifier whose weight a second layer shares."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.alias = self.conv
        self.first = nn.Linear(16, 16, bias=False)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.alias(self.conv(self.stem(x))).mean((2, 3))))


def test_tied_tensors_are_stored_once_and_stay_tied(images: Tensor, tmp_path: Path) -> None:
    small = convert(Tied(), ratio=2, example_inputs=images).eval()
    assert isinstance(small.alias, GhostConv2d)
    folder = save(small, tmp_path / "out")
    names = set(safetensors.torch.load_file(folder / "weights.safetensors"))
    assert "first.weight" in names
    assert "second.weight" not in names
    assert not any(name.startswith("alias.") for name in names)
    again = load(folder, base=Tied())
    assert torch.equal(again(images), small(images))
    assert again.second.weight is again.first.weight
    assert again.alias is again.conv


def test_overlapping_views_are_stored_as_separate_values(converted: nn.Module, tmp_path: Path) -> None:
    table = torch.arange(8.0)
    converted.register_buffer("whole", table)
    converted.register_buffer("part", table[:4])
    folder = save(converted, tmp_path / "out")
    tensors = safetensors.torch.load_file(folder / "weights.safetensors")
    assert torch.equal(tensors["part"], table[:4])
    assert torch.equal(tensors["whole"], table)


def test_saving_again_replaces_an_artefact(converted: nn.Module, stored: Path, base: SmallNet) -> None:
    with torch.no_grad():
        converted.head.bias.fill_(7.0)
    save(converted, stored)
    assert torch.equal(load(stored, base=base).head.bias, torch.full((5,), 7.0))
    assert [entry.name for entry in stored.parent.iterdir()] == [stored.name]


def test_saving_never_removes_other_files(converted: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"other files \(thesis.tex\)"):
        save(converted, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_model_without_a_plan_is_told_to_convert_first(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="Convert it first"):
        save(make_net(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_state_that_is_no_tensor_is_refused(converted: nn.Module, tmp_path: Path) -> None:
    converted.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(ArtefactError, match="'sparse' is no plain tensor"):
        save(converted, tmp_path / "out")


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_leaves_nothing_and_keeps_what_was_there(
    call: str, older: bool, converted: nn.Module, base: SmallNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    if older:
        save(converted, folder)
    expected = converted.head.bias.detach().clone()
    with torch.no_grad():
        converted.head.bias.add_(1.0)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        patch.setattr(Path, "replace", full if call == "replace" else Path.replace)
        with pytest.raises(OutputError, match="No space left on device"):
            save(converted, folder)
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if older else [])
    if older:
        assert torch.equal(load(folder, base=base).head.bias, expected)


def test_another_width_names_both_models_and_the_first_differences(stored: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        load(stored, base=make_net(width=4))
    text = str(caught.value)
    assert text.count("SmallNet") >= 2
    assert "features.2 is Conv2d(4, 8" in text
    assert "stored a Conv2d 8→16 3×3" in text


def test_another_number_of_classes_is_named(stored: Path) -> None:
    with pytest.raises(ArtefactError, match=r"head.weight is \(9, 16\), stored \(5, 16\)"):
        load(stored, base=make_net(classes=9))


def test_another_class_is_refused(stored: Path) -> None:
    with pytest.raises(ArtefactError, match="Tied"):
        load(stored, base=Tied())


def test_a_converted_base_is_refused(stored: Path, converted: nn.Module) -> None:
    with pytest.raises(ArtefactError, match="unconverted"):
        load(stored, base=converted)


def test_a_factory_in_place_of_a_base_is_refused(stored: Path) -> None:
    with pytest.raises(ArtefactError, match="is no model"):
        load(stored, base=make_net)  # type: ignore[arg-type]


def test_a_base_without_memory_is_refused(stored: Path) -> None:
    with torch.device("meta"):
        empty = SmallNet()
    with pytest.raises(ArtefactError, match="meta device"):
        load(stored, base=empty)


def test_nothing_is_unpickled(stored: Path, base: SmallNet, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    assert isinstance(load(stored, base=base), SmallNet)


@pytest.mark.parametrize("options", [{"padding": 2, "dilation": 2}, {"padding_mode": "reflect"}, {"stride": 2}])
def test_a_base_of_equal_shapes_and_other_options_is_refused(stored: Path, options) -> None:
    """No tensor tells them apart, and the outputs would be other ones."""
    base = make_net()
    base.features[2] = nn.Conv2d(8, 16, 3, **{"padding": 1, "bias": False, **options})
    with pytest.raises(ArtefactError, match=r"(options of a convolution|features\.2 is Conv2d)"):
        load(stored, base=base)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d])
def test_other_dimensions_make_the_round_trip(tmp_path: Path, kind) -> None:
    base = nn.Sequential(kind(4, 8, 3), kind(8, 64, 1, groups=2), kind(64, 32, 3))
    x = torch.randn(2, 4, *[9] * len(base[0].kernel_size))
    small = convert(base, example_inputs=x, overrides={"2": GhostSpec(2, 5)}, skip="0").eval()
    assert torch.equal(load(save(small, tmp_path / "small"), base=base)(x), small(x))


class Embedding(nn.Module):
    """A functional convolution behind inputs that are whole numbers, and given by name."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)
        self.kernel = nn.Parameter(torch.randn(32, 16, 3) / 7)

    def forward(self, scale: Tensor, *, words: Tensor) -> Tensor:
        return torch.nn.functional.conv1d(self.table(words).transpose(1, 2) * scale, self.kernel).mean(2)


def test_a_graph_with_other_inputs_than_images_makes_the_round_trip(tmp_path: Path) -> None:
    base = Embedding()
    inputs = {"scale": torch.ones(()), "words": torch.randint(10, (2, 8))}
    small = convert(base, example_inputs=inputs, overrides={"kernel_conv": 2}).eval()
    again = load(save(small, tmp_path / "small"), base=base)
    assert torch.equal(again(**inputs), small(**inputs))
    with pytest.raises(ArtefactError, match="calls no convolution as a function"):
        load(tmp_path / "small", base=make_net())


def test_what_was_changed_after_conversion_is_refused_before_it_is_stored(converted: nn.Module, tmp_path: Path) -> None:
    changed = copy.deepcopy(converted)
    changed.head = nn.Linear(16, 7)
    with pytest.raises(ArtefactError, match=r"changed after its conversion: it has .* parameters, planned were"):
        save(changed, tmp_path / "a")
    changed = copy.deepcopy(converted)
    changed.features[2] = nn.Conv2d(8, 16, 3, padding=1)
    with pytest.raises(ArtefactError, match=r"'features\.2' is a Ghost unit of no kind, planned was s=2"):
        save(changed, tmp_path / "a")
    changed.features[2] = GhostConv2d(8, 16, 3, padding=1, bias=False, spec=GhostSpec(4))
    with pytest.raises(ArtefactError, match=r"'features\.2' is a Ghost unit of s=4, planned was s=2"):
        save(changed, tmp_path / "a")
    assert not (tmp_path / "a").exists()
