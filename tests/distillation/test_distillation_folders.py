"""Stored images behind `load_data`: folders of classes, and what the library `datasets` reads."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_images import encoded, plain

from ghostify.distillation import Augment, DataOptions, ImageBatches, PictureBatches, load_data, splits
from ghostify.distillation.pictures import Encoded, Look, decode
from ghostify.errors import InputsError, OptionError

AS_STORED = DataOptions(augment=False, mean=(0.0,), std=(1.0,), batch_size=4)


def tree(root: Path, counts: dict[str, dict[str, int]], size: tuple[int, int] = (4, 6), channels: int = 3) -> None:
    """Images whose brightness is 10 · the class's place + their number."""
    for split, classes in counts.items():
        for place, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                image = encoded(plain(10 * place + number, *size, channels))
                (root / split / name / f"{number}.PNG").write_bytes(image)


def values(batches: object) -> dict[int, int]:
    """Class ids by brightness."""
    found: dict[int, int] = {}
    for images, labels in batches:
        assert (images == images[:, :1, :1, :1]).all()
        found |= dict(zip((images[:, 0, 0, 0] * 255).round().int().tolist(), labels.tolist()))
    return found


def test_a_folder_of_classes_is_read_with_its_parts(tmp_path: Path) -> None:
    tree(tmp_path, {split: {"b": 3, "a": 2} for split in ("train", "val", "test")})
    (tmp_path / "train/a/notes.txt").write_text("no image")
    (tmp_path / "train/a/._0.png").write_text("another system's")
    data = load_data(f"imagefolder:{tmp_path}", AS_STORED)
    expected = {0: 1, 1: 1, 2: 1, 10: 0, 11: 0}  # class ids follow the names
    for part in (data.train, data.val, data.test):
        assert isinstance(part, ImageBatches)
        assert part.images.shape[1:] == (3, 4, 6)
        assert values(part) == expected
    assert data.num_classes == 2
    assert data.train.shuffle
    assert not data.val.shuffle


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train",), (16, 2, 2)),
        (("train", "test"), (18, 2, 20)),
        (("train", "val"), (18, 2, 20)),  # the only unseen images are for the final figure
        (("train", "val", "test"), (20, 20, 20)),
    ],
)
def test_what_is_missing_is_held_out_of_train(tmp_path: Path, parts: tuple, sizes: tuple) -> None:
    tree(tmp_path, {part: {"a": 10, "b": 10} for part in parts})
    data, other = (load_data(f"imagefolder:{tmp_path}", DataOptions(seed=seed)) for seed in (0, 1))
    assert tuple(part.total for part in (data.train, data.val, data.test)) == sizes
    assert torch.equal(data.val.images, other.val.images)
    if len(parts) == 1:
        found = [values(ImageBatches(part.images, part.labels)) for part in (data.train, data.val, data.test)]
        assert len(found[0] | found[1] | found[2]) == 20
        with pytest.raises(OptionError, match=r"val_size=10 cannot be held out of the 20 .* twice"):
            load_data(f"imagefolder:{tmp_path}", DataOptions(val_size=10))


def test_images_that_do_not_fit_memory_are_decoded_for_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {"train": {"a": 5, "b": 6}, "val": {"a": 1, "b": 1}, "test": {"a": 2, "b": 1}})
    resident = load_data(f"imagefolder:{tmp_path}")
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 3 * 3 * 4 * 6)  # three images
    data = load_data(f"imagefolder:{tmp_path}")
    assert isinstance(data.train, PictureBatches)
    assert isinstance(data.test, ImageBatches)
    assert data.train.augment == resident.train.augment == Augment(padding=0)  # an eighth of the shorter side
    for (images, labels), (other, other_labels) in zip(data.train, resident.train, strict=True):
        assert torch.equal(images, other)
        assert torch.equal(labels, other_labels)
    assert torch.equal(data.train.sample(7), resident.train.sample(7))


