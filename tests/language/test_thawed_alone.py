"""If a single layer of a decoder trains, exactly its own gradients are computed."""

from functools import cache

import numpy as np
import pytest

from minilora import RMSNorm, cross_entropy
from minilora.checks import is_array
from minilora.layer import freeze, members, nest, walk
from minilora.training import backpropagate

from ..support.language import adapted, drawn, tiny_mixture

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder():
    return drawn(0, "float64", vocab_size=11, intermediate_size=5, attention_bias=True, mlp_bias=True)


def text():
    rng = np.random.default_rng(1)
    return rng.integers(0, 11, (2, 5)), rng.integers(0, 11, (2, 5))


@cache
def gradients(model):
    return backpropagate(model(), *text(), cross_entropy)


def mixture():
    """Return a Qwen2-MoE with Qwen3's norms, a combination that the layers support although no kind has both."""
    model = tiny_mixture("qwen2_moe")
    norms = {f"{name}_norm": RMSNorm(np.linspace(0.5, 1.5, 4), 1e-5) for name in "qk"}
    vars(model.model.layers[1].self_attn).update(norms)
    return model


OWN = [
    (model, path)
    for model in (decoder, mixture)
    for path, layer in walk(model())
    if any(is_array(part) for _, part in members(layer))
]
"""Each layer that has arrays of its own."""


@pytest.mark.parametrize(("model", "path"), OWN)
def test_a_layer_thawed_alone_gets_exactly_its_gradients(model, path):
    frozen = freeze(model())
    thawed = dict(walk(frozen))[path]
    thawed.frozen = False
    grads = backpropagate(frozen, *text(), cross_entropy)
    assert grads.keys() == frozen.trainable().keys() == nest(path, thawed.trainable()).keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, gradients(model)[name], rtol=1e-12, atol=1e-13)


def test_the_list_has_every_array_of_the_decoder():
    assert sum(model is decoder for model, _ in OWN) == 2 * (len(SEVEN) + 2) + 3


def test_an_adapter_alone_gets_exactly_its_gradients():
    for target in (*([name] for name in (*SEVEN, "lm_head")), *(rf".*layers\.1\..*\.{name}" for name in SEVEN)):
        model = adapted(target, decoder())
        grads = backpropagate(model, *text(), cross_entropy)
        assert grads.keys() == model.trainable().keys()
        assert all(np.abs(grad).max() > 0 for grad in grads.values())
