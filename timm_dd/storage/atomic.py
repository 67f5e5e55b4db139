"""Files that are there whole or not at all: written aside, synced to disk, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import FileError, TimmDDError, headline, shown
from ..text import json_text

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}")  # the name of a file that is being written; others are the user's


@contextlib.contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`; it takes the place of `path` if the block succeeds.

    Args:
        sync: wait until the disk has it; what can be made again need not wait.

    Raises:
        FileError: it cannot be written, or is a folder.
    """
    with _writing(path), _replacing(path.parent, sync) as aside:
        yield aside(path.name)


@contextlib.contextmanager
def output_folder(folder: str | Path, sync: bool = True, wait: bool = False) -> Iterator[Callable[[str], Path]]:
    """A function that gives a temporary path for the name of a file in `folder`; all of them take their places
    together if the block succeeds, otherwise `folder` is as it was. A file that the block does not write is removed.

    Args:
        sync: as of `replacing`.
        wait: for another process that is writing into it.

    Raises:
        FileError: it cannot be written, has a folder in the place of a file, or another process is writing into it.
    """
    if str(folder).startswith("hf-hub:"):
        raise FileError(f"{folder} is on the Hub; write into a folder on this machine, and push that")
    folder = as_path(folder, FileError)
    made: list[Path] = []
    try:
        with _writing(folder):
            _make(folder, made)
            with locked(folder, wait), _replacing(folder, sync, clean=True) as aside:
                yield aside
    except BaseException:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has written into it
                path.rmdir()
        raise


def as_path(path: Any, error: type[TimmDDError]) -> Path:
    """`path` as a Path; `error` if no system takes it as one."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("it has a NUL character")
        return Path(path)
    except (TypeError, ValueError) as e:
        raise error(f"expected the path of a folder, got {shown(path)} ({headline(e)})") from e


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise FileError(f"cannot write to {path}: {e.strerror or e}; choose another output folder") from e


@contextlib.contextmanager
def _replacing(folder: Path, sync: bool = True, clean: bool = False) -> Iterator[Callable[[str], Path]]:
    """Temporary paths in `folder`; `clean` removes what a process that was killed left there."""
    temporaries: dict[Path, Path] = {}

    def aside(name: str) -> Path:
        path = folder / name
        if path.is_dir() and not path.is_symlink():  # of several files none is renamed if one could not be
            raise FileError(f"cannot write to {path}: it is a folder; choose another output folder, or remove it")
        for left in folder.glob(f".{glob.escape(name)}.*") if clean else ():
            if TEMPORARY.fullmatch(left.name):
                left.unlink(missing_ok=True)
        temporary = folder / f".{name}.{secrets.token_hex(4)}"
        temporaries[temporary] = path
        return temporary

    try:
        yield aside
        gone = {t: path for t, path in temporaries.items() if clean and not t.exists()}
        for temporary in temporaries.keys() - gone.keys() if sync else ():
            _sync(temporary)
        for temporary, path in temporaries.items():
            if temporary in gone:
                path.unlink(missing_ok=True)
            else:
                os.replace(temporary, path)
        if sync:
            _sync(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def _make(folder: Path, made: list[Path]) -> None:
    """Make `folder` and the folders above it, and note which were not there."""
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # made by another process just now
                path.mkdir()
                made.append(path)
    if not folder.is_dir():
        raise NotADirectoryError(0, "it is a file")


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back even from a process that is killed.

    Raises:
        FileError: another process holds it, and this one is not to wait.
    """
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(fd)
        raise FileError(f"another process is writing into {folder}; wait for it, or choose another folder") from e
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(fd)


def remove_temporaries(folder: Path, before: float) -> None:
    """Remove what `replacing` left in `folder` and below when a process was killed, if older than the time `before`."""
    for path in folder.rglob(".*.*"):
        if TEMPORARY.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_json(path: Path, value: Any) -> None:
    """Write `value` in the place of `path`."""
    with replacing(path) as temporary:
        temporary.write_text(json_text(value), encoding="utf-8")
