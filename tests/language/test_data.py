"""Training data from texts and .jsonl files, compared with rows that are written out by hand."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minilora import adapt, cross_entropy
from minilora.language.conversion import PREFERENCES
from minilora.language.data import (
    LONGEST_ROW,
    BadLine,
    Chat,
    Completion,
    Example,
    Text,
    checked,
    encode_example,
    load_data,
    of_examples,
    pad,
    read_lines,
    rows_of,
    runs_together,
    show,
)
from minilora.language.files.chattemplate import ChatTemplate
from minilora.language.text import HELD_OUT, check_vocabulary
from minilora.losses import IGNORE_INDEX
from minilora.texts import FileRefused
from minilora.training import backpropagate

from ..support.compare import assert_close, refused
from ..support.language import LETTERS, tiny_llama, write_folder
from ..support.letters import TOKENS, parts, spell, words


def test_the_completion_counts_with_the_end_token():
    for record, begin, last, expected, counts in (
        ({"prompt": "2:", "completion": " 4"}, (), (1,), "2: 4<end>", [" 4<end>"]),
        ({"prompt": "2:", "completion": "4", "id": 7}, (0,), (1,), "<s>2:4<end>", ["4<end>"]),
        ({"prompt": "<s>2:", "completion": "4<end>"}, (0,), (1,), "<s>2:4<end>", ["4<end>"]),
        ({"prompt": "", "completion": "4"}, (), (), "4", ["4"]),
        ({"prompt": "2\n", "completion": "\n4"}, (), (), "2\n\n4", ["\n\n4"]),
        ({"text": "a b"}, (0,), (1,), "<s>a b<end>", ["a b<end>"]),
        ({"text": "<s>a"}, (0,), (), "<s>a", ["<s>a"]),
    ):
        ids, counted = encode_example(record, words(begin, last))
        assert (spell(ids), parts(ids, counted)) == (expected, counts)


def example(text, first, *, whole=False):
    ids = words().encode(text)
    return Example(1, np.array(ids), np.arange(len(ids)) >= first, whole)


def shown(x, y):
    return spell(x), "".join("-" if i == IGNORE_INDEX else TOKENS[i] for i in y)


def test_an_example_is_cut_and_a_text_continues():
    """A text continues in further rows, which contain nothing else."""
    cut = {5: [("abcde", "--def")], 4: [("abcd", "--de")], 3: [("abc", "--d")], 2: []}  # the prompt fills the last
    for length, expected in cut.items():
        assert [shown(*row) for row in rows_of(example("abcdef", 3), length)] == expected
    for length in (1, 2, 3, 5, 6):
        rows = [shown(*row) for row in rows_of(example("abcdef", 0, whole=True), length)]
        assert "".join(y for _, y in rows) == "bcdef"
        assert "".join(x for x, _ in rows) == "abcde"
        assert all(len(x) == len(y) <= length for x, y in rows)


def test_padding_changes_neither_loss_nor_gradient():
    """The expected loss weights each example, computed separately without padding, by its number of targets."""
    rng = np.random.default_rng(0)
    model = adapt(tiny_llama(), "all-linear", rank=2, alpha=4, rng=rng)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    rows = [rows_of(example(text, first), 6)[0] for text, first in (("abcdef", 3), ("abc", 1), ("bd g", 2))]
    X, Y = pad(rows, 6)
    assert X.shape == Y.shape == (3, 6)
    loss, grads = cross_entropy(model(X), Y)[0], backpropagate(model, X, Y, cross_entropy)
    alone = [(len(y) - (y == IGNORE_INDEX).sum(), x[None], y[None]) for x, y in rows]
    total = sum(count for count, _, _ in alone)
    assert_close(loss, sum(count / total * cross_entropy(model(x), y)[0] for count, x, y in alone), 1e-12)
    for name, g in grads.items():
        each = sum(count / total * backpropagate(model, x, y, cross_entropy)[name] for count, x, y in alone)
        assert_close(g, each, 1e-10)


@pytest.fixture
def model_dir(tmp_path):
    pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")
    return write_folder(tmp_path / "model", tiny_llama())


def lined(records):
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def write(path, records):
    path.write_text(lined(records), encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path, model_dir):
    """Return a function that writes lines into a file and loads them."""

    def load(records, *length, **options):
        return load_data(write(tmp_path / "e.jsonl", records), model_dir, *length, **options)

    return load


def texts(array):
    return ["".join(LETTERS[i] for i in row if i != IGNORE_INDEX) for row in array]


@pytest.mark.parametrize("count", [2, 10, 11, 35])
def test_one_example_in_ten_is_held_out(load, count):
    names = [f"{'abcdefghij'[i // 10]}{'abcdefghij'[i % 10]}" for i in range(count)]
    data = load([{"prompt": "the ", "completion": name} for name in names], 8)
    held, trained = texts(data.Y_held), texts(data.Y)
    assert sorted(held + trained) == sorted(f"{name}." for name in names)
    assert len(held) == -(-count // HELD_OUT)
    assert held[-1] == f"{names[-1]}."
    assert data.X.shape[1] == 6  # the longest is "the ab."
    assert data.unit == "examples"
    tokens = f"{3 * count} of {7 * count} tokens count"
    assert data.summary == f"{count - len(held)} examples and {len(held)} held out, {tokens}"
    first = 1 + names.index(trained[0].removesuffix("."))
    assert data.example.startswith(f"example  line {first}, ")  # that is shown is the first to train on


@pytest.mark.parametrize("measured", [None, 32, 99])
def test_all_or_the_requested_held_out_rows_are_measured(measured, load, tmp_path):
    data = load(["", {"text": "cat"}, "", {"text": "dog" * 200}], 8, measured=measured)
    assert texts(data.Y) == ["at."]
    assert data.row_tokens == 3
    assert (len(data.X_held), data.held) == (min(75, measured or 75), 75)
    assert set("".join(texts(data.X_held))) == set("dog")
    another = write(tmp_path / "f.jsonl", [{"prompt": "dog", "completion": "s" * 9}] * 99)
    data = load([{"prompt": "cat", "completion": "s"}] * 3, held_out=another, measured=measured)
    for each, width in ((data, 12), (data.with_length(8), 8)):
        assert (len(each.X), each.X_held.shape, each.held) == (3, (measured or 99, width), 99)


def test_one_example_is_shown_with_what_counts_marked(load):
    """In a text all tokens but the first count; a long example is shown in part."""
    records = [{"prompt": "the\ncat ", "completion": f"sat\non{i}"} for i in "abcdefghij"]
    data = load(records, 13)
    assert data.example.split("\n") == [
        *(
            "example  line 1, 14 tokens, of which the 6 after a | count:",
            "    the\\n",
            "    cat ",
            "  | sat\\n",
            "  | on",
        ),
    ]
    cut = "10 truncated to 13 tokens, losing 20 that count (--length 15 keeps all)"
    assert data.summary.endswith(f"60 of 160 tokens count, {cut}")
    assert show(example("abc", 0, whole=True), 9, words()).split("\n") == [
        *("example  line 1, 3 tokens, of which the 2 after a | count:", "    a", "  | bc"),
    ]
    lines = show(example("a\n" * 500, 2), 10_000, words()).split("\n")
    assert len(lines) == 42
    assert lines[1:3] == ["    a\\n", "  | a\\n"]
    assert lines[21] == "    ... 460 more lines ..."


GOOD = {"prompt": "a", "completion": "b"}
HI = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
FORMS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
EXPECTED = f"expected a plain text, or a .jsonl file whose lines are each {FORMS}"
ONE_OBJECT = "expected one whole JSON object on one line"
LINES = [  # a line, and why it cannot be used
    ('{"prompt": "a"', f"{ONE_OBJECT}: Input data was truncated"),
    ("[1]", f"it is [1], expected one of {FORMS}"),
    ({"prompt": "a"}, f"its keys are ['prompt'], expected one of {FORMS}"),
    ({**GOOD, "text": "c"}, f"its keys are ['completion', 'prompt', 'text'], expected one of {FORMS}"),
    ({"prompt": "a", "completion": ""}, "its completion is empty: ''"),
    ({"prompt": "a", "completion": " \n"}, r"its completion is empty: ' \n'"),
    ({"prompt": "a", "completion": 4}, "Expected `str`, got `int` - at `$.completion`"),
    ({"prompt": None, "completion": "a"}, "Expected `str`, got `null` - at `$.prompt`"),
    ({"text": ""}, "its text is empty: ''"),
    ({"messages": HI["messages"][:1]},
     "no message is from the assistant, so there is nothing to learn; the roles are ['user']"),
    ('{"prompt": "cut: \\ud83d", "completion": "a"}',
     f"{ONE_OBJECT}: JSON is malformed: unexpected end of escaped utf-16 surrogate pair (byte 23)"),
    ('{"prompt": "a", "completion": "b", "id": NaN}',
     f"{ONE_OBJECT}: JSON is malformed: invalid character (byte 41)"),
    ('{"prompt": "a", "completion": "evil", "completion": "b"}',
     "the key 'completion' appears 2 times in one object, expected once"),
    ('{"text": "a", "more": [{"x": {"é": 1, "b": 2, "é": 1, "é": 3}}]}',
     "the key 'é' appears 3 times in one object, expected once"),
    ({**HI, "tools": "f"}, "Expected `array | null`, got `str` - at `$.tools`"),
    ({**GOOD, "rejected": "x"}, f"its rejected would be ignored: {PREFERENCES}; jq -c 'del(.rejected)' removes it"),
]  # fmt: skip
BAD = [line for line, _ in LINES]
LISTS = "jq -c 'if type == \"array\" then .[] else . end' {} > new.jsonl converts it"
FILES = [
    ("e.json", "[]", f".json is structured data: {EXPECTED}; {LISTS.format('e.json')}"),
    ("e.ndjson", "a,b", f".ndjson is structured data: {EXPECTED}; {LISTS.format('e.ndjson')}"),
    ("e.txt", f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n", f"it contains JSON: {EXPECTED}; {LISTS.format('e.txt')}"),
    ("e.txt", json.dumps([GOOD] * 3, indent=2), f"it contains JSON: {EXPECTED}; {LISTS.format('e.txt')}"),
    ("e f.jsonl", f"\n{json.dumps([GOOD] * 3, indent=2)}",
     f"it is one JSON array: {EXPECTED}; {LISTS.format(repr('e f.jsonl'))}"),
    ("e.jsonl", json.dumps(GOOD),
     "examples with a token that counts in a row of 8: 1 of 1, expected at least 2, one of them to hold out"),
    ("e.jsonl", lined([GOOD, "", BAD[1], GOOD]), f"line 3: {LINES[1][1]}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), FILES)
def test_a_file_is_refused_by_its_contents(tmp_path, model_dir, monkeypatch, name, text, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(text)
    with refused(f"{name!r}: {message}"):
        load_data(name, model_dir.name, 8)


def test_a_line_nested_too_deep_is_refused(load):
    with pytest.raises(FileRefused, match="line 2: "):
        load([GOOD, '{"text": ' + "[" * 10**5])


def test_too_few_examples_name_the_length_that_keeps_all():
    long = Example(1, np.arange(9), np.arange(9) == 8, whole=False)
    found = "examples with a token that counts in a row of 3"
    for examples, held_out, message in (
        (0, 0, f"{found}: 0 of 0, expected at least 1"),
        (1, 0, f"{found}: 0 of 1, expected at least 1: --length 8 keeps all"),
        (2, 0.1, f"{found}: 0 of 2, expected at least 2, one of them to hold out: --length 8 keeps all"),
    ):
        with refused(f"'e': {message}"):
            of_examples(Path("e"), [long] * examples, 3, None, held_out)


PROSE = [
    "the cat, the dog\n" * 9,  # too few lines to tell
    "the cat, the dog\n" * 40 + "the end\n" + "and so on\n" * 20,
    "the cat sat\n" * 30,
    "{the cat} sat on the mat and so did the dog\n" * 9,
    "[1]\n[2]\n[3]\nthe cat, the mat, the dog\n",
    "".join(f"the cat{',' * (i % 3)} sat\n" for i in range(60)),
]


def test_prose_is_taken_for_prose(tmp_path, model_dir):
    for text in PROSE:
        (tmp_path / "t").write_text(text)
        assert load_data(tmp_path / "t", model_dir, 8).unit == "windows"


def test_ids_that_the_model_lacks_are_refused(load):
    data = load([GOOD] * 4, 8)
    assert data.largest_id == 27
    check_vocabulary(data.largest_id, 29)
    with pytest.raises(ValueError, match=r"gives ids up to 27, expected below 27: use the model's tokenizer"):
        check_vocabulary(data.largest_id, 27)
    for name in ("X", "Y", "X_held", "Y_held"):  # wherever it stands
        assert replace(data, **{name: getattr(data, name) * 0 + 99}).largest_id == 99


def prompts(*pairs):
    return [{"prompt": "a" * before, "completion": "b" * after} for before, after in pairs]


def test_without_a_length_nothing_that_counts_is_lost(load):
    some = prompts((3, 2), (40, 9), (2, 7), (1, 4))
    data = load([*some, {"text": "cat " * 900}])
    assert data.length == LONGEST_ROW  # of a text: what is longer goes on in the next row
    assert data.summary.endswith("held out, 3,626 of 3,673 tokens count")  # of the text the first is no target
    assert sum((y != IGNORE_INDEX).sum() for y in (data.Y, data.Y_held)) == 3626
    assert load(some).length == 49
    assert load([*some, *prompts((3, 1100))]).length == 1103
    assert load([GOOD], held_out=0).summary == "1 examples, 2 of 3 tokens count"


def test_the_summary_says_what_a_length_loses(load):
    """The number of lost targets is computed by hand: those after each row's last target."""
    pairs = [(3, 2), (40, 9), (2, 7), (1, 4), (9, 9), (5, 1)]
    data, whole, less = (load(prompts(*pairs), length) for length in (8, None, 48))
    lost = sum(min(after + 1, max(0, before + after + 1 - 9)) for before, after in pairs)
    assert data.summary.endswith(
        f", 3 truncated to 8 tokens, losing {lost} that count (--length 49 keeps all)"
        "; 2 dropped for having none that counts in a row of 8 (lines 2, 5)"
    )
    assert len(data.X) + len(data.X_held) == 4
    assert "1 truncated to 48 tokens, losing 1 that count" in less.summary
    again = data.with_length(49)
    assert "are cut" not in again.summary
    assert again.summary == whole.summary
    np.testing.assert_array_equal(again.X, whole.X)
    for length, cut in ((7, False), (6, False), (5, True)):  # with the end, 7 tokens: the last is a target alone
        assert (f", 4 truncated to {length} tokens" in load(prompts((3, 3)) * 4, length).summary) is cut


