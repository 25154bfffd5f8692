"""Sphinx extension: an equation of the derivation and its line of code point at each other, or the build fails.

In the code, a comment ``# eq. (5)`` at the end of a line numbers it. On the page, this block states the equation and
names the variables it is about::

    ```{equation} 5 dA dh x
    dA = dh^T x
    ```

The page then shows the line itself, read from the file, and links to it on the source page that viewcode makes; the
comment there links back. The build stops on a number without an equation, an equation without a line, an equation
stated twice, and a line that does not speak of the equation's variables.
"""

from __future__ import annotations

import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import set_source_info

COMMENT = re.compile(r"# eq\. \((\d+)\)")


class DanglingEquation(SphinxError):
    """An end that holds on to nothing."""

    category = "equations and code do not fit"


@dataclass(frozen=True)
class Line:
    """A line of code that bears an equation's number."""

    module: str  # minilora.lora
    lineno: int
    number: int
    code: str  # without its comment
    anchor: str  # on the module's source page: eq-5, and eq-5-2 where the number comes again in one file

    @property
    def page(self) -> str:
        """Name of the source page, without its suffix."""
        return "_modules/" + self.module.replace(".", "/")

    def __str__(self) -> str:
        return f"{self.module.replace('.', '/')}.py:{self.lineno}"


def find_lines(package: Path) -> list[Line]:
    """Return every numbered line of a package's files."""
    found = []
    for path in sorted(package.glob("**/*.py")):
        source = path.read_text(encoding="utf-8")
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        seen: dict[int, int] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (match := COMMENT.match(token.string)):
                number = int(match[1])
                seen[number] = seen.get(number, 0) + 1
                anchor = f"eq-{number}" + (f"-{seen[number]}" if seen[number] > 1 else "")
                found.append(Line(module, token.start[0], number, token.line[: token.start[1]].strip(), anchor))
    return found


def problems(equations: list[tuple[int, list[str]]], lines: list[Line]) -> list[str]:
    """Say what does not fit between the equations, each a number and its variables, and the lines of code."""
    stated = [number for number, _ in equations]
    found = [f"equation ({n}) is stated {stated.count(n)} times" for n in sorted(set(stated)) if stated.count(n) > 1]
    found += [f"{x}: no equation ({x.number}) for `{x.code}`" for x in lines if x.number not in stated]
    for number, names in equations:
        own = [line for line in lines if line.number == number]
        if not own:
            found.append(f"equation ({number}) has no line of code that says # eq. ({number})")
        for line in own:
            # h in one place and H in another are the same variable, of one row and of all.
            lost = [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", line.code, re.I)]
            if lost:
                found.append(
                    f"{line}: equation ({number}) speaks of {', '.join(lost)}, the line does not: `{line.code}`"
                )
    return found


class equation(nodes.container):
    """An equation with its number, its formula and its lines."""


class EquationDirective(SphinxDirective):
    """``{equation} NUMBER NAME...``, with the formula in TeX below."""

    has_content = True
    required_arguments = 1
    optional_arguments = 100

    def run(self) -> list[nodes.Node]:
        """Return the equation as a node."""
        number, names = int(self.arguments[0]), self.arguments[1:]
        node = equation(classes=["equation"], ids=[f"eq-{number}"], number=number, variables=names)
        tex = "\n".join(self.content)
        formula = nodes.math_block(tex, tex, nowrap=True, number=None, label=None)
        set_source_info(self, formula)
        label = nodes.inline("", f"({number})", classes=["number"])
        node += nodes.container("", formula, nodes.paragraph("", "", label), classes=["formula"])
        for path in self.config.equations_package.glob("**/*.py"):
            self.env.note_dependency(str(path))
        for line in find_lines(self.config.equations_package):
            if line.number == number:
                link = nodes.reference("", str(line), refuri=f"{line.page}.html#{line.anchor}", internal=True)
                code = nodes.literal("", line.code, classes=["code"])
                node += nodes.paragraph("", "", code, nodes.Text(" "), link, classes=["line"])
        self.env.domains.standard_domain.note_hyperlink_target(
            f"eq-{number}", self.env.docname, f"eq-{number}", f"({number})"
        )
        return [node]


def check_consistency(app: Sphinx, env) -> None:
    """Stop the build where the page and the code do not fit."""
    page = env.get_doctree(app.config.equations_page)
    equations = [(node["number"], node["variables"]) for node in page.findall(equation)]
    if found := problems(equations, find_lines(app.config.equations_package)):
        raise DanglingEquation("".join("\n  " + problem for problem in found))


def link_back(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Turn the comments of a source page into links to the equations."""
    anchors = [(x.number, x.anchor) for x in find_lines(app.config.equations_package) if x.page == pagename]
    for number, anchor in anchors:
        home = context["pathto"](app.config.equations_page)
        link = f'<a class="eq" id="{anchor}" href="{home}#eq-{number}">&#35; eq. ({number})</a>'
        context["body"] = context["body"].replace(f"# eq. ({number})", link, 1)


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
    app.add_config_value("equations_page", "derivation", "env")
    app.add_config_value("equations_package", None, "env")
    app.add_node(equation, html=(lambda self, n: self.visit_container(n), lambda self, n: self.depart_container(n)))
    app.add_directive("equation", EquationDirective)
    app.connect("env-check-consistency", check_consistency)
    app.connect("html-page-context", link_back)
    app.connect("build-finished", check_anchors)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
