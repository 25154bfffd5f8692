"""NF4 weight by weight, and what it refuses, beside the layer that keeps it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import (
    NF4,
    Linear,
    QuantizedLinear,
    dequantize_nf4,
    loftq,
    quantize,
    quantize_nf4,
)
from minilora.language.memory import parameter_bytes
from minilora.layers.nf4 import code_book, dequantize_scales, quantize_scales, scale_book
from minilora.layers.quantized import FrozenQuantizedLinear


def gaussian(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def codes(packed, count):
    return np.stack([packed >> 4, packed & 15], axis=1).ravel()[:count]


SHAPES = st.one_of(st.tuples(st.integers(1, 9), st.integers(1, 90)), st.tuples(st.integers(1, 300)), st.just((3, 5, 7)))
BLOCKS = st.sampled_from([32, 64, 128, 4096, 2**60])  # what is larger than the weight takes no memory


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
    assert w.size % 2 == 0 or packed[-1] & 15 == 7  # the code of zero
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


@pytest.mark.parametrize("same", [np.asfortranarray, lambda w: np.repeat(w, 2, axis=1)[:, ::2], np.float16, np.float64])
def test_a_weight_may_lie_and_be_stored_otherwise(same):
    w = gaussian(9, 30).astype("float16").astype("float32")
    for found, expected in zip(quantize_nf4(same(w)), quantize_nf4(w), strict=True):
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
    book, off = scale_book(), absmax - np.float32(mean)
    for block, start in enumerate(range(0, count, 256)):
        of_block, codes_of_block = off[start : start + 256], found[start : start + 256]
        assert nested[block] == np.abs(of_block).max()
        if nested[block]:
            distance = np.abs(book - of_block[:, None] / nested[block])
            assert (distance[np.arange(len(of_block)), codes_of_block] <= distance.min(axis=1) + 1e-6).all()
    expected = nested[np.arange(count) // 256] * book[found] + np.float32(mean)
    np.testing.assert_array_equal(dequantize_scales(found, nested, mean), expected)


def test_a_weight_takes_4_5_bits_or_4_127():
    linear = Linear(gaussian(256, 1024))
    for double_quant, bits in ((False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))):
        layer = QuantizedLinear.from_linear(linear, double_quant=double_quant)
        assert 8 * parameter_bytes(layer) / linear.weight.size == bits


# --- how a quotient is rounded ---


def between_two_codes(book, largest):
    """Numbers whose quotient by their block's largest has one code, and whose product with its inverse another."""
    middles, a = (book[:-1] + book[1:]) / 2, largest[:, None]
    near = [middles * a, *(np.nextafter(middles * a, np.float32(side)) for side in (-9, 9))]
    w = np.concatenate(near, axis=1)
    divided, multiplied = (np.searchsorted(middles, v) for v in (w / a, w * (np.float32(1) / a)))
    at = np.nonzero(divided != multiplied)
    return zip(largest[at[0]], w[at], divided[at], multiplied[at], strict=True)


LARGEST = np.random.default_rng(5).uniform(0.5, 2, 30).astype("float32")


def test_a_whole_block_is_multiplied_and_a_shorter_one_divided():
    """As in bitsandbytes: the two differ in few weights, which lie between two codes."""
    found = list(between_two_codes(NF4, LARGEST))
    assert len(found) > 20
    for a, w, divided, multiplied in found:
        block = np.zeros(64, "float32")
        block[:2] = a, w
        assert codes(quantize_nf4(block)[0], 64)[1] == multiplied
        assert codes(quantize_nf4(np.concatenate([block, block]))[0], 128)[65] == multiplied
        assert codes(quantize_nf4(block[:40])[0], 40)[1] == divided
        twice = codes(quantize_nf4(np.concatenate([block, block[:40]]))[0], 104)
        assert (twice[1], twice[65]) == (multiplied, divided)


def test_scales_are_multiplied_in_every_block():
    found, middles = 0, (scale_book()[:-1] + scale_book()[1:]) / 2
    for a, w, *_ in between_two_codes(scale_book(), LARGEST[:3]):
        absmax = np.array([4 + a, 4 - a, 4 + w, 4 - w], "float32")
        off = absmax - absmax.mean()
        n = np.abs(off).max()
        expected = np.searchsorted(middles, off * (np.float32(1) / n))
        np.testing.assert_array_equal(quantize_scales(absmax)[0], expected)
        found += bool((expected != np.searchsorted(middles, off / n)).any())
    assert found > 0


def test_the_smallest_normal_scale_is_no_zero():
    w = np.zeros(64, "float32")
    w[3] = np.finfo("float32").tiny
    assert codes(quantize_nf4(w)[0], 64)[3] == 15


