"""What the claims do not cover in a decoder: skipped work, its past, its tied head and its refusals."""

import re

import numpy as np
import pytest

from minilora import Adam, Attention, GatedMLP, Linear, Llama, RMSNorm, Rotary, adapters, attach, cross_entropy, merge
from minilora.checks import is_array
from minilora.language.llama import Block, CheckpointedBlock, checkpointed
from minilora.language.text import gradients_at_targets
from minilora.layer import first_names, freeze, sum_tied, walk
from minilora.losses import IGNORE_INDEX
from minilora.training import backpropagate
from minilora.variants.dropout import DroppingLoRALinear, with_dropout

from ..support.compare import calls_of
from ..support.language import adapted, drawn, tiny_mixture


def randn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def llama(**changes):
    return drawn(0, "float64", **{"vocab_size": 11, "intermediate_size": 7, "num_hidden_layers": 3} | changes)


def attention():
    return llama().model.layers[0].self_attn


IDS = np.random.default_rng(1).integers(0, 11, (2, 5))
AT = np.array([[False, True, True, False, True], [False, False, False, True, False]])
"""Positions at which logits are asked for."""


# --- the decoder ----------------------------------------------------------------------------------


def test_logits_do_not_depend_on_what_follows():
    model = llama()
    z = model(IDS)
    other = IDS.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 11
    np.testing.assert_allclose(model(other)[:, :3], z[:, :3], atol=1e-13)
    np.testing.assert_allclose(model(IDS[1]), z[1], atol=1e-13)  # one sequence (T,)


def test_the_head_is_multiplied_only_with_requested_rows(monkeypatch):
    """All texts share one matrix product: separate products in NumPy would make a step a tenth slower."""
    model, seen = llama(), calls_of(monkeypatch, Linear, "forward")
    for call, rows in (
        (lambda: model.extend(IDS), len(IDS)),
        (lambda: model(IDS), IDS.size),
        (lambda: model.forward(IDS), IDS.size),
        (lambda: model.forward(IDS, AT), AT.sum()),
    ):
        seen.clear()
        call()
        assert [x.shape for layer, x in seen if layer is model.lm_head] == [(rows, 12)]


def arrays_in(cache):
    """Return the arrays that a cache keeps, without those of the layers."""
    if isinstance(cache, (tuple, list)):
        return [array for part in cache for array in arrays_in(part)]
    return [cache] if is_array(cache) else []


def test_below_the_lowest_adapter_nothing_is_kept_or_computed():
    model = adapted("model.layers.1.self_attn.v_proj", llama())
    z, cache = model.forward(IDS)
    _, caches = cache.kept[0].kept
    assert caches[:2] == [None, None]  # the embedding and the first block
    _, (q_cache, k_cache, v_cache, o_cache), *_ = caches[2].kept[0][1].kept
    assert arrays_in(v_cache)
    assert not arrays_in((q_cache, k_cache, o_cache))
    model.model.embed_tokens = model.model.layers[0] = None  # whoever calls them fails
    _, grads = model.backward(z, cache)
    assert grads.keys() == model.trainable().keys()


@pytest.mark.parametrize(("target", "called"), [("model.layers.0.mlp.down_proj", [2, 1]), ("lm_head", []), (None, [])])
def test_what_nobody_needs_is_not_computed(monkeypatch, target, called):
    """If only the lowest layer's down_proj has an adapter, that block's attention runs no backward."""
    model = adapted([target], llama()) if target else freeze(llama())
    z, cache = model.forward(IDS)
    assert bool(arrays_in(cache)) is bool(target)
    seen = calls_of(monkeypatch, Attention, "backward")
    if not called:
        monkeypatch.setattr(type(model.model), "backward", lambda *a, **k: pytest.fail("the decoder's backward ran"))
    dx, grads = model.backward(z, cache)
    assert dx is None
    assert grads.keys() == model.trainable().keys()
    assert [layer for layer, *_ in seen] == [model.model.layers[i].self_attn for i in called]


def test_a_tied_head_is_one_parameter_with_one_step():
    model = llama(tie_word_embeddings=True)
    params = model.trainable()
    assert first_names(params)["lm_head.weight"] == "model.embed_tokens.weight"
    z, cache = model.forward(IDS)
    _, grads = model.backward(cross_entropy(z, IDS)[1], cache)
    whole = sum_tied(grads, first_names(params))["model.embed_tokens.weight"]
    np.testing.assert_allclose(whole, grads["lm_head.weight"] + grads["model.embed_tokens.weight"])
    Adam(params, lr=0.1).step(grads)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(llama(tie_word_embeddings=False).trainable()) == len(params)


