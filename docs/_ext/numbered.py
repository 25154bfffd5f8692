"""The lines of code that bear an equation's number: ``# eq. (5)`` or ``# eq. (act.1)`` at their end."""

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
"""A reference to an equation in prose. No value of a function, f(0) or f'(0), and no year."""
EQUATION = re.compile(
    rf"^<!-- equation (?P<label>{LABEL})(?P<names>[^\n]*?)(?P<options>\n(?::[^\n]*\n)*)? *-->\n"
    r"\$\$\n(?P<tex>.*?)\n\$\$$",
    re.S | re.M,
)
"""An equation on a page: a comment with its number, the variables that it is about and options, above its formula."""
TAG = re.compile(rf"\s*\\tag\{{({LABEL})\}}")
OPTION = re.compile(r"^:(\w+): (.*)$", re.M)
COMMENT = re.compile(rf"# eq\. \(({LABEL})\)")


@dataclass(frozen=True)
class Line:
    """A line of code that bears an equation's number."""

    module: str  # minilora.lora
    lineno: int
    label: str
    code: str  # without its comment; all of the statement, where that has several lines
    anchor: str  # on the module's source page: eq-5, and eq-5-2 where the number comes again in one file
    cls: str = ""  # of the method it stands in

    @property
    def page(self) -> str:
        """Name of the source page, without its suffix."""
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
    """Return the nodes of some kinds that a line is in, the innermost last."""
    return [n for n in nodes if isinstance(n, kinds) and n.lineno <= lineno <= n.end_lineno]


def _statement(nodes: list[Any], source: str, lineno: int) -> str:
    """Return the statement that a line is in, without comments."""
    simple = _around(nodes, lineno, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr))
    lines = source.splitlines()
    inside = lines[simple[-1].lineno - 1 : simple[-1].end_lineno] if simple else [lines[lineno - 1]]
    return " ".join(re.sub(r"\s*#.*", "", line).strip() for line in inside).replace("( ", "(").replace(" )", ")")


def _class(nodes: list[Any], lineno: int) -> str:
    inside = _around(nodes, lineno, ast.ClassDef)
    return inside[-1].name if inside else ""
