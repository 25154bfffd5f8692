"""A decoder is written as a folder that says what it is."""

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama, RMSNorm, adapt, adapters, merge, save_adapter
from minilora.language import load_tokenizer, save_llama
from minilora.language.files.chattemplate import load_template
from minilora.layer import rebuild, walk
from minilora.layers.rotary import frequencies
from minilora.texts import FileRefused

from ...support.compare import refused
from ...support.gguf_file import llama_of_kind, write
from ...support.language import LETTERS, adapted, drawn, tiny_llama, write_folder

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.mark.parametrize(
    ("kind", "dtype", "biases", "window"),
    [
        ("llama", "float64", set(), {}),
        ("mistral", "float32", set(), {"sliding_window": None}),
        ("qwen2", "float32", {"q_proj", "k_proj", "v_proj"}, {"use_sliding_window": False}),
        ("qwen3", "float32", {"q_proj", "k_proj", "v_proj", "o_proj"}, {"use_sliding_window": False}),
    ],
)
def test_a_decoder_is_written_as_what_it_is(tmp_path, kind, dtype, biases, window):
    """Without a word of special tokens, transformers takes the ids 1 and 2 for those."""
    model = rebuild(llama_of_kind(kind), array=lambda a: a.astype(dtype))
    model.config = dataclasses.replace(model.config, max_position_embeddings=70)
    save_llama(model, tmp_path / "m")
    again = Llama.load(tmp_path / "m", dtype=dtype)
    assert again.config == model.config
    arrays = load_file(tmp_path / "m" / "model.safetensors")
    assert {name.split(".")[-2] for name in arrays if name.endswith("bias")} == biases
    assert {str(array.dtype) for array in arrays.values()} == {dtype}
    np.testing.assert_array_equal(again(IDS), model(IDS))
    for path, layer in walk(again):
        if isinstance(layer, RMSNorm):  # of a Qwen3 of queries and of keys too
            np.testing.assert_array_equal(layer.weight, arrays[f"{path.lstrip('.')}.weight"])
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert {key: value for key, value in config.items() if "sliding" in key} == window
    assert (config["bos_token_id"], config["eos_token_id"], config["torch_dtype"]) == (None, None, dtype)


def test_files_are_on_the_disk_before_their_names_are(tmp_path, monkeypatch):
    synced, folder = [], "/proc/self/fd"
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.path.basename(os.readlink(f"{folder}/{handle}"))))
    save_llama(tiny_llama(), tmp_path / "m")
    assert {"config.json", "model.safetensors"} <= set(synced)


def test_a_base_is_found_from_the_frequencies(tmp_path):
    sizes = {"vocab_size": 29, "intermediate_size": 20, "head_dim": 8}
    save_llama(drawn(0, "float64", **sizes, frequencies=frequencies(8, 1e4)), tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["rope_theta"] == 10_000  # and not a little less, as rounding has it


def test_frequencies_that_no_setting_says_are_refused(tmp_path):
    for by in (1e-9, 1e-3):
        model = tiny_llama()
        first, *rest = model.config.frequencies
        model.config = dataclasses.replace(model.config, frequencies=(first * (1 + by), *rest), rope=None)
        message = "config.json cannot express the model's rotary frequencies: it has only a base and a factor"
        with refused(message, ValueError):
            save_llama(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# --- what stands beside the weights ---

TEMPLATE = "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<end>{% endfor %}"
WORDS = ["<end>", "<turn>", *LETTERS[:26], "ab"]
GGUF_TOKENIZER = {
    "ggml.model": "gpt2", "ggml.pre": "smollm", "ggml.tokens": WORDS, "ggml.merges": ["a b"],
    "ggml.token_type": [3, 3] + [1] * (len(WORDS) - 2), "ggml.eos_token_id": 0, "ggml.bos_token_id": 1,
    "chat_template": TEMPLATE, "chat_template.tool_use": f"tools: {TEMPLATE}",
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    """A model with a tokenizer and templates, in one file."""
    return write(tmp_path / "m.gguf", tiny_llama(dtype="float32"), tokenizer=GGUF_TOKENIZER)


@pytest.mark.parametrize("begins", [False, True])
def test_a_gguf_model_brings_its_tokenizer_and_templates(tmp_path, begins):
    fields = GGUF_TOKENIZER | {"ggml.add_bos_token": begins, "ggml.eot_token_id": 5}
    file = write(tmp_path / "m.gguf", tiny_llama(dtype="float32"), tokenizer=fields)
    save_llama(Llama.load(file), tmp_path / "m")
    theirs, ours = load_tokenizer(file), load_tokenizer(tmp_path / "m")
    text = "cab<turn>ba<end>"
    assert (ours.encode(text), ours.begin, ours.end, ours.last) == (theirs.encode(text), (1,) * begins, {0, 5}, (0,))
    assert ours.spell(ours.encode(text)) == text
    pair = tokenizers.Tokenizer.from_file(f"{tmp_path}/m/tokenizer.json").encode("a", "b").ids
    assert pair == [*ours.begin, *ours.encode("a"), *ours.begin, *ours.encode("b")]
    assert json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "bos_token": WORDS[1], "eos_token": WORDS[0],
    }  # fmt: skip
    said = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert said == {"eos_token_id": [0, 5]} | ({"bos_token_id": 1} if begins else {})
    chat = [{"role": "user", "content": "a"}]
    for tools in (None, [{}]):
        assert load_template(tmp_path / "m").render(chat, tools=tools) == load_template(file).render(chat, tools=tools)


def test_a_gguf_tokenizer_without_a_form_is_refused_before_writing(tmp_path):
    model = Llama.load(write(tmp_path / "m.gguf", tiny_llama(dtype="float32"), tokenizer={"ggml.model": "llama"}))
    with pytest.raises(FileRefused, match=r"its tokenizer is \('llama', None\), expected a byte-level BPE"):
        save_llama(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    model.source = None
    save_llama(model, tmp_path / "m")
    assert sorted(os.listdir(tmp_path / "m")) == ["config.json", "model.safetensors"]


def test_a_folder_brings_its_further_files(tmp_path):
    write_folder(tmp_path / "from", tiny_llama())
    (tmp_path / "from" / "generation_config.json").write_text('{"eos_token_id": 3}')
    model = merge(adapt(Llama.load(tmp_path / "from"), "all-linear", rank=1, alpha=1, rng=np.random.default_rng(0)))
    save_llama(model, tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert load_tokenizer(tmp_path / "to").end == {3}
    assert "eos_token_id" in json.loads((tmp_path / "to" / "config.json").read_text())


def test_a_gguf_model_is_merged_into_a_folder(tmp_path, file, shell, monkeypatch):
    model = adapted(model=Llama.load(file))
    save_adapter(tmp_path / "a", adapters(model))
    command = f"merge {file} {tmp_path}/a -o {tmp_path}/merged"
    assert "--layout and --dry-run apply to safetensors" in shell.refused(command, "--dry-run")
    assert shell(command) == f"14 layers merged into {tmp_path}/merged, in float32 and with the tokenizer\n"
    np.testing.assert_allclose(Llama.load(tmp_path / "merged")(IDS), model(IDS), rtol=1e-4, atol=1e-5)
    assert load_tokenizer(tmp_path / "merged").encode("a") == load_tokenizer(file).encode("a")
    assert "exists, expected an empty or new folder" in shell.refused(command)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = "'.' is the working folder or a mount point, which cannot be replaced"
    assert said in shell.refused(f"merge {file} {tmp_path}/no-adapter -o .")
