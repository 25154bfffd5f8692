"""Pictures in the reader's hands: native sliders, a drawing, and a sentence that says its numbers.

Everything is computed by minilora when the site is built, on a grid. `_static/hands.js` looks the numbers up and draws
them. Without JavaScript a reader has the drawing of the first position, and its sentence.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import costs
import numpy as np
import pages
import pictures
from pages import Drawn
from ranks import change

from minilora import NF4, LoRA, train
from minilora.layers.nf4 import code_book


@dataclass(frozen=True)
class Slider:
    """A native range input over the places of a list of values."""

    name: str
    label: str
    values: Sequence[str]  # what a reader sees and hears
    start: int

    def html(self, figure: str) -> str:
        """Return the label, the input and the value beside it."""
        own, last = f"{figure}-{self.name}", len(self.values) - 1
        wide = max(map(len, self.values))  # so that the slider stays as long as it is, whatever value it has
        value = html.escape(self.values[self.start])
        return (
            f'<div class="control"><label for="{own}">{html.escape(self.label)}</label>'
            f'<input type="range" id="{own}" name="{self.name}" min="0" max="{last}" step="1" value="{self.start}" '
            f'aria-valuetext="{value}" autocomplete="off">'
            f'<output for="{own}" style="min-width: {wide}ch">{value}</output></div>'
        )


def figure(kind: str, sliders: Sequence[Slider], says: str, still: Drawn, data: dict[str, Any], caption: str) -> Drawn:
    """Return a picture with its sliders, its sentence, its still drawing and its data."""
    data = {**data, "values": {slider.name: list(slider.values) for slider in sliders}}
    return Drawn(
        f'<figure class="hands" id="{kind}" data-kind="{kind}">'
        f'<div class="controls" hidden>{"".join(slider.html(kind) for slider in sliders)}</div>'
        f'<p class="says" aria-live="polite">{html.escape(says)}</p>'
        f'<div class="drawing">{still.data}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption>"
        f"{pages.data(data)}</figure>"
    )


# --- adapters of each rank that learn a word --------------------------------------------------------------------------


def learn_word(highest: int) -> list[LoRA]:
    """Return adapters of rank 1 to `highest`, each trained to the change of weight that spells a word."""
    truth, rng = change(), np.random.default_rng(0)
    X = rng.standard_normal((600, truth.shape[1]))
    adapters = []
    for rank in range(1, highest + 1):
        adapter = LoRA.init(*truth.shape[::-1], rank=rank, alpha=rank, rng=rng, dtype="float64")
        for lr in (0.02, 0.002):
            train(adapter, X, X @ truth.T, epochs=60, batch_size=100, lr=lr, rng=rng)
        adapters.append(adapter)
    return adapters


# --- what a matrix does to a circle -----------------------------------------------------------------------------------

LENGTHS = (2.0, 0.8)
INPUTS, OUTPUTS = 30, 60
"""The singular values of the matrix in the picture, and where its first directions point, in degrees."""


def toward(degrees: float) -> np.ndarray:
    """Return the arrow of length 1 that points there."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def example_matrix() -> np.ndarray:
    """Return the matrix of the picture: a sum of two outer products."""
    return LENGTHS[0] * np.outer(toward(OUTPUTS), toward(INPUTS)) + LENGTHS[1] * np.outer(
        toward(OUTPUTS + 90), toward(INPUTS + 90)
    )


def circle(start: int = 1) -> Drawn:
    """Return the picture of a circle and the ellipse that a matrix makes of it."""
    M, angles = example_matrix(), list(range(0, 180, 10))
    lengths = [float(np.linalg.norm(M @ toward(angle))) for angle in angles]
    assert np.allclose(np.linalg.svd(M, compute_uv=False), LENGTHS)
    assert angles[int(np.argmax(lengths))] == INPUTS
    assert angles[int(np.argmin(lengths))] == INPUTS + 90
    ends = {INPUTS: " No direction gets longer.", INPUTS + 90: " No direction ends shorter."}
    says = [
        f"x points to {angle}\N{DEGREE SIGN}. M x is {length:.2f} long.{ends.get(angle, '')}"
        for angle, length in zip(angles, lengths, strict=True)
    ]
    around = [toward(angle) for angle in range(0, 361, 5)]
    data = {
        "arrows": [[toward(angle).round(3).tolist(), (M @ toward(angle)).round(3).tolist()] for angle in angles],
        "circle": np.round(around, 3).tolist(),
        "ellipse": np.round([M @ x for x in around], 3).tolist(),
        "says": says,
    }
    drawn = pictures.new_figure(5.2, 2.6)
    for axes, points, title in zip(drawn.subplots(1, 2), (around, [M @ x for x in around]), ("x", "M x"), strict=True):
        axes.plot(*np.transpose(points), color=pictures.INK)
        axes.set(aspect="equal", title=title, xlim=(-2.1, 2.1), ylim=(-2.1, 2.1))
    still = pictures.show(
        drawn, "A circle of arrows x, and the ellipse of the arrows M x, two and a half times as long as it is wide."
    )
    caption = "Left all arrows x of length 1, right what M makes of them. Two arrows at a right angle, the thin lines, "
    caption += f"stay at a right angle and become {LENGTHS[0]:g} and {LENGTHS[1]:g} long: the singular values."
    slider = Slider("angle", "direction of x", [f"{angle}\N{DEGREE SIGN}" for angle in angles], start)
    return figure(
        "circle",
        [slider],
        says[start],
        still,
        data,
        caption,
    )


