"""The lines of a .jsonl file as records: of one kind each, or refused by the line, before a model is touched.

Data come in other people's forms. Where one is known, the refusal has the command of jq that converts it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import FileRefused, printable, short
from ..files.inputs import parse_json
from .chat import SPEAKER, checked_messages
from .text import read_text

KINDS = ({"messages"}, {"prompt", "completion"}, {"text"})
"""The keys of which an example has those of one set, whatever else it has."""
FOR_A_TEMPLATE = ("tools", "functions", "function_call", "documents", "chat_template_kwargs")
"""Keys beside those that say what a model reads. Of them a template here gets the tools alone."""
ALPACA = (
    '{messages: [{role: "user", content: (.instruction + (if (.input // "") == "" then "" else "\\n\\n" + .input '
    'end))}, {role: "assistant", content: .output}]}'
)
SHAREGPT = (
    '{messages: [.conversations[] | {role: ({"human": "user", "gpt": "assistant"}[.from] // .from), content: .value}]}'
)
IN_MESSAGES = "{messages: (.prompt + .completion)}"
ARRAY = ".[]"
"""Programs of jq that make examples of other data."""
NAMES = {"human": "user", "bot": "assistant", "gpt": "assistant", "ai": "assistant", "model": "assistant"}
"""Other names of the two roles."""


class Record(NamedTuple):
    """A line of the file."""

    line: int  # its number, from 1
    kind: set[str]  # of `KINDS`
    entries: dict[str, Any]  # what it says, contents in parts joined


def read_records(path: Path) -> list[Record]:
    """Return the records of a .jsonl file; blank lines are passed over.

    Raises
    ------
    FileRefused
        If a line is no JSON, or no example: by its number.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        raise FileRefused(path, f"it holds a list of JSON, expected an object in each line: {converted(path, ARRAY)}")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            entries = parse_json(path, line, what=f"example in line {number}")
            try:
                records.append(Record(number, *checked(entries, path)))
            except ValueError as error:
                raise FileRefused(path, f"line {number}: {error}") from error
    return records


def converted(path: Path | None, program: str) -> str:
    """Return the command that makes examples of a file with other data."""
    name = "FILE" if path is None else printable(shlex.quote(str(path)))
    return f"jq -c {shlex.quote(program)} {name} > NEW.jsonl converts it"


def kind_of_example(record: Mapping[str, Any], path: Path | None = None) -> set[str]:
    """Return the keys that say what an example is, or refuse one that is of no kind, or of two."""
    kinds = [kind for kind in KINDS if kind <= record.keys()]
    if len(kinds) != 1:
        hint = ""
        if not kinds and {"instruction", "output"} <= record.keys():
            hint = f". They are Alpaca's: {converted(path, ALPACA)}"
        if not kinds and "conversations" in record:
            hint = f". They are ShareGPT's: {converted(path, SHAREGPT)}"
        raise ValueError(
            f"its keys are {short(sorted(record))}, expected those of one kind: messages, prompt and completion, or "
            f"text{hint}"
        )
    return kinds[0]


def checked(record: Mapping[str, Any], path: Path | None = None) -> tuple[set[str], dict[str, Any]]:
    """Return the kind of an example and what it says, a content in parts of text as one text.

    Raises
    ------
    ValueError
        If it is of no kind, a text is none, or nothing of it counts, or it has keys that no template gets.
    """
    kind = kind_of_example(record, path)
    for name in FOR_A_TEMPLATE:
        if record.get(name) and not (name == "tools" and kind == {"messages"}):
            where = (
                "given to no template, which takes messages and tools" if name == "tools" else "not given to a template"
            )
            raise ValueError(f"its {name} would be lost: they are {where}")
    if kind == {"messages"}:
        return kind, {**record, "messages": _messages(record["messages"], path), "tools": _tools(record.get("tools"))}
    for name in sorted(kind, reverse=True):  # the prompt first
        text = record[name]
        if not isinstance(text, str):
            listed = isinstance(text, list) and kind == {"prompt", "completion"}
            hint = f". Of messages: {converted(path, IN_MESSAGES)}" if listed else ""
            raise ValueError(f"its {name} is {short(text)}, expected a text{hint}")
        if name != "prompt" and not text.strip():
            raise ValueError(f"its {name} is empty: {short(text)}")
    return kind, dict(record)


def _messages(messages: Any, path: Path | None) -> Sequence[Mapping[str, Any]]:
    try:
        return checked_messages(messages)
    except ValueError as error:
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise
        roles = {str(message.get("role")) for message in messages}
        if SPEAKER in roles or not roles & NAMES.keys():
            raise
        raise ValueError(f"{error}: {converted(path, _renamed(roles))}") from error


def _renamed(roles: set[str]) -> str:
    """Return the program of jq that gives roles their usual names."""
    names = ", ".join(f'"{role}": "{NAMES[role]}"' for role in sorted(roles & NAMES.keys()))
    return f".messages[].role |= ({{{names}}}[.] // .)"


def _tools(tools: Any) -> list[Any] | None:
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"its tools are {short(tools)}, expected a list")
    return tools or None
