"""The memory of a training by formula is what arrays of these sizes take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Adam, Linear, Sequential, adapt
from minilora.models.memory import LLAMA_2_7B, MATRICES, Decoder, training_memory

sizes = st.integers(1, 6)


@st.composite
def decoders(draw):
    key_value_heads = draw(st.integers(1, 3))
    heads = key_value_heads * draw(st.integers(1, 3))
    width = heads * draw(st.integers(1, 4))
    return Decoder(draw(sizes), width, draw(sizes), heads, key_value_heads, draw(sizes), draw(st.booleans()))


def layers_of(model):
    """Return the model's matrices as layers, for counting only."""
    one = {name: Linear(np.zeros(shape, np.float32)) for name, shape in model.shapes.items()}
    return Sequential(**{f"layer{i}": Sequential(**one) for i in range(model.layers)})


@given(decoders(), st.sets(st.sampled_from(MATRICES), min_size=1), st.integers(1, 4))
def test_trained_gradients_and_adam_are_those_of_real_adapters(model, targets, rank):
    found = training_memory(model, tokens=1, rank=rank, targets=sorted(targets))
    adapted = adapt(layers_of(model), sorted(targets), rank=rank, alpha=1, rng=np.random.default_rng(0))
    params = adapted.trainable()
    adam = Adam(params)
    assert found["trained"] == found["gradients"] == sum(p.nbytes for p in params.values())
    assert found["Adam"] == sum(a.nbytes for moment in (adam.m, adam.v) for a in moment.values())


@given(decoders())
def test_full_training_takes_sixteen_bytes_a_number(model):
    found = training_memory(model, tokens=1)
    matrices = sum(layer.weight.size for i in layers_of(model).children.values() for layer in i.children.values())
    embedding, norms = model.vocabulary * model.width, (2 * model.layers + 1) * model.width
    numbers = matrices + embedding * (1 if model.tied else 2) + norms
    assert sum(found[part] for part in ("weights", "trained", "gradients", "Adam")) == 16 * numbers


def test_llama_2_7b_has_the_parameters_that_are_published():
    assert LLAMA_2_7B.in_matrices + LLAMA_2_7B.elsewhere == 6_738_415_616


@given(decoders(), st.integers(1, 50), st.sets(st.sampled_from(MATRICES)))
def test_activations_grow_with_tokens_and_with_targets(model, tokens, targets):
    def activations(tokens, targets, **more):
        return training_memory(model, tokens=tokens, rank=1, targets=sorted(targets), **more)["activations"]

    assert activations(tokens, targets) == tokens * activations(1, targets)
    assert activations(1, targets) <= activations(1, MATRICES)
    assert activations(1, MATRICES) == training_memory(model, tokens=1)["activations"] + 2 * model.layers * 7


def test_a_layer_keeps_the_sum_of_the_pages_table():
    model = Decoder(layers=1, width=100, hidden=1000, heads=10, key_value_heads=1, vocabulary=7)
    everything = 2 * 100 + (2 * 100 + 2 * 10) + 100 + 100 + 2 * 1000 + 1000
    without = {"q_proj": everything, "down_proj": everything - 1000, "up_proj": everything}
    for dropped, kept in without.items():
        targets = [name for name in MATRICES if name != dropped]
        assert training_memory(model, tokens=3, rank=2, targets=targets)["activations"] == 2 * 3 * (kept + 6 * 2)
    found = training_memory(model, tokens=3, rank=2, targets=["o_proj"], recompute=True)["activations"]
    assert found == 2 * 3 * (100 + (everything - 200 - 1000 + 2))


def test_fewer_bits_shrink_the_frozen_matrices_alone():
    found = {bits: training_memory(LLAMA_2_7B, tokens=1, rank=8, bits=bits) for bits in (16, 8, 4)}
    rest = 2 * LLAMA_2_7B.elsewhere
    a_weight = {bits: 8 * (parts["weights"] - rest) / LLAMA_2_7B.in_matrices for bits, parts in found.items()}
    assert a_weight == pytest.approx({16: 16, 8: 8.0078125, 4: 4.127}, abs=1e-4)
    assert len({tuple(v for k, v in parts.items() if k != "weights") for parts in found.values()}) == 1


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"bits": 4}, ValueError, "bits=4 with rank=None: .* needs bits=16"),
        ({"bits": 5, "rank": 1}, ValueError, "bits must be 16, 8 or 4, got 5"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"rank": 1, "targets": ["lm_head"]}, ValueError, "targets must be .* got 'lm_head'"),
        ({"recompute": 1}, TypeError, "recompute must be True or False, got 1"),
    ],
)
def test_bad_input_is_refused(change, error, said):
    with pytest.raises(error, match=said):
        training_memory(LLAMA_2_7B, **{"tokens": 1, **change})
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        Decoder(0, 1, 1, 1, 1, 1)
