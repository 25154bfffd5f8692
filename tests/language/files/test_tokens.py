"""Tokenizers of three formats. The oracles are byte counts and glassllm's and transformers' own (tests/peers)."""

import contextlib
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.language.files import gguf as ggufreader
from minilora.language.files.tokens import added_text, load_tokenizer
from minilora.language.text import CONTEXT, token_ids
from minilora.texts import FileRefused

from ...support.compare import calls_of, refused
from ...support.gguf_file import write
from ...support.language import LETTERS, ids_of, tiny_llama, write_folder

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
END = LETTERS.index(".")


def byte_letters():
    """Return how byte-level BPE writes each of the 256 bytes: as GPT-2 began to."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTER = byte_letters()
LETTERS_OF_BYTES = list(LETTER.values())


FIELDS = {"eos": "eos_token_id", "eot": "eot_token_id", "bos": "bos_token_id", "begins": "add_bos_token"}


def write_gguf(path: Path, **changes) -> Path:
    """A tokenizer of all bytes, two merges and two control tokens, and no weights; `changes` instead, None for none."""
    words = ["<end>", "<turn>", *LETTERS_OF_BYTES, "th", "the"]
    fields = {"model": "gpt2", "pre": "smollm", "eos": 0, "tokens": words, "token_type": [3, 3] + [1] * 258}
    fields |= {"merges": ["t h", "th e"]} | changes
    return write(path, tokenizer={f"ggml.{FIELDS.get(name, name)}": value for name, value in fields.items()})


@pytest.fixture
def gguf(tmp_path):
    """A function that writes a GGUF tokenizer and loads it."""
    return lambda **fields: load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))


@pytest.fixture
def of_words(gguf):
    """A function that loads a GGUF tokenizer of some words, of the first kinds, beside the letters of all bytes."""

    def of_words(*words, kinds=(), merges=(), **fields):
        words = [*words, *LETTERS_OF_BYTES]
        kinds = [*kinds, *[1] * (len(words) - len(kinds))]
        found = gguf(tokens=words, token_type=kinds, merges=list(merges) or ["t h"], **fields)
        return found, lambda *these: [words.index(word) for word in these]

    return of_words


@pytest.fixture
def model_dir(tmp_path):
    """A Hugging Face folder whose tokenizer knows letters."""
    return write_folder(tmp_path / "m", tiny_llama())


def change(file, **settings):
    """Set some keys of a JSON file."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | settings))


# --- a GGUF file ----------------------------------------------------------------------------------

TEXTS = ["the other theme", "", " \n\t ", "naïve café, 日本 😀", "don't  x=3.14\r\n", "\ufeff\u2028"]
TEXTS += ["the <turn>café 日本", "  th\n\nthe<end>", "<turn><turn>a"]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2"])
def test_a_gguf_tokenizer_gives_back_every_text(gguf, pre):
    """Every token says where its letters are: one of several tokens is in each of them, and none is in none."""
    found = gguf(pre=pre)
    assert (found.begin, found.end, found.last) == ((), {0}, (0,))
    for text in TEXTS:
        (ids, places), bare = found.tokens(text), text.replace("<turn>", "").replace("<end>", "")
        assert ids == found.encode(text)
        assert (found.decode(ids), found.spell(ids)) == (bare, text)
        control = text.count("<turn>") + text.count("<end>")
        merged = 2 * bare.count("the") + (bare.count("th") - bare.count("the"))
        assert len(ids) == len(places) == len(bare.encode()) - merged + control
        assert {i for start, stop in places for i in range(start, stop)} == set(range(len(text)))
        for number, (start, stop) in zip(ids, places, strict=True):
            assert found.spell([number]) == text[start:stop] or len(text[start:stop].encode()) > 1


