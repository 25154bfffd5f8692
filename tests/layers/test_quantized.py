"""NF4 weight by weight, the layer that keeps it, and a model in four bits with its adapters."""

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import (
    NF4,
    Conv2d,
    DoRA,
    Embedding,
    Linear,
    LoRALinear,
    QuantizedLinear,
    ReLU,
    Sequential,
    adapt,
    adapters,
    attach,
    dequantize_nf4,
    load_adapter,
    loftq,
    merge,
    mse,
    quantize,
    quantize_nf4,
    save_adapter,
    train,
)
from minilora.language.trainingmemory import cache_bytes, parameter_bytes
from minilora.layer import freeze, parameter_count, walk
from minilora.layers.nf4 import code_book, dequantize_scales, quantize_scales, scale_book
from minilora.layers.quantized import CodedLinear
from minilora.training import backpropagate

from ..support.cases import weight_by_loops


def gaussian(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def codes(packed, count):
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()[:count]


SHAPES = st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 90)), st.tuples(st.integers(1, 300)), st.just((3, 5, 7)))
BLOCKS = st.sampled_from([32, 64, 128, 4096])


# --- the code book and the codes ---


def test_the_code_book_follows_from_the_normal_distribution():
    assert NF4.shape == (16,)
    assert NF4.dtype == np.float32
    np.testing.assert_allclose(code_book(), NF4, atol=2e-7)
    assert (NF4[0], NF4[7], NF4[15]) == (-1, 0, 1)


