"""Embeddings, convolutions, their adapters and sums of adapters, wherever their arrays live."""

import numpy as np
import pytest

from minilora import (
    Attention,
    Conv1d,
    Conv2d,
    Embedding,
    Flatten,
    GatedMLP,
    Linear,
    Llama,
    LlamaConfig,
    RMSNorm,
    Rotary,
    Sequential,
    adapt,
    adapters,
    attach,
    best_of_rank,
    cross_entropy,
    merge,
    weighted_sum,
)
from minilora.layer import rebuild
from minilora.layers.rotary import frequencies

from ..support.cupy_standin import traffic

OPTIONS = {
    "plain": None,
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init": "pissa"},
    "DoRA": {"use_dora": True},
    "DoRA, full": {"use_dora": True, "dora_norm": "full"},
}


def host_layers(dtype):
    rng = np.random.default_rng(0)

    def randn(*shape):
        return rng.standard_normal(shape).astype(dtype)

    steps = {"stride": 2, "padding": 1, "dilation": 2}
    return {
        "embedding": (Embedding(randn(9, 4)), rng.integers(0, 9, (3, 5))),
        "conv1d": (Conv1d(randn(4, 2, 3), randn(4), **steps), randn(3, 2, 9)),
        "conv2d": (Conv2d(randn(4, 2, 3, 2), randn(4), **steps), randn(3, 2, 9, 7)),
        "linear": (Linear(randn(4, 6), randn(4)), randn(3, 6)),
    }


def adapted(layer, options):
    """A layer, or one with an adapter that has moved."""
    if options is None:
        return layer
    model = adapt(layer, "", rank=2, alpha=3, rng=np.random.default_rng(1), **options)
    for p in model.trainable().values():
        p += np.random.default_rng(2).standard_normal(p.shape).astype(p.dtype) / 4
    return model


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "linear"])
@pytest.mark.parametrize("variant", OPTIONS)
def test_every_layer_computes_what_numpy_does(place, kind, variant, dtype):
    layer, x = host_layers(dtype)[kind]
    there = adapted(layer, OPTIONS[variant])
    here = rebuild(there, array=place.put)
    (y, cache), (expected_y, expected_cache) = here.forward(place.put(x)), there.forward(x)
    place.assert_same(y, expected_y)
    dy = np.random.default_rng(3).standard_normal(expected_y.shape).astype(dtype)
    (dx, grads), (expected_dx, expected) = here.backward(place.put(dy), cache), there.backward(dy, expected_cache)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        place.assert_same(grad, expected[name])
    if dx is not None:
        place.assert_same(dx, expected_dx)
    if OPTIONS[variant] is not None:
        place.assert_same(merge(here).weight, merge(there).weight)
        place.assert_same(here.delta(), there.delta())


@pytest.mark.parametrize("kind", ["embedding", "conv1d", "conv2d", "linear"])
@pytest.mark.parametrize("variant", list(OPTIONS)[1:])
def test_one_seed_gives_one_adapter_everywhere(place, kind, variant):
    layer, _ = host_layers("float32")[kind]
    here, there = (
        adapt(put, "", rank=2, alpha=3, rng=np.random.default_rng(4), **OPTIONS[variant])
        for put in (rebuild(layer, array=place.put), layer)
    )
    for name, p in there.trainable().items():
        place.assert_same(here.trainable()[name], p)


def test_sums_of_adapters_are_numpys(place):
    rng = np.random.default_rng(5)
    layers = [adapt(Linear(rng.standard_normal((5, 7))), "", rank=2, alpha=1, rng=rng) for _ in range(2)]
    terms = [adapted(layer.base, {}).adapter for layer in layers]
    here = weighted_sum([rebuild(term, array=place.put) for term in terms], [1, -2])
    there = weighted_sum(terms, [1, -2])
    place.assert_same(here.delta(), there.delta())
    place.assert_same(best_of_rank(here, 2).delta(), best_of_rank(there, 2).delta())


