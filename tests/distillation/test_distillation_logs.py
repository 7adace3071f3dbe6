"""What a run writes down: nothing twice, nothing lost, and a full disk is said."""

import csv
import errno
import os
import sys
from pathlib import Path

import pytest

from ghostify.distillation import Epoch, Scores
from ghostify.distillation import logs as logs_module
from ghostify.distillation.logs import RunLog, expected_line, expected_seconds
from ghostify.errors import MissingExtraError, OutputError

needs_full_device = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
SCORES = Scores(loss=0.25, agreement=0.75, accuracy=0.5, teacher_accuracy=0.875)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> list[str]:
    return [row[name] for row in table(path)]


def step(log: RunLog, number: int, loss: float = 1.0) -> None:
    log.step(number, loss=loss, lr=0.1, images_per_second=100.0)


def epoch(log: RunLog, number: int, *, steps: int, scores: Scores | None = SCORES) -> None:
    record = Epoch(epoch=number, loss=0.5, lr=0.1, val_accuracy=scores and scores.accuracy, seconds=2.0)
    log.epoch(steps, record, scores)


def went_through(folder: Path, loss: float, *, steps: range, epochs: range, **options) -> None:
    """So many steps, an epoch being two of them."""
    with RunLog(folder, **options) as log:
        for number in steps:
            step(log, number, loss)
            if number % 2 == 0 and number // 2 in epochs:
                epoch(log, number // 2, steps=number)


def test_rows_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with RunLog(folder) as log:
        step(log, 10, loss=0.1)
        epoch(log, 1, steps=10)
        assert table(folder / "steps.csv") == [{"step": "10", "loss": "0.1", "lr": "0.1", "images_per_second": "100.0"}]
        (row,) = table(folder / "epochs.csv")
    assert row["epoch"] == "1"
    assert row["step"] == "10"
    assert row["val_accuracy"] == "0.5"
    assert row["teacher_accuracy"] == "0.875"
    assert row["val_loss"] == ""  # what was not recorded
    assert sorted(os.listdir(folder)) == ["epochs.csv", "steps.csv"]


def test_an_epoch_without_validation_has_a_row(tmp_path: Path) -> None:
    with RunLog(tmp_path) as log:
        epoch(log, 1, steps=10, scores=None)
    assert column(tmp_path / "epochs.csv", "teacher_accuracy") == [""]


def test_a_run_that_goes_on_writes_nothing_twice(tmp_path: Path) -> None:
    went_through(tmp_path, 1.0, steps=range(1, 7), epochs=range(1, 4))
    with RunLog(tmp_path, steps=3, epochs=1) as log:
        assert column(tmp_path / "steps.csv", "step") == ["1", "2", "3"]
        assert column(tmp_path / "epochs.csv", "epoch") == ["1"]
        step(log, 4, loss=2.0)
        epoch(log, 2, steps=4)
    assert column(tmp_path / "steps.csv", "loss") == ["1.0", "1.0", "1.0", "2.0"]
    assert column(tmp_path / "epochs.csv", "epoch") == ["1", "2"]


def test_an_epoch_whose_last_step_is_done_but_which_has_not_ended_is_written_anew(tmp_path: Path) -> None:
    went_through(tmp_path, 1.0, steps=range(1, 5), epochs=range(1, 3))
    with RunLog(tmp_path, steps=4, epochs=1):
        pass
    assert column(tmp_path / "steps.csv", "step") == ["1", "2", "3", "4"]
    assert column(tmp_path / "epochs.csv", "epoch") == ["1"]


def test_a_run_that_begins_keeps_nothing_of_another(tmp_path: Path) -> None:
    went_through(tmp_path, 1.0, steps=range(1, 5), epochs=range(1, 3))
    with RunLog(tmp_path):
        pass
    assert table(tmp_path / "steps.csv") == table(tmp_path / "epochs.csv") == []
    assert (tmp_path / "steps.csv").read_text() == "step,loss,lr,images_per_second\n"


@pytest.mark.parametrize(
    "torn",
    ["4,0.5", "4,0.5,0.1,10", "4", "4,0.5,0.1,", "\0\0\0\0", "4,0.54,1.0,0.1,100.0\n", "x,1.0,0.1,100.0\n", "4,1\n"],
    ids=repr,
)
def test_a_torn_line_goes_and_no_row_is_glued_to_it(tmp_path: Path, torn: str) -> None:
    went_through(tmp_path, 1.0, steps=range(1, 4), epochs=range(0))
    with (tmp_path / "steps.csv").open("a") as file:
        file.write(torn)
    with RunLog(tmp_path, steps=4) as log:
        step(log, 5)
    assert column(tmp_path / "steps.csv", "step") == ["1", "2", "3", "5"]
    assert set(column(tmp_path / "steps.csv", "images_per_second")) == {"100.0"}


@pytest.mark.parametrize("text", ["", "ste", "step,loss\n", "a,b\n1,2\n", "\n"])
def test_a_file_without_a_header_of_ours_begins_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "steps.csv").write_text(text)
    with RunLog(tmp_path, steps=4) as log:
        step(log, 5)
    assert (tmp_path / "steps.csv").read_text() == "step,loss,lr,images_per_second\n5,1.0,0.1,100.0\n"