def test_a_text_is_split_before_it_is_merged(of_words):
    for pre, words, merges, text, said in (
        ("smollm", ["31"], ["3 1"], "314", ["3", "1", "4"]),  # one digit at a time
        ("qwen2", ["31"], ["3 1"], "314", ["3", "1", "4"]),
        ("gpt-2", ["31"], ["3 1"], "314", ["31", "4"]),
        ("qwen2", ["(t", "th"], ["( t", "t h"], "(th", ["(t", "h"]),  # a mark is joined to the letters after it
        ("gpt-2", ["(t", "th"], ["( t", "t h"], "(th", ["(", "th"]),  # a space alone is
        ("smollm", ["th", "he"], ["t h", "h e", "t h"], "the", ["th", "e"]),  # of a merge that stands twice the first
    ):
        found, ids = of_words(*words, merges=merges, pre=pre)
        assert found.encode(text) == ids(*said)


def test_a_gguf_file_says_how_texts_begin_and_end(gguf):
    for fields, begin, end, last in (
        ({}, (), {0}, (0,)),
        ({"bos": 1, "begins": False}, (), {0}, (0,)),
        ({"bos": 1, "begins": True}, (1,), {0}, (0,)),
        ({"eos": 0, "eot": 1}, (), {0, 1}, (0,)),
        ({"eos": 1, "eot": 0}, (), {0, 1}, (1,)),
        ({"eos": 0, "eom_token_id": 1}, (), {0, 1}, (0,)),
    ):
        found = gguf(**fields)
        assert (found.begin, found.end, found.last, found.encode("th")) == (begin, end, last, [258])