# --- what is refused says which argument it is ---

LINEAR_7_40 = Linear(gaussian(7, 40), gaussian(7, seed=1))
PACKED, ABSMAX = quantize_nf4(LINEAR_7_40.weight)
NESTED = dict(zip(("absmax", "nested_absmax", "mean"), quantize_scales(ABSMAX), strict=True))


def of_codes(**change):
    """A weight and a layer of codes of which something is wrong."""
    given = {"packed": PACKED, "absmax": ABSMAX, "shape": (7, 40), "block_size": 64, "dtype": "float32"} | change
    return (lambda: dequantize_nf4(**given)), (lambda: QuantizedLinear(**given))


def layer(**change):
    return lambda: QuantizedLinear(**{"packed": PACKED, "absmax": ABSMAX, "shape": (7, 40)} | change)


REFUSED = {
    "weight has shape (0, 2): the mean of no entries does not exist": [lambda: quantize_nf4(np.ones((0, 2)))],
    "weight must be an array, got list; convert it with numpy.asarray(weight)": [lambda: quantize_nf4([1.0])],
    "weight has dtype int64, expected a floating-point dtype such as float32": [
        lambda: quantize_nf4(np.ones((3, 3), int))
    ],
    "weight's dtype must be one of float16, float32, float64, got dtype('complex128')": [
        lambda: quantize_nf4(np.ones((2, 2), complex))
    ],
    "weight holds NaN or infinity: entry (1,) is nan": [lambda: quantize_nf4(np.array([[1.0, np.nan]]))],
    "weight holds NaN or infinity: entry (1,) is inf": [
        lambda: quantize_nf4(np.array([[1.0, np.inf]])),
        lambda: quantize_nf4(np.array([[1.0, 1e300]])),
    ],
    "levels must be at least 4, got 3": [lambda: code_book(3)],
    "levels must be even, got 5": [lambda: code_book(5)],
    "packed has shape (139,), expected (140,)": of_codes(packed=PACKED[:139]),
    "packed has shape (140,), expected (144,)": of_codes(shape=(7, 41)),
    "packed has dtype float64, expected uint8": of_codes(packed=PACKED.astype(float)),
    "absmax has shape (1,), expected (5,)": of_codes(absmax=ABSMAX[:1]),
    "absmax has dtype float64, expected float32": of_codes(absmax=ABSMAX.astype(float)),
    "block_size must be at least 32, got 0": of_codes(block_size=0),
    "block_size must be a power of two, got 48": of_codes(block_size=48),
    "dtype must be one of float16, float32, float64, got 'int32'": of_codes(dtype="int32"),
    "bias has dtype float64, expected float32 as in the layer: convert it with bias.astype('float32')": [
        layer(bias=np.ones(7))
    ],
    "bias has shape (6,), expected (7,)": [layer(bias=np.ones(6, "f4"))],
    "shape is (280,), expected (out, in)": [layer(shape=(280,))],
    "absmax has dtype float32, expected uint8": [layer(**NESTED | {"absmax": ABSMAX})],
    "nested_absmax has shape (2,), expected (1,)": [layer(**NESTED | {"nested_absmax": np.ones(2, "f4")})],
    "mean must be a number, got 'x'": [layer(**NESTED | {"mean": "x"})],
    "linear must be a Linear, got str": [lambda: QuantizedLinear.from_linear("x")],
    "linear is quantised already: dequantize() it first": [lambda: QuantizedLinear.from_linear(layer()())],
    "double_quant must be True or False, got 'no'": [
        lambda: QuantizedLinear.from_linear(LINEAR_7_40, double_quant="no")
    ],
    "the layer '': double_quant must be True or False, got 'no'": [
        lambda: quantize(LINEAR_7_40, double_quant="no"),
        lambda: loftq(LINEAR_7_40, rank=1, alpha=1, double_quant="no"),
    ],
    "rounds must be at least 1, got 0": [lambda: loftq(LINEAR_7_40, rank=1, alpha=1, rounds=0)],
    "the layer '': rank must be at most 7, got 8": [lambda: loftq(LINEAR_7_40, rank=8, alpha=1)],
    "a FrozenQuantizedLinear is read from files, and nothing is written in its format": [
        lambda: FrozenQuantizedLinear(np.zeros(0, "f4"), (7, 40), None).encode(LINEAR_7_40)
    ],
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_its_argument(message):
    for call in REFUSED[message]:
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert str(error.value) == message


def test_codes_and_scales_are_of_one_library(standin):
    message = "absmax is a numpy array and packed holds cupy arrays"
    with pytest.raises(TypeError, match=message):
        dequantize_nf4(standin.asarray(PACKED), ABSMAX, (7, 40))
