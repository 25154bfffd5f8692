"""Checks and computed contents of variants.md; its parts see the page's own names."""

import inspect

import numpy as np
from pages import DOCS, holds, own_picture, says

from minilora import DoRA, DoRAAdapter, Linear, LoRA
from minilora.variants.scaling import loraplus

# %% What became of LoRA

# Facts from elsewhere: the year of LoRA's paper, arXiv 2106.09685.
says("Since 2021, papers have proposed")

# %% rsLoRA: another scaling

draw, lr = np.random.default_rng(0).standard_normal, 0.3
adapter = LoRA(draw((3, 5)), np.zeros((4, 3)), alpha=6.5)
x, dy, other = draw((7, 5)), draw((7, 4)), draw((6, 5))
_, grads = adapter.backward(dy, adapter.forward(x)[1])
adapter.lora_B -= lr * grads["lora_B"]  # a step of gradient descent
h, h_other = x @ adapter.lora_A.T, other @ adapter.lora_A.T
holds(r"s\,h' B^\top", **{"sh'B^top": adapter(other), "s": adapter.scaling, "h": h, "h'": h_other, "dy": dy, "lr": lr})

# %% LoRA+: another rate for B

says(f"Its default, {inspect.signature(loraplus).parameters['ratio'].default:g}, is the authors' rule of thumb")
steps = options["epochs"] * len(X) // options["batch_size"]
says(f"after {steps} steps, with one rate and with {ratio} times as much for B:")

# %% PiSSA: another start

rank = int(np.argmax(np.diff(np.linalg.svd(W, compute_uv=False)) * -1)) + 1  # the largest drop comes after it
assert rank == layer.adapter.rank
says(f"a matrix with a strong part of rank {rank}.")

# %% DoRA: another layer

layer = DoRA(
    Linear(np.array([[2.4, 0.5]])),
    DoRAAdapter(np.array([[-0.1, 1.4]]), np.array([[1.0]]), 1.0, magnitude=np.array([2.2])),
)
drawn = own_picture(DOCS / "library" / "variants.md", "variants-3")
assert f"a row of W, {np.linalg.norm(layer.base.weight):.2f} long" in drawn and f", n = {layer.norm()[0]:.2f}<" in drawn
assert np.isclose(np.linalg.norm(layer.merge().weight), 2.2) and ">m = 2.2<" in drawn

# %% Adapters put together

c1, c2 = 0.7 * one.scaling, -0.3 * two.scaling
crossed = (c1 * -c2) ** 0.5 * (two.lora_B @ one.lora_A - one.lora_B @ two.lora_A)
assert np.allclose(both.delta() - wanted, crossed, rtol=0, atol=1e-12)

# %% A variant of your own

vera, x = VeRA(draw((3, 5)), draw((4, 3)), draw(3), draw(4)), draw((7, 5))
y, cache = vera.forward(x)
h, z = cache.kept
arrays = {name: getattr(vera, name) for name in "ABdb"}
holds(r"\begin{aligned}", x=x, h=h, u=h * vera.d, z=z, y=y, **arrays)
