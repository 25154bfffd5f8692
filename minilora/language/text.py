"""A text as windows of token ids, each with the ids that follow; and the loss of these next tokens.

    ids        i_0 i_1 i_2 i_3 i_4 i_5 i_6            of length 3:
    X          [i_0 i_1 i_2]  [i_3 i_4 i_5]           (n, length) inputs
    Y          [i_1 i_2 i_3]  [i_4 i_5 i_6]           (n, length) targets: the next id, at every position at once

Each id but the first is a target once. The model's output at position t may depend on the inputs up to t alone; that
is what makes all positions of a window one training example each.

Of a chat most targets do not count, and the head is the largest product of a small model. So logits are computed where
a target counts, and nothing behind the last of them.
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
"""One window or example in ten is held out, all through the text, since the parts of a text differ."""
MOST_HELD_OUT_ROWS = 32
"""The most held-out rows that `windows` returns where it is not told: 4,096 tokens at a length of 128."""
PIECE_LETTERS = 1 << 18
"""Characters of a text that are encoded at a time."""
UNCUT = 1 << 21
"""Characters that are encoded at once where a tokenizer allows no cut between them."""
CONTEXT = 256
"""Characters on either side of a place that decide whether it is a place for a cut."""
CUTS, TRIES = (r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"(?<=\s)(?=\S)", r"(?s:(?=.))"), 8
"""Places for a cut, the likeliest first: a line's start, a word's end, a word's start, anywhere; and tries of each."""


def windows(
    ids: Sequence[int], length: int, share: float = 1 / HELD_OUT, measured: int | None = MOST_HELD_OUT_ROWS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the ids of a text into windows, and hold every tenth of them out, or another share.

    Parameters
    ----------
    ids : sequence of int
        The text.
    length : int
        Of a window, at least 1.
    share : float
        Of the windows to hold out, as `is_held_out` takes it.
    measured : int, optional
        The most of those held out that are returned, evenly spread; None for all, as `minilora finetune` measures.

    Returns
    -------
    X, Y : numpy.ndarray, shape (n, length), int64
        To train on. Each id but the first is a target once.
    X_held, Y_held : numpy.ndarray, shape (m, length), int64
        To measure the loss on: of those held out, at most `measured`.

    Raises
    ------
    ValueError, TypeError
        If there are less than two windows, or none where none is held out, or an id is no integer, or negative.
    """
    length = check_integer("length", length, at_least=1)
    n = (len(ids) - 1) // length
    least, what = (2, "two windows") if share else (1, "a window")
    if n < least:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least {least * length + 1}: {what} of {length}")
    array = np.asarray(ids)
    check_ids("ids", array, np.iinfo(np.int64).max)  # NumPy would round floats down, and read texts
    used = array.astype(np.int64)[: n * length + 1]
    X, Y = used[:-1].reshape(n, length), used[1:].reshape(n, length)
    held = is_held_out(n, share)
    rows = spread(np.flatnonzero(held), measured)
    return X[~held], Y[~held], X[rows], Y[rows]


def is_held_out(n: int, share: float = 1 / HELD_OUT) -> np.ndarray:
    """Return which of n parts are held out, (n,) bool: every (1 / share)-th from the end, so that one is."""
    held = np.zeros(n, bool)
    if share:
        held[::-1][(np.arange(math.ceil(n * share - 1e-9)) / share + 1e-9).astype(int)] = True
    return held


def spread(rows: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most so many of some rows, evenly spread; None for all of them."""
    if most is None or len(rows) <= most:
        return rows
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return chosen


def read_text(path: Path) -> str:
    """Return the text of a regular file in UTF-8 that is not empty."""
    with reading(path), open_regular(path) as file:
        data = file.read()
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:  # of a letter, one byte in two is 0
            raise ValueError("not a text in UTF-8 but in UTF-16")
        text = data.decode("utf-8-sig")
    if not text.strip():
        raise FileRefused(path, "it holds no text")
    return text


# --- the loss of the next tokens, where targets count -----------------------------------------------------------------


def next_token_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the cross-entropy and its gradient, which takes the place of the logits.

    They are the largest array of a language model. This way it exists once.
    """
    return cross_entropy(logits, targets, out=logits)


def gradients_at_targets(model: Llama, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)``, and compute the less the fewer targets count.

    Logits, and the last block's MLP, are computed where a target counts; all else up to the last column that has one.
    The same as `minilora.training.backpropagate` gives, up to rounding; the same bits where every target counts.
    """
    check_shape("targets", y, tuple(x.shape[:2]))  # of three axes, the numbers would be others
    x, y = trim_padding(x, y)
    at = y != IGNORE_INDEX
    if at.all() or not at.any():
        return backpropagate(model, x, y, loss)
    last = len(model.model.layers) - 1
    model = with_rows_at(model, at, (f"model.layers.{last}.mlp", "lm_head"))  # what reads no other position
    logits, cache = model.forward(x, at)
    _, d_logits = loss(logits, y[at])
    return model.backward(d_logits, cache, need_dx=False)[1]


def evaluate_where_it_counts(
    model: Llama, X: Array, Y: Array, loss: Loss, workers: int | None = None,
    shown: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> float:  # fmt: skip
    """Return the loss as `minilora.evaluate` does, in less work the fewer targets count; ``shown`` yields parts."""
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
    """Return ids and targets up to the last column in which a target counts; without one, all of them."""
    width = int(widths(y).max()) or y.shape[1]
    return x[:, :width], y[:, :width]


# --- the ids of a long text -------------------------------------------------------------------------------------------


def token_ids(text: str, encode: Callable[[str], list[int]], size: int | None = None) -> list[int]:
    """Return a text's token ids, which are those of ``encode(text)``.

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
    """Require ids that a model of `size` tokens has."""
    if largest >= size:
        raise ValueError(f"the tokenizer gives ids up to {largest}, and the model has {size} tokens: another model's")


def _next_cut(text: str, start: int, encode: Callable[[str], list[int]]) -> int | None:
    """Return where the piece that begins at `start` ends: the text's end, or a safe place; None without one."""
    for stop in range(start + PIECE_LETTERS, min(len(text), start + UNCUT), PIECE_LETTERS):
        first = stop - PIECE_LETTERS // 2
        for pattern in CUTS:
            places = [first + match.start() for match in re.finditer(pattern, text[first:stop])]
            for place in reversed(places[-TRIES:]):
                if place > first and _is_safe(text, place, encode):
                    return place
    return len(text) if len(text) - start <= UNCUT else None


def _is_safe(text: str, place: int, encode: Callable[[str], list[int]]) -> bool:
    """Return whether what stands before a place leaves the tokens after it alone, and the other way round."""
    after = text[place : place + CONTEXT]
    long, short = (_ids_after(text[max(0, place - n) : place], after, encode) for n in (CONTEXT, CONTEXT // 2 - 1))
    return long is not None and long == short  # an even and an odd number of letters before it


def _ids_after(before: str, after: str, encode: Callable[[str], list[int]]) -> list[int] | None:
    """Return the ids of a text that stands behind another; None where that one gets other ids with it than alone."""
    whole, first = encode(before + after), encode(before) if before else []
    return whole[len(first) :] if whole[: len(first)] == first else None
