"""Llama decoders in llama.cpp's format: what is read, and one clear error for what is damaged or not supported."""

import struct
import time

import numpy as np
import pytest

from minilora import Llama
from minilora.checks import FileRefused
from minilora.language.gguf import FILE_MUST, MUST
from minilora.language.tokens import load_tokenizer

from ..support.gguf_file import llama_of_kind, theirs, write
from ..support.language import tiny_llama

IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.mark.parametrize("vocab", [None, 29])
@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_it_came_from(tmp_path, model, tied, vocab):
    found = Llama.load(write(tmp_path / "m.gguf", model, tied=tied, changes={"llama.vocab_size": vocab}))
    for name, array in model.trainable().items():
        if not (tied and name == "lm_head.weight"):
            np.testing.assert_array_equal(found.trainable()[name], array)
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    if not tied:
        np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-5)


def test_a_qwen2_keeps_its_rows_and_has_three_biases(tmp_path):
    model = llama_of_kind("qwen2")
    found = Llama.load(write(tmp_path / "m.gguf", model, changes={"llama.context_length": 70}))
    assert (found.config.model_type, found.config.max_position_embeddings) == ("qwen2", 70)
    assert found.trainable().keys() == model.trainable().keys()
    for name, array in model.trainable().items():
        np.testing.assert_array_equal(found.trainable()[name], array)


def test_a_mistral_is_a_llama_here(tmp_path):
    model = llama_of_kind("mistral")
    found = Llama.load(write(tmp_path / "m.gguf", model))
    assert found.config.model_type == "llama"
    np.testing.assert_allclose(found(IDS), model(IDS), atol=1e-4)


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


def test_a_qwen2_s_settings_are_refused_by_their_own_names(tmp_path):
    for name, value in (("rope.scaling.type", "yarn"), ("expert_count", 8), ("rope.dimension_count", 2)):
        with pytest.raises(FileRefused, match=f"qwen2.{name} is {value!r}, supported: "):
            Llama.load(write(tmp_path / "m.gguf", llama_of_kind("qwen2"), changes={f"llama.{name}": value}))


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


def test_rotary_frequencies_are_divided_by_their_factors(tmp_path, model):
    plain = Llama.load(write(tmp_path / "m.gguf", model)).config.frequencies
    factors = {"rope_freqs.weight": np.array([1, 8], "f4")}
    found = Llama.load(write(tmp_path / "f.gguf", model, arrays=factors)).config.frequencies
    np.testing.assert_allclose(found, [plain[0], plain[1] / 8], rtol=1e-12)
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    found = Llama.load(write(tmp_path / "l.gguf", model, changes=linear)).config.frequencies
    np.testing.assert_allclose(found, np.array(plain) / 4, rtol=1e-12)


@pytest.mark.parametrize(
    ("fields", "divided"),
    [
        ({"rope.scaling.factor": 4.0}, 4),  # of a file without a type llama.cpp takes "linear"
        ({"rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.factor": 4.0, "rope.scale_linear": 4.0}, 4),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, 1),
        ({"rope.scaling.type": "linear"}, 1),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, 1),
        ({"attention.value_length": 4, "rope.dimension_count": 4, "context_length": 7}, 1),
    ],
)
def test_a_factor_is_read_as_llama_cpp_reads_it(tmp_path, model, fields, divided):
    plain = Llama.load(write(tmp_path / "m.gguf", model)).config.frequencies
    changes = {f"llama.{name}": value for name, value in fields.items()}
    found = Llama.load(write(tmp_path / "f.gguf", model, changes=changes)).config.frequencies
    np.testing.assert_allclose(found, np.array(plain) / divided, rtol=1e-12)


