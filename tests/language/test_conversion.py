"""Rows of other programs' data: refused, with a jq program that converts the file and loses nothing silently."""

import json
import re
import shutil
import subprocess

import pytest

from minilora.language.conversion import EQUAL, LOST, OF_ANSWERS, PREFERENCES, conversion
from minilora.language.data import LINE_KEYS, Chat, Completion, Text, checked, not_read

from ..support.compare import refused

ASK, TELL = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
OTHER = {"role": "assistant", "content": "go away"}
CHAT, PAIR = {"messages": [ASK, TELL]}, {"prompt": "hi", "completion": "hello"}
SYSTEM = {"role": "system", "content": "be kind"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}
BEFORE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
KINDS = [PAIR, CHAT, {"text": "hi hello"}]

PREFERRED = [  # rows of preferences, and what the program makes of them
    ({"prompt": "hi", "chosen": "hello", "rejected": "go away"}, PAIR),
    ({"prompt": [ASK], "chosen": [TELL], "rejected": [OTHER]}, CHAT),
    ({"prompt": "hi", "chosen": [TELL], "rejected": [OTHER]}, CHAT),
    ({"prompt": "hi", "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, CHAT),
    ({"chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, CHAT),
    ({"chosen": "hi hello", "rejected": "hi, go away"}, {"text": "hi hello"}),
    ({**CHAT, "prompt": "hi", "chosen": [ASK, TELL], "rejected": [ASK, OTHER]}, CHAT),
    ({"messages": [ASK, OTHER], "chosen": "hello", "rejected": "go away"}, CHAT),
    ({"input": {"messages": [ASK], "tools": []}, "preferred_output": [TELL], "non_preferred_output": [OTHER]},
     {**CHAT, "tools": []}),
    ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "go away"}}, CHAT),
    ({"system": "be kind", "question": "hi", "chosen": "hello", "rejected": "go away"},
     {"messages": [SYSTEM, ASK, TELL]}),
    ({**PAIR, "rejected": "go away"}, PAIR),
    ({**CHAT, "rejected_messages": [OTHER]}, CHAT),
]  # fmt: skip
FORMATS = [
    ({"instruction": "hi", "input": "", "output": "hello"}, CHAT),
    ({"instruction": "h", "input": "i", "output": "hello"}, {"messages": [{**ASK, "content": "h\n\ni"}, TELL]}),
    ({"instruction": "hi", "input": None, "output": "hello", "history": [["a", "b"]], "system": "be kind"},
     {"messages": [SYSTEM, *BEFORE, ASK, TELL], "input": None}),
    ({"instruction": "hi", "context": "", "response": "hello"}, CHAT),
    ({"conversations": [HUMAN, GPT]}, CHAT),
    ({"conversations": [HUMAN, GPT], "system": "be kind"}, {"messages": [SYSTEM, ASK, TELL]}),
    ({"dialog": [{"role": "user", "value": "hi"}, {"role": "assistant", "value": "hello"}]}, CHAT),
    ({"prompt": "hi", "response": "hello"}, PAIR),
    ({"question": "hi", "answer": "hello"}, CHAT),
    ({"prompt": [ASK], "completion": [TELL]}, CHAT),
    ({"prompt": "hi", "completion": [TELL]}, CHAT),
    ({"prompt": [ASK], "completion": "hello"}, CHAT),
    ({**PAIR, "system": "be kind"}, {"messages": [SYSTEM, ASK, TELL]}),
    ({**PAIR, "history": [["a", "b"]]}, {"messages": [*BEFORE, ASK, TELL]}),
    ({**PAIR, "history": BEFORE}, {"messages": [*BEFORE, ASK, TELL]}),
    ({**PAIR, "context": "a"}, {**PAIR, "prompt": "a\n\nhi"}),
    ({**PAIR, "input": "a"}, {**PAIR, "prompt": "hi\n\na"}),
    ({**CHAT, "system": "be kind"}, {"messages": [SYSTEM, ASK, TELL]}),
    ({"messages": [ASK], "completion": "hello"}, CHAT),
    ({**CHAT, "completion": "more"}, CHAT),
    ({**CHAT, "prompt": "hi"}, CHAT),
    ({**CHAT, "conversations": [HUMAN]}, CHAT),
    ({"text": "hi hello", "instruction": "hi", "output": "hello"}, {"text": "hi hello"}),
]  # fmt: skip


def programs(record):
    with pytest.raises(ValueError, match="jq -c '") as error:
        checked(record)
    return re.findall(r"jq -c '([^']*)'", str(error.value))


def run(program, *records):
    lines = "".join(json.dumps(record) + "\n" for record in records)
    done = subprocess.run(["jq", "-c", program], input=lines, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize(("row", "expected"), [*PREFERRED, *FORMATS])
def test_the_suggested_program_converts_a_row(row, expected):
    """Other keys of the row stay, among them those that are refused next, and so do lines without its keys."""
    program = programs(row)[0]
    more = {"label": False, "id": 7}
    assert run(program, row, {**row, **more}) == [expected, {**expected, **more}]
    checked(expected)
    if {*row} != {"prompt", "completion"}:
        others = [kind for kind in KINDS if not {*kind} & {*row}]
        assert run(program, *others) == others


@pytest.mark.parametrize("row", [row for row, _ in PREFERRED])
def test_rows_of_preferences_say_what_is_trained(row):
    with pytest.raises(ValueError, match=re.escape(PREFERENCES)):
        checked(row)


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize("label", [False, 0])
def test_a_bad_answer_is_not_learned_as_a_good_one(label):
    for kind in KINDS:
        (program,) = programs({**kind, "label": label})
        others = [{**kind, "label": other} for other in (0, False, -1, "bad", 0.2)]
        assert run(program, {**kind, "label": label}, {**kind, "label": True}, kind, *others) == [kind, kind]
        checked({**kind, "label": True})


@pytest.mark.skipif(not shutil.which("jq"), reason="jq is not installed")
@pytest.mark.parametrize("key", LOST)
def test_no_key_that_changes_learning_passes(key):
    """Beside each kind of line that does not read it; a value without content and a weight of 1 pass."""
    for kind, keys in zip(KINDS, ({*LINE_KEYS[Completion]}, {"messages", "tools"}, {"text"}), strict=True):
        if key not in keys and key != "messages":
            row = {**kind, key: "x"}
            removal = programs(row)[-1]
            assert run(removal, row) == [kind]
            for value in (None, "", [], {}, *([1, 1.0, True] if LOST[key] == EQUAL else [])):
                checked({**kind, key: value})
            if LOST[key] == EQUAL:
                for value in (0.5, [0], -1.0):
                    assert run(programs({**kind, key: value})[-1], {**kind, key: value}) == [kind]


def test_keys_without_a_meaning_pass():
    for kind, line in zip(KINDS, (Completion("hi", "hello"), Chat([ASK, TELL]), Text("hi hello")), strict=True):
        assert checked({**kind, "id": 7, "source": "a book", "lost": None}) == line


def test_a_null_makes_no_other_kind_of_line():
    """A table of several kinds of rows has null where a row has no value."""
    nulls = dict.fromkeys(["prompt", "completion", "messages", "text", "chosen", "tools"])
    for kind in KINDS:
        assert checked({**nulls, **kind}) == checked(kind)
    (program, *_) = programs({**nulls, "instruction": "hi", "output": "hello"})
    assert "del(.instruction, .output)" in program


def test_several_lost_keys_are_reported_together():
    message = (
        "its images and score would be ignored: the model reads only text; all examples and all tokens of an answer "
        "have the same weight; jq -c 'del(.images, .score)' removes them"
    )
    with refused(message, ValueError):
        checked({**PAIR, "score": 3, "images": ["x.png"]})


def test_only_keys_of_answers_may_stand_beside_a_prompt():
    assert {"completion", "rejected", "score", "label"} <= OF_ANSWERS
    assert not {"system", "context", "images", "tools", "prompt"} & OF_ANSWERS


def test_an_unknown_format_gets_no_program():
    for row in (
        {"a": 1},
        {"prompt": "hi"},
        {"instruction": "hi"},
        {"output": "hi"},
        {**PAIR, **KINDS[2]},
        {"messages": []},
    ):
        with pytest.raises(ValueError, match=r"expected|empty") as error:
            checked(row)
        assert "jq" not in str(error.value)


def test_a_program_contains_no_text_of_the_row():
    """It is pasted into a shell, where a quote would end it."""
    evil = "'; rm -rf x; '"
    for row, _ in [*PREFERRED, *FORMATS]:
        for value in (evil, {"messages": [ASK], evil: 1}, [{evil: evil, "role": evil, "content": evil}]):
            for changed in ({**row, evil: value}, *({**row, key: value} for key in row)):
                assert evil not in conversion(changed)[0]
                assert "'" not in conversion(changed)[0]


def test_the_commonest_unread_key_is_named_first():
    assert not_read([]) == []
    assert not_read("abb") == ["not read: b (2 rows), a (1)"]
    assert not_read("a") == ["not read: a (1 row)"]
