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
    Linear,
    Llama,
    LlamaConfig,
    LoRA,
    LoRALinear,
    ReLU,
    Rotary,
    Sequential,
    SiLU,
    adapt,
    adapters,
    attach,
    best_adapter,
    best_of_rank,
    load_adapter,
    merge,
    merge_adapter,
    save_adapter,
    train,
    weighted_sum,
)
from minilora.files.inspection import inspect_adapter
from minilora.language.text import windows
from minilora.language.tokens import load_tokenizer

RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((6, 4)), RNG.standard_normal((6, 3))


def linear(in_features=4, out_features=3):
    return Linear(RNG.standard_normal((out_features, in_features)))


def lora():
    return LoRA(RNG.standard_normal((1, 4)), RNG.standard_normal((3, 1)), 1)


def model():
    return adapt(Sequential(fc=linear()), ["fc"], rank=1, alpha=1, rng=RNG)


def config(**change):
    usual = {
        "vocab_size": 7,
        "hidden_size": 4,
        "intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
        "rms_norm_eps": 1e-5,
        "frequencies": (1.0,),
    }
    return LlamaConfig(**usual | change)


def square(params):
    return (params["a"] * params["a"]).sum()


MISTAKES = {
    "train a class": (
        lambda: train(LoRALinear, X, Y, rng=RNG),
        TypeError,
        "model must be a Layer, got the class LoRALinear, and no object of it$",
    ),
    "adapt a class": (lambda: adapt(MLP, "", rank=1, alpha=1, rng=RNG), TypeError, "model must be a .* the class MLP"),
    "a class as base": (lambda: LoRALinear(Linear, lora()), TypeError, "base must be a Linear, got the class Linear"),
    "a class in a model": (lambda: Sequential(act=ReLU), TypeError, "act must be a Layer, got the class ReLU"),
    "train adapters": (
        lambda: train({"fc": lora()}, X, Y, rng=RNG),
        TypeError,
        r"model must be a Layer, got dict; minilora\.attach\(model, adapters\) puts adapters into a model$",
    ),
    "merge adapters": (lambda: merge({"fc": lora()}), TypeError, "model must be a Layer, got dict; minilora"),
    "attach in the other order": (lambda: attach({"fc": lora()}, linear()), TypeError, "model must be a Layer, got d"),
    "attach a model": (
        lambda: attach(linear(), model()),
        TypeError,
        r"adapters must be a dict of .*, or what minilora\.adapters\(model\) returns; got Sequential$",
    ),
    "attach an adapter": (
        lambda: attach(linear(), lora()),
        TypeError,
        r"adapters must be a dict of adapters by module path, such as \{'q_proj': adapter\}, .*; got LoRA$",
    ),
    "attach what is no adapter": (
        lambda: attach(Sequential(fc=linear()), {"fc": linear()}),
        TypeError,
        r"adapters\['fc'\] must be a LoRA, got Linear",
    ),
    "save a model": (
        lambda: save_adapter("folder", model()),
        TypeError,
        r"layers must be a dict of .*, or what minilora\.adapters\(model\) returns; got Sequential$",
    ),
    "a part that is no layer": (
        lambda: Attention(linear(), linear(), linear(), 3, Rotary((1.0, 0.1))),
        TypeError,
        "o_proj must be a Layer with in_features and out_features, got int",
    ),
    "a part without widths": (
        lambda: GatedMLP(linear(), ReLU(), linear(3, 4)),
        TypeError,
        "up_proj must be a Layer with in_features and out_features, got ReLU",
    ),
    "an activation's class": (
        lambda: GatedMLP(linear(), linear(), linear(3, 4), SiLU),
        TypeError,
        "act_fn must be a Layer, got the class SiLU",
    ),
    "an activation in a list": (
        lambda: MLP.init(2, 2, 2, activation=[[1]], rng=RNG),
        ValueError,
        r"activation must be 'relu', 'tanh' or 'silu', got \[\[1\]\]",
    ),
    "a start that is no adapter": (
        lambda: Adapter(np.ones((1, 4)), np.ones((3, 1)), 1, start=0),
        TypeError,
        "start must be a LoRA, got int",
    ),
    "a kernel that is a text": (
        lambda: Adapter(np.ones((1, 4)), np.ones((3, 1)), 1, kernel="x"),
        TypeError,
        "kernel must be a tuple of sizes, one for each axis, got 'x'",
    ),
    "the best of no adapter": (
        lambda: best_of_rank(linear(), 1),
        TypeError,
        r"adapters\[0\] must be a LoRA, got L",
    ),
    "a sum of a model": (lambda: weighted_sum(model(), [1]), TypeError, "adapters must be a list, got Sequential"),
    "gradients that are a number": (
        lambda: train(linear(), X, Y, rng=RNG, gradients=5),
        TypeError,
        r"gradients must be a function, gradients\(model, x, y, loss\), got 5",
    ),
    "a decoder's array of another shape": (
        lambda: Llama.build(config(), {name: np.ones(3) for name in config().shapes()}),
        ValueError,
        r"arrays\['model.embed_tokens.weight'\] has shape \(3,\), expected \(7, 4\)",
    ),
    "heads that cannot share": (
        lambda: config(num_attention_heads=3, num_key_value_heads=2),
        ValueError,
        "3 attention heads, 2 key-value heads, head_dim 2: expected groups of one size",
    ),
    "token ids that are floats": (
        lambda: windows([0.9] * 9, 4),
        TypeError,
        "ids has dtype float64, expected integers",
    ),
    "token ids that are a text": (lambda: windows("123456789", 4), TypeError, "ids has dtype <U9, expected integers"),
    "token ids below zero": (lambda: windows([1] * 8 + [-2], 4), ValueError, r"ids holds -2 at \(8,\), expected 0 to"),
    "a residual that is complex": (
        lambda: best_adapter(X, 1j * Y, rank=1),
        TypeError,
        "residual has dtype complex128, expected float32 or float64",
    ),
    "rows that share memory": (
        lambda: train(Linear(as_strided(np.ones(4), (3, 4), (0, 8))), X, Y, rng=RNG, batch_size=2),
        ValueError,
        r"params\['weight'\] has entries that share memory, as of a view: give a copy",
    ),
    "more steps than memory": (
        lambda: train(linear(), X, Y, rng=RNG, batch_size=2, steps=10**60),
        ValueError,
        r"steps must be at most 1073741823, got 1000",
    ),
    "a rank beyond all sizes": (
        lambda: best_adapter(X, Y, rank=2**31),
        ValueError,
        "rank must be at most 2147483647, got 2147483648",
    ),
    "a rank of more digits than are written": (
        lambda: LoRA.init(4, 3, rank=10**5000, alpha=1, rng=RNG),
        ValueError,
        "rank must be at most 2147483647, got an integer of 16610 bits",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_likely_mistake_is_one_error_that_changes_nothing(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, error, message = MISTAKES[mistake]
    with pytest.raises(error, match=f"^{message}") as raised:
        make()
    assert raised.type is error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda rng: MLP.init(4, 5, 0, rng=rng),
        lambda rng: MLP.init(4, 5.0, 3, rng=rng),
        lambda rng: train(linear(), X, Y, rng=rng, gradients=5),
        lambda rng: train(linear(), X, Y, rng=rng, batch_size=2, steps=10**60),
        lambda rng: adapt(Sequential(a=linear(), b=linear(3, 2)), ["a", "b"], rank=3, alpha=1, rng=rng, init="pissa"),
        lambda rng: adapt(Sequential(a=linear(), b=Embedding(np.ones((3, 3)))), "all-linear", rank=0, alpha=1, rng=rng),
    ],
)
def test_a_refused_call_leaves_the_generator_where_it_stood(call):
    rng = np.random.default_rng(5)
    before = rng.bit_generator.state
    with pytest.raises((ValueError, TypeError)):
        call(rng)
    assert rng.bit_generator.state == before


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
    save_adapter("a", adapters(model()))
    with pytest.raises(ValueError, match=r"^'me/model': No such file or directory\. If it is a model's name on a hub"):
        merge_adapter("me/model", "a", "out")
    assert os.listdir(tmp_path) == ["a"]
