"""Embeddings, convolutions, their adapters and sums of adapters, wherever their arrays live."""

import numpy as np
import pytest

from minilora import (
    Adam,
    Flatten,
    Linear,
    QuantizedLinear,
    Sequential,
    adapt,
    adapters,
    attach,
    best_of_rank,
    cross_entropy,
    merge,
    mse,
    quantize,
    weighted_sum,
)
from minilora.cli.check import all_instances
from minilora.fast.blockwise import Blocks, BlockwiseAttention
from minilora.layer import rebuild
from minilora.layers.attention import Attention
from minilora.verify.instances import Drawing

from ..support.cupy_standin import traffic
from ..support.language import drawn
from ..support.places import elsewhere

INSTANCES = all_instances()
OPTIONS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init": "pissa"},
    "DoRA": {"use_dora": True},
    "DoRA, full": {"use_dora": True, "dora_norm": "full"},
}


LLAMA = drawn(1, "float32", vocab_size=9, intermediate_size=7, tie_word_embeddings=True)
ROWS = {"embedding": "Embedding", "conv1d": "Conv1d", "conv2d": "Conv2d", "linear": "Linear"}
"""The rows of `minilora.verify.instances` that an adapter can stand beside, by the name of their kind."""


def instance(row, dtype):
    """Return a layer on the host, and an input for it."""
    rng = np.random.default_rng(0)
    drawing = Drawing(3, 6, 5, 2, 3.0, lambda *shape: rng.standard_normal(shape).astype(dtype), rng)
    return INSTANCES[row](drawing)


def adapted(layer, options):
    """A layer with an adapter that has moved."""
    model = adapt(layer, "", rank=2, alpha=3, rng=np.random.default_rng(1), **options)
    for p in model.trainable().values():
        p += np.random.default_rng(2).standard_normal(p.shape).astype(p.dtype) / 4
    return model


def computes_what_numpy_does(place, there, x, dtype):
    """Return the same layer at that place, after its output and its gradients were compared."""
    here = rebuild(there, array=place.put)
    (y, cache), (expected_y, expected_cache) = here.forward(place.put(x)), there.forward(x)
    place.assert_same(y, expected_y)
    place.assert_same(here(place.put(x)), there(x))
    dy = np.random.default_rng(3).standard_normal(expected_y.shape).astype(dtype)
    (dx, grads), (expected_dx, expected) = here.backward(place.put(dy), cache), there.backward(dy, expected_cache)
    place.assert_all_same(grads, expected)
    assert (dx is None) == (expected_dx is None)
    if dx is not None:
        place.assert_same(dx, expected_dx)
    return here


PAIRS = pytest.mark.parametrize(
    ("variant", "kind"),
    [*((variant, "linear") for variant in OPTIONS if variant != "DoRA"), *(("DoRA", kind) for kind in ROWS)],
)
"""Every variant beside one kind of layer, and one variant, of three arrays, beside every kind."""


@elsewhere()
@pytest.mark.parametrize("row", INSTANCES)
def test_every_layer_computes_what_numpy_does(place, row, dtype):
    computes_what_numpy_does(place, *instance(row, dtype), dtype)


@elsewhere()
@PAIRS
def test_every_adapter_computes_what_numpy_does(place, kind, variant, dtype):
    """And one seed gives one adapter."""
    layer, x = instance(ROWS[kind], dtype)
    there = adapted(layer, OPTIONS[variant])
    here = computes_what_numpy_does(place, there, x, dtype)
    place.assert_same(merge(here).weight, merge(there).weight)
    place.assert_same(here.delta(), there.delta())
    here, there = (
        adapt(put, "", rank=2, alpha=3, rng=np.random.default_rng(4), **OPTIONS[variant])
        for put in (rebuild(layer, array=place.put), layer)
    )
    if variant == "PiSSA":  # another library's singular vectors may have the other sign
        place.assert_same(here.delta(), there.delta())
    else:
        place.assert_all_same(here.trainable(), there.trainable())


def test_sums_of_adapters_are_numpys(place):
    rng = np.random.default_rng(5)
    layers = [adapt(Linear(rng.standard_normal((5, 7))), "", rank=2, alpha=1, rng=rng) for _ in range(2)]
    terms = [adapted(layer.base, {}).adapter for layer in layers]
    here = weighted_sum([rebuild(term, array=place.put) for term in terms], [1, -2])
    there = weighted_sum(terms, [1, -2])
    place.assert_same(here.delta(), there.delta())
    place.assert_same(best_of_rank(here, 2).delta(), best_of_rank(there, 2).delta())


