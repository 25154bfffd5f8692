"""What derivation.md asserts and shows; the names are the page's own."""

import drawings
from pages import picture

# %% By pencil, with numbers

picture("graph", drawings.graph())
assert L == 12 and dx.tolist() == [[5, -2], [-9, 8], [7, -5]]
assert dA.tolist() == [[-10, 14]] and dB.tolist() == [[-12], [22]] and dA @ [[2], [-1]] == [[1, -1]] @ dB == -34
assert np.allclose(A, [[2.1, -1.1]], atol=1e-8) and np.allclose(B, [[1.1], [-1.1]], atol=1e-8)
assert after.round(4) == 7.0151

# %% Adam

assert np.allclose(path(1), path(100), atol=1e-8)

# %% Do you remember?

rng = np.random.default_rng(0)
start = LoRA.init(4, 3, rank=2, alpha=2, rng=rng, dtype="float64")
x, dy = rng.standard_normal((2, 5, 4)), rng.standard_normal((2, 5, 3))  # batch, positions, width
dx, grads = start.backward(dy, start.forward(x)[1])
assert not dx.any() and not grads["lora_A"].any() and grads["lora_B"].all()
assert dy.T.shape == (3, 5, 2)
