from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from ghostify.deployment.manifest import read_manifest
from ghostify.errors import ArtefactError, OutputError
from ghostify.files import atomic_file, atomic_folder, interrupted


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text)


def write_folder(path: Path, text: str) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "part.txt").write_text(text)


def read(path: Path) -> str:
    return (path / "part.txt" if path.is_dir() else path).read_text()


WRITERS = [write_file, write_folder]
Writer = Callable[[Path, str], None]


@pytest.mark.parametrize("write", WRITERS)
def test_a_result_appears_under_its_name_and_alone(write: Writer, tmp_path: Path) -> None:
    write(tmp_path / "deep" / "result", "new")
    assert read(tmp_path / "deep" / "result") == "new"
    assert names(tmp_path / "deep") == ["result"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_result_replaces_an_older_one(write: Writer, tmp_path: Path) -> None:
    write(tmp_path / "result", "old")
    write(tmp_path / "result", "new")
    assert read(tmp_path / "result") == "new"
    assert names(tmp_path) == ["result"]


def test_a_replaced_folder_keeps_none_of_its_old_files(tmp_path: Path) -> None:
    write_folder(tmp_path / "result", "old")
    (tmp_path / "result" / "stale.txt").write_text("")
    write_folder(tmp_path / "result", "new")
    assert names(tmp_path / "result") == ["part.txt"]


@pytest.mark.parametrize("write", WRITERS)
def test_a_result_has_the_permissions_of_an_ordinary_one(write: Writer, tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write(tmp_path / "result", "new")
    finally:
        os.umask(mask)
    mode = stat.S_IMODE((tmp_path / "result").stat().st_mode)
    assert mode == (0o750 if (tmp_path / "result").is_dir() else 0o640)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_file_keeps_the_older_one(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_file(tmp_path / "result") as temporary:
            temporary.write_text("half")
            raise error

    write_file(tmp_path / "result", "old")
    with pytest.raises(error):
        interrupted()
    assert read(tmp_path / "result") == "old"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_folder_keeps_the_older_one(error: type[BaseException], tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "result") as temporary:
            (temporary / "part.txt").write_text("half")
            raise error

    write_folder(tmp_path / "result", "old")
    with pytest.raises(error):
        interrupted()
    assert read(tmp_path / "result") == "old"
    assert names(tmp_path) == ["result"]


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_said_and_leaves_nothing(
    write: Writer, older: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    if older:
        write(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=r"result.*No space left on device.*Nothing half-written"):
            write(target, "new")
    assert names(tmp_path) == (["result"] if older else [])
    assert not older or read(target) == "old"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_swap_of_folders_that_fails_puts_the_older_one_back(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "result"
    write_folder(target, "old")
    rename, calls = Path.replace, []

    def fails_once(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == failing:
            full()
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", fails_once)
    with pytest.raises(OutputError):
        write_folder(target, "new")
    assert names(tmp_path) == ["result"]
    assert read(target) == "old"


@pytest.mark.parametrize("write", WRITERS)
def test_a_parent_that_is_a_file_is_an_output_error(write: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="cannot be written"):
        write(tmp_path / "file" / "result", "new")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("mine")
    with pytest.raises(OutputError, match="is a file, and a folder is to be written there"):
        write_folder(tmp_path / "result", "new")
    assert (tmp_path / "result").read_text() == "mine"


def test_a_file_never_replaces_a_folder(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    with pytest.raises(OutputError):
        write_file(tmp_path / "result", "new")
    assert names(tmp_path) == ["result"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("write", WRITERS)
def test_an_unwritable_folder_is_said(write: Writer, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="name a folder that you may write to"):
            write(tmp_path / "result", "new")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("write", WRITERS)
def test_a_link_stays_a_link(write: Writer, tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "real") == "new"
    assert names(tmp_path) == ["link", "real"]


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", "through it")
    assert os.read(reader, 100) == b"through it"
    os.close(reader)
    assert names(tmp_path) == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_the_working_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (Path("."), Path(".."), tmp_path / "here"):
        with pytest.raises(OutputError, match="the folder that you are in"):
            write_folder(path, "new")
    assert names(tmp_path) == ["here"]


def test_a_folder_whose_replacement_was_interrupted_is_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "result", "old")
    assert interrupted(tmp_path / "result") is None
    (tmp_path / "result").rename(tmp_path / ".result.old.abc")
    assert interrupted(tmp_path / "result") == tmp_path / ".result.old.abc"
    with pytest.raises(ArtefactError, match=r"A save was interrupted: .*\.result\.old\.abc' is the one before it"):
        read_manifest(tmp_path / "result")


def test_what_a_killed_writer_left_goes_with_the_next_file_and_nothing_else_does(tmp_path: Path) -> None:
    kept = [".last.safetensors", ".last.mine.safetensors", ".lasting.abcdefgh.safetensors", ".last.abcdefgh.json"]
    for name in [".last.abcdefgh.safetensors", *kept]:
        (tmp_path / name).touch()
    with atomic_file(tmp_path / "last.safetensors") as temporary:
        temporary.touch()
    assert len(names(tmp_path)) == 6  # somebody may be writing it
    with atomic_file(tmp_path / "last.safetensors", sole_writer=True) as temporary:
        temporary.touch()
    assert names(tmp_path) == sorted(["last.safetensors", *kept])
