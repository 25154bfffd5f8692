"""Every page as a Jupyter notebook that runs alone: ``python docs/notebooks.py FOLDER``.

A page is Markdown with directives, which the site's build reads. A notebook has cells, and Markdown that Jupyter reads:

    {code-cell}      a cell of the same code, its source folded where the page does not show it
    {equation}       $$ ... $$ with its number, and the line of code that computes it
    {note}           a quotation
    {peer}           code that unfolds
    {literalinclude} the lines themselves
    automodule       the module's docstring
    {toctree}        links

Before the cells stands what the page needs: packages, and the files that it shares with other pages, each in a cell
that writes it. As a Sphinx extension, this file puts the notebooks into the site and a link on each page.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import api
import cards
from numbered import REFERENCE, anchor, find_lines

if TYPE_CHECKING:
    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
MACROS = {r"\of": r"\underset{\smash{(#2)}\vphantom{)}}{#1}"}  # \of{dA}{r,in}: a symbol, its shape below
"""Of the pages' formulas; Jupyter knows none of them."""
FOLDED = {"remove-cell", "remove-input", "hide-input", "hide-cell"}
"""Tags of cells whose source the site does not show at once."""
COMMANDS_NEED = {
    page: ["models"]
    for page in (
        "decoder",
        "experts",
        "finetune",
        "golden-adapters",
        "is-my-adapter-applied",
        "language-model",
        "low-rank",
    )
}
"""Extras of a page whose commands, or calls, import what its own code does not."""
HOME = "minilora-pages"
"""The folder, beside the notebooks, of the files that pages share. They lie in it as in a checkout."""

FENCE = re.compile(
    r"^(?P<fence>`{3,})(?:\{(?P<kind>[\w-]+)\} ?)?(?P<argument>[^\n`]*)\n(?P<body>.*?)^(?P=fence)$", re.S | re.M
)


class BadPage(ValueError):
    """A page has something that no notebook can show."""


# --- the pages --------------------------------------------------------------------------------------------------------


@cache
def pages() -> dict[str, str]:
    """Return the text of each page by its name, without its front matter, with the list of modules in the API's."""
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    found["api"] = found["api"].replace(api.HERE, api.table(links=False))
    found["index"] = cards.filled(found["index"])
    return {name: re.sub(r"\A---\n.*?^---\n", "", text, flags=re.S | re.M).lstrip("\n") for name, text in found.items()}


def title(text: str) -> str:
    """Return a page's title."""
    return re.search(r"^# (.*)$", text, re.M)[1]


def order() -> list[str]:
    """Return the pages in the order of *Next*."""
    index = pages()["index"]
    rows = [row for fence in FENCE.finditer(index) if fence["kind"] == "toctree" for row in fence["body"].split("\n")]
    return ["index", *(row for row in rows if row and not row.startswith(":"))]


@cache
def anchors() -> dict[str, dict[str, str]]:
    """Return for each page what a link to it may name, and the id that Jupyter gives it."""
    found = {}
    for name, text in pages().items():
        plain = FENCE.sub("", text)
        headings = [re.sub(r"[`*]", "", heading) for heading in re.findall(r"^#+ (.*)$", plain, re.M)]
        # As MyST makes an id of a heading, and as Jupyter does.
        ids = {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): quote(heading.replace(" ", "-"))
            for heading in headings
        }
        ids |= {label: label for label in re.findall(r"^\(([\w-]+)\)=$", plain, re.M)}
        found[name] = ids | {
            anchor(fence["argument"].split()[0]): anchor(fence["argument"].split()[0])
            for fence in FENCE.finditer(text)
            if fence["kind"] == "equation"
        }
    return found


def link(match: re.Match[str], name: str) -> str:
    """Return a link within the site as one between notebooks."""
    page, _, place = match[1].partition("#")
    page = page.removesuffix(".md") or name
    if page == name and place and place not in anchors()[name]:  # an equation of another page
        page = next((other for other, ids in anchors().items() if place in ids), page)
    if page not in anchors() or (place and place not in anchors()[page]):
        raise BadPage(f"{name}.md: there is nothing at {match[1]}")
    file = "" if page == name and place else f"{page}.ipynb"
    return f"]({file}{'#' + anchors()[page][place] if place else ''})"


