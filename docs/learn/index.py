"""What index.md asserts and shows; the names are the page's own."""

import front
import numpy as np
import words
from pages import picture, says
from ranks import word

from minilora import Adam, LoRA
from minilora.language.memory import LLAMA_2_7B, training_memory

DRAWN = front.stills(
    layer=["hero", 1],
    rank=["rank", 1, {"products": 4}],
    step=["step", 0.87],
    run=["run", 1],
    alpha=["alpha", 1],
    merge=["merge", 1],
    bits=["bits", 1],
    memory=["memory", 1],
)
picture("front", front.alive(DRAWN.pop("layer")))
for name, svg in DRAWN.items():
    picture(f"front-{name}", front.still(svg))
WORD = word()
strength = np.linalg.svd(WORD, compute_uv=False) ** 2
share = np.cumsum(strength) / strength.sum()  # of the word, in squares, by rank

# %% 1. LoRA


def needed(**options):
    """Return the gigabytes of a step on 4,096 tokens, by what they are for."""
    return {part: size / 1e9 for part, size in training_memory(LLAMA_2_7B, tokens=4096, **options).items()}


full, lora, four, least = (
    needed(**options)
    for options in ({}, {"rank": 16}, {"rank": 16, "bits": 4}, {"rank": 16, "bits": 4, "recompute": True})
)
assert [f"{sum(parts.values()):.3g}" for parts in (full, lora, four)] == ["126", "31.9", "22.3"]
assert round(sum(least.values()), 1) == 6.6
assert round(2 * lora["Adam"] / 8 * 1000) == 80  # MB of an adapter in 16 bits; Adam's two means take eight bytes

# %% A column times a row
assert WORD.shape == (9, 28) and np.linalg.matrix_rank(WORD) == 7
assert sum(row.any() for row in WORD) == 7 and [round(100 * share[r - 1]) for r in (1, 4)] == [59, 93]
assert 7 * (9 + 28) == 259 and WORD.size == 252
assert 4096 * 4096 == 16_777_216 and 8 * (4096 + 4096) == 65_536 and round(65_536 / 16_777_216, 3) == 0.004
letter = WORD[:, :7]
assert len({tuple(row) for row in letter if row.any()}) == 2  # the letter L

# %% The first step
rng = np.random.default_rng(0)
x, dy = rng.standard_normal((6, 28)), rng.standard_normal((6, 9))
for B in (np.zeros((9, 2)), rng.standard_normal((9, 2))):
    adapter = LoRA(rng.standard_normal((2, 28)), B, alpha=4)
    grads = adapter.backward(dy, adapter.forward(x)[1])[1]
    assert np.allclose(grads["lora_B"], adapter.scaling * (dy.T @ x) @ adapter.lora_A.T)
    assert np.allclose(grads["lora_A"], adapter.scaling * adapter.lora_B.T @ (dy.T @ x))
    assert grads["lora_A"].any() == B.any() and grads["lora_B"].any()

# %% Many steps
assert round((1 - share[1]) * (WORD**2).sum() / 9, 2) == 1.37 and round(100 * share[1]) == 78

# %% Alpha and the rate


def first_step(alpha, descent=False):
    """Return how far the first step moves the weight."""
    rng = np.random.default_rng(1)
    adapter = LoRA.init(28, 9, rank=2, alpha=alpha, rng=rng, dtype="float64")
    grads = adapter.backward(dy, adapter.forward(x)[1])[1]
    if descent:
        adapter.lora_B[:] -= 0.05 * grads["lora_B"]
    else:
        Adam(adapter.trainable(), lr=0.05).step(grads)
    return np.linalg.norm(adapter.delta())


assert np.isclose(first_step(8) / first_step(4), 2) and np.isclose(first_step(8, True) / first_step(4, True), 4)

# %% Merging
assert 4 * (9 + 28) == 148

# %% Four bits
others = front.stills(five=["bits", 1, {"size": 0.05}], ten=["bits", 1, {"size": 0.1}])
assert "3 % of W into four bits, 0 % of it is kept" in DRAWN["bits"]
assert "37 % of it is kept, with a noise of 74 %" in others["five"]
assert "111 % of it is kept, with a noise of 48 %" in others["ten"]

# %% The memory of your model
assert round(four["activations"]) == 17
for told in ("126 GB", "LoRA, rank 16: 32 GB", "W in four bits: 22 GB", "recomputed: 6.6 GB", "file: 80 MB"):
    assert told in DRAWN["memory"]

# %% What to set first
says(
    f"In our small model such adapters had {words.percent(words.enough())} of what full fine-tuning gains",
    f"begin at {words.start():.4f} with $s = {words.SCALING:g}$.",
)

# %% In Python
assert evaluate(merged, X, Y) < 1e-3
assert sum(p.size for p in layer.trainable().values()) == 180 and base.weight.size == 8000
