"""Tokenizers of three formats. The oracles are byte counts and glassllm's and transformers' own (tests/peers)."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from minilora.checks import FileRefused
from minilora.language import gguf as ggufreader
from minilora.language import tokens
from minilora.language.text import CONTEXT, token_ids
from minilora.language.tokens import added_text, load_tokenizer

from ..support.language import LETTERS, tiny_llama, write_folder

tokenizers = pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


def byte_letters():
    """Return how byte-level BPE writes each of the 256 bytes: as GPT-2 began to."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTER = byte_letters()


def write_gguf(path: Path, *, model="gpt2", pre="smollm", eos=0, bos=None, begins=None, eot=None, **others) -> Path:
    """A tokenizer of all bytes, two merges and two control tokens, and no weights; `others` instead, None for none."""
    gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")
    words = ["<end>", "<turn>", *LETTER.values(), "th", "the"]
    fields = {
        "tokens": words,
        "token_type": [3, 3] + [1] * (len(words) - 2),
        "merges": ["t h", "th e"],
    } | others
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_eos_token_id(eos)
    for add, value in (
        (writer.add_bos_token_id, bos),
        (writer.add_add_bos_token, begins),
        (writer.add_eot_token_id, eot),
    ):
        if value is not None:
            add(value)
    for name, values in fields.items():
        if values is not None:
            writer.add_array(f"tokenizer.ggml.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


TEXTS = ["the other theme", "", " \n\t ", "naïve café, 日本 😀", "don't  x=3.14\r\n", "\ufeff\u2028"]


@pytest.mark.parametrize(
    ("pre", "text"),
    [*(("smollm", text) for text in TEXTS), *((pre, TEXTS[i]) for pre in ("gpt-2", "qwen2") for i in (3, 4))],
)
def test_a_gguf_tokenizer_gives_back_every_text(tmp_path, text, pre):
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre))
    ids = found.encode(text)
    assert found.decode(ids) == text
    assert len(ids) == len(text.encode()) - 2 * text.count("the") - (text.count("th") - text.count("the"))
    assert (found.begin, found.end) == ((), {0})


@pytest.mark.parametrize(
    ("pre", "ids"), [("smollm", ["3", "1", "4"]), ("qwen2", ["3", "1", "4"]), ("gpt-2", ["31", "4"])]
)
def test_some_read_digits_one_at_a_time(tmp_path, pre, ids):
    """So no two are merged, though 3 and 1 would be."""
    words = [*LETTER.values(), "31"]
    fields = {"tokens": words, "token_type": [1] * len(words), "merges": ["3 1"]}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre, **fields))
    assert found.encode("314") == [words.index(word) for word in ids]


def test_qwen2_joins_a_mark_to_the_letters_after_it(tmp_path):
    """GPT-2 joins a space alone, so that an opening bracket and a letter are never merged there."""
    words = [*LETTER.values(), "(t", "th"]
    fields = {"tokens": words, "token_type": [1] * len(words), "merges": ["( t", "t h"]}
    for pre, said in (("qwen2", ["(t", "h"]), ("gpt-2", ["(", "th"])):
        found = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre, **fields))
        assert found.encode("(th") == [words.index(word) for word in said]


def test_control_tokens_are_one_token_and_no_text(tmp_path):
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", eos=1))
    ids = found.encode("<turn>th<end>")
    assert [ids[0], ids[-1], len(ids), found.end] == [1, 0, 3, {1}]
    assert found.decode(ids) == "th"


@pytest.mark.parametrize(
    ("fields", "begin"),
    [({}, ()), ({"bos": 1}, ()), ({"bos": 1, "begins": False}, ()), ({"bos": 1, "begins": True}, (1,))],
)
def test_a_gguf_file_says_whether_texts_begin_with_a_token(tmp_path, fields, begin):
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    assert (found.begin, found.encode("th")) == (begin, [258])


