"""From a file to what a language model trains on: a text, or examples of which a part counts.

A text becomes windows of token ids, see `minilora.language.text`. A .jsonl file has an example a line, an object of one
of three kinds:

    {"prompt": "2 + 2 =", "completion": " 4"}        the completion counts, and the end token behind it
    {"messages": [{"role": "user", ...}, ...]}       the assistant's turns count, see `minilora.language.chat`
    {"text": "..."}                                  all of it counts, and the end token behind it

An example has rows of its own: no row joins two. Its ids are i_0 ... i_m; a target that does not count is -100, which
the loss passes over, and so is what fills a short row, here of length 6:

    ids        i_0 i_1 i_2 i_3 i_4                   i_3 and i_4 count
    X          [i_0  i_1  i_2 i_3 0    0   ]
    Y          [-100 -100 i_3 i_4 -100 -100]

What fills X stands behind all that counts. Attention is causal, so nothing before it sees it: neither the loss nor a
gradient depends on it.
"""

from __future__ import annotations

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
from .files.tokens import Tokenizer
from .source import ModelSource
from .text import HELD_OUT, is_held_out, read_text, spread, token_ids, windows

EXAMPLES = ".jsonl"
TABLES = (".json", ".ndjson", ".csv", ".tsv")
"""Endings of other data: of a text in one of them, a model would learn commas and brackets."""
KINDS_OF_LINES = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'
EXPECTED = f"expected a plain text, or a .jsonl file whose lines are each {KINDS_OF_LINES}"
WINDOW_TOKENS = 128
"""Tokens in a window of a text."""
LONGEST_ROW = 1024
"""Tokens of a {"text"} in a row: what exceeds them goes on in the next, so that nothing is lost."""
PAD_ID = 0
"""The id that fills a row: every model has it, and none sees it."""
LISTED = 20
"""The most lines of examples that are left out whose numbers are shown."""
LINES_SHOWN = 40
"""The most lines of an example that are shown, and the letters of each are at most five times as many."""


@dataclass(frozen=True, eq=False)
class Data:
    """What a language model trains on, and how it is told of."""

    X: np.ndarray  # (n, width) int64, to train on
    Y: np.ndarray  # (n, width) int64
    X_held: np.ndarray  # (m, width) int64, to measure the loss on
    Y_held: np.ndarray  # (m, width) int64
    held: int  # the rows that are held out, of which m are measured
    unit: str  # what a row is, "windows" or "examples"
    summary: str  # what the file holds, in a line
    row_tokens: float  # of a row to train on, on average, without what fills it
    length: int  # the most tokens of a row
    example: str = ""  # one example as the model reads it, its counted tokens marked; "" of a text
    notes: tuple[str, ...] = ()  # what is odd about the examples, a sentence each
    marks: frozenset[bytes] = frozenset()  # of the examples to train on, each its tokens and which of them count
    chats: bool = False  # whether there are some
    system: str | None = None  # the system message with which all chats begin
    with_length: Callable[[int], Data] | None = None  # examples in rows of another length

    def of_length(self, length: int) -> Data:
        """Return examples in rows of at most so many tokens; a text's windows, and rows no longer, as they are."""
        return self if self.with_length is None or length >= self.length else self.with_length(length)

    @property
    def largest_id(self) -> int:
        """The largest id of all rows."""
        return max(int(ids.max(initial=0)) for ids in (self.X, self.Y, self.X_held, self.Y_held))


