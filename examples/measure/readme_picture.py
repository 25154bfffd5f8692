"""README's picture, and the preview of the front page: what adapters learn of a change of weight that spells a word.

``python examples/measure/readme_picture.py`` trains them and writes docs/_static/ranks.svg and preview.png; their
numbers are those of that run.
"""

from __future__ import annotations

import sys

import numpy as np
from written import ROOT

from minilora import Linear, LoRALinear, evaluate, train
from minilora.cli.figures import BASE_COLOR, INK, LORA_COLOR

sys.path[:0] = [str(ROOT / "docs" / "_ext")]

from ranks import SIDE, change, word

FILE = ROOT / "docs" / "_static" / "ranks.svg"
PREVIEW = FILE.with_name("preview.png")
RANKS = (1, 3, 7)
CELL, GAP, LINE = 12, 24, 24  # pixels
SHADES = 20


def learn(rank: int) -> tuple[np.ndarray, int, float]:
    """Train an adapter; return the change that it learned, its count of numbers, and the share of the change."""
    truth, rng = change(), np.random.default_rng(0)
    base = Linear.init(280, 90, rng=rng)
    X = rng.standard_normal((400, 280), dtype=np.float32)
    Y = base(X) + X @ truth.T.astype(np.float32)
    layer = LoRALinear.from_linear(base, rank=rank, alpha=rank, rng=rng)
    before = evaluate(layer, X, Y)
    for lr in (0.02, 0.002):
        train(layer, X, Y, epochs=60, batch_size=100, lr=lr, rng=rng)
    numbers = sum(array.size for array in layer.trainable().values())
    return layer.delta(), numbers, 1 - evaluate(layer, X, Y) / before


def grid(matrix: np.ndarray, x: int, y: int) -> str:
    """Return a matrix as squares: each the mean of a cell, orange where it is positive, blue where it is negative."""
    cells = matrix.reshape(len(matrix) // SIDE, SIDE, -1, SIDE).mean(axis=(1, 3))
    shades = np.rint(np.clip(cells, -1, 1) * SHADES).astype(int)
    paths = []
    for shade in sorted(set(shades.ravel().tolist()) - {0}):
        squares = "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(shades == shade))
        paths.append(
            f'<path d="{squares}" fill="{LORA_COLOR if shade > 0 else BASE_COLOR}" opacity="{abs(shade) / SHADES:g}"/>'
        )
    height, width = cells.shape
    frame = f'<rect width="{width}" height="{height}" fill="none" stroke="{INK}" stroke-width=".12"/>'
    return f'<g transform="translate({x} {y}) scale({CELL})" shape-rendering="crispEdges">{"".join(paths)}{frame}</g>'


def picture() -> str:
    """Return the drawing: the change, and what each rank learned of it, two by two."""
    truth = change()
    panels = [(f"the change: {truth.size:,} numbers", truth)]
    for rank in RANKS:
        learned, numbers, share = learn(rank)
        panels.append((f"rank {rank}: {numbers:,} numbers, {share:.0%} learned", learned))
    wide, high = truth.shape[1] // SIDE * CELL, truth.shape[0] // SIDE * CELL
    parts = []
    for i, (title, matrix) in enumerate(panels):
        x, y = i % 2 * (wide + GAP) + 1, i // 2 * (high + LINE + GAP) + LINE
        parts.append(f'<text x="{x}" y="{y - 6}">{title}</text>{grid(matrix, x, y)}')
    width, height = 2 * wide + GAP + 2, 2 * (high + LINE) + GAP + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="15" fill="{INK}">\n' + "\n".join(parts) + "\n</svg>\n"
    )


def preview() -> None:
    """Write the picture that a program shows beside a link to the front page, 1200 x 630."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure = Figure((12, 6.3), dpi=100, facecolor="white")
    figure.text(0.05, 0.85, "LoRA", fontsize=44, weight="bold", color="#1c2333")
    figure.text(
        0.05, 0.76, "A large matrix stays as it is. Two thin ones learn its change.", fontsize=23, color="#444c5e"
    )
    colours = LinearSegmentedColormap.from_list("signed", [BASE_COLOR, "white", LORA_COLOR])
    panels = [(f"the change: {change().size:,} numbers", word())]
    for rank in RANKS:
        learned, numbers, share = learn(rank)
        cells = learned.reshape(len(word()), SIDE, -1, SIDE).mean(axis=(1, 3))
        panels.append((f"rank {rank}: {numbers:,} numbers, {share:.0%} learned", cells))
    for i, (title, matrix) in enumerate(panels):
        axes = figure.add_axes((0.05 + i % 2 * 0.46, 0.37 - i // 2 * 0.34, 0.44, 0.26))
        axes.imshow(matrix, cmap=colours, vmin=-1, vmax=1, interpolation="nearest", aspect="equal")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize=17, loc="left", color="#1c2333")
    figure.savefig(PREVIEW, metadata={"Software": None})


if __name__ == "__main__":
    FILE.write_text(picture(), encoding="utf-8")
    preview()
    print(f"{FILE} and {PREVIEW} written")
