"""Training takes the way of `forward` and `backward`; a shorter way is asked for by name."""

import numpy as np
import pytest

from minilora import Adam, Linear, LoRA, LoRALinear, article, cross_entropy, mse, train
from minilora.fast import residual_form

from ..support.compare import assert_close

RNG = np.random.default_rng(11)
X, Y = RNG.standard_normal((40, 5)), RNG.standard_normal((40, 4))


class Squared(LoRA):
    """Another layer than its parent: y = (s h B^T)^2, with a right backward of its own."""

    def forward(self, x):
        y, cache = super().forward(x)
        return y * y, (*cache, y)

    def backward(self, dy, cache, *, need_dx=True):
        return super().backward(2 * cache[-1] * dy, cache[:-1], need_dx=need_dx)


def adapter(cls=LoRA):
    rng = np.random.default_rng(0)
    return cls(rng.standard_normal((2, 5)), rng.standard_normal((4, 2)), 1.0)


def test_a_subclass_is_trained_on_its_own_gradients():
    model, plain = adapter(Squared), adapter(Squared)
    history = train(model, X, Y**2, epochs=5, batch_size=40, lr=0.01, rng=np.random.default_rng(0), log_every=1)
    losses, optimizer = [], Adam(plain.trainable(), lr=0.01)
    for _ in range(5):
        y, cache = plain.forward(X)
        optimizer.step(plain.backward(mse(y, Y**2)[1], cache)[1])
        losses.append(float(mse(plain(X), Y**2)[0]))
    assert_close(np.array(history.losses), np.array(losses), 1e-12)
    assert history.losses[-1] < history.losses[0]


def test_the_residual_form_refuses_a_subclass():
    before = adapter(Squared).trainable()
    model = adapter(Squared)
    with pytest.raises(TypeError, match="residual_form takes a LoRA, or a LoRALinear over a Linear, got Squared"):
        train(model, X, Y, epochs=1, batch_size=8, rng=RNG, gradients=residual_form)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])


class Beside(LoRALinear):
    """A subclass that computes the same."""


@pytest.mark.parametrize("make", [lambda: Linear(np.ones((4, 5))), lambda: Beside(Linear(np.ones((4, 5))), adapter())])
def test_the_residual_form_knows_two_classes_only(make):
    with pytest.raises(TypeError, match="residual_form takes"):
        residual_form(make(), X, Y)


def counting(monkeypatch, cls, method):
    calls = []
    right = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda self, *a, **k: calls.append(type(self).__name__) or right(self, *a, **k))
    return calls


def test_the_articles_run_goes_through_the_page(monkeypatch):
    backwards = counting(monkeypatch, LoRA, "backward")
    full = counting(monkeypatch, Linear, "backward")
    article.run(n=64, in_features=6, out_features=5, batch_size=8, epochs=3)
    assert len(backwards) == len(full) == 3 * 8


def test_the_given_gradients_are_what_a_step_takes(monkeypatch):
    backwards, seen = counting(monkeypatch, LoRA, "backward"), []

    def gradients(model, x, y):
        seen.append((x.copy(), y.copy()))
        return residual_form(model, x, y)

    model = adapter()
    train(model, X, Y, epochs=2, batch_size=8, rng=RNG, gradients=gradients)
    assert not backwards
    assert len(seen) == 2 * 5
    assert all(x.shape == (8, 5) and y.shape == (8, 4) for x, y in seen)


def test_the_loss_that_is_named_is_minimised_and_reported():
    rng = np.random.default_rng(4)
    ids = rng.integers(0, 4, 40)
    model = LoRALinear(Linear(rng.standard_normal((4, 5))), adapter())
    start = float(cross_entropy(model(X), ids)[0])
    history = train(model, X, ids, epochs=30, batch_size=20, lr=0.05, rng=rng, log_every=30, loss=cross_entropy)
    assert history.losses == [pytest.approx(float(cross_entropy(model(X), ids)[0]))]
    assert history.losses[0] < start
