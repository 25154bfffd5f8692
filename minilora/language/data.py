"""The training data of a language model, read from a text or from a file of examples.

A text is cut into windows of token ids, see `minilora.language.text`. A .jsonl file has one example per line, a JSON
object of one of three kinds:

    {"prompt": "2 + 2 =", "completion": " 4"}        the completion and an end token count
    {"messages": [{"role": "user", ...}, ...]}       the assistant's turns count, see `minilora.language.chat`
    {"text": "..."}                                  the whole text and an end token count

No row contains tokens of two examples. An example's ids are i_0 ... i_m. Targets that do not count, and those of
padding, are -100, which the loss ignores. With rows of length 6:

    ids        i_0 i_1 i_2 i_3 i_4                   i_3 and i_4 count
    X          [i_0  i_1  i_2 i_3 0    0   ]
    Y          [-100 -100 i_3 i_4 -100 -100]

The padding of X comes after everything that counts. Since attention is causal, no earlier position sees it, so neither
the loss nor any gradient depends on it.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from ..checks import check_integer, check_path
from ..losses import IGNORE_INDEX
from ..texts import FileRefused, printable, short
from .chat import Prompt, checked_messages, encode_chat, read_chat, read_prompt, system_of, tokens_of, with_system
from .conversion import OF_ANSWERS, check_keys, how_to_convert
from .files.tokens import Tokenizer
from .source import ModelSource
from .text import HELD_OUT, evenly_spaced, is_held_out, read_text, token_ids, windows

EXAMPLES = ".jsonl"
CSV_ROWS = 'csv.DictReader(open(sys.argv[1], encoding="utf-8-sig", newline="")'
TO_LINES = {
    **dict.fromkeys((".json", ".ndjson"), "jq -c 'if type == \"array\" then .[] else . end'"),
    ".csv": f"python -c 'import csv, json, sys; [print(json.dumps(row)) for row in {CSV_ROWS})]'",
    ".tsv": f"python -c 'import csv, json, sys; [print(json.dumps(row)) for row in {CSV_ROWS}, delimiter=\"\\t\")]'",
}
"""Suffixes of structured data, of which a model would learn commas and brackets, with the commands that convert it."""
KINDS_OF_LINES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
EXPECTED = f"expected a plain text, or a .jsonl file whose lines are each {KINDS_OF_LINES}"
WINDOW_TOKENS = 128
"""The default number of tokens in a window of a text."""
LONGEST_ROW = 1024
"""The default for the most tokens of a {"text"} in one row; a longer text continues in the next row."""
PAD_ID = 0
"""The token id used as padding: every model has it, and no position that counts sees it."""
LISTED = 20
"""The largest number of lines, or of keys, that are listed for one reason."""
LINES_SHOWN = 40
"""The largest number of lines printed for an example; a line has at most five times as many characters."""


@dataclass(frozen=True, eq=False)
class Data:
    """The training and held-out rows for a language model, with descriptions to print."""

    X: np.ndarray  # (n, width) int64, the inputs to train on
    Y: np.ndarray  # (n, width) int64, their targets
    X_held: np.ndarray  # (m, width) int64, the inputs to measure the loss on
    Y_held: np.ndarray  # (m, width) int64, their targets
    held: int  # the number of held-out rows; the loss is measured on m of them
    unit: str  # "windows" or "examples"
    summary: str  # one line that summarises the file's contents
    row_tokens: float  # the mean number of tokens in a training row, without padding
    length: int  # the number of tokens in a full row
    example: str = ""  # an example as the model reads it, with the tokens that count marked; "" for a text
    notes: tuple[str, ...] = ()  # warnings about the examples, one sentence each
    marks: frozenset[bytes] = frozenset()  # the keys of the training examples, see `Example.mark`
    chats: bool = False  # whether any example is a chat
    system: str | None = None  # the system message that all chats start with
    with_length: Callable[[int], Data] | None = None  # returns the same data in rows of another length

    def of_length(self, length: int) -> Data:
        """Return the data in rows of at most `length` tokens. Windows of a text and shorter rows stay as they are."""
        return self if self.with_length is None or length >= self.length else self.with_length(length)

    @property
    def largest_id(self) -> int:
        """The largest token id in any row."""
        return max(int(ids.max(initial=0)) for ids in (self.X, self.Y, self.X_held, self.Y_held))


def load_data(
    path: str | Path,
    model: str | Path | ModelSource,
    length: int | None = None,
    *,
    held_out: float | str | Path = 1 / HELD_OUT,
    measured: int | None = None,
    system: str | None = None,
    skipped: list[BadLine] | None = None,
) -> Data:
    """Read a text in UTF-8, or the examples of a .jsonl file, with the tokenizer and the chat template of a model.

    A chat or completion is truncated to `length` tokens. By default nothing that counts is cut off: rows are as long
    as the longest chat or completion, or as the longest text up to `LONGEST_ROW`; a window has `WINDOW_TOKENS`.

    `held_out` is the share of windows or examples to hold out, from 0 to 0.5, or the path of a separate file. The
    loss is measured on `measured` evenly spaced held-out rows, by default on all. `system` is a system message for
    chats that have none.

    A file that is neither prose nor examples, that has fewer than two windows or examples, or that has unusable lines
    raises FileRefused, which lists those lines by number. If `skipped` is a list, they are appended to it instead.
    """
    source = model if isinstance(model, ModelSource) else ModelSource(check_path("model", model))
    length = None if length is None else check_integer("length", length, at_least=1)
    data_of = partial(_of_file, source=source, length=length, system=system, skipped=skipped)
    path = check_path("data", path)
    if isinstance(held_out, (int, float)):
        return data_of(path, share=held_out, measured=measured)
    data, held = (data_of(file) for file in (path, check_path("held_out", held_out)))
    return measured_on(data, held, str(held_out), measured)


def _of_file(
    path: Path, source: ModelSource, length: int | None, system: str | None, skipped: list[BadLine] | None, *,
    share: float = 0, measured: int | None = None,
) -> Data:  # fmt: skip
    """Return the data in one file, with a share of it held out."""
    if (suffix := path.suffix.lower()) in TO_LINES:
        raise FileRefused(path, f"{path.suffix} is structured data: {to_lines(path, suffix)}")
    if path.suffix.lower() == EXAMPLES:
        bad: list[BadLine] = []
        lines = read_lines(path, bad, partial(checked, system=system))
        if bad and not lines:
            raise BadLines(path, bad)
        examples = read_examples(lines, source, bad)
        if bad and skipped is None:
            raise BadLines(path, bad, "--skip-bad FILE writes such lines with their reasons to a file, and skips them")
        if skipped is not None:
            skipped += [line._replace(file=str(path)) for line in sorted(bad)]
        return of_examples(path, examples, length, source.tokenizer, share, measured)
    text = read_text(path)
    if _is_json(text):
        raise FileRefused(path, f"it contains JSON: {to_lines(path)}")
    length = WINDOW_TOKENS if length is None else length
    ids = token_ids(text, source.tokenizer.encode)
    arrays = windows(ids, length, share, measured)
    trained = len(arrays[0])
    out = (len(ids) - 1) // length - trained
    return Data(*arrays, out, "windows", f"{len(ids):,} tokens, {trained:,} windows of {length}", length, length)


def measured_on(data: Data, held: Data, name: str, measured: int | None = None) -> Data:
    """Return training data with the held-out rows of another file, at most `measured` of them."""
    rows, longer = evenly_spaced(np.arange(len(held.X)), measured), data.with_length
    name = printable(name)
    return replace(
        data,
        X_held=held.X[rows],
        Y_held=held.Y[rows],
        held=len(held.X),
        summary=f"{data.summary}; held out {name}: {held.summary}",
        notes=(
            *data.notes,
            *(f"{name}: {note}" for note in held.notes),
            *_overlap(len(held.marks & data.marks), len(held.marks)),
        ),
        with_length=longer
        and (lambda n: measured_on(longer(n), held.with_length(n) if held.with_length else held, name, measured)),
    )


def _is_json(text: str) -> bool:
    """Return whether a text is JSON or its first line is a JSON object: a model would learn brackets and commas."""
    for part, kinds in ((text, (dict, list)), (text.strip().partition("\n")[0], dict)):
        with suppress(msgspec.DecodeError, RecursionError):
            if isinstance(msgspec.json.decode(part), kinds):
                return True
    return False


def to_lines(path: Path, suffix: str = ".json") -> str:
    """Return the command that writes structured data as lines of JSON, with what was expected."""
    return f"{EXPECTED}; {TO_LINES[suffix]} {shlex.quote(str(path))} > new.jsonl converts it"


# --- the lines of a .jsonl file ---------------------------------------------------------------------------------------


class Chat(msgspec.Struct):
    """A chat, with the tools to pass to the chat template."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class Completion(msgspec.Struct):
    """A prompt, which does not count, with the completion that the model should learn."""

    prompt: str
    completion: str


