"""Llama decoders in llama.cpp's format: what is read, what is refused, and weights that stay quantised."""

import struct
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Linear, Llama, adapt, merge, quantize
from minilora.language import save_llama
from minilora.language.files.gguf import BYTES, SUPPORTED_GGUF, SUPPORTED_KIND, BlockLinear, decode
from minilora.language.files.tokens import load_tokenizer
from minilora.language.memory import parameter_bytes
from minilora.layer import parameter_count, rebuild, walk
from minilora.layers.quantized import FrozenQuantizedLinear
from minilora.layers.rotary import frequencies
from minilora.texts import FileRefused

from ...support.compare import refused
from ...support.gguf_file import llama_of_kind, theirs, write
from ...support.language import drawn, tiny_llama

gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")
IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.mark.parametrize(("vocab", "tied"), [(None, True), (29, False)])
def test_a_gguf_file_is_the_model_it_came_from(tmp_path, model, tied, vocab):
    found = Llama.load(write(tmp_path / "m.gguf", model, tied=tied, changes={"llama.vocab_size": vocab}))
    for name, array in model.trainable().items():
        if not (tied and name == "lm_head.weight"):
            np.testing.assert_array_equal(found.trainable()[name], array)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    if not tied:
        np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-5)


@pytest.mark.parametrize(("kind", "read"), [("qwen2", "qwen2"), ("mistral", "llama")])
def test_a_qwen2_keeps_its_kind_a_mistral_is_a_llama(tmp_path, kind, read):
    """A Qwen2's rows are not permuted, and it has three biases."""
    model = llama_of_kind(kind)
    found = Llama.load(write(tmp_path / "m.gguf", model, changes={"llama.context_length": 70}))
    assert (found.config.model_type, found.config.max_position_embeddings) == (read, 70)
    assert found.trainable().keys() == model.trainable().keys()
    for name, array in model.trainable().items():
        np.testing.assert_array_equal(found.trainable()[name], array)


def test_a_qwen2_has_no_other_arrays(tmp_path):
    for arrays, message in (
        ({"blk.1.attn_k.bias": None}, "'model.layers.1.self_attn.k_proj.bias'"),
        ({"blk.0.attn_output.bias": np.ones(12, "f4")}, "'model.layers.0.self_attn.o_proj.bias' is unexpected"),
        ({"rope_freqs.weight": np.ones(2, "f4")}, "'rope_freqs.weight' is unexpected"),
    ):
        with pytest.raises(FileRefused, match=message):
            Llama.load(write(tmp_path / "m.gguf", llama_of_kind("qwen2"), arrays=arrays))


def test_biases_of_attention_and_mlp_are_read(tmp_path, model):
    rng = np.random.default_rng(1)
    matrices = {name: array for name, array in model.trainable().items() if name.endswith("_proj.weight")}
    biases = {
        name.replace("weight", "bias"): rng.standard_normal(len(array)).astype("f4") for name, array in matrices.items()
    }
    path = write(tmp_path / "m.gguf", model, arrays=dict(theirs(name, bias) for name, bias in biases.items()))
    found = Llama.load(path).trainable()
    for name, bias in biases.items():
        np.testing.assert_array_equal(found[name], bias)


def test_a_factor_is_read_as_llama_cpp_reads_it(tmp_path, model):
    for fields, factors, divided in (
        ({}, [1, 8], (1, 8)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, 4),
        ({"rope.scaling.factor": 4.0}, None, 4),  # of a file without a type llama.cpp takes "linear"
        ({"rope.scale_linear": 4.0}, None, 4),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 4.0}, None, 4),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None, 1),
        ({"rope.scaling.type": "linear"}, None, 1),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None, 1),
        ({"attention.value_length": 4, "rope.dimension_count": 4, "context_length": 7}, None, 1),
    ):
        arrays = {"rope_freqs.weight": factors and np.array(factors, "f4")}
        changes = {f"llama.{name}": value for name, value in fields.items()}
        found = Llama.load(write(tmp_path / "f.gguf", model, changes=changes, arrays=arrays)).config.frequencies
        np.testing.assert_allclose(found, np.array(model.config.frequencies) / divided, rtol=1e-12)
    bare = Llama.load(write(tmp_path / "f.gguf", model, changes={"llama.rope.freq_base": None}))
    assert bare.config.frequencies == (1.0, 0.01)  # of the base 10,000


