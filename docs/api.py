"""Sphinx extension: the page about the API, from the package's own files and docstrings.

A package's docstring names what the package has, and in which order to read it. The page shows the modules in that
order, so a new module takes one word in its package's docstring. `tests/site/test_docs.py` fails where that is missing.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests read this file where Sphinx is not installed
    from sphinx.application import Sphinx

PACKAGE = Path(__file__).parents[1] / "minilora"
HERE = "(the modules)"
"""What stands on the page in their place."""
NOT_SHOWN = {"__main__", "cli", "commands"}
"""The command line, whose pages are ``minilora --help``."""
DOOR = '"""A door'
"""How a module begins that only leads to another one: the page shows that one alone."""


def named(package: Path) -> list[str]:
    """Return the modules and packages in a package that its docstring names, in the order in which it does."""
    docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    words = re.findall(r"`(?:minilora\.)?(\w+)[\w.]*`", docstring)
    return [name for name in dict.fromkeys(words) if name in inside(package)]


def inside(package: Path) -> list[str]:
    """Return the modules and packages in a package, from A to Z."""
    files = {path.stem: path for path in package.glob("*.py")} | {
        p.parent.name: p for p in package.glob("*/__init__.py")
    }
    doors = {name for name, path in files.items() if path.read_text(encoding="utf-8").startswith(DOOR)}
    return sorted(set(files) - doors - {"__init__"} - NOT_SHOWN)


def stanzas(package: Path, name: str = "minilora", level: int = 1) -> list[str]:
    """Return a package's part of the page: itself, then all that is in it."""
    parts = [stanza(name, level, members=False)] if level > 1 else []
    for child in dict.fromkeys([*named(package), *inside(package)]):
        if (package / child).is_dir():
            parts += stanzas(package / child, f"{name}.{child}", level + 1)
        else:
            parts.append(stanza(f"{name}.{child}", level + 1, members=True))
    return parts


def stanza(name: str, level: int, *, members: bool) -> str:
    """Return what shows one module."""
    option = ":members:" if members else ":no-members:"
    return f"{'#' * level} `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n   {option}\n```\n"


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the modules where the page says so."""
    if docname == "api":
        source[0] = source[0].replace(HERE, "\n".join(stanzas(PACKAGE)))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
