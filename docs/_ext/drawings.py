"""Drawings of boxes, arrows and numbers, made by the build from layers that it runs.

A drawing is 330 units wide, no more than a phone has, and its letters are 12 units high. So a phone never makes it
smaller than it was drawn, and a desk shows it larger. Lines and letters take the colour of the page's own text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from itertools import product

import hands
import numpy as np
import pictures
from pages import Drawn

from minilora import Attention, Linear, Llama, LlamaConfig, adapt, adapters, mse
from minilora.cli.figures import BASE, LORA
from minilora.language.memory import cache_bytes
from minilora.layer import Layer, rebuild
from minilora.layers.attention import softmax
from minilora.layers.rotary import Rotary, frequencies

WIDTH = 330
BACK = "var(--color-back, #c8591c)"  # of what the backward computes; conf.py has one for light and one for dark


class Drawing:
    """An SVG picture that grows element by element."""

    def __init__(self, height: float) -> None:
        self.height, self.parts = height, list[str]()

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", **look: object) -> None:
        """Write words, their middle at the height y."""
        look = look if anchor == "middle" else {"text_anchor": anchor, **look}
        self.parts.append(f'<text x="{x:g}" y="{y + 4:g}"{attributes(look)}>{html.escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, words: str = "", **look: object) -> None:
        """Draw a box around the point (x, y), with words in it."""
        look = {"fill": "none", "stroke": "currentColor", "rx": 3, **look}
        place = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f"<rect {place}{attributes(look)}/>")
        if words:
            self.text(x, y, words)

    def arrow(
        self, *points: tuple[float, float], colour: str = "currentColor", head: float = 6, **look: object
    ) -> None:
        """Draw a line through points, with a head at the last."""
        (x0, y0), (x1, y1) = points[-2:]
        far = math.hypot(x1 - x0, y1 - y0)
        dx, dy = (x1 - x0) / far, (y1 - y0) / far
        ends = [*points[:-1], (x1 - dx * head / 2, y1 - dy * head / 2)]
        look = {"fill": "none", "stroke": colour, "stroke-width": 1.4, **look}
        self.parts.append(f'<polyline points="{" ".join(f"{x:.4g},{y:.4g}" for x, y in ends)}"{attributes(look)}/>')
        wings = [(x1 - dx * head + side * dy * head / 2, y1 - dy * head - side * dx * head / 2) for side in (-1, 1)]
        corners = " ".join(f"{x:.4g},{y:.4g}" for x, y in ((x1, y1), *wings))
        self.parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def begin(self, **look: object) -> None:
        """Open a group."""
        self.parts.append(f"<g{attributes(look)}>")

    def end(self) -> None:
        """Close it."""
        self.parts.append("</g>")

    def svg(self, alt: str) -> str:
        """Return the picture, with the text that stands for it where it cannot be seen."""
        return (
            f'<svg class="drawn" viewBox="0 0 {WIDTH} {self.height:g}" width="{WIDTH}" role="img" '
            f'aria-label="{html.escape(alt, quote=True)}" font-size="12" text-anchor="middle" fill="currentColor" '
            f'style="max-width: 100%; height: auto">{"".join(self.parts)}</svg>'
        )

    def show(self, alt: str, caption: str) -> Drawn:
        """Return the picture as part of the page."""
        return Drawn(f'<figure class="picture">{self.svg(alt)}<figcaption>{html.escape(caption)}</figcaption></figure>')


def attributes(look: dict[str, object]) -> str:
    """Return attributes of an element; ``stroke_width`` is ``stroke-width``."""
    named = {name.replace("_", "-"): value for name, value in look.items()}  # of two values, the later one
    return "".join(f' {name}="{html.escape(str(value))}"' for name, value in named.items())


# --- the way of dy ----------------------------------------------------------------------------------------------------


def reached(model: Layer, run: Callable[[Layer], None]) -> dict[str, np.ndarray]:
    """Return the dy that came to each layer whose backward ran, by the layer's path.

    `run` takes a copy of the model, whose layers keep a record, and does a forward and a backward.
    """
    arrived = {}

    def watch(path: str, layer: Layer) -> Layer:
        plain = layer.backward

        def backward(dy, cache, **options):
            arrived[path] = dy
            return plain(dy, cache, **options)

        layer.backward = backward
        return layer

    run(rebuild(model, layer=watch))
    return arrived


FLOWS = {"colour": BACK, "stroke_dasharray": "4 3", "class": "flows"}
"""The look of an arrow along which dy goes: it moves, where a reader's system does not ask for less."""


# --- an attention head ------------------------------------------------------------------------------------------------


