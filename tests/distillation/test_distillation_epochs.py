"""Batches that are begun inside an epoch, and shared among processes, stay what they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_images import encoded, tar

from ghostify.distillation import Augment, EpochBatches, ImageBatches, PictureBatches, ShardBatches
from ghostify.distillation.augmentation import random_part
from ghostify.distillation.pictures import Encoded, Look, Pictures
from ghostify.distillation.shards import TarFiles
from ghostify.errors import OptionError


def images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def in_memory(count: int, batch_size: int, seed: int = 0) -> ImageBatches:
    return ImageBatches(
        images(count), torch.arange(count), batch_size=batch_size, shuffle=True, augment=Augment(2), seed=seed
    )


def together(shards: list[EpochBatches]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What processes that keep step see: the parts of each batch, in the processes' order."""
    passes = [list(shard) for shard in shards]
    steps = max(map(len, passes))
    parts = [[each[step] for each in passes if step < len(each)] for step in range(steps)]
    return [(torch.cat([x for x, _ in part]), torch.cat([y for _, y in part])) for part in parts]


def assert_same(got: list, expected: list) -> None:
    assert len(got) == len(expected)
    for (images, labels), (other_images, other_labels) in zip(got, expected):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, other_images)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_shards_together_are_the_whole_augmentation_included(data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, 9), "batch_size")
    batches = in_memory(data.draw(st.integers(1, 40), "images"), batch_size, data.draw(st.integers(0, 3), "seed"))
    batches.set_epoch(data.draw(st.integers(0, 3), "epoch"))
    count = data.draw(st.integers(1, batch_size), "processes")
    shards = [batches.shard(index, count) for index in range(count)]
    assert_same(together(shards), list(batches))
    for shard in shards:
        sizes = [len(labels) for _, labels in shard]
        assert len(shard) == len(sizes) >= len(batches) - 1
        assert min(sizes, default=1) >= 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 9), step=st.integers(0, 45), epoch=st.integers(0, 3))
def test_later_batches_do_not_depend_on_where_a_pass_begins(count: int, batch_size: int, step: int, epoch: int) -> None:
    batches = in_memory(count, batch_size)
    view = batches.starting_at(step)
    for each in (batches, view):
        each.set_epoch(epoch)
    assert len(view) == len(list(view))
    assert_same(list(view), list(batches)[step:])


def test_every_batch_is_augmented_in_its_own_way() -> None:
    same = images(1).expand(24, -1, -1, -1)
    batches = ImageBatches(same, None, batch_size=8, augment=Augment(2))
    first, second, third = batches
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def pictures(_: Path) -> PictureBatches:
    stored = [encoded(image) for image in images(23)]
    source = Pictures(lambda row: Encoded(str(row), stored[row]), torch.arange(23), torch.arange(23))
    return PictureBatches(
        source,
        Look("RGB", (4, 4), uniform=False),
        shuffle=True,
        batch_size=4,
        augment=Augment(0, crop=0.2),
        mean=(0.5,),
        std=(0.5,),
        seed=1,
    )


def shards(folder: Path) -> ShardBatches:
    pytest.importorskip("webdataset", reason="the wds extra is not installed")
    for number, rows in enumerate((range(9), range(9, 10), range(10, 23))):
        tar(folder / f"part-{number}.tar", [(images(23)[row], row) for row in rows])
    return ShardBatches(
        TarFiles(f"{folder}/part-{{0..2}}.tar"),
        Look("RGB", (4, 4), uniform=False),
        shuffle=True,
        batch_size=4,
        augment=Augment(0, crop=0.2),
        mean=(0.5,),
        std=(0.5,),
        seed=1,
    )


@pytest.mark.parametrize("make", [pictures, shards])
def test_decoded_batches_depend_on_seed_epoch_and_number_alone(
    make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ghostify.distillation.shards._BLOCK", 8)
    batches = make(tmp_path)
    first = list(batches)
    assert len(first) == len(batches) == 6
    assert sorted(torch.cat([labels for _, labels in first]).tolist()) == list(range(23))
    torch.manual_seed(5)
    assert_same(list(batches), first)
    for step in range(8):
        assert len(batches.starting_at(step)) == max(0, 6 - step)
        assert_same(list(batches.starting_at(step)), first[step:])
    batches.set_epoch(1)
    second = list(batches)
    assert sorted(torch.cat([labels for _, labels in second]).tolist()) == list(range(23))
    assert [labels.tolist() for _, labels in second] != [labels.tolist() for _, labels in first]
    # The same images are cut elsewhere in another epoch.
    places = [torch.cat([labels for _, labels in epoch]).argsort() for epoch in (first, second)]
    cut = [torch.cat([x for x, _ in epoch])[place] for epoch, place in zip((first, second), places)]
    assert (cut[0] != cut[1]).flatten(1).any(1).float().mean() > 0.8


def test_shards_of_pictures_together_are_the_whole(tmp_path: Path) -> None:
    batches = pictures(tmp_path)
    assert_same(together([batches.shard(index, 3) for index in range(3)]), list(batches))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_share_tar_files_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("ghostify.distillation.shards._BLOCK", 4)
    views = [shards(tmp_path).shard(index, count) for index in range(count)]
    passes = [list(view) for view in views]
    assert [len(view) for view in views] == [len(each) for each in passes]
    assert {len(each) for each in passes} <= {5, 6}
    assert sorted(label for each in passes for _, labels in each for label in labels.tolist()) == list(range(23))
    assert_same(list(views[1].starting_at(2)), passes[1][2:])


def test_a_file_outside_of_a_share_is_not_opened(tmp_path: Path) -> None:
    batches = shards(tmp_path)
    batches.shuffle = False
    assert len(batches) == 6
    (tmp_path / "part-2.tar").unlink()
    assert torch.cat([labels for _, labels in batches.shard(0, 4)]).tolist() == list(range(6))


def test_a_random_part_lies_within_the_image() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [random_part(50, 30, 0.08, torch.rand(10, 4, generator=generator)) for _ in range(500)]
    shares, aspects = [], []
    for left, top, right, bottom in parts:
        assert 0 <= left < right <= 50
        assert 0 <= top < bottom <= 30
        shares.append((right - left) * (bottom - top) / 1500)
        aspects.append((right - left) / (bottom - top))
    assert min(shares) < 0.12
    assert max(shares) > 0.7
    assert 0.6 < min(aspects) < 0.8
    assert 1.25 < max(aspects) < 1.6
    assert {min(part[0] for part in parts), max(part[2] for part in parts)} == {0, 50}
    # No part of a strip has an aspect near 1: its middle is taken.
    assert random_part(300, 3, 0.9, torch.rand(10, 4, generator=generator)) == (148, 0, 152, 3)


def test_views_that_cannot_be() -> None:
    batches = in_memory(10, 4)
    with pytest.raises(OptionError, match="step=-1"):
        batches.starting_at(-1)
    with pytest.raises(OptionError, match="index=0, count=5: batches of batch_size=4"):
        batches.shard(0, 5)
    with pytest.raises(OptionError, match="index=2, count=2"):
        batches.shard(2, 2)
    with pytest.raises(OptionError, match="already part 1 of 2"):
        batches.shard(1, 2).shard(0, 2)
