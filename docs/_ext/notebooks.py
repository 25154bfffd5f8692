"""Every page as a Jupyter notebook that runs alone: ``python docs/_ext/notebooks.py FOLDER``.

A page is Markdown that Jupyter reads as it stands; its blocks that run become cells, with what they print, and its
pictures stand in the cells that show them. As a Sphinx extension, this file puts the notebooks into the site, and a
link on each page that has something to run.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pages import DOCS, FENCE, LINES, LIVE, PICTURE, PRINTED, SHOWN, blocks, every, unquoted

if TYPE_CHECKING:
    from sphinx.application import Sphinx

LIVE_HERE = "*On the site, this place has something to touch.*\n"
COMMENT = re.compile(r"<!--.*?-->\n?", re.S)


def title(page: Path) -> str:
    """Return a page's title."""
    return re.search(r"^# (.*)$", page.read_text(encoding="utf-8"), re.M)[1]  # type: ignore[index]


def runs(page: Path) -> bool:
    """Whether a page has something to run."""
    return any(True for _ in blocks(page.read_text(encoding="utf-8")))


def code_cell(source: str, printed: str) -> dict[str, Any]:
    """Return a cell of code, with what it prints."""
    output = {"output_type": "stream", "name": "stdout", "text": printed}
    return {
        "cell_type": "code",
        "metadata": {},
        "source": source.rstrip(),
        "execution_count": None,
        "outputs": [output] if printed else [],
    }


def text_cells(page: Path, text: str) -> list[dict[str, Any]]:
    """Return cells of Markdown, one for each heading, with the pictures that they show."""
    text, put_back = unquoted(text)
    text = LIVE.sub(
        LIVE_HERE, SHOWN.sub(lambda m: m["text"], LINES.sub(lambda m: f"{m['head']}\n{m['body']}```\n", text))
    )
    fences: list[str] = []
    text = FENCE.sub(lambda m: fences.append(m[0]) or f"\1{len(fences) - 1}\1\n", text)
    text = re.sub(r"\]\((?!https?:|#|pictures/)([\w./-]+)\.md\b", r"](\1.ipynb", COMMENT.sub("", text))
    cells = []
    for part in re.split(r"(?m)^(?=#+ )", text):
        if not part.strip():
            continue
        shown = {m["name"]: page.with_name("pictures") / f"{m['name']}.svg" for m in PICTURE.finditer(part)}
        part = PICTURE.sub(lambda m: f"![{m['alt']}](attachment:{m['name']}.svg)", part)
        source = put_back(re.sub(r"\x01(\d+)\x01\n", lambda m: fences[int(m[1])], part))
        cell = {"cell_type": "markdown", "metadata": {}, "source": re.sub(r"\n{3,}", "\n\n", source).strip()}
        if shown:
            encoded = {name: base64.b64encode(file.read_bytes()).decode() for name, file in shown.items()}
            cell["attachments"] = {f"{name}.svg": {"image/svg+xml": data} for name, data in encoded.items()}
        cells.append(cell)
    return cells


def notebook(page: Path) -> dict[str, Any]:
    """Return a page as a notebook, in nbformat 4.5."""
    text, place = page.read_text(encoding="utf-8"), 0
    cells: list[dict[str, Any]] = []
    for block in blocks(text):
        cells += text_cells(page, text[place : block.start()])
        place = block.end()
        body, printed = block["body"], ""
        if block["info"] == "console":
            body = re.sub(r"^\$ ", "!", "\n".join(re.findall(r"^\$ .*$", body, re.M)), flags=re.M)
        elif found := PRINTED.match(text, place):
            printed, place = found["text"], found.end()
        cells.append(code_cell(body, printed))
    cells += text_cells(page, text[place:])
    if runs(page):
        needs = "*This page as a notebook. It needs minilora, with the extra `models` where it reads a language model.*"
        cells.insert(1, {"cell_type": "markdown", "metadata": {}, "source": needs})
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}, "title": title(page)},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def write(folder: Path, pages: list[Path]) -> list[Path]:
    """Write pages into a folder, which is made where it is missing; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{page.stem}.ipynb" for page in pages]
    for page, file in zip(pages, files, strict=True):
        file.write_text(json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files


def main() -> int:
    """Write the notebooks into the folder that the command line names, those of each site in a folder of its own."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python docs/_ext/notebooks.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    if mine := sorted(folder.glob("*/*.ipynb")):  # which somebody may have edited
        print(f"{folder} has notebooks already, such as {mine[0].name}: name a new folder", file=sys.stderr)
        return 2
    for site in dict.fromkeys(page.parent.name for page in every()):
        written = write(folder / site, [page for page in every() if page.parent.name == site])
        print(f"{len(written)} notebooks in {folder / site}")
    return 0


def add_link(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Put a link to its notebook below a page's title."""
    page = DOCS / app.config.site / f"{pagename}.md"
    if page.is_file() and runs(page):
        target = f'<p class="notebook"><a href="notebooks/{pagename}.ipynb" download>Download as a notebook</a></p>'
        context["body"] = context["body"].replace("</h1>", "</h1>" + target, 1)


def add_files(app: Sphinx, exception: Exception | None) -> None:
    """Write the notebooks into the built site."""
    if exception is None and app.builder.format == "html":
        write(Path(app.outdir, "notebooks"), sorted((DOCS / app.config.site).glob("*.md")))


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("html-page-context", add_link)
    app.connect("build-finished", add_files)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    sys.exit(main())