def load_data(
    path: str | Path,
    model: str | Path | ModelSource,
    length: int | None = None,
    *,
    held_out: float | str | Path = 1 / HELD_OUT,
    measured: int | None = None,
    system: str | None = None,
    skipped: list[str] | None = None,
) -> Data:
    """Read a text in UTF-8, or the examples of a .jsonl file, with the tokenizer and the chat template of a model.

    What exceeds `length` of a chat or a completion is cut off. Without a length no token that counts is: a row is as
    long as the longest chat or completion, and as the longest text up to `LONGEST_ROW`; a window has `WINDOW_TOKENS`.

    `held_out` is the share of windows or examples to measure on, from 0 to 0.5; or a file of them, while all of this
    one are trained on. Of those held out, `measured` are measured, evenly spread, or all. `system` is a message that
    stands first in each chat that has none of its own.

    What the file lacks is a FileRefused: neither prose nor examples, less than two of them, or lines that cannot be
    used, all of them by their numbers. With `skipped` such lines are put into that list, and the others are read.
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
    path: Path, source: ModelSource, length: int | None, system: str | None, skipped: list[str] | None, *,
    share: float = 0, measured: int | None = None,
) -> Data:  # fmt: skip
    """Return what one file holds, of which a share is held out."""
    if path.suffix.lower() in TABLES:
        raise FileRefused(path, f"by its name it holds JSON or a table: {EXPECTED}")
    if path.suffix.lower() == EXAMPLES:
        bad: list[BadLine] = []
        lines = read_lines(path, bad, partial(checked, system=system))
        if bad and not lines:
            raise BadLines(path, bad)
        examples = read_examples(lines, source, bad)
        if bad and skipped is None:
            raise BadLines(path, bad)
        if skipped is not None:
            skipped += [line.text for line in sorted(bad)]
        return of_examples(path, examples, length, source.tokenizer, share, measured)
    text = read_text(path)
    if _is_json(text):
        raise FileRefused(path, f"it holds JSON: {EXPECTED}")
    length = WINDOW_TOKENS if length is None else length
    ids = token_ids(text, source.tokenizer.encode)
    arrays = windows(ids, length, share, measured)
    trained = len(arrays[0])
    out = (len(ids) - 1) // length - trained
    return Data(*arrays, out, "windows", f"{len(ids):,} tokens, {trained:,} windows of {length}", length, length)


def measured_on(data: Data, held: Data, name: str, measured: int | None = None) -> Data:
    """Return data to train on with those of another file to measure the loss on, or so many rows of them."""
    rows, longer = spread(np.arange(len(held.X)), measured), data.with_length
    return replace(
        data,
        X_held=held.X[rows],
        Y_held=held.Y[rows],
        held=len(held.X),
        summary=f"{data.summary}; held out {printable(name)}: {held.summary}",
        notes=(*data.notes, *held.notes, *_both(len(held.marks & data.marks), len(held.marks))),
        with_length=longer
        and (lambda n: measured_on(longer(n), held.with_length(n) if held.with_length else held, name, measured)),
    )


def _is_json(text: str) -> bool:
    """Return whether a text is JSON, or its first line an object: a model would learn brackets and commas."""
    for part, kinds in ((text, (dict, list)), (text.strip().partition("\n")[0], dict)):
        with suppress(msgspec.DecodeError, RecursionError):
            if isinstance(msgspec.json.decode(part), kinds):
                return True
    return False


# --- the lines of a .jsonl file ---------------------------------------------------------------------------------------


class Chat(msgspec.Struct):
    """A chat, and the tools that its template is told of."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


class Completion(msgspec.Struct):
    """A prompt, of which nothing counts, and what the model is to say then."""

    prompt: str
    completion: str


class Text(msgspec.Struct):
    """A text, all of which counts."""

    text: str


Line = Chat | Completion | Text
Read = TypeVar("Read")
LINE_KEYS: dict[type[Line], set[str]] = {Chat: {"messages"}, Completion: {"prompt", "completion"}, Text: {"text"}}
"""By which a line is of a kind, whatever else it has."""
LOST = {
    **dict.fromkeys(
        ("tools", "functions", "function_call", "documents", "chat_template_kwargs"),
        "a template gets messages and tools alone",
    ),
    **dict.fromkeys(("images", "videos", "audios"), "the model reads texts alone"),
    "system": """jq -c '{messages: ([{role: "system", content: .system}] + .messages)}' puts it among the messages""",
    "input": r"""jq -c '{prompt: (.prompt + "\n\n" + .input), completion}' puts it into the prompt""",
    "chosen": "jq -c '{prompt, completion: .chosen}' makes it the completion",
    "rejected": "jq -c 'del(.rejected)' leaves it out",
    "weight": "every example counts alike, and jq -c 'del(.weight)' says so",
}
"""Keys that change in other programs what a model learns, and why it would not here, or what to do."""
REASONS = 10
"""The most bad lines that are told one by one."""


