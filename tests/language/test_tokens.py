"""Tokenizers of three formats. The oracles are byte counts and glassllm's and transformers' own (tests/peers)."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from minilora.checks import FileRefused
from minilora.language import gguf as ggufreader
from minilora.language import tokens
from minilora.language.text import CONTEXT, token_ids
from minilora.language.tokens import added_text, load_tokenizer

from ..support.language import LETTERS, ids_of, tiny_llama, write_folder

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
END = LETTERS.index(".")


def byte_letters():
    """Return how byte-level BPE writes each of the 256 bytes: as GPT-2 began to."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTER = byte_letters()
LETTERS_OF_BYTES = list(LETTER.values())


def write_gguf(path: Path, *, model="gpt2", pre="smollm", eos=0, bos=None, begins=None, eot=None, **others) -> Path:
    """A tokenizer of all bytes, two merges and two control tokens, and no weights; `others` instead, None for none."""
    gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    words = ["<end>", "<turn>", *LETTERS_OF_BYTES, "th", "the"]
    kinds = [3, 3] + [1] * (len(words) - 2)
    fields = {"tokens": words, "token_type": kinds, "merges": ["t h", "th e"]} | others
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_eos_token_id(eos)
    adds = {writer.add_bos_token_id: bos, writer.add_add_bos_token: begins, writer.add_eot_token_id: eot}
    for add, value in adds.items():
        if value is not None:
            add(value)
    for name, values in fields.items():
        if values is not None:
            writer.add_array(f"tokenizer.ggml.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


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
@pytest.mark.parametrize("text", TEXTS)
def test_a_gguf_tokenizer_gives_back_every_text(gguf, text, pre):
    """Every token says where its letters are: one of several tokens is in each of them, and none is in none."""
    found = gguf(pre=pre)
    (ids, places), bare = found.tokens(text), text.replace("<turn>", "").replace("<end>", "")
    assert ids == found.encode(text)
    assert (found.decode(ids), found.spell(ids)) == (bare, text)
    control = text.count("<turn>") + text.count("<end>")
    merged = 2 * bare.count("the") + (bare.count("th") - bare.count("the"))
    assert len(ids) == len(places) == len(bare.encode()) - merged + control
    assert (found.begin, found.end, found.last) == ((), {0}, (0,))
    assert {i for start, stop in places for i in range(start, stop)} == set(range(len(text)))
    for number, (start, stop) in zip(ids, places, strict=True):
        assert found.spell([number]) == text[start:stop] or len(text[start:stop].encode()) > 1


@pytest.mark.parametrize(
    ("pre", "words", "merges", "text", "said"),
    [
        *((pre, ["31"], ["3 1"], "314", ["3", "1", "4"]) for pre in ("smollm", "qwen2")),  # one digit at a time
        ("gpt-2", ["31"], ["3 1"], "314", ["31", "4"]),
        ("qwen2", ["(t", "th"], ["( t", "t h"], "(th", ["(t", "h"]),  # a mark is joined to the letters after it
        ("gpt-2", ["(t", "th"], ["( t", "t h"], "(th", ["(", "th"]),  # a space alone is
        ("smollm", ["th", "he"], ["t h", "h e", "t h"], "the", ["th", "e"]),  # of a merge that stands twice the first
    ],
)
def test_a_text_is_split_before_it_is_merged(of_words, pre, words, merges, text, said):
    found, ids = of_words(*words, merges=merges, pre=pre)
    assert found.encode(text) == ids(*said)


@pytest.mark.parametrize(
    ("fields", "begin", "end", "last"),
    [
        ({}, (), {0}, (0,)),
        ({"bos": 1}, (), {0}, (0,)),
        ({"bos": 1, "begins": False}, (), {0}, (0,)),
        ({"bos": 1, "begins": True}, (1,), {0}, (0,)),
        ({"eos": 1}, (), {1}, (1,)),
        ({"eos": 0, "eot": 1}, (), {0, 1}, (0,)),
        ({"eos": 1, "eot": 0}, (), {0, 1}, (1,)),
    ],
)
def test_a_gguf_file_says_how_texts_begin_and_end(gguf, fields, begin, end, last):
    found = gguf(**fields)
    assert (found.begin, found.end, found.last, found.encode("th")) == (begin, end, last, [258])


def test_tokens_that_users_defined_are_whole_and_are_text(gguf):
    """Their letters stand for themselves; those of other tokens for bytes, of which é would be half a letter."""
    words = [*LETTERS_OF_BYTES, "the cat", "é!", "<unk>", "th"]
    found = gguf(tokens=words, token_type=[1] * 256 + [4, 4, 2, 1], merges=["t h"])
    text = "a the cat, the catthe cat é!é!é"
    ids = found.encode(text)
    assert [i for i in ids if i >= 256] == [256, 256, 256, 257, 257]
    assert found.decode(ids) == found.decode(np.array(ids)) == text
    assert found.decode(found.encode("a<unk>b")) == "ab"
    assert len(found.encode("a<unk>b")) == 3


def test_a_gguf_header_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    path, read, right = tmp_path / "m.gguf", [], ggufreader.read_gguf
    monkeypatch.setattr(ggufreader, "read_gguf", lambda *a, **k: read.append(a) or right(*a, **k))
    write_gguf(path)
    assert load_tokenizer(path).last == load_tokenizer(path).last == (0,)
    assert len(read) == 1
    path.unlink()
    write_gguf(path, eos=1, eot=0)
    assert load_tokenizer(path).last == (1,)


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5, 6, 7])
def test_ends_that_llama_cpp_knows_end_a_text(of_words, kind):
    """SmolLM2's file names <|im_end|> alone; llama.cpp ends at <|endoftext|> and <reponame> too."""
    words, kinds = ["<|endoftext|>", "<|im_end|>", "<reponame>", "<file_sep>", "th"], [3, kind, kind, 3]
    found, ids = of_words(*words, kinds=kinds, eos=1)
    assert (found.end, found.last) == ({0, 1, 2}, (1,))
    assert found.encode("a<|im_end|><reponame>") == [*ids("a"), 1, 2]
    assert found.decode([1]) == ""