def test_a_begin_token_that_is_none_is_refused(tmp_path):
    with pytest.raises(FileRefused, match=r"m.gguf': bos_token_id: Expected `int`, got `null`"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", begins=True))


def test_every_end_that_a_gguf_file_names_ends_a_text(tmp_path):
    assert load_tokenizer(write_gguf(tmp_path / "m.gguf", eos=0, eot=1)).end == {0, 1}


def test_tokens_that_users_defined_are_whole_and_are_text(tmp_path):
    """Their letters stand for themselves; those of other tokens for bytes, of which é would be half a letter."""
    words = [*LETTER.values(), "the cat", "é!", "<unk>", "th"]
    fields = {"tokens": words, "token_type": [1] * 256 + [4, 4, 2, 1], "merges": ["t h"]}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    text = "a the cat, the catthe cat é!é!é"
    ids = found.encode(text)
    assert [i for i in ids if i >= 256] == [256, 256, 256, 257, 257]
    assert found.decode(ids) == found.decode(np.array(ids)) == text
    assert found.decode(found.encode("a<unk>b")) == "ab"
    assert len(found.encode("a<unk>b")) == 3


@pytest.mark.parametrize("text", ["the <turn>café 日本", "  th\n\nthe<end>", "<turn><turn>a", ""])
def test_every_token_says_where_its_letters_are(tmp_path, text):
    """A letter of several tokens is in each of them, and no letter is in none."""
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    ids, places = found.tokens(text)
    assert ids == found.encode(text)
    assert found.spell(ids) == text
    assert len(places) == len(ids)
    assert {i for start, stop in places for i in range(start, stop)} == set(range(len(text)))
    for number, (start, stop) in zip(ids, places, strict=True):
        assert found.spell([number]) == text[start:stop] or len(text[start:stop].encode()) > 1


def test_a_text_to_train_on_ends_as_the_tokenizer_says(tmp_path):
    assert load_tokenizer(write_gguf(tmp_path / "m.gguf", eos=1, eot=0)).last == (1,)
    folder = write_folder(tmp_path / "m", tiny_llama())
    assert load_tokenizer(folder).last == (LETTERS.index("."),)
    for eos in ("z", {"content": "z"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        found = load_tokenizer(folder)
        assert (found.last, found.end) == ((LETTERS.index("z"),), {LETTERS.index(".")})
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(folder).last == ()


def test_a_glassllm_token_says_where_its_letters_are():
    glassllm = pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    found = load_tokenizer(Path(glassllm.__file__).parent / "weights" / "en.npz")
    text = "The king\n said unto 日!"
    ids, places = found.tokens(text)
    assert ids == found.encode(text)
    assert [found.decode([i]) for i in ids if i != 1] == [
        text[a:b] for i, (a, b) in zip(ids, places, strict=True) if i != 1
    ]
    assert "".join(text[a:b] for a, b in places) == text
    # accents, parts of letters, and a letter that is composed of two
    apart = "Cafe\u0301 in a\u0323\u0308 a\u0327\u0301 \u1112\u1161\u11ab, \u0958 said"
    _, places = found.tokens(apart)
    assert {i for start, stop in places for i in range(start, stop)} == set(range(len(apart)))
    for number, (start, stop) in zip(found.encode(apart), places, strict=True):
        assert number == 1 or found.decode([number]) == apart[start:stop]
    assert found.spell([*ids[:2], *found.last]) == found.decode(ids[:2]) + "<eos>"
    assert found.last == (3,)


def test_a_gguf_header_is_read_once_until_the_file_changes(tmp_path, monkeypatch):
    path, read, right = tmp_path / "m.gguf", [], ggufreader.read_gguf
    monkeypatch.setattr(ggufreader, "read_gguf", lambda *a, **k: read.append(a) or right(*a, **k))
    write_gguf(path)
    assert load_tokenizer(path).last == load_tokenizer(path).last == (0,)
    assert len(read) == 1
    path.unlink()
    write_gguf(path, eos=1, eot=0)
    assert load_tokenizer(path).last == (1,)


def test_a_token_that_stands_twice_is_refused(tmp_path):
    words = [*LETTER.values(), "th", "a"]
    fields = {"tokens": words, "token_type": [1] * 258, "merges": ["t h"]}
    with pytest.raises(FileRefused, match="its tokenizer is damaged: a token stands twice"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, r"its tokenizer is \('llama', 'smollm'\), expected a byte-level BPE"),
        ({"pre": "llama-bpe"}, r"its tokenizer is \('gpt2', 'llama-bpe'\)"),
        ({"merges": None}, "its tokenizer has no merges"),
        ({"tokens": None, "token_type": None}, "its tokenizer has no tokens and no token_type"),
    ],
)
def test_a_gguf_tokenizer_of_another_kind_is_refused(tmp_path, change, message):
    with pytest.raises(FileRefused, match=message):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **change))


