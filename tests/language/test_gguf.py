"""Llama decoders in llama.cpp's format: what is read, and one clear error for what is damaged or not supported."""

import struct
import time

import numpy as np
import pytest

from minilora import Llama
from minilora.checks import FileRefused
from minilora.language.gguf import FILE_MUST, MUST
from minilora.language.tokens import load_tokenizer

from ..support.compare import refused
from ..support.gguf_file import llama_of_kind, theirs, write
from ..support.language import tiny_llama

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
    """A Qwen2 keeps the order of its rows, and has three biases."""
    model = llama_of_kind(kind)
    found = Llama.load(write(tmp_path / "m.gguf", model, changes={"llama.context_length": 70}))
    assert (found.config.model_type, found.config.max_position_embeddings) == (read, 70)
    assert found.trainable().keys() == model.trainable().keys()
    for name, array in model.trainable().items():
        np.testing.assert_array_equal(found.trainable()[name], array)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"blk.1.attn_k.bias": None}, "there is no 'model.layers.1.self_attn.k_proj.bias'"),
        ({"blk.0.attn_output.bias": np.ones(12, "f4")}, "there is 'model.layers.0.self_attn.o_proj.bias', which"),
        ({"rope_freqs.weight": np.ones(2, "f4")}, "there is 'rope_freqs.weight', which"),
    ],
)
def test_a_qwen2_has_no_other_arrays(tmp_path, arrays, message):
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


@pytest.mark.parametrize(
    ("fields", "factors", "divided"),
    [
        ({}, [1, 8], (1, 8)),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, None, 4),
        ({"rope.scaling.factor": 4.0}, None, 4),  # of a file without a type llama.cpp takes "linear"
        ({"rope.scale_linear": 4.0}, None, 4),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 4.0}, None, 4),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None, 1),
        ({"rope.scaling.type": "linear"}, None, 1),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None, 1),
        ({"attention.value_length": 4, "rope.dimension_count": 4, "context_length": 7}, None, 1),
    ],
)
def test_a_factor_is_read_as_llama_cpp_reads_it(tmp_path, model, fields, factors, divided):
    arrays = {"rope_freqs.weight": factors and np.array(factors, "f4")}
    changes = {f"llama.{name}": value for name, value in fields.items()}
    found = Llama.load(write(tmp_path / "f.gguf", model, changes=changes, arrays=arrays)).config.frequencies
    np.testing.assert_allclose(found, np.array(model.config.frequencies) / divided, rtol=1e-12)


REFUSED = [
    ({"general.architecture": "gemma"}, {}, "general.architecture is 'gemma', supported: 'llama', 'qwen2'"),
    ({"llama.expert_count": 8}, {}, "llama.expert_count is 8, supported: 0"),
    ({"llama.attention.sliding_window": 64}, {}, "llama.attention.sliding_window is 64, supported: 0"),
    ({"llama.rope.scaling.type": "yarn"}, {}, "llama.rope.scaling.type is 'yarn', supported: 'linear', 'none'"),
    ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}, {},
     "llama.rope.scaling.factor is 4.0 and llama.rope.scale_linear is 2.0: expected one"),
    ({"llama.rope.scaling.factor": -4.0}, {}, "factor must be above 0 and finite, got -4.0"),
    ({"llama.rope.scaling.attn_factor": 1.5}, {}, "llama.rope.scaling.attn_factor is 1.5, supported: 1"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "rms_norm_eps must be a number, got None"),
    ({"llama.rope.dimension_count": 2}, {},
     "llama.rope.dimension_count is 2, supported: 4, the width of a head's keys"),
    ({"llama.attention.value_length": 3}, {},
     "llama.attention.value_length is 3, supported: 4, the width of a head's keys"),
    ({"llama.attention.causal": False}, {}, "llama.attention.causal is False, supported: True"),
    ({"split.count": 2}, {}, "split.count is 2, supported: 0, 1"),
    ({"adapter.type": "lora"}, {}, "adapter.type is 'lora', supported: ''"),
    ({"general.type": "adapter"}, {}, "general.type is 'adapter', supported: 'model'"),
    ({"llama.expert_used_count": 2}, {}, "llama.expert_used_count is 2, supported: 0"),
    ({"llama.block_count": None}, {}, "num_hidden_layers must be an integer, got None"),
    ({"llama.attention.head_count": 0}, {}, "num_attention_heads must be at least 1, got 0"),
    ({"llama.embedding_length": "12"}, {}, "hidden_size must be an integer, got '12'"),
    ({}, {"blk.1.ffn_up.weight": None}, "there is no 'model.layers.1.mlp.up_proj.weight'; 1 arrays are missing in all"),
    ({"llama.vocab_size": None}, {"token_embd.weight": np.ones(9, "f4")},
     "'model.embed_tokens.weight' has shape [9], expected [9, 12]"),
    ({}, {"blk.0.ffn_up.weight": np.ones((12, 20), "f4")},
     "'model.layers.0.mlp.up_proj.weight' has shape [12, 20], expected [20, 12]"),
    ({}, {"blk.9.attn_q.weight": np.ones((2, 2), "f4")},
     "there is 'model.layers.9.self_attn.q_proj.weight', which a Llama decoder of these settings has not"),
    ({}, {"a\x1b[2J": np.ones(2, "f4")}, r"there is 'a\x1b[2J', which a Llama decoder of these settings has not"),
    ({}, {"output_norm.weight": np.ones(12, "i4")}, "Dequantization for I32 is not yet implemented"),
    ({}, {"output_norm.weight": np.full(12, np.nan, "f4")}, "'model.norm.weight' holds NaN or infinity"),
    ({}, {"rope_freqs.weight": np.zeros(2, "f4")}, "rope_freqs.weight is not 2 numbers above 0"),
    ({}, {"rope_freqs.weight": np.ones(3, "f4")}, "rope_freqs.weight is not 2 numbers above 0"),
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
        with pytest.raises(FileRefused, match="not a sound GGUF file"):
            Llama.load(tmp_path / "m.gguf")


def header(*fields):
    """A header without tensors: each field a name, a type and bytes."""
    text = b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + data for name, kind, data in fields)
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(fields)) + text


ARRAY, TEXT, BYTE = 9, 8, 0


@pytest.mark.parametrize("read", [Llama.load, load_tokenizer])
@pytest.mark.parametrize("kind", [BYTE, TEXT, 12, ARRAY])
def test_an_array_longer_than_the_file_is_refused_at_once(tmp_path, read, kind):
    """The package alone goes on for ever: behind the end it finds empty numbers."""
    pytest.importorskip("tokenizers")
    path, start = tmp_path / "m.gguf", time.process_time()
    path.write_bytes(header((b"tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", kind, 1 << 60))))
    with pytest.raises(FileRefused, match=r"would end at byte \d+, and the file has"):
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
def test_a_field_has_its_values_and_no_other(tmp_path, kind, names):
    """And is refused by its own name."""
    model = llama_of_kind(kind)
    only = {(name if name in FILE_MUST else f"llama.{name}"): {**FILE_MUST, **MUST}[name] for name in names}
    only |= {"general.architecture": [kind]}
    for place in range(max(map(len, only.values()))):
        sound = {field: values[min(place, len(values) - 1)] for field, values in only.items()}
        assert Llama.load(write(tmp_path / "m.gguf", model, changes=sound)).config.model_type == kind
    for field in only:
        with pytest.raises(FileRefused, match=rf"{field.replace('llama', kind)} is 'something', supported: "):
            Llama.load(write(tmp_path / "m.gguf", model, changes={field: "something"}))
