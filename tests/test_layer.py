"""A model is a layer made of layers: names, freezing, tying, and adapters by path."""

import re
from typing import ClassVar

import numpy as np
import pytest

from minilora import (
    MLP,
    Adam,
    Conv2d,
    Flatten,
    Linear,
    LoRA,
    LoRALinear,
    ReLU,
    Sequential,
    Tanh,
    adapt,
    adapters,
    attach,
    cross_entropy,
    gradcheck,
    merge,
    train,
)
from minilora.checks import check_ids
from minilora.layer import Layer, check_cache, check_sequence, freeze, nest, rebuild, walk
from minilora.verify.selfcheck import layer_claim

from .support.compare import assert_close

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
        return x, (self, x.shape, caches)

    def backward(self, dy, cache, *, need_dx=True):
        (caches,) = check_cache(self, dy, cache)
        grads = {}
        for i, (layer, inner) in reversed(list(enumerate(zip(self.layers, caches, strict=True)))):
            dy, found = layer.backward(dy, inner)
            grads |= nest(f"layers.{i}", found)
        return dy, grads if self.frozen else {"shift": dy.reshape(-1, dy.shape[-1]).sum(0), **grads}


class Lookup(Layer):
    """Token ids in, one row of the table for each: (...) -> (..., dim)."""

    def __init__(self, table):
        self.table = table

    def forward(self, ids):
        check_ids("ids", ids, len(self.table))
        y = self.table[ids]
        return y, (self, y.shape, ids)

    def backward(self, dy, cache, *, need_dx=True):
        (ids,) = check_cache(self, dy, cache)
        grad = np.zeros_like(self.table)
        np.add.at(grad, ids, dy)
        return None, {} if self.frozen else {"table": grad}


class Mean(Layer):
    """Another shape out than in: (N, T, dim) -> (N, dim)."""

    def forward(self, x):
        y = x.mean(axis=1)
        return y, (self, y.shape, x.shape)

    def backward(self, dy, cache, *, need_dx=True):
        (shape,) = check_cache(self, dy, cache)
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


def test_a_list_of_layers_has_the_measured_gradients():
    model = Blocks(linear(3, 3), mlp(3, 5, 3), adapt(linear(3, 2), [""], rank=2, alpha=1, rng=RNG))
    model.layers[2].adapter.lora_B += RNG.standard_normal((2, 2))
    f, params, grads, dy = layer_claim(model, RNG.standard_normal((2, 6, 3)), RNG.standard_normal((2, 6, 2)))
    assert {"x", "shift", "layers.0.bias", "layers.1.fc1.weight", "layers.2.lora_A"} < params.keys()
    assert gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12).passed


@pytest.mark.parametrize("name", ["forward", "trainable", "children", "frozen"])
def test_a_layers_name_may_not_hide_an_attribute(name):
    with pytest.raises(ValueError, match=f"a layer cannot be named '{name}'"):
        Sequential(**{name: ReLU()})


def test_a_model_is_made_of_layers():
    with pytest.raises(TypeError, match="fc must be a Layer, got ndarray"):
        Sequential(fc=np.ones((2, 2)))
    with pytest.raises(
        ValueError, match=r"^Sequential\(\) has no layers: give at least one, by name, such as fc=Linear\("
    ):
        Sequential()


@pytest.mark.parametrize(
    ("sizes", "dtype", "said"),
    [((0, 3, 2), "f4", "in_features"), ((4, 0, 2), "f4", "hidden_features"), ((4, 3, 0), "f4", "out_features"),
     ((4, 3, 2), "i4", "dtype")],
)  # fmt: skip
def test_a_model_that_cannot_be_drawn_leaves_the_generator(sizes, dtype, said):
    rng = np.random.default_rng(3)
    with pytest.raises((ValueError, TypeError), match=said):
        MLP.init(*sizes, rng=rng, dtype=dtype)
    assert rng.bit_generator.state == np.random.default_rng(3).bit_generator.state


@pytest.mark.parametrize("shape", [(4,), (2, 0, 4), (0, 4)])
def test_a_sequence_has_at_least_one_position(shape):
    layer = Linear(np.ones((3, 4)))
    with pytest.raises(ValueError) as error:
        check_sequence(layer, np.ones(shape))
    assert str(error.value) == f"x has shape {shape}, expected (..., T, 4) with at least one position"
    for fits in ((1, 4), (2, 3, 4), (0, 1, 4)):
        check_sequence(layer, np.ones(fits))


def test_an_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="activation must be 'relu', 'tanh' or 'silu', got 'gelu'"):
        MLP.init(2, 3, 4, activation="gelu", rng=RNG)


