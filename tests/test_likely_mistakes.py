"""The mistakes that are made most: a class for an object, a model for its adapters, a size beyond all memory.

Each is one error that says what was given and what to give, and it comes before anything has changed.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from minilora import (
    MLP,
    Adam,
    Adapter,
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    Linear,
    Llama,
    LlamaConfig,
    LoRA,
    LoRALinear,
    ReLU,
    Rotary,
    Sequential,
    SiLU,
    Tanh,
    adapt,
    adapters,
    attach,
    best_adapter,
    best_of_rank,
    evaluate,
    load_adapter,
    merge,
    merge_adapter,
    mse,
    save_adapter,
    train,
    weighted_sum,
)
from minilora.fast import residual_form
from minilora.files.inspection import inspect_adapter
from minilora.language.files.tokens import load_tokenizer
from minilora.layer import freeze
from minilora.layers.convolution import Conv2d

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 3))
W, A, B = np.ones((3, 4)), np.ones((2, 4)), np.ones((3, 2))


def linear(in_features=4, out_features=3):
    return Linear(RNG.standard_normal((out_features, in_features)))


def lora():
    return LoRA(A, B, 1)


def model():
    return adapt(Sequential(fc=linear()), ["fc"], rank=1, alpha=1, rng=RNG)


L, BOTH, TANH = linear(), LoRALinear(linear(), lora()), Tanh()


def config(**change):
    sizes = {"vocab_size": 7, "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "head_dim": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaConfig(**{**sizes, **heads, "rms_norm_eps": 1e-5, "frequencies": (1.0,), **change})


def spoilt(array):
    array = array.copy()
    array[3, 2] = np.nan
    return array


class Beside(LoRALinear):
    """A layer of one's own, which may compute something else than its parent."""


class Wide(Linear):
    """And one of a linear layer."""


class Half(Layer):
    """A layer of one's own that is not done."""

    def forward(self, x):
        return x