def test_all_bad_lines_are_reported_at_once(load, tmp_path):
    """Lines with the same reason are reported together, and at most ten reasons."""
    hint = "--skip-bad FILE writes such lines with their reasons to a file, and skips them"
    for start in range(0, len(LINES), 10):
        with pytest.raises(FileRefused) as error:
            load([GOOD, *BAD[start:], {**GOOD, "weight": 1, "id": 3, "source": "a book"}])
        assert str(error.value) == f"'{tmp_path / 'e.jsonl'}': {len(BAD[start:])} lines cannot be used:"
        told = [f"line {line}: {why}" for line, (_, why) in enumerate(LINES[start : start + 10], 2)]
        more = [f"... and {len(BAD[start:]) - 10} more lines"] if len(BAD[start:]) > 10 else []
        assert error.value.more == [*told, *more, hint]
    with pytest.raises(FileRefused) as error:
        load([BAD[1], GOOD, *[BAD[2]] * 21, BAD[1]])
    first = ", ".join(map(str, range(3, 23)))
    assert error.value.more == [f"2 lines (1, 24): {LINES[1][1]}", f"21 lines ({first}, ...): {LINES[2][1]}", hint]


def test_bad_lines_are_skipped_and_returned(load, monkeypatch, tmp_path):
    skipped, file = [], str(tmp_path / "e.jsonl")
    data = load([GOOD, *BAD, GOOD], 8, skipped=skipped)
    assert len(data.X) + len(data.X_held) == 2
    texts = lined(BAD).splitlines()
    assert skipped == [BadLine(i, text, LINES[i - 2][1], file) for i, text in enumerate(texts, 2)]
    with pytest.raises(FileRefused, match="line 1: its text is empty"):
        load([{"text": ""}], 8, skipped=skipped)

    def encode(line, *more):
        if getattr(line, "text", "") == "no":
            raise ValueError("found later than what is no example at all")
        return encode_example(line, *more)

    skipped, bad = [], [{"text": "no"}, {"text": ""}]
    monkeypatch.setattr("minilora.language.data.encode_example", encode)
    load([GOOD, *bad, GOOD], 8, skipped=skipped)
    assert [line.text for line in skipped] == lined(bad).splitlines()  # in their order


