"""Files that are read with suspicion: regular ones alone, no more of them than is needed, and JSON that reads one way.

Promise: a pipe or a device is not read for ever, a large file fills no memory, and no reader takes a text otherwise.
Kept by: `open_regular`, which all readers of this package open files with; `read_whole`, with a bound on the bytes; and
`parse_json`, which refuses a key that stands twice, NaN, and infinity.
Shown by: tests/guards/test_inputfiles.py.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ..checks import FileRefused, hub_hint, short

MOST_NESTED = 100
"""Lists and objects in each other that JSON may have."""


def parse_json(path: Path, text: bytes, what: str, convert: Callable[[dict[str, Any]], Any] = dict) -> dict[str, Any]:
    """Parse a JSON object, refusing what a reader could take in two ways: a key that stands twice, NaN, infinity.

    Each object in it goes through `convert` as soon as it is read.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"the key {short(twice)} stands twice")
        return convert(entries)

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error) if b"\n" in text.strip() else str(error).replace(": line 1 column", ": column")
        raise FileRefused(path, f"the {what} is not sound JSON: {reason}") from error
    if isinstance(parsed, dict | list) and _nests_deeper(parsed, MOST_NESTED):
        raise FileRefused(path, f"the {what} nests deeper than {MOST_NESTED} levels, which no such file does")
    if not isinstance(parsed, dict):
        raise FileRefused(path, f"the {what} is a {type(parsed).__name__} of JSON, expected an object")
    return parsed


def _nests_deeper(value: Any, most: int) -> bool:
    """Return whether lists and objects stand in each other more often: to write them again would then fail."""
    level = [value]
    for _ in range(most):
        inside = (part for parts in level for part in (parts.values() if isinstance(parts, dict) else parts))
        level = [part for part in inside if isinstance(part, dict | list)]
        if not level:
            return False
    return True


def json_bytes(value: Any) -> bytes:
    """Return a value as a file of JSON that people read."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def read_json(path: Path, at_most: int) -> dict[str, Any]:
    """Read a JSON object from a file of no more than `at_most` bytes."""
    return parse_json(path, read_whole(path, at_most), "file")


def read_whole(path: Path, at_most: int) -> bytes:
    """Return the bytes of a file, which may be no more than `at_most`."""
    with open_regular(path) as file:
        try:
            text = file.read(at_most + 1)
        except OSError as error:
            raise FileRefused(path, f"cannot be read: {error}") from error
    if len(text) > at_most:
        raise FileRefused(path, f"larger than the {at_most} bytes that such a file can need")
    return text


def read_start(path: Path, count: int) -> bytes:
    """Return the first bytes of a regular file, which tell its format."""
    with open_regular(path) as file:
        return file.read(count)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, and refuse what is not a regular file: a pipe or a device could be read for ever."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileRefused(path, "not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        raise FileRefused(path, f"there is no such file{hub_hint(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, FileRefused):
            raise
        raise FileRefused(path, f"cannot be opened: {error}") from error


def member(folder: Path, name: str) -> Path:
    """Return the path of the file of that name in a folder; refuse a name that leads elsewhere.

    The name may be that of a symbolic link, as in a cache of the Hugging Face hub, whose files are links to
    ``../../blobs``. A link can lead to any file of the user's. That is safe because a file is only read, only if it is
    a regular one, and only as what its name says: what is not an adapter of the right shapes is refused.
    """
    if name != os.path.basename(name) or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise FileRefused(folder, f"{short(name)} is not the plain name of a file in this folder")
    return folder / name
