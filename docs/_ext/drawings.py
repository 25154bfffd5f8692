"""Drawings of boxes, arrows and numbers, made by the build from layers that it runs.

A drawing is 330 units wide, no more than a phone has, and its letters are 12 units high. So a phone never makes it
smaller than it was drawn, and a desk shows it larger. Lines and letters take the colour of the page's own text.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable
from itertools import pairwise, product

import hands
import numpy as np
import pictures
from pages import Drawn

from minilora import Attention, DoRAAdapter, Linear, Llama, LlamaConfig, LoRA, LoRALinear, adapt, adapters, mse
from minilora.cli.figures import BASE, LORA
from minilora.language.memory import cache_bytes
from minilora.layer import Layer, rebuild
from minilora.layers.attention import softmax
from minilora.layers.rotary import Rotary, frequencies
from minilora.variants.dora import DoRA

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

    def numbers(self, x: float, y: float, matrix: np.ndarray, **look: object) -> None:
        """Write a matrix around the point (x, y), a row below the other, each column as wide as its numbers."""
        words = [[f"{v:g}".replace("-", "\u2212") for v in row] for row in np.atleast_2d(matrix)]
        wide = [7 * max(map(len, column)) for column in zip(*words, strict=True)]
        right = x - (sum(wide) + 8 * (len(wide) - 1)) / 2
        top = y - 7 * (len(words) - 1)
        for column, width in zip(zip(*words, strict=True), wide, strict=True):
            right += width
            for row, word in enumerate(column):
                self.text(right, top + 14 * row, word, anchor="end", **look)
            right += 8

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


# --- the worked numbers of the derivation, as a graph -----------------------------------------------------------------

WORKED = {
    "x": np.array([[1.0, 1], [2, 0], [0, 3]]),
    "W": np.array([[1.0, 0], [2, 1]]),
    "A": np.array([[2.0, -1]]),
    "B": np.array([[1.0], [-1]]),
    "t": np.array([[0.0, 1], [13, -10], [-9, 12]]),
}
"""The example of the derivation, with alpha = 2."""
STEPS = {
    "1": ("h", "x A", "h = x Aᵀ"),
    "2": ("update", "h B", "s h Bᵀ"),
    "7": ("base", "x W", "x Wᵀ"),
    "11": ("y", "base update", "y, the sum"),
    "15": ("L", "y t", "L"),
    "16": ("dy", "y t", "dy"),
    "3": ("dB", "dy h", "dB"),
    "4": ("dh", "dy B", "dh"),
    "5": ("dA", "dh x", "dA"),
    "10": ("dx_base", "dy W", "dy W"),
    "6": ("dx_adapter", "dh A", "dh A"),
    "12": ("dx", "dx_base dx_adapter", "dx, the sum"),
}
"""The equations on the graph, in the order in which they are computed: what each gives, what it reads, its button."""


def worked() -> dict[str, np.ndarray]:
    """Return every number of the graph, from the layers' own forward and backward."""
    x, W, A, B, t = WORKED.values()
    layer = LoRALinear(Linear(W), LoRA(A, B, alpha=2))
    update, beside = layer.adapter.forward(x)
    h = beside[-1]
    y, cache = layer.forward(x)
    L, dy = mse(y, t)
    dx, grads = layer.backward(dy, cache)
    dx_adapter, _ = layer.adapter.backward(dy, beside)
    # dh is what an adapter that ends at h passes on: B and s alone, as a layer.
    dh = Linear(layer.adapter.scaling * B).input_gradient(dy)
    sides = {
        "base": layer.base(x),
        "update": update,
        "dx_base": layer.base.input_gradient(dy),
        "dx_adapter": dx_adapter,
    }
    found = {**WORKED, "h": h, "y": y, "L": np.array([[L]]), "dy": dy, "dh": dh, "dx": dx}
    return {**found, "dA": grads["lora_A"], "dB": grads["lora_B"], **sides}


