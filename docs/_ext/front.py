"""The front page's object: its stills, drawn by the scripts of the browser, and the element that these scripts move."""

from __future__ import annotations

import html
import json
import subprocess
from pathlib import Path
from typing import Any

from pages import Drawn

SCRIPT = Path(__file__).with_name("front.mjs")


def stills(**asked: list[Any]) -> dict[str, str]:
    """Return an SVG for each name: of [scene, time from 0 to 1, settings], by Node."""
    done = subprocess.run(
        ["node", SCRIPT], input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8", check=True
    )
    return {
        name: f'<svg viewBox="0 0 {found["width"]} {found["height"]}" width="{found["width"]}" role="img" '
        f'aria-label="{html.escape(found["alt"], quote=True)}" fill="currentColor" '
        f'style="max-width: 100%; height: auto">{found["inside"]}</svg>'
        for name, found in json.loads(done.stdout).items()
    }


def still(svg: str) -> Drawn:
    """Return a still as a picture of the page."""
    return Drawn(f'<figure class="picture">{svg}</figure>')


def alive(svg: str) -> Drawn:
    """Return the object: a still where there is no JavaScript."""
    return Drawn(f'<figure class="front">{svg}<div class="controls" hidden></div></figure>')