MISTAKES = [
    # a class for an object, a model for its adapters
    (lambda rng: train(LoRALinear, X, Y, rng=rng),
     "TypeError: model must be a Layer, got the class LoRALinear, and no object of it"),
    (lambda rng: adapt(MLP, "", rank=1, alpha=1, rng=rng),
     "TypeError: model must be a Layer, got the class MLP, and no object of it"),
    (lambda rng: LoRALinear(Linear, lora()),
     "TypeError: base must be a Linear, got the class Linear, and no object of it"),
    (lambda rng: linear()(np.ndarray), "TypeError: x must be an array, got the class ndarray, and no object of it"),
    (lambda rng: Sequential(act=ReLU), "TypeError: act must be a Layer, got the class ReLU, and no object of it"),
    (lambda rng: GatedMLP(linear(), linear(), linear(3, 4), SiLU),
     "TypeError: act_fn must be a Layer, got the class SiLU, and no object of it"),
    (lambda rng: train({"fc": lora()}, X, Y, rng=rng),
     "TypeError: model must be a Layer, got dict; minilora.attach(model, adapters) puts adapters into a model"),
    (lambda rng: merge(model(), requantize=1), "TypeError: requantize must be True or False, got 1"),
    (lambda rng: merge({"fc": lora()}),
     "TypeError: model must be a Layer, got dict; minilora.attach(model, adapters) puts adapters into a model"),
    (lambda rng: attach({"fc": lora()}, linear()),
     "TypeError: model must be a Layer, got dict; minilora.attach(model, adapters) puts adapters into a model"),
    (lambda rng: attach(linear(), model()),
     "TypeError: adapters must be a dict of adapters by module path, such as {'q_proj': adapter}, or what "
     "minilora.adapters(model) returns; got Sequential"),
    (lambda rng: attach(linear(), lora()),
     "TypeError: adapters must be a dict of adapters by module path, such as {'q_proj': adapter}, or what "
     "minilora.adapters(model) returns; got LoRA"),
    (lambda rng: attach(Sequential(fc=linear()), {"fc": linear()}),
     "TypeError: adapters['fc'] must be a LoRA, got Linear"),
    (lambda rng: save_adapter("folder", model()),
     "TypeError: layers must be a dict of adapters by module path, such as {'q_proj': adapter}, or what "
     "minilora.adapters(model) returns; got Sequential"),
    (lambda rng: weighted_sum(model(), [1]), "TypeError: adapters must be a list, got Sequential"),
    (lambda rng: best_of_rank(linear(), 1), "TypeError: adapters[0] must be a LoRA, got Linear"),
    (lambda rng: LoRALinear(W, lora()), "TypeError: base must be a Linear, got ndarray"),
    (lambda rng: LoRALinear(L, L), "TypeError: adapter must be a LoRA, got Linear"),
    (lambda rng: LoRALinear.from_linear(W, rank=1, alpha=1, rng=rng),
     "TypeError: linear must be a Linear, got ndarray"),
    (lambda rng: Adapter(A, B, 1, start=0), "TypeError: start must be a LoRA, got int"),
    (lambda rng: Attention(linear(), linear(), linear(), 3, Rotary((1.0, 0.1))),
     "TypeError: o_proj must be a Layer with in_features and out_features, got int"),
    (lambda rng: GatedMLP(linear(), ReLU(), linear(3, 4)),
     "TypeError: up_proj must be a Layer with in_features and out_features, got ReLU"),
    (lambda rng: Sequential(linear(), Tanh()),
     "TypeError: Sequential takes its layers by name, as in Sequential(fc1=Linear(...), act=ReLU())"),
    (lambda rng: Sequential(fc=W), "TypeError: fc must be a Layer, got ndarray"),
    (lambda rng: Sequential(),
     "ValueError: Sequential() has no layers: give at least one, by name, such as fc=Linear(...)"),
    (lambda rng: Sequential(forward=ReLU()),
     "ValueError: a layer cannot be named 'forward': every layer has an attribute of that name"),
    (lambda rng: Sequential(trainable=ReLU()),
     "ValueError: a layer cannot be named 'trainable': every layer has an attribute of that name"),
    (lambda rng: Sequential(children=ReLU()),
     "ValueError: a layer cannot be named 'children': every layer has an attribute of that name"),
    (lambda rng: Sequential(frozen=ReLU()),
     "ValueError: a layer cannot be named 'frozen': every layer has an attribute of that name"),
    (lambda rng: adapters({}),
     "TypeError: model must be a Layer, got dict; minilora.attach(model, adapters) puts adapters into a model"),
    (lambda rng: adapt({}, [], rank=1, alpha=1, rng=rng),
     "TypeError: model must be a Layer, got dict; minilora.attach(model, adapters) puts adapters into a model"),
    (lambda rng: attach(Sequential(conv=Conv2d(np.ones((4, 2, 2, 3)))), {"conv": lora()}),
     "ValueError: adapters['conv']: adapter is 4 -> 3 wide, expected in -> out with in = 12 as in base"),
    (lambda rng: residual_form(L, X, Y),
     "TypeError: residual_form takes a LoRA, or a LoRALinear over a Linear, got Linear"),
    (lambda rng: residual_form(Beside(L, lora()), X, Y),
     "TypeError: residual_form takes a LoRA, or a LoRALinear over a Linear, got Beside"),
    (lambda rng: residual_form(LoRALinear(Wide(W), lora()), X, Y),
     "TypeError: residual_form takes a LoRA, or a LoRALinear over a Linear, got LoRALinear over a Wide"),
    # what a call returns, handed on whole or in another order
    (lambda rng: L.backward(mse(Y, Y), L.forward(X)[1]),
     "TypeError: dy must be an array, got tuple: take the one that is meant, of (loss, gradient), (y, cache) or (dx, "
     "gradients)"),
    (lambda rng: L(L.forward(X)),
     "TypeError: x must be an array, got tuple: take the one that is meant, of (loss, gradient), (y, cache) or (dx, "
     "gradients)"),
    (lambda rng: mse(L.forward(X), Y),
     "TypeError: prediction must be an array, got tuple: take the one that is meant, of (loss, gradient), (y, cache) "
     "or (dx, gradients)"),
    (lambda rng: L.backward(L.backward(Y, L.forward(X)[1]), L.forward(X)[1]),
     "TypeError: dy must be an array, got tuple: take the one that is meant, of (loss, gradient), (y, cache) or (dx, "
     "gradients)"),
    (lambda rng: L.backward(L.forward(X)[1], Y), "TypeError: dy and cache are exchanged: call backward(dy, cache)"),
    (lambda rng: TANH.backward(TANH.forward(X)[1], X),
     "TypeError: dy and cache are exchanged: call backward(dy, cache)"),
    (lambda rng: BOTH.backward(BOTH.forward(X)[1], Y),
     "TypeError: dy and cache are exchanged: call backward(dy, cache)"),
    (lambda rng: linear()([1.0, 2.0, 3.0, 4.0]),
     "TypeError: x must be an array, got list; convert it with numpy.asarray(x)"),
    # an array of another kind, shape or precision
    (lambda rng: Linear(np.ones(4)), "ValueError: weight has shape (4,), expected (out, in) with no empty axis"),
    (lambda rng: Linear(np.ones((0, 4))), "ValueError: weight has shape (0, 4), expected (out, in) with no empty axis"),
    (lambda rng: Linear(W.astype(int)),
     "TypeError: weight has dtype int64, expected a floating-point dtype such as float32"),
    (lambda rng: Linear([[1.0]]),
     "TypeError: weight must be an array, got list; convert it with numpy.asarray(weight)"),
    (lambda rng: Linear(None), "TypeError: weight must be an array, got NoneType"),
    (lambda rng: Linear(W, np.ones(4)), "ValueError: bias has shape (4,), expected (out,) with out = 3 as in weight"),
    (lambda rng: Linear(W, np.ones(1)), "ValueError: bias has shape (1,), expected (out,) with out = 3 as in weight"),
    (lambda rng: Linear(W, np.ones(3, "f4")),
     "TypeError: bias has dtype float32, expected float64 as in weight: convert it with bias.astype('float64')"),
    (lambda rng: Linear(W * 1j),
     "TypeError: weight holds complex numbers, and layers compute with real ones: take weight.real, or its real and "
     "imaginary parts side by side"),
    (lambda rng: L(X.astype(">f8")), "TypeError: x has dtype >f8, expected a floating-point dtype such as float32"),
    (lambda rng: LoRA(A, np.ones((3, 3)), 1),
     "ValueError: lora_B has shape (3, 3), expected (out, r) with r = 2 as in lora_A"),
    (lambda rng: LoRA(A[0], B, 1), "ValueError: lora_A has shape (4,), expected (r, in) with no empty axis"),
    (lambda rng: LoRA(A, B.astype("f4"), 1),
     "TypeError: lora_B has dtype float32, expected float64 as in lora_A: convert it with lora_B.astype('float64')"),
    (lambda rng: LoRALinear(linear(), LoRA(A[:, :3], B, 1)),
     "ValueError: adapter is 3 -> 3 wide, expected in -> out with in = 4 as in base"),
    (lambda rng: LoRALinear(linear(), LoRA(A, B[:2], 1)),
     "ValueError: adapter is 4 -> 2 wide, expected in -> out with out = 3 as in base"),
    (lambda rng: LoRALinear(Linear(W.astype("f4")), lora()),
     "TypeError: adapter has dtype float64, expected float32 as in base: "
     "convert it with minilora.layer.rebuild(adapter, array=lambda a: a.astype('float32'))"),
    (lambda rng: linear()(X[:, :2]),
     "ValueError: x has 2 entries on its last axis (shape (6, 2)), expected in_features = 4"),
    (lambda rng: linear()(np.array(1.0)), "ValueError: x has no axes (shape ()), expected in_features = 4"),
    (lambda rng: linear()(X.astype("f4")),
     "TypeError: x has dtype float32, expected float64 as in the layer: convert it with x.astype('float64')"),
    (lambda rng: linear()(X.astype(int)),
     "TypeError: x has dtype int64, expected a floating-point dtype such as float32"),
    (lambda rng: linear()(X.astype("c8")), "TypeError: x has dtype complex64, expected float64 as in the layer"),
    (lambda rng: linear(3, 4)(X),
     "ValueError: x has 4 entries on its last axis (shape (6, 4)), expected in_features = 3; out_features is 4: is "
     "the weight transposed? It lies as (out, in)"),
    (lambda rng: train(linear(3, 4), X, Y, rng=rng),
     "ValueError: x has 4 entries on its last axis (shape (1, 4)), expected in_features = 3; out_features is 4: is "
     "the weight transposed? It lies as (out, in)"),
    (lambda rng: evaluate(linear(), spoilt(X), Y), "ValueError: X holds NaN or infinity: entry (3, 2) is nan"),
    (lambda rng: evaluate(linear(), X, spoilt(Y)), "ValueError: Y holds NaN or infinity: entry (3, 2) is nan"),
    (lambda rng: best_adapter(X, 1j * Y, rank=1),
     "TypeError: residual has dtype complex128, expected float32 or float64: others cannot be trained"),
    (lambda rng: train(Linear(as_strided(np.ones(4), (3, 4), (0, 8))), X, Y, rng=rng, batch_size=2),
     "ValueError: params['weight'] has entries that share memory, as of a view: give a copy"),
    (lambda rng: Llama.build(config(), {name: np.ones(3) for name in config().shapes()}),
     "ValueError: arrays['model.embed_tokens.weight'] has shape (3,), expected (7, 4)"),
    (lambda rng: residual_form(lora(), X[:, :2], Y),
     "ValueError: x has 2 entries on its last axis (shape (6, 2)), expected in_features = 4"),
    (lambda rng: residual_form(lora(), X.astype("f4"), Y),
     "TypeError: x has dtype float32, expected float64 as in the layer: convert it with x.astype('float64')"),
    (lambda rng: residual_form(lora(), X, X), "ValueError: y has shape (6, 4), expected (6, 3)"),
    (lambda rng: residual_form(lora(), X, Y[:2]), "ValueError: y has shape (2, 3), expected (6, 3)"),
    (lambda rng: residual_form(lora(), X, Y.astype("f4")),
     "TypeError: y has dtype float32, expected float64 as in the layer: convert it with y.astype('float64')"),
    (lambda rng: residual_form(BOTH, X, Y.astype("f4")),
     "TypeError: y has dtype float32, expected float64 as in the layer: convert it with y.astype('float64')"),
    (lambda rng: residual_form(lora(), [[1.0] * 4], Y[:1]),
     "TypeError: x must be an array, got list; convert it with numpy.asarray(x)"),
    # a number out of range
    (lambda rng: Linear.init(0, 4, rng=rng), "ValueError: in_features must be at least 1, got 0"),
    (lambda rng: Linear.init(4, 3.0, rng=rng), "TypeError: out_features must be an integer, got 3.0"),
    (lambda rng: Linear.init(4, 3, rng=rng, dtype="int8"),
     "TypeError: dtype must be one of float16, float32, float64, got 'int8'"),
    (lambda rng: Linear.init(4, 3, rng=None),
     "TypeError: rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got None"),
    (lambda rng: Linear.init(4, 3, rng=1),
     "TypeError: rng must be a numpy.random.Generator such as numpy.random.default_rng(0), got 1"),
    (lambda rng: LoRA.init(4, 3, rank=1.5, alpha=1, rng=rng), "TypeError: rank must be an integer, got 1.5"),
    (lambda rng: LoRA.init(0, 3, rank=1, alpha=1, rng=rng), "ValueError: in_features must be at least 1, got 0"),
    (lambda rng: LoRA.init(4, 0, rank=1, alpha=1, rng=rng), "ValueError: out_features must be at least 1, got 0"),
    (lambda rng: LoRA.init(4, 3, rank=0, alpha=1, rng=rng), "ValueError: rank must be at least 1, got 0"),
    (lambda rng: best_adapter(X, Y, rank=2**31), "ValueError: rank must be at most 2147483647, got 2147483648"),
    (lambda rng: LoRA(A, B, 0), "ValueError: alpha must be above 0 and finite, got 0"),
    (lambda rng: LoRA(A, B, float("nan")), "ValueError: alpha must be above 0 and finite, got nan"),
    (lambda rng: LoRA(A, B, "3"), "TypeError: alpha must be a number, got '3'"),
    (lambda rng: LoRA(A, B, True), "TypeError: alpha must be a number, got True"),
    (lambda rng: setattr(BOTH.adapter, "alpha", -3), "ValueError: alpha must be above 0 and finite, got -3"),
    (lambda rng: MLP.init(0, 3, 2, rng=rng), "ValueError: in_features must be at least 1, got 0"),
    (lambda rng: MLP.init(4, 0, 2, rng=rng), "ValueError: hidden_features must be at least 1, got 0"),
    (lambda rng: MLP.init(4, 5, 0, rng=rng), "ValueError: out_features must be at least 1, got 0"),
    (lambda rng: MLP.init(4, 3, 2, rng=rng, dtype="i4"),
     "TypeError: dtype must be one of float16, float32, float64, got 'i4'"),
    (lambda rng: MLP.init(4, 5.0, 3, rng=rng), "TypeError: hidden_features must be an integer, got 5.0"),
    (lambda rng: MLP.init(2, 2, 2, activation=[[1]], rng=rng),
     "ValueError: activation must be 'relu', 'tanh' or 'silu', got [[1]]"),
    (lambda rng: Adapter(A, B, 1, kernel="x"),
     "TypeError: kernel must be a tuple of sizes, one for each axis, got 'x'"),
    (lambda rng: train(linear(), X, Y, rng=rng, batch_size=2, steps=10**60),
     "ValueError: steps must be at most 1073741823, got "
     "1000000000000000000000000000000000000000000000000000000000000"),
    (lambda rng: adapt(Sequential(a=linear(), b=linear(3, 2)), ["a", "b"], rank=3, alpha=1, rng=rng, init="pissa"),
     "ValueError: rank must be at most 2, got 3"),
    (lambda rng: adapt(Sequential(a=linear(), b=Embedding(np.ones((3, 3)))), "all-linear", rank=0, alpha=1, rng=rng),
     "ValueError: rank must be at least 1, got 0"),
    (lambda rng: LoRA.init(4, 3, rank=1, alpha="1", rng=rng), "TypeError: alpha must be a number, got '1'"),
    (lambda rng: LoRA.init(4, 3, rank=1, alpha=0, rng=rng), "ValueError: alpha must be above 0 and finite, got 0"),
    (lambda rng: LoRA.init(4, 3, rank=1, alpha=1, rng=rng, dtype="bfloat16"),
     "TypeError: dtype must be one of float16, float32, float64, got 'bfloat16'"),
    (lambda rng: LoRA.init(2.5, 3, rank=1, alpha=1, rng=rng), "TypeError: in_features must be an integer, got 2.5"),
    (lambda rng: Linear.init(3, 2, bias="false", rng=rng), "TypeError: bias must be True or False, got 'false'"),
    (lambda rng: adapt(model(), "fc(1", rank=2, alpha=4, rng=rng),
     "ValueError: target_modules='fc(1' is not a regular expression: missing ), unterminated subpattern at position "
     "2"),
    (lambda rng: adapt(model(), 1, rank=2, alpha=4, rng=rng),
     "TypeError: target_modules must be a list of names or a regular expression, got 1"),
    (lambda rng: adapt(model(), [1], rank=2, alpha=4, rng=rng),
     "TypeError: target_modules must be a list of names or a regular expression, got [1]"),
    (lambda rng: adapt(Sequential(fc=linear()), ["fc"], rank=2, alpha=4, rng=rng, use_rslora="no"),
     "TypeError: use_rslora must be True or False, got 'no'"),
    (lambda rng: adapt(model(), ["fc"], rank=2, alpha=4, rng=rng, use_dora=0),
     "TypeError: use_dora must be True or False, got 0"),
    (lambda rng: adapt(model(), ["fc"], rank=2, alpha=4, rng=rng, dora_norm="none"),
     "ValueError: dora_norm must be 'constant' or 'full', got 'none'"),
    (lambda rng: adapt(model(), ["fc"], rank=2, alpha=4, rng=rng, init="zero"),
     "ValueError: init must be 'lora' or 'pissa', got 'zero'"),
    # what cannot be trained or adapted, and what to do
    (lambda rng: train(freeze(linear()), X, Y, rng=rng),
     "ValueError: model has nothing to train: it is frozen; put adapters beside its layers with "
     "minilora.adapt"),
    (lambda rng: adapt(linear(), ["fc1"], rank=1, alpha=1, rng=rng),
     "ValueError: target_modules=['fc1'] names no layer, and the model is one layer, without a name: "
     "LoRALinear.from_linear(layer, rank=..., alpha=..., rng=...) puts an adapter beside it"),
    (lambda rng: adapt(model(), ["fc"], rank=1, alpha=1, rng=rng),
     "ValueError: every layer of the model already has an adapter: merge(model) first"),
    (lambda rng: adapt(model(), "all-linear", rank=1, alpha=1, rng=rng),
     "ValueError: every layer of the model already has an adapter: merge(model) first"),
    (lambda rng: Half()(X), "TypeError: forward of Half returned ndarray, expected a tuple (y, cache)"),
    (lambda rng: train(Half(), X, Y, rng=rng),
     "TypeError: forward of Half returned ndarray, expected a tuple (y, cache)"),
    (lambda rng: Half().backward(X, ()),
     "NotImplementedError: Half has no backward(dy, cache, *, need_dx=True) -> (dx, grads)"),
    (lambda rng: Layer().forward(X), "NotImplementedError: Layer has no forward(x) -> (y, cache)"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_likely_mistake_is_one_error_that_changes_nothing(mistake, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    with pytest.raises((TypeError, ValueError, NotImplementedError)) as raised:
        mistake(rng)
    assert f"{raised.type.__name__}: {raised.value}" == said
    assert rng.bit_generator.state == np.random.default_rng(5).bit_generator.state
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "array",
    [
        np.ones((3, 4)),
        np.ones((3, 4), order="F"),
        np.ones((6, 4))[::2, ::-1],
        np.ones((2, 3, 4)).transpose(1, 0, 2),
        np.ones((3, 1)),
        as_strided(np.ones(3), (1, 3), (0, 8)),
        np.array(1.0),
        np.ones((0, 3)),
    ],
)
def test_an_array_whose_entries_lie_apart_is_trained(array):
    array[...] = 1.0
    optimizer = Adam({"a": array}, lr=1.0)
    optimizer.step({"a": np.ones(array.shape)})
    np.testing.assert_allclose(array, np.zeros(array.shape), atol=1e-7)


@pytest.mark.parametrize("call", [Llama.load, load_tokenizer, load_adapter, inspect_adapter])
def test_a_hubs_name_is_told_from_a_path(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "meta-llama/Llama-2-7b"
    hint = f"If it is a model's name on a hub, download it ('hf download {name} --local-dir DIR') and give the folder"
    with pytest.raises(ValueError, match=rf"^'{name}': .*\. {re.escape(hint)}$"):
        call(name)
    Path("meta-llama").mkdir()
    for place in (name, "nowhere", "../a/b", "/a/b", "a/b/c", "a/b.gguf"):
        with pytest.raises(ValueError, match=rf"^'{place}': ") as error:
            call(place)
        assert "hub" not in str(error.value)


def test_a_hubs_name_is_no_base_to_merge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="change no weight"):
        save_adapter("a", adapters(model()))
    with pytest.raises(ValueError, match=r"^'me/model': No such file or directory\. If it is a model's name on a hub"):
        merge_adapter("me/model", "a", "out")
    assert os.listdir(tmp_path) == ["a"]
