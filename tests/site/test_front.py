"""The front page's one object: what it computes is minilora's, and each scroll position and answer has its picture."""

from itertools import product

import numpy as np
import pytest

from minilora import Linear, LlamaConfig
from minilora.language.memory import MATRICES, count_numbers, training_memory
from minilora.layers.nf4 import QuantizedLinear
from minilora.layers.rotary import frequencies

from .javascript import LIVE, by_node, node


def ask(name, *calls):
    """Return what a function of the page's scripts gives for each call."""
    return node("front.mjs", LIVE, **{name: calls})[name]


def sizes(model):
    """Return a model of memory.js as minilora has it."""
    kind = {"model_type": "qwen2", "attention_bias": True} if model.get("biases") else {}
    return LlamaConfig(
        vocab_size=model["V"], hidden_size=model["d"], intermediate_size=model["m"], num_hidden_layers=model["L"],
        num_attention_heads=model["H"], num_key_value_heads=model["K"], head_dim=model["D"], rms_norm_eps=1e-5,
        frequencies=frequencies(model["D"], 10000.0), tie_word_embeddings=model.get("tied", False), **kind,
    )  # fmt: skip


@by_node
def test_memory_in_the_page_is_training_memory_for_every_model_and_setting():
    (models,) = ask("models", [])
    ways = [
        *({"tokens": tokens} for tokens in (512, 4096)),
        *(
            {"tokens": 4096, "rank": rank, "bits": bits, "recompute": again}
            for rank, bits, again in product((1, 16, 256), (16, 8, 4), (False, True))
        ),
    ]
    cases = list(product(models, ways))
    found = ask("memory", *([models[name], way] for name, way in cases))
    for (name, way), parts in zip(cases, found, strict=True):
        assert parts == training_memory(sizes(models[name]), **way), (name, way)
    for name, counted in zip(models, ask("counted", *([model, 8] for model in models.values())), strict=True):
        config = sizes(models[name])
        pairs = [
            shape for path, shape in config.shapes().items() if path.endswith(tuple(f"{m}.weight" for m in MATRICES))
        ]
        assert counted == [*count_numbers(config), 8 * sum(map(sum, pairs))], name


@by_node
def test_four_bits_in_the_page_are_nf4():
    rng = np.random.default_rng(0)
    matrices = [rng.standard_normal((9, 28)), rng.uniform(-1, 1, (4, 32)), np.zeros((2, 64))]
    for matrix, found in zip(matrices, ask("nf4", *([matrix.tolist()] for matrix in matrices)), strict=True):
        right = QuantizedLinear.from_linear(Linear(matrix), double_quant=False).weight
        assert np.allclose(found, right, rtol=1e-6, atol=0)


@by_node
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_strongest_columns_and_rows_are_the_best_of_the_rank(rank):
    matrix = np.random.default_rng(rank).standard_normal((9, 28))
    ((B, A),) = ask("strongest", [matrix.tolist(), rank])
    U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(np.array(B) @ A, (U[:, :rank] * S[:rank]) @ Vt[:rank], atol=1e-12)
    assert np.allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1))
    assert np.all(np.abs(B).max(axis=0) == np.max(B, axis=0))
