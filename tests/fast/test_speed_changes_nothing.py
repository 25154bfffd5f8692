"""Every optimisation computes the same training: the losses agree to 1e-12 after a thousand steps in float64."""

import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear, evaluate, train

BATCH, ROWS, EPOCHS = 16, 400, 40  # 25 steps an epoch: a thousand in all
TOLERANCE = 1e-12

widths = st.integers(1, 9)
ranks = st.integers(1, 3)
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(["full", "lora", "adapter"])


@dataclass
class Task:
    """Data with noise, so that no loss goes to zero, and the arrays that three kinds of model start from."""

    X: np.ndarray
    Y: np.ndarray
    W: np.ndarray
    b: np.ndarray
    A: np.ndarray
    B: np.ndarray
    alpha: float

    @classmethod
    def draw(cls, in_features: int, out_features: int, rank: int, seed: int) -> "Task":
        rng = np.random.default_rng(seed)
        normal = rng.standard_normal
        X, b = normal((ROWS, in_features)), normal(out_features)
        Y = X @ normal((in_features, out_features)) + normal((ROWS, out_features))
        W, A, B = normal((out_features, in_features)), normal((rank, in_features)), normal((out_features, rank))
        return cls(X, Y, W, b, A, B, alpha=rank * 0.7)

    def model(self, kind: str):
        base, adapter = Linear(self.W.copy(), self.b.copy()), LoRA(self.A.copy(), self.B.copy(), self.alpha)
        return {"full": base, "lora": LoRALinear(base, adapter), "adapter": adapter}[kind]


def textbook_losses(task: Task, kind: str, seed: int) -> list[float]:
    """Train with the plainest code there is: whole arrays, the error formed, Algorithm 1 line by line."""
    rng = np.random.default_rng(seed)
    X, Y, W, b, s = task.X, task.Y, task.W.copy(), task.b.copy(), task.alpha / len(task.A)
    A, B = task.A.copy(), task.B.copy()
    params = [W, b] if kind == "full" else [A, B]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]

    def predict(x):
        base, update = x @ W.T + b, s * (x @ A.T @ B.T)
        return {"full": base, "lora": base + update, "adapter": update}[kind]

    losses, t = [], 0
    for epoch in range(1, EPOCHS + 1):
        for _ in range(ROWS // BATCH):
            rows = rng.choice(ROWS, BATCH, replace=False, shuffle=False)
            x, y = X[rows], Y[rows]
            dy = 2 * (predict(x) - y) / y.size
            grads = [dy.T @ x, dy.sum(axis=0)] if kind == "full" else [s * (dy @ B).T @ x, s * dy.T @ (x @ A.T)]
            t += 1
            for i, g in enumerate(grads):
                m[i] = 0.9 * m[i] + (1 - 0.9) * g
                v[i] = 0.999 * v[i] + (1 - 0.999) * g**2
                m_hat, v_hat = m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)
                params[i][...] = params[i] - 0.01 * m_hat / (np.sqrt(v_hat) + 1e-8)
        if epoch % 10 == 0:
            losses.append(float(np.mean((predict(X) - Y) ** 2)))
    return losses


def our_losses(task: Task, model, seed: int) -> list[float]:
    rng = np.random.default_rng(seed)
    return train(model, task.X, task.Y, epochs=EPOCHS, batch_size=BATCH, lr=0.01, rng=rng).losses


@pytest.mark.long
@settings(max_examples=2, deadline=None)
@given(kinds, widths, widths, ranks, seeds)
@example("lora", 5, 4, 2, 0)
def test_training_gives_the_losses_of_the_textbook_loop(kind, in_features, out_features, rank, seed):
    task = Task.draw(in_features, out_features, rank, seed)
    ours, textbook = our_losses(task, task.model(kind), seed), textbook_losses(task, kind, seed)
    np.testing.assert_allclose(ours, textbook, rtol=TOLERANCE)


class WithoutShortcut:
    """A layer that offers `train` nothing but forward and backward."""

    def __init__(self, layer):
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.trainable, self.forward, self.backward = layer.trainable, layer.forward, layer.backward

    def __call__(self, x):
        return self.layer(x)


def replacing(module, name, plain):
    def losses(task, kind, seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[module], name, plain)
            return our_losses(task, task.model(kind), seed)

    return losses


def without_shortcut(task, kind, seed):
    return our_losses(task, WithoutShortcut(task.model(kind)), seed)


def base_once(task, kind, seed):
    """The base runs once, before the training: its output is taken from the targets."""
    rest = replace(task, Y=task.Y - task.model("full")(task.X))
    return our_losses(rest if kind == "lora" else task, task.model("adapter" if kind == "lora" else kind), seed)


# What each optimisation is replaced by.
PLAIN = {
    "Adam in place, by blocks": replacing("minilora.optim", "BLOCK", 1),
    "outer products at rank 1": replacing("minilora.lora", "widen", lambda narrow, factor: narrow @ factor),
    "rows gathered into a buffer": replacing("minilora.training", "take_rows", lambda a, rows, out: a[rows].copy()),
    "loss evaluated in blocks": replacing("minilora.training", "EVALUATION_ROWS", ROWS),
    "the residual form": without_shortcut,
    "the base at each step": base_once,
}


@pytest.mark.long
@pytest.mark.parametrize("optimisation", PLAIN)
@settings(max_examples=2, deadline=None)
@given(kinds, widths, widths, ranks, seeds)
@example("lora", 5, 4, 1, 0)
def test_losses_are_the_same_without(optimisation, kind, in_features, out_features, rank, seed):
    task = Task.draw(in_features, out_features, rank, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", 37)
        ours = our_losses(task, task.model(kind), seed)
    np.testing.assert_allclose(ours, PLAIN[optimisation](task, kind, seed), rtol=TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(kinds, widths, widths, ranks, st.integers(1, ROWS), seeds)
def test_loss_in_blocks_is_the_loss_in_one_piece(kind, in_features, out_features, rank, block, seed):
    task = Task.draw(in_features, out_features, rank, seed)
    model = task.model(kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", block)
        in_blocks = evaluate(model, task.X, task.Y)
    assert in_blocks == pytest.approx(float(np.mean((model(task.X) - task.Y) ** 2)), rel=1e-13)
