"""Attention by blocks is attention: the page's output and gradients, in memory that grows with the length of a text."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Attention, Linear, Rotary, cross_entropy
from minilora.fast import blockwise
from minilora.fast.blockwise import CPU, GPU, Blocks, BlockwiseAttention
from minilora.language import next_token_loss
from minilora.language.memory import cache_bytes
from minilora.layer import rebuild
from minilora.layers import attention
from minilora.layers.rotary import frequencies

from ..support.cupy_standin import traffic
from ..support.language import adapted, tiny_llama
from ..support.memory import traced

GRADIENTS = ("dq", "dk", "dv")


def heads(seed, B=2, K=2, g=3, T=11, past=0, D=4, dtype="float64"):
    """Return q, k, v and do, of T queries after so many earlier positions."""
    shapes = ((B, K, g, T, D), (B, K, 1, past + T, D), (B, K, 1, past + T, D), (B, K, g, T, D))
    return [np.random.default_rng([seed, i]).standard_normal(s).astype(dtype) for i, s in enumerate(shapes)]


def assert_is_the_pages(q, k, v, do, blocks, tolerance=1e-12):
    """Compare o and the three gradients with the page's, entry by entry, relative to the largest."""
    (o, m, Z), (page_o, P) = blockwise.attend(q, k, v, blocks), attention.attend(q, k, v)
    found = (o, *blockwise.attend_backward(do, q, k, v, o, m, Z, blocks))
    expected = (page_o, *attention.attend_backward(do, q, k, v, P))
    for name, one, other in zip(("o", *GRADIENTS), found, expected, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert np.isfinite(one).all()
        assert np.abs(one - other).max() <= tolerance * max(1, np.abs(other).max()), name


sizes = st.fixed_dictionaries(
    {
        **{"B": st.integers(1, 2), "K": st.integers(1, 3), "g": st.integers(1, 3), "D": st.sampled_from([2, 3, 8])},
        **{"T": st.integers(1, 30), "past": st.sampled_from([0, 0, 1, 7, 40])},
    }
)
blocks = st.integers(1, 12).flatmap(lambda n: st.builds(Blocks, st.just(n), st.integers(n, 40), st.just(0)))


@settings(max_examples=40, deadline=None)
@given(sizes, blocks, st.integers(0, 1000))
@example({"T": 5}, Blocks(64, 256, 0), 0)  # shorter than a block
@example({"T": 12}, Blocks(4, 4, 0), 0)  # whole blocks
@example({"T": 13}, Blocks(4, 6, 0), 0)  # a query and a key more than whole blocks
@example({"T": 1, "past": 9}, Blocks(2, 3, 0), 0)  # a token of a text that is generated
@example({"T": 7, "past": 300}, Blocks(2, 5, 0), 0)
def test_outputs_and_gradients_are_the_pages(sizes, blocks, seed):
    assert_is_the_pages(*heads(seed, **sizes), blocks)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("score", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("where", ["all", "first key", "last key", "every other key"])
def test_extreme_scores_are_exact_and_do_not_overflow(dtype, score, where):
    """Scores of 10,000 beside others of about 1, or all equal: one block has the largest, or each its own."""
    q, k, v, do = heads(2, T=13, D=4, dtype=dtype)
    q[...] = 1 / 2  # D q k / sqrt(D) = k
    ends = {"first key": slice(1), "last key": slice(-1, None), "every other key": slice(0, None, 2)}
    k[..., ends.get(where, slice(None)), :] = score
    few = 16 * np.finfo(dtype).eps * max(1, abs(score))  # scores are rounded to it, and dq has k as a factor
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert_is_the_pages(q, k, v, do, Blocks(3, 5, 0), few)


def test_a_layer_takes_its_own_blocks():
    q, k, v, _ = heads(3, T=9)
    for own, by_blocks in ((Blocks(2, 3, plain_up_to=8), True), (Blocks(2, 3, plain_up_to=9), False), (None, False)):
        kept = layer(BlockwiseAttention, blocks=own).attend(q, k, v)[1]
        assert isinstance(kept, tuple) == by_blocks  # o, m and Z in the place of P


def test_a_block_wider_than_high_is_refused_otherwise():
    for queries, keys in ((3, 2), (0, 5)):
        with pytest.raises(ValueError, match=f"{queries} queries and {keys} keys, expected at least as many keys"):
            Blocks(queries, keys, 0)


# --- the layer, and the model that takes it ---


def layer(cls, seed=0, d=6, K=2, g=2, D=4, **more):
    widths = ((K * g * D, d), (K * D, d), (K * D, d), (d, K * g * D))
    linears = [Linear(np.random.default_rng([seed, i]).standard_normal(s)) for i, s in enumerate(widths)]
    return cls(*linears, Rotary(frequencies(D, 100.0)), **more)


def test_a_short_text_has_the_pages_bits():
    page, here = layer(Attention), layer(BlockwiseAttention)
    for T, by_blocks in ((CPU.plain_up_to, False), (CPU.plain_up_to + 1, True)):
        x, dy = np.random.default_rng(T).standard_normal((2, 2, T, 6))
        (y, cache), (expected_y, expected_cache) = here.forward(x), page.forward(x)
        dx, grads = here.backward(dy, cache)
        expected_dx, expected = page.backward(dy, expected_cache)
        kept, P = cache.kept[-1][-1], expected_cache.kept[-1][-1]
        assert isinstance(kept, tuple) is by_blocks
        assert P.shape[-2:] == (2 * T, T)
        for one, other in ((y, expected_y), (dx, expected_dx), *((grads[name], expected[name]) for name in expected)):
            if by_blocks:
                assert np.abs(one - other).max() <= 1e-12 * np.abs(other).max()
            else:
                np.testing.assert_array_equal(one, other)


def test_a_text_goes_on_by_blocks_as_by_the_page():
    here, page = layer(BlockwiseAttention, blocks=Blocks(2, 3, 4)), layer(Attention)
    x, past, other = np.random.default_rng(0).standard_normal((2, 20, 6)), None, None
    for part in (slice(0, 9), slice(9, 10), slice(10, 20)):  # by blocks, by the page, by blocks after a past
        y, past = here.extend(x[:, part], past)
        expected, other = page.extend(x[:, part], other)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-11)


def llama(dtype="float32"):
    """A small decoder with adapters that have moved beside all its linear layers."""
    return adapted(model=tiny_llama(dtype=dtype))


def step(model, ids, targets):
    z, cache = model.forward(ids)
    loss, dz = next_token_loss(z, targets)
    return float(loss), model.backward(dz, cache)[1]


def by_the_page(model):
    """The same model, whose attention never takes blocks."""

    def page(path, part):
        if isinstance(part, BlockwiseAttention):
            return Attention(part.q_proj, part.k_proj, part.v_proj, part.o_proj, part.rotary)
        return part

    return rebuild(model, layer=page)


def test_a_decoders_long_step_has_the_pages_gradients():
    model = llama("float64")
    ids = np.random.default_rng(1).integers(0, 29, (2, 201))
    (loss, grads), (expected_loss, expected) = (step(m, ids[:, :-1], ids[:, 1:]) for m in (model, by_the_page(model)))
    assert abs(loss - expected_loss) < 1e-12
    assert grads.keys() == expected.keys()
    for name, g in grads.items():
        assert np.abs(g - expected[name]).max() <= 1e-12 * max(1, np.abs(expected[name]).max()), name


def test_what_a_step_keeps_grows_with_the_text_alone():
    """Not with its square: from 256 positions to 512, and from 512 to 1024, by the same bytes a position."""
    model, ids = llama(), np.random.default_rng(1).integers(0, 29, (1, 1024))
    kept = [cache_bytes(model.forward(ids[:, :T])[1]) for T in (256, 512, 1024)]
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0])
    assert cache_bytes(by_the_page(model).forward(ids)[1]) > 3 * kept[2]


