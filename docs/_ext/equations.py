r"""Sphinx extension: an equation on a page and its line of code point at each other and agree, or the build fails.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, the formula bears
the number, and a comment above it names the variables that it is about::

    <!-- equation 5 dA dh x -->
    $$
    dA = dh^\top x \tag{5}
    $$

The build computes the printed formula and the line (`stated`). The page shows the line itself, read from the file, and
links to it on the source page that viewcode makes; the comment there links back.
Where the line has what a reader has not met, ``:shown:`` says it in short. Of an equation with several lines the first
one is shown, and the others are linked. A number in the prose of any page, ``(5)`` or ``(att.4) to (att.9)``, becomes a
link to its equation; in code and in headings it stays text. The build stops where equations and lines do not fit
(`stated`), and at a number in the prose that names no equation.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

from docutils import nodes
from markup import home, numbered_lines, site_of
from numbered import REFERENCE, anchor
from pages import every
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from stated import problems, read_page


@cache
def stated_on() -> dict[str, Path]:
    """Return the page on which each equation stands, of both sites."""
    return {stated.label: page for page in every() for stated in read_page(page.read_text(encoding="utf-8"))}


def way(app: Sphinx, page: str, label: str) -> str:
    """Return the way from a page to an equation."""
    if label not in stated_on():
        raise SphinxError(f"{page}: ({label}) names no equation")
    there = stated_on()[label]
    return f"{'../' * page.count('/')}{home(app.config.site, site_of(there))}{there.stem}.html#{anchor(label)}"


def check() -> list[str]:
    """Say what does not fit between the equations of all pages and the lines of the code."""
    stated = [equation for page in every() for equation in read_page(page.read_text(encoding="utf-8"))]
    return problems(stated, numbered_lines())


PLAIN = (
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
    for line in numbered_lines():
        if line.page == pagename:
            there = way(app, pagename, line.label)
            link = f'<a class="eq" id="{line.anchor}" href="{there}">&#35; eq. ({line.label})</a>'
            context["body"] = context["body"].replace(f"# eq. ({line.label})", link, 1)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-resolved", link_references)
    app.connect("html-page-context", link_back)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