REFUSED = {
    "architecture": ({"general.architecture": "gemma"}, {},
     "general.architecture is 'gemma', supported: 'llama', 'qwen2'"),
    "experts": ({"llama.expert_count": 8}, {}, "llama.expert_count is 8, supported: 0"),
    "window": ({"llama.attention.sliding_window": 64}, {}, "llama.attention.sliding_window is 64, supported: 0"),
    "scaling": ({"llama.rope.scaling.type": "yarn"}, {},
     "llama.rope.scaling.type is 'yarn', supported: 'linear', 'none'"),
    "two factors": ({"llama.rope.scaling.factor": 4.0, "llama.rope.scale_linear": 2.0}, {},
     "llama.rope.scaling.factor is 4.0 and llama.rope.scale_linear is 2.0: expected one"),
    "negative factor": ({"llama.rope.scaling.factor": -4.0}, {}, "factor must be above 0 and finite, got -4.0"),
    "strength": ({"llama.rope.scaling.attn_factor": 1.5}, {}, "llama.rope.scaling.attn_factor is 1.5, supported: 1"),
    "no epsilon": ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "rms_norm_eps must be a number, got None"),
    "half turned": ({"llama.rope.dimension_count": 2}, {},
     "llama.rope.dimension_count is 2, supported: 4, the width of a head's keys"),
    "narrow values": ({"llama.attention.value_length": 3}, {},
     "llama.attention.value_length is 3, supported: 4, the width of a head's keys"),
    "both ways": ({"llama.attention.causal": False}, {}, "llama.attention.causal is False, supported: True"),
    "part": ({"split.count": 2}, {}, "split.count is 2, supported: 0, 1"),
    "adapter": ({"adapter.type": "lora"}, {}, "adapter.type is 'lora', supported: ''"),
    "adapter's kind": ({"general.type": "adapter"}, {}, "general.type is 'adapter', supported: 'model'"),
    "expert used": ({"llama.expert_used_count": 2}, {}, "llama.expert_used_count is 2, supported: 0"),
    "no size": ({"llama.block_count": None}, {}, "num_hidden_layers must be an integer, got None"),
    "size of zero": ({"llama.attention.head_count": 0}, {}, "num_attention_heads must be at least 1, got 0"),
    "size of text": ({"llama.embedding_length": "12"}, {}, "hidden_size must be an integer, got '12'"),
    "missing": ({}, {"blk.1.ffn_up.weight": None},
     "there is no 'model.layers.1.mlp.up_proj.weight'; 1 arrays are missing in all"),
    "flat": ({"llama.vocab_size": None}, {"token_embd.weight": np.ones(9, "f4")},
     "'model.embed_tokens.weight' has shape [9], expected [9, 12]"),
    "turned": ({}, {"blk.0.ffn_up.weight": np.ones((12, 20), "f4")},
     "'model.layers.0.mlp.up_proj.weight' has shape [12, 20], expected [20, 12]"),
    "extra": ({}, {"blk.9.attn_q.weight": np.ones((2, 2), "f4")},
     "there is 'model.layers.9.self_attn.q_proj.weight', which a Llama decoder of these settings has not"),
    "steering": ({}, {"a\x1b[2J": np.ones(2, "f4")},
     r"there is 'a\x1b[2J', which a Llama decoder of these settings has not"),
    "integers": ({}, {"output_norm.weight": np.ones(12, "i4")}, "Dequantization for I32 is not yet implemented"),
    "NaN": ({}, {"output_norm.weight": np.full(12, np.nan, "f4")}, "'model.norm.weight' holds NaN or infinity"),
    "factor of zero": ({}, {"rope_freqs.weight": np.zeros(2, "f4")}, "rope_freqs.weight is not 2 numbers above 0"),
    "factors": ({}, {"rope_freqs.weight": np.ones(3, "f4")}, "rope_freqs.weight is not 2 numbers above 0"),
    "twice": ({}, {"model.norm.weight": np.ones(12, "f4")}, "two of its arrays have the same name in a Llama decoder"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_llama_decoder_is_refused_by_name(tmp_path, model, case):
    changes, arrays, message = REFUSED[case]
    with pytest.raises(FileRefused) as error:
        Llama.load(write(tmp_path / "m.gguf", model, changes=changes, arrays=arrays))
    assert str(error.value) == f"'{tmp_path / 'm.gguf'}': {message}"


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


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_a_field_has_its_values_and_no_other(tmp_path, kind, name):
    model, only = tiny_llama(dtype="float32") if kind == "llama" else llama_of_kind(kind), {**FILE_MUST, **MUST}[name]
    field = name if name in FILE_MUST else f"llama.{name}"
    for value in only if name != "general.architecture" else [kind]:
        assert Llama.load(write(tmp_path / "m.gguf", model, changes={field: value})).config.model_type == kind
    with pytest.raises(FileRefused, match=rf"{field.replace('llama', kind)} is 'something', supported: "):
        Llama.load(write(tmp_path / "m.gguf", model, changes={field: "something"}))
