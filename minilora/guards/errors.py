"""Errors about files, and how their messages show text that came from a file.

A file's names can hold anything: control characters that steer a terminal, line breaks, two million letters.

Promise: a message is one line of printable characters, and short.
Kept by: `printable` escapes such characters and shortens long text; `FileRefused` passes its whole message through it.
Shown by: tests/guards/test_errors.py.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

LONGEST_NAME, LONGEST_MESSAGE = 200, 1200
"""Characters of one name or value, and of a whole message."""
HUB_NAME = re.compile(r"[\w-]+/[\w.-]+(?<!\.gguf)(?<!\.npz)(?<!\.json)(?<!\.safetensors)")
"""``owner/model``: how a hub names a model."""
INSTALL = {"gguf": "gguf tokenizers"}
"""What to install for a package, where that is more than the package: a .gguf file's tokenizer needs both."""


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


def short(value: Any, at_most: int = LONGEST_NAME) -> str:
    """Return a value as Python writes it, its middle left out where it is too long."""
    if isinstance(value, str) and len(value) > at_most:
        value = value[:at_most] + value[-at_most:]  # repr of the whole would be cut to no more than this
    return printable(repr(value), at_most)


def hub_hint(path: Path) -> str:
    """Return what to give in place of a hub's name of a model, where a path is one and leads nowhere; or ""."""
    name = path.as_posix()
    if not HUB_NAME.fullmatch(name) or path.parent.exists():
        return ""
    return f". If it is a model's name on a hub, download it ('hf download {name} --local-dir DIR') and give the folder"


def needed(package: str, why: str) -> Any:
    """Import a package that only some models' files need, or say how to install it."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f"{why} needs {package} ({error}): pip install {INSTALL.get(package, package)}") from error