@pytest.mark.parametrize(("activation", "cls"), [("relu", ReLU), ("tanh", Tanh)])
def test_an_mlp_starts_as_its_layers_do(activation, cls):
    model = MLP.init(2, 30, 4, activation=activation, rng=np.random.default_rng(1), dtype="float64")
    assert type(model.act) is cls
    rng = np.random.default_rng(1)
    for layer, widths in ((model.fc1, (2, 30)), (model.fc2, (30, 4))):
        same = Linear.init(*widths, rng=rng, dtype="float64")
        np.testing.assert_array_equal(layer.weight, same.weight)
        np.testing.assert_array_equal(layer.bias, same.bias)


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


# --- ids in, any shape out, tied arrays -----------------------------------------------------------


def tied_model():
    """An embedding and a head that are one array: logits = mean of rows, against every row."""
    table = RNG.standard_normal((6, 3))
    return Sequential(embed=Lookup(table), mean=Mean(), act=Tanh(), head=Linear(table))


def test_token_ids_have_no_dx_and_their_model_has_gradients():
    model, ids = tied_model(), RNG.integers(0, 6, (5, 4))
    y, cache = model.forward(ids)
    assert y.shape == (5, 6)
    dx, grads = model.backward(RNG.standard_normal(y.shape), cache)
    assert dx is None
    assert list(grads) == list(model.trainable()) == ["embed.table", "head.weight"]


def test_a_tied_array_is_checked_as_one_parameter():
    model, ids = tied_model(), RNG.integers(0, 6, (5, 4))
    f, params, grads, dy = layer_claim(model, ids, RNG.standard_normal((5, 6)))
    report = gradcheck(f, params, grads, cotangent=dy, method="complex", tolerance=1e-12)
    assert [block.name for block in report.blocks] == ["embed.table"]


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


def test_two_arrays_on_one_memory_are_refused_by_adam():
    x = np.ones(4)
    with pytest.raises(ValueError, match=r"params\['a'\] and params\['b'\] share memory and are two arrays"):
        Adam({"a": x, "b": x[1:]})


def test_what_was_tied_stays_tied():
    model = rebuild(tied_model(), array=lambda a: a.astype("float32"))
    assert model.embed.table is model.head.weight
    assert model.embed.table.dtype == np.float32


def test_a_model_of_ids_trains_by_cross_entropy():
    rng = np.random.default_rng(3)
    model = Sequential(embed=Lookup(rng.standard_normal((6, 3))), mean=Mean(), fc=linear(3, 6))
    X, Y = rng.integers(0, 6, (40, 2)), np.full(40, -100)
    Y[:30] = X[:30, 0]
    history = train(model, X, Y, epochs=60, batch_size=20, lr=0.05, rng=rng, log_every=60, loss=cross_entropy)
    start = np.log(6)
    assert history.losses[-1] < start / 2
    assert model.trainable().keys() == {"embed.table", "fc.weight", "fc.bias"}


@pytest.mark.parametrize("bad", [-1, 6])
def test_ids_out_of_range_are_refused_before_a_step(bad):
    model = tied_model()
    before = model.embed.table.copy()
    X = np.zeros((9, 4), int)
    with pytest.raises(ValueError, match=rf"targets holds {bad} at \(0,\), expected 0 to 5"):
        train(model, X, np.full(9, bad), epochs=1, batch_size=3, rng=RNG, loss=cross_entropy)
    np.testing.assert_array_equal(model.embed.table, before)


# --- adapters by path -----------------------------------------------------------------------------


class Decoder(Layer):
    """Modules with the paths of a transformer's; nothing is computed."""

    def __init__(self):
        def block():
            return Sequential(q_proj=linear(3, 3), v_proj=linear(3, 3), act=ReLU(), up_v_proj=linear(3, 3))

        self.layers = [block(), block()]
        self.lm_head = linear(3, 6)


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["v_proj"], ["layers.0.v_proj", "layers.1.v_proj"]),
        (("layers.1.q_proj", "v_proj"), ["layers.0.v_proj", "layers.1.q_proj", "layers.1.v_proj"]),
        (["1.q_proj"], ["layers.1.q_proj"]),
        (r".*\.0\.[qv]_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
        ("lm_head", ["lm_head"]),
        ("all-linear", [f"layers.{i}.{name}" for i in (0, 1) for name in ("q_proj", "v_proj", "up_v_proj")]),
    ],
)
def test_target_modules_are_read_as_peft_reads_them(target_modules, expected):
    model = adapt(Decoder(), target_modules, rank=2, alpha=4, rng=RNG)
    assert list(adapters(model)) == expected
    assert list(model.trainable()) == [f"{path}.{name}" for path in expected for name in ("lora_A", "lora_B")]


