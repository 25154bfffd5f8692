"""The lines of code that have an equation number: ``# eq. (5)`` or ``# eq. (act.1)`` at the end."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABEL = r"(?:[a-z]+\.)?\d+"
REFERENCE = re.compile(r"(?<![\w'\u2019])\(((?:[a-z]+\.)?\d{1,3})\)")
"""A reference to an equation in prose; values of functions, f(0) or f'(0), and years do not match."""
EQUATION = re.compile(
    rf"^<!-- equation (?P<label>{LABEL})(?P<names>[^\n]*?)(?P<options>\n(?::[^\n]*\n)*)? *-->\n"
    r"\$\$\n(?P<tex>.*?)\n\$\$$",
    re.S | re.M,
)
"""An equation on a page: above its formula, a comment with its number, its variables and its options."""
TAG = re.compile(rf"\s*\\tag\{{({LABEL})\}}")
OPTION = re.compile(r"^:(\w+): (.*)$", re.M)
COMMENT = re.compile(rf"# eq\. \(({LABEL})\)")


@dataclass(frozen=True)
class Line:
    """A line of code with an equation number."""

    module: str  # for example minilora.lora
    lineno: int
    label: str
    code: str  # without comments; if the statement spans several lines, all of it
    anchor: str  # on the module's source page: eq-5; for the same number a second time, eq-5-2
    cls: str = ""  # the class of the method that contains the line

    @property
    def page(self) -> str:
        """The name of the source page, without its suffix."""
        return "_modules/" + self.module.replace(".", "/")

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.lineno}"


def anchor(label: str) -> str:
    """Return the id of an equation on its page."""
    return "eq-" + label.replace(".", "-")


def find_lines(package: Path) -> list[Line]:
    """Return every numbered line of a package's files."""
    found = []
    for path in sorted(package.glob("**/*.py")):
        source = path.read_text(encoding="utf-8")
        if not COMMENT.search(source):
            continue
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        nodes, seen = list(ast.walk(ast.parse(source))), dict[str, int]()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (match := COMMENT.match(token.string)):
                label, lineno = match[1], token.start[0]
                seen[label] = seen.get(label, 0) + 1
                where = anchor(label) + (f"-{seen[label]}" if seen[label] > 1 else "")
                code, cls = _statement(nodes, source, lineno), _class(nodes, lineno)
                found.append(Line(module, lineno, label, code, where, cls))
    return found


def _around(nodes: list[Any], lineno: int, kinds: type | tuple) -> list[Any]:
    """Return the nodes of the given kinds that contain a line, the innermost last."""
    return [n for n in nodes if isinstance(n, kinds) and n.lineno <= lineno <= n.end_lineno]


def _statement(nodes: list[Any], source: str, lineno: int) -> str:
    """Return the statement that contains a line, without comments."""
    simple = _around(nodes, lineno, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr))
    lines = source.splitlines()
    inside = lines[simple[-1].lineno - 1 : simple[-1].end_lineno] if simple else [lines[lineno - 1]]
    return " ".join(re.sub(r"\s*#.*", "", line).strip() for line in inside).replace("( ", "(").replace(" )", ")")


def _class(nodes: list[Any], lineno: int) -> str:
    inside = _around(nodes, lineno, ast.ClassDef)
    return inside[-1].name if inside else ""
