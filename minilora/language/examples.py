"""From a file to what a language model trains on: a text, or examples of which a part counts.

A text becomes windows, see `minilora.language.text`. A .jsonl file has an example a line, an object of one of three
kinds:

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

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Array, FileRefused, check_integer, check_number, check_path, printable
from ..evaluation import Gradients
from ..layer import Layer
from ..losses import IGNORED, Loss
from ..training import evaluate_of
from .chat import encode_checked, tokens_of
from .chattemplate import ChatTemplate, load_template
from .llama import Llama
from .records import ARRAY, Record, checked, converted, read_records
from .text import (
    HELD_OUT,
    check_vocabulary,
    evaluate_where_it_counts,
    is_held_out,
    read_text,
    spread,
    token_ids,
    windows,
)
from .tokenizer import Tokenizer, load_tokenizer
from .widths import widths

EXAMPLES = ".jsonl"
WINDOW = 128
"""Tokens in a window of a text."""
LONGEST_ROW = 1024
"""Tokens of a {"text"} in a row: what exceeds them goes on in the next, so that nothing is lost."""
FILLED = 0
"""The id that fills a row: every model has it, and none sees it."""
DATA = {
    **dict.fromkeys((".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".xls"), "a table"),
    **dict.fromkeys((".npy", ".npz", ".pkl", ".pickle", ".h5", ".safetensors", ".gguf", ".db", ".sqlite"), "data"),
    **dict.fromkeys((".zip", ".gz", ".bz2", ".xz", ".zst", ".tar", ".7z"), "compressed data"),
    **dict.fromkeys((".pdf", ".docx", ".odt", ".epub", ".rtf"), "a document"),
}
"""Endings of files that hold no plain text, and what they hold."""
INSTEAD = (
    'expected a plain text, or a .jsonl file with {"messages": [...]}, {"prompt", "completion"} or {"text"} in each '
    "line"
)
TABLE_LINES = 10
"""A text whose first lines, at least so many, have the same number of commas, semicolons or tabs is a table."""
LISTED = 20
"""The most lines of examples that are left out whose numbers are shown."""
SHOWN = 40
"""The most lines of an example that are shown, and the letters of each are at most five times as many."""


@dataclass(frozen=True, eq=False)
class Example:
    """A line of a .jsonl file as tokens."""

    line: int  # its number, from 1
    ids: np.ndarray  # (m,) int64
    counted: np.ndarray  # (m,) bool, which of them the loss counts as targets
    whole: bool  # whether all of it counts, so that what exceeds a row goes on in the next


@dataclass(frozen=True, eq=False)
class Data:
    """What a language model trains on, and how it is told of."""

    X: np.ndarray  # (n, width) int64, to train on
    Y: np.ndarray  # (n, width) int64
    X_held: np.ndarray  # (m, width) int64, to measure the loss on
    Y_held: np.ndarray  # (m, width) int64
    rows: str  # what a row is, "windows" or "examples"
    summary: str  # what the file holds, in a line
    row_tokens: float  # of a row to train on, on average, without what fills it
    length: int  # the most tokens of a row
    example: str = ""  # one example as the model reads it, its counted tokens marked; "" of a text
    cut: Callable[[int], Data] | None = None  # examples in rows of another length

    @property
    def held_windows(self) -> float:
        """What is computed to measure the loss, in rows as wide as those to train on."""
        return float(widths(self.Y_held).sum() / self.X.shape[1])

    def check_vocabulary(self, size: int) -> None:
        """Refuse data with ids that a model of `size` tokens does not have: the tokenizer is another model's."""
        check_vocabulary(max(int(ids.max(initial=0)) for ids in (self.X, self.Y, self.X_held, self.Y_held)), size)


