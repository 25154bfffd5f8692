"""Adapters in a model, by path: which layers get one, what is refused, and that merging changes no output."""

import re
import warnings

import numpy as np
import pytest

from minilora import (
    MLP,
    Adapter,
    Conv2d,
    Embedding,
    Flatten,
    Linear,
    LoRA,
    LoRALinear,
    ReLU,
    Sequential,
    StackedLinear,
    Tanh,
    adapt,
    adapters,
    attach,
    merge,
    train,
)
from minilora.adaptation import ends_of, put_beside
from minilora.layer import Layer, freeze, rebuild, walk
from minilora.variants.stackedlora import StackedLoRA

from .support.compare import assert_close
from .support.language import arrays_of, tiny_llama, tiny_mixture

RNG = np.random.default_rng(7)


def linear(n_in, n_out):
    return Linear(RNG.standard_normal((n_out, n_in)), RNG.standard_normal(n_out))


def mlp(n_in=3, hidden=5, n_out=4):
    return MLP(fc1=linear(n_in, hidden), act=Tanh(), fc2=linear(hidden, n_out))


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
        ValueError,
        match=rf"target_modules={names} names no layer without an adapter; there are \['(layers.0.)?q_proj', ",
    ):
        adapt(Decoder(), target_modules, rank=2, alpha=4, rng=RNG)


def test_a_refusal_lists_some_layers_of_a_large_model():
    model = Sequential(**{f"fc{i}": Linear(np.eye(3)) for i in range(12)})
    with pytest.raises(ValueError, match=r"\['fc0', .*'fc7'\] and 4 more; a string must match a whole path$"):
        adapt(model, "fc", rank=2, alpha=4, rng=RNG)
    with pytest.raises(ValueError, match=r"there are \['q_proj', 'v_proj', 'up_v_proj', 'lm_head'\]$"):  # each once
        adapt(Decoder(), ["query"], rank=2, alpha=4, rng=RNG)


def test_an_adapter_that_does_not_fit_is_named():
    one = adapters(adapt(mlp(), ["fc2"], rank=2, alpha=4, rng=RNG))
    message = r"^adapters\['fc2'\]: adapter is \d+ -> \d+ wide, expected in -> out with \w+ = \d+ as in base$"
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


@pytest.mark.parametrize("second", [adapt, attach, put_beside])
def test_adapters_that_are_there_train_beside_new_ones(second):
    """As their own model trained them; a frozen adapter stays frozen, and bases and other layers too."""
    first = adapt(Sequential(a=mlp(), b=linear(4, 4), c=mlp(4)), ["fc1"], rank=2, alpha=4, rng=RNG, use_dora=True)
    adapters(first)["c.fc1"].frozen = True
    new = LoRA(RNG.standard_normal((1, 4)), np.zeros((4, 1)), 1)
    ways = {
        adapt: lambda: adapt(first, ["b"], rank=1, alpha=1, rng=RNG),
        attach: lambda: attach(first, {"b": new}),
        put_beside: lambda: put_beside(first, ["b"], lambda path, layer: LoRALinear(layer, new)),
    }
    both = ways[second]()
    assert list(both.trainable()) == ["a.fc1.lora_A", "a.fc1.lora_B", "a.fc1.magnitude", "b.lora_A", "b.lora_B"]
    assert all(both.trainable()[name] is array for name, array in first.trainable().items())
    train(both, RNG.standard_normal((9, 3)), RNG.standard_normal((9, 4)), epochs=2, rng=RNG)
    moved = {path: bool(adapter.lora_B.any()) for path, adapter in adapters(both).items()}
    assert moved == {"a.fc1": True, "b": True, "c.fc1": False}
    only_new = adapt(freeze(first), ["b"], rank=1, alpha=1, rng=RNG)
    assert list(only_new.trainable()) == ["b.lora_A", "b.lora_B"]


def test_a_model_that_cannot_train_gets_no_new_adapter():
    """Of half precision, with the code that converts it; adapters that exist are attached."""
    half = rebuild(mlp(), array=lambda a: a.astype("float16"))
    said = (
        r"model has dtype float16, in which adapters cannot be trained: convert it with minilora\.layer\.rebuild\(model"
    )
    with pytest.raises(TypeError, match=said):
        adapt(half, ["fc1"], rank=2, alpha=4, rng=RNG)
    assert list(adapters(attach(half, {"fc1": LoRA(*(np.ones(s, "f2") for s in ((2, 3), (5, 2))), 1)}))) == ["fc1"]


