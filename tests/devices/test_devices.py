"""The whole library where the arrays live: what it computes is what NumPy computes, bit for bit on the stand-in."""

import math
from functools import partial
from importlib import import_module

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import (
    Adam,
    Embedding,
    Linear,
    LoRA,
    LoRALinear,
    TrainingDiverged,
    article,
    best_adapter,
    best_adapter_from_gram,
    cross_entropy,
    evaluate,
    gradcheck,
    mse,
    taylor_orders,
    train,
)
from minilora.cli import main
from minilora.fast import residual_form

from ..support.cupy_standin import traffic

# The fixture `place` is the same for every example, and holds nothing that an example changes.
several = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(*[st.integers(1, 6)] * 4)
seeds = st.integers(0, 2**32 - 1)
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

N, IN, OUT, RANK = 50, 7, 5, 2


def layers(put, rng, dtype, n_in=IN, n_out=OUT, rank=RANK):
    """Return one layer of each kind with random weights: one seed, the same layers in every place."""

    def randn(*shape):
        return put(rng.standard_normal(shape).astype(dtype))

    return {
        "Linear": Linear(randn(n_out, n_in), randn(n_out)),
        "LoRA": LoRA(randn(rank, n_in), randn(n_out, rank), 3.0),
        "LoRALinear": LoRALinear(
            Linear(randn(n_out, n_in), randn(n_out)), LoRA(randn(rank, n_in), randn(n_out, rank), 3.0)
        ),
    }


def copied(host):
    return host.copy()


@dtypes
@several
@given(sizes=sizes, seed=seeds)
def test_the_residual_form_is_numpys(place, dtype, sizes, seed):
    n, n_in, n_out, rank = sizes
    rng = np.random.default_rng(seed)
    x, target = (rng.standard_normal((n, width)).astype(dtype) for width in (n_in, n_out))
    here, there = (layers(put, np.random.default_rng(seed), dtype, n_in, n_out, rank) for put in (place.put, copied))
    for kind in ("LoRA", "LoRALinear"):
        found = residual_form(here[kind], place.put(x), place.put(target))
        for name, expected in residual_form(there[kind], x, target).items():
            place.assert_same(found[name], expected)


@dtypes
def test_one_seed_gives_one_start_everywhere(place, dtype):
    for init in (Linear.init, partial(LoRA.init, rank=RANK, alpha=1)):
        here, there = (
            init(IN, OUT, rng=np.random.default_rng(3), dtype=dtype, backend=where) for where in (place.backend, None)
        )
        for name, p in there.trainable().items():
            place.assert_same(here.trainable()[name], p)


@dtypes
@several
@given(sizes=sizes, seed=seeds)
def test_the_loss_is_numpys_and_an_array_of_the_library(place, dtype, sizes, seed):
    prediction, target = np.random.default_rng(seed).standard_normal((2, *sizes)).astype(dtype)
    loss, gradient = mse(place.put(prediction), place.put(target))
    expected_loss, expected_gradient = mse(prediction, target)
    place.assert_same(loss, expected_loss)
    place.assert_same(gradient, expected_gradient)


@dtypes
@several
@given(seed=seeds, steps=st.integers(1, 5), more=st.sampled_from([{}, {"weight_decay": 0.2, "max_grad_norm": 3.0}]))
def test_adam_moves_as_on_numpy(place, dtype, seed, steps, more):
    rng = np.random.default_rng(seed)
    start = {name: rng.standard_normal(shape).astype(dtype) for name, shape in {"a": (3, 4), "b": (5,)}.items()}
    here = Adam({name: place.put_parameter(p) for name, p in start.items()}, lr=0.1, betas=(0.8, 0.95), **more)
    there = Adam({name: p.copy() for name, p in start.items()}, lr=0.1, betas=(0.8, 0.95), **more)
    for _ in range(steps):
        grads = {name: rng.standard_normal(p.shape).astype(dtype) for name, p in start.items()}
        here.step({name: place.put(g) for name, g in grads.items()})
        there.step(grads)
    for name in start:
        place.assert_same(here.params[name], there.params[name], adam=True)
        place.assert_same(here.m[name], there.m[name], adam=True)
        place.assert_same(here.v[name], there.v[name], adam=True)


