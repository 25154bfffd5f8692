"""Sphinx extension: the path of a newcomer, as the front page shows it: numbered cards with their minutes.

The order is that of the front page's own table of contents, which is also the order of *Next*. A page says below its
title in a few words what it has: ``% card: a change of low rank``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests read this file where Sphinx is not installed
    from sphinx.application import Sphinx

DOCS = Path(__file__).parent
WORDS_A_MINUTE = 120
"""Half of what one reads of a novel: these pages have formulas and code, whose words count as well."""
CARDS, TIME = "(the path)", "(the time)"
"""What stands on the front page in their place."""


def path() -> list[str]:
    """Return the pages of the path, in order."""
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    return re.search(r":caption: The path\n\n(.*?)```", index, re.S)[1].split()


def read(page: str) -> str:
    """Return a page's text as a reader has it: no front matter, hidden cells, folded code of other libraries, tags."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    text = re.sub(r"\A---\n.*?^---\n", "", text, flags=re.S | re.M)
    text = re.sub(r"^```\{code-cell\} ipython3\n:tags: \[(remove|hide)-.*?^```$", "", text, flags=re.S | re.M)
    text = re.sub(r"^```\{(peer|toctree)\}.*?^```$", "", text, flags=re.S | re.M)
    return re.sub(r"<[^>]*>|^:(?:entries|shown|unchecked):.*$|^% about:.*\n", "", text, flags=re.M)


def minutes(page: str) -> int:
    """Return how long a page takes, in minutes, at least one."""
    return max(1, round(len(read(page).split()) / WORDS_A_MINUTE))


def time() -> str:
    """Return how long all of them take, to half an hour."""
    halves = max(1, round(sum(map(minutes, path())) / 30))
    return {1: "half an hour", 2: "an hour"}.get(halves, f"{halves // 2}{' and a half' * (halves % 2)} hours")


def cards() -> str:
    """Return the list of the pages, with links, a few words and minutes, as Markdown."""
    rows = []
    for i, page in enumerate(path(), 1):
        found = re.search(r"^# (.*)\n% card: (.*)$", read(page), re.M)
        if found is None:
            raise ValueError(f"{page}.md has no line below its title that says what its card says: % card: ...")
        title, words = found.groups()
        rows.append(f"{i}. [{title}]({page}.md) {words} *{minutes(page)} min*")
    return "\n".join(rows)


def filled(text: str, around: str = "{}") -> str:
    """Return the front page's text with the cards and the time in it."""
    return text.replace(CARDS, around.format(cards())).replace(TIME, time())


def fill(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put them where the page says so."""
    if docname == "index":
        source[0] = filled(source[0], ":::{{container}} cards\n{}\n:::")


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.connect("source-read", fill)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
