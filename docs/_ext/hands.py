"""Interactive pictures: native sliders, a drawing, plus a sentence that states its numbers.

minilora computes everything on a grid when the site is built. `_static/hands.js` looks the numbers up and draws
them. Without JavaScript, a reader sees the drawing and the sentence of the initial position.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pages
import pictures
from ranks import change

from minilora import LoRA, train


@dataclass(frozen=True)
class Slider:
    """A native range input whose positions select from a list of values."""

    name: str
    label: str
    values: Sequence[str]  # as they are displayed and read aloud
    start: int

    def html(self, figure: str) -> str:
        """Return the label, the input and the displayed value."""
        own, last = f"{figure}-{self.name}", len(self.values) - 1
        wide = max(map(len, self.values))  # keeps the slider's width constant for all values
        value = html.escape(self.values[self.start])
        return (
            f'<div class="control"><label for="{own}">{html.escape(self.label)}</label>'
            f'<input type="range" id="{own}" name="{self.name}" min="0" max="{last}" step="1" value="{self.start}" '
            f'aria-valuetext="{value}" autocomplete="off">'
            f'<output for="{own}" style="min-width: {wide}ch">{value}</output></div>'
        )


def figure(
    name: str,
    sliders: Sequence[Slider],
    says: str,
    still: str,
    data: dict[str, Any],
    caption: str,
    kind: str = "hands",
) -> str:
    """Return a picture with its sliders, its sentence, its still drawing and its data."""
    data = {"values": {slider.name: list(slider.values) for slider in sliders}, **data}
    return (
        f'<figure class="{kind}" id="{name}" data-{"kind" if kind == "hands" else "live"}="{name}">'
        f'<div class="controls" hidden>{"".join(slider.html(name) for slider in sliders)}</div>'
        f'<p class="says" aria-live="polite">{html.escape(says)}</p>'
        f'<div class="drawing">{still}</div>'
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
"""Directions of the first singular vectors of the picture's matrix, in degrees; `LENGTHS` has its singular values."""


def toward(degrees: float) -> np.ndarray:
    """Return the unit vector in that direction."""
    return np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))])


def example_matrix() -> np.ndarray:
    """Return the picture's matrix: a sum of two outer products."""
    return LENGTHS[0] * np.outer(toward(OUTPUTS), toward(INPUTS)) + LENGTHS[1] * np.outer(
        toward(OUTPUTS + 90), toward(INPUTS + 90)
    )


def circle(start: int = 1) -> str:
    """Return the picture of a circle with the ellipse to which a matrix maps it."""
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
    caption = "Left: all arrows x of length 1. Right: what M makes of them. Two perpendicular arrows, drawn thin, "
    caption += f"stay perpendicular and become {LENGTHS[0]:g} and {LENGTHS[1]:g} long: the singular values."
    slider = Slider("angle", "direction of x", [f"{angle}\N{DEGREE SIGN}" for angle in angles], start)
    return figure(
        "circle",
        [slider],
        says[start],
        still,
        data,
        caption,
    )


def nearest_on_a_line(start: int = 1) -> str:
    """Return the picture of the best matrix of rank 1 whose outputs lie on a given line, for each line."""
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
    lines = {"error": (angles, errors, pictures.LORA_COLOR)}
    still = pictures.show(
        pictures.lines(lines, xlabel="direction of the line", ylabel="error"),
        "The squared error by the direction of the line. It is least at 60 degrees, where the ellipse is longest.",
    )
    caption = "Left: each point of the ellipse goes to the nearest point of the line, the best that rank 1 can do "
    caption += "if its outputs lie there. Right: the squared error, summed, for each direction of the line."
    slider = Slider("line", "direction of the line", [f"{angle}\N{DEGREE SIGN}" for angle in angles], start)
    return figure("line", [slider], says[start], still, data, caption)