def test_a_folder_has_its_tokenizer_and_its_end(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_llama())
    found = load_tokenizer(folder)
    assert found.encode("the cat.") == [LETTERS.index(c) for c in "the cat."]
    assert found.decode(np.array(found.encode("the\ncat."))) == "the\ncat."
    assert (found.begin, found.end) == ((), {LETTERS.index(".")})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    assert load_tokenizer(folder).end == {3, 5}


def with_template(folder, *around, beside=None):
    """Give a folder's tokenizer a template, "A" for the text; and a tokenizer_config.json."""
    config = json.loads((folder / "tokenizer.json").read_text())
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {"<s>": 29, "</s>": 30}
    config["added_tokens"] = [{"id": i, "content": name, **special} for name, i in ids.items()]
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if name == "A" else {"SpecialToken": {"id": name, "type_id": 0}}
        for name in around
    ]
    config["post_processor"] = {
        "type": "TemplateProcessing",
        "single": pieces,
        "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
    }
    (folder / "tokenizer.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder


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
def test_what_a_text_begins_with_comes_before_it(tmp_path, around, begin):
    found = load_tokenizer(with_template(write_folder(tmp_path / "m", tiny_llama()), *around))
    assert (found.begin, found.encode("ab")) == (begin, [0, 1])


def test_a_begin_is_found_without_a_token_for_a(tmp_path):
    folder = with_template(write_folder(tmp_path / "m", tiny_llama()), "<s>", "A", "</s>")
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"] = {"type": "WordLevel", "vocab": {"q": 0, "z": 1}, "unk_token": "no such token"}
    (folder / "tokenizer.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).begin == (29,)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"added_tokens_decoder": {"5": {"content": "<x>"}}}, "it adds '<x>' as token '5'"),
        ({"added_tokens_decoder": {"29": {"content": "</s>"}}}, "it adds '</s>' as token '29'"),
        ({"added_tokens_decoder": {"x": {}}}, "it adds None as token 'x'"),
        ({"added_tokens_decoder": [1]}, "'list' object has no attribute 'items'"),
    ],
)
def test_a_second_file_that_contradicts_the_tokenizer_is_refused(tmp_path, beside, message):
    folder = with_template(write_folder(tmp_path / "m", tiny_llama()), "<s>", "A", beside=beside)
    with pytest.raises(FileRefused, match=rf"tokenizer_config.json': {message}"):
        load_tokenizer(folder)


def test_a_second_file_that_agrees_changes_nothing(tmp_path):
    """Version 5 of transformers passes over add_bos_token where tokenizer.json has a template."""
    beside = {"add_bos_token": False, "added_tokens_decoder": {"29": {"content": "<s>"}}, "model_max_length": 3}
    folder = with_template(write_folder(tmp_path / "m", tiny_llama()), "<s>", "A", beside=beside)
    assert load_tokenizer(folder).begin == (29,)