@pytest.mark.parametrize("variant", list(OPTIONS)[1:])
def test_steps_neither_wait_nor_copy(standin, variant):
    every = host_layers("float32")
    conv, fc = every["conv2d"][0], Linear(np.ones((3, 80), "float32"))
    model = Sequential(conv=conv, flat=Flatten(), fc=fc)
    x = standin.asarray(every["conv2d"][1])
    fc.weight = np.ones((3, Flatten()(conv(every["conv2d"][1])).shape[1]), "float32")
    model = rebuild(adapted(model, None), array=standin.asarray)
    model = adapt(model, ["conv", "fc"], rank=2, alpha=3, rng=np.random.default_rng(0), **OPTIONS[variant])
    ids, table = standin.asarray(every["embedding"][1]), rebuild(every["embedding"][0], array=standin.asarray)
    table = adapt(table, "", rank=2, alpha=3, rng=np.random.default_rng(0), **OPTIONS[variant])
    traffic.reset()
    for layer, given in ((model, x), (table, ids)):
        y, cache = layer.forward(given)
        layer.backward(y, cache)
        merge(layer)
        attach(merge(layer), adapters(layer))
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)


# --- a language model -----------------------------------------------------------------------------


def language_layers(dtype):
    rng = np.random.default_rng(0)

    def linear(out, width):
        return Linear((rng.standard_normal((out, width)) / 2).astype(dtype))

    four = (linear(12, 6), linear(4, 6), linear(4, 6), linear(6, 12))
    sequences = rng.standard_normal((2, 5, 6)).astype(dtype)
    return {
        "norm": (RMSNorm(rng.standard_normal(6).astype(dtype), 0.1), sequences),
        "rotary": (Rotary(frequencies(6, 100.0)), sequences),
        "attention": (Attention(*four, Rotary(frequencies(4, 100.0))), sequences),
        "gated": (GatedMLP(linear(7, 6), linear(7, 6), linear(6, 7)), sequences),
        "llama": (llama(dtype), rng.integers(0, 9, (2, 5))),
    }


def llama(dtype="float32"):
    c = LlamaConfig(9, 6, 7, 2, 4, 2, 4, rms_norm_eps=0.1, frequencies=frequencies(4, 100.0), tie_word_embeddings=True)
    rng = np.random.default_rng(1)
    return Llama.build(c, {name: rng.standard_normal(shape).astype(dtype) / 2 for name, shape in c.shapes().items()})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", language_layers("float32"))
def test_a_language_models_layers_compute_what_numpy_does(place, name, dtype):
    there, x = language_layers(dtype)[name]
    here = rebuild(there, array=place.put)
    (y, cache), (expected_y, expected_cache) = here.forward(place.put(x)), there.forward(x)
    place.assert_same(y, expected_y)
    dy = np.random.default_rng(3).standard_normal(expected_y.shape).astype(dtype)
    (dx, grads), (expected_dx, expected) = here.backward(place.put(dy), cache), there.backward(dy, expected_cache)
    assert grads.keys() == expected.keys()
    for key, grad in grads.items():
        place.assert_same(grad, expected[key])
    if dx is not None:
        place.assert_same(dx, expected_dx)


def test_text_goes_on_everywhere_as_on_numpy(place):
    there, ids = llama(), np.random.default_rng(2).integers(0, 9, (2, 4))
    here = rebuild(there, array=place.put)
    (z, past), (expected, other) = here.extend(place.put(ids)), there.extend(ids)
    place.assert_same(z, expected)
    place.assert_same(here.extend(place.put(ids[:, :1]), past)[0], there.extend(ids[:, :1], other)[0])


def test_a_language_models_step_neither_waits_nor_copies(standin):
    """Once the angles of the positions are there, which go to the device at the first step."""
    model = rebuild(llama(), array=standin.asarray)
    model = adapt(model, ["q_proj", "v_proj"], rank=2, alpha=3, rng=np.random.default_rng(0))
    ids = standin.asarray(np.random.default_rng(2).integers(0, 9, (2, 4)))
    for _ in range(2):
        traffic.reset()
        z, cache = model.forward(ids)
        _, dz = cross_entropy(z, ids, out=z)
        model.backward(dz, cache)
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)