def load_data(
    path: str | Path,
    model: str | Path,
    length: int | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    held_out: float | str | Path = 1 / HELD_OUT,
) -> Data:
    """Read a text, or the examples of a .jsonl file, with the tokenizer and the chat template of a model.

    One window in ten is held out, or one example in ten.

    Parameters
    ----------
    path : path
        A text in UTF-8, or a .jsonl file.
    model : path
        The model, as `minilora.language.tokenizer.load_tokenizer` takes it.
    length : int, optional
        Of a row, at least 1. What exceeds it of a chat or a completion is cut off. Without it, no token that counts is:
        a row is as long as the longest chat or completion, and as the longest text up to `LONGEST_ROW`. A window of a
        text in prose has `WINDOW` tokens.
    tokenizer : Tokenizer, optional
        The model's, where it was read before.
    held_out : float, or path
        The share of windows or examples that is held out, from 0 to 0.5; or a file of the same kinds whose windows or
        examples are measured, while all of this one are trained on.

    Returns
    -------
    Data
        Rows of token ids, their targets, and what to print of them.

    Raises
    ------
    FileRefused
        If the file holds neither prose nor examples. An example is refused by the number of its line: one without a
        kind or with an empty completion, before the model is touched; and a chat that the model's template refuses, or
        leaves a part of out.
    ValueError, TypeError
        If there are less than two windows or examples, or none where nothing is held out, or `length` is out of range.
    """
    path = check_path("data", path)
    length = None if length is None else check_integer("length", length, at_least=1)
    refuse_data(path)
    if not isinstance(held_out, (int, float)):
        held = load_data(held_out, model, length, tokenizer=tokenizer, held_out=0)
        return beside(load_data(path, model, length, tokenizer=tokenizer, held_out=0), held, str(held_out))
    check_number("held_out", held_out, above=0, or_equal=True)
    if held_out > 0.5:
        raise ValueError(f"held_out must be at most 0.5, got {held_out}")
    if path.suffix.lower() == EXAMPLES:
        records = read_records(path)
        tokenizer = tokenizer or load_tokenizer(model)
        return of_examples(path, [*read_examples(path, records, model, tokenizer)], length, tokenizer, held_out)
    text = read_text(path)
    refuse_table(path, text)
    length = WINDOW if length is None else length
    ids = token_ids(text, (tokenizer or load_tokenizer(model)).encode)
    arrays = windows(ids, length, held_out)
    return Data(*arrays, "windows", f"{len(ids):,} tokens, {len(arrays[0]):,} windows of {length}", length, length)


def refuse_data(path: Path) -> None:
    """Refuse a file whose name says that it holds something else than a text, before it is read."""
    ending = path.suffix.lower()
    if ending in DATA and path.exists():
        how = f". A list of objects: {converted(path, ARRAY)}" if ending == ".json" else ""
        raise FileRefused(path, f"by its name it holds {DATA[ending]}: {INSTEAD}{how}")


def refuse_table(path: Path, text: str) -> None:
    """Refuse a text that is JSON, or a table: a model would learn its commas and brackets."""
    lines = [line for line in text[: 1 << 16].split("\n") if line.strip()][:50]
    if lines and all(line.lstrip().startswith("{") and _is_json(line) for line in lines[:3]):
        raise FileRefused(path, f"it holds a line of JSON after the other: {INSTEAD}, named so")
    if text.lstrip()[:1] in ("{", "[") and _is_json(text):
        raise FileRefused(path, f"it holds JSON: {INSTEAD}. A list of objects: {converted(path, ARRAY)}")
    lines = lines[:-1] if len(text) > 1 << 16 else lines  # the last may be cut
    for mark in "\t;,":
        counts = {line.strip().count(mark) for line in lines}
        if len(lines) >= TABLE_LINES and len(counts) == 1 and counts != {0}:
            name = {"\t": "tab", ";": "semicolon", ",": "comma"}[mark]
            raise FileRefused(path, f"it looks like a table, the same number of {name}s in each line: {INSTEAD}")