class Text(msgspec.Struct):
    """A text, all of which counts."""

    text: str


Line = Chat | Completion | Text
Read = TypeVar("Read")
LINE_KEYS: dict[type[Line], set[str]] = {Chat: {"messages"}, Completion: {"prompt", "completion"}, Text: {"text"}}
"""The keys that identify each kind of line; keys without a meaning are allowed next to them."""
PROMPT_KEYS = {"prompt", *Chat.__struct_fields__}
"""The keys that are read of a row to be answered."""
REASONS = 10
"""The largest number of reasons that are listed for bad lines."""


class BadLine(NamedTuple):
    """An unusable line of a .jsonl file."""

    number: int  # counted from 1
    text: str
    reason: str
    file: str = ""


class BadLines(FileRefused):
    """A file has unusable lines. The message describes a single one, or counts them; `more` lists several."""

    def __init__(self, path: Path, bad: Sequence[BadLine], hint: str = "") -> None:
        reasons = by_reason(bad)
        super().__init__(path, reasons[0] if len(bad) == 1 else f"{len(bad):,} lines cannot be used:")
        self.more = [*(reasons if len(bad) > 1 else ()), *filter(None, [hint])]


def by_reason(bad: Iterable[BadLine]) -> list[str]:
    """Return one text for each reason why lines are unusable, with the numbers of those lines."""
    groups: dict[tuple[str, str], list[int]] = {}
    for line in sorted(bad, key=lambda line: (line.file, line.number)):
        groups.setdefault((line.file, line.reason), []).append(line.number)
    told = []
    for (file, reason), numbers in groups.items():
        several = f"{len(numbers):,} lines ({line_numbers(numbers)})"
        which = several if len(numbers) > 1 else f"line {numbers[0]}"
        told.append(f"{file}, {which}: {reason}" if file else f"{which}: {reason}")
    rest = sum(len(numbers) for numbers in [*groups.values()][REASONS:])
    return [*map(printable, told[:REASONS]), *([f"... and {rest:,} more lines"] if rest else [])]


