"""Adapters that read the same input share products: the page's outputs and gradients, of any ranks."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Adapter, Attention, Linear, LoRA, Rotary, adapt, attach, quantize
from minilora.fast.blockwise import BlockwiseAttention
from minilora.fast.sameinput import SameInputMLP, can_share
from minilora.layer import freeze, rebuild
from minilora.layers.gated import GatedMLP
from minilora.layers.rotary import frequencies
from minilora.variants.dropout import with_dropout

PAGES = {SameInputMLP: GatedMLP, BlockwiseAttention: Attention}
NAMES = {SameInputMLP: ("gate_proj", "up_proj"), BlockwiseAttention: ("q_proj", "k_proj", "v_proj")}
both = pytest.mark.parametrize("cls", PAGES, ids=lambda cls: cls.__name__)


def linear(rng, n_out, n_in, bias):
    return Linear(rng.standard_normal((n_out, n_in)), rng.standard_normal(n_out) if bias else None)


def layer(cls, rng, bias=True):
    """Return a layer of width 5: an MLP of width 7, or 4 heads over 2 key heads of width 2."""
    widths = ((7, 5), (7, 5), (5, 7)) if cls is SameInputMLP else ((8, 5), (4, 5), (4, 5), (5, 8))
    linears = [linear(rng, *pair, bias) for pair in widths]
    return cls(*linears) if cls is SameInputMLP else cls(*linears, Rotary(frequencies(2, 50.0)))


def adapted(cls, rng, ranks=(3, 1, 2), bias=True):
    """Return it with adapters of these ranks, no two alike, on what reads x; the second is rank-stabilised."""
    base, adapters = layer(cls, rng, bias), {}
    for i, (name, rank) in enumerate(zip(NAMES[cls], ranks, strict=False)):
        n_out, n_in = getattr(base, name).shape
        factors = rng.standard_normal((rank, n_in)), rng.standard_normal((n_out, rank))
        adapters[name] = Adapter(*factors, 1.5 + i, use_rslora=i == 1)
    return attach(base, adapters)


def of_the_page(here):
    """Return the page's layer with the same parts."""
    page = PAGES[type(here)]
    return page(**{field.name: getattr(here, field.name) for field in fields(page)})


def answers(model, x, dy, need_dx=True):
    """Return y, dx and the gradients by name."""
    y, cache = model.forward(x)
    dx, grads = model.backward(dy, cache, need_dx=need_dx)
    return {"y": y, "dx": dx} | grads