@pytest.mark.parametrize("target_modules", ["q_proj,v_proj", ["proj"], ["act"], [], "v_proj"])
def test_target_modules_that_name_nothing_are_refused(target_modules):
    names = re.escape(repr(target_modules))
    with pytest.raises(
        ValueError, match=rf"target_modules={names} names no layer without an adapter; there are \['layers.0.q_proj'"
    ):
        adapt(Decoder(), target_modules, rank=2, alpha=4, rng=RNG)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"target_modules": "fc(1"}, ValueError, "target_modules='fc(1' is not a regular expression: missing )"),
        ({"target_modules": 1}, TypeError, "target_modules must be a list of names or a regular expression, got 1"),
        ({"target_modules": [1]}, TypeError, "target_modules must be a list of names or a regular expression, got [1]"),
        ({"use_rslora": "no"}, TypeError, "use_rslora must be True or False, got 'no'"),
        ({"use_dora": 0}, TypeError, "use_dora must be True or False, got 0"),
        ({"dora_norm": "none"}, ValueError, "dora_norm must be 'constant' or 'full', got 'none'"),
        ({"init": "zero"}, ValueError, "init must be 'lora' or 'pissa', got 'zero'"),
    ],
)
def test_bad_settings_of_adapt_are_refused(change, error, message):
    rng = np.random.default_rng(0)
    with pytest.raises(error, match=re.escape(message)):
        adapt(mlp(), **{"target_modules": ["fc1"], "rank": 2, "alpha": 4, "rng": rng, **change})
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


def test_a_refusal_lists_some_layers_of_a_large_model():
    model = Sequential(**{f"fc{i}": Linear(np.eye(3)) for i in range(12)})
    with pytest.raises(ValueError, match=r"\['fc0', .*'fc7'\] and 4 more; a string must match a whole path$"):
        adapt(model, "fc", rank=2, alpha=4, rng=RNG)


def test_an_adapter_that_does_not_fit_is_named():
    one = adapters(adapt(mlp(), ["fc2"], rank=2, alpha=4, rng=RNG))
    message = r"^adapters\['fc2'\]: adapter has in_features = \d+, expected 9 as in base$"
    with pytest.raises(ValueError, match=message):
        attach(Sequential(fc2=Linear(np.ones((2, 9)))), one)


def test_adapting_changes_neither_model_nor_output():
    model, x = mlp(), RNG.standard_normal((6, 3))
    before = {name: p.copy() for name, p in model.trainable().items()}
    adapted = adapt(model, ["fc1", "fc2"], rank=2, alpha=4, rng=RNG)
    assert type(adapted) is MLP
    np.testing.assert_array_equal(adapted(x), model(x))
    assert model.trainable().keys() == before.keys()
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])
    assert adapted.fc1.base.weight is model.fc1.weight


def test_every_adapter_has_a_start_of_its_own():
    model = adapt(Decoder(), ["q_proj"], rank=2, alpha=4, rng=np.random.default_rng(0))
    one, two = adapters(model).values()
    assert not np.array_equal(one.lora_A, two.lora_A)
    rng = np.random.default_rng(0)
    for found in (one, two):
        expected = LoRA.init(3, 3, rank=2, alpha=4, rng=rng, dtype="float64")
        np.testing.assert_array_equal(found.lora_A, expected.lora_A)


def test_a_layer_with_an_adapter_gets_no_second_one():
    model = adapt(mlp(), ["fc1"], rank=2, alpha=4, rng=RNG)
    with pytest.raises(ValueError, match=r"names no layer without an adapter; there are \['fc2'\]"):
        adapt(model, ["fc1"], rank=2, alpha=4, rng=RNG)
    both = adapt(model, ["fc2"], rank=2, alpha=4, rng=RNG)
    assert list(adapters(both)) == ["fc1", "fc2"]
    assert list(both.trainable()) == ["fc2.lora_A", "fc2.lora_B"]


def test_a_path_that_begins_as_an_adapted_one_is_free():
    model = adapt(Sequential(fc1=linear(3, 3), fc10=linear(3, 3)), ["fc1"], rank=2, alpha=4, rng=RNG)
    assert list(adapters(adapt(model, ["fc10"], rank=2, alpha=4, rng=RNG))) == ["fc1", "fc10"]
    assert list(adapters(attach(model, {"fc10": LoRA(np.ones((1, 3)), np.ones((3, 1)), 1)}))) == ["fc1", "fc10"]


def trained(model):
    for path, adapter in adapters(model).items():
        adapter.lora_B += np.random.default_rng(len(path)).standard_normal(adapter.lora_B.shape)
    return model