def test_adapters_move_to_another_model_with_the_same_weights():
    model = adapted("all-linear", llama())
    assert len(adapters(model)) == 3 * 7  # lm_head is left out, as in PEFT
    z = model(IDS)
    np.testing.assert_allclose(attach(llama(), adapters(model))(IDS), z, atol=1e-13)
    np.testing.assert_allclose(merge(model)(IDS), z, atol=1e-12)
    assert not np.allclose(llama()(IDS), z)


@pytest.mark.parametrize(("attention", "mlp", "tied"), [(True, False, False), (False, True, True)])
def test_a_decoder_has_the_biases_of_its_configuration(tied, attention, mlp):
    """Other biases among the arrays, which are not checked, are ignored."""
    c = llama(attention_bias=attention, mlp_bias=mlp, tie_word_embeddings=tied).config
    more = llama(attention_bias=True, mlp_bias=True).config.shapes() | {"lm_head.bias": (11,)}
    model = Llama.build(c, {name: randn([0, *name.encode()], *shape) for name, shape in more.items()})
    names = {path.removesuffix(".bias") for path in model.trainable() if path.endswith(".bias")}
    linears = {path: layer for path, layer in walk(model) if isinstance(layer, Linear)}
    assert names == {path for path in linears if (".self_attn." in path and attention) or (".mlp." in path and mlp)}
    assert all(linears[path].bias.shape == linears[path].weight.shape[:1] for path in names)


# --- bad input: one error that says what was expected ----------------------------------------------


def of(width, out):
    return Linear(np.ones((out, width)))