def test_keys_that_are_not_read_are_counted(load, tmp_path):
    """Those of each file apart, of the examples that are used, and null is no value."""
    rows = [{**GOOD, "source": i, "none": None} for i in range(3)] + [{"text": "the cat", "weight": 1, "\x1b[2J": ""}]
    held = write(tmp_path / "f.jsonl", [{"text": "the dog", "score": 1.0}, {"text": "a", "source": "x", "id": 0}])
    notes = load([*rows, {**GOOD, "source": "", "rejected": "x"}], held_out=held, skipped=[]).notes
    assert [note for note in notes if "not read" in note] == [
        "not read: source (3 rows), weight (1), \\x1b[2J (1)",
        f"{held}: not read: score (1 row), source (1), id (1)",
    ]
    assert "not read: a (2 rows), b (1)" in load([{**GOOD, "b": 1, "a": 2}, {**GOOD, "a": 3}]).notes
    many = load([{**GOOD, **{f"k{i}": i for i in range(22)}}] * 2).notes[0]
    assert many.endswith("k19 (2), and 2 other keys")


def test_duplicates_are_counted_also_among_held_out_examples(load, tmp_path, model_dir):
    three = [{"prompt": p, "completion": " s"} for p in "abc"]
    data = load([*three, three[0], three[2], *three], held_out=0.25)
    assert data.notes == ("duplicate examples: 5", "held-out examples that are also trained on: 2 of 2")
    held = write(tmp_path / "f.jsonl", [three[0], {"prompt": "a", "completion": " t"}])
    data = load_data(tmp_path / "e.jsonl", model_dir, held_out=held)
    assert data.notes == ("duplicate examples: 5", "held-out examples that are also trained on: 1 of 2")
    assert load([*three, {"text": "a s"}]).notes == ()  # of which more counts


