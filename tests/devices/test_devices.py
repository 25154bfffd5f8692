"""The whole library where the arrays live: what it computes is what NumPy computes, bit for bit on the stand-in."""

import math
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import (
    Embedding,
    Linear,
    LoRA,
    LoRALinear,
    TrainingDiverged,
    adapt,
    article,
    best_adapter,
    best_adapter_from_gram,
    cross_entropy,
    evaluate,
    gradcheck,
    mse,
    train,
)
from minilora.fast import accumulate, residual_form
from minilora.language import next_token_loss
from minilora.language.generation import generate
from minilora.language.llama import checkpointed
from minilora.language.text import evaluate_where_it_counts, windows
from minilora.layer import rebuild

from ..support.cupy_standin import traffic
from ..support.language import TEXT, ids_of, tiny_llama
from ..support.places import elsewhere

# The fixture `place` is the same for every example, and holds nothing that an example changes.
several = settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sizes = st.tuples(*[st.integers(1, 6)] * 4)
seeds = st.integers(0, 2**32 - 1)
EVERYWHERE = elsewhere(("stand-in with kernels", "float64"))

N, IN, OUT, RANK = 50, 7, 5, 2


def layers(put, rng, dtype="float32", n_in=IN, n_out=OUT, rank=RANK):
    """Return one layer of each kind with random weights: one seed, the same layers in every place."""

    def randn(*shape):
        return put(rng.standard_normal(shape).astype(dtype))

    def lora():
        return LoRA(randn(rank, n_in), randn(n_out, rank), 3.0)

    linear = Linear(randn(n_out, n_in), randn(n_out))
    return {"Linear": linear, "LoRA": lora(), "LoRALinear": LoRALinear(rebuild(linear), lora())}


def data(put, rng, dtype="float32", n=N, n_in=IN, n_out=OUT):
    """Return inputs and targets."""
    return [put(rng.standard_normal((n, width)).astype(dtype)) for width in (n_in, n_out)]


@elsewhere()
@several
@given(sizes=sizes, seed=seeds)
def test_the_residual_form_is_numpys(place, dtype, sizes, seed):
    n, n_in, n_out, rank = sizes
    here, there = (
        (layers(put, np.random.default_rng(seed), dtype, n_in, n_out, rank),
         data(put, np.random.default_rng(1), dtype, n, n_in, n_out))
        for put in (place.put, np.copy)
    )  # fmt: skip
    for kind in ("LoRA", "LoRALinear"):
        place.assert_all_same(residual_form(here[0][kind], *here[1]), residual_form(there[0][kind], *there[1]))


@elsewhere()
def test_one_seed_gives_one_start_everywhere(place, dtype):
    for init in (Linear.init, partial(LoRA.init, rank=RANK, alpha=1)):
        here, there = (
            init(IN, OUT, rng=np.random.default_rng(3), dtype=dtype, backend=where) for where in (place.backend, None)
        )
        place.assert_all_same(here.trainable(), there.trainable())


@elsewhere()
@several
@given(sizes=sizes, seed=seeds)
def test_the_loss_is_numpys_and_an_array_of_the_library(place, dtype, sizes, seed):
    prediction, target = np.random.default_rng(seed).standard_normal((2, *sizes)).astype(dtype)
    found, expected = mse(place.put(prediction), place.put(target)), mse(prediction, target)
    for here, there in zip(found, expected, strict=True):
        place.assert_same(here, there)


@EVERYWHERE
@pytest.mark.parametrize(
    ("kind", "more"),
    [("Linear", {}), ("LoRA", {}), ("LoRALinear", {}), ("LoRA", {"weight_decay": 0.2, "max_grad_norm": 3.0})],
)
def test_training_goes_the_same_way_everywhere(place, dtype, kind, more):
    if more:  # a power of one half is the C library's where it is NumPy's own scalar, and not to the last bit the root
        place = replace(place, exact=False)

    def trained(put, put_parameter):
        layer = layers(put_parameter, np.random.default_rng(6), dtype)[kind]
        options = {"epochs": 4, "batch_size": 8, "lr": 0.01, "log_every": 2, "rng": np.random.default_rng(7)} | more
        return layer, train(layer, *data(put, np.random.default_rng(5), dtype), **options)

    (here, found), (there, expected) = trained(place.put, place.put_parameter), trained(np.copy, np.copy)
    assert found.epochs == expected.epochs == [2, 4]
    exact = place.exact and place.exact_adam
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0 if exact else 1e-9 if dtype == "float64" else 5e-5)
    place.assert_all_same(here.trainable(), there.trainable(), adam=True)


