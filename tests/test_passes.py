"""Which rows a step takes: each pass is through all of them, and follows from the seed and its number."""

import re
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Linear, LoRALinear, train
from minilora.fast import accumulate
from minilora.files.checkpoint import CheckpointError
from minilora.training import Passes, draw_batches

SIZES = st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
SEEDS = st.integers(0, 2**64)
X, Y = (np.random.default_rng(0).standard_normal((23, width)) for width in (5, 4))


def layer():
    rng = np.random.default_rng(1)
    return LoRALinear.from_linear(Linear.init(5, 4, rng=rng, dtype="float64"), rank=2, alpha=2, rng=rng)


def trained(model=None, batch_size=6, seed=3, **settings):
    """Return a layer's factors after a training in passes."""
    model = model or layer()
    passes = Passes(len(X), batch_size, seed)
    train(model, X, Y, rng=np.random.default_rng(0), batches=passes, **{"epochs": 4, "lr": 0.01, **settings})
    return [p.copy() for p in model.trainable().values()]


@given(SIZES, SEEDS, st.integers(0, 9))
def test_each_pass_has_every_row_once(sizes, seed, number):
    passes = Passes(*sizes, seed)
    steps = [passes(number * passes.steps + k) for k in range(1, passes.steps + 1)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(sizes[0]))
    assert {len(rows) for rows in steps[:-1]} <= {sizes[1]}
    assert len(steps) == -(-sizes[0] // sizes[1])


@example((4, 2), 0, [3, 1])  # a later pass first
@given(SIZES, SEEDS, st.lists(st.integers(1, 99), max_size=9))
def test_the_rows_of_a_step_follow_from_seed_and_number(sizes, seed, asked):
    passes = Passes(*sizes, seed)
    for t in asked:  # in any order, from one object or from new ones
        np.testing.assert_array_equal(passes(t), Passes(*sizes, seed)(t))


@given(st.integers(1, 40), SEEDS, st.integers(1, 40), st.integers(1, 40))
def test_the_size_of_a_batch_cuts_one_order(n, seed, one, other):
    a, b = (Passes(n, min(size, n), seed) for size in (one, other))
    for number in range(2):
        np.testing.assert_array_equal(
            *(np.concatenate([of(number * of.steps + k + 1) for k in range(of.steps)]) for of in (a, b))
        )


def test_passes_have_orders_of_their_own():
    passes = Passes(30, 30, 0)
    orders = [tuple(passes(t)) for t in range(1, 20)] + [tuple(Passes(30, 30, seed)(1)) for seed in range(1, 20)]
    assert len(set(orders)) == 38
    assert tuple(np.random.default_rng(0).permutation(30)) not in orders  # the adapters start from the seed itself


def test_a_place_in_a_pass_is_everyones_alike():
    """Over 3,000 seeds each of 6 rows comes first about as often as any other."""
    first = np.bincount([Passes(6, 2, seed)(4)[0] for seed in range(3000)], minlength=6)
    assert np.abs(first - 500).max() < 5 * np.sqrt(500)


def test_a_training_takes_the_rows_that_its_passes_name():
    seen = []

    def gradients(model, x, y, loss):
        seen.append([int(np.flatnonzero((row == X).all(axis=1))[0]) for row in x])
        return {name: np.zeros_like(p) for name, p in model.trainable().items()}

    trained(gradients=gradients, epochs=3)
    passes = Passes(23, 6, 3)
    assert seen == [passes(t).tolist() for t in range(1, 13)]
    assert [len(rows) for rows in seen] == [6, 6, 6, 5] * 3


@pytest.mark.parametrize("parts", [{"rows": 1}, {"rows": 4, "workers": 2}, {"rows": 6, "workers": 3}])
def test_parts_and_workers_take_the_same_rows(parts):
    for ours, whole in zip(trained(gradients=accumulate(**parts)), trained(), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-10)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stop", range(1, 12))
def test_training_stopped_anywhere_goes_on_to_the_same_bits(stop, tmp_path):
    one_step = {"epochs": 12, "steps": 1, "checkpoint": tmp_path / "c"}

    def report(state):
        if state.epoch == stop:
            raise Stopped

    with pytest.raises(Stopped):
        trained(report=report, **one_step)
    for resumed, unbroken in zip(trained(**one_step), trained(epochs=12, steps=1), strict=True):
        np.testing.assert_array_equal(resumed, unbroken)


def test_a_checkpoint_holds_no_order(tmp_path):
    trained(checkpoint=tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    assert b"Passes(n=23, batch_size=6, seed=3)" in before
    assert len(before) < 4500


def test_a_checkpoint_of_other_draws_is_refused(tmp_path):
    train(layer(), X, Y, rng=np.random.default_rng(0), batch_size=6, steps=4, epochs=2, checkpoint=tmp_path / "c")
    with pytest.raises(CheckpointError, match="batches is None there and 'Passes"):
        trained(checkpoint=tmp_path / "c", lr=1e-3)


def test_without_passes_each_batch_is_drawn_from_the_generator(monkeypatch):
    drawn, module = [], sys.modules["minilora.training"]
    monkeypatch.setattr(module, "draw_batches", lambda *a: drawn.append(draw_batches(*a)) or drawn[-1])
    train(layer(), X, Y, rng=np.random.default_rng(5), batch_size=6, epochs=2)
    again = np.random.default_rng(5)
    for rows in drawn:
        np.testing.assert_array_equal(rows, [again.choice(23, 6, replace=False, shuffle=False) for _ in range(3)])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 23], "batches(1) holds 0 to 23, expected rows from 0 to 22"),
        ([-1, 3], "batches(1) holds -1 to 3, expected rows from 0 to 22"),
        ([[0, 1]], "batches(1) has int64 (1, 2), expected 1 to 6 row numbers"),
        ([0.5], "batches(1) has float64 (1,), expected 1 to 6 row numbers"),
        (range(7), "batches(1) has int64 (7,), expected 1 to 6 row numbers"),
        ([], "batches(1) has float64 (0,), expected 1 to 6 row numbers"),
    ],
)
def test_rows_that_are_none_are_refused_before_a_step(rows, message):
    model = layer()
    before = [p.copy() for p in model.trainable().values()]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train(model, X, Y, rng=np.random.default_rng(0), batch_size=6, epochs=1, batches=lambda t: rows)
    for p, old in zip(model.trainable().values(), before, strict=True):
        np.testing.assert_array_equal(p, old)


@settings(max_examples=20)
@given(st.sampled_from([{"n": 0}, {"batch_size": 0}, {"batch_size": 9}, {"seed": -1}, {"n": 2.5}]))
def test_passes_through_what_is_not_there_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(wrong))} must be"):
        Passes(**{"n": 8, "batch_size": 4, "seed": 0, **wrong})
