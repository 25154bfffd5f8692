"""Text for a terminal and for errors: one line of printable characters that names the file or the argument.

`reading` and `named` put the file's name, or the argument's, before an error of another library. This file does without
NumPy, as the command line does until a command runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LONGEST_NAME, LONGEST_MESSAGE = 200, 1200
"""Characters of one name or value, and of a whole message."""
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(?<!\.gguf)(?<!\.npz)(?<!\.json)(?<!\.safetensors)")
"""``owner/model``: how a hub names a model."""


class FileRefused(ValueError):
    """A file, of whatever kind, cannot be used; the message names the file and the reason."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(printable(f"{str(path)!r}: {reason}"))


def printable(text: str, at_most: int = LONGEST_MESSAGE) -> str:
    """Return a text in one line without control characters, its middle left out where it is too long."""
    if len(text) > at_most:  # first, so that a very long text costs no more than its ends
        half = at_most // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def enumerated(names: Sequence[str]) -> str:
    """Return names as a sentence has them."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def align(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Return rows of text with their columns aligned: those in `left` flush left, the others flush right."""
    sides = (str.ljust if i in left else str.rjust for i in range(len(rows[0])))
    columns = [(side, max(map(len, column))) for side, column in zip(sides, zip(*rows, strict=True), strict=True)]
    return ["  ".join(side(cell, n) for cell, (side, n) in zip(row, columns, strict=True)).rstrip() for row in rows]


def short(value: Any, at_most: int = LONGEST_NAME) -> str:
    """Return a value as Python writes it, its middle left out where it is too long."""
    if isinstance(value, str) and len(value) > at_most:
        value = value[:at_most] + value[-at_most:]  # repr of the whole would be cut to no more than this
    return printable(repr(value), at_most)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Make one line of whatever a library says about a file: ``'PATH': reason``."""
    try:
        yield
    except FileRefused:
        raise
    except OSError as error:
        raise FileRefused(path, (error.strerror or str(error)) + hub_hint(Path(path))) from error
    except KeyError as error:
        raise FileRefused(path, f"there is no {error}") from error
    except Exception as error:  # of safetensors, msgspec, json, gguf: each has classes of its own
        raise FileRefused(path, str(error) or type(error).__name__) from error


@contextmanager
def named(label: str) -> Iterator[None]:
    """Put the name of what is looked at before an error about it: ``adapters['q']: ...``. A file's has its own."""
    try:
        yield
    except FileRefused:
        raise
    except (TypeError, ValueError) as error:  # of what kind of them, such as a UnicodeDecodeError, its text says
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{label}: {error}") from None


def hub_hint(path: Path) -> str:
    """Return what to give in place of a hub's name of a model, where a path is one and leads nowhere; or ""."""
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    return f". If it is a model's name on a hub, download it ('hf download {name} --local-dir DIR') and give the folder"
