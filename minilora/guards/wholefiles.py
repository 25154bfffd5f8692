"""Files that are written whole or not at all, also where two processes write them at once.

Promise: a crash or a kill at any moment leaves the old file or the new one, of a set the old set or the new one, and of
a folder all or nothing; what a killed process has left is deleted by the next that writes there.
Kept by: a file is written beside its target, under a name that no other process has, and takes the target's place by
one rename, in the order: file to the disk (fsync), rename, folder to the disk. Renames of a folder take turns, see
`minilora.guards.folderlocks`, so that a target that someone else replaced in the meantime is noticed; the folder is
locked for the renames alone, which take milliseconds, and not while a file is written. Each unfinished file is locked
by the process that writes it: one that nobody holds is the remains of a killed process.
Shown by: tests/guards/test_wholefiles.py.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from .folderlocks import locked

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def written_whole(path: Path, *, alone: bool = False) -> Iterator[BinaryIO]:
    """Open a file to write that takes its place at `path` only when it is complete and on the disk.

    Parameters
    ----------
    path : Path
        A regular file, which is replaced, or a new name.
    alone : bool
        Whether to refuse if someone else wrote `path` in the meantime; the last to finish replaces it otherwise.

    Raises
    ------
    ValueError
        If `path` is something other than a regular file, or `alone` is not so.
    OSError
        If the file cannot be written. What was there before is left as it was.
    """
    with written_together(path, alone=alone) as (file,):
        yield file


@contextlib.contextmanager
def written_together(*paths: Path, alone: bool = False) -> Iterator[list[BinaryIO]]:
    """Open several files of one folder, which take their places together when all are complete and on the disk.

    No system renames two files at once, so the last file decides which of two sets is read. All are put ready beside
    their places, the last of the old ones is removed, and the new ones take their places. Until the removal the old
    ones are read, and from then on the new ones, wherever they are: see `places`.
    """
    folder = paths[0].parent
    parts: dict[Path, Path] = {}
    with contextlib.ExitStack() as open_files:
        try:
            with locked(folder):
                before = [replaceable(path) for path in paths]
                files: list[BinaryIO] = []
                for path in paths:
                    _remove_remains(path)
                    parts[path] = _part_of(path)
                    files.append(open_files.enter_context(open(parts[path], "xb")))
                    _hold(files[-1].fileno())
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
            with locked(folder):
                now = [replaceable(path) for path in paths]
                if alone and now != before:
                    raise ValueError(f"{str(paths[0])!r} was written by someone else in the meantime, and is left so")
                open_files.close()
                _take_places(parts)
        except BaseException:
            for part in parts.values():
                part.unlink(missing_ok=True)
            raise
    sync_folder(folder)


def places(*paths: Path) -> list[Path]:
    """Return where to read files that were written together: where the last is missing, those put ready are meant."""
    *_, last = paths
    if os.path.lexists(last):
        return list(paths)
    return [_ready(path) if os.path.lexists(_ready(path)) else path for path in paths]


def _take_places(parts: Mapping[Path, Path]) -> None:
    """Rename complete files to their places, so that whoever is killed on the way leaves the old set or the new one."""
    *_, last = parts
    _settle(parts)
    if len(parts) == 1 or not os.path.lexists(last) or parts[last].read_bytes() == last.read_bytes():
        for path, part in parts.items():
            os.replace(part, path)
        return
    try:
        for path, part in parts.items():
            os.replace(part, _ready(path))
        sync_folder(last.parent)
        last.unlink()
    finally:
        _settle(parts)


def _settle(paths: Iterable[Path]) -> None:
    """Finish what a writer has begun: files put ready take their places, or go if the last was not yet removed."""
    *_, last = paths
    removed = not os.path.lexists(last)
    for path in paths:
        ready = _ready(path)
        if os.path.lexists(ready) and removed:
            sync_folder(path.parent)  # so that the disk sees each step after the one before it
            os.replace(ready, path)
        elif os.path.lexists(ready):
            ready.unlink()


def is_new_or_empty(path: Path) -> bool:
    """Return whether a folder can be written at a path without a loss: a new name, or an empty folder itself."""
    return not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


@contextlib.contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """Make a folder to write into that takes its place at `path`, new or empty, when it is complete.

    Write its files with `synced`.
    """
    parent = path.absolute().parent
    with locked(parent):
        _remove_remains(path)
        part = _part_of(path)
        part.mkdir()
        handle = os.open(part, os.O_RDONLY) if fcntl else None
        _hold(handle)
    try:
        yield part
        sync_folder(part)
        try:
            os.replace(part, path)
        except OSError as error:
            raise ValueError(f"the folder {str(path)!r} cannot be put in its place: {error}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)
    sync_folder(parent)


@contextlib.contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file to write, and wait until it is on the disk."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def replaceable(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another, None where there is none; refuse all but regular files.

    A device or a pipe must not be replaced by a file, nor a symbolic link: what it leads to would stay as it was.
    """
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "symbolic link" if stat.S_ISLNK(status.st_mode) else "folder, a device or a pipe"
        raise ValueError(f"{str(path)!r} is a {kind}, expected a regular file or a new name")
    return identity(status)


def refuse_inputs(name: str, out: Path, inputs: Iterable[tuple[Path, str]]) -> None:
    """Refuse to write a file to where one lies, or is going to lie, that the same command reads.

    Parameters
    ----------
    name : str
        What the output is called, such as "out".
    out : Path
        Where it goes.
    inputs : iterable of (Path, str)
        A file that is read, and what it is, such as "the model".
    """
    for path, what in inputs:
        both = os.path.exists(out) and os.path.exists(path)
        if os.path.samefile(out, path) if both else os.path.realpath(out) == os.path.realpath(path):
            raise ValueError(f"{name} {str(out)!r} is {what}, expected another file")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is replaced, or written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _prefix(path: Path) -> str:
    """Return how the names of unfinished files for this target begin: short, however long the target's own name."""
    return f".minilora-{zlib.crc32(os.fsencode(path.name)):08x}-"


def _ready(path: Path) -> Path:
    """Return where a complete file waits for its place."""
    return path.with_name(f".minilora-ready-{path.name}")


def _part_of(path: Path) -> Path:
    return path.absolute().parent / f"{_prefix(path)}{secrets.token_hex()}.part"


def _hold(handle: int | None) -> None:
    """Lock an unfinished file for as long as it is open."""
    if fcntl is not None and handle is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_remains(path: Path) -> None:
    """Delete what killed processes left of this target: unfinished files that nobody holds any more."""
    if fcntl is None:
        return
    for part in path.absolute().parent.glob(f"{_prefix(path)}*.part"):
        with contextlib.suppress(OSError):
            handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            finally:
                os.close(handle)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can say so."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
