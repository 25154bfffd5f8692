"""Sphinx extension: what a page tells a program that previews a link to it, and the links below its title.

A page says what it is about in one sentence, ``<!-- about: ... -->``, below its title; for a page of highlighted
source, the page about the module says it. Two settings say where the site and the repository stand, each by an
environment variable or by ``-D``. Both are empty at first:

    site_address        MINILORA_SITE         then previews name the address of the page; without, none
    repository_address  MINILORA_REPOSITORY   then *Source* leads there; without, to the highlighted source on the site

The build also packs the source, so that a reader of the site can install it: ``minilora.zip``.
"""

from __future__ import annotations

import html
import os
import re
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from markup import home
from pages import DOCS, ROOT

if TYPE_CHECKING:  # the tests read this file where Sphinx is not installed
    from sphinx.application import Sphinx

PREVIEW = "_static/preview.png"
"""The picture of a preview, 1200 x 630: `examples/measure/readme_picture.py` draws it."""
PACKED = ("minilora", "examples", "README.md", "LICENSE", "pyproject.toml")


def about(page: str, site: str) -> str:
    """Return the sentence that a page says of itself in plain words, or nothing."""
    if page.startswith("_modules/minilora"):
        module = page.removeprefix("_modules/").replace("/", ".")
        return f"The source of {module}. {about(f'reference/{module}', site)}".rstrip()
    path = DOCS / site / f"{page}.md"
    sentence = re.search(r"^<!-- about: (.*) -->$", path.read_text(encoding="utf-8"), re.M) if path.is_file() else None
    return sentence[1].replace("`", "") if sentence else ""


def tags(page: str, title: str, address: str, site: str = "learn") -> str:
    """Return the elements of a page's head: description, title, and on the front page a picture."""
    sentence = about(page, site)
    if not sentence:
        return ""
    there = f"{address.rstrip('/')}/{home('learn', site)}" if address else ""
    named = {"og:title": re.sub("<[^>]*>", "", title), "og:description": sentence, "og:type": "article"}
    if page == "index":
        named["og:image"] = there + PREVIEW
    if address:
        named["og:url"] = f"{there}{page}.html"
    lines = [f'<meta name="description" content="{html.escape(sentence)}">']
    lines += [f'<meta property="{name}" content="{html.escape(text)}">' for name, text in named.items()]
    return "\n".join(["", *lines, ""])


def add_tags(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Put them into the page."""
    context["metatags"] = context.get("metatags", "") + tags(
        pagename, context.get("title", ""), app.config.site_address, app.config.site
    )


def add_links(app: Sphinx, pagename: str, template: str, context: dict, doctree: object) -> None:
    """Put the way to the installation, the source and the licence below a page's title."""
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
    row = " · ".join(f'<a href="{html.escape(link)}">{name}</a>' for name, link in links.items())
    context["body"] = context["body"].replace("</h1>", f'</h1><p class="ways">{row}</p>', 1)


def pack(app: Sphinx, exception: Exception | None) -> None:
    """Write the source as a file that pip installs, with the same bytes whenever the files are the same."""
    if exception is not None or app.builder.format != "html" or app.config.site != "library":
        return
    files = [path for name in PACKED for path in [ROOT / name, *sorted((ROOT / name).rglob("*"))] if path.is_file()]
    with zipfile.ZipFile(Path(app.outdir, "minilora.zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            if "__pycache__" not in path.parts:
                info = zipfile.ZipInfo(f"minilora/{path.relative_to(ROOT).as_posix()}")
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_config_value("site_address", os.environ.get("MINILORA_SITE", ""), "html")
    app.add_config_value("repository_address", os.environ.get("MINILORA_REPOSITORY", ""), "html")
    app.connect("html-page-context", add_tags)
    app.connect("html-page-context", add_links)
    app.connect("build-finished", pack)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
