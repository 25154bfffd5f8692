"""A model is a layer made of layers: names, freezing, tied arrays."""

import inspect
import pickle
import re
from copy import copy, deepcopy
from dataclasses import dataclass
from textwrap import dedent
from typing import Annotated, ClassVar

import numpy as np
import pytest

from minilora import (
    MLP,
    Adam,
    Embedding,
    Linear,
    LoRA,
    ReLU,
    Rotary,
    Sequential,
    Tanh,
    adapt,
    gradcheck,
)
from minilora import layer as layer_page
from minilora.layer import (
    Layer,
    first_array,
    freeze,
    nest,
    parameter_count,
    rebuild,
    trains,
    walk,
)
from minilora.verify.instances import layer_claim

RNG = np.random.default_rng(7)


def linear(n_in, n_out):
    return Linear(RNG.standard_normal((n_out, n_in)), RNG.standard_normal(n_out))


def mlp(n_in=3, hidden=5, n_out=4):
    return MLP(fc1=linear(n_in, hidden), act=Tanh(), fc2=linear(hidden, n_out))


class Blocks(Layer):
    """A model with a list of layers, and one array of its own."""

    def __init__(self, *layers):
        self.shift = RNG.standard_normal(layers[0].in_features)
        self.layers = list(layers)

    def forward(self, x):
        x, caches = x + self.shift, []
        for layer in self.layers:
            x, cache = layer.forward(x)
            caches.append(cache)
        return x, (caches,)

    def backward(self, dy, cache, *, need_dx=True):
        (caches,) = cache
        grads = {}
        for i, (layer, inner) in reversed(list(enumerate(zip(self.layers, caches, strict=True)))):
            dy, found = layer.backward(dy, inner)
            grads |= nest(f"layers.{i}", found)
        return dy, grads if self.frozen else {"shift": dy.reshape(-1, dy.shape[-1]).sum(0), **grads}


class Mean(Layer):
    """Another shape out than in: (N, T, dim) -> (N, dim)."""

    def forward(self, x):
        y = x.mean(axis=1)
        return y, (x.shape,)

    def backward(self, dy, cache, *, need_dx=True):
        (shape,) = cache
        return np.broadcast_to(dy[:, None] / shape[1], shape), {}


# --- names ----------------------------------------------------------------------------------------


def test_names_nest_through_layers_and_lists():
    model = Blocks(linear(3, 3), mlp(3, 5, 3))
    expected = ["shift", "layers.0.weight", "layers.0.bias"]
    expected += [f"layers.1.{fc}.{name}" for fc in ("fc1", "fc2") for name in ("weight", "bias")]
    assert list(model.trainable()) == expected
    assert model.trainable()["layers.1.fc2.weight"] is model.layers[1].fc2.weight
    paths = ["", "layers.0", "layers.1", "layers.1.fc1", "layers.1.act", "layers.1.fc2"]
    assert [path for path, _ in walk(model)] == paths


def test_the_first_array_is_looked_for_in_lists_and_layers():
    first, second = Linear.init(3, 4, rng=RNG), Linear.init(4, 2, rng=RNG)
    listed = Sequential(act=ReLU(), fc=second)
    listed.act.layers = [Tanh(), first]
    assert first_array(listed) is first.weight
    assert first_array(Sequential(act=ReLU(), fc=second, last=first)) is second.weight
    assert first_array(Sequential(act=ReLU(), last=Tanh())) is None


def test_a_list_of_layers_has_the_measured_gradients():
    model = Blocks(linear(3, 3), mlp(3, 5, 3), adapt(linear(3, 2), [""], rank=2, alpha=1, rng=RNG))
    model.layers[2].adapter.lora_B += RNG.standard_normal((2, 2))
    f, params, grads, dy = layer_claim(model, RNG.standard_normal((2, 6, 3)), RNG.standard_normal((2, 6, 2)))
    assert {"x", "shift", "layers.0.bias", "layers.1.fc1.weight", "layers.2.lora_A"} < params.keys()
    assert gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12).passed


@pytest.mark.parametrize("shape", [(4,), (2, 0, 4), (0, 4)])
def test_a_sequence_has_at_least_one_position(shape):
    layer = Rotary((1.0, 0.1))
    with pytest.raises(ValueError) as error:
        layer(np.ones(shape))
    assert str(error.value) == f"x has shape {shape}, expected (..., T, 4) with at least one position"
    for fits in ((1, 4), (2, 3, 4), (0, 1, 4)):
        assert layer(np.ones(fits)).shape == fits


# --- freezing -------------------------------------------------------------------------------------


def arrays_in(cache):
    if isinstance(cache, (tuple, list)):
        return [a for part in cache for a in arrays_in(part)]
    return [cache] if isinstance(cache, np.ndarray) else []


