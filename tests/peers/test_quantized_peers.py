"""bitsandbytes, transformers and PEFT as oracles of NF4: bytes, files both ways, and an adapter over four bits.

bitsandbytes dequantises some matrices wrongly on a processor with AVX-512, where a row is not whole blocks; so the
oracle dequantises the flattened weight. In evaluation it rounds scales to bfloat16 there, so models are in training.
"""

import logging
import warnings

import numpy as np
import pytest

from minilora import (
    Linear,
    Llama,
    LlamaConfig,
    adapt,
    adapters,
    attach,
    dequantize_nf4,
    load_adapter,
    quantize,
    quantize_nf4,
    save_adapter,
)
from minilora.language import save_llama
from minilora.layer import walk
from minilora.layers.nf4 import NF4, dequantize_scales, quantize_scales, scale_book
from minilora.layers.quantized import QuantizedLinear
from minilora.layers.rotary import frequencies
from minilora.losses import cross_entropy
from minilora.training import backpropagate

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="pip install -e '.[peers]'")
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes", reason="pip install -e '.[peers]'")
    peft = pytest.importorskip("peft", reason="pip install -e '.[peers]'")
    transformers = pytest.importorskip("transformers", reason="pip install -e '.[peers]'")

SHAPES = [(64, 64), (1536, 576), (5, 7), (1, 1), (33,), (64, 112), (13, 80), (3, 5, 7), (96, 64)]


def theirs(weight, block_size=64, *, nested=False):
    packed, state = bnb.functional.quantize_4bit(
        torch.as_tensor(weight), blocksize=block_size, quant_type="nf4", compress_statistics=nested
    )
    return packed.numpy().ravel(), state


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def in_their_bytes(w, block_size=64):
    """The bytes and scales of a weight, which are bitsandbytes'."""
    packed, absmax = quantize_nf4(torch.as_tensor(w).float().numpy(), block_size=block_size)
    expected, state = theirs(w, block_size)
    np.testing.assert_array_equal(packed, expected)
    np.testing.assert_array_equal(absmax, state.absmax.numpy())
    return packed, absmax