def with_convolution(put, **options):
    """A net with a convolution and an embedding, both adapted, and their inputs."""
    (conv, images), (embedding, ids) = (instance(row, "float32") for row in ("Conv2d", "Embedding"))
    fc = Linear(np.ones((3, Flatten()(conv(images)).shape[1]), "float32"))
    net = rebuild(Sequential(conv=conv, flat=Flatten(), fc=fc), array=put)
    options |= {"rank": 2, "alpha": 3, "rng": np.random.default_rng(0)}
    return [(adapt(net, ["conv", "fc"], **options), put(images)),
            (adapt(rebuild(embedding, array=put), "", **options), put(ids))]  # fmt: skip


def adapted_there(model, targets, put, x):
    rng = np.random.default_rng(0)
    return [(adapt(rebuild(model, array=put), targets, rank=2, alpha=3, rng=rng), put(x))]


STEPS = {
    "a layer": lambda put: [(rebuild(Linear(np.ones((5, 7), "float32")), array=put), put(np.ones((3, 7), "float32")))],
    **{variant: lambda put, options=options: with_convolution(put, **options) for variant, options in OPTIONS.items()},
    "a language model": lambda put: adapted_there(
        LLAMA, ["q_proj", "v_proj"], put, np.random.default_rng(2).integers(0, 9, (2, 4))),
    "four bits": lambda put: adapted_there(
        quantize(Sequential(fc=Linear(np.random.default_rng(6).standard_normal((7, 40)).astype("float32")))),
        "all-linear", put, np.ones((3, 40), "float32")),
}  # fmt: skip


@pytest.mark.parametrize("what", STEPS)
def test_steps_neither_wait_nor_copy(standin, what):
    """Once the angles of positions and the code books are there, which go to the device at the first step."""
    layers = STEPS[what](standin.asarray)
    for _ in range(2):
        traffic.reset()
        for layer, given in layers:
            y, cache = layer.forward(given)
            _, dy = cross_entropy(y, given, out=y) if what == "a language model" else mse(y, y)
            _, grads = layer.backward(dy, cache)
            Adam(layer.trainable()).step(grads)
            repr(layer)
            if what in OPTIONS:
                attach(merge(layer), adapters(layer))
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)


# --- a language model -----------------------------------------------------------------------------


def test_text_goes_on_everywhere_as_on_numpy(place):
    there, ids = LLAMA, np.random.default_rng(2).integers(0, 9, (2, 4))
    here = rebuild(there, array=place.put)
    (z, past), (expected, other) = here.extend(place.put(ids)), there.extend(ids)
    place.assert_same(z, expected)
    place.assert_same(here.extend(place.put(ids[:, :1]), past)[0], there.extend(ids[:, :1], other)[0])


def test_attention_copies_its_shares_once_and_by_blocks_a_block(standin):
    """The memory of a product on a GPU: P^T in (att.4) and dS^T in (att.8) are stacks that CuPy copies."""
    page = LLAMA.model.layers[0].self_attn
    parts = {name: getattr(page, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "rotary")}
    x, heads, T = np.ones((3, 12, 12), "float32"), page.q_proj.out_features // page.rotary.in_features, 12
    for attention, largest in (
        (Attention(**parts), 3 * heads * T * T),
        (BlockwiseAttention(**parts, blocks=Blocks(4, 4, plain_up_to=0)), 3 * heads * 4 * 4),
    ):
        here = rebuild(attention, array=standin.asarray)
        traffic.reset()
        y, cache = here.forward(standin.asarray(x))
        assert traffic.copied <= 3 * T * page.q_proj.out_features * 4  # of q, k and v
        traffic.reset()
        here.backward(y, cache)
        assert traffic.copied == 4 * largest


# --- four bits ------------------------------------------------------------------------------------


@elsewhere()
@pytest.mark.parametrize("shape", [(7, 40), (3, 5)])
def test_a_weight_is_quantised_everywhere_as_on_numpy(place, dtype, shape):
    linear = Linear(np.random.default_rng(6).standard_normal(shape).astype(dtype))
    for double_quant, names in ((False, ("packed", "absmax", "weight")), (True, ("packed", "nested_absmax"))):
        here, there = (
            QuantizedLinear.from_linear(layer, block_size=32, double_quant=double_quant)
            for layer in (rebuild(linear, array=place.put), linear)
        )
        for name in names:
            place.assert_same(getattr(here, name), getattr(there, name))
    assert here.mean == pytest.approx(there.mean)  # a sum in another order: a scale may have the neighbour's code
