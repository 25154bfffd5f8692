"""Data of other people: refused with the command that converts them, and what it makes is taken."""

import json
import re
import shutil
import subprocess

import pytest

from minilora.checks import FileRefused
from minilora.language.records import checked, read_records

ALPACA = [
    {"instruction": "add\nit", "input": "2 'and' 2", "output": "4"},
    {"instruction": "hi", "input": "", "output": "hello"},
    {"instruction": "hi", "output": "hello"},
]
SHAREGPT = [
    {"conversations": [{"from": f, "value": f"{f} says"} for f in ("system", "human", "gpt", "human", "gpt")]},
    {"conversations": [{"from": f, "value": f"{f} says"} for f in ("user", "assistant")]},
]
ROLES = [
    {"messages": [{"role": r, "content": f"{r} says"} for r in roles]} for roles in (("human", "bot"), ("human", "ai"))
]
PAIRS = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 2


def chat(*pairs):
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("records", "said", "expected"),
    [
        (ALPACA, "They are Alpaca's", chat(("user", "add\nit\n\n2 'and' 2"), ("assistant", "4"))),
        (ALPACA[1:], "They are Alpaca's", chat(("user", "hi"), ("assistant", "hello"))),
        (ALPACA[2:], "They are Alpaca's", chat(("user", "hi"), ("assistant", "hello"))),
        (
            SHAREGPT,
            "They are ShareGPT's",
            chat(
                *[(r, f"{f} says") for r, f in (("system", "system"), *[("user", "human"), ("assistant", "gpt")] * 2)]
            ),
        ),
        (ROLES[:1], r"The roles are \['bot', 'human'\]", chat(("user", "human says"), ("assistant", "bot says"))),
        (ROLES[1:], r"The roles are \['ai', 'human'\]", chat(("user", "human says"), ("assistant", "ai says"))),
        (PAIRS, "its prompt is .* expected a text. Of messages", chat(("user", "a"), ("assistant", "b"))),
    ],
)
def test_data_in_another_form_are_refused_with_the_command_that_converts_them(tmp_path, records, said, expected):
    file = tmp_path / "my data's.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    assert converted(tmp_path, file, f"line 1: .*{said}")[0].entries["messages"] == expected["messages"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_json_is_refused_with_the_command_that_converts_it(tmp_path, indent):
    file = tmp_path / "list.jsonl"
    file.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=indent))
    assert [r.entries["text"] for r in converted(tmp_path, file, "it holds a list of JSON, expected an obj")] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("code", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named_with_the_command_that_converts_it(tmp_path, code):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "a\u00e9"}\n'.encode(code))
    with pytest.raises(ValueError, match=r"not a text in UTF-8 but in UTF-16: iconv .* > NEW") as refused:
        read_records(file)
    if code == "utf-16":
        run(tmp_path, re.search("iconv .* > NEW", str(refused.value))[0])
        (tmp_path / "NEW").rename(tmp_path / "new.jsonl")
        assert read_records(tmp_path / "new.jsonl")[0].entries == {"text": "a\u00e9"}


def converted(folder, file, said):
    """Return the records that the command in a refusal makes."""
    with pytest.raises(FileRefused, match=said) as refused:
        read_records(file)
    command = re.search(r"jq -c .* > NEW.jsonl", str(refused.value))[0]
    if not shutil.which("jq"):
        pytest.skip("jq is not installed")
    run(folder, command)
    return read_records(folder / "NEW.jsonl")


def run(folder, command):
    subprocess.run(["sh", "-c", command], cwd=folder, check=True)


def test_blank_lines_are_passed_over_and_lines_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\r\n\n{"prompt": "", "completion": "b", "id": 7}\n')
    first, second = read_records(tmp_path / "a.jsonl")
    assert (first.line, first.kind, second.line, second.kind) == (2, {"text"}, 4, {"prompt", "completion"})


def test_tools_are_a_list():
    message = {"messages": [{"role": "assistant", "content": "a"}]}
    assert checked({**message, "tools": [{"name": "f"}]})[1]["tools"] == [{"name": "f"}]
    assert checked({**message, "tools": []})[1]["tools"] is None
    with pytest.raises(ValueError, match="its tools are 'f', expected a list"):
        checked({**message, "tools": "f"})


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "a\\udc00b"])
def test_half_of_a_letter_is_refused_by_its_line(tmp_path, half):
    """JSON can write it, as of an emoji that was cut; the whole one is taken."""
    path = tmp_path / "e.jsonl"
    whole = '{"text": "the \\ud83d\\ude00"}\n'
    path.write_text(whole + '{"text": "the HALF"}\n'.replace("HALF", half))
    with pytest.raises(
        FileRefused,
        match=r"example in line 2: (JSON is malformed|Input data was truncated)",
    ):
        read_records(path)
    path.write_text(whole)
    assert read_records(path)[0].entries["text"] == "the \N{GRINNING FACE}"
