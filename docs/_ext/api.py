"""Sphinx extension for the API page, which lists public names and modules; Sphinx's apidoc writes each module's page.

After changing a public name or adding a module, run ``pages.py --write docs/library/api.md``.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minilora

if TYPE_CHECKING:  # the tests import this file without Sphinx
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """Return all modules and packages by name, top-level ones first.

    The command line is omitted: ``minilora --help`` documents it.
    """
    files = (path.relative_to(ROOT) for path in (ROOT / "minilora").rglob("*.py"))
    found = {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    shown = [name for name in found if not re.search(r"^minilora$|\.cli\b|\.__main__$", name)]
    return {name: found[name] for name in sorted(shown, key=lambda name: (len(found[name].parts) > 2, name))}


def table() -> str:
    """Return the modules as a table: the name, and the first paragraph of its docstring."""
    rows = ["| | |", "|---|---|"]
    for name, file in modules().items():
        text = ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""
        summary = text.partition("\n\n")[0].replace("\n", " ").replace("``", "`").replace("|", "\\|")
        rows.append(f"| [`{name}`](../../{file.as_posix()}) | {summary} |")
    return "\n".join(rows)


def names() -> str:
    """Return the public names of `minilora` as a table: the call without types, and what it does."""
    rows = ["| | |", "|---|---|"]
    for name in minilora.__all__:
        value = getattr(minilora, name)
        if not callable(value):
            continue
        summary = (inspect.getdoc(value) or "").partition("\n\n")[0].replace("\n", " ").replace("``", "`")
        file = Path(inspect.getsourcefile(value) or "").relative_to(ROOT).as_posix()
        rows.append(f"| [`{name}{call_of(value)}`](../../{file}) | {summary} |")
    return "\n".join(rows)


def call_of(value: Any) -> str:
    """Return the parameters of a function or class; a default that is a function by its name, an object as "..."."""
    if isinstance(value, type) and issubclass(value, BaseException):
        return ""
    given = []
    for parameter in inspect.signature(value).parameters.values():
        default = parameter.default
        if default is not parameter.empty and (callable(default) or not isinstance(default, (str, float, int, tuple))):
            default = None if default is None else Named(getattr(default, "__name__", "..."))
        given.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(given))


class Named(str):
    """A text that is its own repr."""

    __repr__ = str.__str__


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the modules' pages below the API page, titled with their names; of a package, show only the docstring."""
    if docname == "api":
        source[0] += "\n```{toctree}\n:hidden:\n:titlesonly:\n\nreference/minilora\n```\n"
    elif docname.startswith("reference/"):
        text = re.sub(r"\A(.*) module\n", r"\1\n", source[0])
        source[0] = re.sub(r"\A(.*) package\n([^:]*automodule:: .*\n)(?:   :.*\n)*", r"\1\n\2", text)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
