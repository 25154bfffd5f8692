"""What derivation.md asserts and shows; the names are the page's own."""

import html
import re

import numpy as np
from pages import DOCS, holds, own_picture, picture, says

from minilora import LoRA
from minilora.verify.trace import by_pencil

# %% A check between the two

rng = np.random.default_rng(0)
adapter = LoRA(rng.standard_normal((3, 5)), rng.standard_normal((4, 3)), alpha=6.5)
x, dy, E = rng.standard_normal((7, 5)), rng.standard_normal((7, 4)), rng.standard_normal((3, 3))
A, B, s, cache = adapter.lora_A, adapter.lora_B, adapter.scaling, adapter.forward(x)[1]
dx, grads = adapter.backward(dy, cache)
dA, dB, dh = grads["lora_A"], grads["lora_B"], dx @ np.linalg.pinv(A)  # dx = dh A
names = {"A": A, "B": B, "s": s, "x": x, "h": cache.kept[-1], "dy": dy, "dA": dA, "dB": dB, "dh": dh, "dx": dx}
unit = np.eye(B.size).reshape(*B.shape, *B.shape)  # [o, k] is 1 at the entry o, k of B
dydB = np.array([[LoRA(A, one, alpha=6.5)(x) for one in row] for row in unit]).transpose(2, 3, 0, 1)
holds("dB_{ok} =", **names, dydB=dydB)
holds(r"$\partial y_{no} / \partial B_{ok} =", **names, dydB=dydB)
holds("dh_{nk} =", **names)
holds("dA_{ki} =", **names)
holds(r"dA\,A^\top =", **names, **{"dAA^top": dA @ A.T})
assert np.allclose(dA @ A.T, B.T @ dB)
names |= {"dA": rng.standard_normal((3, 5)), "dB": rng.standard_normal((4, 3))}  # of a loss that sees more than B A
loss = lambda A, B: np.sum(names["dA"] * A) + np.sum(names["dB"] * B)
moved = loss(A + 0.1 * E @ A, B - 0.1 * B @ E) - loss(A, B)
assert abs(moved) > 0.1
holds(r"\Delta L", **names, E=E, varepsilon=0.1, DeltaL=moved)

# %% By pencil, with numbers

says("three rows, two inputs, two outputs, rank 1 and $\\alpha = 2$, so $s = 2$")
assert x.shape == (3, 2) and layer.base.weight.shape == (2, 2) and (layer.adapter.rank, layer.adapter.scaling) == (1, 2)
says(f"whether the gradient is ${dA[0, 0]:g}$ or {dB[1, 0]:g}", f"The loss falls from {L:g} to\n")
holds(r"A \leftarrow", A=A.round(6))
holds(r"B \leftarrow", B=B.round(6))
holds("L = 7", L=after.round(4))

layer = LoRALinear(layer.base, LoRA(np.array([[2.0, -1]]), np.array([[1.0], [-1]]), alpha=2))  # before Adam's step
first = {"x": x, "t": t, "W": layer.base.weight, "A": layer.adapter.lora_A, "B": layer.adapter.lora_B}
traced, *given = by_pencil()
pairs = {"x": given[0], "t": given[1], "W": traced.base.weight, "A": traced.adapter.lora_A, "B": traced.adapter.lora_B}
assert traced.scaling == layer.scaling and all((first[name] == array).all() for name, array in pairs.items())
update, beside = layer.adapter.forward(x)
y, cache = layer.forward(x)
loss, dy = mse(y, t)
first |= {"h": beside.kept[-1], "base": layer.base(x), "update": update, "y": y, "dy": dy}
dx, grads = layer.backward(dy, cache)
first |= {"dA": grads["lora_A"], "dB": grads["lora_B"], "dx": dx, "dy W": layer.base.input_gradient(dy)}
first |= {"dh": layer.adapter.scaling * dy @ first["B"], "dh A": layer.adapter.backward(dy, beside)[0]}

for start in (
    r"x = \begin", r"A = \begin", r"h = x A", "\\begin{aligned}\ny", "y - t", r"L = \frac", r"dy = \begin", r"dB = 2",
    r"dh = 2", "\\begin{aligned}\ndA", "\\begin{aligned}\ndx",
):  # fmt: skip
    holds(start, **first, **{"y-t": y - t, "L": loss})
says(*(f"{a:g} \\cdot 2 - {b:g} \\cdot 1" for a, b in x), f"multiply each error by $2 / {y.size}$")
says(*(f"2 \\cdot {a:g} - 6 \\cdot {b:g} + 4 \\cdot {c:g}" for a, b, c in x.T))
sides = (grads["lora_A"] @ first["A"].T).item(), (first["B"].T @ grads["lora_B"]).item()
says("= -10 \\cdot 2 - 14 \\cdot 1 = {:g}$, and $B^\\top dB = -12 - 22 = {:g}$".format(*sides))

graph = own_picture(DOCS / "learn" / "derivation.md", "graph")
for group in re.findall(r"<g [^>]*>.*?</g>", graph, re.S):  # a name, and its numbers: each column from above
    if name := re.search(r'italic"[^>]*>(.*?)<', group):
        numbers = re.findall(r">(\u2212?\d+)</text>", group)
        assert [float(n.replace("\u2212", "-")) for n in numbers] == first.pop(name[1]).T.ravel().tolist(), name[1]
assert not first and f">L = {loss:g}<" in graph
STEPS = "1 h = x Aᵀ, 2 s h Bᵀ, 7 x Wᵀ, 11 y: the sum, 15 L, 16 dy, 3 dB, 4 dh, 5 dA, 10 dy W, 6 dh A, 12 dx: the sum"
buttons = "".join(
    f'<button type="button" data-eq="{number}">({number}) {html.escape(words)}</button>'
    for number, _, words in (step.partition(" ") for step in STEPS.split(", "))
)
caption = "Solid: forward. Dashed: backward. An equation, or its button, makes bold what it computes, and leaves what it reads."
figure = f'<figure class="picture graph" id="graph">{graph}<div class="steps" hidden>{buttons}</div>'
picture("graph", f"{figure}<figcaption>{caption}</figcaption></figure>")

# %% Adam

assert np.allclose(path(1), path(100), atol=1e-8)

# %% Do you remember?

rng = np.random.default_rng(0)
start = LoRA.init(4, 3, rank=2, alpha=2, rng=rng, dtype="float64")
x, dy = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 3))  # batch, positions, width
dx, grads = start.backward(dy, start.forward(x)[1])
assert not dx.any() and not grads["lora_A"].any() and grads["lora_B"].all()
assert dy.T.shape == dy.shape[::-1] == (3, 5, 2) and dy.ndim == 3
says("`dy.T` of three axes turns them all", "`.T` turns all three axes around")
