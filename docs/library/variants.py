"""What variants.md asserts and shows; the names are the page's own."""

# %% rsLoRA: another scaling
import numpy as np
import pictures
from pages import DOCS, own_picture, shown

from minilora import Adam, Adapter, LoRA

rng = np.random.default_rng(0)
RANKS = (1, 4, 16, 64)


def power(ranks, values):
    """Return the p of the rank^p that fits best."""
    return np.polyfit(np.log(ranks), np.log(values), 1)[0]


def first_move(rows, rank, root, plain):
    """Return how far one step moves the output of the rows that it was taken for."""
    x, dy = rng.standard_normal((rows, 256)), rng.standard_normal((rows, 64))
    new = LoRA.init(256, 64, rank=rank, alpha=8, rng=rng, dtype="float64")
    layer = Adapter(new.lora_A, new.lora_B, 8, use_rslora=root)
    _, grads = layer.backward(dy, layer.forward(x)[1])
    if plain:
        layer.lora_B -= 1e-3 * grads["lora_B"]
    else:
        Adam(layer.trainable(), lr=1e-3).step(grads)
    return np.abs(layer(x)).mean()


rows, powers = [], {}
for plain, count in ((True, 1), (False, 1), (False, 512)):
    for root in (False, True):
        moves = [np.mean([first_move(count, r, root, plain) for _ in range(20)]) for r in RANKS]
        powers[plain, count, root] = p = power(RANKS, moves)
        name = "gradient descent" if plain else "Adam"
        scaling = "alpha/sqrt(r)" if root else "alpha/r"
        cells = [f"{move:.2g}" for move in moves]
        rows.append((f"{name}, rows: {count}, {scaling}", *cells, f"{p:.1f}"))
kept = (True, 1, True), (False, 1, False), (False, 512, True)
assert all(abs(powers[case]) < 0.15 for case in kept)
assert powers[True, 1, False] < -0.8 and powers[False, 512, False] < -0.3
assert powers[False, 1, True] > 0.4
shown("variants-1", pictures.table(["", *(f"r = {r}" for r in RANKS), "p"], rows))

from minilora import mse
from minilora.training import backpropagate

again = np.random.default_rng(0)
X = again.standard_normal((256, 256))
change = again.standard_normal((64, 32)) @ again.standard_normal((32, 256)) / 90
R = X @ change.T


def loss_after(rank, lr, root, plain, steps=60):
    """Train a new adapter; return its loss as a part of the first one."""
    start = np.random.default_rng(1)
    new = LoRA.init(256, 64, rank=rank, alpha=8, rng=start, dtype="float64")
    layer = Adapter(new.lora_A, new.lora_B, 8, use_rslora=root)
    adam = Adam(layer.trainable(), lr=lr)
    for _ in range(steps):
        grads = backpropagate(layer, X, R)
        if plain:
            for name, p in layer.trainable().items():
                p -= lr * grads[name]
        else:
            adam.step(grads)
    return mse(layer(X), R)[0] / mse(0 * R, R)[0]


def best_rates(root, plain):
    grid = 2.0 ** np.arange(-2, 8, 0.5) if plain else 2.0 ** np.arange(-7, 1.5, 0.5)
    best = []
    for rank in RANKS:
        with np.errstate(all="ignore"):
            losses = [loss_after(rank, lr, root, plain) for lr in grid]
        best.append(grid[np.nan_to_num(losses, nan=np.inf).argmin()])
    return best


rows, powers = [], {}
for plain in (True, False):
    for root in (False, True):
        best = best_rates(root, plain)
        powers[plain, root] = p = power(RANKS, best)
        name = "gradient descent" if plain else "Adam"
        scaling = "alpha/sqrt(r)" if root else "alpha/r"
        rows.append((f"{name}, {scaling}", *(f"{lr:.3g}" for lr in best), f"{p:.1f}"))
assert abs(powers[False, True]) < 0.1 < powers[False, False] < 0.3 < powers[True, True]
assert powers[True, False] > 0.8 and 0.4 < powers[True, True] < 0.6
shown("variants-2", pictures.table(["best rate", *(f"r = {r}" for r in RANKS), "p"], rows))

# %% DoRA: another layer

from minilora import DoRA, DoRAAdapter, Linear

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