def assert_same(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, one in found.items():
        if one is None:
            assert expected[name] is None
        else:
            scale = max(1, np.abs(expected[name]).max())
            assert one.dtype == expected[name].dtype
            assert np.abs(one - expected[name]).max() <= tolerance * scale, name


def shares(here):
    return can_share({name: getattr(here, name) for name in NAMES[type(here)]})


@both
@given(st.lists(st.integers(1, 6), min_size=3, max_size=3), st.booleans(), st.booleans(), st.integers(0, 1000))
def test_outputs_and_gradients_are_the_pages(cls, ranks, bias, need_dx, seed):
    rng = np.random.default_rng(seed)
    here = adapted(cls, rng, ranks, bias)
    x, dy = rng.standard_normal((2, 2, 4, 5))
    assert shares(here)
    assert_same(answers(here, x, dy, need_dx), answers(of_the_page(here), x, dy, need_dx), 1e-12)


@both
def test_a_quantized_base_shares_as_well(cls):
    rng = np.random.default_rng(0)
    here = adapt(quantize(layer(cls, rng)), NAMES[cls], rank=2, alpha=3, rng=rng)
    for p in here.trainable().values():
        p += rng.standard_normal(p.shape)
    x, dy = rng.standard_normal((2, 2, 4, 5))
    assert shares(here)
    assert_same(answers(here, x, dy), answers(of_the_page(here), x, dy), 1e-12)


def without_one(here, first):
    return replace(here, **{first: getattr(here, first).base})


def frozen_layer(here, first):
    return replace(here, **{first: freeze(getattr(here, first))})


def frozen_adapter(here, first):
    one = getattr(here, first)
    return replace(here, **{first: replace(one, adapter=freeze(one.adapter))})


def of_another_class(here, first):
    class Louder(LoRA):
        def forward(self, x):
            y, cache = super().forward(x)
            return 2 * y, (self, *cache[1:])

    one = getattr(here, first)
    return replace(here, **{first: replace(one, adapter=Louder(one.adapter.lora_A, one.adapter.lora_B, 3.0))})


def with_masks(here, first):
    return with_dropout(here, 0.4, [5, 6])


def by_dora(here, first):
    rng = np.random.default_rng(1)
    return adapt(layer(type(here), rng), NAMES[type(here)], rank=2, alpha=3, rng=rng, use_dora=True)


@both
@pytest.mark.parametrize("change", [without_one, frozen_layer, frozen_adapter, of_another_class, with_masks, by_dora])
def test_anything_but_plain_adapters_goes_by_the_page(cls, change):
    rng = np.random.default_rng(3)
    here = change(adapted(cls, rng), NAMES[cls][0])
    x, dy = rng.standard_normal((2, 2, 4, 5))
    assert not shares(here)
    assert_same(answers(here, x, dy), answers(of_the_page(here), x, dy), 0)


@both
@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("of_the_adapter", [True, False], ids=["the adapter's", "the layer's"])
def test_a_method_that_somebody_replaced_is_called(cls, method, of_the_adapter):
    """As a debugger does, or a page of the site that looks at what comes in."""
    rng, called = np.random.default_rng(4), []
    here = adapted(cls, rng)
    one = getattr(here, NAMES[cls][-1])
    one = one.adapter if of_the_adapter else one
    plain = getattr(one, method)
    setattr(one, method, lambda *args, **options: called.append(method) or plain(*args, **options))
    answers(here, *rng.standard_normal((2, 2, 4, 5)))
    assert called == [method]


@both
def test_no_adapter_that_shares_is_asked_alone(cls, monkeypatch):
    here = adapted(cls, np.random.default_rng(5))
    for method in ("forward", "backward"):
        monkeypatch.setattr(LoRA, method, lambda *args, **options: pytest.fail("an adapter was asked alone"))
    answers(here, *np.random.default_rng(6).standard_normal((2, 2, 4, 5)))


@both
def test_the_page_takes_these_caches(cls):
    rng = np.random.default_rng(7)
    here = adapted(cls, rng)
    ys, caches = here.project(rng.standard_normal((4, 5)))
    dys = tuple(rng.standard_normal(y.shape) for y in ys)
    (dx, grads), (page_dx, page) = (c.project_backward(here, dys, caches, need_dx=True) for c in (cls, PAGES[cls]))
    assert list(grads) == list(page)
    assert_same({"dx": dx} | grads, {"dx": page_dx} | page, 1e-12)


@both
def test_without_need_dx_no_base_is_multiplied(cls, monkeypatch):
    rng = np.random.default_rng(8)
    here = adapted(cls, rng)
    ys, caches = here.project(rng.standard_normal((4, 5)))
    monkeypatch.setattr(Linear, "input_gradient", lambda *args: pytest.fail("dx was computed"))
    dx, grads = here.project_backward(ys, caches, need_dx=False)
    assert dx is None
    assert len(grads) == 2 * len(ys)


@both
def test_a_complex_step_goes_through(cls):
    rng = np.random.default_rng(9)
    here = adapted(cls, rng)
    ys, caches = here.project(rng.standard_normal((4, 5)))
    dys = tuple(y + 1e-30j * rng.standard_normal(y.shape) for y in ys)
    (dx, grads), (page_dx, page) = (c.project_backward(here, dys, caches, need_dx=True) for c in (cls, PAGES[cls]))
    for part in (np.real, lambda a: 1e30 * np.imag(a)):
        found, expected = (
            {name: part(g) for name, g in of.items()} for of in ({"dx": dx} | grads, {"dx": page_dx} | page)
        )
        assert_same(found, expected, 1e-12)


@both
def test_a_cache_of_another_layer_is_refused(cls):
    rng = np.random.default_rng(5)
    here, other = adapted(cls, rng), adapted(cls, rng)
    x = rng.standard_normal((4, 5))
    dys, (_, caches) = here.project(x)[0], other.project(x)
    with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
        here.project_backward(dys, caches, need_dx=True)


@both
def test_a_step_is_numpys_in_another_library(cls, place):
    rng = np.random.default_rng(6)
    here = adapted(cls, rng)
    x, dy = rng.standard_normal((2, 2, 4, 5))
    there = rebuild(here, array=place.put)
    assert shares(there)
    found, expected = answers(there, place.put(x), place.put(dy)), answers(here, x, dy)
    for name, one in expected.items():
        place.assert_same(found[name], one)