REFUSED = [
    ({"general.architecture": "gemma"}, {}, "general.architecture is 'gemma', supported: 'llama', 'qwen2'"),
    ({"llama.expert_count": 8}, {}, "llama.expert_count is 8, supported: 0"),
    ({"llama.attention.sliding_window": 64}, {}, "llama.attention.sliding_window is 64, supported: 0"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn', supported: 'linear', 'none'"),
    ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}, {},
     "llama.rope.scaling.factor is 4.0 and llama.rope.scale_linear is 2.0: expected only one"),
    ({"llama.rope.scaling.factor": -4.0}, {}, "factor must be above 0 and finite, got -4.0"),
    ({"llama.rope.scaling.attn_factor": 1.5}, {}, "llama.rope.scaling.attn_factor is 1.5, supported: 1"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "rms_norm_eps must be a number, got None"),
    ({"llama.rope.dimension_count": 2}, {},
     "llama.rope.dimension_count is 2, supported: 4, the head dimension of the keys"),
    ({"llama.attention.value_length": 3}, {},
     "llama.attention.value_length is 3, supported: 4, the head dimension of the keys"),
    ({"llama.attention.causal": False}, {}, "llama.attention.causal is False, supported: True"),
    ({"split.count": 2}, {}, "split.count is 2, supported: 0, 1"),
    ({"adapter.type": "lora"}, {}, "adapter.type is 'lora', supported: ''"),
    ({"general.type": "adapter"}, {}, "general.type is 'adapter', supported: 'model'"),
    ({"llama.expert_used_count": 2}, {}, "llama.expert_used_count is 2, supported: 0"),
    ({"llama.block_count": None}, {}, "num_hidden_layers must be an integer, got None"),
    ({"llama.attention.head_count": 0}, {}, "num_attention_heads must be at least 1, got 0"),
    ({"llama.embedding_length": "12"}, {}, "hidden_size must be an integer, got '12'"),
    ({}, {"blk.1.ffn_up.weight": None}, "missing arrays: 1, the first is 'model.layers.1.mlp.up_proj.weight'"),
    ({"llama.vocab_size": None}, {"token_embd.weight": np.ones(9, "f4")},
     "'model.embed_tokens.weight' has shape [9], expected [9, 12]"),
    ({}, {"blk.0.ffn_up.weight": np.ones((12, 20), "f4")},
     "'model.layers.0.mlp.up_proj.weight' has shape [12, 20], expected [20, 12]"),
    ({}, {"blk.9.attn_q.weight": np.ones((2, 2), "f4")},
     "'model.layers.9.self_attn.q_proj.weight' is unexpected: a Llama decoder with this config does not have it"),
    ({}, {"a\x1b[2J": np.ones(2, "f4")},
     r"'a\x1b[2J' is unexpected: a Llama decoder with this config does not have it"),
    ({}, {"output_norm.weight": np.ones(12, "i4")}, "Dequantization for I32 is not yet implemented"),
    ({}, {"output_norm.weight": np.full(12, np.nan, "f4")}, "'model.norm.weight' holds NaN or infinity"),
    ({}, {"rope_freqs.weight": np.zeros(2, "f4")}, "rope_freqs.weight: expected 2 finite numbers above 0"),
    ({}, {"rope_freqs.weight": np.full(2, np.inf, "f4")}, "rope_freqs.weight: expected 2 finite numbers above 0"),
    ({}, {"rope_freqs.weight": np.ones(3, "f4")}, "rope_freqs.weight: expected 2 finite numbers above 0"),
    ({}, {"model.norm.weight": np.ones(12, "f4")}, "two of its arrays have the same name in a Llama decoder"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "arrays", "message"), REFUSED)
def test_what_is_no_llama_decoder_is_refused_by_name(tmp_path, model, changes, arrays, message):
    with refused(f"'{tmp_path / 'm.gguf'}': {message}"):
        Llama.load(write(tmp_path / "m.gguf", model, changes=changes, arrays=arrays))


def test_a_cut_gguf_is_one_clear_error(tmp_path, model):
    whole = write(tmp_path / "m.gguf", model).read_bytes()
    for length in (0, 3, 20, 30, 200, len(whole) // 2, len(whole) - 40):
        (tmp_path / "m.gguf").write_bytes(whole[:length])
        with pytest.raises(FileRefused, match="not a valid GGUF file"):
            Llama.load(tmp_path / "m.gguf")


def header(*fields):
    """Return a header without tensors; each field has a name, a type and its bytes."""
    text = b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + data for name, kind, data in fields)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + text


ARRAY, TEXT, BYTE = 9, 8, 0


@pytest.mark.parametrize("read", [Llama.load, load_tokenizer])
@pytest.mark.parametrize("kind", [BYTE, TEXT, 12, ARRAY])
def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path, read, kind):
    """The package on its own would never stop: past the end of the file it reads empty arrays."""
    pytest.importorskip("tokenizers")
    path, start = tmp_path / "m.gguf", time.process_time()
    path.write_bytes(header((b"tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", kind, 1 << 60))))
    with pytest.raises(FileRefused, match=r"would end at byte \d+, but the file has only"):
        read(path)
    assert time.process_time() - start < 2