def line_numbers(numbers: Sequence[int]) -> str:
    """Return the first numbers of lines, joined by commas."""
    return ", ".join(map(str, numbers[:LISTED])) + (", ..." if len(numbers) > LISTED else "")


@contextmanager
def at_line(number: int, text: str, bad: list[BadLine]) -> Iterator[None]:
    """Append a line to `bad` if the block raises an error about it."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
        bad.append(BadLine(number, text, str(error)))


def read_lines(path: Path, bad: list[BadLine], read: Callable[[Any], Read]) -> list[tuple[int, str, Read]]:
    """Return the non-blank lines of a .jsonl file as (number from 1, text, result of `read`).

    Lines that are not JSON, or that `read` refuses, are appended to `bad` instead.
    """
    text, lines = read_text(path), []
    if text.lstrip().startswith("[") and _is_json(text):
        raise FileRefused(path, f"it is one JSON array: {to_lines(path)}")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            with at_line(number, line, bad):
                lines.append((number, line, read(decoded(line))))
    return lines


def decoded(line: str) -> Any:
    """Return the JSON value in a line. In no object may a key appear twice, since only the last would be read."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        ((key, count),) = Counter(key for key, _ in pairs).most_common(1) or [("", 0)]
        if count > 1:
            raise ValueError(f"the key {short(key)} appears {count} times in one object, expected once")

    try:
        value = msgspec.json.decode(line)
    except msgspec.DecodeError as error:
        raise ValueError(f"expected one whole JSON object on one line: {error}") from None
    json.loads(line, object_pairs_hook=once)
    return value


