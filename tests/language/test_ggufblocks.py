"""Quantised blocks of .gguf files: our decoder is the package's, bit for bit, and a model keeps them in memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Linear, Llama, LlamaConfig, adapt, merge, quantize
from minilora.checks import FileRefused
from minilora.language import save_llama
from minilora.language.gguf import BYTES, BlockLinear, decode
from minilora.language.memory import parameter_bytes
from minilora.layer import parameter_count, rebuild, walk
from minilora.layers.nf4 import CodedLinear
from minilora.layers.rotary import frequencies

from ..support.gguf_file import write

gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")


def blocks(kind, *shape, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", BYTES)
@given(rows=st.integers(1, 5), wide=st.integers(1, 4), seed=st.integers(0, 99))
def test_blocks_are_decoded_as_the_package_does(kind, rows, wide, seed):
    """Of random bytes, whose scales may be subnormal, infinite or NaN as well; and of any number of leading axes."""
    data = np.random.default_rng(seed).integers(0, 256, (rows, wide * BYTES[kind]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = decode(kind, data)
        other = [decode(kind, data.reshape(1, rows, -1))[0], np.stack([decode(kind, row) for row in data])]
        expected = gguf.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert found.dtype == np.float32
    assert found.shape == (rows, 32 * wide)
    for each in (found, *other):
        np.testing.assert_array_equal(each.view("uint32"), expected.view("uint32"))


@pytest.mark.parametrize(("kind", "dtype"), [*zip(BYTES, ["float32", "float64", "float32"], strict=True)])
def test_a_layer_of_blocks_is_that_of_its_numbers(place, kind, dtype):
    bias = np.random.default_rng(1).standard_normal(5).astype(dtype)
    layer = BlockLinear(kind, blocks(kind, 5, 96), bias, dtype=dtype)
    whole = Linear(decode(kind, layer.blocks).astype(dtype), bias)
    x = np.random.default_rng(2).standard_normal((3, 96)).astype(dtype)
    expected, cache = whole.forward(x)
    dx, _ = whole.backward(expected, cache)
    here = rebuild(layer, array=place.put)
    y, cache = here.forward(place.put(x))
    place.assert_same(y, expected)
    found, grads = here.backward(place.put(expected), cache)
    place.assert_same(found, dx)
    assert grads == {}
    assert parameter_count(layer) == 5 * 96 + 5
    assert parameter_bytes(layer) == 5 * 3 * BYTES[kind] + bias.nbytes


def test_blocks_are_read_and_never_written():
    adapted = adapt(BlockLinear("Q4_1", blocks("Q4_1", 5, 64)), "", rank=1, alpha=1, rng=np.random.default_rng(0))
    adapted.adapter.lora_B += 1
    assert type(merge(adapted)) is Linear
    with pytest.raises(ValueError, match="a BlockLinear is read from files"):
        merge(adapted, requantize=True)
    with pytest.raises(ValueError, match="quantised already, a BlockLinear"):
        quantize(adapted.base)


CONFIG = LlamaConfig(
    vocab_size=29, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, frequencies=frequencies(8, 1e4),
)  # fmt: skip
OF_LAYERS = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q4_0", "ffn_gate": "Q5_0"}
IDS = np.random.default_rng(0).integers(0, 29, (2, 6))


def written(path, *, spoiled=False):
    """A model whose matrices have four quantised types, one of which we do not keep, and floats."""

    def coded(name, array):
        kind = next((kind for part, kind in OF_LAYERS.items() if f".{part}." in name), None)
        if kind is None:
            return array, None
        code = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(array, code)
        if spoiled and name == "blk.1.attn_v.weight":
            data[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        return data, code

    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype("float32") / 8 for name, shape in CONFIG.shapes().items()}
    return write(path, Llama.build(CONFIG, arrays), changes={"llama.rope.freq_base": 1e4}, coded=coded)


def test_a_model_that_keeps_its_blocks_computes_the_same(tmp_path):
    """And is saved as numbers; it no longer hangs on its file."""
    path = written(tmp_path / "m.gguf")
    whole, kept = Llama.load(path), Llama.load(path, keep_blocks=True)
    expected = whole(IDS)
    np.testing.assert_array_equal(kept(IDS), expected)
    kinds = {p.rpartition(".")[2]: layer.kind for p, layer in walk(kept) if isinstance(layer, CodedLinear)}
    assert kinds == {"q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q8_0", "o_proj": "Q4_0"}
    coded = {p: layer for p, layer in walk(kept) if isinstance(layer, BlockLinear)}
    for p, layer in coded.items():
        np.testing.assert_array_equal(layer.weight, dict(walk(whole))[p].weight)
    assert parameter_count(kept) == parameter_count(whole)
    saved = sum(4 * parameter_count(layer) - layer.blocks.nbytes for layer in coded.values())
    assert parameter_bytes(kept) == parameter_bytes(whole) - saved
    save_llama(kept, tmp_path / "folder")
    again = Llama.load(tmp_path / "folder")
    assert not any(isinstance(layer, CodedLinear) for m in (whole, again) for _, layer in walk(m))
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(path.stat().st_size))
    for model in (whole, kept, again):
        np.testing.assert_array_equal(model(IDS), expected)


def test_blocks_that_hold_infinity_are_refused(tmp_path):
    path = written(tmp_path / "m.gguf", spoiled=True)
    for keep_blocks in (False, True):
        with pytest.raises(FileRefused, match=r"layers.1.self_attn.v_proj.weight' holds NaN or infinity"):
            Llama.load(path, keep_blocks=keep_blocks)
