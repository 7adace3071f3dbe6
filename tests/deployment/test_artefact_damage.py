"""Whatever happens to the files of an artefact: an ArtefactError, or the model that was stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from deployment_nets import SmallNet, make_net
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ghostify.deployment import load
from ghostify.deployment.manifest import MAX_PLAN_BYTES, _digest, sha256
from ghostify.errors import ArtefactError

BASE = make_net(seed=5)


def refused(folder: Path, base: SmallNet = BASE) -> str:
    with pytest.raises(ArtefactError) as caught:
        load(folder, base=base)
    assert str(folder) in str(caught.value)
    return str(caught.value)


FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(file=st.sampled_from(["plan.json", "weights.safetensors"]), place=st.floats(0, 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(intact: Path, scratch: Path, file: str, place: float, bit: int) -> None:
    data = bytearray((intact / file).read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    shutil.copytree(intact, scratch, dirs_exist_ok=True)
    (scratch / file).write_bytes(data)
    refused(scratch)


@FUZZ
@given(file=st.sampled_from(["plan.json", "weights.safetensors"]), place=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_found(intact: Path, scratch: Path, file: str, place: float) -> None:
    data = (intact / file).read_bytes()
    shutil.copytree(intact, scratch, dirs_exist_ok=True)
    (scratch / file).write_bytes(data[: int(place * len(data))])
    refused(scratch)


@FUZZ
@given(text=st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_foreign_bytes_for_a_plan_are_refused(intact: Path, scratch: Path, text: bytes) -> None:
    shutil.copytree(intact, scratch, dirs_exist_ok=True)
    (scratch / "plan.json").write_bytes(text)
    refused(scratch)


def forge(folder: Path, change: Callable[[dict[str, Any]], object], *, resign: bool = True) -> None:
    """Change the manifest as somebody would who knows the format, checksum included."""
    file = folder / "plan.json"
    document = json.loads(file.read_text())
    change(document)
    if resign and isinstance(document.get("content"), dict):
        document["sha256"] = _digest(document["content"])
    file.write_text(json.dumps(document))


def first_ghost(document: dict[str, Any]) -> dict[str, Any]:
    return next(d for d in document["content"]["plan"]["decisions"] if d["spec"])


def huge_kernels(document: dict[str, Any]) -> None:
    first_ghost(document)["spec"]["dw_size"] = 999_999


def other_ratio(document: dict[str, Any]) -> None:
    first_ghost(document)["spec"]["ratio"] = 4.0


def bad_ratio(document: dict[str, Any]) -> None:
    first_ghost(document)["spec"]["ratio"] = 0.5


def unknown_site(document: dict[str, Any]) -> None:
    first_ghost(document)["site"]["name"] = "features.99"


def not_a_convolution(document: dict[str, Any]) -> None:
    first_ghost(document)["site"]["name"] = "head"


def paper_without_norm(document: dict[str, Any]) -> None:
    ghost = first_ghost(document)
    ghost["spec"]["placement"] = "paper"
    ghost["site"]["chain"] = {
        "norm": "nowhere",
        "activation": "function:nothing",
        "paper_obstacle": "",
        "is_output": False,
    }


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other program": (lambda d: d.update(format="zip"), "another program wrote it"),
    "newer": (lambda d: d.update(version=2), "Upgrade ghostify"),
    "version 0": (lambda d: d.update(version=0), "changed after it was written"),
    "version as text": (lambda d: d.update(version="1"), "version"),
    "extra field": (lambda d: d.update(hook="os.system"), "hook"),
    "extra field inside": (lambda d: d["content"].update(hook="os.system"), "hook"),
    "no plan": (lambda d: d["content"].pop("plan"), "plan"),
    "path in a file name": (lambda d: d["content"].update(weights_file="../../secret"), "weights_file"),
    "bad ratio": (bad_ratio, "ratio"),
    "huge kernels": (huge_kernels, "too small to pay"),
    "other ratio": (other_ratio, "does not add up"),
    "unknown site": (unknown_site, "features.99"),
    "not a convolution": (not_a_convolution, "head"),
    "paper without norm": (paper_without_norm, "does not fit"),
    "negative shape": (lambda d: d["content"]["tensors"]["head.bias"].update(shape=[-5]), "shape"),
    "huge tensor": (lambda d: d["content"]["tensors"]["head.bias"].update(shape=[2**40]), "announces other tensors"),
    "no dtype": (lambda d: d["content"]["tensors"]["head.bias"].update(dtype="load"), "unknown dtype"),
    "other dtype": (lambda d: d["content"]["tensors"]["head.bias"].update(dtype="int32"), "holds other tensors"),
    "shared with nothing": (lambda d: d["content"]["tensors"]["head.bias"].update(same_as="x"), "not stored alike"),
    "shared with itself": (
        lambda d: d["content"]["tensors"]["head.bias"].update(same_as="head.bias"), "not stored alike"
    ),
    "other size": (lambda d: d["content"].update(weights_bytes=7), "truncated"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forged_manifest_is_refused(case: str, intact: Path, tmp_path: Path) -> None:
    change, message = FORGERIES[case]
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    forge(folder, change)
    assert message in refused(folder)


def test_a_changed_plan_is_refused_by_its_checksum(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    forge(folder, lambda d: first_ghost(d).update(reason="because"), resign=False)
    assert "checksum differs" in refused(folder)
    forge(folder, lambda d: None)
    assert isinstance(load(folder, base=BASE), SmallNet)


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], *, announce: bool) -> None:
    """Replace the weights, with a manifest that has their size and checksum (and, if asked, their names)."""
    file = folder / "weights.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    data = safetensors.torch.save(tensors)
    file.write_bytes(data)
    entries = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch."), "same_as": None}
        for name, t in tensors.items()
    }

    def update(document: dict[str, Any]) -> None:
        document["content"].update(weights_bytes=len(data), weights_sha256=sha256(data))
        if announce:
            document["content"]["tensors"] = entries

    forge(folder, update)


WEIGHTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "extra": (lambda t: t.update(extra=torch.zeros(1)), "extra"),
    "missing": (lambda t: t.pop("head.bias"), "head.bias"),
    "shape": (lambda t: t.update({"head.bias": torch.zeros(4)}), "head.bias"),
    "integers": (lambda t: t.update({"head.bias": torch.zeros(5, dtype=torch.int32)}), "do not fit"),
}


@pytest.mark.parametrize("announce", [False, True])
@pytest.mark.parametrize("case", WEIGHTS)
def test_other_weights_are_refused(case: str, announce: bool, intact: Path, tmp_path: Path) -> None:
    change, message = WEIGHTS[case]
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    reweigh(folder, change, announce=announce)
    text = refused(folder)
    assert message in text or not announce
    assert "tensors" in text


def test_an_order_that_is_no_permutation_is_refused(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))

    def out_of_range(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("output_channels"))
        tensors[name][0] = 10_000

    reweigh(folder, out_of_range, announce=True)
    assert "is no permutation of 16 channels" in refused(folder)


def test_weights_in_another_format_are_refused(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    data = bytes((folder / "weights.safetensors").stat().st_size)
    (folder / "weights.safetensors").write_bytes(data)
    forge(folder, lambda d: d["content"].update(weights_sha256=sha256(data)))
    assert "cannot be read as safetensors" in refused(folder)


def test_each_missing_part_is_named(intact: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    assert "is a file, not a folder" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "holds no plan.json" in refused(tmp_path / "empty")
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    (folder / "weights.safetensors").unlink()
    assert "holds no weights.safetensors" in refused(folder)


def test_a_plan_that_is_too_large_is_not_read(intact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    with (folder / "plan.json").open("r+b") as handle:
        handle.truncate(MAX_PLAN_BYTES + 1)  # sparse: takes no room on the disk

    def forbidden(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert "it is not read" in refused(folder)


def test_deeply_nested_json_is_refused(intact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(intact, tmp_path / "artefact"))
    (folder / "plan.json").write_text("[" * 100_000)
    assert "damaged or foreign" in refused(folder)