def test_a_text_is_neither_cut_nor_padded(tmp_path):
    """transformers resets both of the file's settings with each call."""
    folder = with_template(write_folder(tmp_path / "m", tiny_llama()), "<s>", "A")
    config = json.loads((folder / "tokenizer.json").read_text())
    config["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    config["padding"] = {
        **{"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None},
        **{"pad_id": 28, "pad_type_id": 0, "pad_token": "x"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(config))
    found = load_tokenizer(folder)
    assert (found.begin, found.encode("abcdefg")) == ((29,), [0, 1, 2, 3, 4, 5, 6])


def test_glassllms_tokenizer_is_its_own():
    glassllm = pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    weights = Path(glassllm.__file__).parent / "weights"
    for language in ("en", "pt"):
        found, own = load_tokenizer(weights / f"{language}.npz"), glassllm.load_pretrained(language)[1]
        text = "In the beginning was the Word,\nand the Word was with God."
        assert found.encode(text) == own.encode(text)
        assert found.decode(found.encode(text)) == text
        assert own.tokens(list(found.end)) == ["<eos>"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.gguf", b"GGUF\x03\0\0\0", "m.gguf': not a sound GGUF file"),
        ("m.gguf", b"", "m.gguf': not a sound GGUF file"),
        ("m/tokenizer.json", b"{", "tokenizer.json': Cannot instantiate Tokenizer from buffer: EOF"),
        (
            "m/tokenizer.json",
            b'{"version": 1, "alphabet": [], "merges": []}',
            "tokenizer.json': Cannot instantiate Tokenizer",
        ),
        ("m/config.json", b"{}", "tokenizer.json': No such file or directory"),
        ("m.npz", b"", "m.tokenizer.json': No such file or directory"),
    ],
)
def test_a_damaged_tokenizer_is_one_clear_error(tmp_path, name, data, message):
    pytest.importorskip("gguf")
    pytest.importorskip("glassllm")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileRefused, match=message):
        load_tokenizer(tmp_path / name.split("/")[0])


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("end", [True, 2.0, "2", [[2]], [1, None], [-1], {"id": 2}])
def test_an_end_that_is_no_id_is_refused(tmp_path, file, end):
    """A 2.0 or true would be taken for the token 2 or 1, and a text would end no generation."""
    folder = write_folder(tmp_path / "m", tiny_llama())
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": end}
    (folder / file).write_text(json.dumps(config))
    with pytest.raises(FileRefused, match=rf"{file}': Expected `int.* - at `\$.eos_token_id"):
        load_tokenizer(folder)


def test_no_end_at_all_is_no_end(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_llama())
    config = json.loads((folder / "config.json").read_text())
    assert load_tokenizer(folder).end == {config["eos_token_id"]}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert load_tokenizer(folder).end == frozenset()


def trained(kind, corpus):
    """A tokenizer of the package, learned from a text: as GPT-2, Llama 2, T5 and BERT have theirs."""
    models, spaces = tokenizers.models, tokenizers.normalizers.Replace(" ", "\u2581")
    options = {"vocab_size": 400, "special_tokens": ["?"], "show_progress": False}
    made, trainer = {
        "bytes": (models.BPE(), tokenizers.trainers.BpeTrainer),
        "sentences": (models.BPE(unk_token="?"), tokenizers.trainers.BpeTrainer),
        "unigram": (models.Unigram(), tokenizers.trainers.UnigramTrainer),
        "pieces": (models.WordPiece(unk_token="?"), tokenizers.trainers.WordPieceTrainer),
    }[kind]
    made = tokenizers.Tokenizer(made)
    if kind == "bytes":
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        options["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    elif kind == "pieces":
        made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if kind == "unigram":
        options["unk_token"] = "?"
    made.train_from_iterator([corpus], trainer(**options))
    if kind in ("sentences", "unigram"):  # the whole text is one word
        made.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), spaces])
        made.pre_tokenizer = None
    return made