def test_images_of_different_sizes_are_scaled_and_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train": {"a": 6, "b": 6}})
    tree(tmp_path, {"train": {"c": 6}, "test": {"a": 1, "b": 1, "c": 1}}, size=(9, 7))
    options = DataOptions(image_size=5, mean=(0.0,), std=(1.0,))
    data = load_data(f"imagefolder:{tmp_path}", options)
    assert data.train.images.shape[1:] == data.test.images.shape[1:] == (3, 5, 5)
    assert load_data(f"imagefolder:{tmp_path}").train.images.shape[1:] == (3, 224, 224)
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 0)
    data = load_data(f"imagefolder:{tmp_path}", options)
    assert data.train.augment == Augment(padding=0, crop=0.08)
    assert values(data.train)  # plain, as they were
    assert next(iter(data.val))[0].shape[1:] == (3, 5, 5)


def test_random_parts_are_cut_of_images_that_would_fit_memory(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"a": 6, "b": 6}})
    data = load_data(f"imagefolder:{tmp_path}", DataOptions(augment=Augment(0, crop=0.5)))
    assert isinstance(data.train, PictureBatches)
    assert isinstance(data.val, ImageBatches)


def test_grey_images_stay_grey(tmp_path: Path) -> None:
    tree(tmp_path, {"train": {"a": 4, "b": 4}}, channels=1)
    assert load_data(f"imagefolder:{tmp_path}").train.images.shape[1:] == (1, 4, 6)


def test_of_sixteen_bits_the_higher_ones_are_kept(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number, value in enumerate((0, 257, 30_000, 65_535)):
        pillow.fromarray(np.full((4, 6), value, np.uint16)).save(tmp_path / "train" / "a" / f"{number}.png")
    images = load_data(f"imagefolder:{tmp_path}", DataOptions(val_size=1, augment=False))
    both = torch.cat([part.images for part in (images.train, images.val, images.test)])
    assert both.shape == (4, 1, 4, 6)
    assert sorted(both[:, 0, 0, 0].tolist()) == [0, 1, 117, 255]


def test_numbers_without_a_range_are_no_image(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    (tmp_path / "train" / "a").mkdir(parents=True)
    for number in range(4):
        pillow.fromarray(np.full((4, 6), 0.5, np.float32)).save(tmp_path / "train" / "a" / f"{number}.tiff")
    with pytest.raises(InputsError, match="cannot be decoded: its mode F has numbers of any size; store 8 or 16 bits"):
        load_data(f"imagefolder:{tmp_path}", DataOptions(val_size=1))


def test_the_middle_of_a_whole_image_is_taken() -> None:
    ramp = torch.arange(160, dtype=torch.uint8).view(1, 1, 160).repeat(1, 64, 1)
    got = decode(Encoded("ramp", encoded(ramp)), Look("L", (56, 56), uniform=False))
    torch.testing.assert_close(got[0, 0].float(), torch.linspace(52, 107, 56), atol=0.6, rtol=0)  # 56 of 64, unscaled
    assert torch.equal(decode(Encoded("ramp", encoded(ramp)), Look("L", (64, 160), uniform=True)), ramp)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "holds no folder train"),
        (lambda root: (root / "val/b").rename(root / "val/bb"), r"val are not .* 1 lacking \(b\), 1 more \(bb\)"),
        (lambda root: (root / "train/c").mkdir(), r"train.: 1 of 3 classes hold no image \(c\)"),
        (lambda root: [path.unlink() for path in root.glob("train/*/*")], "2 of 2 classes hold no image"),
        (lambda root: (root / "val").rename(root / "old") and (root / "val").mkdir(), "val' holds no folder for a"),
        (lambda root: (root / "train/b/1.PNG").write_bytes(b"no image"), r"b/1\.PNG' cannot be decoded"),
        (
            lambda root: (root / "train/b/1.PNG").write_bytes((root / "train/b/1.PNG").read_bytes()[:50]),
            r"b/1\.PNG' cannot be decoded",
        ),
    ],
)
def test_folders_that_do_not_fit(tmp_path: Path, change: object, message: str) -> None:
    tree(tmp_path, {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}})
    load_data(f"imagefolder:{tmp_path}")
    change(tmp_path)
    with pytest.raises(InputsError, match=message):
        load_data(f"imagefolder:{tmp_path}")


