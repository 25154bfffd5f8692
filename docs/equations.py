"""Sphinx extension: an equation on a page and its line of code point at each other and agree, or the build fails.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, this block states
the equation, names the variables it is about, and says in entries what it computes::

    ```{equation} 5 dA dh x
    :entries: einsum("nk,ni->ki", dh, x)

    dA = dh^T x
    ```

The page then shows the line itself, read from the file, and links to it on the source page that viewcode makes; the
comment there links back. A number in the prose of any page, ``(5)`` or ``(att.4) to (att.9)``, becomes a link to its
equation; in code and in headings it stays text. The build stops on

- a number without an equation, an equation without a line, an equation stated twice;
- a number in the prose that names no equation; where it is meant to, write it as code;
- a line that does not speak of the equation's variables;
- a line that computes something else than ``entries``, on the random arrays of `samples`: a wrong sign, a lost factor.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from docutils import nodes
from docutils.parsers.rst import directives
from numbered import LABEL, REFERENCE, Line, anchor, find_lines
from samples import RANKS, samples
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import set_source_info

from minilora.layers.quantized import CodedLinear


class DanglingEquation(SphinxError):
    """An equation and its line of code do not belong together."""

    category = "equations and code do not fit"


@dataclass(frozen=True)
class Equation:
    """An equation as a page states it."""

    label: str  # "5" or "act.1"
    names: list[str]  # the variables that its lines must mention
    entries: str = ""  # what it computes, a Python expression; "" where it is not evaluated


def problems(equations: list[Equation], lines: list[Line]) -> list[str]:
    """Say what does not fit between the equations and the lines of code."""
    stated = [equation.label for equation in equations]
    found = [f"equation ({n}) is stated {stated.count(n)} times" for n in sorted(set(stated)) if stated.count(n) > 1]
    found += [f"{x}: no equation ({x.label}) for `{x.code}`" for x in lines if x.label not in stated]
    for equation in equations:
        own = [line for line in lines if line.label == equation.label]
        if not own:
            found.append(f"equation ({equation.label}) has no line of code that says # eq. ({equation.label})")
        for line in own:
            # h in one place and H in another are the same variable, of one row and of all.
            lost = [n for n in equation.names if not re.search(rf"(?<!\w){re.escape(n)}(?!\w)", line.code, re.I)]
            if lost:
                found.append(
                    f"{line}: equation ({equation.label}) speaks of {', '.join(lost)}, the line does not: `{line.code}`"
                )
            elif equation.entries and (difference := differs(equation, line)):
                found.append(f"{line}: `{line.code}` is not equation ({equation.label}): {difference}")
    return found


def differs(equation: Equation, line: Line) -> str:
    """Say how a line's value differs from the equation's, both on the same random arrays; "" where it does not."""
    for rank, biased in product(RANKS, (True, False) if "b" in equation.names else (True,)):
        stated, coded = samples(equation.label, rank), samples(equation.label, rank)
        if not biased:  # the line has another branch where there is no b
            stated["b"], coded["b"] = 0, None
        try:
            expected = eval(equation.entries, stated)
        except Exception as error:
            return f"its entries cannot be computed, {type(error).__name__}: {error}"
        try:
            found = _value(line, coded)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if isinstance(found, tuple) and not isinstance(expected, tuple):
            # Of an output and its cache, or of dx and the gradients, the one that the equation gives.
            found = next((part for part in found if isinstance(part, type(expected))), found)
        pair = _arrays(found), _arrays(expected)
        shapes = [[array.shape for array in arrays] for arrays in pair]
        if shapes[0] != shapes[1]:
            return f"it has the shape {shapes[0]}, and not {shapes[1]}"
        for one, other in zip(*pair, strict=True):
            close = np.isclose(one, other, rtol=1e-10, atol=1e-12)
            if not close.all():
                first = np.unravel_index(np.argmin(close), close.shape)
                return f"it gives {one[first]:.6g} where the equation gives {other[first]:.6g}"
    return ""


def _value(line: Line, names: dict[str, Any]) -> Any:
    """Return the value that a line computes: what it assigns, returns, or makes of the array that it updates."""
    (statement,) = ast.parse(line.code).body
    value = statement.value
    if isinstance(statement, ast.AugAssign):
        value = ast.BinOp(ast.parse(ast.unparse(statement.target), mode="eval").body, statement.op, value)
    names["self"] = names.get("layers", {}).get(line.cls)
    scope = {**vars(importlib.import_module(line.module)), **names}
    result = eval(compile(ast.fix_missing_locations(ast.Expression(value)), str(line), "eval"), scope)
    if isinstance(statement, ast.Expr):  # a call that updates its first argument
        return names[ast.unparse(value.args[0])]
    return result


def _arrays(value: Any) -> list[np.ndarray]:
    """Return what there is to compare: an array, those of a tuple or a dict, or a layer's own and its scaling.

    Of a layer that keeps codes, the weight that they stand for.
    """
    if isinstance(value, CodedLinear):
        value = value.weight
    if hasattr(value, "trainable"):
        value = (*value.trainable().values(), *([value.scaling] if hasattr(value, "scaling") else []))
    if isinstance(value, dict):
        value = tuple(value.values())
    return [np.asarray(part) for part in (value if isinstance(value, tuple) else (value,))]


HEAD = re.compile(rf"^```\{{equation\}} (?P<label>{LABEL})(?P<names>.*)\n(?::entries: (?P<entries>.*)\n)?", re.M)


def read_page(text: str) -> list[Equation]:
    """Return the equations that a page states, from its text."""
    text = re.sub(r"^````.*?^````", "", text, flags=re.S | re.M)  # which only show what a directive looks like
    return [Equation(m["label"], m["names"].split(), m["entries"] or "") for m in HEAD.finditer(text)]


class equation(nodes.container):
    """An equation with its number, its formula and its lines."""


class EquationDirective(SphinxDirective):
    """``{equation} NUMBER NAME...``, with the formula in TeX below."""

    has_content = True
    required_arguments = 1
    optional_arguments = 100
    option_spec = {"entries": directives.unchanged_required}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        """Return the equation as a node."""
        stated = Equation(self.arguments[0], self.arguments[1:], self.options.get("entries", ""))
        node = equation(classes=["equation"], ids=[anchor(stated.label)], stated=stated)
        tex = "\n".join(self.content)
        formula = nodes.math_block(tex, tex, nowrap=True, number=None, label=None)
        set_source_info(self, formula)
        label = nodes.inline("", f"({stated.label})", classes=["number"])
        node += nodes.container("", formula, nodes.paragraph("", "", label), classes=["formula"])
        for path in self.config.equations_package.glob("**/*.py"):
            self.env.note_dependency(str(path))
        lines = find_lines(self.config.equations_package)
        for line in sorted(lines, key=lambda line: line.module.count(".")):  # the core pages first
            if line.label == stated.label:
                link = nodes.reference("", str(line), refuri=f"{line.page}.html#{line.anchor}", internal=True)
                code = nodes.literal("", line.code, classes=["code"])
                node += nodes.paragraph("", "", code, nodes.Text(" "), link, classes=["line"])
        self.env.domains.standard_domain.note_hyperlink_target(
            anchor(stated.label), self.env.docname, anchor(stated.label), f"({stated.label})"
        )
        return [node]


def check_consistency(app: Sphinx, env) -> None:
    """Stop the build where the pages and the code do not fit; remember on which page an equation stands."""
    found = [(n["stated"], page) for page in sorted(env.found_docs) for n in env.get_doctree(page).findall(equation)]
    if wrong := problems([stated for stated, _ in found], find_lines(app.config.equations_package)):
        raise DanglingEquation("".join("\n  " + problem for problem in wrong))
    env.equation_pages = {stated.label: page for stated, page in found}


PLAIN = (
    equation,
    nodes.literal,
    nodes.literal_block,
    nodes.raw,
    nodes.reference,
    nodes.title,
    nodes.math,
    nodes.math_block,
)
"""Text inside these stays as it is: code, headings, formulas, and what is a link already."""


def link_references(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Turn the numbers of equations in a page's prose into links; stop the build at one that names no equation."""
    for text in [text for text in _prose(doctree) if REFERENCE.search(text)]:
        parts: list[nodes.Node] = []
        for i, part in enumerate(REFERENCE.split(text)):  # every second one is a label
            if i % 2 == 0:
                parts += [nodes.Text(part)] * bool(part)
                continue
            if part not in app.env.equation_pages:
                raise DanglingEquation(f"{page}: ({part}) in `{text.strip()}` names no equation")
            there = app.builder.get_relative_uri(page, app.env.equation_pages[part])
            uri = f"{there}#{anchor(part)}"
            parts.append(nodes.reference("", f"({part})", refuri=uri, internal=True, classes=["eqref"]))
        text.parent.replace(text, parts)


