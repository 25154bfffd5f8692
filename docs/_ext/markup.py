"""Sphinx extension: a page's Markdown, with what `pages` computed for it, as MyST reads it; and the links it has.

A page links to what stands beside it as on a source host: ``rank.md#more``, ``../library/files.md``, a file of the
repository. On the site the last ones are addresses: of the other site, of a module's page, of a file to download.
"""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pages
from numbered import EQUATION, OPTION, TAG, Line, anchor, find_lines
from pages import DOCS, FENCE, LINES, LIVE, PICTURE, ROOT, SHOWN, SITES, headings

if TYPE_CHECKING:  # the tests read this file where Sphinx is not installed
    from sphinx.application import Sphinx

LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>(?!https?:|mailto:)[^)\s]+)\)")
LESSON = re.compile(r"\b[Ll]esson (\d+)|^(\d+)\. ")
ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>$', re.M)
LISTED = re.compile(r"^(?:\d+\.|[-*]) \[[^\]]*\]\(([\w-]+)\.md\)", re.M)


def site_of(page: Path) -> str:
    """Return the site that a page is of."""
    return page.relative_to(DOCS).parts[0]


def home(site: str, other: str) -> str:
    """Return the way from a site's root to another's: the lessons stand at the root, the library in a folder."""
    return "" if site == other else "library/" if other == "library" else "../"


def slug(heading: str) -> str:
    """Return the id of a heading, as a source host and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    """Return what a link to a page may name."""
    text = page.read_text(encoding="utf-8")
    numbers = {anchor(equation["label"]) for equation in EQUATION.finditer(text)}
    return {slug(words) for _, words in headings(text)} | {*ANCHOR.findall(text)} | numbers


def outside_fences(text: str) -> str:
    """Return a text without its blocks of code, which have no links."""
    return FENCE.sub("\n", text)


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead nowhere, or to another lesson than they say."""
    found = []
    for link in LINK.finditer(outside_fences(page.read_text(encoding="utf-8"))):
        path, _, named = link["target"].partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (named and there.suffix == ".md" and named not in anchors(there)):
            found.append(f"{page.relative_to(DOCS)}: {link['target']} leads nowhere")
        elif lesson := LESSON.search(link["text"]):
            known = headings(there.read_text(encoding="utf-8")) if there.suffix == ".md" else []
            title = known[0][1] if known else ""
            if not title.startswith(f"{lesson[1] or lesson[2]}. "):
                where = repr(title) if title else "what has no heading"
                found.append(f"{page.relative_to(DOCS)}: {link['text']!r} leads to {where}")
    return found


def address(site: str, target: str) -> str:
    """Return where the site has the target of a link; a page of its own, or a file to download, stays as it is."""
    path, hash_, named = target.partition("#")
    there = (DOCS / site / path).resolve()
    if path.endswith(".md") and there.is_relative_to(DOCS) and there.parent.name in SITES and there.parent.name != site:
        return f"{home(site, there.parent.name)}{there.stem}.html{hash_}{named}"
    if there.is_relative_to(DOCS / "_static"):
        return there.relative_to(DOCS).as_posix()
    if there.is_relative_to(ROOT / "minilora") and there.suffix == ".py":
        module = ".".join(there.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        return f"{home(site, 'library')}reference/{module}.html"
    return ""


def link_on_site(site: str, link: re.Match[str]) -> str:
    """Return a link as the site has it."""
    if link["target"].endswith(".md") and not (DOCS / site / link["target"]).resolve().is_relative_to(DOCS):
        return link["text"]  # a file of the repository that the site has not
    there = address(site, link["target"])
    return f'<a class="reference" href="{there}">{link["text"]}</a>' if there else link[0]


def contents(text: str) -> str:
    """Return the tables of contents that a front page's lists of pages are, each under its heading."""
    trees = []
    known = [*headings(text), (len(text), "")]
    for (start, caption), (end, _) in pairwise(known):
        if listed := LISTED.findall(text[start:end]):
            trees.append(
                f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n"
                + "\n".join("self" if page == "index" else page for page in listed)
                + "\n```\n"
            )
    return "\n".join(trees)


def raw(html: str) -> str:
    """Return HTML as MyST takes it."""
    return f"`````{{raw}} html\n{html}\n`````\n"


def as_myst(page: Path) -> str:
    """Return a page as MyST reads it, with what it gave when it ran."""
    site, given = site_of(page), pages.Given(**json.loads(pages.keeps(page).read_text(encoding="utf-8")))
    text, put_back = pages.unquoted(page.read_text(encoding="utf-8"))
    index = contents(text) if page.stem == "index" else ""
    ran = {block.start() for block in pages.blocks(text)}
    done, place, printed = "", 0, False
    for fence in FENCE.finditer(text):
        between = text[place : fence.start()]
        done += prose(site, between)
        place = fence.end()
        kind, info = "", fence["info"].partition(" ")[0]
        if fence.start() in ran:
            kind = "ran" if info == "python" else "console"
        elif printed and info == "text" and not between.strip():
            wide = max(map(len, fence["body"].splitlines()), default=0) > 100
            kind = "printed prose" if wide else "printed"
        block = f"{fence['ticks']}{{code-block}} {info}\n:class: {kind}\n\n{fence['body']}{fence['ticks']}\n"
        done += block if kind else fence[0]
        printed = fence.start() in ran
    text = done + prose(site, text[place:])
    text = LINES.sub(lambda m: f"{m['head']}\n{m['body']}```\n", text)
    text = SHOWN.sub(lambda m: m["text"], text)
    text = LIVE.sub(lambda m: raw(given.live[m["name"]]), text)
    text = PICTURE.sub(lambda m: "\n" + raw(given.pictures[m["name"]]), text)
    text = EQUATION.sub(lambda m: equation(site, m), text)
    return put_back(f"{text}\n{index}")


def equation(site: str, found: re.Match[str]) -> str:
    """Return an equation with its number and the lines that compute it; of several the first, with links to all."""
    options = dict(OPTION.findall(found["options"] or ""))
    lines = [line for line in numbered_lines() if line.label == found["label"]]
    lines.sort(key=lambda line: line.module.count("."))  # the core pages first
    way = home(site, "library")
    links = ", ".join(f'<a class="reference" href="{way}{line.page}.html#{line.anchor}">{line}</a>' for line in lines)
    short = "in short: " if "shown" in options else ""
    told = f"<code>{escape(options.get('shown', lines[0].code))}</code> <span>{short}{links}</span>" if lines else ""
    below = f'<p class="line">{told}</p>' if told else ""
    return (
        raw(f'<div class="equation" id="{anchor(found["label"])}"><div class="formula">')
        + f"```{{math}}\n{TAG.sub('', found['tex'])}\n```\n"
        + raw(f'<p><span class="number">({found["label"]})</span></p></div>{below}</div>')
    )


@cache
def numbered_lines() -> list[Line]:
    """Return the numbered lines of the package, which stays as it is while the site is built."""
    return find_lines(ROOT / "minilora")


def prose(site: str, text: str) -> str:
    """Return text outside blocks with the site's links and labels."""
    return ANCHOR.sub(r"(\1)=", LINK.sub(lambda link: link_on_site(site, link), text))


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Hand Sphinx the page."""
    page = Path(app.srcdir, f"{docname}.md")
    if page.parent == Path(app.srcdir):
        source[0] = as_myst(page)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("site", "learn", "env")
    app.connect("source-read", read, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
