"""Sphinx extension that turns a page into MyST, with the results of `pages`; it also checks the page's links.

A page links to its neighbours as on a source host: ``rank.md#more``, ``../library/files.md``, a file of the
repository. On the site, links out of its folder become URLs: of the other site, of a module's page, of a download.
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

if TYPE_CHECKING:  # the tests import this file without Sphinx
    from sphinx.application import Sphinx

LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>(?!https?:|mailto:)[^)\s]+)\)")
LESSON = re.compile(r"\b[Ll]esson (\d+)|^(\d+)\. ")
ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>$', re.M)
LISTED = re.compile(r"^(?:\d+\.|[-*]) \[[^\]]*\]\(([\w-]+)\.md\)", re.M)


def site_of(page: Path) -> str:
    """Return the name of the site that a page belongs to."""
    return page.relative_to(DOCS).parts[0]


def home(site: str, other: str) -> str:
    """Return the relative URL from one site's root to another's; the lessons are at the root, the library below it."""
    return "" if site == other else "library/" if other == "library" else "../"


def slug(heading: str) -> str:
    """Return the id of a heading, in the form that source hosts and MyST use."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that a page has."""
    text = page.read_text(encoding="utf-8")
    numbers = {anchor(equation["label"]) for equation in EQUATION.finditer(text)}
    return {slug(words) for _, words in headings(text)} | {*ANCHOR.findall(text)} | numbers


def outside_fences(text: str) -> str:
    """Return a text without its code blocks, which contain no links."""
    return FENCE.sub("\n", text)


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that have no target, or whose target is another lesson than they say."""
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
                where = repr(title) if title else "a page without a heading"
                found.append(f"{page.relative_to(DOCS)}: {link['text']!r} leads to {where}")
    return found


def address(site: str, target: str) -> str:
    """Return the site's URL for a link's target; "" if the link can stay as it is."""
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
    """Return a link in the form for the site."""
    if link["target"].endswith(".md") and not (DOCS / site / link["target"]).resolve().is_relative_to(DOCS):
        return link["text"]  # a file of the repository that is not on the site
    there = address(site, link["target"])
    return f'<a class="reference" href="{there}">{link["text"]}</a>' if there else link[0]


def contents(text: str) -> str:
    """Return tables of contents made from the lists of pages on a front page, each under its heading."""
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
    """Return HTML wrapped as MyST accepts it."""
    return f"`````{{raw}} html\n{html}\n`````\n"


def as_myst(page: Path) -> str:
    """Return a page in MyST's syntax, with the results of its run."""
    site = site_of(page)
    results = pages.Results(**json.loads(pages.results_file(page).read_text(encoding="utf-8")))
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
    text = LIVE.sub(lambda m: raw(results.live[m["name"]]), text)
    text = PICTURE.sub(lambda m: "\n" + raw(results.pictures[m["name"]]), text)
    text = EQUATION.sub(lambda m: equation(site, m), text)
    return put_back(f"{text}\n{index}")


def equation(site: str, found: re.Match[str]) -> str:
    """Return an equation with its number and the first line that computes it, with links to all such lines."""
    options = dict(OPTION.findall(found["options"] or ""))
    lines = [line for line in numbered_lines() if line.label == found["label"]]
    lines.sort(key=lambda line: line.module.count("."))  # top-level modules first
    way = home(site, "library")
    links = ", ".join(f'<a class="reference" href="{way}{line.page}.html#{line.anchor}">{line}</a>' for line in lines)
    short = "in short: " if "shown" in options else ""
    code = f"<code>{escape(options.get('shown', lines[0].code))}</code> <span>{short}{links}</span>" if lines else ""
    below = f'<p class="line">{code}</p>' if code else ""
    return (
        raw(f'<div class="equation" id="{anchor(found["label"])}"><div class="formula">')
        + f"```{{math}}\n{TAG.sub('', found['tex'])}\n```\n"
        + raw(f'<p><span class="number">({found["label"]})</span></p></div>{below}</div>')
    )


@cache
def numbered_lines() -> list[Line]:
    """Return the numbered lines of the package; cached, because the package does not change during a build."""
    return find_lines(ROOT / "minilora")


def prose(site: str, text: str) -> str:
    """Return text outside code blocks with the site's links and labels."""
    return ANCHOR.sub(r"(\1)=", LINK.sub(lambda link: link_on_site(site, link), text))


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace Sphinx's source with the converted page."""
    page = Path(app.srcdir, f"{docname}.md")
    if page.parent == Path(app.srcdir):
        source[0] = as_myst(page)


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("site", "learn", "env")
    app.connect("source-read", read, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
