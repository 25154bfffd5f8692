"""A language model so small that it trains in a blink, and the files in which one comes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import adapt
from minilora.language.config import LlamaConfig, MixtureConfig
from minilora.language.generation import generate
from minilora.language.llama import Llama
from minilora.layer import members, walk
from minilora.losses import IGNORE_INDEX

LETTERS = "abcdefghijklmnopqrstuvwxyz .\n"
CHAT = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"
TEXT = "the cat sat on the mat and the dog sat on the log.\n" * 40


def tiny_llama(seed: int = 0, dtype: str = "float64", vocab: int = len(LETTERS), blocks: int = 2) -> Llama:
    """Two blocks, grouped queries, a head of its own: no two widths are the same."""
    return drawn(seed, dtype, vocab_size=vocab, intermediate_size=20, num_hidden_layers=blocks)


def adapted(targets="all-linear", model: Llama | None = None, **options) -> Llama:
    """Return a model, by default `tiny_llama`'s, with adapters of which no factor is zero."""
    model = adapt(model or tiny_llama(), targets, rank=2, alpha=4, rng=np.random.default_rng(0), **options)
    for i, p in enumerate(model.trainable().values()):
        p += np.random.default_rng(i).standard_normal(p.shape) / 4
    return model


def of_lengths(lengths, width: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and targets of texts of some lengths, of which the last half counts, filled up to one width."""
    rng = np.random.default_rng(1)
    X, Y = rng.integers(0, len(LETTERS), (2, len(lengths), width))
    columns = np.arange(width)
    for y, length in zip(Y, lengths, strict=True):
        y[(columns < length // 2) | (columns >= length)] = IGNORE_INDEX
    return X, Y


def tiny_mixture(kind: str = "mixtral", seed: int = 0, dtype: str = "float64", vocab: int = len(LETTERS)) -> Llama:
    """Two blocks with four experts each, of which a position keeps two."""
    mixture = MixtureConfig(4, 2, 10, shared_expert_intermediate_size=5 if kind == "qwen2_moe" else None)
    return drawn(seed, dtype, vocab_size=vocab, intermediate_size=10, model_type=kind, mixture=mixture)


def drawn(seed: int, dtype: str, **sizes) -> Llama:
    """Return a decoder with random arrays, of some sizes in place of the usual ones."""
    usual = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    usual |= {"head_dim": 4, "rms_norm_eps": 1e-5, "frequencies": (1.0, 0.3)}
    config = LlamaConfig(**usual | sizes)
    rng = np.random.default_rng(seed)
    arrays = {
        name: (rng.standard_normal(shape) * shape[-1] ** -0.5 + (len(shape) == 1)).astype(dtype)
        for name, shape in config.shapes().items()
    }
    return Llama.build(config, arrays)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, a text, and the working folder in which both lie."""
    write_folder(tmp_path / "model", tiny_llama())
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays_of(model) -> dict[str, np.ndarray]:
    """Return every array of a model by its path, copied."""
    found = {}
    for path, layer in walk(model):
        found |= {f"{path}.{name}": part.copy() for name, part in members(layer) if isinstance(part, np.ndarray)}
    return found


def ids_of(text: str) -> list[int]:
    """Return the tokens of a text, by the tokenizer of `write_folder`."""
    return [LETTERS.index(letter) for letter in text]


def greedily(text: str, model: Llama | None = None) -> str:
    """Return what a model, by default the one in the working folder, goes on with, in nine tokens at most."""
    ids = generate(model or Llama.load("model"), ids_of(text), 9, end={LETTERS.index(".")})
    return "".join(LETTERS[i] for i in ids)


def template(text: str) -> None:
    """Give the model in the working folder a chat template."""
    Path("model/tokenizer_config.json").write_text(json.dumps({"chat_template": text}))


def write_folder(folder: Path, model: Llama) -> Path:
    """Write a model as a Hugging Face folder, with a tokenizer that knows letters: id i is `LETTERS[i]`."""
    c = model.config
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "head_dim": c.head_dim,
        "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads, "rms_norm_eps": c.rms_norm_eps, "rope_theta": (1 / 0.3) ** 2,
        "tie_word_embeddings": False, "eos_token_id": LETTERS.index("."),
    }  # fmt: skip
    pieces = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    letters = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": pieces, "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {x: i for i, x in enumerate(LETTERS)}, "unk_token": " "},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(letters))
    save_file({name.lstrip("."): a.astype("f4") for name, a in arrays_of(model).items()}, folder / "model.safetensors")
    return folder