def _is_json(text: str) -> bool:
    """Return whether a text is an object or a list of JSON."""
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def read_examples(path: Path, records: Iterable[Record], model: str | Path, tokenizer: Tokenizer) -> Iterator[Example]:
    """Yield records as tokens; one that the chat template refuses is refused by its line.

    The chat template is read where the first chat comes.
    """
    template: ChatTemplate | None = None
    with ExitStack() as stack:
        for line, kind, entries in records:
            try:
                if template is None and kind == {"messages"}:
                    template = stack.enter_context(load_template(model))
                ids, counted = encode_record(kind, entries, tokenizer, template)
                if not counted.any():
                    raise ValueError("the tokenizer has no token for what counts of it: there is nothing to learn")
            except (ValueError, TypeError) as error:
                raise FileRefused(path, f"line {line}: {error}") from error
            yield Example(line, np.array(ids, np.int64), counted, whole=kind == {"text"})


def encode_example(
    record: dict[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> tuple[list[int], np.ndarray]:
    """Return the token ids of an example, and which of them count.

    What is no chat begins with the tokenizer's begin token, as a prompt of `minilora generate` does, and ends with its
    end token, so that the model learns where to stop; either only if it does not stand there already.

    Parameters
    ----------
    record : dict
        Of one of the three kinds.
    tokenizer : Tokenizer
        The model's.
    template : ChatTemplate, optional
        The model's, which messages need.

    Returns
    -------
    ids : list of int
        The tokens.
    counted : numpy.ndarray, shape (len(ids),), bool
        Which of them count.

    Raises
    ------
    ValueError
        If nothing of it counts, or the template refuses it.
    """
    return encode_record(*checked(record), tokenizer, template)


def encode_record(
    kind: set[str], entries: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None = None
) -> tuple[list[int], np.ndarray]:
    """Do what `encode_example` does with what `minilora.language.records.checked` returned."""
    if kind == {"messages"}:
        if template is None:
            raise ValueError("messages need the model's chat template")
        return encode_checked(entries["messages"], template, tokenizer, entries["tools"])
    prompt, completion = ("", entries["text"]) if kind == {"text"} else (entries["prompt"], entries["completion"])
    if prompt:
        ids, places = tokenizer.tokens(prompt + completion)
        counted = np.zeros(len(ids), bool)
        counted[tokens_of((len(prompt), len(prompt + completion)), places)] = True
    else:
        ids = token_ids(completion, tokenizer.encode)
        counted = np.ones(len(ids), bool)
    before = [] if tuple(ids[: len(tokenizer.begin)]) == tokenizer.begin else [*tokenizer.begin]
    behind = [] if ids and ids[-1] in {*tokenizer.end, *tokenizer.last} else [*tokenizer.last]
    counted = np.concatenate([np.zeros(len(before), bool), counted, np.ones(len(behind), bool)])
    return [*before, *ids, *behind], counted


def rows_of(example: Example, length: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the inputs of an example and its targets, -100 where none counts: one row; of a text as many as it needs.

    There is none if no target counts: what comes before the first that does fills the row.
    """
    targets = np.where(example.counted, example.ids, IGNORED)
    starts = range(0, len(example.ids) - 1, length) if example.whole else (0,)
    rows = [(example.ids[s : s + length], targets[s + 1 : s + length + 1]) for s in starts]
    rows = [(x[: len(y)], y) for x, y in rows]
    return rows if any((y != IGNORED).any() for _, y in rows) else []


def length_of(example: Example) -> int:
    """Return the least length of a row, at least 1, at which no token that counts is cut off."""
    last = int(example.counted.nonzero()[0][-1])
    return max(1, min(last, LONGEST_ROW) if example.whole else last)


def filled(rows: Iterable[tuple[np.ndarray, np.ndarray]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as two arrays, each (n, width): behind an example's end X has the id 0, and Y -100."""
    rows = list(rows)
    X, Y = np.full((len(rows), width), FILLED, np.int64), np.full((len(rows), width), IGNORED, np.int64)
    for row, (x, y) in enumerate(rows):
        X[row, : len(x)], Y[row, : len(y)] = x, y
    return X, Y


@dataclass(frozen=True)
class MeasuredWhereItCounts:
    """The same gradients, with losses that are measured as `evaluate_where_it_counts` does it."""

    gradients: Gradients
    workers: int | None = None  # to measure losses with

    def __call__(self, model: Layer, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients of ``loss(model(x), y)``."""
        return self.gradients(model, x, y, loss)

    def evaluate(self, model: Layer, X: Array, Y: Array, loss: Loss) -> float:
        """Return the loss over all of X and Y, of a `Llama` with logits only where a target counts."""
        if isinstance(model, Llama):
            return evaluate_where_it_counts(model, X, Y, loss, self.workers)
        return evaluate_of(self.gradients)(model, X, Y, loss)


def beside(data: Data, held: Data, name: str) -> Data:
    """Return data to train on with those of another file to measure the loss on: at most `MEASURED` rows of them."""
    rows, cut = spread(np.arange(len(held.X))), data.cut
    return replace(
        data,
        X_held=held.X[rows],
        Y_held=held.Y[rows],
        summary=f"{data.summary}; held out {printable(name)}: {held.summary}",
        cut=cut and (lambda length: beside(cut(length), held.cut(length) if held.cut else held, name)),
    )


def of_examples(
    path: Path, examples: list[Example], length: int | None, tokenizer: Tokenizer, share: float = 1 / HELD_OUT
) -> Data:
    """Return examples as arrays, as wide as the longest of them needs, one in ten held out.

    An example of which no token that counts is left is left out, and named.
    """
    least = 2 if share else 1
    if len(examples) < least:
        raise FileRefused(path, f"it has {len(examples)} example, expected at least 2: one is held out")
    longest = max(length_of(example) for example in examples)
    length = longest if length is None else length
    rows = [rows_of(example, length) for example in examples]
    learnable = [example for example, own in zip(examples, rows, strict=True) if own]
    if len(learnable) < least:
        raise FileRefused(
            path,
            f"{len(learnable)} of its {len(examples)} examples has a token to learn in a row of {length}, expected at "
            f"least {least}: --length {longest} keeps all",
        )
    trained: list[tuple[np.ndarray, np.ndarray]] = []
    held: list[tuple[np.ndarray, np.ndarray]] = []
    is_held = is_held_out(len(learnable), share)
    for own, to_measure in zip(filter(None, rows), is_held, strict=True):
        (held if to_measure else trained).extend(own)
    measured = [held[row] for row in spread(np.arange(len(held)))] if held else []
    width, held_out = max(len(x) for x, _ in trained + measured), int(is_held.sum())
    tokens, counted = sum(len(e.ids) for e in examples), sum((y != IGNORED).sum() for _, y in trained + held)
    summary = (
        f"{len(learnable) - held_out:,} examples{f' and {held_out:,} held out' if share else ''}, "
        f"{counted:,} of {tokens:,} tokens count{_lost(examples, length, longest)}"
    )
    shown = learnable[int(is_held.argmin())]  # the first to train on
    arrays, row_tokens = (*filled(trained, width), *filled(measured, width)), np.mean([len(x) for x, _ in trained])
    return Data(
        *arrays,
        "examples",
        summary,
        float(row_tokens),
        length,
        show(shown, length, tokenizer),
        lambda other: of_examples(path, examples, other, tokenizer, share),
    )


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
            lines.append(f"{'  |' if counted[start] else '   '} {printable(line, 5 * SHOWN)}")
    if len(lines) > SHOWN:
        lines = [*lines[: SHOWN // 2], f"    ... {len(lines) - SHOWN // 2 * 2} lines more ...", *lines[-SHOWN // 2 :]]
    return "\n".join([f"example  {head}", *lines])
