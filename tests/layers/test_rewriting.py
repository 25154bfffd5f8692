"""Embeddings and convolutions as linear layers on rewritten inputs: each rewriting and its adjoint, exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Conv1d, Conv2d, Embedding, Linear, Sequential, adapt
from minilora.layers.embedding import OneHot

from ..support.cases import KINDS, Geometry, ids_of
from ..support.memory import traced
from ..support.problems import SmallIntegers, problems


@pytest.mark.parametrize("axes", [1, 2])
@given(problem=problems())
@settings(max_examples=10)
def test_sums_over_patches_are_adjoint_to_patches_exactly(axes, problem):
    integers, geometry = KINDS[f"conv{axes}d"].small(SmallIntegers(**vars(problem))), Geometry.of(problem.seed, axes)
    weight = integers.randn("weight", integers.out_features, integers.in_features, *geometry.kernel)
    layer, x = (Conv1d, Conv2d)[axes - 1](weight, **geometry.steps), KINDS[f"conv{axes}d"].input(integers)
    z = layer.to_rows(x)
    other = integers.randn("z", *z.shape)
    assert (z * other).sum() == (x * layer.to_rows_adjoint(other, x.shape)).sum()


@given(problem=problems(), leading=st.sampled_from([(), (1,), (2, 1)]))
@settings(max_examples=25)
def test_one_hot_rows_multiply_as_the_matrix_would(problem, leading):
    integers = SmallIntegers(**vars(problem))
    V, ids = problem.in_features, ids_of(problem)
    ids = np.broadcast_to(ids, (*leading, len(ids)))
    full, matrix = np.eye(V)[ids], integers.randn("matrix", V, problem.out_features)
    X = OneHot(ids, V, like=matrix)
    assert np.array_equal(X @ matrix, full @ matrix)
    flat = full.reshape(-1, V)
    left = integers.randn("left", problem.rank, len(flat))
    assert np.array_equal(left @ X.reshape(-1, V), left @ flat)


def test_patches_are_a_view_of_channel_first_memory():
    z = Conv2d(np.ones((2, 3, 3, 3)), padding=1).to_rows(np.ones((2, 3, 5, 5)))
    assert z.shape == (50, 27)
    assert z.T.flags.c_contiguous


def test_a_frozen_convolution_keeps_no_patches():
    layer = Conv2d(np.ones((2, 3, 3, 3)))
    layer.frozen = True
    _, cache = layer.forward(np.ones((1, 3, 4, 4)))
    _, of_matrix = cache.kept
    assert of_matrix.kept == (None,)


def test_a_convolutions_dx_is_computed_once(monkeypatch):
    layer = Conv2d(np.ones((2, 3, 3, 3)))
    y, cache = layer.forward(np.ones((1, 3, 4, 4)))
    monkeypatch.setattr(Linear, "input_gradient", lambda *_: pytest.fail("the matrix's own dx, which nobody asks for"))
    dx, _ = layer.backward(y, cache)
    assert dx.shape == (1, 3, 4, 4)


def test_an_adapted_embedding_forms_nothing_of_the_vocabularys_width():
    """But the gradient of A, which is as large as A."""
    vocabulary, dim, rank = 20_000, 16, 2
    rng = np.random.default_rng(0)
    layer = adapt(Embedding(rng.standard_normal((vocabulary, dim))), "", rank=rank, alpha=1, rng=rng)
    ids = rng.integers(0, vocabulary, 64)
    with traced() as memory:
        y, cache = layer.forward(ids)
        dx, _ = layer.backward(np.ones_like(y), cache)
    assert dx is None
    assert memory.peak < 1.5 * layer.adapter.lora_A.nbytes


IMAGES, SEQUENCES, IDS = np.ones((2, 2, 3, 3)), np.ones((2, 2, 3)), np.ones((3, 2))
OF_GROUPS = "groups=2 is not supported: every input is connected to every output here$"
BAD = [
    (lambda: Conv2d(IMAGES, groups=2), ValueError, OF_GROUPS),
    (lambda: Conv1d(SEQUENCES, groups=2), ValueError, OF_GROUPS),
    (lambda: Conv2d(SEQUENCES), ValueError, r"weight has shape \(2, 2, 3\), expected \(out, C, height, width\)"),
    (lambda: Conv1d(IMAGES), ValueError, r"weight has shape \(2, 2, 3, 3\), expected \(out, C, width\)"),
    (lambda: Conv2d(IMAGES, np.ones(3)), ValueError, r"bias has shape \(3,\), expected \(out,\) with out = 2"),
    (lambda: Conv2d(IMAGES, stride=0), ValueError, "stride must be at least 1, got 0$"),
    (lambda: Conv2d(IMAGES, padding=-1), ValueError, "padding must be at least 0, got -1$"),
    (lambda: Conv2d(IMAGES, padding=(1, 2, 3)), ValueError, r"padding must be an integer or 2 of them, got .1, 2, 3.$"),
    (lambda: Conv2d(IMAGES, dilation=1.5), TypeError, "dilation must be an integer, got 1.5$"),
    (lambda: Conv2d(IMAGES, padding="same"), TypeError, "padding must be an integer, got 'same'$"),
    (lambda: Conv2d(IMAGES)(np.ones((1, 3, 5, 5))), ValueError, r"x has shape .1, 3, 5, 5., expected 4 axes, .N, 2, "),
    (lambda: Conv2d(IMAGES)(np.ones((2, 5, 5))), ValueError, r"x has shape .2, 5, 5., expected 4 axes, .N, 2, ....$"),
    (lambda: Conv2d(IMAGES)(np.ones((1, 2, 2, 5))), ValueError,
     r"x has shape \(1, 2, 2, 5\): with padding \(0, 0\) it is smaller than the kernel Conv2d"),
    (lambda: Conv2d(IMAGES)(np.ones((1, 2, 5, 5), "f4")), TypeError, "x has dtype float32, expected float64 as in "),
    (lambda: Embedding(np.ones(3)), ValueError, r"weight has shape \(3,\), expected"),
    (lambda: Embedding(np.ones((3, 2), int)), TypeError, "weight has dtype int64, expected a floating-point dtype"),
    (lambda: Embedding(IDS)(np.array([0, 3])), ValueError, "x holds 3"),
    (lambda: Embedding(IDS)(np.array([-1])), ValueError, "x holds -1"),
    (lambda: Embedding(IDS)(np.array([1.0])), TypeError, "x has dtype float64, expected integers$"),
    (lambda: Embedding(IDS)([1]), TypeError, "x must be an array of integers, got list; convert it with"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_ids_end_the_way_down_through_a_model():
    rng = np.random.default_rng(0)
    model = Sequential(table=Embedding(rng.standard_normal((7, 3))), fc=Linear(rng.standard_normal((2, 3))))
    y, cache = model.forward(np.array([[1, 1, 6]]))
    dx, grads = model.backward(np.ones_like(y), cache)
    assert dx is None
    assert grads.keys() == {"table.weight", "fc.weight"}
    assert np.array_equal(grads["table.weight"][1], 2 * grads["table.weight"][6])