def roles(name: str) -> dict[str, str]:
    """Return the numbers of the equations that give an array, and of those that read it, as attributes of a group."""
    gives = [number for number, (result, _, _) in STEPS.items() if result == name]
    reads = [number for number, (_, factors, _) in STEPS.items() if name in factors.split()]
    return {key: " ".join(found) for key, found in (("data_eq", gives), ("data_reads", reads)) if found}


def graph() -> Drawn:
    """Return the worked example as a graph: on each edge what goes forward, and what comes back.

    Each array, box and arrow is a group of its own: an equation lights what it gives, and less what it reads.
    """
    n, drawing = worked(), Drawing(516)
    left, right, middle = 92, 214, 153

    def array(name: str, x: float, y: float, *way: tuple, words: str = "", beside: tuple = (0, -29), back=False):
        """Draw an array and the edge along which it goes, with its name beside it."""
        colour = {"fill": BACK} if back else {}
        drawing.begin(**roles(name))
        if way:
            drawing.arrow(*way, **({"colour": BACK, "stroke_dasharray": "4 3"} if back else {}))
        drawing.text(x + beside[0], y + beside[1], words or name, font_style="italic", **colour)
        drawing.numbers(x, y, n[name], **colour)
        drawing.end()

    def read(numbers: str, *way: tuple):
        """Draw the arrow along which equations read an array."""
        drawing.begin(data_reads=numbers)
        drawing.arrow(*way)
        drawing.end()

    def box(number: str, backward: str, x: float, y: float, words: str, width: float = 56, **look: object):
        """Draw the box where an equation is computed, and the equations of its backward."""
        drawing.begin(data_eq=number, data_reads=backward)
        drawing.box(x, y, width, 24, words, **look)
        drawing.end()

    # x and its two ways
    array("x", middle - 24, 30, beside=(-30, 0))
    array("dx", middle + 24, 30, beside=(36, 0), back=True)
    for side, number in ((left, "7"), (right, "1")):
        read(number, (middle + (side - middle) * 0.15, 58), (side - 4, 146))
    array("dx_base", left - 32, 106, (left + 6, 146), (middle + 2, 62), words="dy W", back=True)
    array("dx_adapter", right + 36, 96, (right + 6, 146), (middle + 22, 58), words="dh A", back=True)
    box("7", "10", left, 158, "x Wᵀ")
    box("1", "5 6", right, 158, "x Aᵀ")
    drawing.begin(**roles("W"))
    drawing.text(24, 184, "frozen")
    drawing.end()
    array("W", 22, 161, beside=(0, -23))
    read("7", (44, 158), (left - 29, 158))
    # A, and h
    array("A", 302, 143, beside=(0, -17))
    read("1", (284, 155), (right + 29, 155))
    array("dA", 302, 175, (right + 29, 162), (284, 162), beside=(0, 16), back=True)
    array("h", right - 24, 222, (right - 4, 171), (right - 4, 257))
    array("dh", right + 26, 222, (right + 4, 257), (right + 4, 171), back=True)
    box("2", "3 4", right, 270, "s h Bᵀ")
    array("B", 300, 243, beside=(0, -21))
    read("2", (284, 266), (right + 29, 266))
    array("dB", 300, 290, (right + 29, 274), (284, 274), beside=(0, 22), back=True)
    # the sum
    array("base", left - 14, 262, (left, 171), (middle - 14, 352))
    array("update", right + 24, 340, (right - 4, 283), (middle + 12, 350))
    box("11", "", middle, 360, "+", 24, rx=12)
    array("y", middle - 38, 414, (middle - 4, 373), (middle - 4, 447))
    array("dy", middle + 36, 414, (middle + 4, 447), (middle + 4, 373), back=True)
    box("15", "16", middle, 460, "mean of (y \u2212 t)²", 130)
    array("t", 298, 458, beside=(0, -30))
    read("15 16", (274, 460), (middle + 66, 460))
    drawing.begin(**roles("L"))
    drawing.arrow((middle, 473), (middle, 494))
    drawing.text(middle, 504, f"L = {n['L'].item():g}", font_weight="bold")
    drawing.end()
    buttons = "".join(
        f'<button type="button" data-eq="{number}">({number}) {html.escape(words)}</button>'
        for number, (_, _, words) in STEPS.items()
    )
    svg = drawing.svg(
        "A graph of the worked example. x goes down two ways: through W on the left; through A, to h, and through B on "
        "the right. Their sum is y, and with t it gives the loss, 12. Beside each arrow stand the numbers that go "
        "forward, and those that come back: dy, dh, dB, dA and the two parts of dx."
    )
    return Drawn(
        f'<figure class="picture graph" id="graph">{svg}<div class="steps" hidden>{buttons}</div>'
        "<figcaption>Solid: forward. Dashed: backward. An equation, or its button, makes bold what it computes, "
        "and leaves what it reads.</figcaption></figure>"
    )


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