def test_a_frozen_linear_layer_keeps_no_array():
    layer = linear(3, 4)
    assert arrays_in(layer.forward(np.ones((2, 3)))[1])
    assert not arrays_in(freeze(layer).forward(np.ones((2, 3)))[1])


class Counted(np.ndarray):
    """Notes the shape of every product of matrices that it is in."""

    products: ClassVar[list] = []

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(value) if isinstance(value, np.ndarray) else value for value in inputs]
        found = getattr(ufunc, method)(*plain, **options)
        if ufunc is np.matmul:
            Counted.products.append(found.shape)
        return found.view(Counted) if isinstance(found, np.ndarray) else found


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("need_dx", [True, False])
def test_a_frozen_adapter_keeps_nothing_and_computes_no_gradient(shape, need_dx):
    trained = LoRA(RNG.standard_normal((2, 3)), RNG.standard_normal((4, 2)), 3.0)
    layer, x, dy = freeze(trained), RNG.standard_normal((*shape, 3)), RNG.standard_normal((*shape, 4))
    y, cache = layer.forward(x)
    assert not arrays_in(cache)
    assert len(arrays_in(trained.forward(x)[1])) == 2
    np.testing.assert_array_equal(y, trained(x))
    Counted.products.clear()
    dx, grads = layer.backward(dy.view(Counted), cache, need_dx=need_dx)
    assert Counted.products == [(*shape, 2), (*shape, 3)][: 1 + need_dx]  # dh, and dx where it is asked for
    assert grads == {}
    expected, trained_grads = trained.backward(dy, trained.forward(x)[1], need_dx=need_dx)
    np.testing.assert_array_equal(dx, expected)
    assert list(trained_grads) == ["lora_A", "lora_B"]


def test_freezing_leaves_the_model_as_it_was():
    model = mlp()
    frozen = freeze(model)
    assert not frozen.trainable()
    assert len(model.trainable()) == 4
    assert frozen.fc1.weight is model.fc1.weight


class Watched(Linear):
    """Notes what its backward was asked for."""

    def backward(self, dy, cache, *, need_dx=True):
        self.asked.append(need_dx)
        return super().backward(dy, cache, need_dx=need_dx)


@pytest.mark.parametrize("trains", [0, 2, 3])
def test_backward_stops_below_the_lowest_layer_that_trains(trains):
    """Of four layers one trains. Those above it are asked for dx, it is not, and nobody below it is called."""
    names = ["a", "b", "c", "d"]
    layers = {}
    for i, name in enumerate(names):
        layer = Watched(RNG.standard_normal((3, 3)))
        layer.asked = []
        layer.frozen = i != trains
        layers[name] = layer
    model = Sequential(**layers)
    y, cache = model.forward(np.ones((2, 3)))
    dx, grads = model.backward(y, cache, need_dx=False)
    assert dx is None
    assert list(grads) == [f"{names[trains]}.weight"]
    asked = [layer.asked for layer in layers.values()]
    assert asked == [[]] * trains + [[False]] + [[True]] * (3 - trains)
    assert model.backward(y, cache)[0].shape == (2, 3)


class Hidden(Layer):
    """Says itself what trains: an array that stands in a dict, and one of its own that does not."""

    def __init__(self, *, learns):
        self.fixed, self.learned = np.ones(3), {"gain": np.ones(3)} if learns else {}

    def trainable(self):
        return self.learned

    def forward(self, x):
        return x * self.fixed, (x,)

    def backward(self, dy, cache, *, need_dx=True):
        (x,) = cache
        return dy * self.fixed if need_dx else None, {name: (dy * x).sum(axis=0) for name in self.learned}


@pytest.mark.parametrize("learns", [True, False])
def test_a_layer_that_says_what_trains_is_asked(learns):
    model = Sequential(low=Hidden(learns=learns), top=linear(3, 2))
    assert trains(model.low) is learns
    y, cache = model.forward(np.ones((4, 3)))
    assert model.backward(y, cache, need_dx=False)[1].keys() == model.trainable().keys()


# --- ids in, any shape out, tied arrays -----------------------------------------------------------


def tied_model():
    """An embedding and a head that are one array: logits = mean of rows, against every row."""
    table = RNG.standard_normal((6, 3))
    return Sequential(embed=Embedding(table), mean=Mean(), act=Tanh(), head=Linear(table))


def test_token_ids_have_no_dx_and_their_model_has_gradients():
    model, ids = tied_model(), RNG.integers(0, 6, (5, 4))
    y, cache = model.forward(ids)
    assert y.shape == (5, 6)
    dx, grads = model.backward(RNG.standard_normal(y.shape), cache)
    assert dx is None
    assert list(grads) == list(model.trainable()) == ["embed.weight", "head.weight"]


