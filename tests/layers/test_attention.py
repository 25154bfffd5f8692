"""Rotary positions, attention and the norm: what their claims and their loops cannot say."""

import math

import numpy as np
import pytest

from minilora import Attention, Linear, RMSNorm, Rotary
from minilora.layer import freeze, rebuild
from minilora.layers import attention as attention_module
from minilora.layers.rotary import frequencies, halves_from_interleaved


def randn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def attention(seed=0, kv=2, group=2, D=4, d=6, out=6, scale=1.0):
    q, k = kv * group * D, kv * D
    weights = [scale * randn([seed, i], *s) for i, s in enumerate(((q, d), (k, d), (k, d)))]
    return Attention(*map(Linear, weights), Linear(randn([seed, 3], out, q)), Rotary(frequencies(D, 100.0)))


@pytest.mark.parametrize("D", [2, 6])
def test_a_turned_product_depends_on_the_distance_alone(D):
    rotary = Rotary(frequencies(D, 1e4))
    q, k = randn(0, 1, D), randn(1, 1, D)

    def product(t, u):
        return (rotary.forward(q, t)[0] @ rotary.forward(k, u)[0].T).item()

    for distance in (0, 3, 40):
        assert np.isclose(product(distance, 0), product(1000 + distance, 1000), rtol=1e-9)
    assert not np.isclose(product(3, 0), product(4, 0))


def test_a_rotations_adjoint_undoes_it_at_any_start():
    rotary, x = Rotary(frequencies(8, 1e4)), randn(0, 2, 3, 5, 8)
    y, cache = rotary.forward(x, 7)
    np.testing.assert_allclose(rotary.backward(y, cache)[0], x, atol=1e-14)


def test_angles_in_single_precision_are_rounded_once():
    f, t = frequencies(64, 1e4), 100_000
    y, _ = Rotary(f).forward(np.ones((1, 64), "float32"), start=t)
    cos, sin = (np.array([trig(t * v) for v in f]) for trig in (math.cos, math.sin))
    np.testing.assert_allclose(y[0], np.concatenate([cos - sin, cos + sin]), rtol=0, atol=3e-7)


def test_neighbours_turn_as_halves_do_once_reordered():
    """The order of a weight's rows is all that the two pairings differ in."""
    heads, D, T, f = 3, 6, 5, frequencies(6, 50.0)
    W, x = randn(0, heads * D, 4), randn(1, T, 4)
    pairs = (x @ W.T).reshape(T, heads, D // 2, 2)
    z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.outer(np.arange(T), f))[:, None]
    rows = (x @ halves_from_interleaved(W, D).T).reshape(T, heads, D).swapaxes(0, 1)
    y = Rotary(f)(rows)
    np.testing.assert_allclose(y, np.concatenate([z.real, z.imag], axis=-1).swapaxes(0, 1), atol=1e-13)


def test_a_position_does_not_see_later_ones():
    layer, x = attention(), randn(0, 2, 7, 6)
    y = layer(x)
    for t in range(7):
        other = x.copy()
        other[:, t + 1 :] += 100
        np.testing.assert_allclose(layer(other)[:, : t + 1], y[:, : t + 1], atol=1e-12)
        if t < 6:
            assert not np.allclose(layer(other)[:, t + 1], y[:, t + 1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e3, 1e8])
def test_large_scores_do_not_overflow(dtype, scale):
    """Scores far beyond what exp can take, masked ones among them: each position reads from one alone."""
    layer = rebuild(attention(scale=scale), array=lambda a: a.astype(dtype))
    x = randn(0, 2, 6, 6).astype(dtype)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        y, cache = layer.forward(x)
        dx, grads = layer.backward(randn(1, *y.shape).astype(dtype), cache)
    for array in (y, dx, *grads.values()):
        assert np.isfinite(array).all()
    *_, P = cache.kept[-1]
    np.testing.assert_allclose(P.max(axis=-1), 1, rtol=1e-2)


def test_other_axes_than_positions_are_sequences():
    layer, x = attention(), randn(0, 2, 3, 5, 6)
    y = layer(x)
    np.testing.assert_allclose(layer(x.reshape(6, 5, 6)).reshape(y.shape), y, atol=1e-13)
    np.testing.assert_allclose(layer(x[1, 2]), y[1, 2], atol=1e-13)


def test_a_norms_eps_is_one_in_a_million():
    assert RMSNorm(np.ones(3)).eps == 1e-6
    x = np.array([[1e-3, 0.0, 0.0]])
    np.testing.assert_allclose(RMSNorm(np.ones(3))(x), x / (1e-6 / 3 + 1e-6) ** 0.5, rtol=1e-14)


def test_an_eps_of_a_numpy_type_does_not_promote():
    assert RMSNorm(np.ones(3, "float32"), np.float64(0.1))(np.ones((2, 3), "float32")).dtype == np.float32


def test_above_o_proj_alone_no_scores_are_sent_back(monkeypatch):
    layer = attention()
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
        projection.frozen = True
    y, cache = layer.forward(randn(1, 2, 3, 6))
    monkeypatch.setattr(attention_module, "attend_backward", lambda *_: pytest.fail("nobody asks for dq, dk or dv"))
    dx, grads = layer.backward(y, cache, need_dx=False)
    assert dx is None
    assert grads.keys() == {"o_proj.weight"}


def test_norms_that_train_alone_get_their_gradients():
    """The same as where dx is asked for besides, and all of them."""
    whole, D = attention(), 4
    norms = [RMSNorm(randn([7, i], D)) for i in range(2)]
    projections = (whole.q_proj, whole.k_proj, whole.v_proj, whole.o_proj)
    layer = Attention(*map(freeze, projections), Rotary(frequencies(D, 100.0)), *norms)
    y, cache = layer.forward(randn(1, 2, 3, 6))
    dy = randn(2, *y.shape)
    _, expected = layer.backward(dy, cache)
    dx, grads = layer.backward(dy, cache, need_dx=False)
    assert dx is None
    assert grads.keys() == {"q_norm.weight", "k_norm.weight"}
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, expected[name])
        assert grad.any()
