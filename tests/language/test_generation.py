"""Generation: token-by-token scores equal those of a forward pass over the whole text."""

import copy
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Llama
from minilora.language.generation import choose, generate, nucleus

from ..support.compare import assert_close, calls_of, refused
from ..support.language import adapted, tiny_llama, tiny_mixture

V = tiny_llama().config.vocab_size


def whole(model, ids):
    """Return the scores after the last id, computed without a cache."""
    return model(np.array([ids]))[0, -1]


MODELS = {
    "frozen": tiny_llama,
    "adapted": lambda seed: adapted(model=tiny_llama(seed)),
    "adapted at both ends": lambda seed: adapted(["q_proj", "embed_tokens", "lm_head"], tiny_llama(seed)),
    **{kind: partial(tiny_mixture, kind) for kind in ("mixtral", "qwen2_moe", "qwen3_moe")},
}


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=5)
@given(seed=st.integers(0, 99), first=st.integers(1, 6), parts=st.lists(st.integers(1, 4), max_size=3))
@example(seed=1, first=3, parts=[1, 4, 1])
def test_kept_keys_and_values_give_the_uncached_scores(model, seed, first, parts):
    """This holds for every split into prompt and continuation, and a past can be extended more than once."""
    model, ids = MODELS[model](seed), np.random.default_rng(seed).integers(V, size=first + sum(parts)).tolist()
    done, past = 0, None
    for part in (first, *parts):
        before = copy.deepcopy(past)
        logits, further = model.extend(np.array([ids[done : done + part]]), past)
        done += part
        assert_close(logits[0], whole(model, ids[:done]), 1e-12)
        for entry, kept in zip(past or [], before or [], strict=True):
            np.testing.assert_array_equal(entry, kept)
        past = further


@given(seed=st.integers(0, 99), count=st.integers(1, 12))
def test_greedy_chooses_the_most_likely_token_every_time(seed, count):
    model, ids = adapted(model=tiny_llama(seed)), [seed % V, 3]
    found = list(generate(model, ids, count))
    assert len(found) == count
    for token in found:
        scores = whole(model, ids)
        assert scores[token] >= scores.max() - 1e-12
        ids.append(token)


def test_one_seed_gives_one_text():
    def said(seed, temperature=1.0, **more):
        rng = np.random.default_rng(seed)
        return list(generate(adapted(), [1, 2], 15, temperature=temperature, rng=rng, **more))

    assert said(5) == said(5) != said(6)
    greedy = list(generate(adapted(), [1, 2], 15))
    assert said(5, 1e-9) == said(6, 1e-9) == said(5, 1.5, top_p=1e-9) == greedy
    assert said(5, 1e9) != said(5)
    assert said(3, 1.5) == said(3, 1.5, top_p=1) != said(3, 1.5, top_p=0.5)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    z, rng, n = np.array([1.0, -2.0, 0.5, -np.inf, 2.5], np.float32), np.random.default_rng(0), 2_000
    p = np.exp(z.astype(float) / temperature)
    p /= p.sum()
    counts = np.bincount([choose(z, temperature, rng) for _ in range(n)], minlength=5)
    assert counts[3] == 0
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p)) + 1e-9).all()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any), st.floats(0.01, 1))
@settings(max_examples=30)
def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens(weights, P):
    q = np.array(weights) / sum(weights)
    p = nucleus(q, P)
    kept = p > 0
    np.testing.assert_allclose(p, np.where(kept, q, 0) / q[kept].sum(), rtol=1e-12)
    if P < 1 - 1e-9:
        assert q[kept].sum() >= P - 1e-9
        assert q[kept].sum() - q[kept].min() < P + 1e-9  # without its least likely token it would be too small
    assert not (~kept).any() or q[~kept].max() <= q[kept].min()