class BadLine(NamedTuple):
    """A line that cannot be used."""

    number: int  # from 1
    text: str
    reason: str


class BadLines(FileRefused):
    """A file has lines that cannot be used. The message has the only one, or how many; `more` has one for each."""

    def __init__(self, path: Path, bad: Sequence[BadLine]) -> None:
        bad = sorted(bad)
        says = [f"line {line.number}: {line.reason}" for line in bad]
        super().__init__(path, says[0] if len(bad) == 1 else f"{len(bad)} lines cannot be used:")
        left_out = [f"... and {len(bad) - REASONS} more"] if len(bad) > REASONS else []
        self.more = [] if len(bad) == 1 else [*map(printable, says[:REASONS]), *left_out]


@contextmanager
def at_line(number: int, text: str, bad: list[BadLine]) -> Iterator[None]:
    """Put a line among the bad ones where it is."""
    try:
        yield
    except (ValueError, TypeError, RecursionError, msgspec.MsgspecError) as error:
        bad.append(BadLine(number, text, str(error)))


def read_lines(path: Path, bad: list[BadLine], read: Callable[[Any], Read]) -> list[tuple[int, str, Read]]:
    """Return the lines of a .jsonl file that are not blank: the number from 1, the text, and what `read` makes of it.

    What is not JSON, or what `read` refuses, is added to the bad lines instead.
    """
    lines: list[tuple[int, str, Read]] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with at_line(number, line, bad):
                lines.append((number, line, read(msgspec.json.decode(line))))
    return lines


def checked(record: Any, system: str | None = None) -> Line:
    """Return a line as one of the three kinds, of which something counts and nothing is lost.

    A chat that has no system message begins with this one.
    """
    kinds = [kind for kind, keys in LINE_KEYS.items() if isinstance(record, dict) and keys <= record.keys()]
    if len(kinds) != 1:
        what = f"its keys are {short(sorted(record))}" if isinstance(record, dict) else f"it is {short(record)}"
        raise ValueError(f"{what}, expected one of {KINDS_OF_LINES}")
    line = msgspec.convert(record, kinds[0])
    for name, instead in LOST.items():
        value = record.get(name)
        says = value not in (None, 1) if name == "weight" else bool(value)
        if says and not hasattr(line, name):
            raise ValueError(f"its {name} would be lost: {instead}")
    if isinstance(line, Chat):
        line.messages = with_system(checked_messages(line.messages), system)
    elif not (text := line.text if isinstance(line, Text) else line.completion).strip():
        raise ValueError(f"its {'text' if isinstance(line, Text) else 'completion'} is empty: {text!r}")
    return line


def read_prompts(path: Path, source: ModelSource, system: str | None) -> list[tuple[dict[str, Any], Prompt]]:
    """Return the lines of a .jsonl file, each with what the model is to continue; a system message begins each chat."""

    def read(record: Any) -> tuple[dict[str, Any], Prompt]:
        if not isinstance(record, dict) or not record.keys() & {"prompt", "messages"}:
            raise ValueError("it has neither a prompt nor messages")
        if "messages" in record:
            chat = msgspec.convert(record, Chat)
            prompt = read_chat(with_system(chat.messages, system), source.template, source.tokenizer, chat.tools)
        else:
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
    """A line of a .jsonl file as tokens."""

    line: int  # its number, from 1
    ids: np.ndarray  # (m,) int64
    counted: np.ndarray  # (m,) bool, which of them the loss counts as targets
    whole: bool  # whether all of it counts, so that what exceeds a row goes on in the next
    missing_space: bool = False  # whether its completion begins where no space is
    chat: bool = False
    system: str | None = None  # the message with which a chat begins, if that is the system's

    @property
    def mark(self) -> bytes:
        """What another example of the same tokens, of which the same count, has too."""
        return self.ids.tobytes() + self.counted.tobytes()


