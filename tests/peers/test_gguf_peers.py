"""Models and tokenizers in .gguf files, as llama.cpp's converter writes them, beside transformers and package gguf."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Llama, load_adapter
from minilora.language.files.ggufexport import export_adapter
from minilora.language.files.tokens import load_tokenizer

from ..support.peers import (
    LINEARS,
    PEERS,
    SCALINGS,
    close,
    ids_of,
    logits_of,
    read_again,
    transformers,
    with_peft,
    write_gguf,
    written,
)

pytestmark = PEERS
gguf = pytest.importorskip("gguf")


def converted(folder, kind="F32", **changes):
    """A Llama of transformers, its folder as ours reads it, and the .gguf file of its arrays, in blocks of 32."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 8, "rope_parameters": SCALINGS[1], "tie_word_embeddings": True} | changes
    theirs = written(folder / "base", "llama", 10, **sizes)
    base = Llama.load(folder / "base")
    left_out = ["lm_head.weight"] * sizes["tie_word_embeddings"]
    arrays = {name: array for name, array in base.trainable().items() if name not in left_out}
    return theirs, base, write_gguf(folder / "model.gguf", theirs.config, arrays, kind)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_gguf_file_is_the_folder_it_came_from(tmp_path, tied, bias):
    theirs, base, path = converted(tmp_path, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias)
    ids = ids_of(theirs, 10)
    np.testing.assert_allclose(Llama.load(path)(ids), base(ids), atol=1e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_quantised_weights_are_those_of_the_gguf_package(tmp_path, kind):
    _, base, path = converted(tmp_path, kind)
    found, wanted = Llama.load(path).trainable(), gguf.GGMLQuantizationType[kind]
    for name, array in base.trainable().items():
        if array.ndim > 1:
            array = gguf.dequantize(gguf.quantize(array, wanted), wanted)  # row by row: their order does not matter
        np.testing.assert_array_equal(found[name], array)


def in_transformers(kind, path):
    """The model that transformers reads from a .gguf file."""
    how = {"gguf_file": path.name, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return read_again(kind, path.parent, **how)


@pytest.fixture
def qwen2(tmp_path, double):
    """A Qwen2 of transformers, its folder and its .gguf file; head_dim is hidden_size / heads, as in real ones."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    theirs = written(tmp_path / "m", "qwen2", 11, **sizes, tie_word_embeddings=False, rope_parameters=SCALINGS[1])
    arrays = {name: p.detach().float().numpy() for name, p in theirs.named_parameters()}
    return theirs, tmp_path / "m", write_gguf(tmp_path / "m.gguf", theirs.config, arrays)


def test_a_qwen2_gguf_is_what_transformers_reads_from_it(qwen2):
    theirs, folder, path = qwen2
    ids = ids_of(theirs, 1)
    ours = Llama.load(path, dtype="float64")
    assert (ours.config.model_type, ours.config.max_position_embeddings) == ("qwen2", 64)
    close(ours(ids), logits_of(in_transformers("qwen2", path), ids), 1e-6)  # its base and eps are float32's
    close(ours(ids), Llama.load(folder, dtype="float64")(ids), 1e-6)


def test_an_exported_adapter_of_a_qwen2_keeps_its_rows(qwen2, tmp_path):
    theirs, folder, path = qwen2
    tuned = with_peft(theirs, target_modules=LINEARS)
    tuned.save_pretrained(tmp_path / "adapter")
    for model in (folder, path):
        names = export_adapter(tmp_path / "adapter", model, tmp_path / "a.gguf")
        reader = gguf.GGUFReader(tmp_path / "a.gguf")
        assert reader.fields["general.architecture"].contents() == "qwen2"
        found = {tensor.name: tensor.data for tensor in reader.tensors}
        assert sorted(found) == sorted(names)
        for module, adapter in load_adapter(tmp_path / "adapter").items():
            if module.endswith(("q_proj", "k_proj")):
                layer, which = module.split(".")[2], module[-6]
                np.testing.assert_allclose(found[f"blk.{layer}.attn_{which}.weight.lora_b"], adapter.lora_B, rtol=1e-6)


TEXT = st.text(st.sampled_from("aAbLlStT'dvVeErRmM 019 \n\r\t(.-_é日😀\u00a0"), max_size=30)


@pytest.fixture(scope="module")
def qwen2_tokenizers(tmp_path_factory):
    """Transformers' tokenizer and ours of one .gguf file, with merges that reach across letters, digits and marks."""
    letters = sorted(pytest.importorskip("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in "aAlLstT'rvE(.Ġ0Ċč" for b in "aLlsStTeE'd.1ĠĊč"]
    words = [*letters, *("".join(pair) for pair in pairs)]
    theirs = transformers.Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=pairs)
    theirs._tokenizer.normalizer = None  # llama.cpp leaves a text as it is written
    path = tmp_path_factory.mktemp("tokens") / "m.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return theirs, load_tokenizer(path)


@given(text=TEXT)
@settings(max_examples=500, deadline=None)
def test_a_qwen2_gguf_splits_a_text_as_transformers_does(qwen2_tokenizers, text):
    theirs, ours = qwen2_tokenizers
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text


def test_smollm2_is_what_transformers_reads_from_its_file(smollm2, double):
    ids = np.random.default_rng(0).integers(0, 49152, (1, 40))
    close(Llama.load(smollm2, dtype="float64")(ids), logits_of(in_transformers("llama", smollm2), ids), 1e-9)


def test_smollm2s_tokens_are_those_of_transformers(smollm2):
    ours = load_tokenizer(smollm2)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in (
        "In the beginning God created the heaven and the earth.\n\n  And 1234,5 lines",
        "naïve café 日本語 😀 don't I'll  \t x=3.14; <|im_start|>user\nhi<|im_end|>\r\n",
        "".join(chr(c) for c in range(1, 1000)),
    ):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    # llama.cpp knows two more by their names.
    assert theirs.eos_token == "<|im_end|>"
    assert ours.end == {*theirs.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>", "<reponame>"])}