def test_in_a_held_out_file_examples_are_counted_not_rows(load, tmp_path):
    """A text that takes three rows is one example, and so is each copy of it."""
    held = write(tmp_path / "f.jsonl", [{"text": "the cat sat on the"}] * 2 + [{"text": "a"}, {"text": "dog"}])
    data = load([{"text": "a"}, {"text": "the dog"}], 8, held_out=held)
    assert data.held == 3 + 3 + 1 + 1
    assert data.notes[-1] == "held-out examples that are also trained on: 1 of 3"


def test_dropped_chats_are_not_counted_as_chats():
    """A row of 3 has nothing to learn if the first token that counts comes after it."""
    short, long = example("abcdef", 2), example("abcdef", 5)
    for chat, chats in ((short, True), (long, False)):
        of_them = [short, short, replace(chat, chat=True, system="be kind")]
        data = of_examples(Path("e"), of_them, 3, words(), 0)
        assert (data.chats, data.system) == (chats, "be kind" if chats else None)


@pytest.mark.parametrize(("count", "lines"), [
    (1, "line 3"), (2, "lines 3, 4"), (20, f"lines {', '.join(map(str, range(3, 23)))}"),
    (21, f"lines {', '.join(map(str, range(3, 23)))}, ..."),
])  # fmt: skip
def test_up_to_twenty_dropped_lines_are_named(load, count, lines):
    data = load(prompts(*[(1, 2)] * 2, *[(9, 2)] * count), 8)
    assert data.summary.endswith(f"; {count} dropped for having none that counts in a row of 8 ({lines})")


