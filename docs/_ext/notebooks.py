"""Export each page that runs Python as a self-contained notebook: ``python docs/_ext/notebooks.py NEW_FOLDER``.

Its blocks of Python become cells; their printed output stays in the text, with the pictures, for comparison.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

from pages import DOCS, PICTURE, SITES, blocks, unquoted

NEEDS = "\n*This page as a notebook. It needs minilora, with the extra `models` if it reads a language model.*"


def code(page: Path) -> list[re.Match[str]]:
    """Return the blocks of Python of a page."""
    return [block for block in blocks(page.read_text(encoding="utf-8")) if block["info"] == "python"]


def cell(kind: str, source: str, **more: Any) -> dict[str, Any]:
    """Return a notebook cell."""
    return {"cell_type": kind, "metadata": {}, "source": source.strip("\n"), **more}


def prose(page: Path, text: str) -> str:
    """Return text between blocks for Jupyter: without comments, with its pictures, and with links to notebooks."""
    text, put_back = unquoted(text)
    for picture in PICTURE.finditer(text):
        svg = base64.b64encode((page.parent / "pictures" / f"{picture['name']}.svg").read_bytes()).decode()
        text = text.replace(picture[0], f"![{picture['alt']}](data:image/svg+xml;base64,{svg})")
    text = re.sub(r"<!--.*?-->\n?", "", text, flags=re.S)
    return put_back(re.sub(r"\]\((?!https?:|#|data:)([\w./-]+)\.md\b", r"](\1.ipynb", text))


def notebook(page: Path) -> dict[str, Any]:
    """Return a page as a notebook, in nbformat 4.5."""
    text, place = page.read_text(encoding="utf-8"), 0
    cells: list[dict[str, Any]] = []
    for block in code(page):
        cells.append(cell("markdown", prose(page, text[place : block.start()])))
        cells.append(cell("code", block["body"], execution_count=None, outputs=[]))
        place = block.end()
    cells.append(cell("markdown", prose(page, text[place:])))
    cells[0]["source"] = re.sub("^(# .*)", rf"\1\n{NEEDS}", cells[0]["source"])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "cells": [of | {"id": f"cell-{number}"} for number, of in enumerate(cells)],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def write(folder: Path, site: str) -> None:
    """Write those pages of a site that run Python into a new folder."""
    folder.mkdir(parents=True)
    for page in filter(code, sorted((DOCS / site).glob("*.md"))):
        text = json.dumps(notebook(page), indent=1, ensure_ascii=False)
        (folder / f"{page.stem}.ipynb").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    for site in SITES:
        write(Path(sys.argv[1], site), site)