# --- what Jupyter reads -----------------------------------------------------------------------------------------------


def tex(formula: str) -> str:
    """Return a formula of a page for MathJax: macros written out, several lines aligned."""
    for name, meaning in MACROS.items():
        while name + "{" in formula:
            start = formula.index(name + "{")
            first, end = braced(formula, start + len(name))
            second, end = braced(formula, end)
            formula = formula[:start] + meaning.replace("#1", first).replace("#2", second) + formula[end:]
    formula = formula.strip()
    if r"\\" in formula and r"\begin" not in formula:
        formula = rf"\begin{{aligned}}{formula}\end{{aligned}}"
    return formula


LINKED = re.compile(rf"(^#[^\n]*$|`[^`]+`|\$\$.+?\$\$|\$[^$]+\$|\[[^\]]*\]\([^)]*\))|{REFERENCE.pattern}", re.S | re.M)
"""A number of an equation, or before it what is passed over: headings, code, formulas, links."""


def linked(text: str) -> str:
    """Return text in which the numbers of equations are links, as on the site."""
    return LINKED.sub(lambda m: m[1] or f"[({m[2]})](#{anchor(m[2])})", text)


def braced(text: str, start: int) -> tuple[str, int]:
    """Return what stands in the braces that open at `start`, and the place behind them."""
    depth, end = 0, start
    while depth or end == start:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return text[start + 1 : end - 1], end


def prose(text: str, name: str) -> str:
    """Return text between fences as Jupyter's Markdown: no comments, targets, roles and definition lists."""
    text = re.sub(r"^(%|:{3,}).*\n", "", text, flags=re.M)
    text = re.sub(r"^\(([\w-]+)\)=$", r'<a id="\1"></a>\n', text, flags=re.M)
    text = re.sub(r"\{py:\w+\}`([^`<]+) <[\w.]+>`", r"`\1`", text)  # a link to the API by another name
    text = re.sub(r"\{download\}`([^`<]+) <[^>]+>`", r"`\1`", text)  # the checkout has the file
    text = re.sub(r"\{py:obj\}`~?([\w.]+)`", lambda m: f"`{m[1].rpartition('.')[2] if '~' in m[0] else m[1]}`", text)
    text = re.sub(r"^(?![-#|>\s])(.+)\n: (.*(?:\n  .*)*)", r"- **\1.** \2", text, flags=re.M)
    text = re.sub(r"\$\$(.+?)\$\$", lambda m: f"$$\n{tex(m[1])}\n$$", text, flags=re.S)
    return re.sub(r"\]\(((?:[\w-]+\.md)?(?:#[\w-]+)?)\)", lambda m: link(m, name), linked(text))


def fenced(code: str, language: str) -> str:
    """Return code as a block."""
    fence = "````" if "```" in code else "```"
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def equation(argument: str, body: str) -> str:
    """Return an equation, with its number and the lines that compute it."""
    label = argument.split()[0]
    own = [line for line in numbered_lines() if line.label == label]
    own.sort(key=lambda line: line.module.count("."))  # the core pages first
    lines = "".join(f"\n\n`{line.code}` (*{str(line).replace(':', ', line ')}*)" for line in own)
    return f'<a id="{anchor(label)}"></a>\n\n$$\n{tex(body)} \\tag{{{label}}}\n$$' + lines


@cache
def numbered_lines() -> list[Any]:
    """Return the lines of the package that bear an equation's number."""
    return find_lines(ROOT / "minilora")


