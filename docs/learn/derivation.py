"""What derivation.md asserts and shows; the names are the page's own."""

import html
import re

from pages import DOCS, own_picture, picture

# %% By pencil, with numbers

assert L == 12 and dx.tolist() == [[5, -2], [-9, 8], [7, -5]]
assert dA.tolist() == [[-10, 14]] and dB.tolist() == [[-12], [22]] and dA @ [[2], [-1]] == [[1, -1]] @ dB == -34
assert np.allclose(A, [[2.1, -1.1]], atol=1e-8) and np.allclose(B, [[1.1], [-1.1]], atol=1e-8)
assert after.round(4) == 7.0151

layer = LoRALinear(layer.base, LoRA(np.array([[2.0, -1]]), np.array([[1.0], [-1]]), alpha=2))  # before Adam's step
first = {"x": x, "t": t, "W": layer.base.weight, "A": layer.adapter.lora_A, "B": layer.adapter.lora_B}
update, beside = layer.adapter.forward(x)
y, cache = layer.forward(x)
loss, dy = mse(y, t)
first |= {"h": beside[-1], "base": layer.base(x), "update": update, "y": y, "dy": dy}
dx, grads = layer.backward(dy, cache)
first |= {"dA": grads["lora_A"], "dB": grads["lora_B"], "dx": dx, "dy W": layer.base.input_gradient(dy)}
first |= {"dh": layer.adapter.scaling * dy @ first["B"], "dh A": layer.adapter.backward(dy, beside)[0]}

printed = first | {"y - t": y - t, "L": [loss, after.round(4)], r"A \leftarrow": A, r"B \leftarrow": B}
section = (
    (DOCS / "learn" / "derivation.md").read_text(encoding="utf-8").partition("## By pencil")[2].partition("\n## ")[0]
)
for formula in re.findall(r"^\$\$\n(.*?)^\$\$", section, re.S | re.M):
    for part in re.split(r",\s*\\qquad", formula):  # what each is equal to at last
        name = re.match(r"\s*(?:\\begin\{aligned\}\s*)?(\w - \w|\w \\leftarrow|\w+)", part)[1]
        *_, rows = re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", part, re.S) or [part.rpartition("=")[2]]
        found = [[float(number) for number in row.split("&")] for row in rows.split(r"\\")]
        right = np.atleast_2d(printed[name].pop(0) if name == "L" else printed.pop(name))
        assert np.shape(found) == right.shape and np.allclose(found, right, rtol=0, atol=1e-8), name
assert printed.keys() == {"L", "base", "update", "dy W", "dh A"} and not printed["L"]

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
assert dy.T.shape == (3, 5, 2)