@pytest.mark.parametrize(
    ("others", "within"),
    [
        (("<|return|>", "<|call|>"), "<|end|>"),
        (("<|flush|>", "<|calls|>"), "<|end|>"),
        (("<|return|>", "<|calls|>"), "<|end|>"),
        (("<|tool_response>", "<turn|>"), "</s>"),
    ],
)
@pytest.mark.parametrize("eos", [0, 2])
def test_an_end_within_a_turn_ends_no_text(of_words, others, within, eos):
    """As in llama.cpp, also where a key names it: it is a text then."""
    found, _ = of_words(*others, within, "th", kinds=[3, 3, 3], eos=eos)
    assert found.end == {0, 1}
    assert found.decode(found.encode(f"a{within}")) == f"a{within}"
    assert (2 in found.encode(within)) is (within == "<|end|>")


@pytest.mark.parametrize(
    "name",
    [
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
        *("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "[e~[", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        *("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    ],
)  # as llama.cpp's src/llama-vocab.cpp has them
def test_a_name_that_llama_cpp_knows_ends_a_text(of_words, name):
    found, _ = of_words("<end>", name, "th", kinds=[3])
    assert found.end == {0, 1}
    assert (found.encode(name), found.decode([1])) == ([1], "")


def test_a_channel_s_name_is_always_written(of_words):
    found, ids = of_words("<end>", "<|channel|>", "th", kinds=[3, 3])
    assert found.encode("<|channel|>a") == [1, *ids("a")]
    assert found.decode([1, *ids("a")]) == "<|channel|>a"


KNOWN = "expected a byte-level BPE ('gpt2') that splits text as 'smollm', 'gpt-2' or 'qwen2' do: "
KNOWN += "take the model's Hugging Face folder"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begins": True}, "bos_token_id: Expected `int`, got `null` - at `$[0]`"),
        ({"tokens": [*LETTERS_OF_BYTES, "th", "a"], "token_type": [1] * 258},
         "its tokenizer is damaged: a token stands twice"),
        ({"model": "llama"}, f"its tokenizer is ('llama', 'smollm'), {KNOWN}"),
        ({"pre": "llama-bpe"}, f"its tokenizer is ('gpt2', 'llama-bpe'), {KNOWN}"),
        ({"merges": None}, "there is no 'merges'"),
        ({"tokens": None, "token_type": None}, "there is no 'tokens'"),
        ({"merges": [3, 3]}, "'int' object has no attribute 'split'"),
        ({"token_type": [3, 3]}, "zip() argument 2 is shorter than argument 1"),
    ],
)  # fmt: skip
def test_a_gguf_tokenizer_that_is_none_of_ours_is_refused(gguf, tmp_path, fields, message):
    with pytest.raises(FileRefused) as refused:
        gguf(**fields)
    assert str(refused.value) == f"'{tmp_path}/m.gguf': {message}"


# --- a Hugging Face folder ------------------------------------------------------------------------


def test_a_folder_has_its_tokenizer_and_its_end(model_dir):
    found = load_tokenizer(model_dir)
    assert found.encode("the cat.") == ids_of("the cat.")
    assert found.decode(np.array(found.encode("the\ncat."))) == "the\ncat."
    assert (found.begin, found.end, found.last) == ((), {END}, (END,))
    change(model_dir / "config.json", eos_token_id=None)
    assert load_tokenizer(model_dir).end == frozenset()
    change(model_dir / "generation_config.json", eos_token_id=[3, 5])
    assert load_tokenizer(model_dir).end == {3, 5}
    change(model_dir / "generation_config.json", eos_token_id=None)
    change(model_dir / "config.json", eos_token_id=END)
    assert load_tokenizer(model_dir).end == frozenset()  # transformers does not look further then
    (model_dir / "generation_config.json").write_text("{}")
    assert load_tokenizer(model_dir).end == frozenset()


def test_a_training_text_ends_as_the_second_file_says(model_dir):
    for eos in ("z", {"content": "z"}):
        change(model_dir / "tokenizer_config.json", eos_token=eos)
        found = load_tokenizer(model_dir)
        assert (found.last, found.end) == ((LETTERS.index("z"),), {END})
    for name in ("config.json", "tokenizer_config.json"):
        (model_dir / name).write_text("{}")
    assert load_tokenizer(model_dir).last == ()


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
        (("<s>", "A", "</s>"), (29,)),
        (("<s>", "<s>", "A", "</s>", "<s>"), (29, 29)),
        (("A", "</s>"), ()),
        (("</s>", "<s>", "A"), (30, 29)),
    ],
)
def test_what_a_text_begins_with_comes_before_it(model_dir, around, begin):
    """Version 5 of transformers passes over add_bos_token where tokenizer.json has a template."""
    add_template(model_dir, *around)
    beside = {"add_bos_token": False, "added_tokens_decoder": {"29": {"content": "<s>"}}, "model_max_length": 3}
    change(model_dir / "tokenizer_config.json", **beside)
    found = load_tokenizer(model_dir)
    assert (found.begin, found.encode("ab")) == (begin, [0, 1])


