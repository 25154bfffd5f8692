"""What glossary.md says of A and B, of merging and of decay, computed."""

import numpy as np
from pages import says

from minilora import NF4, Linear, LoRA, LoRALinear

# %% Glossary

randn = np.random.default_rng(0).standard_normal
W, x = randn((4, 6)), randn((50, 6))
A1, A2, B1, B2 = randn((2, 6)), randn((2, 6)), randn((4, 2)), randn((4, 2))
changes = LoRA(A1, B1, alpha=2).delta() + LoRA(A2, B2, alpha=2).delta()
assert np.abs(LoRA(A1 + A2, B1 + B2, alpha=2).delta() - changes).max() > 1
stacked = LoRA(np.vstack([A1, A2]), np.hstack([B1, B2]), alpha=4)  # alpha / r stays 1
assert stacked.rank == 4 and np.allclose(stacked.delta(), changes)

A_article, B_article = randn((6, 2)), randn((2, 4))  # (in, r) and (r, out)
assert np.allclose(LoRA(A_article.T, B_article.T, alpha=2)(x), x @ A_article @ B_article)

layer = LoRALinear(Linear(W.copy()), LoRA(A1, B1, alpha=2))
once = layer.merge()
assert np.allclose(once(x), layer(x)) and not hasattr(once, "merge")
twice = LoRALinear(once, layer.adapter).merge()
assert np.abs(twice(x) - layer(x)).max() > 1 and np.allclose(twice.weight, W + 2 * layer.adapter.delta())
says("Merging twice adds it twice, and raises no error")
assert len({*NF4}) == 16 == 2**4
says("sixteen numbers for weights in four bits")

full = Linear(W.copy())
for array in (full.weight, *layer.trainable().values()):
    array *= 0.99**1000  # decay of a thousand steps, as in AdamW, with no gradient
assert np.abs(full.weight).max() < 1e-3 and np.abs(layer.merge().weight - W).max() < 1e-3
