"""Windows of token ids from a text, with the next-token loss.

    ids        i_0 i_1 i_2 i_3 i_4 i_5 i_6            of length 3:
    X          [i_0 i_1 i_2]  [i_3 i_4 i_5]           (n, length) inputs
    Y          [i_1 i_2 i_3]  [i_4 i_5 i_6]           (n, length) targets: the next id, at every position at once

Each id except the first is a target once. The model's output at position t depends only on the inputs up to t, so each
position of a window is a training example.

In a chat most targets do not count, and the head is the largest product of a small model. So logits are computed only
where a target counts, and nothing is computed after the last such position.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_ids, check_integer, check_shape
from ..fast.widths import of_area, widths
from ..files.disk import open_regular
from ..fitting import check_data
from ..gradients import backpropagate
from ..losses import IGNORE_INDEX, Loss, count, cross_entropy
from ..texts import FileRefused, reading
from ..training import EVALUATION_ROWS, sum_of
from ..variants.dropout import with_rows_at
from .llama import Llama

HELD_OUT = 10
"""One window or example in this many is held out, throughout the text, since the parts of a text differ."""
MOST_HELD_OUT_ROWS = 32
"""The default limit on the held-out rows that `windows` returns: 4,096 tokens at a length of 128."""
PIECE_LETTERS = 1 << 18
"""The number of characters that are encoded at a time."""
UNCUT = 1 << 21
"""The largest number of characters that are encoded at once if a tokenizer allows no cut between them."""
CONTEXT = 256
"""The number of characters on each side of a position that decide whether the text can be cut there."""
CUTS, TRIES = (r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"(?<=\s)(?=\S)", r"(?s:(?=.))"), 8
"""Kinds of positions for a cut, most promising first (line start, word end, word start, any), with tries of each."""


def windows(
    ids: Sequence[int], length: int, share: float = 1 / HELD_OUT, measured: int | None = MOST_HELD_OUT_ROWS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the ids of a text into windows, and hold out every tenth, or another share, of them.

    Parameters
    ----------
    ids : sequence of int
        The ids of the text.
    length : int
        The length of a window, at least 1.
    share : float
        The share of the windows to hold out, as in `is_held_out`.
    measured : int, optional
        The largest number of held-out windows to return, evenly spaced; None returns all, as `minilora finetune` does.

    Returns
    -------
    X, Y : numpy.ndarray, shape (n, length), int64
        The training windows. Each id except the first is a target once.
    X_held, Y_held : numpy.ndarray, shape (m, length), int64
        The held-out windows, at most `measured`.

    Raises
    ------
    ValueError, TypeError
        If there are fewer than two windows (or none if none is held out), or an id is negative or not an integer.
    """
    length = check_integer("length", length, at_least=1)
    n = (len(ids) - 1) // length
    least, what = (2, "two windows") if share else (1, "a window")
    if n < least:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least {least * length + 1}: {what} of {length}")
    array = np.asarray(ids)
    check_ids("ids", array, np.iinfo(np.int64).max)  # NumPy would round floats down and parse strings
    used = array.astype(np.int64)[: n * length + 1]
    X, Y = used[:-1].reshape(n, length), used[1:].reshape(n, length)
    held = is_held_out(n, share)
    rows = spread(np.flatnonzero(held), measured)
    return X[~held], Y[~held], X[rows], Y[rows]


def is_held_out(n: int, share: float = 1 / HELD_OUT) -> np.ndarray:
    """Return which of n parts are held out, (n,) bool: every (1 / share)-th, counted from the end, so at least one."""
    held = np.zeros(n, bool)
    if share:
        held[::-1][(np.arange(math.ceil(n * share - 1e-9)) / share + 1e-9).astype(int)] = True
    return held