@dtypes
@pytest.mark.parametrize("kind", ["Linear", "LoRA", "LoRALinear"])
def test_training_goes_the_same_way_everywhere(place, dtype, kind):
    X, Y = (np.random.default_rng(5).standard_normal((N, width)).astype(dtype) for width in (IN, OUT))
    here, there = (layers(put, np.random.default_rng(6), dtype)[kind] for put in (place.put_parameter, copied))
    options = {"epochs": 4, "batch_size": 8, "lr": 0.01, "log_every": 2}
    found = train(here, place.put(X), place.put(Y), rng=np.random.default_rng(7), **options)
    expected = train(there, X, Y, rng=np.random.default_rng(7), **options)
    assert found.epochs == expected.epochs == [2, 4]
    exact = place.exact and place.exact_adam
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0 if exact else 1e-9 if dtype == "float64" else 5e-5)
    for name, p in there.trainable().items():
        place.assert_same(here.trainable()[name], p, adam=True)


@dtypes
def test_the_article_runs_the_same_everywhere(place, dtype):
    options = {"rank": 2, "epochs": 2, "batch_size": 16, "n": 80, "in_features": 9, "out_features": 6, "dtype": dtype}
    here, there = article.run(backend=place.backend, **options), article.run(**options)
    assert isinstance(here.delta, np.ndarray)
    for found, expected in (
        (here.base.weight, there.base.weight),
        (here.merged.weight, there.merged.weight),
        (here.adapter.lora_A, there.adapter.lora_A),
    ):
        place.assert_same(found, expected, adam=True)
    assert math.isclose(here.merged_loss, there.merged_loss, rel_tol=1e-4)
    report = article.report(here)
    assert place.backend.device in report


def test_gradients_are_checked_where_they_were_computed(place):
    rng = np.random.default_rng(8)
    x, target = (place.put(rng.standard_normal((6, width))) for width in (IN, OUT))
    A, B = (place.put(rng.standard_normal(shape)) for shape in ((RANK, IN), (OUT, RANK)))
    params = {"lora_A": A, "lora_B": B}
    grads = residual_form(LoRA(A, B, 2.0), x, target)

    def loss(p):
        return mse(LoRA(p["lora_A"], p["lora_B"], 2.0)(x), target)[0]

    assert gradcheck(loss, params, grads).passed
    first = taylor_orders(loss, params, grads).first_orders
    assert abs(np.median(first) - 2) < 0.1


@dtypes
def test_the_best_adapter_is_the_same_everywhere(place, dtype):
    rng = np.random.default_rng(9)
    X, R = (rng.standard_normal((N, width)).astype(dtype) for width in (IN, OUT))
    here, there = best_adapter(place.put(X), place.put(R), rank=RANK), best_adapter(X, R, rank=RANK)
    place.assert_same(here.delta(), there.delta())
    here = best_adapter_from_gram(place.put(X.T @ X), place.put(X.T @ R), rank=RANK)
    place.assert_same(here.delta(), best_adapter_from_gram(X.T @ X, X.T @ R, rank=RANK).delta())


def test_bad_data_are_named_wherever_they_are(place):
    rng = np.random.default_rng(10)
    X, Y = rng.standard_normal((N, IN)), rng.standard_normal((N, OUT))
    layer = layers(place.put_parameter, rng, "float64")["Linear"]
    before = place.backend.to_numpy(layer.weight).copy()
    Y[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"Y holds NaN or infinity: entry \(4, 2\) is nan"):
        train(layer, place.put(X), place.put(Y), batch_size=8, rng=rng)
    X[0, 1] = -np.inf
    with pytest.raises(ValueError, match=r"X holds NaN or infinity: entry \(0, 1\) is -inf"):
        train(layer, place.put(X), place.put(Y), batch_size=8, rng=rng)
    place.assert_same(layer.weight, before)