def of_position(t: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray) -> dict[str, np.ndarray]:
    """Return what one head and its backward compute for position t, the first being 1; the arrays are (T, D).

    S, P, dP and dS are (t,), one entry for each position that t reads from; o and dq are (D,).
    """
    q, do, k, v = q[t - 1], do[t - 1], k[:t], v[:t]
    c = len(q) ** -0.5
    S = c * k @ q
    P, dP = softmax(S), v @ do
    dS = P * (dP - P @ dP)
    return {"S": S, "P": P, "o": P @ v, "dP": dP, "dS": dS, "dq": c * dS @ k}


STRENGTHS = (0.0, 1.0, 2.0)


def small_head() -> tuple[Attention, np.ndarray]:
    """Return the layer and the input whose q, k and v are those of the page's small example."""
    q = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    k = np.array([[1.0, 1.0], [2.0, 0.0], [0.0, -1.0]])
    v = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    # Of x = 1, the unit matrix, x W^T is W^T. A rotation of no speed turns nothing.
    heads = [Linear(np.ascontiguousarray(rows.T)) for rows in (q, k, v)]
    return Attention(*heads, Linear(np.eye(2)), Rotary((1e-30,))), np.eye(3)


DO = np.array([[1.0, -1.0], [1.0, 2.0], [-1.0, 1.0]])
"""The gradient of that example's output."""


def adapted_head(on_q: float, on_v: float) -> dict[str, np.ndarray]:
    """Return what that layer computes with adapters of these strengths beside q_proj and v_proj, and what comes back.

    P and dS are (3, 3); o, dy, dq and dv are (3, 2). Of dA and dB of each adapter there is the length, (1, 1).
    """
    layer, x = small_head()
    layer = adapt(layer, ["q_proj", "v_proj"], rank=1, alpha=1, rng=np.random.default_rng(0))
    factors = {
        "q_proj": ([[0.0, 0.0, 1.0]], [[-1.0], [-2.0]], on_q),
        "v_proj": ([[0.0, 1.0, 0.0]], [[1.0], [1.0]], on_v),
    }
    for name, (A, B, strength) in factors.items():
        adapters(layer)[name].lora_A[...] = A
        adapters(layer)[name].lora_B[...] = strength * np.array(B)
    y, cache = layer.forward(x)
    *qkv, P = (array.reshape(3, -1) for array in cache[-1])
    dS = [np.pad(of_position(t, *qkv, DO)["dS"], (0, 3 - t)) for t in (1, 2, 3)]
    _, grads = layer.backward(DO, cache, need_dx=False)
    arrived = reached(layer, lambda watched: watched.backward(DO, watched.forward(x)[1], need_dx=False))
    arrays = {"P": P, "o": y, "dS": np.array(dS), "dy": DO, "dq": arrived["q_proj"], "dv": arrived["v_proj"]}
    return arrays | {name: np.atleast_2d(np.linalg.norm(gradient)) for name, gradient in grads.items()}


GRIDS = {
    "P": ("shares P", 62, 48),
    "o": ("o = P v", 232, 48),
    "dS": ("gradient dS", 62, 151),
    "dy": ("dy = do", 232, 151),
    "dq": ("dq", 81, 268),
    "dv": ("dv", 232, 268),
    "q_proj.lora_A": ("|dA|", 81, 386),
    "q_proj.lora_B": ("|dB|", 119, 386),
    "v_proj.lora_A": ("|dA|", 232, 386),
    "v_proj.lora_B": ("|dB|", 270, 386),
}
"""The title of each grid of numbers, and the place of its first cell."""


def grids(arrays: dict[str, np.ndarray]) -> Drawing:
    """Return the drawing of the shares and the output, and of the way of dy down to the adapters: a cell a number."""
    drawing, wide = Drawing(424), 38
    for name, (title, left, top) in GRIDS.items():
        above = 38 if name in ("P", "o") else 20
        drawing.text(left + wide / 2 * (arrays[name].shape[1] - 1), top - above, title)
        for i, j in np.ndindex(*arrays[name].shape):
            number, full = cell(arrays[name][i, j])
            drawing.begin(data_cell=f"{name} {i}{j}")
            colour = LORA if arrays[name][i, j] >= 0 else BASE
            drawing.box(left + wide * j, top + 27 * i, wide - 1, 26, number, fill=colour, fill_opacity=full, rx=0)
            drawing.end()
    for i, top in product(range(3), (GRIDS[name][2] for name in ("P", "dS", "dq"))):
        drawing.text(0, top + 27 * i, f"t = {i + 1}", anchor="start", font_size=11)
    for i in range(3):
        drawing.text(62 + wide * i, 28, f"u = {i + 1}")
    for start, end in (
        ((328, 178), (292, 178)),
        ((211, 178), (160, 178)),
        ((100, 219), (100, 238)),
        ((251, 219), (251, 238)),
        ((100, 336), (100, 355)),
        ((251, 336), (251, 355)),
    ):
        drawing.arrow(start, end, **FLOWS)
    words = {"(att.6)": (164, 168), "(att.7)": (108, 229), "(att.4)": (259, 229)}
    words |= {"to the adapter on q": (108, 346), "on v": (259, 346)}
    for said_there, (x, y) in words.items():
        drawing.text(x, y, said_there, anchor="start")
    drawing.text(WIDTH / 2, 416, "row t: position t; column u: the one it reads from")
    return drawing