def nearest_on_a_line(start: int = 1) -> Drawn:
    """Return the picture of the best matrix of rank 1 for each line that its outputs may lie on."""
    M, angles = example_matrix(), list(range(0, 180, 10))
    along = [np.outer(toward(angle), toward(angle)) @ M for angle in angles]
    errors = [float(((M - near) ** 2).sum()) for near in along]
    assert angles[int(np.argmin(errors))] == OUTPUTS
    assert np.isclose(min(errors), LENGTHS[1] ** 2)
    says = [
        f"Line at {angle}\N{DEGREE SIGN}: the squared error is {error:.2f}."
        + (f" It is the least, {LENGTHS[1]:g} squared." if angle == OUTPUTS else "")
        for angle, error in zip(angles, errors, strict=True)
    ]
    around = [toward(angle) for angle in range(0, 360, 15)]
    data = {
        "ellipse": np.round([M @ toward(angle) for angle in range(0, 361, 5)], 3).tolist(),
        "points": np.round([M @ x for x in around], 3).tolist(),
        "near": [np.round([near @ x for x in around], 3).tolist() for near in along],
        "angles": angles,
        "errors": np.round(errors, 3).tolist(),
        "says": says,
    }
    still = pictures.show(
        pictures.lines({"error": (angles, errors, pictures.LORA)}, xlabel="direction of the line", ylabel="error"),
        "The squared error by the direction of the line. It is least at 60 degrees, where the ellipse is longest.",
    )
    caption = (
        "Each point of the ellipse goes to the nearest point of the line: the best that a matrix of rank 1 can do "
    )
    caption += "whose outputs lie there. Right: the sum of the squares of what is lost, for each direction of the line."
    slider = Slider("line", "direction of the line", [f"{angle}\N{DEGREE SIGN}" for angle in angles], start)
    return figure("line", [slider], says[start], still, data, caption)


# --- the cost ledger against width, batch and rank --------------------------------------------------------------------

WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
BATCHES = (1, 8, 32, 128, 512, 2048, 8192)
LEDGER_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LETTERS = {11: "N", 5: "w", 2: "r"}  # sizes that tell apart the letters of a product


def spelled() -> dict[str, dict[str, Any]]:
    """Return each way's products as letters, N rows, w width, r rank, and the shapes of what it trains."""
    ways = costs.ways(11, 5, 5, 2, need_dx=True)
    found = {}
    for key, name in (("full", "full training"), ("lora", "LoRA beside its base")):
        products = ["".join(LETTERS[size] for size in product) for product in ways[name].products]
        shapes = {"full": ["ww"], "lora": ["rw", "wr"]}[key]
        assert sum(np.prod([{"w": 5, "r": 2}[c] for c in shape]) for shape in shapes) == ways[name].parameters
        found[key] = {"products": products, "shapes": shapes}
    return found


def tally(way: dict[str, Any], **sizes: int) -> dict[str, int]:
    """Return what hands.js computes for a way: multiply-adds, the least bytes moved, and bytes of Adam's state."""

    def size(letters: str) -> int:
        return int(np.prod([sizes[c] for c in letters], dtype=object))

    trained = sum(map(size, way["shapes"]))
    moved = sum(size(p[0] + p[1]) + size(p[1] + p[2]) + size(p[0] + p[2]) for p in way["products"])
    return {
        "multiply-adds": sum(map(size, way["products"])),
        "bytes moved": costs.BYTES * (moved + 7 * trained),
        "bytes of Adam": costs.BYTES * 2 * trained,
    }


