"""Safe reading and atomic writing of files and folders.

Reading a pipe or a device might never end, so only regular files are opened. A file name found in a file cannot lead
to another folder. JSON is decoded by `msgspec`, which refuses NaN, infinity and unexpected types.

A kill, a crash or a full disk at any moment leaves the old file or the new one, and a new folder complete or not at
all. Output is written to a temporary name next to its target, flushed to the disk (fsync), and renamed. If several
files of a folder are replaced together, a kill between two renames leaves a folder that every reader refuses. A killed
process leaves its unfinished file, ``.NAME-….part``, which may be deleted. If two processes write one file, the last to
finish replaces it.

A file that another program replaces or modifies while it is read is refused, so a reader never gets a mixture.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..texts import FileRefused, reading, short

MAX_FILE_BYTES = 1 << 28
"""The largest size of a file that is read as a whole: settings, an index of shards, a tokenizer."""

TENSORS_PATTERN, FIGURE_PATTERN = rb'.{8}\{.*"minilora_', b".*minilora"
"""Patterns for the safetensors files (adapters, checkpoints, merged weights) and the figures that minilora writes."""
SEARCHED_BYTES = 1 << 24
"""The number of bytes at a file's start in which a mark of minilora is searched: more than a figure's."""


class RegularFile(io.FileIO):
    """A regular file, open for reading while this object lives."""

    def __init__(self, path: Path) -> None:
        with reading(path):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise FileRefused(path, "not a regular file")
            super().__init__(path)
        self.opened = os.fstat(self.fileno())

    def __del__(self) -> None:
        self.close()

    def check_unchanged(self, *, in_place: bool = False) -> None:
        """Require that the file was not modified since it was opened, and with `in_place` that none replaced it."""
        with reading(self.name):
            then, now = self.opened, os.stat(self.name if in_place else self.fileno())
            if not os.path.samestat(then, now) or (then.st_size, then.st_mtime_ns) != (now.st_size, now.st_mtime_ns):
                raise FileRefused(self.name, "another program modified it while it was being read: read it again")


def model_format(path: Path) -> str:
    """Return a model's format: "folder", or the suffix ".gguf" or ".npz" of a regular file."""
    if os.path.isdir(path):
        return "folder"
    RegularFile(path).close()
    if path.suffix not in (".gguf", ".npz"):
        raise FileRefused(path, "expected a folder with config.json, a .gguf file or a .npz file")
    return path.suffix


def read_whole(path: Path, at_most: int | None = None) -> bytes:
    """Return the bytes of a regular file, which may have `at_most` bytes, by default `MAX_FILE_BYTES`."""
    at_most = at_most or MAX_FILE_BYTES
    with RegularFile(path) as file, reading(path):
        if file.opened.st_size > at_most:
            raise FileRefused(path, f"larger than {at_most} bytes, the limit for such a file")
        return file.read()


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file, which identify its format."""
    with RegularFile(path) as file, reading(path):
        return file.read(count)


def read_json(path: Path, kind: Any = dict[str, Any]) -> Any:
    """Read a JSON file as a value of the type `kind`: a `msgspec.Struct`, or by default any object."""
    return parse_json(path, read_whole(path), kind)


def parse_json(path: Path, text: bytes, kind: Any = dict[str, Any]) -> Any:
    """Decode a JSON text as a value of the type `kind`; errors name the file at `path`, which it comes from."""
    import msgspec  # imported here, since the core only writes files

    with reading(path):
        return msgspec.json.decode(text, type=kind)


def member(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder by its plain name. The file may be a link, as in the hub's cache."""
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise FileRefused(folder, f"{short(name)} is not the plain name of a file in this folder")
    return folder / name