def cell(number: float) -> tuple[str, float]:
    """Return a number as it is written, and how much of its colour its cell has: no more than leaves it legible."""
    return f"{number:z.2f}".replace("-", "\u2212"), round(min(0.4 * abs(number) ** 0.5, 0.6), 2)


def shares(start: int = 1) -> Drawn:
    """Return the picture of what an adapter beside q changes, and one beside v, forward and on the way of dy."""
    before = adapted_head(0, 0)
    cells, says, rows = [], [], []
    for on_q, on_v in product(STRENGTHS, STRENGTHS):
        arrays = adapted_head(on_q, on_v)
        cells.append([cell(float(number)) for name in GRIDS for number in arrays[name].flat])
        moved = [f"{np.abs(arrays['P'] - before['P']).max():.2f}", f"{np.abs(arrays['o'] - before['o']).mean():.2f}"]
        says.append(
            f"Adapter on q times {on_q:g}, on v times {on_v:g}: a share has changed by {moved[0]} at most. "
            f"Outputs have moved by {moved[1]} in the mean."
        )
        rows.append(
            (f"{on_q:g}", f"{on_v:g}", *moved, *(f"{np.linalg.norm(arrays[name]):.2f}" for name in ("dq", "dv")))
        )
    sliders = [
        hands.Slider("on_q", "adapter on q, times", [f"{s:g}" for s in STRENGTHS], start),
        hands.Slider("on_v", "adapter on v, times", [f"{s:g}" for s in STRENGTHS], 0),
    ]
    head = ["q times", "v times", "largest change of a share", "mean change of an output", "length of dq", "of dv"]
    still = grids(adapted_head(STRENGTHS[start], 0)).svg(
        "Grids of numbers. On top the shares of three positions, 3 by 3, and their outputs, 3 by 2. Below, the way of "
        "dy: to the gradient of the scores, from there to dq, and straight to dv; then to the adapters, with the "
        "lengths of dA and dB. The sentence above says what the sliders have changed."
    )
    caption = (
        "The small example above, with adapters of rank 1. The one on q moves the shares; the one on v leaves them and "
        "changes what is read. Dashed: the way of dy, as the layer's backward goes it; dy itself stays. Each row of dS "
        "sums to zero. At times 0 an adapter's B is zero, so its dA is zero. Orange is positive, blue negative."
    )
    said_first = says[start * len(STRENGTHS)]
    return hands.figure(
        "shares",
        sliders,
        said_first,
        Drawn(still),
        pictures.html_table(head, rows),
        {"cells": cells, "says": says},
        caption,
    )


# --- the way of dy through a model ------------------------------------------------------------------------------------


def kept(model: Llama, ids: np.ndarray) -> dict[str, int]:
    """Return how many bytes each step of the decoder keeps for its backward."""
    _, (*_, caches) = model.model.forward(ids)
    return {name: 0 if c is None else cache_bytes(c) for (name, _), c in zip(model.model.steps(), caches, strict=True)}


WHERE: dict[str, str | None] = {
    "all weights": None,
    "all seven, all blocks": "all-linear",
    "q and v of block 2": r".*layers\.2\.self_attn\.[qv]_proj",
    "down of block 1": r".*layers\.1\.mlp\.down_proj",
    "q and v of block 1": r".*layers\.1\.self_attn\.[qv]_proj",
    "q and v of block 0": r".*layers\.0\.self_attn\.[qv]_proj",
}
"""What trains, by what the slider says."""


