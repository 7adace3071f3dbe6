"""Writing results so that nothing half-written is ever found under a final name."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ghostify.errors import OutputError


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, sole_writer: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it is renamed to ``path``, else removed.

    A link stays one: what it leads to is replaced. Into a pipe or a device the result is copied.

    Args:
        path: The final file. Missing parent folders are made.
        sole_writer: Nobody else writes this file now, so that temporary ones beside it are of a process that was
            killed, and removed.

    Yields:
        The temporary path to write to.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    final = Path(path)
    with _reported(final):
        special = final.exists() and not final.is_file() and not final.is_dir()
        if not special:
            final = Path(os.path.realpath(path))
            final.parent.mkdir(parents=True, exist_ok=True)
            if sole_writer:
                for abandoned in final.parent.glob(f".{glob.escape(final.stem)}.????????{glob.escape(final.suffix)}"):
                    abandoned.unlink(missing_ok=True)
        home = None if special else final.parent
        descriptor, name = tempfile.mkstemp(prefix=f".{final.stem}.", suffix=final.suffix, dir=home)
        os.close(descriptor)
    temporary = Path(name)
    try:
        with _reported(final):
            yield temporary
            if special:
                final.write_bytes(temporary.read_bytes())
            else:
                _flush(temporary)
                temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files; a result is an ordinary one
                temporary.replace(final)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The same for a folder: it appears under its final name complete or not at all.

    An existing folder of that name is replaced, and only after the new one is complete.

    Args:
        path: The final folder. Missing parent folders are made.

    Yields:
        A temporary folder to fill.

    Raises:
        OutputError: The folder cannot be written, or the disk is full.
    """
    final = Path(os.path.realpath(path))
    with _reported(final):
        if Path.cwd().is_relative_to(final):
            raise OutputError(f"path={str(path)!r} is the folder that you are in, or above it. Name another one.")
        if final.exists() and not final.is_dir():
            raise OutputError(f"path={str(final)!r} is a file, and a folder is to be written there. Name another one.")
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        with _reported(final):
            yield temporary
            for file in temporary.iterdir():
                _flush(file)
            temporary.chmod(0o777 & ~_umask())
            if final.exists():
                _swap(temporary, final)
            else:
                temporary.replace(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def interrupted(path: str | os.PathLike[str]) -> Path | None:
    """Where the older folder is, if the program was killed at the very moment when a new one took its name."""
    final = Path(os.path.realpath(path))
    return None if final.exists() else next(final.parent.glob(f".{glob.escape(final.name)}.old.*"), None)


def _swap(temporary: Path, final: Path) -> None:
    """Put a folder in the place of another; whatever fails, the older one is back under its name."""
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.old.", dir=final.parent))
    try:
        final.replace(retired)
        temporary.replace(final)
    except BaseException:
        if not final.exists():
            retired.replace(final)
        raise
    finally:
        if final.exists():  # else the retired one is all that is left
            shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def _reported(final: Path) -> Iterator[None]:
    """Turn an operating-system error into one that says what was being written and what to do."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"path={str(final)!r} cannot be written: {error.strerror or error}. Nothing half-written is left; "
            "free some space or name a folder that you may write to."
        ) from error


def _flush(file: Path) -> None:
    """Make sure that the bytes are on the disk before the name is."""
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