def test_a_tied_array_is_checked_as_one_parameter():
    model, ids = tied_model(), RNG.integers(0, 6, (5, 4))
    f, params, grads, dy = layer_claim(model, ids, RNG.standard_normal((5, 6)))
    report = gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12)
    assert [block.name for block in report.blocks] == ["embed.weight"]


def test_a_tied_array_takes_one_step_of_the_summed_gradient():
    shared, alone = np.ones(3), np.zeros(2)
    optimizer = Adam({"a": shared, "c": alone, "b": shared}, lr=0.1)
    plain = Adam({"a": np.ones(3), "c": np.zeros(2)}, lr=0.1)
    for _ in range(3):
        g = RNG.standard_normal((3, 3))
        optimizer.step({"a": g[0], "b": g[1], "c": g[2, :2]})
        plain.step({"a": g[0] + g[1], "c": g[2, :2]})
    np.testing.assert_array_equal(shared, plain.params["a"])
    np.testing.assert_array_equal(alone, plain.params["c"])
    assert list(optimizer.params) == list(optimizer.m) == ["a", "c"]


def test_what_was_tied_stays_tied():
    model = rebuild(tied_model(), array=lambda a: a.astype("float32"))
    assert model.embed.weight is model.head.weight
    assert model.embed.weight.dtype == np.float32


# --- what fits ------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Scale(Layer):
    """Its numbers, and those of an optional layer inside."""

    gain: Annotated[np.ndarray, "in"]
    inside: Annotated[Layer | None, "in -> in"] = None

    def forward(self, x):
        """Return y."""
        return x * self.gain, (x,)

    def backward(self, dy, cache, *, need_dx=True):
        (x,) = cache
        return dy * self.gain if need_dx else None, {"gain": (dy * x).sum(axis=0)}