def test_oddities_of_a_held_out_file_are_reported(load, tmp_path):
    held = write(tmp_path / "f.jsonl", [{"prompt": p, "completion": "a"} for p in ("it ", "it is", "it ")])
    copies = "duplicate examples: 1"
    missing_space = "completions that run into their prompt, without a space between them: 1"
    notes = load([{"prompt": p, "completion": "b"} for p in ("it is ", "it is")], held_out=held).notes
    told = [missing_space, f"{held}: {copies}", f"{held}: {missing_space}"]
    assert [note.partition(", the first")[0] for note in notes] == told
    assert ["line 2;" in note for note in notes] == [True, False, True]


def test_a_completion_that_runs_into_its_prompt_is_reported(load):
    prompted = ["it is", "it is", "it is ", "it is", "it is:", "", "e"]
    completed = [" a", "a", "b", "\nc", "d", "a", "e"]
    data = load([{"prompt": p, "completion": c} for p, c in zip(prompted, completed, strict=True)])
    assert data.notes == (
        "completions that run into their prompt, without a space between them: 2, the first in line 2; a model would "
        "learn to join the two words",
    )
    assert not runs_together("\u4eca\u65e5", "\u306f")  # Japanese has no spaces


def test_a_completion_without_tokens_is_refused_by_its_line(load, monkeypatch):
    """Some tokenizers drop characters, such as zero-width ones, and some models have no end token."""
    deaf = replace(words(last=()), tokens=lambda text: ([2] * text.count("a"), [(0, 1)] * text.count("a")))
    monkeypatch.setattr("minilora.language.source.load_tokenizer", lambda model: deaf)
    nothing = "the part that counts has no tokens, so there is nothing to learn"
    with pytest.raises(FileRefused, match=f"line 1: {nothing}$"):
        load([{"prompt": "a", "completion": "\u200b"}], held_out=0)