def place(drawing: Drawing, x: float, y: float, name: str, adapted: bool, width: float = 66) -> None:
    """Draw a linear layer, with an adapter at its side where it has one."""
    drawing.box(x, y, width, 24, name, fill=BASE, fill_opacity=0.18)
    if adapted:
        drawing.box(x + width / 2 + 7, y, 8, 24, fill=LORA, stroke="none", rx=2)


def attention(layer: Attention) -> Drawn:
    """Return the drawing of an attention layer, with an adapter beside each linear layer that has one."""
    has = set(adapters(layer))
    drawing, columns = Drawing(352), {"q_proj": 55, "k_proj": 158, "v_proj": 262}
    drawing.text(158, 10, f"x, {layer.shape[1]} numbers a position")
    for name, x in columns.items():
        drawing.arrow((158, 18), (x, 52))
        place(drawing, x, 65, name, name in has)
        drawing.arrow((x, 78), *([(x, 243), (222, 243)] if name == "v_proj" else [(x, 118)]))
        drawing.text(x + 10, 96, name[0], anchor="start")
    drawing.box(106, 131, 150, 24, "scores S = c q · k")
    drawing.box(106, 187, 150, 24, "shares P: softmax")
    drawing.arrow((106, 144), (106, 174))
    drawing.text(114, 158, "later positions masked", anchor="start")
    drawing.arrow((106, 200), (106, 231))
    drawing.text(114, 216, "who reads from whom", anchor="start")
    drawing.box(130, 243, 182, 24, "mixture o = P v")
    drawing.arrow((130, 256), (130, 284))
    place(drawing, 130, 297, "o_proj", "o_proj" in has)
    drawing.arrow((130, 310), (130, 334))
    drawing.text(130, 342, "y")
    names = " and ".join([", ".join(sorted(has)[:-1]), sorted(has)[-1]]) if len(has) > 1 else ", ".join(has)
    return drawing.show(
        "x goes into three layers, q_proj, k_proj and v_proj. q and k make the scores, a softmax makes shares of them, "
        f"the shares mix v into o, and o_proj makes y. Adapters stand beside {names}.",
        f"Blue: the linear layers, where all weights are. Orange: a place for an adapter, {len(has)} in all. Nothing "
        "else trains.",
    )


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


def said(number: float) -> str:
    """Return a number as one writes it by hand: to two digits, a whole one without them."""
    return f"{number:.{0 if number == round(number) else 2}f}".replace("-", "\u2212")


def vector(entries: np.ndarray) -> str:
    """Return a vector as one writes it by hand."""
    return f"({', '.join(map(said, entries))})"


def dot(a: np.ndarray, b: np.ndarray) -> str:
    """Return a sum of products as one writes it by hand."""
    return " + ".join(f"{said(x)}\u00b7{said(y)}" for x, y in zip(a, b, strict=True))


def mixed(weights: np.ndarray, rows: np.ndarray) -> str:
    """Return a weighted sum of rows as one writes it by hand."""
    return " + ".join(f"{said(weight)} {vector(row)}" for weight, row in zip(weights, rows, strict=True))


