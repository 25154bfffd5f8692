r"""Sphinx extension that links each equation on a page to its line of code; they must agree, or the build fails.

In the code, a comment ``# eq. (5)`` or ``# eq. (act.1)`` at the end of a line numbers it. On a page, the formula has
the number, and a comment above it lists the variables that the line must mention::

    <!-- equation 5 dA dh x -->
    $$
    dA = dh^\top x \tag{5}
    $$

The build evaluates the printed formula and the line of code (`stated`). The page shows the line itself, read from the
file, and links to it on the source page that viewcode makes; the comment there links back.
If the line uses names that a reader has not met, ``:shown:`` gives a shorter version. If an equation has several lines,
the first is shown, and the others are linked. A number in the prose of any page, ``(5)`` or ``(att.4) to (att.9)``,
becomes a link to its equation; in code and in headings it stays text. The build stops if equations and lines disagree
(`stated`), or if a number in the prose refers to no equation.
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
def pages_of_equations() -> dict[str, Path]:
    """Return the page of each equation, on both sites."""
    return {stated.label: page for page in every() for stated in read_page(page.read_text(encoding="utf-8"))}


def url_to(app: Sphinx, page: str, label: str) -> str:
    """Return the relative URL from a page to an equation."""
    if label not in pages_of_equations():
        raise SphinxError(f"{page}: there is no equation ({label})")
    there = pages_of_equations()[label]
    return f"{'../' * page.count('/')}{home(app.config.site, site_of(there))}{there.stem}.html#{anchor(label)}"


def check() -> list[str]:
    """Return the disagreements between the equations of all pages and the lines of the code."""
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
"""Text inside these stays as it is: code, headings, formulas, and existing links."""


def link_references(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Turn the numbers of equations in a page's prose into links."""
    for text in [text for text in _prose(doctree) if REFERENCE.search(text)]:
        parts: list[nodes.Node] = []
        for i, part in enumerate(REFERENCE.split(text)):  # odd parts are labels
            if i % 2 == 0:
                parts += [nodes.Text(part)] * bool(part)
                continue
            uri = url_to(app, page, part)
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
            there = url_to(app, pagename, line.label)
            link = f'<a class="eq" id="{line.anchor}" href="{there}">&#35; eq. ({line.label})</a>'
            context["body"] = context["body"].replace(f"# eq. ({line.label})", link, 1)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("doctree-resolved", link_references)
    app.connect("html-page-context", link_back)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