def test_the_most_memory_of_a_step_lies_on_a_line():
    model, ids, peaks = llama(), np.random.default_rng(1).integers(0, 29, (1, 1025)), []
    lengths = np.array([256, 512, 1024])
    step(model, ids[:, :1024], ids[:, 1:])  # the angles of all positions
    for T in lengths:
        with traced() as memory:
            step(model, ids[:, :T], ids[:, 1 : T + 1])
        peaks.append(memory.peak)
    line = np.polyval(np.polyfit(lengths, peaks, 1), lengths)
    assert np.abs(peaks / line - 1).max() < 0.05


# --- other libraries ---


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_are_numpys_in_another_library(place, dtype):
    q, k, v, do = heads(5, T=9, past=3, dtype=dtype)
    sizes = Blocks(2, 4, 0)
    kept = blockwise.attend(q, k, v, sizes)
    here = [place.put(array) for array in (q, k, v, do)]
    there = blockwise.attend(*here[:3], sizes)
    found = (*there, *blockwise.attend_backward(here[3], *here[:3], *there, sizes))
    for one, other in zip(found, (*kept, *blockwise.attend_backward(do, q, k, v, *kept, sizes)), strict=True):
        place.assert_same(one, other)


def test_a_gpu_takes_larger_blocks(standin, monkeypatch):
    seen, right = [], blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda q, k, v, blocks: seen.append(blocks) or right(q, k, v, blocks))
    monkeypatch.setattr(blockwise, "GPU", Blocks(3, 4, 5))
    assert GPU.plain_up_to > CPU.plain_up_to
    here = layer(BlockwiseAttention)
    there = rebuild(here, array=standin.asarray)
    for T in (5, 6, CPU.plain_up_to + 1):
        x = np.random.default_rng(T).standard_normal((1, T, 6))
        here(x), there(standin.asarray(x))
    assert seen == [Blocks(3, 4, 5), CPU, Blocks(3, 4, 5)]


def test_a_long_step_neither_waits_nor_copies(standin, monkeypatch):
    """Once the angles of the positions are there, which go to the device at the first step."""
    monkeypatch.setattr(blockwise, "GPU", Blocks(2, 3, 4))
    model = rebuild(llama(), array=standin.asarray)
    ids = standin.asarray(np.random.default_rng(2).integers(0, 29, (2, 9)))
    for _ in range(2):
        traffic.reset()
        z, cache = model.forward(ids)
        _, dz = cross_entropy(z, ids, out=z)
        model.backward(dz, cache)
    assert (traffic.waits, traffic.to_device, traffic.to_host) == (0, 0, 0)