def by_hand(t: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, do: np.ndarray) -> Drawn:
    """Return what one head computes for position t, with its numbers: forward goes down, backward comes up."""
    n, drawing, root = of_position(t, q, k, v, do), Drawing(382), f"/ \u221a{q.shape[1]}"
    S, P, o, dP, dS, dq = n.values()
    q, do, k, v = q[t - 1], do[t - 1], k[:t], v[:t]
    e, mean, index = np.exp(S), said(P @ dP), "\u2080\u2081\u2082\u2083\u2084"[t]
    forward = [
        ("", f"q{index} = {vector(q)}", ["k = " + ", ".join(map(vector, k)), "v = " + ", ".join(map(vector, v))]),
        ("att.1", "S", [f"({dot(q, row)}) {root} = {said(s)}" for row, s in zip(k, S, strict=True)]),
        ("att.2", "P", [f"{said(x)} / {said(e.sum())} = {said(p)}" for x, p in zip(e, P, strict=True)]),
        ("att.3", f"o{index}", [mixed(P, v), f"= {vector(o)}"]),
    ]
    score = [f"{said(p)} ({said(d)} \u2212 {mean}) = {said(s)}" for p, d, s in zip(P, dP, dS, strict=True)]
    backward = [
        ("att.7", f"dq{index}", [f"({mixed(dS, k)})", f"{root} = {vector(dq)}"]),
        ("att.6", "dS", [f"{dot(P, dP)} = {mean}", *score]),
        ("att.5", "dP", [f"{dot(do, row)} = {said(d)}" for row, d in zip(v, dP, strict=True)]),
        ("", f"do{index} = {vector(do)}", ["from the layer above"]),
    ]
    tops, high, left, right = [22, 116, 210, 304], 70, 82, 248
    for x, column, colour in ((left, forward, "currentColor"), (right, backward, BACK)):
        drawing.text(x, 9, "forward" if x == left else "backward", fill=colour)
        for top, (number, name, lines) in zip(tops, column, strict=True):
            drawing.box(x, top + high / 2, 160, high)
            first = top + high / 2 - 7.5 * len(lines)
            drawing.begin(**({"font_weight": 600} if number else {}))
            if number:
                drawing.parts.append(f'<a href="#eq-{number.replace(".", "-")}">')
                drawing.text(x - 74, first, f"({number})", anchor="start")
                drawing.parts.append("</a>")
            drawing.text(x, first, name, **({} if number else {"fill": colour}))
            drawing.end()
            for i, line in enumerate(lines, 1):
                drawing.text(x, first + 15 * i, line, fill=colour)
    for above, below in pairwise(tops):
        drawing.arrow((left, above + high), (left, below))
        drawing.arrow((right, below), (right, above + high), colour=BACK, stroke_dasharray="4 3")
    drawing.arrow((left + 60, tops[2]), (right - 60, tops[1] + high))
    return drawing.show(
        f"Position {t} by hand. On the left, downwards: q and k give the scores S, these the shares P, and P mixes v "
        "into o. On the right, upwards: do and v give dP; with P it gives dS; dS and k give dq. Each step stands there "
        "with its numbers.",
        f"Position {t} reads from {t} positions, so S, P, dP and dS have {t} lines each. dS reads P and dP.",
    )


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


# --- a block, and the way of dy ---------------------------------------------------------------------------------------