def checked(record: Any, system: str | None = None) -> Line:
    """Return a line as one of the three kinds. Something in it must count, and no part of it may be ignored.

    A chat without a system message gets `system`.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is {short(record)}, expected one of {KINDS_OF_LINES}")
    present = {key for key, value in record.items() if value is not None}  # tables have null where a row has no value
    of = {kind: keys for kind, keys in LINE_KEYS.items() if keys <= record.keys()}
    kinds = [kind for kind, keys in of.items() if keys <= present] or [*of]
    if len(kinds) != 1:
        what = f"its keys are {short(sorted(record))}, expected one of {KINDS_OF_LINES}"
        raise ValueError(f"{what}{how_to_convert(record)}")
    check_keys(record, kinds[0].__struct_fields__)
    try:
        line = msgspec.convert(record, kinds[0])
    except msgspec.ValidationError as error:
        raise ValueError(f"{error}{how_to_convert(record)}") from None
    if isinstance(line, Chat):
        line.messages = with_system(checked_messages(line.messages), system)
    elif not (text := line.text if isinstance(line, Text) else line.completion).strip():
        raise ValueError(f"its {'text' if isinstance(line, Text) else 'completion'} is empty: {text!r}")
    return line


def not_read(keys: Iterable[str]) -> list[str]:
    """Return a note about keys that are not read, one from each row that has them, with the number of those rows."""
    counts = Counter(keys).most_common()
    told = [f"{printable(key, 80)} ({count:,})" for key, count in counts[:LISTED]]
    told[:1] = [f"{first[:-1]} row{'s' * (counts[0][1] > 1)})" for first in told[:1]]
    more = [f"and {len(counts) - LISTED:,} other keys"] if len(counts) > LISTED else []
    return [f"not read: {', '.join([*told, *more])}"] if told else []


def read_prompts(path: Path, source: ModelSource, system: str | None) -> list[tuple[dict[str, Any], Prompt]]:
    """Return the lines of a .jsonl file, each with its prompt; a chat without a system message gets `system`."""

    def read(record: Any) -> tuple[dict[str, Any], Prompt]:
        if not isinstance(record, dict):
            raise ValueError(f"it is {short(record)}, expected an object with prompt or messages")
        if not record.keys() & {"prompt", "messages"}:
            raise ValueError(f"it has neither prompt nor messages{how_to_convert(record)}")
        if "messages" in record:
            check_keys(record, {*Chat.__struct_fields__, *OF_ANSWERS})
            chat = msgspec.convert(record, Chat)
            prompt = read_chat(with_system(chat.messages, system), source.template, source.tokenizer, chat.tools)
        else:
            check_keys(record, {"prompt", *OF_ANSWERS})
            if not isinstance(record["prompt"], str):
                raise ValueError(f"its prompt is {short(record['prompt'])}, expected a text{how_to_convert(record)}")
            prompt = read_prompt(record["prompt"], source.tokenizer)
        if not prompt.ids:
            raise ValueError("its prompt is empty")
        return record, prompt

    bad: list[BadLine] = []
    lines = read_lines(path, bad, read)
    if bad:
        raise BadLines(path, bad)
    return [line for _, _, line in lines]


# --- examples -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Example:
    """The tokens of one example, from a line of a .jsonl file."""

    line: int  # the number of its line, from 1
    ids: np.ndarray  # (m,) int64
    counted: np.ndarray  # (m,) bool, which of them count as targets
    whole: bool  # whether it is a text, which counts as a whole and may take several rows
    missing_space: bool = False  # whether its completion lacks the space before it
    chat: bool = False  # whether it is a chat
    system: str | None = None  # the system message that a chat starts with, if any
    unread: tuple[str, ...] = ()  # the keys of its line that are not read and not null

    @property
    def mark(self) -> bytes:
        """A key that is equal for examples with equal tokens of which the same count."""
        return self.ids.tobytes() + self.counted.tobytes()


def read_examples(lines: Iterable[tuple[int, str, Line]], source: ModelSource, bad: list[BadLine]) -> list[Example]:
    """Return the tokens of each line. The chat template is only read if there is a chat."""
    examples, tokenizer = [], source.tokenizer
    for number, text, line in lines:
        template = source.template if isinstance(line, Chat) else None  # outside, since its errors are no line's fault
        with at_line(number, text, bad):
            ids, counted = encode_example(line, tokenizer, template)
            if not counted.any():
                raise ValueError("the part that counts has no tokens, so there is nothing to learn")
            missing_space = isinstance(line, Completion) and runs_together(line.prompt, line.completion)
            chat, whole = isinstance(line, Chat), isinstance(line, Text)
            system = system_of(line.messages) if isinstance(line, Chat) else None
            keys = msgspec.json.decode(text, type=dict[str, Any]).items()
            unread = tuple(key for key, value in keys if key not in line.__struct_fields__ and value is not None)
            examples.append(
                Example(number, np.array(ids, np.int64), counted, whole, missing_space, chat, system, unread)
            )
    return examples


def runs_together(prompt: str, completion: str) -> bool:
    """Return whether the prompt's last word would run into the completion's first, as in "is" and "Lima"."""
    joint = prompt[-1:] + completion[:1]
    return len(joint) == 2 and joint.isascii() and joint.isalnum()


def encode_example(
    record: Line | dict[str, Any], tokenizer: Tokenizer, template: Any = None
) -> tuple[list[int], np.ndarray]:
    """Return an example's ids, and which of them count, (n,) bool.

    A chat needs the model's `ChatTemplate`. Other examples get the tokenizer's begin and end tokens.
    """
    line = checked(record) if isinstance(record, dict) else record
    if isinstance(line, Chat):
        return encode_chat(line.messages, template, tokenizer, line.tools or None)
    prompt, completion = ("", line.text) if isinstance(line, Text) else (line.prompt, line.completion)
    if prompt:
        ids, places = tokenizer.tokens(prompt + completion)
        counted = np.zeros(len(ids), bool)
        counted[tokens_of((len(prompt), len(prompt + completion)), places)] = True
    else:
        ids = token_ids(completion, tokenizer.encode)
        counted = np.ones(len(ids), bool)
    before = [] if tuple(ids[: len(tokenizer.begin)]) == tokenizer.begin else [*tokenizer.begin]
    # The end token counts, so that the model learns when to stop.
    after = [] if ids and ids[-1] in {*tokenizer.end, *tokenizer.last} else [*tokenizer.last]
    counted = np.concatenate([np.zeros(len(before), bool), counted, np.ones(len(after), bool)])
    return [*before, *ids, *after], counted


def rows_of(example: Example, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return an example's rows of inputs and targets: one, several for a long text, or none if no target counts."""
    targets = np.where(example.counted, example.ids, IGNORE_INDEX)
    starts = range(0, len(example.ids) - 1, length) if example.whole else (0,)
    rows = [(example.ids[s : s + length], targets[s + 1 : s + length + 1]) for s in starts]
    rows = [(x[: len(y)], y) for x, y in rows]
    return rows if any((y != IGNORE_INDEX).any() for _, y in rows) else []