def small_model(targets: str | None, blocks: int = 3) -> Llama:
    """Return a model of the sizes on the page, by default of as many blocks, with adapters of rank 4 or with none."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, frequencies=frequencies(8, base=10_000.0),
        tie_word_embeddings=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape) / np.sqrt(shape[-1]) for name, shape in config.shapes().items()}
    model = Llama.build(config, arrays)
    return model if targets is None else adapt(model, targets, rank=4, alpha=8, rng=rng)


def way_of_dy() -> Drawn:
    """Return the picture of how far the gradient goes, by where the adapters are, and what the forward keeps."""
    models = {name: small_model(targets) for name, targets in WHERE.items()}
    ids = np.random.default_rng(0).integers(0, 50, (2, 13))
    drawn, says, rows = [], [], []
    for name, model in models.items():

        def run(watched):
            z, cache = watched.forward(ids[:, :-1])
            watched.backward(mse(z, 0 * z)[1], cache)

        called = reached(model, run)
        bytes_of, has = kept(model, ids[:, :-1]), set(adapters(model))
        steps = [("lm_head", "head"), ("model.norm", "norm")]
        for i in reversed(range(len(model.model.layers))):
            steps += [
                (f"model.layers.{i}.mlp", f"block {i}: MLP"),
                (f"model.layers.{i}.self_attn", f"block {i}: attention"),
            ]
        steps.append(("model.embed_tokens", "embedding"))
        drawing, y = Drawing(0), 40
        drawing.text(110, 10, "loss")
        for path, words in steps:
            alive = path in called
            look = {} if alive else {"opacity": 0.6}
            drawing.begin(**look)
            dashes = {"stroke_dasharray": "2 4"}
            drawing.arrow((110, y - 22), (110, y - 11), **(FLOWS if alive else dashes))
            drawing.box(110, y, 136, 22, words, **({} if alive else dashes))
            beside_it = [other for other in has if other.startswith(path + ".")]
            for j in range(len(beside_it)):
                drawing.box(184 + 7 * j, y, 5, 22, fill=LORA, stroke="none", rx=1)
            step = path.removeprefix("model.").removesuffix(".mlp")
            if step in bytes_of:
                drawing.text(
                    322, y + (16 if ".mlp" in path else 0), f"keeps {bytes_of[step] / 1000:.1f} kB", anchor="end"
                )
            drawing.end()
            y += 33
        drawing.height = y - 12
        total = sum(bytes_of.values())
        lowest = [words for path, words in steps if path in called][-1]
        drawn.append(
            drawing.svg(
                f"The model from the loss down to the embedding. What trains: {name}. dy goes down to {lowest}; what "
                "lies below is grey."
            )
        )
        says.append(f"{name}: dy goes down to {lowest}. The forward keeps {total / 1000:.1f} kB for it.")
        rows.append((name, lowest, f"{total / 1000:.1f} kB"))
    slider = hands.Slider("adapters", "what trains", list(models), 1)
    table = pictures.html_table(["what trains", "dy goes down to", "kept for backward"], rows)
    caption = (
        "Coloured arrows: dy. Grey: no backward runs there. Orange bars: adapters. The sizes are of what "
        "the forward kept."
    )
    data = {"pictures": drawn, "says": says}
    return hands.figure("way", [slider], says[1], Drawn(drawn[1]), table, data, caption)


# --- the memory of a training step, by what it is for ----------------------------------------------------------------

KINDS = {"weights": BASE, "trained, gradients, Adam": LORA, "activations, logits": "#888"}


def memory(ways: dict[str, dict[str, int]], tokens: int) -> Drawn:
    """Return the picture of what each way keeps, in bytes by part: a bar of three kinds, and the sizes of two cards."""
    drawing, unit, left = Drawing(54 + 46 * len(ways)), 2.5e-9, 6
    cards = {f"{card} GB": left + card * 1e9 * unit for card in (24, 80)}
    for words, x in cards.items():
        drawing.text(x, 8, words)
    for row, (name, parts) in enumerate(ways.items()):
        x, y = left, 50 + 46 * row
        drawing.text(x, y - 20, f"{name}: {gigabytes(parts)}", anchor="start")
        for kind, colour in KINDS.items():
            width = unit * sum(parts[part] for part in kind.split(", "))
            drawing.box(x + width / 2, y, width, 20, fill=colour, stroke="none", rx=0)
            x += width
        for x in cards.values():
            drawing.box(x, y, 1.5, 26, fill="currentColor", stroke="none", rx=0)
    for (kind, colour), x in zip(KINDS.items(), (2, 64, 214), strict=True):
        drawing.box(x + 5, drawing.height - 12, 10, 10, fill=colour, stroke="none", rx=0)
        drawing.text(x + 14, drawing.height - 12, kind, anchor="start", font_size=10.5)
    says = "; ".join(f"{name} {gigabytes(parts)}" for name, parts in ways.items())
    return drawing.show(
        f"Bars in three parts: {says}.",
        f"A step on {tokens:,} tokens; adapters beside all seven matrices of each layer. The marks: what two usual "
        "graphics cards hold.",
    )


def gigabytes(parts: dict[str, int]) -> str:
    """Return the sum of all parts in words."""
    return f"{sum(parts.values()) / 1e9:.3g} GB"
