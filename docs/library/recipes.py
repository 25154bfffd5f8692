"""Checks and computed contents of recipes.md; its parts see the page's own names."""

# %% Your own training loop

from pages import holds, says

t = np.arange(1, STEPS + 1)
holds("lr_t =", lr_t=np.array([*map(rate, t)]), lr=PEAK, t=t, w=WARM, T=STEPS)

assert rate(WARM) == PEAK and rate(STEPS) == 0 and 0 < rate(STEPS - 1) < rate(1)
assert evaluate(adapted, X_held, Y_held) < 0.5 * evaluate(model, X_held, Y_held)

# %% Masked prompts

says(f"The targets of the prompt are \N{MINUS SIGN}{-IGNORE_INDEX},", f"and in `y` with \N{MINUS SIGN}{-IGNORE_INDEX}.")

assert (targets != IGNORE_INDEX).sum() == 2 * len(targets)  # an answer of one id, then the end
counted = targets[:1] != IGNORE_INDEX
log_q = chat(ids[:1])[counted]
log_q = log_q - np.log(np.exp(log_q).sum(axis=1, keepdims=True))
by_hand = -log_q[np.arange(2), targets[:1][counted]].mean()
assert np.isclose(evaluate(chat, ids[:1], targets[:1], cross_entropy), by_hand, rtol=1e-5)
other = ids.copy()
other[:, -1] = 7  # padding
assert (ids[:, -1] == FILL).any() and evaluate(chat, other[:8], targets[:8], cross_entropy) == evaluate(
    chat, ids[:8], targets[:8], cross_entropy
)
assert history.losses[-1] < 0.5 * before

# %% Early stopping

assert evaluate(adapted, X_held, Y_held) == best < last
assert epoch == best_epoch + PATIENCE < 200

# %% Continue training an adapter

assert np.array_equal(attach(model, load_adapter(folder / "monday"))(X), adapted(X))
assert np.array_equal(attach(model, load_adapter(folder / "tuesday"))(X), again(X))
assert history.losses[-1] < best
from minilora.layer import rebuild

monday = attach(model, load_adapter(folder / "monday"))


def first_losses(lr, warm, steps):
    """Return the held-out loss after that many more steps of training, averaged over five seeds."""
    found = []
    for seed in range(5):
        anew = rebuild(monday, array=np.copy)
        adam = Adam(anew.trainable(), lr=lr)
        for t, batch in enumerate(draw_batches(np.random.default_rng(seed), len(X), 32, steps), start=1):
            adam.lr = lr * min(1, t / warm)
            adam.step(backpropagate(anew, X[batch], Y[batch]))
        found.append(evaluate(anew, X_held, Y_held))
    return np.mean(found)


assert abs(first_losses(0.003, 5, 60) - first_losses(0.003, 1, 60)) < 0.001
assert 1.5 * best > first_losses(0.03, 1, 1) > 1.4 * best > best > first_losses(0.03, 5, 1)
assert abs(first_losses(0.03, 5, 60) - first_losses(0.03, 1, 60)) < 0.01

# %% Sum two adapters

assert all(adapter.rank == 16 for adapter in both.values()) and list(both) == ["fc1", "fc2"]
for path in both:
    wanted = 0.7 * one[path].delta() + 0.3 * two[path].delta()
    assert np.allclose(both[path].delta(), wanted, rtol=0, atol=1e-12)

# %% From SmolLM2 to llama.cpp

from settings import FACTS

says(f"{2 * FACTS['models']['SmolLM2-135M']['L']} modules written to tuned.gguf")  # q and v of each layer

import shutil

shutil.rmtree(folder)

# %% Clipping

from unittest import mock

betas = Adam({"theta": np.zeros(1)}).betas
steps = [round(2 / (1 - beta)) for beta in betas]
assert all(abs(beta**count - np.exp(-2)) < 0.02 for beta, count in zip(betas, steps))  # a seventh is left
says(f"It stays in $m$ for some {steps[0]} steps, and in $v$ for some {steps[1]:,}.")
drawn = []
with mock.patch.object(Adam, "step", lambda self, grads: drawn.append(grads["theta"].item())):
    moves()
odd = max(drawn, key=abs)
low, high = sorted({*drawn} - {odd})
times = odd / (high if odd > 0 else low)
says(f"Its gradients are {high:g} or {low:g} at random, but one of them is {times:,.0f} times as large.")

plain, clipped = moves(), moves(max_grad_norm=1.0)
assert plain[200:220].mean() > 1.5 * plain[100:200].mean() > 30 * plain[300:].mean()
assert clipped[200:220].mean() < clipped[100:200].mean() < 1.5 * clipped[300:].mean()

# Facts from elsewhere: QLoRA's paper, which the page cites.
says("at 0.3. Here nothing is clipped")

# %% Weight decay

assert np.abs(full.weight).max() < 1e-3 and np.abs(lora.merge().weight - W).max() < 1e-3
