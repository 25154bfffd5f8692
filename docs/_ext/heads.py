"""Sphinx extension for a page's link preview, plus the links below its title.

A page describes itself in one sentence, ``<!-- about: ... -->``, which MyST puts into its head. Two settings give the
addresses of the site and of the repository, each as an environment variable or with ``-D``. Both are empty by default:

    site_address        MINILORA_SITE         if set, previews contain the address of the page
    repository_address  MINILORA_REPOSITORY   target of *Source*; by default the highlighted source on the site

The build also packs the source, so that a reader of the site can install it: ``minilora.zip``.
"""

from __future__ import annotations

import html
import json
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from markup import home
from notebooks import code
from pages import DOCS, ROOT

if TYPE_CHECKING:  # the tests import this file without Sphinx
    from sphinx.application import Sphinx

PREVIEW = "_static/preview.png"
"""The preview image, 1200 x 630: `examples/measure/readme_picture.py` draws it."""
PACKED = ("minilora", "examples", "README.md", "LICENSE", "pyproject.toml")


def front_matter(page: str, text: str, address: str, site: str) -> str:
    """Return the metadata that MyST puts into a page's head: sentence, title, and on the front page a picture."""
    title, sentence = re.search(r"^# (.*)$", text, re.M), re.search(r"^<!-- about: (.*) -->$", text, re.M)
    if not title or not sentence:
        return ""
    there = f"{address.rstrip('/')}/{home('learn', site)}" if address else ""
    graph = {"title": title[1], "description": sentence[1], "type": "article"}
    if page == "index":
        graph["image"] = there + PREVIEW
    if address:
        graph["url"] = f"{there}{page}.html"
    meta = {"description": sentence[1]} | {f"property=og:{name}": words for name, words in graph.items()}
    lines = (
        f"    {json.dumps(name)}: {json.dumps(words.replace('`', ''), ensure_ascii=False)}"
        for name, words in meta.items()
    )
    return "\n".join(["---", "myst:", "  html_meta:", *lines, "---", ""])


def add_front_matter(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the metadata at the top of the page."""
    source[0] = front_matter(docname, source[0], app.config.site_address, app.config.site) + source[0]


def add_links(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Put links to the installation, the source, the licence and the page's notebook below its title."""
    if doctree is None:
        return
    up = "../" * pagename.count("/")
    library = up + home(app.config.site, "library")
    links = {
        "minilora": library + "index.html",
        "Source": app.config.repository_address or library + "_modules/index.html",
        "MIT licence": library + "install.html#the-licence",
    }
    if app.config.site == "library":
        links = {"LoRA": up + home("library", "learn") + "index.html"} | links
    page = DOCS / app.config.site / f"{pagename}.md"
    if page.is_file() and code(page):
        links["Download as a notebook"] = f"notebooks/{pagename}.ipynb"
    row = " · ".join(
        f'<a href="{html.escape(link)}"{" download" * link.endswith(".ipynb")}>{name}</a>'
        for name, link in links.items()
    )
    context["body"] = context["body"].replace("</h1>", f'</h1><p class="ways">{row}</p>', 1)


def pack(file: Path) -> None:
    """Write the source as an archive that pip installs; equal files give equal bytes."""
    files = [path for name in PACKED for path in [ROOT / name, *sorted((ROOT / name).rglob("*"))] if path.is_file()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            if "__pycache__" not in path.parts:
                info = zipfile.ZipInfo(f"minilora/{path.relative_to(ROOT).as_posix()}")
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("site_address", os.environ.get("MINILORA_SITE", ""), "html")
    app.add_config_value("repository_address", os.environ.get("MINILORA_REPOSITORY", ""), "html")
    app.connect("source-read", add_front_matter, priority=900)  # after the extensions that rewrite the page
    app.connect("html-page-context", add_links)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