def spread(rows: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most `most` of the rows, evenly spaced; None returns all of them."""
    if most is None or len(rows) <= most:
        return rows
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return chosen


def read_text(path: Path) -> str:
    """Read a regular file that contains text in UTF-8, and is not empty."""
    with reading(path), open_regular(path) as file:
        data = file.read()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:  # in UTF-16 every second byte of a letter is 0
            raise ValueError("not a text in UTF-8 but in UTF-16")
        text = data.decode("utf-8-sig")
    if not text.strip():
        raise FileRefused(path, "it holds no text")
    return text


# --- the next-token loss, only where targets count --------------------------------------------------------------------


def next_token_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the cross-entropy and its gradient, which overwrites the logits.

    The logits are the largest array of a language model; this way it exists once.
    """
    return cross_entropy(logits, targets, out=logits)


def gradients_at_targets(model: Llama, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)``; the fewer targets count, the less is computed.

    The logits and the last block's MLP are computed only where a target counts, everything else up to the last column
    with such a target. The result equals that of `minilora.training.backpropagate` up to rounding, and bit for bit if
    every target counts.
    """
    check_shape("targets", y, tuple(x.shape[:2]))  # with three axes the numbers would differ
    x, y = trim_padding(x, y)
    at = y != IGNORE_INDEX
    if at.all() or not at.any():
        return backpropagate(model, x, y, loss)
    last = len(model.model.layers) - 1
    model = with_rows_at(model, at, (f"model.layers.{last}.mlp", "lm_head"))  # this part reads no other position
    logits, cache = model.forward(x, at)
    _, d_logits = loss(logits, y[at])
    return model.backward(d_logits, cache, need_dx=False)[1]


def evaluate_where_it_counts(
    model: Llama, X: Array, Y: Array, loss: Loss, workers: int | None = None,
    shown: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> float:  # fmt: skip
    """Return the loss like `minilora.evaluate`, with less work if fewer targets count; ``shown`` yields the parts."""
    check_shape("targets", Y, tuple(X.shape[:2]))
    check_ids("Y", Y, model.lm_head.out_features, ignored=IGNORE_INDEX)

    def of_hidden(h: Array, y: Array) -> tuple[Array, Array]:
        at = y != IGNORE_INDEX
        return loss(model.lm_head(h[at]), y[at])

    check_data(model.model, X, Y, of_hidden, model.model.trainable(), model.lm_head.out_features)
    targets = count(Y)

    def share(part: np.ndarray) -> Any:
        rows = backend_of(X).asarray(part)
        x, y = trim_padding(X[rows], Y[rows])
        return of_hidden(model.model(x), y)[0] * (count(y) / targets)

    parts = of_area(Y, max(1, EVALUATION_ROWS // Y.shape[1]) * Y.shape[1])
    return sum_of(share, shown(parts), workers, X)


def trim_padding(x: Array, y: Array) -> tuple[Array, Array]:
    """Return ids and targets up to the last column in which a target counts; if none does, return all of them."""
    width = int(widths(y).max()) or y.shape[1]
    return x[:, :width], y[:, :width]


# --- the ids of a long text -------------------------------------------------------------------------------------------


def token_ids(text: str, encode: Callable[[str], list[int]], size: int | None = None) -> list[int]:
    """Return a text's token ids, the same as ``encode(text)`` gives.

    A tokenizer takes about 260 bytes of memory for each byte of a text. A long text is therefore encoded in pieces of
    `PIECE_LETTERS` characters, cut where no token spans the cut and the tokens on one side do not depend on the other.
    A text without such a place in `UNCUT` characters is a ValueError, and so is an id that is not below `size`, the
    number of tokens that the model has.
    """
    ids: list[int] = []
    start = 0
    while start < len(text):
        stop = _next_cut(text, start, encode)
        piece = None if stop is None else _ids_after(text[max(0, start - CONTEXT) : start], text[start:stop], encode)
        if stop is None or piece is None:
            raise ValueError(
                f"the tokens of the text from character {start:,} on depend on all of it: expected a place for a cut "
                f"within {UNCUT:,} characters, which is what is encoded at once"
            )
        ids += piece
        start = stop
    if size is not None:
        check_vocabulary(max(ids, default=0), size)
    return ids


def check_vocabulary(largest: int, size: int) -> None:
    """Require ids below `size`, the number of tokens that a model has."""
    if largest >= size:
        raise ValueError(f"the tokenizer gives ids up to {largest}, and the model has {size} tokens: another model's")


def _next_cut(text: str, start: int, encode: Callable[[str], list[int]]) -> int | None:
    """Return the end of the piece that begins at `start`: the text's end, or a safe cut; None if there is none."""
    for stop in range(start + PIECE_LETTERS, min(len(text), start + UNCUT), PIECE_LETTERS):
        first = stop - PIECE_LETTERS // 2
        for pattern in CUTS:
            places = [first + match.start() for match in re.finditer(pattern, text[first:stop])]
            for place in reversed(places[-TRIES:]):
                if place > first and _is_safe(text, place, encode):
                    return place
    return len(text) if len(text) - start <= UNCUT else None


def _is_safe(text: str, place: int, encode: Callable[[str], list[int]]) -> bool:
    """Return whether the tokens on each side of a position do not depend on the other side."""
    after = text[place : place + CONTEXT]
    long, short = (_ids_after(text[max(0, place - n) : place], after, encode) for n in (CONTEXT, CONTEXT // 2 - 1))
    return long is not None and long == short  # with an even and an odd number of letters before it


def _ids_after(before: str, after: str, encode: Callable[[str], list[int]]) -> list[int] | None:
    """Return the ids of a text that follows another one; None if the other one's ids change with it."""
    whole, first = encode(before + after), encode(before) if before else []
    return whole[len(first) :] if whole[: len(first)] == first else None