def test_a_layer_that_merges_without_an_adapter_is_named():
    class Folding(Layer):
        def merge(self):
            return linear(3, 3)

    model = Sequential(fc=linear(3, 3), mine=Folding())
    for path, of in (("mine", model), ("", Folding())):
        with pytest.raises(TypeError, match=f"^the layer '{path}', a Folding, has a method merge.., but no attribute "):
            adapters(of)


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
    of_two = StackedLoRA(np.ones((4, 3)), np.ones((5, 4)), 1, experts=2)
    for path, given in (*((path, adapter) for path in ("fc3", "act", "", "fc1.weight")), ("fc1.weight", of_two)):
        with pytest.raises(
            ValueError, match=re.escape(f"adapters names ['{path}'], which are not layers without an adapter")
        ):
            attach(mlp(), {path: given})
    with pytest.raises(ValueError, match="adapter is 3 -> 5 wide, expected in -> out with in = 5 as in base"):
        attach(mlp(), {"fc2": adapter})


@pytest.mark.parametrize(("use_rslora", "scaling"), [(False, 1.5), (True, 3.0)])
def test_an_adapter_of_a_layers_weight_keeps_its_scaling(use_rslora, scaling):
    of_weight = StackedLoRA(np.ones((4, 3)), np.ones((5, 4)), 6, use_rslora=use_rslora)
    adapted = attach(mlp(), {"fc1.weight": of_weight})
    assert adapted.fc1.scaling == scaling
    np.testing.assert_array_equal(adapted.fc1.delta(), of_weight.delta())


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


def test_an_unknown_norm_is_refused_without_dora_too():
    with pytest.raises(ValueError, match="dora_norm must be 'constant' or 'full', got 'half'"):
        adapt(linear(3, 4), "", rank=1, alpha=1, rng=RNG, dora_norm="half")


def test_an_embeddings_adapter_has_its_precision():
    adapter = adapt(Embedding(np.ones((5, 3), "float32")), "", rank=2, alpha=1, rng=RNG).adapter
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == np.float32


@pytest.mark.parametrize("cls", [Adapter, StackedLoRA])
def test_a_flag_of_a_numpy_type_becomes_a_bool(cls):
    """A file's configuration takes no other."""
    assert cls(np.ones((2, 3)), np.ones((5, 2)), 1, use_rslora=np.True_).use_rslora is True


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_layer_merged_alone_shares_no_bias(use_dora):
    layer = adapt(linear(3, 4), "", rank=2, alpha=4, rng=RNG, use_dora=use_dora)
    np.testing.assert_array_equal(layer.merge().bias, layer.base.bias)
    assert not np.shares_memory(layer.merge().bias, layer.base.bias)


def test_merging_frees_and_copies_layers_without_an_adapter_too():
    model = mlp()
    merged = merge(trained(adapt(model, ["fc1"], rank=2, alpha=4, rng=RNG)))
    assert list(merged.trainable()) == ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]
    assert "frozen" not in repr(merged)
    for name, p in merged.trainable().items():
        assert not np.shares_memory(p, model.trainable()[name])


def test_an_adapter_shows_what_is_not_as_usual():
    usual, other = ({}, {"use_dora": True, "dora_norm": "full", "use_rslora": True})
    shown = [repr(adapt(linear(6, 5), "", rank=2, alpha=3, rng=RNG, **options).adapter) for options in (usual, other)]
    assert shown == [
        "Adapter(lora_A=(2, 6), lora_B=(5, 2), alpha=3.0)",
        "DoRAAdapter(lora_A=(2, 6), lora_B=(5, 2), alpha=3.0, use_rslora=True, magnitude=(5,), dora_norm='full')",
    ]


def test_a_plain_adapter_learns_where_it_stands():
    model = Sequential(conv=Conv2d(RNG.standard_normal((4, 2, 2, 3))), flat=Flatten(), fc=linear(16, 3))
    plain = {"conv": LoRA(np.ones((2, 12)), np.ones((4, 2)), 1), "fc": LoRA(np.ones((2, 16)), np.ones((3, 2)), 3)}
    plain["fc"].frozen = True
    attached, x = attach(model, plain), RNG.standard_normal((2, 2, 3, 4))
    assert_close(merge(attached)(x), attached(x), 1e-12)
    found = adapters(attached)
    assert {path: (a.kind, a.kernel, a.alpha, a.frozen) for path, a in found.items()} == {
        "conv": ("conv2d", (2, 3), 1.0, False),
        "fc": ("linear", (), 3.0, True),
    }
    for path, adapter in found.items():
        assert adapter.lora_A is plain[path].lora_A
        assert adapter.lora_B is plain[path].lora_B


