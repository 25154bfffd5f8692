"""Text for terminals and error messages.

`reading` and `named` put the name of the file or argument in front of another library's error. This file does not need
NumPy, like the command line until a command runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_NAME, LONGEST_MESSAGE = 200, 1200
"""The largest number of characters of a name or value, and of a whole message."""
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(?<!\.gguf)(?<!\.npz)(?<!\.json)(?<!\.safetensors)")
"""``owner/model``, the form of a hub's name of a model."""


class FileRefused(ValueError):
    """A file of any kind cannot be used; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(printable(f"{str(path)!r}: {reason}"))


def printable(text: str, at_most: int = LONGEST_MESSAGE) -> str:
    """Return a text in one line without control characters, without its middle if it is too long."""
    if len(text) > at_most:  # done first, so that a very long text costs only its ends
        half = at_most // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def enumerated(names: Sequence[str]) -> str:
    """Return names joined for a sentence."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def align(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Return rows of text with their columns aligned: those in `left` flush left, the others flush right."""
    sides = (str.ljust if i in left else str.rjust for i in range(len(rows[0])))
    columns = [(side, max(map(len, column))) for side, column in zip(sides, zip(*rows, strict=True), strict=True)]
    return ["  ".join(side(cell, n) for cell, (side, n) in zip(row, columns, strict=True)).rstrip() for row in rows]


def short(value: Any, at_most: int = LONGEST_NAME) -> str:
    """Return a value's repr, without its middle if it is too long."""
    if isinstance(value, str) and len(value) > at_most:
        value = value[:at_most] + value[-at_most:]  # the repr of the whole would be cut to this anyway
    return printable(repr(value), at_most)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn a library's error about a file into one line: ``'PATH': reason``."""
    try:
        yield
    except FileRefused:
        raise
    except OSError as error:
        raise FileRefused(path, (error.strerror or str(error)) + hub_hint(Path(path))) from error
    except KeyError as error:
        raise FileRefused(path, f"there is no {error}") from error
    except Exception as error:  # safetensors, msgspec, json and gguf have their own classes
        raise FileRefused(path, str(error) or type(error).__name__) from error


@contextmanager
def named(label: str) -> Iterator[None]:
    """Put a name in front of an error, as in ``adapters['q']: ...``. A file's error already has one."""
    try:
        yield
    except FileRefused:
        raise
    except (TypeError, ValueError) as error:  # its text tells which subclass it is, such as a UnicodeDecodeError
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{label}: {error}") from None


def hub_hint(path: Path) -> str:
    """Return a hint if a path does not exist and looks like a hub's name of a model; else ""."""
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    return f". If it is a model's name on a hub, download it ('hf download {name} --local-dir DIR') and give the folder"