def test_attached_adapters_give_the_same_output():
    model, x = mlp(), RNG.standard_normal((6, 3))
    adapted = trained(adapt(model, "all-linear", rank=2, alpha=4, rng=RNG))
    again = attach(model, adapters(adapted))
    np.testing.assert_array_equal(again(x), adapted(x))
    assert again.fc1.adapter is adapted.fc1.adapter
    assert not np.array_equal(again(x), model(x))


def test_attach_refuses_paths_that_are_no_linear_layer():
    adapter = LoRA(np.ones((2, 3)), np.ones((5, 2)), 1)
    for path in ("fc3", "act", "", "fc1.weight"):
        with pytest.raises(
            ValueError, match=re.escape(f"adapters names ['{path}'], which are no layers without an adapter")
        ):
            attach(mlp(), {path: adapter})
    with pytest.raises(ValueError, match="adapter has in_features = 3, expected 5 as in base"):
        attach(mlp(), {"fc2": adapter})


def test_merging_gives_a_plain_model_with_the_same_output():
    adapted = trained(adapt(mlp(), ["fc1", "fc2"], rank=2, alpha=4, rng=RNG))
    x = RNG.standard_normal((6, 3))
    before = adapted(x)
    merged = merge(adapted)
    assert_close(merged(x), before, 1e-13)
    assert not adapters(merged)
    assert [type(layer) for _, layer in walk(merged)] == [MLP, Linear, Tanh, Linear]
    assert list(merged.trainable()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    for p in merged.trainable().values():
        p += 1
    np.testing.assert_array_equal(adapted(x), before)


def test_a_single_layer_is_a_model_too():
    layer, x = linear(3, 4), RNG.standard_normal((6, 3))
    adapted = trained(adapt(layer, "all-linear", rank=2, alpha=4, rng=RNG))
    assert type(adapted) is LoRALinear
    assert list(adapters(adapted)) == [""]
    assert_close(merge(adapted)(x), adapted(x), 1e-13)


@pytest.mark.parametrize(
    "call", [adapters, merge, lambda m: attach(m, {}), lambda m: adapt(m, [], rank=1, alpha=1, rng=RNG)]
)
def test_what_is_no_model_is_refused(call):
    with pytest.raises(TypeError, match="model must be a Layer, got dict"):
        call({})


def test_a_list_of_layers_is_shown_with_its_shapes():
    assert repr(Blocks(Linear(np.ones((3, 3))), ReLU())) == (
        "Blocks(shift=(3,), layers=[Linear(weight=(3, 3), bias=None), ReLU()])"
    )


def test_merging_frees_and_copies_layers_without_an_adapter_too():
    model = mlp()
    merged = merge(trained(adapt(model, ["fc1"], rank=2, alpha=4, rng=RNG)))
    assert list(merged.trainable()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert "frozen" not in repr(merged)
    for name, p in merged.trainable().items():
        assert not np.shares_memory(p, model.trainable()[name])


def test_an_mlp_is_single_precision_with_relu_unless_told(standin):
    model = MLP.init(2, 3, 4, rng=np.random.default_rng(0))
    assert type(model.act) is ReLU
    assert {p.dtype.name for p in model.trainable().values()} == {"float32"}
    there = MLP.init(2, 3, 4, rng=np.random.default_rng(0), dtype="float64", backend=standin)
    for p in there.trainable().values():
        assert isinstance(p, standin.xp.ndarray)
        assert str(p.dtype) == "float64"


def test_a_plain_adapter_learns_where_it_stands():
    model = Sequential(conv=Conv2d(RNG.standard_normal((4, 2, 2, 3))), flat=Flatten(), fc=linear(16, 3))
    plain = {"conv": LoRA(np.ones((2, 12)), np.ones((4, 2)), 1), "fc": LoRA(np.ones((2, 16)), np.ones((3, 2)), 3)}
    found = adapters(attach(model, plain))
    assert {path: (a.kind, a.kernel, a.alpha) for path, a in found.items()} == {
        "conv": ("conv2d", (2, 3), 1.0),
        "fc": ("linear", (), 3.0),
    }
    for path, adapter in found.items():
        assert adapter.lora_A is plain[path].lora_A
        assert adapter.lora_B is plain[path].lora_B


def test_attach_takes_a_dict_of_adapters_that_fit():
    with pytest.raises(TypeError, match="adapters must be a dict of adapters by module path, got list"):
        attach(mlp(), [LoRA(np.ones((2, 3)), np.ones((5, 2)), 1)])
    model = Sequential(conv=Conv2d(RNG.standard_normal((4, 2, 2, 3))))
    adapter = next(iter(adapters(adapt(linear(12, 4), [""], rank=2, alpha=1, rng=RNG)).values()))
    with pytest.raises(ValueError, match=r"adapters\['conv'\] is not of kind 'conv2d', as Conv2d\("):
        attach(model, {"conv": adapter})