def test_attach_takes_a_dict_of_adapters_that_fit():
    with pytest.raises(TypeError, match=r"adapters must be a dict of adapters by module path, .*; got list$"):
        attach(mlp(), [LoRA(np.ones((2, 3)), np.ones((5, 2)), 1)])
    model = Sequential(conv=Conv2d(RNG.standard_normal((4, 2, 2, 3))))
    adapter = next(iter(adapters(adapt(linear(12, 4), [""], rank=2, alpha=1, rng=RNG)).values()))
    with pytest.raises(ValueError, match=r"adapters\['conv'\]: adapter is of kind 'linear', expected 'conv2d' for "):
        attach(model, {"conv": adapter})


def test_an_adapter_of_a_layer_is_none_of_an_array():
    weights = StackedLinear(RNG.standard_normal((2, 4, 12)))
    with pytest.raises(ValueError, match=r"adapters\[''\]: adapter is of kind 'linear', expected 'parameter' for "):
        attach(weights, {"": Adapter(np.ones((2, 12)), np.ones((4, 2)), 1)})


def test_a_mixtures_arrays_among_the_modules_are_told_their_place():
    model = Sequential(down_proj=StackedLinear(RNG.standard_normal((2, 4, 12))))
    for names in (["down_proj"], "all-linear"):
        said = r"there are \[\]\. Arrays of a mixture, such as 'down_proj', are named in target_parameters$"
        with pytest.raises(ValueError, match=said):
            adapt(model, names, rank=2, alpha=1, rng=RNG)


def test_one_name_that_matches_nothing_is_an_error(tmp_path):
    """PEFT passes over it, and trains something else than was asked for."""
    model = tiny_llama()
    before = {path: array.copy() for path, array in arrays_of(model).items()}
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"^'xx' in target_modules names no layer without an adapter; there are "):
        adapt(model, ["q_proj", "xx"], rank=2, alpha=4, rng=rng)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    for path, array in arrays_of(model).items():
        np.testing.assert_array_equal(array, before[path])


@pytest.mark.parametrize(
    ("targets", "ends"),
    [
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["model.layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (r".*\.1\.mlp\.up_proj|.*k_proj", ["k_proj", "model.layers.1.mlp.up_proj"]),
        ("all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_ends_of_paths_name_the_adapted_layers_and_no_other(targets, ends):
    adapted = adapt(tiny_llama(), targets, rank=2, alpha=4, rng=np.random.default_rng(0))
    assert ends_of(adapted) == ends
    again = adapt(tiny_llama(), ends_of(adapted), rank=2, alpha=4, rng=np.random.default_rng(0))
    assert adapters(again).keys() == adapters(adapted).keys()


def test_an_end_of_a_path_begins_at_a_dot():
    model = Sequential(block=Sequential(fc=linear(3, 3), mfc=linear(3, 3)))
    adapted = adapt(model, ["fc"], rank=2, alpha=4, rng=RNG)
    assert (list(adapters(adapted)), ends_of(adapted)) == (["block.fc"], ["fc"])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_in_a_mixture_whole_paths_are_named(kind):
    names = ["mlp.experts.gate_up_proj"]
    some = {"rank": 2, "alpha": 4, "rng": np.random.default_rng(0), "target_parameters": names}
    adapted = adapt(tiny_mixture(kind), ["q_proj"], **some)
    assert ends_of(adapted) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert ends_of(adapt(tiny_mixture(kind), [], **some)) == []


@pytest.mark.filterwarnings("default:rank .* is above the smaller width")
def test_a_rank_that_gains_nothing_is_told_once_and_taken():
    model = Sequential(a=linear(5, 3), b=Tanh(), c=linear(3, 4))
    less = "an update has at most rank 3 there, so rank=3 says as much with fewer numbers$"
    said = f"^rank 4 is above the smaller width of 2 of the adapted layers, such as 'a': {less}"
    with pytest.warns(UserWarning, match=said) as notes:
        adapted = adapt(model, ["a", "c"], rank=4, alpha=4, rng=RNG)
    assert len(notes) == 1
    assert {adapter.rank for adapter in adapters(adapted).values()} == {4}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt(model, ["a", "c"], rank=3, alpha=4, rng=RNG)
        attach(model, adapters(adapted))  # as from a file
    with pytest.warns(UserWarning, match=f"^rank 4 is above the smaller width 3 of the layer: {less}"):
        LoRALinear.from_linear(linear(5, 3), rank=4, alpha=4, rng=RNG)