def test_rows_with_other_columns_are_kept_as_far_as_they_go(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text("step,loss,gone\n1,0.5,9\n")
    with RunLog(tmp_path, steps=1):
        pass
    assert (tmp_path / "steps.csv").read_text() == "step,loss,lr,images_per_second\n1,0.5,,\n"


def test_no_folder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, tensorboard=True) as log:
        step(log, 1)
        epoch(log, 1, steps=1)
    assert os.listdir(tmp_path) == []


@needs_full_device
@pytest.mark.parametrize("name", ["steps.csv", "epochs.csv"])
def test_a_full_disk_is_said(tmp_path: Path, name: str) -> None:
    with RunLog(tmp_path) as log:
        step(log, 1)
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/full")
        with pytest.raises(OutputError, match=rf"{name}.*No space left on device.*free some space"):
            step(log, 2) if name == "steps.csv" else epoch(log, 1, steps=2)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        RunLog(tmp_path / "file" / "run")


def test_a_missing_tensorboard_names_the_extra_before_a_file_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"'ghostify\[tensorboard\]'"):
        RunLog(tmp_path, tensorboard=True)
    assert os.listdir(tmp_path) == []


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_events_hold_what_the_files_hold_and_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    went_through(tmp_path, 1.0, steps=range(1, 7), epochs=range(1, 4), tensorboard=True)
    with RunLog(tmp_path, tensorboard=True, steps=3, epochs=1) as log:
        step(log, 4, loss=2.0)
        epoch(log, 2, steps=4)
    found = scalars(tmp_path)
    assert found["step/loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]
    assert found["epoch/val_accuracy"] == [(2, 0.5), (4, 0.5)]
    assert found["epoch/teacher_accuracy"] == [(2, 0.875), (4, 0.875)]
    assert set(found) == {
        *(f"step/{name}" for name in ("loss", "lr", "images_per_second")),
        *(f"epoch/{name}" for name in ("loss", "lr", "val_accuracy", "seconds", "teacher_accuracy")),
    }


class Writer:
    """Stands for torch's, on a disk that is full from a given call on."""

    def __init__(self, failing: str) -> None:
        self.failing, self.closed = failing, False

    def __call__(self, *args: object, **options: object) -> "Writer":
        self._call("open")
        return self

    def add_scalar(self, *args: object) -> None:
        self._call("add")

    def flush(self) -> None:
        self._call("flush")

    def close(self) -> None:
        self.closed = True
        self._call("close")

    def _call(self, name: str) -> None:
        if name == self.failing:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["open", "add", "flush", "close"])
def test_a_disk_too_full_for_events_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    monkeypatch.setattr(logs_module, "_summary_writer", lambda: Writer(failing))
    with (
        pytest.raises(OutputError, match=r"tensorboard'.*No space left on device"),
        RunLog(tmp_path, tensorboard=True) as log,
    ):
        epoch(log, 1, steps=1)


@pytest.mark.parametrize("failing", ["nothing", "close"])
def test_events_are_closed_and_what_ended_the_run_is_what_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    writer = Writer(failing)
    monkeypatch.setattr(logs_module, "_summary_writer", lambda: writer)
    with pytest.raises(KeyboardInterrupt), RunLog(tmp_path, tensorboard=True):
        raise KeyboardInterrupt
    assert writer.closed
    assert ("No space left on device" in caplog.text) == (failing == "close")


def test_the_expected_time_counts_steps_and_validations() -> None:
    assert expected_seconds(0.5, 100) == 50.0
    assert expected_seconds(0.5, 100, seconds_per_validation=3.0, validations=4) == 62.0


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, "1 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569.0, "59 min"),
        (3599.0, "1 h 0 min"),
        (7790.0, "2 h 10 min"),
        (86_399.0, "1 d 0 h"),
        (100_000.0, "1 d 4 h"),
    ],
)
def test_a_time_is_told_in_its_two_largest_units(seconds: float, told: str) -> None:
    assert expected_line(seconds, 3, 7) == f"about {told}: 3 epochs of 7 steps"
