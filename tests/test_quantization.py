"""A model in four bits: what is quantised, adapters over it, merging, LoftQ."""

import numpy as np
import pytest

from minilora import (
    Conv2d,
    Embedding,
    Linear,
    QuantizedLinear,
    ReLU,
    Sequential,
    adapt,
    loftq,
    merge,
    quantize,
    train,
)
from minilora.language.memory import cache_bytes, parameter_bytes
from minilora.layer import walk
from minilora.layers.quantized import FrozenQuantizedLinear


def gaussian(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def model_of(dtype="float32", bias=True):
    """Two layers that differ in everything, and something between them."""
    first = Linear(gaussian(70, 40, seed=1, dtype=dtype), gaussian(70, seed=2, dtype=dtype) if bias else None)
    return Sequential(first=first, act=ReLU(), last=Linear(gaussian(6, 70, seed=3, dtype=dtype)))


VARIANTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_leaves_no_float_weight_behind(variant):
    options = {"rank": 2, "alpha": 3, "rng": np.random.default_rng(0), **VARIANTS[variant]}
    adapted = adapt(quantize(model_of()), "all-linear", **options)
    x = gaussian(5, 40)
    before = parameter_bytes(adapted)
    y, cache = adapted.forward(x)
    rows = 5 * (40 + 2 * 70 + 6 + 4 * 2) + 2 * (70 + 6)  # x, activations, h, and of DoRA n and g
    assert cache_bytes(cache) <= 4 * rows + 5 * 70 * 4 * 2
    adapted.backward(y, cache)
    assert parameter_bytes(adapted) == before
    floats = [
        part for _, layer in walk(adapted) if isinstance(layer, FrozenQuantizedLinear) for part in vars(layer).values()
    ]
    assert all(getattr(part, "size", 0) <= 70 for part in floats if getattr(part, "dtype", None) == np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_train_as_beside_the_dequantised_weight(variant, dtype):
    base = quantize(model_of(dtype), block_size=32)
    whole = Sequential(first=base.first.dequantize(), act=ReLU(), last=base.last.dequantize())
    trained = []
    for model in (base, whole):
        adapted = adapt(model, "all-linear", rank=2, alpha=3, rng=np.random.default_rng(0), **VARIANTS[variant])
        X, Y = gaussian(20, 40, dtype=dtype), gaussian(20, 6, dtype=dtype)
        train(adapted, X, Y, epochs=4, batch_size=5, lr=0.01, rng=np.random.default_rng(1))
        trained.append(adapted)
    for name, p in trained[0].trainable().items():
        np.testing.assert_array_equal(p, trained[1].trainable()[name])
    np.testing.assert_array_equal(merge(trained[0]).first.weight, merge(trained[1]).first.weight)


def test_quantize_takes_linear_layers_but_the_head():
    model = Sequential(table=Embedding(gaussian(9, 40)), body=model_of(), lm_head=Linear(gaussian(5, 6)))
    found = quantize(model)
    kinds = {path: type(layer) for path, layer in walk(found) if isinstance(layer, Linear)}
    assert kinds == {"body.first": QuantizedLinear, "body.last": QuantizedLinear, "lm_head": Linear}
    assert found.table.weight is model.table.weight
    assert all(type(layer) is not QuantizedLinear for _, layer in walk(model))
    one = quantize(model, ["last"], block_size=32, double_quant=False)
    assert type(one.body.first) is Linear
    assert (one.body.last.block_size, one.body.last.nested_absmax) == (32, None)


def with_nan():
    model = model_of()
    model.last.weight[2, 3] = np.nan
    return model


def tied():
    model = model_of()
    return Sequential(first=model.first, again=Linear(model.first.weight))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: adapt(model_of(), ["last"], rank=1, alpha=1, rng=np.random.default_rng(0)), {},
         "model has an adapter on 'last': quantise it before adapt, or after merge$"),
        (lambda: quantize(model_of(), ["last"]), {}, "the layer 'last' is already quantised, a QuantizedLinear$"),
        (model_of, {"target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] names no layer"),
        (model_of, {"block_size": 48}, "the layer 'first': block_size must be a power of two, got 48$"),
        (model_of, {"block_size": 16}, "the layer 'first': block_size must be at least 32, got 16$"),
        (with_nan, {}, "the layer 'last': weight holds NaN or infinity"),
        (tied, {},
         "the layer 'first' shares its weight with another layer: quantised, the two would no longer share it$"),
        (lambda: Sequential(conv=Conv2d(gaussian(2, 2, 1, 1))), {"target_modules": ["conv"]},
         "the layer .conv.: (linear must be a Linear, got Conv2d|weight has shape .2, 2, 1, 1., expected)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("function", [quantize, lambda model, **given: loftq(model, rank=1, alpha=1, **given)])
def test_what_cannot_be_quantised_is_refused_by_name(function, model, arguments, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        function(model(), **arguments)


def test_pissa_over_four_bits_is_refused():
    weight = "PiSSA subtracts its start from the weight, which a QuantizedLinear keeps in few bits"
    with pytest.raises(ValueError, match=f"^{weight}: take LoRA's start, or minilora.loftq$"):
        adapt(quantize(model_of()), "all-linear", rank=2, alpha=3, rng=np.random.default_rng(0), init="pissa")


def moved(model, size, **options):
    adapted = adapt(model, ["first", "last"], rank=2, alpha=3, rng=np.random.default_rng(0), **options)
    for i, p in enumerate(adapted.trainable().values()):
        p += size * gaussian(*p.shape, seed=10 + i)
    return adapted


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_gives_floats_of_the_dequantised_sum(variant):
    adapted = moved(quantize(model_of()), 0.3, **VARIANTS[variant])
    merged, x = merge(adapted), gaussian(4, 40)
    assert type(merged.first) is type(merged.last) is Linear
    np.testing.assert_allclose(merged(x), adapted(x), rtol=1e-4, atol=1e-3)
    if variant != "DoRA":
        expected = adapted.first.base.weight + adapted.first.delta()
        np.testing.assert_array_equal(merged.first.weight, expected)


def test_quantising_again_keeps_the_format_and_says_the_loss():
    adapted = moved(quantize(model_of(), block_size=32, double_quant=False), 0.02)
    with pytest.warns(UserWarning, match="of the change") as notes:
        again = merge(adapted, requantize=True)
    assert len(notes) == 1
    wanted, sums = merge(adapted), [0.0, 0.0]
    for name in ("first", "last"):
        layer, base, whole = getattr(again, name), getattr(adapted, name).base, getattr(wanted, name)
        assert (type(layer), layer.block_size, layer.nested_absmax) == (QuantizedLinear, 32, None)
        expected = QuantizedLinear.from_linear(whole, block_size=32, double_quant=False)
        np.testing.assert_array_equal(layer.weight, expected.weight)
        sums[0] += ((layer.weight - whole.weight) ** 2).sum()
        sums[1] += ((whole.weight - base.weight) ** 2).sum()
    loss = f"loses {(sums[0] / sums[1]) ** 0.5:.0%} of the change (|merged - wanted| / |change|)"
    said = f"quantising the merged weights again {loss}: keep the adapter beside its base instead"
    assert str(notes[0].message) == said


def test_quantising_no_change_again_loses_infinitely_much_of_it():
    with pytest.warns(UserWarning, match="loses inf% of the change"):
        merge(adapt(quantize(model_of()), "all-linear", rank=2, alpha=1, rng=np.random.default_rng(0)), requantize=True)


def test_a_merge_without_quantised_layers_quantises_nothing():
    with pytest.raises(ValueError, match=r"^requantize=True, and no adapted layer is quantised$"):
        merge(moved(model_of(), 0.1), requantize=True)


def test_loftq_starts_nearer_the_weight_each_round():
    model = model_of("float64")
    plain = quantize(model)
    errors = []
    for rounds in (1, 2, 5):
        base, start = loftq(model, rank=3, alpha=6, rounds=rounds)
        assert start.keys() == {"first", "last"}
        for name, adapter in start.items():
            W, layer = getattr(model, name).weight, getattr(base, name)
            error = np.linalg.norm(W - layer.weight - adapter.delta())
            assert error < np.linalg.norm(W - getattr(plain, name).weight)
            errors.append(error)
    assert errors[0] >= errors[2] >= errors[4]
    assert errors[1] >= errors[3] >= errors[5]


def test_loftq_takes_one_round_unless_it_is_told():
    codes = [
        loftq(model_of(), rank=3, alpha=6, **rounds)[0].first.packed for rounds in ({}, {"rounds": 1}, {"rounds": 2})
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()


def test_loftq_takes_turns_and_keeps_the_best_round():
    """The same by hand, with NumPy's singular values."""
    model, options = model_of("float64"), {"block_size": 32, "double_quant": False}
    seen = set()
    for rounds in (1, 2, 3, 4, 5):
        base, start = loftq(model, rank=3, alpha=6, rounds=rounds, **options)
        assert {(adapter.rank, adapter.alpha) for adapter in start.values()} == {(3, 6)}
        for name in ("first", "last"):
            linear, change, tried = getattr(model, name), 0, []
            for _ in range(rounds):
                Q = QuantizedLinear.from_linear(Linear(linear.weight - change), **options).weight
                U, S, Vt = np.linalg.svd(linear.weight - Q, full_matrices=False)
                change = U[:, :3] * S[:3] @ Vt[:3]
                tried.append((np.linalg.norm(linear.weight - Q - change), Q, change))
            best = min(range(rounds), key=lambda i: tried[i][0])
            seen.add(best)
            layer = getattr(base, name)
            np.testing.assert_array_equal(layer.weight, tried[best][1])
            np.testing.assert_allclose(start[name].delta(), tried[best][2], atol=1e-12)
            assert layer.bias is linear.bias
            assert (layer.block_size, layer.nested_absmax) == (32, None)
    assert len(seen) > 1


def test_a_weight_of_zeros_is_no_reason_to_divide():
    W = gaussian(6, 40)
    W[2], W[3, 5] = 0, 0
    base, start = loftq(Linear(W), rank=2, alpha=4, rounds=2)
    assert np.isfinite(base.weight + start[""].delta()).all()