def included(argument: str, options: dict[str, str]) -> str:
    """Return what `literalinclude` shows of a file."""
    text = (DOCS / argument).read_text(encoding="utf-8")
    if "pyobject" in options:
        inside: Any = ast.parse(text)
        for part in options["pyobject"].split("."):
            inside = next(node for node in inside.body if getattr(node, "name", None) == part)
        text = "\n".join(text.splitlines()[inside.lineno - 1 : inside.end_lineno]) + "\n"
    if "start-at" in options:
        lines, start = text.splitlines(), options["start-at"].strip('"')
        first = next(i for i, line in enumerate(lines) if start in line)
        last = len(lines)  # to the end of the file, where no line ends it
        if "end-before" in options:
            end = options["end-before"].strip('"')
            last = next(i for i, line in enumerate(lines) if i > first and end in line)
        text = "\n".join(lines[first:last]) + "\n"
    if "lines" in options:
        parts = [[int(number) for number in part.split("-")] for part in options["lines"].split(",")]
        text = "\n".join(line for part in parts for line in text.splitlines()[part[0] - 1 : part[-1]])
    return fenced(textwrap.dedent(text), options.get("language", ""))


def docstrings(body: str) -> str:
    """Return the docstring of each module that a block of `automodule` shows."""
    found = []
    for module in re.findall(r"^\.\. automodule:: (.*)$", body, re.M):
        path = ROOT.joinpath(*module.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        found.append(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    return "\n\n".join(found)


def contents(body: str, options: dict[str, str]) -> str:
    """Return the pages of a `toctree` as a list of links."""
    rows = [f"- [{title(pages()[row])}]({row}.ipynb)" for row in body.split()]
    return "\n".join([f"**{options['caption']}**\n", *rows])


def peer(argument: str, body: str) -> str:
    """Return the same step in another library, folded."""
    summary = f"<summary>The same in {argument}</summary>"
    return f"<details>{summary}\n\n{fenced(body, 'python')}\n\nIt prints the same digits.\n\n</details>"


def admonition(kind: str, argument: str, body: str) -> str:
    """Return a note or the like as a quotation, under its own title or its kind's."""
    return textwrap.indent(f"**{argument or kind.capitalize()}.** {body.strip()}", "> ", lambda line: True)


LIVE = "*On the site, this place trains in the page, by JavaScript.*\n"
"""What stands for HTML: a notebook runs Python alone."""
SHOWN: dict[str | None, Callable[[str, str, dict[str, str]], str]] = {
    None: lambda argument, body, options: fenced(body, argument),
    "equation": lambda argument, body, options: equation(argument, body),
    "eval-rst": lambda argument, body, options: docstrings(body),
    "literalinclude": lambda argument, body, options: included(argument, options),
    "math": lambda argument, body, options: f"$$\n{tex(body)}\n$$",
    "peer": lambda argument, body, options: peer(argument, body),
    "raw": lambda argument, body, options: LIVE,
    "toctree": lambda argument, body, options: contents(body, options),
    **{
        kind: lambda argument, body, options, kind=kind: admonition(kind, argument, body)
        for kind in ("admonition", "important", "note", "tip", "warning")
    },
}
"""What becomes of a fence that is no cell, by its directive; of one without a directive, nothing."""


# --- the cells --------------------------------------------------------------------------------------------------------


@dataclass
class Cell:
    """A cell before it is JSON."""

    kind: str  # "markdown" or "code"
    source: str
    tags: list[str] = field(default_factory=list)
    folded: bool = False

    def as_json(self, number: int) -> dict[str, Any]:
        """Return the cell as nbformat 4.5 has it."""
        metadata: dict[str, Any] = {"tags": self.tags} if self.tags else {}
        if self.folded:
            metadata["jupyter"] = {"source_hidden": True}
        found = {"cell_type": self.kind, "id": f"cell-{number}", "metadata": metadata, "source": self.source}
        return found | ({"execution_count": None, "outputs": []} if self.kind == "code" else {})


def options_of(body: str) -> tuple[dict[str, str], str]:
    """Split a directive's options, ``:name: value`` or between two lines ``---``, from its content."""
    block = re.match(r"---\n(.*?)^---\n|((?::[\w-]+:[^\n]*\n)*)", body, re.S | re.M)
    found = re.findall(r"^[: ]*([\w-]+): ?(.*)$", block[1] or block[2] or "", re.M)
    return {name: value.strip() for name, value in found}, body[block.end() :]


def cells(name: str) -> Iterator[Cell]:
    """Yield a page's cells: one for each code cell, and Markdown between them, a cell for each heading."""
    text, markdown, place = pages()[name], "", 0
    for match in FENCE.finditer(text):
        markdown += prose(text[place : match.start()], name)
        place = match.end()
        kind = match["kind"]
        options, body = options_of(match["body"]) if kind else ({}, match["body"])
        if kind == "code-cell":
            yield from sections(markdown)
            markdown, tags = "", re.findall(r"[\w-]+", options.get("tags", ""))
            if "code_prompt_show" in options:
                yield Cell("markdown", f"*{options['code_prompt_show']}, folded:*")
            yield Cell("code", body.strip("\n"), tags, folded=bool(FOLDED & set(tags)))
        elif kind in SHOWN:
            markdown += SHOWN[kind](match["argument"].strip(), body, options)
        else:
            raise BadPage(f"{name}.md: no notebook can show {{{kind}}}")
    yield from sections(markdown + prose(text[place:], name))


def sections(markdown: str) -> Iterator[Cell]:
    """Yield Markdown as cells, each of which begins at a heading."""
    inside = False  # a line of code may begin with # as well
    part: list[str] = []
    for line in [*markdown.splitlines(), "# "]:
        inside ^= line.startswith("```")
        if re.match("#+ ", line) and not inside:
            if text := re.sub(r"\n{3,}", "\n\n", "\n".join(part)).strip():
                yield Cell("markdown", text)
            part = []
        part.append(line)


# --- what a page needs ------------------------------------------------------------------------------------------------


def shared(code: str) -> list[Path]:
    """Return the files of the checkout that code imports or names, and those that these import in turn."""
    found: list[Path] = []
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.Import):
            names = [DOCS.joinpath(*alias.name.split(".")) for alias in node.names]
            names += [ROOT / "examples" / alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [folder.joinpath(*node.module.split(".")) for folder in (DOCS, ROOT)]
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"[\w./-]+\.\w+", node.value)
        ):
            names = [DOCS / node.value]
        for path in names:
            for file in (path, path.with_name(path.name + ".py")):
                if file.is_file() and not file.is_relative_to(ROOT / "minilora") and file.resolve() not in found:
                    found.append(file.resolve())
                    if file.suffix == ".py":
                        found += [other for other in shared(file.read_text(encoding="utf-8")) if other not in found]
    return found