@given(shape=SHAPES, block_size=BLOCKS, seed=st.integers(0, 10))
def test_every_code_is_the_nearest_one(shape, block_size, seed):
    w = gaussian(*shape, seed=seed)
    packed, absmax = quantize_nf4(w, block_size=block_size)
    assert packed.dtype == np.uint8
    assert absmax.dtype == np.float32
    assert packed.shape == ((w.size + 1) // 2,)
    for b, start in enumerate(range(0, w.size, block_size)):
        block = w.ravel()[start : start + block_size]
        assert absmax[b] == np.abs(block).max()
        found = codes(packed, w.size)[start : start + block_size]
        distance = np.abs(NF4[None, :].astype(float) - (block / absmax[b]).astype(float)[:, None])
        assert (distance[np.arange(len(block)), found] <= distance.min(axis=1) + 1e-7).all()


@given(shape=SHAPES, block_size=BLOCKS)
def test_a_weight_of_codes_comes_back_unchanged(shape, block_size):
    """What is quantised once is quantised for good."""
    first = dequantize_nf4(*quantize_nf4(gaussian(*shape), block_size=block_size), shape, block_size=block_size)
    packed, absmax = quantize_nf4(first, block_size=block_size)
    again = dequantize_nf4(packed, absmax, shape, block_size=block_size)
    np.testing.assert_allclose(again, first, rtol=1e-6)
    assert first.shape == shape


def test_a_tie_takes_the_lower_code():
    w = np.zeros(64, "float32")
    w[0], w[1:16] = 1, (NF4[1:] + NF4[:-1]) / 2
    w[16:31], w[31:46] = np.nextafter(w[1:16], np.float32(2)), np.nextafter(w[1:16], np.float32(-2))
    found = codes(quantize_nf4(w)[0], 46)
    np.testing.assert_array_equal(found[1:16], np.arange(15))
    np.testing.assert_array_equal(found[16:31], np.arange(1, 16))
    np.testing.assert_array_equal(found[31:46], np.arange(15))


@pytest.mark.parametrize("block_size", [64, 2**60])
def test_a_block_larger_than_the_weight_takes_no_memory(block_size):
    w = gaussian(5, 7)
    packed, absmax = quantize_nf4(w, block_size=block_size)
    assert (packed.shape, absmax.shape) == ((18,), (1,))
    np.testing.assert_array_equal(packed, quantize_nf4(w)[0])
    found = dequantize_nf4(packed, absmax, (5, 7), block_size=block_size)
    np.testing.assert_array_equal(found, dequantize_nf4(packed, absmax, (5, 7)))


@pytest.mark.parametrize("lay", [np.asfortranarray, lambda w: np.repeat(w, 2, axis=1)[:, ::2]])
def test_a_weight_may_lie_in_any_order(lay):
    w = gaussian(9, 30)
    for found, expected in zip(quantize_nf4(lay(w)), quantize_nf4(w), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("tiny", [0.0, 1e-39])
def test_a_block_of_nothing_is_zeros_beside_others(tiny):
    w = gaussian(3, 64)
    w[1] = 0
    w[1, 5] = tiny
    packed, absmax = quantize_nf4(w)
    assert (packed[32:64] == 0x77).all()
    found = dequantize_nf4(packed, absmax, w.shape)
    assert (found[1] == 0).all()
    np.testing.assert_array_equal(found[[0, 2]], dequantize_nf4(*quantize_nf4(w[[0, 2]]), (2, 64)))


def test_an_odd_count_ends_in_the_code_of_zero():
    packed, _ = quantize_nf4(gaussian(5, 7))
    assert packed.shape == (18,)
    assert packed[-1] & 15 == 7


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_types_are_rounded_to_float32_first(dtype):
    w = gaussian(7, 40, dtype=dtype)
    for found, expected in zip(quantize_nf4(w), quantize_nf4(w.astype("float32")), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_products_are_taken_in_float32_whatever_is_asked():
    packed, absmax = quantize_nf4(gaussian(9, 40))
    single = dequantize_nf4(packed, absmax, (9, 40))
    for dtype in ("float64", "float16"):
        found = dequantize_nf4(packed, absmax, (9, 40), dtype=dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, single.astype(dtype))


# --- double quantisation ---


def test_the_book_of_scales_is_sorted_signed_and_even():
    book = scale_book()
    assert len(book) == len(set(book)) == 256
    assert (np.diff(book) > 0).all()
    assert book[-1] == 1
    np.testing.assert_array_equal(np.sort(-book[book < 0]), book[(book > 0) & (book < 1)])
    assert [((book > 10.0**-k) & (book < 10.0 ** (1 - k))).sum() for k in range(1, 8)] == [64, 32, 16, 8, 4, 2, 1]


@given(count=st.integers(1, 700), seed=st.integers(0, 10))
def test_scales_take_the_nearest_of_their_codes(count, seed):
    absmax = 1 + np.abs(gaussian(count, seed=seed))
    found, nested, mean = quantize_scales(absmax)
    assert (found.dtype, nested.dtype, found.shape) == (np.uint8, np.float32, (count,))
    assert nested.shape == (-(-count // 256),)
    assert mean == float(absmax.mean())
    for b in range(count):
        of_block = (absmax - np.float32(mean))[b // 256 * 256 : (b // 256 + 1) * 256]
        assert nested[b // 256] == np.abs(of_block).max()
        if nested[b // 256]:
            distance = np.abs(scale_book() - (absmax[b] - np.float32(mean)) / nested[b // 256])
            assert distance[found[b]] <= distance.min() + 1e-6
    expected = nested[np.arange(count) // 256] * scale_book()[found] + np.float32(mean)
    np.testing.assert_array_equal(dequantize_scales(found, nested, mean), expected)


def test_a_weight_takes_4_5_bits_or_4_127():
    linear = Linear(gaussian(256, 1024))
    for double_quant, bits in ((False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        layer = QuantizedLinear.from_linear(linear, double_quant=double_quant)
        assert 8 * parameter_bytes(layer) / linear.weight.size == bits


# --- how a quotient is rounded ---


def between_two_codes(book, largest):
    """Numbers whose quotient by their block's largest has one code, and whose product with its inverse another."""
    middles = (book[:-1] + book[1:]) / 2
    found = []
    for a in largest:
        for w in np.concatenate([np.nextafter(middles * a, np.float32(side)) for side in (-9, 9)] + [middles * a]):
            codes = [int(np.searchsorted(middles, v)) for v in (w / a, w * (np.float32(1) / a))]
            if codes[0] != codes[1]:
                found.append((a, w, codes))
    return found


LARGEST = np.random.default_rng(5).uniform(0.5, 2, 60).astype("float32")


def test_a_whole_block_is_multiplied_and_a_shorter_one_divided():
    """As in bitsandbytes: the two differ in few weights, which lie between two codes."""
    found = between_two_codes(NF4, LARGEST)
    assert len(found) > 20
    for a, w, (divided, multiplied) in found:
        block = np.zeros(64, "float32")
        block[:2] = a, w
        assert codes(quantize_nf4(block)[0], 64)[1] == multiplied
        assert codes(quantize_nf4(np.concatenate([block, block]))[0], 128)[65] == multiplied
        assert codes(quantize_nf4(block[:40])[0], 40)[1] == divided
        twice = codes(quantize_nf4(np.concatenate([block, block[:40]]))[0], 104)
        assert (twice[1], twice[65]) == (multiplied, divided)


def test_scales_are_multiplied_in_every_block():
    found = 0
    for a, w, _ in between_two_codes(scale_book(), LARGEST[:12]):
        absmax = np.array([4 + a, 4 - a, 4 + w, 4 - w], "float32")
        off = absmax - absmax.mean()
        n = np.abs(off).max()
        expected = np.searchsorted((scale_book()[:-1] + scale_book()[1:]) / 2, off * (np.float32(1) / n))
        np.testing.assert_array_equal(quantize_scales(absmax)[0], expected)
        found += bool((expected != np.searchsorted((scale_book()[:-1] + scale_book()[1:]) / 2, off / n)).any())
    assert found > 0


def test_the_smallest_normal_scale_is_no_zero():
    w = np.zeros(64, "float32")
    w[3] = np.finfo("float32").tiny
    assert codes(quantize_nf4(w)[0], 64)[3] == 15


# --- what is refused says which argument it is ---

LINEAR_7_40 = Linear(gaussian(7, 40), gaussian(7, seed=1))
PACKED, ABSMAX = quantize_nf4(LINEAR_7_40.weight)
NESTED = dict(zip(("absmax", "nested_absmax", "mean"), quantize_scales(ABSMAX), strict=True))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_nf4([1.0]), TypeError, "weight must be an array, got list"),
        (lambda: quantize_nf4(np.ones((2, 2), complex)), TypeError, "weight's dtype must be one of float16"),
        (lambda: quantize_nf4(np.ones((0, 2))), ValueError, r"weight has shape \(0, 2\)"),
        (lambda: code_book(3), ValueError, "levels must be at least 4, got 3"),
        (lambda: code_book(5), ValueError, "levels must be even, got 5"),
        (lambda: dequantize_nf4([1], ABSMAX, (7, 40)), TypeError, "packed must be an array, got list"),
        (lambda: dequantize_nf4(PACKED, [1.0], (7, 40)), TypeError, "absmax must be an array, got list"),
        (lambda: dequantize_nf4(PACKED, ABSMAX, 7), TypeError, "shape must be a tuple of sizes, got 7"),
        (lambda: QuantizedLinear(PACKED, ABSMAX, (7, 40), [1.0]), TypeError, "bias must be an array, got list"),
        (
            lambda: QuantizedLinear(PACKED, ABSMAX, (7, 40), np.ones(7)),
            TypeError,
            "bias has dtype float64, expected float",
        ),
        (lambda: QuantizedLinear(PACKED, ABSMAX, (7, 40), np.ones(6, "f4")), ValueError, r"bias has shape \(6,\)"),
        (lambda: CodedLinear([1.0], (7, 40), None), TypeError, "like must be an array, got list"),
        (
            lambda: QuantizedLinear(PACKED, shape=(7, 40), **NESTED | {"absmax": ABSMAX}),
            TypeError,
            "absmax has dtype float32, expected uint8",
        ),
        (
            lambda: QuantizedLinear(PACKED, shape=(7, 40), **NESTED | {"nested_absmax": np.ones(2, "f4")}),
            ValueError,
            r"nested_absmax has shape \(2,\), expected \(1,\)",
        ),
        (
            lambda: QuantizedLinear(PACKED, shape=(7, 40), **NESTED | {"mean": "x"}),
            TypeError,
            "mean must be a number, got 'x'",
        ),
        (lambda: QuantizedLinear.from_linear("x"), TypeError, "linear must be a Linear, got str"),
        (
            lambda: QuantizedLinear.from_linear(LINEAR_7_40, double_quant="no"),
            TypeError,
            "double_quant must be True or False, got 'no'",
        ),
        (
            lambda: QuantizedLinear.from_linear(QuantizedLinear.from_linear(LINEAR_7_40)),
            ValueError,
            r"^linear is quantised already: dequantize\(\) it first$",
        ),
        (lambda: quantize(LINEAR_7_40, double_quant="no"), TypeError, "double_quant must be True or False, got 'no'"),
        (lambda: loftq(LINEAR_7_40, rank=1, alpha=1, double_quant="no"), TypeError, "double_quant must be True or"),
        (lambda: loftq(LINEAR_7_40, rank=1, alpha=1, rounds=0), ValueError, "rounds must be at least 1, got 0"),
        (lambda: loftq(LINEAR_7_40, rank=1, alpha=0), ValueError, "alpha must be above 0"),
        (lambda: loftq(LINEAR_7_40, rank=0, alpha=1), ValueError, "rank must be at least 1, got 0"),
        (lambda: loftq(LINEAR_7_40, rank=8, alpha=1), ValueError, "the layer '': rank must be at most 7, got 8"),
        (
            lambda: CodedLinear(np.zeros(0, "f4"), (7, 40), None).encode(LINEAR_7_40),
            ValueError,
            "^a CodedLinear is read from files, and nothing is written in its format$",
        ),
    ],
)
def test_a_refusal_names_its_argument(call, error, message):
    with pytest.raises(error, match=f"^{message.removeprefix('^')}"):
        call()


def test_codes_and_scales_are_of_one_library(standin):
    message = "absmax is a numpy array and packed holds cupy arrays"
    with pytest.raises(TypeError, match=message):
        dequantize_nf4(standin.asarray(PACKED), ABSMAX, (7, 40))


# --- the layer ---


def test_usual_settings_are_qloras():
    assert code_book(4)[0] == -1
    assert len(code_book(4)) == 4
    plain = QuantizedLinear(PACKED, ABSMAX, (7, 40))
    assert (plain.mean, plain.block_size, plain.nested_absmax) == (0.0, 64, None)
    for layer in (
        QuantizedLinear.from_linear(LINEAR_7_40),
        quantize(LINEAR_7_40),
        loftq(LINEAR_7_40, rank=1, alpha=1)[0],
    ):
        assert layer.nested_absmax is not None
        assert layer.block_size == 64


def test_another_bias_leaves_the_layer_as_it_was():
    layer = QuantizedLinear.from_linear(Linear(LINEAR_7_40.weight))
    other = layer.with_bias(LINEAR_7_40.bias)
    assert layer.bias is None
    assert other.bias is LINEAR_7_40.bias
    assert other.packed is layer.packed
    x = gaussian(3, 40)
    np.testing.assert_array_equal(other(x), layer(x) + LINEAR_7_40.bias)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(7,\)"):
        layer.with_bias(gaussian(6))


def test_every_bias_counts_as_numbers():
    two = Sequential(a=LINEAR_7_40, b=Linear(gaussian(5, 7), gaussian(5)))
    assert parameter_count(quantize(two)) == parameter_count(two) == 7 * 40 + 7 + 5 * 7 + 5


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_layer_keeps_bytes_and_gives_the_same_weight(double_quant):
    linear = Linear(gaussian(33, 50), gaussian(33))
    layer = QuantizedLinear.from_linear(linear, block_size=128, double_quant=double_quant)
    np.testing.assert_array_equal(layer.weight, weight_by_loops(layer))
    assert (layer.in_features, layer.out_features, layer.shape) == (50, 33, (33, 50))
    assert layer.bias is linear.bias
    whole = layer.dequantize()
    assert type(whole) is Linear
    np.testing.assert_array_equal(whole.weight, layer.weight)
    assert not np.shares_memory(whole.bias, linear.bias)
    assert list(whole.trainable()) == ["weight", "bias"]


def test_a_layer_of_float64_computes_in_float64():
    linear = Linear(gaussian(4, 40, dtype="float64"))
    layer = QuantizedLinear.from_linear(linear)
    x = gaussian(3, 40, seed=1, dtype="float64")
    y, cache = layer.forward(x)
    dx, grads = layer.backward(y, cache)
    W = layer.weight.astype("float64")
    assert (layer.weight.dtype, y.dtype, dx.dtype, grads) == ("float64", "float64", "float64", {})
    np.testing.assert_allclose(y, x @ W.T, rtol=1e-13)
    np.testing.assert_allclose(dx, y @ W, rtol=1e-12)
    with pytest.raises(TypeError, match="float32, expected float64"):
        layer(x.astype("float32"))


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
    floats = [part for _, layer in walk(adapted) if isinstance(layer, CodedLinear) for part in vars(layer).values()]
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


def test_a_quantised_layer_cannot_be_thawed():
    layer = QuantizedLinear.from_linear(Linear(gaussian(4, 40)))
    with pytest.raises(ValueError, match="cannot train: put an adapter beside it"):
        layer.frozen = False
    assert layer.frozen
    assert layer.trainable() == {}
    assert freeze(layer).trainable() == {}


def test_numbers_are_counted_and_not_bytes():
    model = model_of()
    assert parameter_count(quantize(model)) == parameter_count(model) == 70 * 40 + 70 + 6 * 70
    assert parameter_bytes(model) == 4 * parameter_count(model)


# --- a model ---


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
        (
            lambda: adapt(model_of(), ["last"], rank=1, alpha=1, rng=np.random.default_rng(0)),
            {},
            "adapter beside 'last'",
        ),
        (lambda: quantize(model_of(), ["last"]), {}, "'last' is quantised already"),
        (model_of, {"target_modules": ["q_proj"]}, "names no layer"),
        (model_of, {"block_size": 48}, "block_size must be a power of two, got 48"),
        (model_of, {"block_size": 16}, "block_size must be at least 32, got 16"),
        (with_nan, {}, r"the layer 'last': weight holds NaN or infinity"),
        (tied, {}, "'first' is another layer's too"),
        (lambda: Sequential(conv=Conv2d(gaussian(2, 2, 1, 1))), {"target_modules": ["conv"]}, "only a Linear"),
    ],
)
@pytest.mark.parametrize("function", [quantize, lambda model, **given: loftq(model, rank=1, alpha=1, **given)])
def test_what_cannot_be_quantised_is_refused_by_name(function, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(model(), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"packed": np.zeros(139, "uint8")}, ValueError, r"packed has shape \(139,\), expected \(140,\)"),
        ({"packed": np.zeros(140)}, TypeError, "packed has dtype float64, expected uint8"),
        ({"absmax": np.ones(4, "float32")}, ValueError, r"absmax has shape \(4,\), expected \(5,\)"),
        ({"absmax": np.ones(5)}, TypeError, "absmax has dtype float64, expected float32"),
        ({"shape": 7}, TypeError, "shape must be a tuple"),
        ({"shape": (7, 0)}, ValueError, r"shape\[1\] must be at least 1"),
        ({"shape": (7, 41)}, ValueError, r"expected \(144,\)"),
        ({"block_size": 0}, ValueError, "block_size must be at least 32"),
        ({"dtype": "int32"}, TypeError, "dtype must be one of"),
    ],
)
def test_codes_that_do_not_fit_are_refused(change, error, message):
    packed, absmax = quantize_nf4(gaussian(7, 40))
    given = {"packed": packed, "absmax": absmax, "shape": (7, 40), "block_size": 64, "dtype": "float32"} | change
    with pytest.raises(error, match=message):
        dequantize_nf4(**given)
    with pytest.raises(error, match=message):
        QuantizedLinear(**given)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (np.array([[1.0, np.nan]]), ValueError, "NaN or infinity"),
        (np.array([[1.0, np.inf]]), ValueError, "NaN or infinity"),
        (np.array([[1.0, 1e300]]), ValueError, "NaN or infinity"),
        (np.zeros((3, 0)), ValueError, r"shape \(3, 0\)"),
        (np.ones((3, 3), int), TypeError, "dtype int64"),
        (np.ones((3, 3), complex), TypeError, "complex128"),
        ([[1.0]], TypeError, "numpy.asarray"),
    ],
)
def test_weights_that_are_no_finite_floats_are_refused(weight, error, message):
    with pytest.raises(error, match=message):
        quantize_nf4(weight)


def test_a_layer_has_a_weight_of_two_axes():
    packed, absmax = quantize_nf4(gaussian(3, 5, 7))
    assert dequantize_nf4(packed, absmax, (3, 5, 7)).shape == (3, 5, 7)
    with pytest.raises(ValueError, match=r"shape is \(3, 5, 7\), expected \(out, in\)"):
        QuantizedLinear(packed, absmax, (3, 5, 7))


def test_pissa_over_four_bits_is_refused():
    with pytest.raises(ValueError, match="keeps in few bits"):
        adapt(quantize(model_of()), "all-linear", rank=2, alpha=3, rng=np.random.default_rng(0), init="pissa")


# --- merging ---


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
    assert f"loses {(sums[0] / sums[1]) ** 0.5:.0%} of" in str(notes[0].message)


def test_a_merge_without_quantised_layers_quantises_nothing():
    with pytest.raises(ValueError, match="no adapter stands beside a quantised layer"):
        merge(moved(model_of(), 0.1), requantize=True)


def test_adapters_go_to_files_and_back_over_four_bits(tmp_path):
    base = quantize(model_of())
    adapted = moved(base, 0.2)
    save_adapter(tmp_path / "a", adapters(adapted))
    again = attach(base, load_adapter(tmp_path / "a"))
    np.testing.assert_array_equal(again(gaussian(4, 40)), adapted(gaussian(4, 40)))


# --- LoftQ ---


def test_loftq_starts_nearer_the_weight_each_round():
    model = model_of("float64")
    plain = quantize(model)
    errors = []
    for rounds in (1, 2, 5):
        base, start = loftq(model, rank=3, alpha=6, rounds=rounds)
        adapted = attach(base, start)
        assert start.keys() == {"first", "last"}
        for name, adapter in start.items():
            W, layer = getattr(model, name).weight, getattr(base, name)
            error = np.linalg.norm(W - layer.weight - adapter.delta())
            assert error < np.linalg.norm(W - getattr(plain, name).weight)
            errors.append(error)
            # No matrix of this rank is nearer to what is left over.
            S = np.linalg.svd(W - layer.weight, compute_uv=False)
            np.testing.assert_allclose(error, np.sqrt((S[3:] ** 2).sum()), rtol=1e-10)
            np.testing.assert_allclose(merge(adapted).trainable()[f"{name}.weight"], layer.weight + adapter.delta())
    assert errors[0] >= errors[2] >= errors[4]
    assert errors[1] >= errors[3] >= errors[5]


def test_loftq_takes_turns_and_keeps_the_best_round():
    """The same by hand, with NumPy's singular values."""
    model, options = model_of("float64"), {"block_size": 32, "double_quant": False}
    seen = set()
    for rounds in (1, 2, 3, 4, 5):
        base, start = loftq(model, rank=3, alpha=6, rounds=rounds, **options)
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


def test_loftq_trains_over_its_own_base():
    base, start = loftq(model_of(), rank=2, alpha=3)
    adapted = attach(base, start)
    x, y = gaussian(6, 40), gaussian(6, 6)
    assert backpropagate(adapted, x, y, mse).keys() == adapted.trainable().keys()
    assert isinstance(adapted.first, LoRALinear)


def test_no_warning_comes_from_quantising():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = gaussian(5, 64)
        w[2] = 0
        quantize(Sequential(fc=Linear(w)))


def test_dora_reads_the_norm_of_the_dequantised_weight():
    adapted = adapt(quantize(model_of()), ["first"], rank=2, alpha=3, rng=np.random.default_rng(0), use_dora=True)
    assert isinstance(adapted.first, DoRA)
    expected = np.linalg.norm(adapted.first.base.weight, axis=1)
    np.testing.assert_allclose(adapted.first.adapter.magnitude, expected, rtol=1e-6)
