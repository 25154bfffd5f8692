"""``generate`` and ``finetune`` with a begin token, an end token and a split letter; their dtype, rate and base."""

import io
import json
import re
import sys

import numpy as np
import pytest

from minilora import History, Llama, load_adapter
from minilora.guards.tensorfile import TensorFile
from minilora.language import generation as generate

from ..support.language import LETTERS, TEXT, tiny_llama, write_folder
from .test_cli import run

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
END = LETTERS.index(".")
SMALL = ["--steps", "2", "--batch-size", "4", "--length", "8", "--rank", "2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model of 31 tokens, a text, and the working folder in which both lie."""
    write_folder(tmp_path / "model", tiny_llama(vocab=31))
    (tmp_path / "text").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change_tokenizer(change):
    file = "model/tokenizer.json"
    with open(file) as opened:
        tokenizer = json.load(opened)
    change(tokenizer)
    with open(file, "w") as opened:
        json.dump(tokenizer, opened)


def with_begin(tokenizer):
    """Texts begin with <s>, id 30."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] = [{"id": 30, "content": "<s>", **special}]
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [30], "tokens": ["<s>"]}},
    }


def with_bytes(tokenizer):
    """The two bytes of é are ids 29 and 30, each a token."""
    tokenizer["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False
    }  # fmt: skip
    tokenizer["decoder"] = tokenizer["pre_tokenizer"]
    letters = [{" ": "Ġ", "\n": "Ċ"}.get(letter, letter) for letter in LETTERS]
    vocabulary = {token: i for i, token in enumerate([*letters, "Ã", "©"])}
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": []}


def with_words(tokenizer):
    """A space is the sign ▁, and a text does not begin with one: decoded alone, a token loses its space."""
    sign = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    tokenizer["decoder"] = sign
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["▁"] = vocabulary.pop(" ")
    tokenizer["model"]["unk_token"] = "▁"


def says(monkeypatch, *tokens):
    """Let the model choose these tokens, one after the other."""
    left = list(tokens)
    monkeypatch.setattr(generate, "choose", lambda *scores: left.pop(0))
    return left


class Pipe(io.StringIO):
    """What is printed, and what a reader at the other end has seen of it: all up to the last flush."""

    seen = ""

    def flush(self):
        self.seen = self.getvalue()


def spoken(capsys, *more):
    assert run("generate", "a cat", "--model", "model", *more) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("begins", [False, True])
def test_the_prompt_begins_with_the_begin_token_once(folder, capsys, monkeypatch, begins):
    if begins:
        change_tokenizer(with_begin)
    seen, right = [], Llama.extend
    monkeypatch.setattr(
        Llama, "extend", lambda self, ids, past=None: seen.append(ids.tolist()) or right(self, ids, past)
    )
    spoken(capsys, "--tokens", "1")
    assert seen == [[[30] * begins + [LETTERS.index(letter) for letter in "a cat"]]]


def test_generating_stops_at_the_end_token(folder, capsys, monkeypatch):
    left = says(monkeypatch, 1, 2, END, 3, 4)
    assert spoken(capsys, "--tokens", "5") == "a catbc\n"
    assert left == [3, 4]


def test_a_letter_in_two_tokens_is_printed_whole(folder, capsys, monkeypatch):
    change_tokenizer(with_bytes)
    says(monkeypatch, 29, 30, 1)
    assert spoken(capsys, "--tokens", "3") == "a catéb\n"


def test_a_token_keeps_the_space_before_it(folder, capsys, monkeypatch):
    change_tokenizer(with_words)
    says(monkeypatch, LETTERS.index(" "), 1, LETTERS.index(" "), 2)
    assert spoken(capsys, "--tokens", "4") == "a cat b c\n"


def test_each_token_is_seen_before_the_next_is_chosen(folder, monkeypatch):
    left, seen = [1, 2, 3], []
    monkeypatch.setattr(generate, "choose", lambda *a: seen.append(sys.stdout.seen) or left.pop(0))
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert run("generate", "a cat", "--model", "model", "--tokens", "3") == 0
    assert seen == ["a cat", "a catb", "a catbc"]


def test_the_first_loss_is_seen_before_the_training(folder, monkeypatch):
    monkeypatch.setattr(
        "minilora.language.finetuning.session.train", lambda *a, **k: seen.append(sys.stdout.seen) or History()
    )
    monkeypatch.setattr(sys, "stdout", Pipe())
    seen = []
    assert run("finetune", "text", "--save", "a", "--model", "model", *SMALL) == 0
    assert re.fullmatch(r"   0 +\d\.\d{3}", seen[0].splitlines()[-1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_generating_takes_an_adapter_of_any_precision(folder, capsys, dtype):
    assert run("finetune", "text", "--save", "a", "--model", "model", *SMALL, "--dtype", dtype) == 0
    capsys.readouterr()
    assert spoken(capsys, "--adapter", "a", "--tokens", "1").startswith("a cat")


@pytest.mark.parametrize(("dtype", "name"), [("float64", "F64"), ("float32", "F32")])
def test_finetuning_computes_in_the_dtype_it_says(folder, capsys, dtype, name):
    assert run("finetune", "text", "--save", "a", "--model", "model", *SMALL, "--dtype", dtype) == 0
    assert f"parameters in {dtype}" in capsys.readouterr().out
    tensors = TensorFile(folder / "a" / "adapter_model.safetensors").tensors.values()
    assert {spec.dtype for spec in tensors} == {name}


def test_both_commands_compute_where_they_are_told(folder, capsys, standin):
    """What lies on another device than the rest is refused, so everything is there."""
    said, found = {}, {}
    for backend in ("numpy", "cupy"):
        there = ["--model", "model", "--backend", backend]
        assert run("finetune", "text", "--save", backend, *there, *SMALL) == 0
        assert (f", {standin.device}\n" in capsys.readouterr().out) == (backend == "cupy")
        assert run("generate", "a cat", "--adapter", backend, "--temperature", "0", *there) == 0
        said[backend], found[backend] = capsys.readouterr().out, load_adapter(backend)
    assert said["numpy"] == said["cupy"]
    for path, adapter in found["numpy"].items():
        np.testing.assert_allclose(found["cupy"][path].lora_B, adapter.lora_B, atol=1e-5)


def test_a_finetuned_adapter_names_its_base(folder, capsys):
    assert run("finetune", "text", "--save", "a", "--model", "model", *SMALL) == 0
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "model"
    assert (config["r"], config["lora_alpha"]) == (2, 16)


def test_the_default_rate_is_the_one_in_the_help(folder, capsys):
    found = {}
    for more in ([], ["--lr", "3e-3"], ["--lr", "3e-4"]):
        assert run("finetune", "text", "--save", "a", "--model", "model", *SMALL, *more) == 0
        found[" ".join(more)] = next(iter(load_adapter("a").values())).lora_B
    np.testing.assert_array_equal(found[""], found["--lr 3e-3"])
    assert np.abs(found[""] - found["--lr 3e-4"]).max() > 1e-4