def test_an_image_that_breaks_during_an_epoch_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, {"train": {"a": 6, "b": 6}})
    monkeypatch.setattr(splits, "MEMORY_LIMIT", 0)
    data = load_data(f"imagefolder:{tmp_path}")
    (tmp_path / "train/a/3.PNG").write_bytes(b"")
    (tmp_path / "train/a/4.PNG").write_bytes(b"")
    with pytest.raises(InputsError, match=r"a/[34]\.PNG' cannot be decoded: .* Replace it"):
        list(data.train)


@pytest.mark.parametrize("source", ["imagefolder", "hf"])
def test_sources_need_a_name(source: str) -> None:
    with pytest.raises(OptionError, match=f"data='{source}' names no"):
        load_data(source)
    with pytest.raises(OptionError, match="image_size=0"):
        DataOptions(image_size=0)


def table(count: int, start: int = 0, label: int | None = None, column: str = "image") -> object:
    library = pytest.importorskip("datasets", reason="the data extra is not installed")
    pillow = pytest.importorskip("PIL.Image")
    rows = {
        column: [pillow.new("RGB", (6, 4), (start + i,) * 3) for i in range(count)],
        "label": [(start + i) % 3 if label is None else label for i in range(count)],
    }
    features = library.Features({column: library.Image(), "label": library.Value("int64")})
    return library.Dataset.from_dict(rows, features=features)


def test_a_stored_data_set_of_the_hub_s_library(tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="the data extra is not installed")
    parts = {"train": table(12), "validation": table(3, 20), "test": table(3, 30)}
    library.DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    data = load_data(f"hf:{tmp_path}/all", AS_STORED)
    assert values(data.train) == {value: value % 3 for value in range(12)}
    assert values(data.val) == {value: value % 3 for value in range(20, 23)}
    assert values(data.test) == {value: value % 3 for value in range(30, 33)}
    assert (data.num_classes, data.train.mean) == (3, (0.0,))


def test_one_stored_part_is_the_training_images(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the data extra is not installed")
    table(12).save_to_disk(str(tmp_path / "one"))
    data = load_data(f"hf:{tmp_path}/one", AS_STORED)
    assert values(data.train) | values(data.val) | values(data.test) == {value: value % 3 for value in range(12)}


def test_a_folder_of_parquet_files_and_labels_that_are_kept_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(20, column="img").to_parquet(str(tmp_path / "train-00000-of-00001.parquet"))
    table(3, label=-1, column="img").to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = load_data(f"hf:{tmp_path}", AS_STORED)
    assert [part.total for part in (data.train, data.val, data.test)] == [16, 2, 2]


def test_a_data_set_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = pytest.importorskip("datasets", reason="the data extra is not installed")

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach {name!r} on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(library, "load_dataset", unreachable)
    with pytest.raises(InputsError, match=r"'hf:no/where': the hub cannot be reached .* data='parquet:FOLDER'"):
        load_data("hf:no/where")
    monkeypatch.undo()
    with pytest.raises(InputsError, match=r"cannot be read: .* Check the name or the folder"):
        load_data(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": table}, "has the parts test; train is needed"),
        ({"train": lambda count: table(count, label=-1)}, "train has labels below 0"),
        ({"train": lambda count: table(count, column="pixels")}, "has the columns pixels, label; img or image"),
        ({"train": lambda _: table(0)}, "'hf:it train' is empty"),
        ({"train": lambda count: table(count).cast_column("label", value("string"))}, "labels that are no class ids"),
        ({"train": lambda count: table(count).cast_column("label", value("float32"))}, "they are fractions, such as 0"),
        (
            {"train": lambda count: table(count).remove_columns("image").add_column("image", [1] * count)},
            r"row \d of image",
        ),
    ],
)
def test_data_sets_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, parts: dict, message: str) -> None:
    library = pytest.importorskip("datasets", reason="the data extra is not installed")
    made = {name: make(4) for name, make in parts.items()}
    monkeypatch.setattr(library, "load_dataset", lambda name: made)
    with pytest.raises(InputsError, match=message):
        load_data("hf:it")


def value(kind: str) -> object:
    return pytest.importorskip("datasets").Value(kind)


def test_hub_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"ghostify\[data\]"):
        load_data("hf:no/where")