def test_a_text_that_ends_gets_no_second_end():
    """Several tokens can end a text; a training text gets the last of them, unless it already ends with one."""
    tokenizer = replace(words(), end=frozenset({0}))
    assert spell(encode_example({"text": "abc<end>"}, tokenizer)[0]) == "abc<end>"
    assert spell(encode_example({"text": "abc<s>"}, tokenizer)[0]) == "abc<s>"
    assert spell(encode_example({"text": "abc"}, tokenizer)[0]) == "abc<end>"


def test_a_chats_tools_are_passed_to_the_template():
    pytest.importorskip("jinja2", reason="pip install -e '.[models]'")
    source = (
        "{% for tool in tools %}{{ tool.name }}:{% endfor %}{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    )
    ids, _ = encode_example({**HI, "tools": [{"name": "f"}]}, words(), ChatTemplate("m", {"default": source}, {}))
    assert spell(ids) == "f:hi<end>hello<end>"


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path, bad = tmp_path / "a.jsonl", []
    path.write_text('\n{"text": "a \\ud83d\\ude00\u2028"}\r\n\n{"prompt": "", "completion": "b", "id": 7}\n')
    read = [(number, line) for number, _, line in read_lines(path, bad, checked)]
    assert read == [(2, Text("a \N{GRINNING FACE}\u2028")), (4, Completion("", "b"))]
    assert not bad


def test_unreadable_lines_are_reported_by_number(tmp_path):
    path, bad = tmp_path / "a.jsonl", []
    path.write_text('3\n\n{"a": NaN}\n5\n7')

    def odd(number):
        if number == 5:
            raise ValueError(f"{number} is refused")
        return number * 2

    assert read_lines(path, bad, odd) == [(1, "3", 6), (5, "7", 14)]
    assert [(line.number, line.text) for line in bad] == [(3, '{"a": NaN}'), (4, "5")]
    assert bad[1].reason == "5 is refused"


def test_a_chat_may_have_no_tools():
    messages = HI["messages"][1:]
    assert checked({"messages": messages, "tools": []}) == Chat(messages, [])
    assert checked({"messages": messages, "id": "of another program's"}) == Chat(messages)


# --- other people's data ---

OTHERS = {
    "list.json": [HI],
    "other-roles.jsonl": {"messages": [{"role": "human", "content": "hi"}, {"role": "bot", "content": "hello"}]},
}
PAGE = Path(__file__).parents[2] / "docs" / "library" / "finetune.md"
COMMANDS = re.findall(r"^jq (?:.|\n)*? > new\.jsonl", PAGE.read_text(encoding="utf-8"), re.M)


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize("name", OTHERS)
def test_a_command_of_the_page_converts_what_is_refused(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(OTHERS[name], indent=2 if name == "list.json" else None))
    with pytest.raises(FileRefused):
        load_data(tmp_path / name, "no model")
    (command,) = (command for command in COMMANDS if f" {name} >" in command)
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    ((number, _, line),) = read_lines(tmp_path / "new.jsonl", [], checked)
    assert (number, line) == (1, Chat(HI["messages"]))


def test_every_command_of_the_page_is_run():
    assert len(COMMANDS) == len(OTHERS)


@pytest.mark.parametrize(("suffix", "between"), [(".csv", ","), (".TSV", "\t")])
def test_the_suggested_command_converts_a_table(tmp_path, suffix, between):
    """Also quoted cells with line breaks, and the mark that Excel writes first."""
    table = tmp_path / f"a table{suffix}"
    cells = ["prompt", "completion"], ["a", '"b, ""c""\n\td"'], ["", "\u65e5"]
    table.write_text("\ufeff" + "".join(between.join(row) + "\r\n" for row in cells), encoding="utf-8", newline="")
    with pytest.raises(FileRefused) as error:
        load_data(table, "no model")
    command = str(error.value).partition("; python ")[2].removesuffix(" converts it")
    subprocess.run(["sh", "-c", f"{sys.executable} {command}"], cwd=tmp_path, check=True)
    lines = [line for _, _, line in read_lines(tmp_path / "new.jsonl", [], checked)]
    assert lines == [Completion("a", 'b, "c"\n\td'), Completion("", "\u65e5")]