@pytest.mark.parametrize("kind", ["bytes", "sentences", "unigram", "pieces"])
def test_a_long_text_has_the_same_ids_in_pieces(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(sys.modules["minilora.language.text"], "PIECE", 2000)
    corpus = Path(__file__).read_text(encoding="utf-8")
    folder = write_folder(tmp_path / "m", tiny_llama())
    trained(kind, corpus).save(str(folder / "tokenizer.json"))
    encode = load_tokenizer(folder).encode
    noise = "".join(np.random.default_rng(0).choice([*" \n\t,.abcé日"], 10_000))
    for text in (corpus, noise, "a" * 5000, " \n" * 2500, "日本" * 2500, "abc" * 2000):
        asked = []

        def told(part, asked=asked):
            asked.append(part)
            return encode(part)

        assert token_ids(text, told) == encode(text)
        if text is corpus:
            assert max(map(len, asked)) <= 2000 + CONTEXT


def test_a_text_without_tokens_is_one_clear_error(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_llama())
    config = json.loads((folder / "tokenizer.json").read_text())
    config["model"]["unk_token"] = "no such token"
    (folder / "tokenizer.json").write_text(json.dumps(config))
    found = load_tokenizer(folder)
    assert found.encode("the") == [LETTERS.index(c) for c in "the"]
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


def test_a_tokenizer_too_large_is_refused_unread(tmp_path):
    folder = write_folder(tmp_path / "m", tiny_llama())
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(1 << 35)
    with pytest.raises(FileRefused, match="larger than"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("key", "message"), [("merges", "'int' object has no attribute 'split'"), ("token_type", "argument 2 is shorter")]
)
def test_a_damaged_gguf_tokenizer_is_refused(tmp_path, key, message):
    with pytest.raises(FileRefused, match=rf"m\.gguf': .*{message}"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", **{key: [3, 3]}))


def test_a_nested_glassllm_tokenizer_is_refused(tmp_path):
    pytest.importorskip("glassllm", reason="pip install -e '.[models]'")
    (tmp_path / "m.npz").touch()
    (tmp_path / "m.tokenizer.json").write_text(
        '{"version": 1, "alphabet": ' + "[" * 200_000 + "]" * 200_000 + ', "merges": []}'
    )  # deeper than the JSON reader of any Python goes
    with pytest.raises(FileRefused, match=r"m\.tokenizer\.json': .*recursion"):
        load_tokenizer(tmp_path / "m.npz")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileRefused, match=r"nowhere.gguf': No such file or directory"):
        load_tokenizer(tmp_path / "nowhere.gguf")


@pytest.mark.parametrize(("name", "package"), [("m.gguf", "gguf"), ("m", "tokenizers"), ("m.npz", "glassllm")])
def test_a_missing_package_is_named(tmp_path, name, package, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    (tmp_path / name).mkdir() if name == "m" else (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"needs {package} .*: pip install {package}( tokenizers)?$"):
        load_tokenizer(tmp_path / name)


def byte_level(folder, beside, **model):
    """Give a folder a byte-level BPE in the place of its tokenizer."""
    whole = tokenizers.Tokenizer(tokenizers.models.BPE({x: i for i, x in enumerate(LETTER.values())}, [], **model))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = tokenizers.decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(whole.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    return folder


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
def test_tokens_that_the_second_file_names_are_special(tmp_path, beside):
    folder = byte_level(write_folder(tmp_path / "m", tiny_llama()), beside)
    found = load_tokenizer(folder)
    letters = list(LETTER.values())
    assert found.encode("a[P]b") == [letters.index("a"), 256, letters.index("b")]
    assert found.decode(found.encode("a[P]b")) == "ab"


def test_a_token_of_the_vocabulary_becomes_special_with_its_id(tmp_path):
    folder = byte_level(write_folder(tmp_path / "m", tiny_llama()), {"eos_token": "z"})
    found, z = load_tokenizer(folder), list(LETTER.values()).index("z")
    assert (found.encode("z"), found.last, found.decode([z])) == ([z], (z,), "")


def test_special_tokens_of_older_files_are_read(tmp_path):
    folder = byte_level(write_folder(tmp_path / "m", tiny_llama()), {"eos_token": "z"})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "y"}}))
    assert load_tokenizer(folder).last == (list(LETTER.values()).index("y"),)
    (folder / "added_tokens.json").write_text(json.dumps({"<x>": 256}))
    with pytest.raises(FileRefused, match=r"added_tokens.json': it adds '<x>' as token '256'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("beside", "model", "message"),
    [
        ({"split_special_tokens": True}, {}, "split_special_tokens is True"),
        ({}, {"dropout": 0.5}, r"tokenizer.json': dropout is 0.5"),
        ({"extra_special_tokens": [3]}, {}, "a special token is 3, expected a text"),
    ],
)
def test_what_makes_other_ids_is_refused(tmp_path, beside, model, message):
    with pytest.raises(FileRefused, match=message):
        load_tokenizer(byte_level(write_folder(tmp_path / "m", tiny_llama()), beside, **model))