@EVERYWHERE
def test_the_article_runs_the_same_everywhere(place, dtype):
    options = {"rank": 2, "epochs": 2, "batch_size": 16, "n": 80, "in_features": 9, "out_features": 6, "dtype": dtype}
    here, there = article.run(backend=place.backend, **options), article.run(**options)
    assert isinstance(here.delta, np.ndarray)
    found, expected = (
        {"base": run.base.weight, "merged": run.merged.weight, "lora_A": run.adapter.lora_A} for run in (here, there)
    )
    place.assert_all_same(found, expected, adam=True)
    assert math.isclose(here.merged_loss, there.merged_loss, rel_tol=1e-4)
    assert place.backend.device in here.told


def test_gradients_are_checked_where_they_were_computed(place):
    x, target = data(place.put, np.random.default_rng(8), "float64", n=6)
    params = layers(place.put, np.random.default_rng(8), "float64")["LoRA"].trainable()
    grads = residual_form(LoRA(**params, alpha=2.0), x, target)

    def loss(p):
        return mse(LoRA(**p, alpha=2.0)(x), target)[0]

    assert gradcheck(loss, params, grads).passed


@elsewhere()
def test_the_best_adapter_is_the_same_everywhere(place, dtype):
    X, R = data(np.copy, np.random.default_rng(9), dtype)
    here, there = best_adapter(place.put(X), place.put(R), rank=RANK), best_adapter(X, R, rank=RANK)
    place.assert_same(here.delta(), there.delta())
    here = best_adapter_from_gram(place.put(X.T @ X), place.put(X.T @ R), rank=RANK)
    place.assert_same(here.delta(), best_adapter_from_gram(X.T @ X, X.T @ R, rank=RANK).delta())


def test_bad_data_are_named_wherever_they_are(place):
    rng = np.random.default_rng(10)
    X, Y = data(np.copy, rng, "float64")
    layer = layers(place.put_parameter, rng, "float64")["Linear"]
    before = place.backend.to_numpy(layer.weight).copy()
    for array, at, value, said in ((Y, (4, 2), np.nan, "Y"), (X, (0, 1), -np.inf, "X")):
        array[at] = value
        message = rf"{said} holds NaN or infinity: entry \({at[0]}, {at[1]}\) is {value}"
        with pytest.raises(ValueError, match=message):
            train(layer, place.put(X), place.put(Y), batch_size=8, rng=rng)
    place.assert_same(layer.weight, before)


def test_a_divergence_is_told_in_the_same_words_everywhere(place):
    def told(put, put_parameter):
        rng = np.random.default_rng(11)
        layer = layers(put_parameter, rng)["Linear"]
        X, Y = data(lambda host: put(1e18 * host), rng)
        with pytest.raises(TrainingDiverged) as caught:
            train(layer, X, Y, batch_size=8, lr=1e20, rng=rng)
        return str(caught.value), caught.value.epoch, caught.value.step

    expected = told(np.copy, np.copy)
    assert expected[0].startswith("epoch 1: weight, bias is no longer finite, and no loss was reported before")
    assert told(place.put, place.put_parameter) == expected


# --- how often the host waits, and what crosses over ---


@pytest.mark.parametrize("kind", ["Linear", "LoRA", "LoRALinear"])
@pytest.mark.parametrize(("epochs", "log_every"), [(3, 1), (5, 2), (4, 10)])
def test_training_waits_once_an_epoch_and_once_a_logged_loss(standin, kind, epochs, log_every):
    rng = np.random.default_rng(12)
    layer, (X, Y) = layers(standin.asarray, rng)[kind], data(standin.asarray, rng)
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
    layer = layers(standin.asarray, rng)["LoRALinear"]
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


def test_the_residual_form_does_not_wait_and_evaluating_once(standin, monkeypatch):
    """However many blocks of rows there are."""
    monkeypatch.setattr(import_module("minilora.training"), "EVALUATION_ROWS", 8)
    rng = np.random.default_rng(14)
    layer, (X, Y) = layers(standin.asarray, rng)["LoRALinear"], data(standin.asarray, rng)
    for call, waits in ((residual_form, 0), (evaluate, 1)):
        traffic.reset()
        call(layer, X, Y)
        assert (traffic.waits, traffic.to_device, traffic.to_host) == (waits, 0, 0)


# --- a language model ---

WINDOWS = windows(ids_of(TEXT)[:800], 8)


def language_model(put):
    model = rebuild(tiny_llama(dtype="float32"), array=put)
    return adapt(model, ["q_proj", "down_proj"], rank=2, alpha=4, rng=np.random.default_rng(1))