def read_examples(lines: Iterable[tuple[int, str, Line]], source: ModelSource, bad: list[BadLine]) -> list[Example]:
    """Return lines as tokens. The chat template is read where the first chat comes."""
    examples, tokenizer = [], source.tokenizer
    for number, text, line in lines:
        template = source.template if isinstance(line, Chat) else None  # what is wrong with it is no line's fault
        with at_line(number, text, bad):
            ids, counted = encode_example(line, tokenizer, template)
            if not counted.any():
                raise ValueError("the tokenizer has no token for what counts of it: there is nothing to learn")
            missing_space = isinstance(line, Completion) and is_glued(line.prompt, line.completion)
            chat, whole = isinstance(line, Chat), isinstance(line, Text)
            system = system_of(line.messages) if isinstance(line, Chat) else None
            examples.append(Example(number, np.array(ids, np.int64), counted, whole, missing_space, chat, system))
    return examples


def is_glued(prompt: str, completion: str) -> bool:
    """Return whether a prompt's last letter and a completion's first make one word, as in "is" and "Lima"."""
    joint = prompt[-1:] + completion[:1]
    return len(joint) == 2 and joint.isascii() and joint.isalnum()


def encode_example(
    record: Line | dict[str, Any], tokenizer: Tokenizer, template: Any = None
) -> tuple[list[int], np.ndarray]:
    """Return an example's ids, from begin to end token where it is no chat, and which of them count, (n,) bool.

    A chat needs the model's `ChatTemplate`.
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
    # The end token counts, so that the model learns where to stop.
    behind = [] if ids and ids[-1] in {*tokenizer.end, *tokenizer.last} else [*tokenizer.last]
    counted = np.concatenate([np.zeros(len(before), bool), counted, np.ones(len(behind), bool)])
    return [*before, *ids, *behind], counted


def rows_of(example: Example, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the inputs of an example and its targets: one row, of a text as many as it needs, none if none counts."""
    targets = np.where(example.counted, example.ids, IGNORE_INDEX)
    starts = range(0, len(example.ids) - 1, length) if example.whole else (0,)
    rows = [(example.ids[s : s + length], targets[s + 1 : s + length + 1]) for s in starts]
    rows = [(x[: len(y)], y) for x, y in rows]
    return rows if any((y != IGNORE_INDEX).any() for _, y in rows) else []


def length_of(example: Example) -> int:
    """Return the least length of a row, at least 1, at which no token that counts is cut off."""
    last = int(example.counted.nonzero()[0][-1])
    return max(1, min(last, LONGEST_ROW) if example.whole else last)