def test_a_llama_class_of_bytes_has_no_tokens_of_its_own(tmp_path):
    """transformers passes the class over then: <unk> in a text is letters."""
    folder = byte_level(write_folder(tmp_path / "m", tiny_llama()), {"tokenizer_class": "LlamaTokenizer"})
    assert len(load_tokenizer(folder).encode("<unk>")) == 5


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 5, 6, 7])
def test_ends_that_llama_cpp_knows_end_a_text(tmp_path, kind):
    """SmolLM2's file names <|im_end|> alone; llama.cpp ends at <|endoftext|> and <reponame> too."""
    words = ["<|endoftext|>", "<|im_end|>", "<reponame>", "<file_sep>", "th", *LETTER.values()]
    fields = {"tokens": words, "token_type": [3, kind, kind, 3] + [1] * 257, "merges": ["t h"], "eos": 1}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    assert (found.end, found.last) == ({0, 1, 2}, (1,))
    assert found.encode("a<|im_end|><reponame>") == [words.index("a"), 1, 2]
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
def test_an_end_within_a_turn_ends_no_text(tmp_path, others, within, eos):
    """As in llama.cpp, also where a key names it: it is a text then."""
    words = [*others, within, "th", *LETTER.values()]
    fields = {"tokens": words, "token_type": [3, 3, 3] + [1] * 257, "merges": ["t h"], "eos": eos}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
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
def test_a_name_that_llama_cpp_knows_ends_a_text(tmp_path, name):
    words = ["<end>", name, "th", *LETTER.values()]
    fields = {"tokens": words, "token_type": [3, 1] + [1] * 257, "merges": ["t h"]}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    assert found.end == {0, 1}
    assert (found.encode(name), found.decode([1])) == ([1], "")


def test_a_channel_s_name_is_always_written(tmp_path):
    words = ["<end>", "<|channel|>", "th", *LETTER.values()]
    fields = {"tokens": words, "token_type": [3, 3] + [1] * 257, "merges": ["t h"]}
    found = load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields))
    assert found.encode("<|channel|>a") == [1, words.index("a")]
    assert found.decode([1, words.index("a")]) == "<|channel|>a"


def test_of_merges_that_stand_twice_the_first_counts(tmp_path):
    """As in llama.cpp: so "th" is merged before "he"."""
    words = ["th", "he", *LETTER.values()]
    fields = {"tokens": words, "token_type": [1] * len(words), "merges": ["t h", "h e", "t h"]}
    assert load_tokenizer(write_gguf(tmp_path / "m.gguf", **fields)).encode("the") == [0, words.index("e")]


@pytest.mark.parametrize("config", [{}, {"eos_token_id": None}])
def test_a_generation_config_without_an_end_has_none(tmp_path, config):
    """transformers does not look further then."""
    folder = write_folder(tmp_path / "m", tiny_llama())
    (folder / "generation_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).end == frozenset()


# --- a continuation ---


def composed(ids):
    """A decoder that composes e and its accent, as some tokenizers' normalisers do."""
    return "".join(chr(i) for i in ids).replace("e\u0301", "\u00e9")


def by_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def test_a_continuation_begins_where_the_prompt_ends_as_decoded():
    before = [ord(letter) for letter in "cafe\u0301 "]
    assert [*added_text([ord("x"), ord("y")], before, composed)] == ["x", "y"]


def test_a_letter_of_several_tokens_comes_whole():
    assert [*added_text("a\u65e5b".encode(), b"prompt ", by_bytes)] == ["a", "\u65e5", "b"]
    assert [*added_text("a\u65e5".encode()[:-1], b"", by_bytes)] == ["a"]  # of one that never ends nothing
    assert [*added_text(b"\xffab", b"", by_bytes)] == ["\ufffda", "b"]  # what is no letter holds nothing back for long