def block(model: Llama) -> Drawn:
    """Return the drawing of a model's first block, with the places of its adapters."""
    has = {path.rpartition(".")[2] for path in adapters(model) if ".layers.0." in path}
    drawing = Drawing(470)
    main = 24
    drawing.text(main, 10, "x")
    drawing.arrow((main, 18), (main, 204))
    drawing.arrow((main, 34), (150, 34), (150, 42))
    drawing.box(150, 54, 74, 22, "RMSNorm")
    for name, x in {"q_proj": 84, "k_proj": 178, "v_proj": 272}.items():
        drawing.arrow((150, 66), (x, 84))
        place(drawing, x, 97, name, name in has)
        drawing.arrow((x, 110), (x, 128))
    drawing.box(178, 140, 254, 24, "attention: shares, mixture")
    drawing.arrow((178, 152), (178, 165))
    place(drawing, 178, 178, "o_proj", "o_proj" in has)
    drawing.arrow((178, 190), (178, 214), (main + 12, 214))
    drawing.box(main, 214, 22, 22, "+", rx=11)
    drawing.arrow((main, 226), (main, 412))
    drawing.arrow((main, 242), (150, 242), (150, 250))
    drawing.box(150, 262, 74, 22, "RMSNorm")
    for name, x in {"gate_proj": 104, "up_proj": 232}.items():
        drawing.arrow((150, 274), (x, 292))
        place(drawing, x, 305, name, name in has, 76)
    drawing.arrow((104, 318), (104, 336))
    drawing.box(104, 348, 76, 24, "SiLU: gate")
    drawing.arrow((232, 318), (232, 348), (143, 348))
    drawing.arrow((104, 360), (104, 373))
    place(drawing, 104, 386, "down_proj", "down_proj" in has, 76)
    drawing.arrow((104, 398), (104, 422), (main + 12, 422))
    drawing.box(main, 422, 22, 22, "+", rx=11)
    drawing.arrow((main, 434), (main, 458))
    drawing.text(main + 12, 452, "to the next block", anchor="start")
    return drawing.show(
        "A block. x goes down a line at the left. Two branches leave it and are added to it again: a norm and "
        "attention with q, k, v and o_proj; and a norm and the MLP with gate, up and down_proj. Beside each of these "
        f"{len(has)} stands an adapter.",
        f"The line at the left is x, to which each branch adds. Blue: the linear layers. Orange: the {len(has)} places "
        "for adapters.",
    )


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


# --- DoRA -------------------------------------------------------------------------------------------------------------


def two_arrows() -> Drawn:
    """Return the drawing of one row of a weight with two inputs under DoRA."""
    W, A, B, m = np.array([[2.4, 0.5]]), np.array([[-0.1, 1.4]]), np.array([[1.0]]), np.array([2.2])
    layer = DoRA(Linear(W), DoRAAdapter(A, B, 1.0, magnitude=m))
    V, merged = layer.direction()[0], layer.merge().weight[0]
    drawing, (x0, y0), unit = Drawing(216), (22, 206), 84
    at = {name: (x0 + unit * v[0], y0 - unit * v[1]) for name, v in (("W", W[0]), ("V", V), ("merged", merged))}
    angles = np.linspace(math.atan2(W[0, 1], W[0, 0]) - 0.1, math.atan2(V[1], V[0]) + 0.2, 30)
    arc = [(x0 + unit * m[0] * math.cos(a), y0 - unit * m[0] * math.sin(a)) for a in angles]
    corners = " ".join(f"{x:.4g},{y:.4g}" for x, y in arc)
    drawing.parts.append(f'<polyline points="{corners}" fill="none" stroke="currentColor" stroke-dasharray="2 4"/>')
    drawing.arrow((x0, y0), at["merged"], colour=LORA, stroke_width=7, head=18)
    drawing.arrow((x0, y0), at["W"], colour=BASE, stroke_width=2.4, head=10)
    drawing.arrow(at["W"], at["V"], stroke_dasharray="4 3")
    drawing.arrow((x0, y0), at["V"], stroke_width=1.6, head=9)
    drawing.text(150, 203, f"a row of W, {np.linalg.norm(W):.2f} long")
    drawing.text(at["W"][0] + 6, (at["W"][1] + at["V"][1]) / 2, "s B A", anchor="start")
    drawing.text(at["V"][0] - 6, at["V"][1] - 10, f"V = W + s B A, n = {layer.norm()[0]:.2f}")
    drawing.text(arc[-1][0] + 2, arc[-1][1] - 12, f"m = {m[0]:g}")
    drawing.text(72, y0 - 122, "the new row, m V / n")
    return drawing.show(
        f"Two arrows from one point: a row of W, and V, which is W plus the adapter's change and points elsewhere. The "
        f"new row lies along V and ends at the circle of radius m, {m[0]:g}, whatever length V has.",
        "The adapter turns the row: only V's direction counts. The magnitude m sets its length, on the dotted circle.",
    )