def length_of(example: Example) -> int:
    """Return the smallest row length that cuts off no target that counts; for a text, at most `LONGEST_ROW`."""
    last = int(example.counted.nonzero()[0][-1])
    return max(1, min(last, LONGEST_ROW) if example.whole else last)


def pad(rows: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as two arrays (n, width), X padded with `PAD_ID` and Y with `IGNORE_INDEX`."""
    rows = list(rows)
    X, Y = np.full((len(rows), width), PAD_ID, np.int64), np.full((len(rows), width), IGNORE_INDEX, np.int64)
    for row, (x, y) in enumerate(rows):
        X[row, : len(x)], Y[row, : len(y)] = x, y
    return X, Y


filled = pad
"""The fifth edition's name for `pad`."""


def of_examples(
    path: Path, examples: list[Example], length: int | None, tokenizer: Tokenizer, share: float = 1 / HELD_OUT,
    most_measured: int | None = None,
) -> Data:  # fmt: skip
    """Return examples as arrays, as wide as the longest row. Examples without a target that counts are dropped."""
    least, one = (2, ", one of them to hold out") if share else (1, "")
    longest = max(map(length_of, examples), default=0)
    length = longest if length is None else length
    rows = [rows_of(example, length) for example in examples]
    learnable = [example for example, own in zip(examples, rows, strict=True) if own]
    if len(learnable) < least:
        keeps = f": --length {longest} keeps all" if length < longest else ""
        raise FileRefused(
            path,
            f"examples with a token that counts in a row of {length}: {len(learnable)} of {len(examples)}, expected at "
            f"least {least}{one}{keeps}",
        )
    trained: list[tuple[np.ndarray, np.ndarray]] = []
    held: list[tuple[np.ndarray, np.ndarray]] = []
    is_held = is_held_out(len(learnable), share)
    for own, to_measure in zip(filter(None, rows), is_held, strict=True):
        (held if to_measure else trained).extend(own)
    measured = [held[row] for row in evenly_spaced(np.arange(len(held)), most_measured)]
    width, held_out = max(len(x) for x, _ in trained + measured), int(is_held.sum())
    tokens, counted = sum(len(e.ids) for e in examples), sum((y != IGNORE_INDEX).sum() for _, y in trained + held)
    summary = (
        f"{len(learnable) - held_out:,} examples{f' and {held_out:,} held out' if share else ''}, "
        f"{counted:,} of {tokens:,} tokens count{_truncated(examples, length, longest)}"
    )
    shown = learnable[int(is_held.argmin())]  # the first training example
    return Data(
        *pad(trained, width),
        *pad(measured, width),
        held=len(held),
        unit="examples",
        summary=summary,
        row_tokens=float(np.mean([len(x) for x, _ in trained])),
        length=length,
        example=show(shown, length, tokenizer),
        notes=example_warnings(learnable, is_held),
        marks=frozenset(example.mark for example, held in zip(learnable, is_held, strict=True) if not held),
        with_length=lambda other: of_examples(path, examples, other, tokenizer, share, most_measured),
        chats=any(example.chat for example in learnable),
        system=common_system(learnable),
    )


def common_system(examples: Sequence[Example]) -> str | None:
    """Return the system message that all chats start with; None if they differ or there is no chat."""
    found = {example.system for example in examples if example.chat}
    return found.pop() if len(found) == 1 else None


def example_warnings(examples: Sequence[Example], is_held: np.ndarray) -> tuple[str, ...]:
    """Return warnings: ignored keys, duplicates, held-out examples, and completions without a leading space."""
    marks = [example.mark for example in examples]
    trained = {mark for mark, held in zip(marks, is_held, strict=True) if not held}
    measured = [mark for mark, held in zip(marks, is_held, strict=True) if held]
    copies, missing_space = len(marks) - len({*marks}), [example for example in examples if example.missing_space]
    notes = not_read(key for example in examples for key in example.unread)
    notes += [f"duplicate examples: {copies:,}"] if copies else []
    notes += _overlap(sum(mark in trained for mark in measured), len(measured))
    if missing_space:
        notes.append(
            f"completions that run into their prompt, without a space between them: {len(missing_space):,}, the first "
            f"in line {missing_space[0].line}; a model would learn to join the two words"
        )
    return tuple(notes)


def _overlap(both: int, measured: int) -> list[str]:
    """Return a warning about examples that are in both the training and the held-out data."""
    return [f"held-out examples that are also trained on: {both:,} of {measured:,}"] if both else []


def _truncated(examples: list[Example], length: int, longest: int) -> str:
    """Describe the examples that a row length truncates or drops; "" if nothing that counts is lost."""
    cut = [example for example in examples if not example.whole and length_of(example) > length]
    gone = [example for example in examples if not rows_of(example, length)]
    text = ""
    if cut:
        lost = sum(int(example.counted[length + 1 :].sum()) for example in cut)
        text = f", {len(cut):,} truncated to {length} tokens, losing {lost:,} that count (--length {longest} keeps all)"
    if gone:
        lines = f"line{'s' * (len(gone) > 1)} {line_numbers([example.line for example in gone])}"
        text += f"; {len(gone):,} dropped for having none that counts in a row of {length} ({lines})"
    return text


def show(example: Example, length: int, tokenizer: Tokenizer) -> str:
    """Return an example as the model reads it, decoded line by line; a | marks the parts that count."""
    ids, counted = example.ids[: length + 1], example.counted[: length + 1].copy()
    counted[:1] = False  # nothing precedes the first token, so it is not a target
    head = f"line {example.line}, {len(ids):,} tokens, of which the {int(counted.sum()):,} after a | count:"
    cuts = [0, *(np.flatnonzero(counted[1:] != counted[:-1]) + 1), len(ids)]
    lines, text = [], ""
    for start, stop in pairwise(cuts):
        before, text = text, tokenizer.spell(ids[:stop].tolist())
        for line in text[len(before) :].splitlines(keepends=True):
            lines.append(f"{'  |' if counted[start] else '   '} {printable(line, 5 * LINES_SHOWN)}")
    if len(lines) > LINES_SHOWN:
        lines = [
            *lines[: LINES_SHOWN // 2],
            f"    ... {len(lines) - LINES_SHOWN // 2 * 2} more lines ...",
            *lines[-LINES_SHOWN // 2 :],
        ]
    return "\n".join([f"example  {head}", *lines])
