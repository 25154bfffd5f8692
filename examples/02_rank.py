"""Which rank? Fit changes of known rank k with adapters of rank r, to see where the loss stops falling.

    python examples/02_rank.py

Next to each trained loss is the lowest loss that any adapter of that rank can reach (in closed form).
"""

import numpy as np

from minilora import LoRA, best_adapter, evaluate, train

N, WIDTH, RANKS = 2_000, 32, (1, 2, 4, 8)

print(f"mean squared error for a change of rank k, y = x delta^T, {WIDTH} x {WIDTH}; lowest possible in brackets\n")
print("        " + "".join(f"r = {r:<20d}" for r in RANKS))
for k in RANKS:
    rng = np.random.default_rng(k)
    delta = rng.standard_normal((WIDTH, k)) @ rng.standard_normal((k, WIDTH)) / np.sqrt(k)
    X = rng.standard_normal((N, WIDTH))
    Y = X @ delta.T
    row = f"k = {k}   "
    for r in RANKS:
        adapter = LoRA.init(WIDTH, WIDTH, rank=r, alpha=r, rng=rng, dtype="float64")
        train(adapter, X, Y, epochs=200, lr=0.02, rng=rng)
        loss = train(adapter, X, Y, epochs=100, lr=0.001, rng=rng).losses[-1]
        least = evaluate(best_adapter(X, Y, rank=r), X, Y)
        row += f"{loss:<10.3g}{f'({least:.3g})':<14}"
    print(row)
print("\nFrom r = k on, the loss is practically zero: the elbow is at the rank of the change, whatever that is.")
