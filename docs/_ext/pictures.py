"""Pictures (also tables) for the pages, drawn from values that a page has just computed.

Text and axes take the colour of the page's own text, and heat maps fade into the page at zero, so one picture serves
light and dark.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

from minilora.cli.figures import BASE_COLOR, INK, LORA_COLOR, new_figure

THIRD = "#2a9d6f"  # the colour of a third line

matplotlib.rcParams.update(
    {
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
        **{"legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "font.size": 12.5},
        # On a phone, which shows a picture smaller than it was drawn, these are 10 pixels.
        **{
            "axes.titlesize": 12.5,
            "legend.fontsize": 11.8,
            "svg.fonttype": "none",
            "svg.hashsalt": "minilora",  # the same picture has the same bytes again
            "grid.color": INK,
            "lines.linewidth": 1.8,
        },
    }
)

# Colours for negative, zero and positive values: the base's colour, transparent, LoRA's colour.
_COLORS = [(*to_rgb(BASE_COLOR), 1), (*to_rgb(INK), 0), (*to_rgb(LORA_COLOR), 1)]
SIGNED = LinearSegmentedColormap.from_list("signed", _COLORS)


def show(figure: Figure, alt: str, caption: str = "") -> str:
    """Return a figure as part of the page, with its alternative text."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # these ids might clash with another picture on the page
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = svg.replace(INK, "currentColor")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(alt, quote=True)}"', 1)
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="picture">{svg}{caption}</figure>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return rows as a Markdown table; the caller formats the numbers, which are right-aligned."""
    cells = [[re.sub(r"([|<])", r"\\\1", str(cell)) for cell in row] for row in (head, *rows)]
    kinds = [
        "---:" if all(re.match(r"^$|[^\w\s]?[\d.]", cell) for cell in column[1:]) else "---"
        for column in zip(*cells, strict=True)
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in (cells[0], kinds, *cells[1:]))


def lines(
    curves: dict[str, tuple],
    *,
    points: bool = False,
    size: tuple[float, float] = (5.2, 3.2),
    **labels: object,
) -> Figure:
    """Draw named curves, each an x, a y, a colour and optionally a style; `labels` are for the axes."""
    figure = new_figure(*size)
    axes = figure.subplots()
    for name, (x, y, colour, *style) in curves.items():
        axes.plot(x, y, *style, color=colour, label=name, marker="o" if points else None, markersize=4)
    axes.grid(alpha=0.3)
    axes.set(**labels)
    if len(curves) > 1:
        axes.legend()
    return figure