def test_a_divergence_is_told_in_the_same_words_everywhere(place):
    def told(put, put_parameter):
        rng = np.random.default_rng(11)
        layer = layers(put_parameter, rng, "float32")["Linear"]
        X, Y = (put(1e18 * rng.standard_normal((N, width)).astype("float32")) for width in (IN, OUT))
        with pytest.raises(TrainingDiverged) as caught:
            train(layer, X, Y, batch_size=8, lr=1e20, rng=rng)
        return str(caught.value), caught.value.epoch, caught.value.step

    expected = told(np.copy, np.copy)
    assert expected[0].startswith("epoch 1: weight, bias is no longer finite, and no loss was reported before")
    assert told(place.put, place.put_parameter) == expected


@pytest.mark.parametrize("kind", ["Linear", "LoRA", "LoRALinear"])
@pytest.mark.parametrize(("epochs", "log_every"), [(3, 1), (5, 2), (4, 10)])
def test_training_waits_once_an_epoch_and_once_a_logged_loss(standin, kind, epochs, log_every):
    rng = np.random.default_rng(12)
    layer = layers(standin.asarray, rng, "float32")[kind]
    X, Y = (standin.asarray(rng.standard_normal((N, width)), "float32") for width in (IN, OUT))
    traffic.reset()
    history = train(layer, X, Y, epochs=epochs, batch_size=8, log_every=log_every, rng=rng)
    # At the start once for X and Y and twice for the loss, which is looked at after the first epoch again; once for the
    # parameters after an epoch; once for each loss.
    assert traffic.waits == 3 + 2 + epochs + len(history.losses)
    assert traffic.to_device == epochs, "the row numbers of an epoch's batches go over together"
    assert traffic.to_host == 0


def test_classes_out_of_range_are_refused_beside_numbers_too(standin):
    """Where a GPU would take another: numbers in and classes out, ids in and numbers out."""
    rng = np.random.default_rng(12)
    layer = layers(standin.asarray, rng, "float32")["LoRALinear"]
    X, Y = standin.asarray(rng.standard_normal((N, IN)), "float32"), rng.integers(0, OUT, N)
    for wrong in (OUT, -1):
        Y[3] = wrong
        for measure in (lambda *data: train(layer, *data, epochs=1, loss=cross_entropy, rng=rng),
                        lambda *data: evaluate(layer, *data, cross_entropy)):  # fmt: skip
            with pytest.raises(ValueError, match=rf"^Y holds {wrong}, expected 0 to {OUT - 1}$"):
                measure(X, standin.asarray(Y))
    Y[3] = -100
    traffic.reset()
    evaluate(layer, X, standin.asarray(Y), cross_entropy)
    assert (traffic.waits, traffic.to_host) == (2, 1)
    table = Embedding(standin.asarray(rng.standard_normal((4, OUT)), "float32"))
    with pytest.raises(ValueError, match=r"^X holds 4, expected 0 to 3$"):
        evaluate(table, standin.asarray(np.array([[0, 4]])), standin.asarray(np.ones((1, 2, OUT)), "float32"))


def test_the_residual_form_neither_waits_nor_copies(standin):
    rng = np.random.default_rng(14)
    x, target = (standin.asarray(rng.standard_normal((N, width)), "float32") for width in (IN, OUT))
    layer = layers(standin.asarray, rng, "float32")["LoRALinear"]
    traffic.reset()
    residual_form(layer, x, target)
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)


def test_evaluating_waits_once_however_many_rows_there_are(standin, monkeypatch):
    monkeypatch.setattr(import_module("minilora.training"), "EVALUATION_ROWS", 8)
    rng = np.random.default_rng(15)
    layer = layers(standin.asarray, rng, "float64")["Linear"]
    X, Y = (standin.asarray(rng.standard_normal((N, width))) for width in (IN, OUT))
    traffic.reset()
    evaluate(layer, X, Y)
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (1, 0, 0)


@pytest.mark.long
@pytest.mark.parametrize("command", [["check"], ["article", "--epochs", "1"]])
def test_the_command_line_computes_on_the_backend_it_is_told(standin, small_article, small_check, capsys, command):
    assert main([*command, "--backend", "cupy"]) == 0
    assert "the device that is not there" in capsys.readouterr().out
    assert traffic.waits > 0