def test_tokens_that_users_defined_are_whole_and_are_text(of_words):
    """Their letters stand for themselves; those of other tokens for bytes, of which é would be half a letter."""
    kinds = {"the cat": 4, "é!": 4, "<unk>": 2}
    kinds |= dict.fromkeys(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"), 3)  # which are always written
    found, ids = of_words(*kinds, "th", kinds=kinds.values())
    text = "a the cat, the catthe cat é!é!é<|channel|>a<|constrain|><|start|><|message|>"
    assert [i for i in found.encode(text) if i < 7] == [0, 0, 0, 1, 1, 3, 6, 5, 4]
    assert found.decode(found.encode(text)) == found.decode(np.array(found.encode(text))) == text
    assert found.encode("a<unk>b") == ids("a", "<unk>", "b")
    assert found.decode(found.encode("a<unk>b")) == "ab"


def test_a_gguf_header_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    path, read = tmp_path / "m.gguf", calls_of(monkeypatch, ggufreader, "read_gguf")
    write_gguf(path)
    assert load_tokenizer(path).last == load_tokenizer(path).last == (0,)
    assert len(read) == 1
    for changes, end in (({"eos": 1}, {1}), ({"eos": 1, "eot": 0}, {0, 1})):  # first of the same size, then time
        os.utime(write_gguf(path, **changes), ns=(0, 1))
        assert load_tokenizer(path).end == end


NAMES = [  # as llama.cpp's src/llama-vocab.cpp has them
    *("<|eot_id|>", "<|im_end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "<|end_of_text|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>"),
    *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
]


@pytest.mark.parametrize(("names", "kind"), [*((NAMES, kind) for kind in (1, 3, 4)), (["</s>", "<|end|>"], 1)])
def test_names_that_llama_cpp_knows_end_a_text(of_words, names, kind):
    """Whatever their types: SmolLM2's file names <|im_end|> alone, and llama.cpp ends at <reponame> too."""
    found, ids = of_words(*names, "<file_sep>", "th", kinds=[*[kind] * len(names), 3], eos=1)
    assert (found.end, found.last) == ({*range(len(names))}, (1,))
    for i, name in enumerate(names):
        assert (found.encode(f"a{name}"), found.decode([i])) == ([*ids("a"), i], "")


@pytest.mark.parametrize(
    ("name", "key"),
    [("<|fim_pad|>", "fim_pad_token_id"), ("<reponame>", "fim_rep_token_id"), ("<|file_sep|>", "fim_sep_token_id")],
)
def test_a_key_takes_the_place_of_the_names_between_files(of_words, name, key):
    found, _ = of_words(name, "<own>", "th", kinds=[1, 3], eos=1, **{key: 1})
    assert found.end == {1}


def test_an_end_within_a_turn_ends_no_text(of_words):
    """As in llama.cpp, also where a key names it: it is a text then."""
    for *words, within in (
        ("<|return|>", "<|call|>", "<|end|>"),
        ("<|flush|>", "<|calls|>", "<|end|>"),
        ("<|tool_response>", "<turn|>", "</s>"),
    ):
        for eos in (0, 2):
            found, _ = of_words(*words, within, "th", kinds=[3, 3, 3], eos=eos)
            assert found.end == {0, 1}
            assert found.decode(found.encode(f"a{within}")) == f"a{within}"
            assert (2 in found.encode(within)) is (within == "<|end|>")


KNOWN = "expected a byte-level BPE ('gpt2') that splits text as 'smollm', 'gpt-2' or 'qwen2' do: "
KNOWN += "use the model's Hugging Face folder"


def test_a_gguf_tokenizer_that_is_none_of_ours_is_refused(gguf, tmp_path):
    for fields, message in (
        ({"begins": True}, "bos_token_id: Expected `int`, got `null` - at `$[0]`"),
        ({"tokens": [*LETTERS_OF_BYTES, "th", "a"], "token_type": [1] * 258},
         "its tokenizer is damaged: a token occurs twice"),
        ({"model": "llama"}, f"its tokenizer is ('llama', 'smollm'), {KNOWN}"),
        ({"pre": "llama-bpe"}, f"its tokenizer is ('gpt2', 'llama-bpe'), {KNOWN}"),
        ({"merges": None}, "there is no 'merges'"),
        ({"tokens": None, "token_type": None}, "there is no 'tokens'"),
        ({"merges": [3, 3]}, "'int' object has no attribute 'split'"),
        ({"token_type": [3, 3]}, "zip() argument 2 is shorter than argument 1"),
    ):  # fmt: skip
        with refused(f"'{tmp_path}/m.gguf': {message}"):
            gguf(**fields)


# --- a Hugging Face folder ------------------------------------------------------------------------


def test_a_folder_has_its_tokenizer_and_its_end(model_dir):
    found = load_tokenizer(model_dir)
    assert found.encode("the cat.") == ids_of("the cat.")
    assert found.decode(np.array(found.encode("the\ncat."))) == "the\ncat."
    assert (found.begin, found.end, found.last) == ((), {END}, (END,))
    for end, expected in ((0, {0}), ([3, 5], {3, 5}), (None, frozenset())):  # transformers does not look further then
        change(model_dir / "generation_config.json", eos_token_id=end)
        assert load_tokenizer(model_dir).end == expected
    (model_dir / "generation_config.json").write_text("{}")
    assert load_tokenizer(model_dir).end == frozenset()


def test_a_training_text_ends_as_the_second_file_says(model_dir):
    for eos, letter in (("z", "z"), ({"content": "z"}, "z"), (LETTERS[0], LETTERS[0])):
        change(model_dir / "tokenizer_config.json", eos_token=eos)
        found = load_tokenizer(model_dir)
        assert (found.last, found.end) == ((LETTERS.index(letter),), {END})
    for name in ("config.json", "tokenizer_config.json"):
        (model_dir / name).write_text("{}")
    found = load_tokenizer(model_dir)
    assert (found.last, found.end) == ((), frozenset())


def add_template(folder, *around):
    """Give a folder's tokenizer a template, "A" for the text."""
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    ids = {"<s>": 29, "</s>": 30}
    part = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in ids}
    pieces = [(part | {"A": {"Sequence": {"id": "A", "type_id": 0}}})[name] for name in around]
    processor = {
        "type": "TemplateProcessing", "single": pieces, "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
    }  # fmt: skip
    added = [{"id": i, "content": name, **special} for name, i in ids.items()]
    change(folder / "tokenizer.json", added_tokens=added, post_processor=processor)


@pytest.mark.parametrize(
    ("around", "begin"),
    [
        (("<s>", "A"), (29,)),
        (("<s>", "<s>", "A", "</s>", "<s>"), (29, 29)),
        (("A", "</s>"), ()),
        (("</s>", "<s>", "A"), (30, 29)),
    ],
)
def test_what_a_text_begins_with_comes_before_it(model_dir, around, begin):
    """Whichever words it knows. It is neither cut nor padded: transformers resets both settings with each call.

    Version 5 of transformers passes over add_bos_token where there is a template.
    """
    add_template(model_dir, *around)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None}
    fill |= {"pad_id": 28, "pad_type_id": 0, "pad_token": "x"}
    change(model_dir / "tokenizer.json", truncation=cut, padding=fill)
    beside = {"add_bos_token": False, "added_tokens_decoder": {"29": {"content": "<s>"}}, "model_max_length": 3}
    change(model_dir / "tokenizer_config.json", **beside)
    found = load_tokenizer(model_dir)
    assert (found.begin, found.encode("abcdefg")) == (begin, [0, 1, 2, 3, 4, 5, 6])
    (model_dir / "tokenizer_config.json").unlink()
    change(model_dir / "tokenizer.json", model={"type": "WordLevel", "vocab": {"q": 0}, "unk_token": "no such token"})
    assert load_tokenizer(model_dir).begin == begin