def inputs(text: str) -> str:
    """Return a digest of all that a page's cells can read: themselves, shared files, the package, versions."""
    code = "\n".join(
        re.sub(r"\A(---\n.*?^---\n|(:[^\n]*\n)+)", "", fence["body"], flags=re.S | re.M)
        for fence in FENCE.finditer(text)
        if fence["kind"] == "code-cell"
    )
    digest = hashlib.sha256(code.encode() + surroundings())
    for path in shared(code):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@cache
def surroundings() -> bytes:
    """Return a digest of what all pages can read: the package, and the versions of what is installed."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "minilora").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.read_bytes())
    versions = sorted(f"{found.name} {found.version}" for found in importlib.metadata.distributions())
    digest.update("\n".join([sys.version, *versions]).encode())
    return digest.digest()


def extras(code: str) -> list[str]:
    """Return the extras of minilora that code needs, by the packages that it imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.M))
    found = []
    for extra in ("plot", "models", "dask"):
        packages = {re.split(r"[\[<>=]", package)[0] for package in project["optional-dependencies"][extra]}
        if packages & imported:
            found.append(extra)
    return found


def preface(name: str, code: str) -> Iterator[Cell]:
    """Yield the cells that come after a page's title: what it needs, and the files that it shares with others."""
    files = shared(code)
    sources = [code, *(path.read_text(encoding="utf-8") for path in files if path.suffix == ".py")]
    wanted = ",".join(extras("\n".join(sources)) + COMMANDS_NEED.get(name, []))
    install = f'".[{wanted}]"' if wanted else "."
    needs = f"*This page as a notebook. It needs minilora: in a checkout `python -m pip install -e {install}`"
    needs += f", or its wheel with `[{wanted}]` behind the file's name" if wanted else ", or its wheel"
    needs += ". `python docs/notebooks.py FOLDER` writes all pages."
    if files:
        needs += f" The folded cells below write what pages share into the folder `{HOME}`."
    yield Cell("markdown", needs + "*")
    if not files:
        return
    paths = [path.relative_to(ROOT).as_posix() for path in files]
    yield Cell("code", PLACE.format(HOME, sorted({path.rpartition("/")[0] for path in paths} | {"docs"})), folded=True)
    for path, file in zip(paths, files, strict=True):
        where = path.removeprefix("docs/") if path.startswith("docs/") else f"../{path}"
        yield Cell("code", f"%%writefile {where}\n{file.read_text(encoding='utf-8').rstrip()}", folded=True)
    if DOCS / "hands.py" in files:
        yield Cell("code", f"%%html\n{sliders()}", folded=True)


