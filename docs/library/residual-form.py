"""Checks and computed contents of residual-form.md; its parts see the page's own names."""

# %% The same gradients with less work

from pages import holds, says, shown

N, out = 7, 4
X, R = rng.standard_normal((N, 5)), rng.standard_normal((N, out))
adapter = LoRA(rng.standard_normal((3, 5)), rng.standard_normal((out, 3)), alpha=6.5)
y, cache = adapter.forward(X)
_, grads = adapter.backward(mse(y, R)[1], cache)
s, B = adapter.scaling, adapter.lora_B
holds(r"dB = c\,(s", dB=grads["lora_B"], c=2 * s / (N * out), s=s, H=X @ adapter.lora_A.T, B=B, R=R)

# %% What a step costs then

import costs
import pictures

rows, work, N = [], {}, 128
says(f"The arrays are float32, with {N} rows.")
for name, way in costs.ways(N, 1001, 1000, 1).items():
    work[name] = way.multiply_adds
    assert way.bytes_moved >= way.least_bytes
    cells = [work[name] / 1e6, way.least_bytes / 1e6, way.bytes_moved / 1e6, way.optimizer_bytes / 1e6]
    rows.append([name, *(f"{cell:,.3g}" if cell < 1000 else f"{cell:,.0f}" for cell in cells)])
assert round(work["LoRA, the article's module"] / work["full training"], 1) == 1.5
assert round(work["LoRA beside its base"] / work["full training"], 1) == 0.5
assert work["full training"] / work["LoRA on the residual"] > 300
shown(
    "residual-form-1",
    pictures.table(["1,000 × 1,001, r = 1", "multiply-adds, millions", "MB at least", "MB as run", "MB of Adam"], rows),
)
