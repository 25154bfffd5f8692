r"""Sphinx extension: an equation on a page and its line of code point at each other and agree, or the build fails.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, the formula bears
the number, and a comment above it names the variables that it is about::

    <!-- equation 5 dA dh x -->
    $$
    dA = dh^\top x \tag{5}
    $$

The build computes the printed formula and the line (`stated`). Where the formula has words, ``:entries:`` says in
Python what they mean, and the page shows it; ``:unchecked:`` says why a value cannot be compared. The page shows the
line itself, read from the file, and links to it on the source page that viewcode makes; the comment there links back.
Where the line has what a reader has not met, ``:shown:`` says it in short. Of an equation with several lines the first
one is shown, and the others are linked. A number in the prose of any page, ``(5)`` or ``(att.4) to (att.9)``, becomes a
link to its equation; in code and in headings it stays text. The build stops where equations and lines do not fit
(`stated`), and at a number in the prose that names no equation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numbered
from docutils import nodes
from docutils.parsers.rst import directives
from markup import home, site_of
from numbered import REFERENCE, anchor
from pages import ROOT, every
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import set_source_info
from stated import Equation, problems, read_page

find_lines = cache(numbered.find_lines)  # the code stays as it is while the site is built


class DanglingEquation(SphinxError):
    """An equation and its line of code do not belong together."""

    category = "equations and code do not fit"


class equation(nodes.container):
    """An equation with its number, its formula and its lines."""


class EquationDirective(SphinxDirective):
    """``{equation} NUMBER NAME...``, with the formula in TeX below."""

    has_content = True
    required_arguments = 1
    optional_arguments = 100
    option_spec = dict.fromkeys(("entries", "shown", "unchecked"), directives.unchanged_required)

    def run(self) -> list[nodes.Node]:
        """Return the equation as a node."""
        tex = "\n".join(self.content)
        told = {name: self.options.get(name, "") for name in ("entries", "unchecked")}
        stated = Equation(self.arguments[0], self.arguments[1:], tex, **told)
        node = equation(classes=["equation"], ids=[anchor(stated.label)])
        formula = nodes.math_block(tex, tex, nowrap=True, number=None, label=None)
        set_source_info(self, formula)
        label = nodes.inline("", f"({stated.label})", classes=["number"])
        node += nodes.container("", formula, nodes.paragraph("", "", label), classes=["formula"])
        lines = [line for line in find_lines(ROOT / "minilora") if line.label == stated.label]
        lines.sort(key=lambda line: line.module.count("."))  # the core pages first
        source = home(self.config.site, "library")
        links = [
            nodes.reference("", str(line), refuri=f"{source}{line.page}.html#{line.anchor}", internal=True)
            for line in lines
        ]
        if lines:
            code = nodes.literal("", self.options.get("shown", lines[0].code), classes=["code"])
            others = [part for link in links[1:] for part in (nodes.Text(", "), link)]
            places = nodes.inline(
                "", "", nodes.Text("in short: " if "shown" in self.options else ""), links[0], *others
            )
            node += nodes.paragraph("", "", code, nodes.Text(" "), places, classes=["line"])
        if stated.entries:
            node += nodes.paragraph("", "compared as ", nodes.literal("", stated.entries), classes=["line"])
        self.env.domains.standard_domain.note_hyperlink_target(
            anchor(stated.label), self.env.docname, anchor(stated.label), f"({stated.label})"
        )
        return [node]


@cache
def stated_on() -> dict[str, Path]:
    """Return the page on which each equation stands, of both sites."""
    return {stated.label: page for page in every() for stated in read_page(page.read_text(encoding="utf-8"))}


def way(app: Sphinx, page: str, label: str) -> str:
    """Return the way from a page to an equation."""
    if label not in stated_on():
        raise DanglingEquation(f"{page}: ({label}) names no equation")
    there = stated_on()[label]
    return f"{'../' * page.count('/')}{home(app.config.site, site_of(there))}{there.stem}.html#{anchor(label)}"


def check() -> list[str]:
    """Say what does not fit between the equations of all pages and the lines of the code."""
    stated = [equation for page in every() for equation in read_page(page.read_text(encoding="utf-8"))]
    return problems(stated, find_lines(ROOT / "minilora"))


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
    """Turn the numbers of equations in a page's prose into links."""
    for text in [text for text in _prose(doctree) if REFERENCE.search(text)]:
        parts: list[nodes.Node] = []
        for i, part in enumerate(REFERENCE.split(text)):  # every second one is a label
            if i % 2 == 0:
                parts += [nodes.Text(part)] * bool(part)
                continue
            uri = way(app, page, part)
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
    for line in find_lines(ROOT / "minilora"):
        if line.page == pagename:
            there = way(app, pagename, line.label)
            link = f'<a class="eq" id="{line.anchor}" href="{there}">&#35; eq. ({line.label})</a>'
            context["body"] = context["body"].replace(f"# eq. ({line.label})", link, 1)


def check_anchors(app: Sphinx, exception: Exception | None) -> None:
    """Stop the build where a numbered line did not reach a source page: its module is missing from the API page."""
    if exception or app.builder.format != "html" or app.config.site != "library":
        return
    for line in find_lines(ROOT / "minilora"):
        path = Path(app.outdir, line.page + ".html")
        if not path.exists() or f' id="{line.anchor}" ' not in path.read_text(encoding="utf-8"):
            raise DanglingEquation(f"{line}: its link is not on the site: is {line.module} on the API page?")


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_node(equation, html=(lambda self, n: self.visit_container(n), lambda self, n: self.depart_container(n)))
    app.add_directive("equation", EquationDirective)
    app.connect("doctree-resolved", link_references)
    app.connect("html-page-context", link_back)
    app.connect("build-finished", check_anchors)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