PLACE = """\
import os
import sys
from pathlib import Path

if Path.cwd().parent.name != "{0}":
    for folder in {1}:
        Path("{0}", folder).mkdir(parents=True, exist_ok=True)
    os.chdir(Path("{0}", "docs"))
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd().parent)]"""


def sliders() -> str:
    """Return the style and the script of the pictures that have sliders."""
    static = DOCS / "_static"
    style = [line for line in (static / "site.css").read_text(encoding="utf-8").splitlines() if "figure.hands" in line]
    script = (static / "hands.js").read_text(encoding="utf-8")
    return "\n".join(
        [
            "<style>",
            *(line for line in style if line.startswith("figure")),
            "</style>",
            "<script>",
            script + "</script>",
        ]
    )


def following(name: str) -> Iterator[Cell]:
    """Yield the link to the next page, where there is one."""
    after = dict(zip(order(), order()[1:], strict=False)).get(name)
    if after:
        yield Cell("markdown", f"Next: [{title(pages()[after])}]({after}.ipynb)")


def notebook(name: str) -> dict[str, Any]:
    """Return a page as a notebook, in nbformat 4.5."""
    head, *rest = cells(name)
    code = "\n".join(cell.source for cell in rest if cell.kind == "code")
    every = [head, *(preface(name, code) if code else ()), *rest, *following(name)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [cell.as_json(number) for number, cell in enumerate(every)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}, "title": title(pages()[name])},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def write(folder: Path) -> list[Path]:
    """Write all pages into a folder, which is made where it is missing; return the files."""
    made = {name: json.dumps(notebook(name), indent=1, ensure_ascii=False) + "\n" for name in pages()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in made.items():
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")
    return [folder / f"{name}.ipynb" for name in made]


def main() -> int:
    """Write the notebooks into the folder that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python docs/notebooks.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    if mine := sorted(folder.glob("*.ipynb")):  # which somebody may have edited
        print(f"{folder} has notebooks already, such as {mine[0].name}: name a new folder", file=sys.stderr)
        return 2
    written = write(folder)
    print(f"{len(written)} notebooks in {sys.argv[1]}")
    return 0


# --- on the site ------------------------------------------------------------------------------------------------------


def add_link(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Put a link to its notebook below a page's title."""
    if "```{code-cell}" in pages().get(pagename, ""):  # a page that is no Python has nothing to run
        target = f'<p class="notebook"><a href="notebooks/{pagename}.ipynb" download>Download as a notebook</a></p>'
        context["body"] = context["body"].replace("</h1>", "</h1>" + target, 1)


def add_files(app: Sphinx, exception: Exception | None) -> None:
    """Write the notebooks into the built site."""
    if exception is None and app.builder.format == "html":
        write(Path(app.outdir, "notebooks"))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", add_link)
    app.connect("build-finished", add_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    sys.exit(main())