def byte_level(folder):
    """Give a folder a byte-level BPE in the place of its tokenizer."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(LETTERS_OF_BYTES)}, []))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(whole.to_str())


def test_tokens_that_the_second_file_names_are_special(model_dir):
    byte_level(model_dir)
    for beside in (
        {"pad_token": "[P]"},
        {"pad_token": {"content": "[P]", "lstrip": False}},
        {"image_token": "[P]"},
        {"additional_special_tokens": ["[P]"]},
        {"extra_special_tokens": ["[P]"]},
        {"extra_special_tokens": {"image_token": "[P]"}},
    ):
        (model_dir / "tokenizer_config.json").write_text(json.dumps(beside))
        found = load_tokenizer(model_dir)
        assert found.encode("a[P]b") == [LETTERS_OF_BYTES.index("a"), 256, LETTERS_OF_BYTES.index("b")]
        assert found.decode(found.encode("a[P]b")) == "ab"


@pytest.mark.parametrize(
    ("flag", "text", "count"),
    [("lstrip", "a [P]b", 3), ("rstrip", "a[P] b", 3), ("single_word", "a[P]b", 5), ("normalized", "a[p]b", 3)],
)
def test_a_special_token_keeps_each_of_its_flags(model_dir, flag, text, count):
    """Beside a normalizer that makes letters small; without its flag the text has another number of tokens."""
    byte_level(model_dir)
    change(model_dir / "tokenizer.json", normalizer={"type": "Lowercase"})
    for value in (False, True):
        change(model_dir / "tokenizer_config.json", pad_token={"content": "[P]", flag: value})
        assert (len(load_tokenizer(model_dir).encode(text)) == count) is value


@pytest.mark.parametrize(
    ("end", "kinds"),
    [
        (
            "<|endoftext|>",
            [("qwen2", "LlamaTokenizer"), ("qwen2_moe", ""), ("qwen3_moe", ""), ("gpt", "GPT2Tokenizer")],
        ),
        ("</s>", [("llama", "LlamaTokenizerFast"), ("qwen3", "LlamaTokenizer"), ("", "CodeLlamaTokenizer")]),
        ("", [("mistral", "LlamaTokenizer"), ("mixtral", "LlamaTokenizerFast"), ("llama", ""), ("qwen", "")]),
    ],
)
def test_special_tokens_that_nothing_names_are_those_of_the_class(model_dir, end, kinds):
    """As transformers has it: the kind of a model can say more than the class that its files name."""
    for kind, name in kinds:
        for place in ("config", "tokenizer_config"):
            for file in ("config", "tokenizer_config"):
                said = {"model_type": kind} if file == "config" else {}
                said |= {"tokenizer_class": name} if file == place else {}
                (model_dir / f"{file}.json").write_text(json.dumps(said))
            found = load_tokenizer(model_dir)
            assert found.spell(found.last) == end


def test_a_token_of_the_vocabulary_becomes_special_with_its_id(model_dir):
    byte_level(model_dir)
    change(model_dir / "tokenizer_config.json", eos_token="z")
    found, z, y = load_tokenizer(model_dir), *map(LETTERS_OF_BYTES.index, "zy")
    assert (found.encode("z"), found.last, found.decode([z])) == ([z], (z,), "")
    change(model_dir / "special_tokens_map.json", eos_token={"content": "y"})  # of older files
    assert load_tokenizer(model_dir).last == (y,)
    change(model_dir / "tokenizer_config.json", added_tokens_decoder={})  # newer ones pass over that file,
    change(model_dir / "added_tokens.json", **{"<x>": 256})  # and over this one
    assert load_tokenizer(model_dir).last == (z,)
    change(model_dir / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")  # which is passed over: it has bytes
    assert len(load_tokenizer(model_dir).encode("<unk>")) == 5


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        *(("tokenizer_config", {"added_tokens_decoder": {i: added}}, f"it adds {said}, but tokenizer.json does not")
          for i, added, said in [("5", {"content": "<x>"}, "'<x>' as token '5'"), ("x", {}, "None as token 'x'"),
                                 ("29", {"content": "</s>"}, "'</s>' as token '29'")]),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "'list' object has no attribute 'items'"),
        ("added_tokens", {"<x>": 256}, "it adds '<x>' as token '256', but tokenizer.json does not"),
        ("tokenizer_config", {"split_special_tokens": True},
         "split_special_tokens is True, supported: False (else special tokens are split up)"),
        ("tokenizer_config", {"extra_special_tokens": [3]}, "a special token is 3, expected a string"),
        ("tokenizer", {"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}},
         "dropout is 0.5, supported: null (else a text gets different ids each time)"),
        *(("generation_config", {"eos_token_id": end}, f"Expected `int{said}")
          for end, said in [
              *((end, f" | array | null`, got `{kind}` - at `$.eos_token_id`")
                for end, kind in [(True, "bool"), (2.0, "float"), ("2", "str"), ({"id": 2}, "object")]),
              ([[2]], "`, got `array` - at `$.eos_token_id[0]`"),
              ([1, None], "`, got `null` - at `$.eos_token_id[1]`"),
              ([-1], "` >= 0 - at `$.eos_token_id[0]`"),
          ]),
        ("config", {"eos_token_id": [-1]}, "Expected `int` >= 0 - at `$.eos_token_id[0]`"),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_the_tokenizer_is_refused(model_dir, file, settings, message):
    """A 2.0 or true would be taken for the token 2 or 1, and a text would end no generation."""
    add_template(model_dir, "<s>", "A")
    change(model_dir / f"{file}.json", **settings)
    with refused(f"'{model_dir}/{file}.json': {message}"):
        load_tokenizer(model_dir)


# --- glassllm's -----------------------------------------------------------------------------------


def test_glassllms_tokenizer_is_its_own():
    """Its tokens say where their letters are: accents, parts of letters, and a letter that is composed of two."""
    glassllm = pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    plain = "In the beginning was the Word,\nand the Word was with God."
    apart = "Cafe\u0301 in a\u0323\u0308 a\u0327\u0301 \u1112\u1161\u11ab, \u0958 said"
    found = load_tokenizer(Path(glassllm.__file__).parent / "weights" / "en.npz")
    own = glassllm.load_pretrained("en")[1]
    assert found.decode(found.encode(plain)) == plain
    assert own.tokens(list(found.end)) == ["<eos>"]
    for text in (plain, "The king\n said unto 日!", apart):
        ids, places = found.tokens(text)
        assert ids == found.encode(text) == own.encode(text)
        assert {i for start, stop in places for i in range(start, stop)} == set(range(len(text)))
        for number, (start, stop) in zip(ids, places, strict=True):
            assert start < stop
            assert number == 1 or found.decode([number]) == text[start:stop]
        assert "".join(text[a:b] for a, b in places) == text or text == apart
    assert found.spell([*ids[:2], *found.last]) == found.decode(ids[:2]) + "<eos>"
    assert found.last == (3,)


# --- what is damaged, too large or not there ------------------------------------------------------


NESTED = b"[" * 200_000 + b"]" * 200_000  # deeper than the JSON reader of any Python goes
DAMAGED = [  # a model, one of its files with its bytes or their number, and the message
    ("m.gguf", "m.gguf", b"GGUF\x03\0\0\0",
     "m.gguf': not a valid GGUF file: ValueError: its contents would end at byte 24, but the file has only 8 bytes"),
    ("nowhere.gguf", "m.gguf", b"", "nowhere.gguf': No such file or directory"),
    ("m", "m/config.json", b"{}", "tokenizer.json': No such file or directory"),
    ("m", "m/tokenizer.json", b"{", "tokenizer.json': Cannot instantiate Tokenizer from buffer: EOF"),
    ("m", "m/tokenizer.json", 1 << 35,
     "tokenizer.json': larger than 268435456 bytes, the limit for such a file"),
    ("m.npz", "m.npz", b"", "m.tokenizer.json': No such file or directory"),
    ("m.npz", "m.tokenizer.json", b'{"version": 1, "alphabet": ' + NESTED + b', "merges": []}', "recursion"),
]  # fmt: skip


def test_a_damaged_tokenizer_is_one_clear_error(tmp_path):
    pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    (tmp_path / "m").mkdir()
    for model, name, data, message in DAMAGED:
        with open(tmp_path / name, "wb") as file:
            file.truncate(data) if isinstance(data, int) else file.write(data)
        with pytest.raises(FileRefused, match=re.escape(message)):
            load_tokenizer(tmp_path / model)


@pytest.mark.parametrize(
    ("name", "package", "why"),
    [("m.gguf", "gguf", "a .gguf file"), ("m", "tokenizers", "tokenizer.json"), ("m.npz", "glassllm", "an .npz file")],
)
def test_a_missing_package_is_named(tmp_path, name, package, why, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).mkdir() if name == "m" else (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^{why} needs {package} .*: pip install \"minilora\[(files|models)\]"):
        load_tokenizer(tmp_path / name)


def test_a_text_without_tokens_is_one_clear_error(model_dir):
    words = json.loads((model_dir / "tokenizer.json").read_text())["model"]
    change(model_dir / "tokenizer.json", model=words | {"unk_token": "no such token"})
    found = load_tokenizer(model_dir)
    assert found.encode("the") == ids_of("the")
    with pytest.raises(FileRefused, match=r"tokenizer.json': WordLevel error: Missing") as error:
        found.encode("th\x1b\u00e9" * 1000)
    assert len(str(error.value)) < 1300
    assert str(error.value).isprintable()


class PanicException(BaseException):
    """What the package raises where its Rust code panics: no Exception."""


@pytest.mark.parametrize(
    ("raised", "expected"), [(PanicException, FileRefused), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_panic_of_the_package_is_one_clear_error(model_dir, monkeypatch, raised, expected):
    read = tokenizers.Tokenizer.from_buffer

    class Panicking(SimpleNamespace):
        def __getattr__(self, name):
            return getattr(self.right, name)

        def encode(self, text, **options):
            if text == "panic":
                raise raised("range end index")
            return self.right.encode(text, **options)

    monkeypatch.setattr(tokenizers, "Tokenizer", SimpleNamespace(from_buffer=lambda data: Panicking(right=read(data))))
    found = load_tokenizer(model_dir)
    assert found.encode("a") == [0]
    with pytest.raises(expected, match="range end index"):
        found.encode("panic")


PANICKING = {
    "while the file is read": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
    "before a text": {"post_processor": {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}], "pair": [],
        "special_tokens": {"gone": {"id": "gone", "ids": [], "tokens": ["gone"]}},
    }},
}  # fmt: skip


@pytest.mark.parametrize("when", PANICKING)
def test_a_panic_prints_no_lines_of_its_own(model_dir, capfd, when):
    change(model_dir / "tokenizer.json", **PANICKING[when])
    with contextlib.suppress(FileRefused):
        load_tokenizer(model_dir).encode("the")
    os.write(2, b"stderr is back")
    assert capfd.readouterr().err == "stderr is back"


def replace_by(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


GROWING = [
    ("normalizer", {"type": "Sequence", "normalizers": [replace_by("a" * 16)] * 7}, 16**7),
    (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [replace_by("x" * 65)]}]},
        65,
    ),
    ("decoder", {"type": "Sequence", "decoders": [replace_by("ab" * 10)] * 2}, 400),
]


@pytest.mark.parametrize(("part", "steps", "times"), GROWING)
def test_a_tokenizer_that_multiplies_texts_is_refused(model_dir, part, steps, times):
    change(model_dir / "tokenizer.json", **{part: steps})
    with refused(
        f"'{model_dir / 'tokenizer.json'}': its {part} can make a text {times:,} times longer, supported: 64 times"
    ):
        load_tokenizer(model_dir)


def test_usual_replacements_are_read(model_dir):
    steps = [replace_by("\u2581", " "), replace_by(""), {"type": "NFKC"}, replace_by("x" * 64, "y")]
    change(model_dir / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert load_tokenizer(model_dir).encode("tha") == ids_of("th")


# --- a long text, and a continuation --------------------------------------------------------------


def trained(kind, corpus):
    """A tokenizer of the package, learned from a text: as GPT-2, Llama 2 and T5 have theirs."""
    models, trainers, before = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    options = {"vocab_size": 400, "special_tokens": ["?"], "show_progress": False}
    model, trainer, split, more = {
        "bytes": (
            models.BPE(),
            trainers.BpeTrainer,
            before.ByteLevel(),
            {"initial_alphabet": before.ByteLevel.alphabet()},
        ),
        "sentences": (models.BPE(unk_token="?"), trainers.BpeTrainer, before.Metaspace(), {}),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, before.Metaspace(), {"unk_token": "?"}),
    }[kind]
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = split
    made.train_from_iterator([corpus], trainer(**options, **more))
    if kind != "bytes":  # the whole text is one word
        normal = tokenizers.normalizers
        made.normalizer = normal.Sequence([normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")])
        made.pre_tokenizer = None
    return made


@pytest.mark.parametrize("kind", ["bytes", "sentences", "unigram"])
def test_a_long_text_has_the_same_ids_in_pieces(model_dir, monkeypatch, kind):
    monkeypatch.setattr("minilora.language.text.PIECE_CHARACTERS", 1000)
    corpus = re.sub("-+", "-", Path(__file__).read_text(encoding="utf-8"))[:5000]  # of a long run two ways are likely
    trained(kind, corpus).save(str(model_dir / "tokenizer.json"))
    encode = load_tokenizer(model_dir).encode
    noise = "".join(np.random.default_rng(0).choice([*" \n\t,.abcé日"], 3_000))
    asked = []
    for text in (noise, "a" * 2500, " \n" * 1000, "日本" * 1000, "abc" * 800, corpus):
        asked.clear()
        assert token_ids(text, lambda part: asked.append(part) or encode(part)) == encode(text)
    assert max(map(len, asked)) <= 1000 + CONTEXT


def test_a_continuation_begins_where_the_prompt_ends_as_decoded():
    """By a decoder that composes e and its accent, as some tokenizers' normalisers do."""

    def composed(ids):
        return "".join(chr(i) for i in ids).replace("e\u0301", "\u00e9")

    before = [ord(letter) for letter in "cafe\u0301 "]
    assert [*added_text([ord("x"), ord("y")], before, composed)] == ["x", "y"]


def test_a_letter_of_several_tokens_comes_whole():
    for before, added, pieces in (
        (b"prompt ", "a\u65e5b".encode(), ["a", "\u65e5", "b"]),
        (b"", "a\u65e5".encode()[:-1], ["a"]),  # of one that never ends nothing
        (b"", b"\xffab", ["\ufffda", "b"]),  # what is no letter holds nothing back for long
    ):
        assert [*added_text(added, before, lambda ids: bytes(ids).decode("utf-8", errors="replace"))] == pieces