def fine_tune(put, *, rows=4, epochs=2, steps=2, model_of=lambda adapted: adapted):
    """Return the adapted model after some steps, and the losses: of the same start and batches everywhere."""
    adapted = language_model(put)
    X, Y, *held_out = map(put, WINDOWS)
    traffic.reset()
    history = train(
        model_of(adapted), X, Y, epochs=epochs, steps=steps, batch_size=4, lr=1e-2, rng=np.random.default_rng(2),
        log_every=1, loss=next_token_loss, gradients=accumulate(rows), held_out=tuple(held_out),
    )  # fmt: skip
    return adapted, history.losses


@pytest.fixture(scope="module")
def on_numpy():
    return fine_tune(np.copy)


@pytest.mark.parametrize("model_of", [lambda adapted: adapted, checkpointed], ids=["kept", "recomputed"])
def test_fine_tuning_gives_the_losses_of_numpy(place, on_numpy, model_of):
    adapted, losses = fine_tune(place.put_parameter, model_of=model_of)
    expected, expected_losses = on_numpy
    np.testing.assert_allclose(losses, expected_losses, rtol=0 if place.exact and place.exact_adam else 1e-4)
    assert losses[-1] < losses[0]
    place.assert_all_same(adapted.trainable(), expected.trainable(), adam=True)


def test_the_loss_where_it_counts_is_numpys(place):
    """The head's ids are more than its inputs are wide: of a hidden state no id is refused."""
    Y = np.where(np.arange(8) < 5, -100, WINDOWS[1])
    here, there = (
        evaluate_where_it_counts(language_model(put_parameter), put(WINDOWS[0]), put(Y), next_token_loss)
        for put, put_parameter in ((place.put, place.put_parameter), (np.copy, np.copy))
    )
    assert here == pytest.approx(there, rel=1e-6)


@pytest.mark.parametrize("rows", [4, 1])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (3, 5)])
def test_fine_tuning_waits_as_often_whatever_the_steps(standin, rows, epochs, steps):
    """At the start for the range of ids and for the loss, and again after the first epoch; once an epoch."""
    fine_tune(standin.asarray)  # the cosines and sines of all positions go over once
    _, losses = fine_tune(standin.asarray, rows=rows, epochs=epochs, steps=steps)
    assert traffic.waits == 2 + 3 + 3 + epochs + len(losses)
    assert (traffic.to_device, traffic.to_host) == (epochs, 2)


@pytest.mark.parametrize(("name", "wrong"), [("X", -1), ("X", 29), ("Y", 29), ("Y", -99)])
def test_an_id_that_a_gpu_would_replace_is_refused(standin, name, wrong):
    adapted = language_model(standin.asarray)
    X, Y, *held = (array.copy() for array in WINDOWS)
    Y[0, 0] = -100  # which does not count
    {"X": X, "Y": Y}[name][-1, 3] = wrong
    X, Y, *held = map(standin.asarray, (X, Y, *held))
    given = {"batch_size": 4, "loss": next_token_loss, "rng": np.random.default_rng(2), "steps": 1, "epochs": 1}
    with pytest.raises(ValueError, match=rf"^{name} holds {wrong}, expected 0 to 28$"):
        train(adapted, X, Y, **given)
    with pytest.raises(ValueError, match=rf"^held_out: {name} holds {wrong}, expected 0 to 28$"):
        train(adapted, *held, held_out=(X, Y), **given)
    Y[...] = -100
    with pytest.raises(ValueError, match=r"^Y has no target that counts: all of them are -100$"):
        evaluate(adapted, held[0], Y[: len(held[0])], next_token_loss)


def test_threads_are_refused_where_a_gpu_computes(standin):
    adapted, (X, Y, *_) = language_model(standin.asarray), map(standin.asarray, WINDOWS)
    before = {name: standin.to_numpy(p).tobytes() for name, p in adapted.trainable().items()}
    ways = {"batch_size": 4, "loss": next_token_loss, "gradients": accumulate(2, workers=2)}
    with pytest.raises(ValueError, match="workers = 2 is for NumPy, expected 1 where x is a cupy"):
        train(adapted, X, Y, epochs=1, steps=1, rng=np.random.default_rng(2), **ways)
    with pytest.raises(ValueError, match="workers = 2 is for NumPy"):
        evaluate(adapted, X, Y, next_token_loss, 2)
    assert {name: standin.to_numpy(p).tobytes() for name, p in adapted.trainable().items()} == before


def test_generation_fetches_one_row_of_scores_a_token(standin):
    """The token goes back, and the cosines and sines of its position."""
    model = rebuild(tiny_llama(dtype="float32"), array=standin.asarray)
    expected = list(generate(tiny_llama(dtype="float32"), [3, 1, 4], 6))
    traffic.reset()
    assert list(generate(model, [3, 1, 4], 6)) == expected
    assert (traffic.to_device, traffic.to_host) == (3 * 6, 6)