def test_top_p_draws_only_from_the_nucleus():
    np.testing.assert_array_equal(nucleus(np.array([0.25, 0.25, 0.25, 0.25]), 0.5), [0.5, 0.5, 0, 0])  # the first
    for k in range(1, 14):  # of so many, a sort that may exchange equals does
        assert np.flatnonzero(nucleus(np.arange(40) % 3 / 39, (2 * k - 1) / 39)).tolist() == [*range(2, 3 * k, 3)]
    z, rng = np.log([0.5, 0.05, 0.3, 0.15]), np.random.default_rng(0)
    for top_p, found in ((0.01, {0}), (0.5, {0}), (0.6, {0, 2}), (0.81, {0, 2, 3}), (1.0, {0, 1, 2, 3})):
        assert {choose(z, 1.0, rng, top_p) for _ in range(200)} == found
    assert {choose(z, 100.0, rng, 0.6) for _ in range(200)} > {0, 2}  # of the probabilities at its temperature


@pytest.mark.parametrize("temperature", [0.1, 5e-324])
@pytest.mark.parametrize("z", [[1e30, 3e30, -1e30], [-1e4, -1e4 + 20, -2e4]])
def test_scores_of_any_size_can_be_drawn_from(z, temperature):
    with np.errstate(over="raise", invalid="raise"):
        assert {choose(np.array(z, np.float32), temperature, np.random.default_rng(s)) for s in range(20)} == {1}


def test_the_text_ends_where_the_model_ends_it():
    model = adapted(model=tiny_llama(4))
    free = list(generate(model, [1], 20))
    end = free[6]
    assert list(generate(model, [1], 20, end={end})) == free[: free.index(end)]
    assert list(generate(model, [1], 20, end={free[0]})) == []


def test_tokens_come_as_they_are_chosen(monkeypatch):
    calls = calls_of(monkeypatch, Llama, "extend")
    stream = generate(adapted(), [1, 2, 3], 4)
    assert not calls
    next(stream)
    assert len(calls) == 1
    assert len(list(stream)) == 3
    assert [ids.shape[1] for _, ids, *_ in calls] == [3, 1, 1, 1]  # and none after the last token


def test_bad_input_is_refused_before_anything_is_computed(monkeypatch):
    for change, error, message in (
        ({"prompt": []}, ValueError, "prompt is empty: give at least one token"),
        ({"prompt": "the"}, TypeError, "prompt has dtype <U3, expected integers"),
        ({"prompt": [1, 2.5]}, TypeError, "prompt has dtype float64, expected integers"),
        ({"prompt": [-1]}, ValueError, f"prompt holds -1 at (0,), expected 0 to {V - 1}"),
        ({"prompt": [1, V]}, ValueError, f"prompt holds {V} at (1,), expected 0 to {V - 1}"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"temperature": -1}, ValueError, "temperature must be at least 0 and finite, got -1"),
        ({"temperature": float("nan")}, ValueError, "temperature must be at least 0 and finite, got nan"),
        ({"temperature": 1}, TypeError,
         "rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got None"),
        ({"top_p": 0}, ValueError, "top_p must be above 0 and finite, got 0"),
        ({"top_p": 1.01}, ValueError, "top_p must be above 0 and at most 1, got 1.01"),
        ({"prompt": [[1]]}, ValueError, "prompt has shape (1, 1), expected (T,)"),
        ({"end": 3}, TypeError, "'int' object is not iterable"),
        ({"end": ["a"]}, TypeError, "an id of end must be an integer, got 'a'"),
    ):  # fmt: skip
        model = tiny_llama()
        monkeypatch.setattr(type(model), "extend", lambda *a: pytest.fail("the model ran"))
        with refused(message, error):
            generate(**{"model": model, "prompt": [1], "tokens": 3, **change})


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_finite_are_refused(temperature):
    model = tiny_llama(dtype="float32")
    model.lm_head.weight[3] = 3e38
    with pytest.raises(ValueError, match=r"^a score of the next token is NaN or infinite: .* are too large$"):
        list(generate(model, [1, 2], 3, temperature=temperature, rng=np.random.default_rng(0)))