def test_a_layer_that_says_what_fits_is_mathematics_alone():
    layer, x = Scale(np.array([2.0, 3.0])), np.ones((4, 2))
    y, cache = layer.forward(x)
    assert (cache.layer, cache.shape, cache.kept) == (layer, (4, 2), (x,))
    dx, grads = layer.backward(dy=y, cache=cache)
    np.testing.assert_array_equal(dx, y * layer.gain)
    np.testing.assert_array_equal(grads["gain"], [8, 12])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(None), "gain must be an array, got NoneType"),
        (lambda: Scale(np.ones((2, 2))), "gain has shape (2, 2), expected (in,) with no empty axis"),
        (lambda: Scale(np.ones(2), linear(3, 2)), "inside is 3 -> 2 wide, expected in -> in with in = 2 as in gain"),
        (lambda: Scale(np.ones(2), linear(2, 3)), "inside is 2 -> 3 wide, expected in -> in with in = 2 as in gain"),
        (lambda: Scale(np.ones(2, "f"), linear(2, 2)),
         "inside has dtype float64, expected float32 as in gain: "
         "convert it with minilora.layer.rebuild(inside, array=lambda a: a.astype('float32'))"),
        (lambda: Scale(np.ones(2), ReLU()), "inside must be a Layer with in_features and out_features, got ReLU"),
        (lambda: Scale(np.ones(2), Linear),
         "inside must be a Layer with in_features and out_features, got the class Linear, and no object of it"),
        (lambda: Scale(np.ones(2))(np.ones((4, 1))),
         "x has 1 entries on its last axis (shape (4, 1)), expected in_features = 2"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit_are_refused_by_name(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}$"):
        make()


def test_the_layer_that_the_page_writes_is_right():
    code = layer_page.__doc__.partition("x_nj g_j:\n")[2].partition("\nANNOTATIONS")[0]
    names = {**vars(layer_page), "dataclass": dataclass, "Annotated": Annotated, "__name__": __name__}
    exec(dedent(code), names)
    claim = layer_claim(
        names["Scale"](RNG.standard_normal(3)), RNG.standard_normal((4, 3)), RNG.standard_normal((4, 3))
    )
    assert [block.name for block in gradcheck(*claim[:3], cotangent=claim[3]).blocks] == ["x", "gain"]


class Louder(Scale):
    """A subclass that asks its parent for both passes, and keeps more than it."""

    def forward(self, x):
        y, kept = super().forward(x)
        return 2 * y, (*kept, "more")

    def backward(self, dy, cache, *, need_dx=True):
        *kept, more = cache
        assert more == "more"
        return super().backward(2 * dy, tuple(kept), need_dx=need_dx)


class Prouder(Louder):
    """A subclass that changes the backward only."""

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {"gain": -grads["gain"]}


@pytest.mark.parametrize("cls", [Louder, Prouder])
def test_a_subclass_and_its_parent_share_one_guard(cls):
    layer, x = cls(np.array([2.0, 3.0])), np.ones((4, 2))
    y, cache = layer.forward(x)
    assert cache.kept == (x, "more")
    dx, grads = layer.backward(y, cache)
    np.testing.assert_array_equal(dx, 2 * y * layer.gain)
    np.testing.assert_array_equal(grads["gain"], [32, 48] if cls is Louder else [-32, -48])
    with pytest.raises(ValueError, match="dy has shape"):
        layer.backward(y[:2], cache)
    with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
        layer.backward(y, cache.kept)


@pytest.mark.parametrize("cls", [Linear, LoRA, Scale])
def test_the_guards_show_the_protocol(cls):
    assert list(inspect.signature(cls.forward).parameters) == ["self", "x"]
    assert list(inspect.signature(cls.backward).parameters) == ["self", "dy", "cache", "need_dx"]
    assert cls.forward.__qualname__ == f"{cls.__name__}.forward"
    assert cls.forward.__doc__.startswith("Return y")
    assert "return" in inspect.getsource(cls.backward)


@pytest.mark.parametrize("again", [copy, deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_layer_is_a_layer_of_its_own(again):
    layer, x = linear(3, 4), np.ones((2, 3))
    other = again(layer)
    y, cache = layer.forward(x)
    np.testing.assert_array_equal(other(x), y)
    with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
        other.backward(y, cache)


# --- what is a model ---


def test_a_list_of_layers_is_shown_with_its_shapes():
    assert repr(Blocks(Linear(np.ones((3, 3))), ReLU())) == (
        "Blocks(shift=(3,), layers=[Linear(weight=(3, 3), bias=None), ReLU()])"
    )


def test_a_tied_array_counts_once_among_the_parameters():
    first, second = Linear(np.ones((3, 3)), np.ones(3)), Linear(np.ones((2, 3)))
    tied = Sequential(a=first, b=Linear(first.weight), c=second)
    assert parameter_count(tied) == parameter_count(tied, trained=True) == 9 + 3 + 6
    half = Sequential(a=first, b=freeze(second))
    assert (parameter_count(half), parameter_count(half, trained=True)) == (9 + 3 + 6, 9 + 3)


class Free(Layer):
    """It says nothing of what fits, and keeps what it likes."""

    def forward(self, x):
        return x.repeat(2), "whatever it keeps"

    def backward(self, dy, cache, *, need_dx=True):
        return dy[::2] + dy[1::2], {"kept": cache}


def test_a_layer_that_says_nothing_has_both_guards():
    layer, x = Free(), np.arange(3.0)
    y, cache = layer.forward(x)
    dx, grads = layer.backward(y, cache)
    np.testing.assert_array_equal(dx, 2 * x)
    assert grads == {"kept": "whatever it keeps"}
    with pytest.raises(ValueError, match=r"dy has shape \(3,\), expected \(6,\)"):
        layer.backward(x, cache)
    with pytest.raises(ValueError, match="cache does not come from this layer's forward"):
        Free().backward(y, cache)
    with pytest.raises(TypeError, match="dy and cache are exchanged"):
        layer.backward(cache, y)


@pytest.mark.parametrize("returned", [np.ones(2), (np.ones(2),), (1, 2, 3), None])
def test_a_forward_without_a_cache_is_refused(returned):
    class Without(Layer):
        def forward(self, x):
            return returned

    with pytest.raises(TypeError, match=r"forward of Without returned .*, expected a tuple \(y, cache\)"):
        Without()(np.ones(2))


class Sized(Layer):
    """No dataclass, and it says by itself what it takes."""

    weight: Annotated[np.ndarray, "in"]
    power: Annotated[float, "> 0"]
    takes = "... T in"

    def __init__(self, weight, power=1.0):
        self.weight, self.power = weight, power
        self.__post_init__()

    def forward(self, x):
        return x * self.weight**self.power, (x,)


def test_annotations_are_a_layers_guards():
    layer = Sized(np.ones(3), power=2)
    assert layer.shape == (3, 3)
    assert layer(np.ones((2, 3))).shape == (2, 3)
    for x in (np.ones((2, 4)), np.ones(3), np.ones((0, 3))):
        with pytest.raises(ValueError, match="x has"):
            layer(x)
    with pytest.raises(ValueError, match="power must be above 0 and finite, got -1"):
        layer.power = -1
    with pytest.raises(TypeError, match="power must be a number, got '2'"):
        Sized(np.ones(3), power="2")
    assert layer.power == 2
    with pytest.raises(ValueError, match="weight has shape"):
        Sized(np.ones((3, 3)))


def test_the_former_way_to_say_what_fits_is_refused():
    with pytest.raises(TypeError, match="Before has `fits`: annotate instead"):
        type("Before", (Layer,), {"fits": {"x": "... in"}})


def test_a_layer_without_widths_says_so():
    assert not hasattr(ReLU(), "in_features")
    with pytest.raises(AttributeError, match=r"a ReLU has no shape \(out, in\)"):
        ReLU().shape  # noqa: B018