REFUSED = [
    (lambda: RMSNorm(np.ones((2, 3))), "weight has shape (2, 3), expected (in,) with no empty axis"),
    (lambda: RMSNorm(np.ones(3), 0), "eps must be above 0 and finite, got 0"),
    (lambda: RMSNorm(np.ones(3))(np.ones((2, 4))),
     "x has 4 entries on its last axis (shape (2, 4)), expected in_features = 3"),
    (lambda: Rotary(()), "frequencies must be a tuple of one number or more, got ()"),
    (lambda: Rotary((1.0, -1.0)), "frequencies[1] must be at least 0 and finite, got -1.0"),
    (lambda: Rotary((1.0,))(np.ones((2, 3))),
     "x has 3 entries on its last axis (shape (2, 3)), expected in_features = 2"),
    (lambda: attention()(np.ones(12)), "x has shape (12,), expected (..., T, 12) with at least one position"),
    (lambda: attention()(np.ones((2, 0, 12))),
     "x has shape (2, 0, 12), expected (..., T, 12) with at least one position"),
    (lambda: attention().extend(np.ones((2, 0, 12)), None),
     "x has shape (2, 0, 12), expected (..., T, 12) with at least one position"),
    (lambda: Attention(of(6, 9), of(6, 4), of(6, 4), of(9, 6), Rotary((1.0, 0.1))),
     "q_proj has 9 outputs, k_proj 4: expected H * 4 and K * 4, where K divides H"),
    (lambda: Attention(of(6, 12), of(6, 8), of(6, 8), of(12, 6), Rotary((1.0, 0.1))),
     "q_proj has 12 outputs, k_proj 8: expected H * 4 and K * 4, where K divides H"),
    (lambda: Attention(of(6, 12), of(6, 6), of(6, 6), of(12, 6), Rotary((1.0, 0.1))),
     "q_proj has 12 outputs, k_proj 6: expected H * 4 and K * 4, where K divides H"),
    (lambda: Attention(of(6, 8), of(6, 4), of(6, 8), of(8, 6), Rotary((1.0, 0.1))),
     "v_proj is 6 -> 8 wide, expected in -> KD with KD = 4 as in k_proj"),
    (lambda: GatedMLP(of(3, 5), of(3, 4), of(5, 3)),
     "up_proj is 3 -> 4 wide, expected in -> m with m = 5 as in gate_proj"),
    (lambda: llama()(IDS + 10), "x holds 15 at (0, 0), expected 0 to 10"),
    (lambda: llama()(IDS * 1.0), "x has dtype float64, expected integers"),
    (lambda: llama()(IDS[0, 0]), "x has shape (12,), expected (..., T, 12) with at least one position"),
    (lambda: Llama.build(
            llama().config, {n: p.astype("f4" if "norm" in n else "f8") for n, p in llama().trainable().items()}
        )(IDS),
         "x has dtype float64, expected float32 as in the layer: convert it with x.astype('float32')"),
    (lambda: llama().extend(IDS, llama(num_hidden_layers=2).extend(IDS)[1]),
     "zip() argument 2 is shorter than argument 1"),
    (lambda: llama().extend(IDS, llama(num_hidden_layers=4).extend(IDS)[1]),
     "zip() argument 2 is longer than argument 1"),
    (lambda: llama().backward(np.ones((2, 5, 11)), llama().forward(IDS)[1]),
     "cache does not come from this layer's forward"),
    (lambda: (model := llama()).backward(np.ones((2, 5, 12)), model.forward(IDS)[1]),
     "dy has shape (2, 5, 12), expected (2, 5, 11)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value).split(": Llama(")[0] == message


# --- blocks that are computed again ---


@pytest.mark.parametrize(
    ("model", "targets", "options"),
    [
        (llama(), "all-linear", {}),
        (llama(), ["layers.1.self_attn.q_proj", "lm_head"], {}),
        (llama(), ["embed_tokens"], {}),
        (llama(), ["up_proj"], {"use_dora": True, "dora_norm": "full"}),
        (tiny_mixture("mixtral"), "all-linear", {"target_parameters": ["mlp.experts.down_proj"]}),
        (tiny_mixture("qwen2_moe"), ["q_proj", "shared_expert.up_proj"], {}),
    ],
)
def test_checkpointed_blocks_have_bit_identical_gradients(model, targets, options):
    model = adapted(targets, model, **options)
    Y = np.where(AT, np.roll(IDS, -1, axis=1), IGNORE_INDEX)
    for plain, gradients in ((model, backpropagate), (with_dropout(model, 0.3, [5, 6]), gradients_at_targets)):
        expected, again = gradients(plain, IDS, Y, cross_entropy), checkpointed(plain)
        found = gradients(again, IDS, Y, cross_entropy)
        assert again.trainable().keys() == plain.trainable().keys() == found.keys()
        assert list(found) == list(expected)
        assert any(g.any() for g in expected.values())
        for name, g in expected.items():
            np.testing.assert_array_equal(found[name], g)


def test_a_checkpointed_model_shares_arrays_and_leaves_the_original_unchanged():
    model = adapted("all-linear", llama())
    again = checkpointed(model)
    assert all(p is model.trainable()[name] for name, p in again.trainable().items())
    kinds = [[type(block) for block in m.model.layers] for m in (model, again)]
    assert kinds == [[Block] * 3, [CheckpointedBlock] * 3]
    np.testing.assert_array_equal(again(IDS), model(IDS))


def test_a_checkpointed_block_is_computed_and_masked_twice(monkeypatch):
    model = with_dropout(adapted(["down_proj"], llama()), 0.3, [5, 6])
    seen = calls_of(monkeypatch, DroppingLoRALinear, "mask")
    backpropagate(checkpointed(model), IDS, IDS, cross_entropy)
    numbers = [layer.number for _, layer in walk(model) if isinstance(layer, DroppingLoRALinear)]
    assert [layer.number for layer, _ in seen] == numbers + numbers[::-1]


# --- logits at some positions ---


@pytest.mark.parametrize("targets", ["all-linear", ["layers.1.mlp.down_proj", "lm_head"], ["lm_head"]])
def test_logits_at_some_positions_are_those_of_all(targets):
    """The gradients equal those of all positions with a zero dy at the others."""
    model = adapted(targets, llama())
    (z, cache), (whole, whole_cache) = model.forward(IDS, AT), model.forward(IDS)
    assert z.shape == (4, 11)
    np.testing.assert_allclose(z, whole[AT], rtol=0, atol=1e-12)
    dz = randn(3, *z.shape)
    d_whole = np.zeros_like(whole)
    d_whole[AT] = dz
    grads, expected = model.backward(dz, cache)[1], model.backward(d_whole, whole_cache)[1]
    assert list(grads) == list(expected)
    for name, g in grads.items():
        assert np.abs(expected[name]).max() > 0
        np.testing.assert_allclose(g, expected[name], rtol=0, atol=1e-12)


def test_positions_that_do_not_fit_are_refused():
    for at, said in ((AT[:, :4], "bool (2, 4)"), (AT.astype(int), "int64 (2, 5)")):
        with pytest.raises(ValueError, match=re.escape(f"at is {said}, expected bool (2, 5)")):
            llama().forward(IDS, at)