NOT_IMPLEMENTED = [
    *("general.architecture", "general.type", "adapter.type", "split.count", "attention.sliding_window"),
    *("attention.causal", "rope.scaling.type", "rope.scaling.attn_factor", "rope.scaling.yarn_ext_factor"),
    *("rope.scaling.yarn_attn_factor", "rope.scaling.yarn_log_multiplier", "attention.scale", "embedding_scale"),
    *("residual_scale", "logit_scale", "expert_count", "expert_used_count", "expert_group_count"),
    "expert_group_used_count",
]


@pytest.mark.parametrize(
    ("kind", "names"), [("llama", NOT_IMPLEMENTED), ("qwen2", ["rope.scaling.type", "expert_count"])]
)
def test_a_field_accepts_only_its_supported_values(tmp_path, kind, names):
    """Any other value is refused, and the message names the field."""
    model = llama_of_kind(kind)
    table = SUPPORTED_KIND | SUPPORTED_GGUF
    only = {(name if name in SUPPORTED_KIND else f"llama.{name}"): table[name] for name in names}
    only |= {"general.architecture": [kind]}
    for place in range(max(map(len, only.values()))):
        sound = {field: values[min(place, len(values) - 1)] for field, values in only.items()}
        assert Llama.load(write(tmp_path / "m.gguf", model, changes=sound)).config.model_type == kind
    for field in only:
        with pytest.raises(FileRefused, match=rf"{field.replace('llama', kind)} is 'something', supported: "):
            Llama.load(write(tmp_path / "m.gguf", model, changes={field: "something"}))


# --- quantised blocks: our decoder is the package's, bit for bit ---


def blocks(kind, *shape, seed=0):
    weight = np.random.default_rng(seed).standard_normal(shape).astype("float32")
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("kind", BYTES)
@given(rows=st.integers(1, 5), wide=st.integers(1, 4), seed=st.integers(0, 99))
def test_blocks_are_decoded_as_the_package_does(kind, rows, wide, seed):
    """The bytes are random, so scales can be subnormal, infinite or NaN; there may be any number of leading axes."""
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
def test_a_layer_of_blocks_equals_one_of_decoded_weights(place, kind, dtype):
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
    with pytest.raises(ValueError, match="already quantised, a BlockLinear"):
        quantize(adapted.base)


OF_LAYERS = {
    **{"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q4_0", "ffn_gate": "Q5_0"},
    "token_embd": "Q8_0",  # which is kept as numbers
}


def written(path, *, spoiled=False):
    """Write a model with floats and four quantised types, one of which cannot stay quantised."""

    def coded(name, array):
        kind = next((kind for part, kind in OF_LAYERS.items() if f"{part}." in name), None)
        if kind is None:
            return array, None
        code = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(array, code)
        if spoiled and name == "blk.1.attn_v.weight":
            data[3, :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        return data, code

    sizes = {"vocab_size": 29, "hidden_size": 64, "intermediate_size": 96, "head_dim": 8}
    model = drawn(0, "float32", **sizes, frequencies=frequencies(8, 1e4))
    return write(path, model, changes={"llama.rope.freq_base": 1e4}, coded=coded)


def test_a_model_that_keeps_its_blocks_computes_the_same(tmp_path):
    """It is saved dequantised, and no longer depends on its file."""
    path = written(tmp_path / "m.gguf")
    whole, kept = Llama.load(path), Llama.load(path, keep_blocks=True)
    expected = whole(IDS)
    np.testing.assert_array_equal(kept(IDS), expected)
    kinds = {p.rpartition(".")[2]: layer.kind for p, layer in walk(kept) if isinstance(layer, FrozenQuantizedLinear)}
    assert kinds == {"q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q8_0", "o_proj": "Q4_0"}
    coded = {p: layer for p, layer in walk(kept) if isinstance(layer, BlockLinear)}
    for p, layer in coded.items():
        np.testing.assert_array_equal(layer.weight, dict(walk(whole))[p].weight)
    assert parameter_count(kept) == parameter_count(whole)
    saved = sum(4 * parameter_count(layer) - layer.blocks.nbytes for layer in coded.values())
    assert parameter_bytes(kept) == parameter_bytes(whole) - saved
    save_llama(kept, tmp_path / "folder")
    again = Llama.load(tmp_path / "folder")
    assert not any(isinstance(layer, FrozenQuantizedLinear) for m in (whole, again) for _, layer in walk(m))
    with path.open("r+b") as file:  # in place: a mapping of the file would see it
        file.write(bytes(path.stat().st_size))
    for model in (whole, kept, again):
        np.testing.assert_array_equal(model(IDS), expected)


def test_blocks_with_infinity_are_refused(tmp_path):
    path = written(tmp_path / "m.gguf", spoiled=True)
    for keep_blocks in (False, True):
        with pytest.raises(FileRefused, match=r"layers.1.self_attn.v_proj.weight' holds NaN or infinity"):
            Llama.load(path, keep_blocks=keep_blocks)
