"""Files that are read: regular ones, under the name they were given, and the JSON in them.

A pipe or a device could be read for ever, so only regular files are opened. A name that stands in a file leads to no
other folder. JSON is decoded by `msgspec`, which refuses NaN, infinity and what is not of the type that is expected.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ..checks import FileRefused, reading, short

MOST_BYTES = 1 << 28
"""Of a file that is read whole: settings, an index of shards, a tokenizer."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading."""
    with reading(path):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileRefused(path, "not a regular file")
        return open(path, "rb")


def read_whole(path: Path, at_most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a regular file of no more than `at_most`."""
    with open_regular(path) as file, reading(path):
        if os.fstat(file.fileno()).st_size > at_most:
            raise FileRefused(path, f"larger than the {at_most} bytes that such a file can need")
        return file.read()


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file, which tell its format."""
    with open_regular(path) as file, reading(path):
        return file.read(count)


def read_json(path: Path, kind: Any = dict[str, Any], at_most: int = MOST_BYTES) -> Any:
    """Return what a file of JSON holds, as a value of the type `kind`: a `msgspec.Struct`, or an object by default."""
    return parse_json(path, read_whole(path, at_most), kind)


def parse_json(path: Path, text: bytes | str, kind: Any = dict[str, Any], what: str = "") -> Any:
    """Return what a text of JSON from a file holds; `what` says which text of the file it is."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FileRefused(path, f"{what}: {error}" if what else str(error)) from error


def member(folder: Path, name: str) -> Path:
    """Return the path of the file of that plain name in a folder.

    It may be a symbolic link, as in a cache of the Hugging Face hub, whose files are links to ``../../blobs``.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise FileRefused(folder, f"{short(name)} is not the plain name of a file in this folder")
    return folder / name