def pad(rows: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as two arrays, each (n, width): behind an example's end X has the id 0, and Y -100."""
    rows = list(rows)
    X, Y = np.full((len(rows), width), PAD_ID, np.int64), np.full((len(rows), width), IGNORE_INDEX, np.int64)
    for row, (x, y) in enumerate(rows):
        X[row, : len(x)], Y[row, : len(y)] = x, y
    return X, Y


filled = pad
"""The name in the fifth edition."""


def of_examples(
    path: Path, examples: list[Example], length: int | None, tokenizer: Tokenizer, share: float = 1 / HELD_OUT,
    most_measured: int | None = None,
) -> Data:  # fmt: skip
    """Return examples as arrays, as wide as the longest of them needs; one in which no token counts is left out."""
    least, one = (2, ", one of them to hold out") if share else (1, "")
    longest = max(map(length_of, examples), default=0)
    length = longest if length is None else length
    rows = [rows_of(example, length) for example in examples]
    learnable = [example for example, own in zip(examples, rows, strict=True) if own]
    if len(learnable) < least:
        keeps = f": --length {longest} keeps all" if length < longest else ""
        raise FileRefused(
            path,
            f"{len(learnable)} of its {len(examples)} examples has a token to learn in a row of {length}, expected at "
            f"least {least}{one}{keeps}",
        )
    trained: list[tuple[np.ndarray, np.ndarray]] = []
    held: list[tuple[np.ndarray, np.ndarray]] = []
    is_held = is_held_out(len(learnable), share)
    for own, to_measure in zip(filter(None, rows), is_held, strict=True):
        (held if to_measure else trained).extend(own)
    measured = [held[row] for row in spread(np.arange(len(held)), most_measured)]
    width, held_out = max(len(x) for x, _ in trained + measured), int(is_held.sum())
    tokens, counted = sum(len(e.ids) for e in examples), sum((y != IGNORE_INDEX).sum() for _, y in trained + held)
    summary = (
        f"{len(learnable) - held_out:,} examples{f' and {held_out:,} held out' if share else ''}, "
        f"{counted:,} of {tokens:,} tokens count{_lost(examples, length, longest)}"
    )
    shown = learnable[int(is_held.argmin())]  # the first to train on
    return Data(
        *pad(trained, width),
        *pad(measured, width),
        held=len(held),
        unit="examples",
        summary=summary,
        row_tokens=float(np.mean([len(x) for x, _ in trained])),
        length=length,
        example=show(shown, length, tokenizer),
        notes=oddities(learnable, is_held),
        marks=frozenset(example.mark for example, held in zip(learnable, is_held, strict=True) if not held),
        with_length=lambda other: of_examples(path, examples, other, tokenizer, share, most_measured),
        chats=any(example.chat for example in learnable),
        system=common_system(learnable),
    )


def common_system(examples: Sequence[Example]) -> str | None:
    """Return the system message with which all chats begin; None where they differ, or there is no chat."""
    found = {example.system for example in examples if example.chat}
    return found.pop() if len(found) == 1 else None


def oddities(examples: Sequence[Example], is_held: np.ndarray) -> tuple[str, ...]:
    """Return what is odd about examples: copies, also among those held out, and completions without a space."""
    marks = [example.mark for example in examples]
    trained = {mark for mark, held in zip(marks, is_held, strict=True) if not held}
    measured = [mark for mark, held in zip(marks, is_held, strict=True) if held]
    copies, missing_space = len(marks) - len({*marks}), [example for example in examples if example.missing_space]
    notes = [f"copies of other examples: {copies:,}"] if copies else []
    notes += _both(sum(mark in trained for mark in measured), len(measured))
    if missing_space:
        notes.append(
            f"completions without a space behind a prompt without one: {len(missing_space):,}, the first in line "
            f"{missing_space[0].line}; a model would write one word of both"
        )
    return tuple(notes)


def _both(both: int, measured: int) -> list[str]:
    """Say how many examples are trained on and held out too."""
    return [f"held out and trained on too: {both:,} of {measured:,} examples"] if both else []


def _lost(examples: list[Example], length: int, longest: int) -> str:
    """Say what a length cuts off of examples, and which it leaves out; "" where nothing that counts is lost."""
    cut = [example for example in examples if not example.whole and length_of(example) > length]
    gone = [example for example in examples if not rows_of(example, length)]
    text = ""
    if cut:
        lost = sum(int(example.counted[length + 1 :].sum()) for example in cut)
        text = (
            f", {len(cut):,} are cut after {length} tokens: {lost:,} more that count are lost, and --length {longest} "
            "keeps all"
        )
    if gone:
        lines = ", ".join(str(example.line) for example in gone[:LISTED]) + (", ..." if len(gone) > LISTED else "")
        lines = f"line{'s' * (len(gone) > 1)} {lines}"
        text += f"; {len(gone):,} with nothing to learn in a row of {length} are left out ({lines})"
    return text


def show(example: Example, length: int, tokenizer: Tokenizer) -> str:
    """Return an example as the model reads it, decoded, a line for each of its lines: behind a | is what counts."""
    ids, counted = example.ids[: length + 1], example.counted[: length + 1].copy()
    counted[:1] = False  # nothing comes before the first token, so it is no target
    head = f"line {example.line}, {len(ids):,} tokens; the {int(counted.sum()):,} behind a | count:"
    cuts = [0, *(np.flatnonzero(counted[1:] != counted[:-1]) + 1), len(ids)]
    lines, text = [], ""
    for start, stop in pairwise(cuts):
        before, text = text, tokenizer.spell(ids[:stop].tolist())
        for line in text[len(before) :].splitlines(keepends=True):
            lines.append(f"{'  |' if counted[start] else '   '} {printable(line, 5 * LINES_SHOWN)}")
    if len(lines) > LINES_SHOWN:
        lines = [
            *lines[: LINES_SHOWN // 2],
            f"    ... {len(lines) - LINES_SHOWN // 2 * 2} lines more ...",
            *lines[-LINES_SHOWN // 2 :],
        ]
    return "\n".join([f"example  {head}", *lines])