def ledger(start: tuple[int, int, int] = (4, 3, 3)) -> Drawn:
    """Return the picture of a training step's cost inside a network, full and with LoRA, at each size."""
    ways = spelled()
    sizes = {"w": WIDTHS[start[0]], "N": BATCHES[start[1]], "r": LEDGER_RANKS[start[2]]}

    full, lora = (tally(way, **sizes) for way in ways.values())
    says = (
        f"Width {sizes['w']}, {sizes['N']} rows, rank {sizes['r']}: LoRA takes "
        + ", ".join(f"{100 * lora[key] / full[key]:.3g} % of the {key}" for key in full)
        + "."
    )
    still = pictures.show(
        pictures.bars(
            {f"{key}, {name}": values[key] / 1e6 for key in full for name, values in (("full", full), ("LoRA", lora))},
            colours=[pictures.BASE, pictures.LORA] * 3,
            xlabel="millions",
            xscale="log",
        ),
        "Six bars in pairs: multiply-adds, bytes moved and bytes of Adam's state, of full training and of LoRA. LoRA's "
        "are shorter, the last by far.",
    )
    sliders = [
        Slider("width", "width of the layer", [str(w) for w in WIDTHS], start[0]),
        Slider("batch", "rows in a batch", [str(b) for b in BATCHES], start[1]),
        Slider("r", "rank", [str(r) for r in LEDGER_RANKS], start[2]),
    ]
    caption = "One training step of a layer inside a network, as many inputs as outputs, float32."
    return figure("ledger", sliders, says, still, ways, caption)


# --- the code book under the bell curve -------------------------------------------------------------------------------

BITS = (2, 3, 4, 5, 6)
BLOCK = 64


def levels_under_the_bell(start: int = 2) -> Drawn:
    """Return the picture of the code books of 2 to 64 levels, and what they lose of normally distributed weights."""
    blocks = np.random.default_rng(0).standard_normal((512, BLOCK))
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    books = [np.array(code_book(2**bits)) for bits in BITS]  # as NF4's: half of them above 0, and one fewer below
    assert np.abs(books[BITS.index(4)] - NF4).max() < 2e-7
    pairs = list(zip(BITS, books, strict=True))

    def nearest(book: np.ndarray) -> np.ndarray:
        return np.abs((blocks / largest)[..., None] - book).argmin(axis=-1)

    def error(book: np.ndarray) -> float:
        return float(np.linalg.norm(book[nearest(book)] * largest - blocks) / np.linalg.norm(blocks))

    errors = [(error(book), error(np.linspace(-1, 1, len(book)))) for book in books]
    assert all(few[0] > more[0] for few, more in pairwise(errors))
    end = float(largest.mean())  # where a block's largest weight usually is
    counts = [np.bincount(nearest(book).ravel(), minlength=len(book)) / blocks.size for book in books]
    says = [
        f"{bits} bits, {len(book)} levels: the error is {quantile:.1%} of the weights, and {steps:.1%} with levels at "
        "even steps."
        for (bits, book), (quantile, steps) in zip(pairs, errors, strict=True)
    ]
    grid = np.linspace(-1.4, 1.4, 113)
    bell = np.exp(-((grid * end) ** 2) / 2)
    data = {
        "grid": np.round(grid, 3).tolist(),
        "bell": np.round(bell, 3).tolist(),
        "books": [np.round(book, 4).tolist() for book in books],
        "shares": [np.round(share, 4).tolist() for share in counts],
        "says": says,
    }
    figure_ = pictures.new_figure(5.2, 2.9)
    axes = figure_.subplots()
    axes.plot(grid, bell, color=pictures.INK)
    axes.vlines(books[start], 0, np.exp(-((books[start] * end) ** 2) / 2), color=pictures.LORA)
    axes.set(xlabel="weight, divided by the largest of its block", yticks=[])
    still = pictures.show(
        figure_,
        "A bell curve with 16 vertical lines under it, the levels of NF4: close together in the middle, where most "
        "weights are, and far apart at the ends.",
    )
    slider = Slider("bits", "bits a weight", [str(b) for b in BITS], start)
    caption = (
        f"Left: each line is a level, under the distribution of the weights. Right: how many weights become that "
        f"level. "
        f"Both are of {blocks.size:,} normally distributed weights in blocks of {BLOCK}. With 4 bits this is NF4."
    )
    return figure("levels", [slider], says[start], still, data, caption)