# --- writing ---


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing; when it is complete, it replaces `path`, a regular file or a new one."""
    check_replaceable(path)
    with _unfinished(path, path) as part:
        with synced(part) as file:
            yield file
        os.replace(part, path)
    sync_folder(path.absolute().parent)


@contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """Make a folder for files written with `synced`; when it is complete, it becomes `path`, a new or empty folder."""
    with _unfinished(path, path) as part:
        part.mkdir()
        yield part
        sync_folder(part)
        os.replace(part, path)
    sync_folder(path.absolute().parent)


@contextmanager
def written_into(folder: Path, last: str) -> Iterator[Path]:
    """Make a folder for files written with `synced`; when all are complete, they move to `folder`.

    The file `last`, which every reader requires, is removed first and moved last. Other files in `folder` stay.
    """
    with _unfinished(folder / folder.name, folder) as part:
        part.mkdir()
        yield part
        (folder / last).unlink(missing_ok=True)
        for name in sorted(os.listdir(part), key=last.__eq__):
            os.replace(part / name, folder / name)
        part.rmdir()
    sync_folder(folder)


@contextmanager
def _unfinished(path: Path, target: Path) -> Iterator[Path]:
    """Yield a short, unique path next to `path`. On an error, remove what is there; a system error names `target`."""
    part = path.absolute().parent / f".{path.name[:40]}-{secrets.token_hex(8)}.part"
    try:
        with naming_errors(target, part):
            yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        raise


@contextmanager
def naming_errors(path: Path, part: Path | None = None) -> Iterator[None]:
    """Put the path into a system error that has none, such as that of a full disk, or that names `part` instead."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or (part is not None and str(error.filename).startswith(str(part)))
        if unnamed and error.errno is not None:  # an error without a number has its own message
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def synced(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing, and flush it to the disk at the end."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the system supports it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- protecting existing files ---


def is_new_or_empty(path: Path) -> bool:
    """Return whether writing a folder at a path destroys nothing: the path is new, or an empty folder."""
    return not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def check_parent(name: str, path: Path) -> None:
    """Require that the parent folder of a path exists."""
    if not os.path.isdir(path.absolute().parent):
        raise ValueError(f"{name} {str(path)!r}: there is no folder {str(path.parent)!r}")


def check_file(name: str, path: Path, inputs: Iterable[tuple[Path, str]]) -> None:
    """Require a path that `written_whole` can write, and that is none of the inputs."""
    check_parent(name, path)
    check_writable(path.absolute().parent)
    refuse_inputs(name, path, inputs)
    check_replaceable(path)


def check_new_folder(name: str, path: Path, why: str = "a folder is written") -> None:
    """Require a path that `written_folder` can write; `why` explains why a folder is written."""
    check_parent(name, path)
    check_writable(path.absolute().parent)
    if not is_new_or_empty(path):
        raise ValueError(f"{name} {str(path)!r} exists, expected an empty or new folder: {why}")
    if os.path.lexists(path) and (os.path.ismount(path) or path.samefile(".")):
        raise ValueError(
            f"{name} {str(path)!r} is the working folder or a mount point, which cannot be replaced: choose a new one"
        )


def check_replaceable(path: Path) -> None:
    """Require a regular or new file: no device or pipe, nor a link, since its target would not change."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = "symbolic link" if stat.S_ISLNK(mode) else "folder, a device or a pipe"
        raise ValueError(f"{str(path)!r} is a {kind}, expected a regular file or a new path")


def check_writable(folder: Path) -> None:
    """Require a folder, new or existing, that files can be written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(existing):
        raise ValueError(f"{str(folder)!r}: {str(existing)!r} is a file, expected a folder")
    if not os.access(existing, os.W_OK):
        raise ValueError(f"{str(folder)!r}: the folder {str(existing)!r} is not writable")


def check_new_file(what: str, path: Path | None, overwrite: bool, pattern: bytes) -> None:
    """Require that a file is new; with `overwrite`, one that minilora wrote, which `pattern` matches, is replaced."""
    if path is None or not path.is_file():
        return
    if not overwrite:
        raise ValueError(f"{what} {str(path)!r} already exists: choose another path, or pass --overwrite")
    check_written_here(what, path, pattern)


def check_written_here(what: str, path: Path, pattern: bytes) -> None:
    """Require a file that minilora wrote: the expression `pattern` must match its start."""
    if not re.match(pattern, read_start(path, SEARCHED_BYTES), re.DOTALL):
        raise ValueError(
            f"{what} {str(path)!r} was not written by minilora, so --overwrite does not replace it: choose another path"
        )


def refuse_inputs(name: str, out: Path, inputs: Iterable[tuple[Path, str]]) -> None:
    """Require that an output is none of the inputs; each has a description for the error, such as "the model"."""
    for path, what in inputs:
        both = os.path.exists(out) and os.path.exists(path)
        if os.path.samefile(out, path) if both else os.path.realpath(out) == os.path.realpath(path):
            raise ValueError(f"{name} {str(out)!r} is {what}, expected another file")
