"""The front page's animation: its stills, with the element that the scripts animate."""

from __future__ import annotations

import html
import re
from typing import Any

from pages import DOCS, node

LIVE = DOCS / "_static" / "live"
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.js";\n', re.M)
EXPORT = re.compile(r"^export (?=(?:const|class|function) (?:\[([^\]]*)\]|(\w+)))", re.M)


def stills(**asked: list[Any]) -> dict[str, str]:
    """Return an SVG for each name; its value is [scene, time from 0 to 1, settings]. Node draws it."""
    return {
        name: f'<svg viewBox="0 0 {found["width"]} {found["height"]}" width="{found["width"]}" role="img" '
        f'aria-label="{html.escape(found["alt"], quote=True)}" fill="currentColor" '
        f'style="max-width: 100%; height: auto">{found["inside"]}</svg>'
        for name, found in node("front.mjs", asked).items()
    }


def still(svg: str) -> str:
    """Return a still as a picture of the page."""
    return f'<figure class="picture">{svg}</figure>'


def bundled(name: str) -> str:
    """Return a script bundled with all its imports, so that it also runs in a page that was opened as a file."""
    done: dict[str, str] = {}

    def add(name: str) -> None:
        source = (LIVE / f"{name}.js").read_text(encoding="utf-8")
        for _, other in IMPORT.findall(source):
            if other not in done:
                add(other)
        names = [many or one for many, one in EXPORT.findall(source)]
        body = EXPORT.sub("", IMPORT.sub(r"const \1 = in_\2;\n", source))
        done[name] = f"const in_{name} = (() => {{\n{body}\nreturn {{ {', '.join(names)} }};\n}})();\n"

    add(name)
    return "".join(done.values())


def alive(svg: str) -> str:
    """Return the animated element; without JavaScript it shows a still."""
    script = f'<script type="module">\n{bundled("front")}</script>'
    return f'<figure class="front">{svg}<div class="controls" hidden></div>{script}</figure>'
