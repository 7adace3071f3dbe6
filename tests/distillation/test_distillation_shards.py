"""Images streamed from tar files behind `load_data`."""

import sys
from pathlib import Path

import pytest
import torch
from stored_images import encoded, plain, tar, tar_of

from ghostify.distillation import Augment, DataOptions, ShardBatches, load_data
from ghostify.distillation.shards import TarFiles
from ghostify.errors import InputsError, MissingExtraError, OptionError

pytest.importorskip("webdataset", reason="the wds extra is not installed")


def shards(folder: Path, name: str, sizes: tuple[int, ...], first: int = 0) -> str:
    """Tar files of plain images, whose brightness is their number, and class is that of three."""
    for file in range(len(sizes)):
        numbers = range(first + sum(sizes[:file]), first + sum(sizes[: file + 1]))
        tar(folder / f"{name}-{file:02}.tar", [(plain(number), number % 3) for number in numbers])
    return f"{folder}/{name}-{{00..{len(sizes) - 1:02}}}.tar"


def numbers(batches: ShardBatches) -> list[int]:
    found = []
    for images, labels in batches:
        values = (images[:, 0, 0, 0] * 255).round().int()
        assert torch.equal(values % 3, labels.int())  # each image still has its own label
        found += values.tolist()
    return found


def test_every_sample_is_streamed_once_an_epoch(tmp_path: Path) -> None:
    train, val = shards(tmp_path, "train", (5, 1, 7)), shards(tmp_path, "val", (3,), 50)
    options = DataOptions(batch_size=4, augment=Augment(0, flip=True), mean=(0.0,), std=(1.0,))
    data = load_data(f"wds:{train},{val}", options)
    assert (len(data.train), data.train.total) == (4, 13)
    epochs = []
    for epoch in range(3):
        data.train.set_epoch(epoch)
        epochs.append(numbers(data.train))
        assert sorted(epochs[-1]) == list(range(13))
        assert numbers(data.train) == epochs[-1]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert numbers(data.val) == numbers(data.test) == [50, 51, 52]
    assert data.train.look.size == (4, 6)
    assert data.num_classes is None
    sample = data.train.sample(6)
    assert sample.shape == (6, 3, 4, 6)
    assert len(sample[:, 0, 0, 0].unique()) == 6
    assert torch.equal(data.train.sample(6), sample)
    assert len(data.train.sample(99)) == 13


def test_a_third_pattern_is_for_the_final_figure_and_braces_may_hold_commas(tmp_path: Path) -> None:
    train, val = shards(tmp_path, "train", (2, 2)), shards(tmp_path, "val", (1, 1), 50)
    test = shards(tmp_path, "test", (2,), 70)
    train = train.replace("{00..01}", "{01,00}")
    data = load_data(f"wds:{train},{val},{test}", DataOptions(mean=(0.0,), std=(1.0,)))
    assert numbers(data.test) == [70, 71]
    assert data.train.files.urls[0].endswith("train-01.tar")
    assert data.train.augment == Augment(0)


def test_samples_are_counted_as_they_are_read(tmp_path: Path) -> None:
    image = encoded(plain(1))
    tar_of(
        tmp_path / "odd.tar",
        {
            "__index__": b"",
            "a/1.png": image,
            "a/1.cls": b"1",
            "a/1.note.txt": b"",
            "b/1.png": image,
            "b/1.cls": b"2",
            "README": b"",
            "__about__/it.json": b"",
            "b/2.cls": b"0",
            "b/2.jpeg": image,
        },
    )
    files = TarFiles(str(tmp_path / "odd.tar"))
    assert [sample["__key__"] for sample in files.samples(files.urls[0])] == ["a/1", "b/1", "b/2"]
    assert files.counts == [3]
    assert TarFiles(f"pipe:cat {tmp_path}/odd.tar").counts == [3]  # streamed, as a URL is


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"1.png": encoded(plain(1))}, r"sample='1' has no class id in \.cls, but png"),
        ({"1.png": encoded(plain(1)), "1.cls": b"cat"}, "sample='1' has no class id"),
        ({"1.png": encoded(plain(1)), "1.cls": b"1", "2.cls": b"1"}, "sample='2' has no image, but cls"),
        ({"1.png": encoded(plain(1)), "1.cls": b"1", "2.png": b"", "2.cls": b"1"}, r"odd\.tar 2' cannot be decoded"),
        ({"README": b""}, "holds no image"),
    ],
)
def test_samples_that_do_not_fit(tmp_path: Path, files: dict, message: str) -> None:
    tar_of(tmp_path / "odd.tar", files)
    with pytest.raises(InputsError, match=message):
        list(load_data(f"wds:{tmp_path}/odd.tar,{tmp_path}/odd.tar").train)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    train = shards(tmp_path, "train", (9, 9))
    with pytest.raises(InputsError, match=r"1 of 3 files are not there, for example .*train-02\.tar"):
        load_data(f"wds:{train.replace('01}', '02}')},{train}")
    whole = (tmp_path / "train-01.tar").read_bytes()
    (tmp_path / "train-01.tar").write_bytes(whole[: 5 * 512 + 40])
    data = load_data(f"wds:{train},{train}")
    with pytest.raises(InputsError, match=r"train-01\.tar' cannot be read: "):
        len(data.train)
    with pytest.raises(InputsError, match=r"train-01\.tar' cannot be read: "):
        list(data.train.files.samples(data.train.files.urls[1]))
    for argument in ("", "one", "one,", "a,b,c,d"):
        with pytest.raises(OptionError, match="Pass two or three"):
            load_data(f"wds:{argument}")


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "braceexpand", None)
    with pytest.raises(MissingExtraError, match=r"ghostify\[wds\]"):
        load_data("wds:a.tar,b.tar")