@pytest.mark.parametrize("block_size", [64, 128, 256, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_bitsandbytes(shape, block_size):
    for seed, scale in ((0, 1.0), (1, 0.02)):
        w = gaussian(*shape, seed=seed) * np.float32(scale)
        packed, absmax = in_their_bytes(w, block_size)
        _, flat = theirs(w.ravel(), block_size)
        found = bnb.functional.dequantize_4bit(torch.as_tensor(packed)[:, None], flat).numpy().ravel()
        ours = dequantize_nf4(packed, absmax, shape, block_size=block_size)
        np.testing.assert_allclose(ours.ravel(), found, atol=1e-6)


def test_half_weights_zero_blocks_and_single_weights_are_theirs():
    for dtype in (torch.float16, torch.bfloat16):
        in_their_bytes(torch.as_tensor(gaussian(48, 128)).to(dtype))
    w = gaussian(6, 64)
    w[1], w[3], w[4] = 0, 1e-30, -5
    w[5, 1:] = 0
    in_their_bytes(w)


def test_the_books_are_those_of_bitsandbytes():
    _, state = theirs(gaussian(64, 64), nested=True)
    np.testing.assert_array_equal(NF4, state.code.numpy())
    np.testing.assert_array_equal(scale_book(), bnb.functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("shape", [(1536, 576), (64, 64), (5, 7)])
def test_double_quantisation_is_that_of_bitsandbytes(shape):
    """It rounds to 65,536 steps first, so that one scale in a hundred may have another code, as near as that."""
    w = gaussian(*shape)
    expected, state = theirs(w, nested=True)
    packed, absmax = quantize_nf4(w)
    found, nested, mean = quantize_scales(absmax)
    np.testing.assert_array_equal(packed, expected)
    their_codes = state.absmax.numpy()
    assert (found != their_codes).mean() <= 0.01 or nested.max() == 0  # a single scale is its own mean
    safe = np.repeat(np.where(nested == 0, 1, nested), 256)[: len(found)]
    distance = [np.abs(scale_book()[codes] - (absmax - mean) / safe) for codes in (found, their_codes)]
    assert (distance[1] - distance[0])[np.repeat(nested, 256)[: len(found)] > 0].max(initial=0) <= 2 / 65536
    np.testing.assert_allclose(nested, state.state2.absmax.numpy(), rtol=1e-6)
    np.testing.assert_allclose(mean, float(state.offset), rtol=1e-6)
    scales = dequantize_scales(their_codes, state.state2.absmax.numpy(), float(state.offset))
    decoded = bnb.functional.dequantize_blockwise(state.absmax, state.state2).numpy() + float(state.offset)
    np.testing.assert_allclose(scales, decoded, rtol=1e-6)


def test_a_layer_has_the_output_and_dx_of_linear4bit():
    linear = Linear(gaussian(96, 128), gaussian(96, seed=1))
    layer = QuantizedLinear.from_linear(linear, double_quant=False)
    other = bnb.nn.Linear4bit(128, 96, quant_type="nf4", compress_statistics=False, compute_dtype=torch.float32)
    other.weight = bnb.nn.Params4bit(
        torch.from_numpy(linear.weight), requires_grad=False, quant_type="nf4", compress_statistics=False
    )
    other.bias = torch.nn.Parameter(torch.from_numpy(linear.bias), requires_grad=False)
    other = other.to("cpu")
    x = torch.from_numpy(gaussian(7, 128, seed=2)).requires_grad_()
    y = other(x)
    dy = gaussian(7, 96, seed=3)
    y.backward(torch.from_numpy(dy))
    ours, cache = layer.forward(x.detach().numpy())
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.backward(dy, cache)[0], x.grad.numpy(), rtol=1e-4, atol=1e-5)


# --- files ----------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 97, (2, 9))
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip


def ours(**settings):
    config = LlamaConfig(**SIZES | {"rms_norm_eps": 1e-5, "frequencies": frequencies(32, 5000.0)} | settings)
    rng = np.random.default_rng(0)
    return Llama.build(config, {n: (rng.standard_normal(s) / 6).astype("f4") for n, s in config.shapes().items()})


def loaded(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options)
    return model.train()


def logits(model):
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def in_four_bits(model):
    """The paths of the layers that are quantised, in a model of either library."""
    if isinstance(model, Llama):
        return {path for path, layer in walk(model) if isinstance(layer, QuantizedLinear)}
    return {path for path, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


WRITTEN = {
    "single": ({}, {"double_quant": False}),
    "double": ({}, {"double_quant": True}),
    "tied, single": ({"tie_word_embeddings": True}, {"double_quant": False}),
    "tied, double": ({"tie_word_embeddings": True}, {"double_quant": True}),
    "some layers": ({"attention_bias": True}, {"target_modules": ["q_proj", "layers.1.mlp.down_proj"]}),
    "floats": ({"mlp_bias": True}, None),
}


@pytest.mark.parametrize("what", WRITTEN)
def test_transformers_reads_what_we_write(tmp_path, what):
    settings, four_bits = WRITTEN[what]
    model = ours(**settings) if four_bits is None else quantize(ours(**settings), **four_bits)
    save_llama(model, tmp_path / "m")
    other = loaded(tmp_path / "m")
    assert in_four_bits(other) == in_four_bits(model)
    np.testing.assert_allclose(model(IDS), logits(other), atol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_we_read_the_four_bits_that_transformers_writes(tmp_path, tie, nested, dtype):
    torch.manual_seed(0)
    there = getattr(torch, dtype)
    config = transformers.LlamaConfig(**SIZES, tie_word_embeddings=tie)
    transformers.LlamaForCausalLM(config).to(there).save_pretrained(tmp_path / "float")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "float", dtype=there, quantization_config=how, device_map="cpu"
    )
    other.save_pretrained(tmp_path / "four")
    model = Llama.load(tmp_path / "four")
    assert in_four_bits(model) == in_four_bits(other)
    assert in_four_bits(model)
    for path in in_four_bits(model):
        module = other.get_submodule(path)
        np.testing.assert_array_equal(dict(walk(model))[path].packed, module.weight.data.numpy().ravel())
    if dtype == "float32":  # transformers rounds what it dequantises to the stored type
        np.testing.assert_allclose(model(IDS), logits(other.train()), atol=1e-4)


def test_peft_computes_our_adapter_over_the_same_four_bits(tmp_path):
    base = quantize(ours())
    save_llama(base, tmp_path / "m")
    adapted = adapt(base, "all-linear", rank=4, alpha=8, rng=np.random.default_rng(0))
    for i, p in enumerate(adapted.trainable().values()):
        p += 0.1 * gaussian(*p.shape, seed=i)
    save_adapter(tmp_path / "a", adapters(adapted))
    other = peft.PeftModel.from_pretrained(loaded(tmp_path / "m"), tmp_path / "a", is_trainable=True)
    np.testing.assert_allclose(attach(base, load_adapter(tmp_path / "a"))(IDS), logits(other), atol=1e-4)
    targets = np.random.default_rng(1).integers(0, 97, IDS.shape)
    loss = torch.nn.functional.cross_entropy(
        other(torch.from_numpy(IDS)).logits.flatten(0, 1), torch.from_numpy(targets.ravel())
    )
    loss.backward()
    theirs = {name: p.grad.numpy() for name, p in other.named_parameters() if p.grad is not None}
    grads = backpropagate(adapted, IDS, targets, cross_entropy)
    assert len(theirs) == len(grads)
    for name, grad in grads.items():
        path, _, factor = name.rpartition(".")
        np.testing.assert_allclose(grad, theirs[f"base_model.model.{path}.{factor}.default.weight"], atol=1e-5)