def _prose(node: nodes.Node) -> Iterator[nodes.Text]:
    for child in node.children:
        if isinstance(child, nodes.Text):
            yield child
        elif not isinstance(child, PLAIN):
            yield from _prose(child)


def link_back(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Turn the comments of a source page into links to the equations."""
    for line in find_lines(app.config.equations_package):
        if line.page == pagename:
            home = context["pathto"](app.env.equation_pages[line.label])
            link = f'<a class="eq" id="{line.anchor}" href="{home}#{anchor(line.label)}">&#35; eq. ({line.label})</a>'
            context["body"] = context["body"].replace(f"# eq. ({line.label})", link, 1)


def check_anchors(app: Sphinx, exception: Exception | None) -> None:
    """Stop the build where a numbered line did not reach a source page: its module is missing from the API page."""
    if exception or app.builder.format != "html":
        return
    for line in find_lines(app.config.equations_package):
        path = Path(app.outdir, line.page + ".html")
        if not path.exists() or f' id="{line.anchor}" ' not in path.read_text(encoding="utf-8"):
            raise DanglingEquation(f"{line}: its link is not on the site: is {line.module} on the API page?")


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("equations_package", None, "env")
    app.add_node(equation, html=(lambda self, n: self.visit_container(n), lambda self, n: self.depart_container(n)))
    app.add_directive("equation", EquationDirective)
    app.connect("env-check-consistency", check_consistency)
    app.connect("doctree-resolved", link_references)
    app.connect("html-page-context", link_back)
    app.connect("build-finished", check_anchors)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