def test_a_begin_is_found_without_a_token_for_a(model_dir):
    add_template(model_dir, "<s>", "A", "</s>")
    words = {"type": "WordLevel", "vocab": {"q": 0, "z": 1}, "unk_token": "no such token"}
    change(model_dir / "tokenizer.json", model=words)
    assert load_tokenizer(model_dir).begin == (29,)


def test_a_text_is_neither_cut_nor_padded(model_dir):
    """transformers resets both of the file's settings with each call."""
    add_template(model_dir, "<s>", "A")
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None}
    fill |= {"pad_id": 28, "pad_type_id": 0, "pad_token": "x"}
    change(model_dir / "tokenizer.json", truncation=cut, padding=fill)
    found = load_tokenizer(model_dir)
    assert (found.begin, found.encode("abcdefg")) == ((29,), [0, 1, 2, 3, 4, 5, 6])


def byte_level(folder, **model):
    """Give a folder a byte-level BPE in the place of its tokenizer."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(LETTERS_OF_BYTES)}, [], **model))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(whole.to_str())


@pytest.mark.parametrize(
    "beside",
    [
        {"pad_token": "[P]"},
        {"pad_token": {"content": "[P]", "lstrip": False}},
        {"image_token": "[P]"},
        {"additional_special_tokens": ["[P]"]},
        {"extra_special_tokens": ["[P]"]},
        {"extra_special_tokens": {"image_token": "[P]"}},
    ],
)
def test_tokens_that_the_second_file_names_are_special(model_dir, beside):
    byte_level(model_dir)
    change(model_dir / "tokenizer_config.json", **beside)
    found = load_tokenizer(model_dir)
    assert found.encode("a[P]b") == [LETTERS_OF_BYTES.index("a"), 256, LETTERS_OF_BYTES.index("b")]
    assert found.decode(found.encode("a[P]b")) == "ab"


def test_a_token_of_the_vocabulary_becomes_special_with_its_id(model_dir):
    byte_level(model_dir)
    change(model_dir / "tokenizer_config.json", eos_token="z")
    found, z, y = load_tokenizer(model_dir), *map(LETTERS_OF_BYTES.index, "zy")
    assert (found.encode("z"), found.last, found.decode([z])) == ([z], (z,), "")
    change(model_dir / "special_tokens_map.json", eos_token={"content": "y"})  # of older files
    assert load_tokenizer(model_dir).last == (y,)


def test_a_llama_class_of_bytes_has_no_own_tokens(model_dir):
    """transformers passes the class over then: <unk> in a text is letters."""
    byte_level(model_dir)
    change(model_dir / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert len(load_tokenizer(model_dir).encode("<unk>")) == 5


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        *(("tokenizer_config", {"added_tokens_decoder": {i: added}}, f"it adds {said}: tokenizer.json does not")
          for i, added, said in [("5", {"content": "<x>"}, "'<x>' as token '5'"), ("x", {}, "None as token 'x'"),
                                 ("29", {"content": "</s>"}, "'</s>' as token '29'")]),
        ("tokenizer_config", {"added_tokens_decoder": [1]}, "'list' object has no attribute 'items'"),
        ("added_tokens", {"<x>": 256}, "it adds '<x>' as token '256': tokenizer.json does not"),
        ("tokenizer_config", {"split_special_tokens": True},
         "split_special_tokens is True, supported: False: special tokens would be letters"),
        ("tokenizer_config", {"extra_special_tokens": [3]}, "a special token is 3, expected a text"),
        *((file, {"eos_token_id": end}, f"Expected `{said}`")
          for file in ("config", "generation_config")
          for end, said in [
              *((end, f"int | array | null`, got `{kind}` - at `$.eos_token_id")
                for end, kind in [(True, "bool"), (2.0, "float"), ("2", "str"), ({"id": 2}, "object")]),
              ([[2]], "int`, got `array` - at `$.eos_token_id[0]"),
              ([1, None], "int`, got `null` - at `$.eos_token_id[1]"),
              ([-1], "int` >= 0 - at `$.eos_token_id[0]"),
          ]),
    ],
)  # fmt: skip
def test_a_file_that_contradicts_the_tokenizer_is_refused(model_dir, file, settings, message):
    """A 2.0 or true would be taken for the token 2 or 1, and a text would end no generation."""
    add_template(model_dir, "<s>", "A")
    change(model_dir / f"{file}.json", **settings)
    with pytest.raises(FileRefused) as refused:
        load_tokenizer(model_dir)
    assert str(refused.value) == f"'{model_dir}/{file}.json': {message}"


def test_a_dropout_of_merges_is_refused(model_dir):
    byte_level(model_dir, dropout=0.5)
    with pytest.raises(FileRefused, match=r"tokenizer.json': dropout is 0.5"):
        load_tokenizer(model_dir)


# --- glassllm's -----------------------------------------------------------------------------------


def test_glassllms_tokenizer_is_its_own():
    glassllm = pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    weights = Path(glassllm.__file__).parent / "weights"
    for language in ("en", "pt"):
        found, own = load_tokenizer(weights / f"{language}.npz"), glassllm.load_pretrained(language)[1]
        text = "In the beginning was the Word,\nand the Word was with God."
        assert found.encode(text) == own.encode(text)
        assert found.decode(found.encode(text)) == text
        assert own.tokens(list(found.end)) == ["<eos>"]


def test_a_glassllm_token_says_where_its_letters_are():
    glassllm = pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    found = load_tokenizer(Path(glassllm.__file__).parent / "weights" / "en.npz")
    # accents, parts of letters, and a letter that is composed of two
    apart = "Cafe\u0301 in a\u0323\u0308 a\u0327\u0301 \u1112\u1161\u11ab, \u0958 said"
    for text in ("The king\n said unto 日!", apart):
        ids, places = found.tokens(text)
        assert ids == found.encode(text)
        assert {i for start, stop in places for i in range(start, stop)} == set(range(len(text)))
        for number, (start, stop) in zip(ids, places, strict=True):
            assert number == 1 or found.decode([number]) == text[start:stop]
        assert "".join(text[a:b] for a, b in places) == text or text == apart
    assert found.spell([*ids[:2], *found.last]) == found.decode(ids[:2]) + "<eos>"
    assert found.last == (3,)


# --- what is damaged, too large or not there ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.gguf", b"GGUF\x03\0\0\0",
         "m.gguf': not a sound GGUF file: ValueError: what it holds would end at byte 24, and the file has 8"),
        ("m.gguf", b"", "m.gguf': not a sound GGUF file: ValueError: "),
        ("nowhere.gguf", None, "nowhere.gguf': No such file or directory"),
        ("m/tokenizer.json", b"{", "tokenizer.json': Cannot instantiate Tokenizer from buffer: EOF"),
        ("m/tokenizer.json", b'{"version": 1, "alphabet": [], "merges": []}',
         "tokenizer.json': Cannot instantiate Tokenizer"),
        ("m/tokenizer.json", 1 << 35, "tokenizer.json': larger than the 268435456 bytes that such a file can need"),
        ("m/config.json", b"{}", "tokenizer.json': No such file or directory"),
        ("m.npz", b"", "m.tokenizer.json': No such file or directory"),
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_one_clear_error(tmp_path, name, data, message):
    pytest.importorskip("gguf")
    pytest.importorskip("glassllm")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    if data is not None:
        with open(tmp_path / name, "wb") as file:
            file.truncate(data) if isinstance(data, int) else file.write(data)
    with pytest.raises(FileRefused, match=re.escape(message)):
        load_tokenizer(tmp_path / name.split("/")[0])


def test_a_nested_glassllm_tokenizer_is_refused(tmp_path):
    """Deeper than the JSON reader of any Python goes."""
    pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    (tmp_path / "m.npz").touch()
    nested = "[" * 200_000 + "]" * 200_000
    (tmp_path / "m.tokenizer.json").write_text(f'{{"version": 1, "alphabet": {nested}, "merges": []}}')
    with pytest.raises(FileRefused, match=r"m\.tokenizer\.json': .*recursion"):
        load_tokenizer(tmp_path / "m.npz")


@pytest.mark.parametrize(("name", "package"), [("m.gguf", "gguf"), ("m", "tokenizers"), ("m.npz", "glassllm")])
def test_a_missing_package_is_named(tmp_path, name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).mkdir() if name == "m" else (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"needs {package} .*: pip install {package}( tokenizers)?$"):
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
def test_a_panic_of_the_package_is_one_clear_error(raised, expected):
    right = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))

    class Panicking:
        post_process = right.post_process

        def encode(self, text, add_special_tokens=True):
            if text == "panic":
                raise raised("range end index")
            return right.encode(text)

    found = tokens._of(Path("tokenizer.json"), Panicking(), [])
    assert found.encode("a") == [0]
    with pytest.raises(expected, match="range end index"):
        found.encode("panic")


# --- a long text, and a continuation --------------------------------------------------------------


def trained(kind, corpus):
    """A tokenizer of the package, learned from a text: as GPT-2, Llama 2, T5 and BERT have theirs."""
    models, trainers, before = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    options = {"vocab_size": 400, "special_tokens": ["?"], "show_progress": False}
    if kind == "bytes":
        options["initial_alphabet"] = before.ByteLevel.alphabet()
    if kind == "unigram":
        options["unk_token"] = "?"
    model, trainer, split = {
        "bytes": (models.BPE(), trainers.BpeTrainer, before.ByteLevel()),
        "sentences": (models.BPE(unk_token="?"), trainers.BpeTrainer, before.Metaspace()),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, before.Metaspace()),
        "pieces": (models.WordPiece(unk_token="?"), trainers.WordPieceTrainer, before.BertPreTokenizer()),
    }[kind]
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = split
    made.train_from_iterator([corpus], trainer(**options))
    if kind in ("sentences", "unigram"):  # the whole text is one word
        normal = tokenizers.normalizers
        made.normalizer = normal.Sequence([normal.Prepend("\u2581"), normal.Replace(" ", "\u2581")])
        made.pre_tokenizer = None
    return made


@pytest.mark.parametrize("kind", ["bytes", "sentences", "unigram", "pieces"])
def test_a_long_text_has_the_same_ids_in_pieces(model_dir, monkeypatch, kind):
    monkeypatch.setattr("minilora.language.text.PIECE", 2000)
    corpus = re.sub("-+", "-", Path(__file__).read_text(encoding="utf-8"))  # of a long run two ways are as likely
    trained(kind, corpus).save(str(model_dir / "tokenizer.json"))
    encode = load_tokenizer(model_dir).encode
    noise = "".join(np.random.default_rng(0).choice([*" \n\t,.abcé日"], 10_000))
    for text in (corpus, noise, "a" * 5000, " \n" * 2500, "日本" * 2500, "abc" * 2000):
        asked = []

        def told(part, asked=asked):
            asked.append(part)
            return encode(part)

        assert token_ids(text, told) == encode(text)
        if text is corpus:
            assert max(map(len, asked)) <= 2000 + CONTEXT


def test_a_continuation_begins_where_the_prompt_ends_as_decoded():
    """By a decoder that composes e and its accent, as some tokenizers' normalisers do."""

    def composed(ids):
        return "".join(chr(i) for i in ids).replace("e\u0301", "\u00e9")

    before = [ord(letter) for letter in "cafe\u0301 "]
    assert [*added_text([ord("x"), ord("y")], before, composed)] == ["x", "y"]


@pytest.mark.parametrize(
    ("before", "added", "pieces"),
    [
        (b"prompt ", "a\u65e5b".encode(), ["a", "\u65e5", "b"]),
        (b"", "a\u65e5".encode()[:-1], ["a"]),  # of one that never ends nothing
        (b"", b"\xffab", ["\ufffda", "b"]),  # what is no letter holds nothing back for long
    ],
)
def test_a_letter_of_several_tokens_comes_whole(before, added, pieces):
    assert [*added_text(added, before, lambda ids: bytes(ids).decode("utf-8", errors="replace"))] == pieces
