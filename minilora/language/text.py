"""A text as windows of token ids, with the next-token loss.

    ids        i_0 i_1 i_2 i_3 i_4 i_5 i_6            cut into windows of length 3:
    X          [i_0 i_1 i_2]  [i_3 i_4 i_5]           (n, length) inputs
    Y          [i_1 i_2 i_3]  [i_4 i_5 i_6]           (n, length) targets: the next id at every position

Each id except the first is a target exactly once. The model's output at position t depends only on the inputs up to t,
so each position of a window is a training example.

In a chat most targets do not count, and in a small model the head is the largest matrix product. Logits are therefore
computed only where a target counts, and nothing is computed after the last such position.
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
from ..files.disk import read_whole
from ..fitting import check_data
from ..gradients import backpropagate
from ..losses import IGNORE_INDEX, Loss, count, cross_entropy
from ..texts import FileRefused, reading
from ..training import EVALUATION_ROWS, sum_of
from ..variants.dropout import with_rows_at
from .llama import Llama

HELD_OUT = 10
"""One window or example in this many is held out, spread over the whole text, since its parts differ."""
MOST_HELD_OUT_ROWS = 32
"""The default limit on the number of held-out rows from `windows`: 4,096 tokens at a length of 128."""
MAX_TEXT_BYTES = 1 << 30
"""The largest size of a text or of a file of examples; it is read whole."""
PIECE_CHARACTERS = 1 << 18
"""The length of the pieces in which a long text is encoded, in characters."""
LONGEST_PIECE = 1 << 21
"""The largest length of a piece, in characters, if the tokenizer allows no earlier cut."""
CONTEXT = 256
"""The number of characters on each side of a position that are examined to decide whether it is a safe cut."""
CUTS, TRIES = (r"(?<=\n)(?=\S)", r"(?<=\S)(?= \S)", r"(?<=\s)(?=\S)", r"(?s:(?=.))"), 8
"""Patterns for a cut, most promising first (line start, word end, word start, any), and the tries for each one."""


def windows(
    ids: Sequence[int], length: int, share: float = 1 / HELD_OUT, measured: int | None = MOST_HELD_OUT_ROWS
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Cut the ids of a text into windows, and hold out a share of them, by default every tenth.

    Parameters
    ----------
    ids : sequence of int
        The ids of the text.
    length : int
        The length of a window, at least 1.
    share : float
        The share of the windows to hold out, see `is_held_out`.
    measured : int, optional
        The largest number of held-out windows to return, evenly spaced. None returns all of them.

    Returns
    -------
    X, Y : numpy.ndarray, shape (n, length), int64
        The inputs and targets of the training windows.
    X_held, Y_held : numpy.ndarray, shape (m, length), int64
        The same for the held-out windows, at most `measured` of them.

    Raises
    ------
    ValueError, TypeError
        If the text has fewer than two windows, or none at all if `share` is 0, or an id is negative or not an integer.
    """
    length = check_integer("length", length, at_least=1)
    n = (len(ids) - 1) // length
    least, what = (2, "two windows") if share else (1, "a window")
    if n < least:
        raise ValueError(f"the text has {len(ids)} tokens, expected at least {least * length + 1}: {what} of {length}")
    array = np.asarray(ids)
    check_ids("ids", array, np.iinfo(np.int64).max)  # `astype` would truncate floats and parse strings
    used = array.astype(np.int64)[: n * length + 1]
    X, Y = used[:-1].reshape(n, length), used[1:].reshape(n, length)
    held = is_held_out(n, share)
    rows = evenly_spaced(np.flatnonzero(held), measured)
    return X[~held], Y[~held], X[rows], Y[rows]


def is_held_out(n: int, share: float = 1 / HELD_OUT) -> np.ndarray:
    """Return which of n parts are held out, (n,) bool: every (1 / share)-th from the end, and so at least one."""
    held = np.zeros(n, bool)
    if share:
        held[::-1][(np.arange(math.ceil(n * share - 1e-9)) / share + 1e-9).astype(int)] = True
    return held


def evenly_spaced(rows: np.ndarray, most: int | None) -> np.ndarray:
    """Return at most `most` of the rows, evenly spaced; None returns all of them."""
    if most is None or len(rows) <= most:
        return rows
    chosen: np.ndarray = rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]
    return chosen


def read_text(path: Path) -> str:
    """Return the text in a regular file of at most `MAX_TEXT_BYTES`, which must be UTF-8 and not blank."""
    with reading(path):
        data = read_whole(path, MAX_TEXT_BYTES)
        if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:  # every second byte of UTF-16 is often 0
            raise ValueError("the text is in UTF-16, expected UTF-8: iconv -f UTF-16 -t UTF-8 converts it")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line, byte = error.object.count(b"\n", 0, error.start) + 1, error.object[error.start]
            raise ValueError(
                f"line {line} is not in UTF-8, as byte {byte:#x} shows: if it is in Latin-1, iconv -f LATIN1 -t UTF-8 "
                "converts the file"
            ) from None
    if not text.strip():
        raise FileRefused(path, "it contains no text")
    return text


# --- the next-token loss, only where targets count --------------------------------------------------------------------


def next_token_loss(logits: Array, targets: Array) -> tuple[Array, Array]:
    """Return the cross-entropy and its gradient, which overwrites the logits.

    The logits are the largest array of a training step, so a second one of the same size is avoided.
    """
    return cross_entropy(logits, targets, out=logits)


def gradients_at_targets(model: Llama, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
    """Return the gradients of ``loss(model(x), y)``, without computing logits for targets that do not count.

    The logits and the last block's MLP are computed only where a target counts, and everything else only up to the
    last column with such a target. The result equals that of `minilora.gradients.backpropagate` up to rounding; if
    every target counts, it is bit-identical.
    """
    check_shape("targets", y, tuple(x.shape[:2]))  # a third axis would be counted wrongly
    x, y = trim_padding(x, y)
    at = y != IGNORE_INDEX
    if at.all() or not at.any():
        return backpropagate(model, x, y, loss)
    last = len(model.model.layers) - 1
    model = with_rows_at(model, at, (f"model.layers.{last}.mlp", "lm_head"))  # these layers read no other position
    logits, cache = model.forward(x, at)
    _, d_logits = loss(logits, y[at])
    return model.backward(d_logits, cache, need_dx=False)[1]


def evaluate_where_it_counts(
    model: Llama, X: Array, Y: Array, loss: Loss, workers: int | None = None,
    shown: Callable[[Sequence[np.ndarray]], Iterable[np.ndarray]] = iter,
) -> float:  # fmt: skip
    """Return the loss as `minilora.evaluate` does, skipping targets that do not count; ``shown`` yields the parts."""
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
    """Drop the columns after the last one in which a target counts; if no target counts, keep all columns."""
    width = int(widths(y).max()) or y.shape[1]
    return x[:, :width], y[:, :width]


# --- the ids of a long text -------------------------------------------------------------------------------------------


def token_ids(text: str, encode: Callable[[str], list[int]], size: int | None = None) -> list[int]:
    """Return the same token ids as ``encode(text)``, in less memory.

    A tokenizer needs about 260 bytes of memory for each byte of text. A long text is therefore encoded in pieces of
    about `PIECE_CHARACTERS` characters, cut where no token spans the cut and neither side's tokens depend on the other.
    This raises ValueError if `LONGEST_PIECE` characters contain no such place, or if an id is not below `size`, the
    model's vocabulary size.
    """
    ids: list[int] = []
    start = 0
    while start < len(text):
        stop = _next_cut(text, start, encode)
        piece = None if stop is None else _ids_after(text[max(0, start - CONTEXT) : start], text[start:stop], encode)
        if stop is None or piece is None:
            raise ValueError(
                f"the text cannot be encoded in pieces: expected, within {LONGEST_PIECE:,} characters from character "
                f"{start:,} on, a position where the tokens on each side do not depend on the other side"
            )
        ids += piece
        start = stop
    if size is not None:
        check_vocabulary(max(ids, default=0), size)
    return ids


def check_vocabulary(largest: int, size: int) -> None:
    """Require ids below `size`, the vocabulary size of a model."""
    if largest >= size:
        raise ValueError(f"the tokenizer gives ids up to {largest}, expected below {size}: use the model's tokenizer")


def _next_cut(text: str, start: int, encode: Callable[[str], list[int]]) -> int | None:
    """Return where the piece that begins at `start` ends: a safe cut, or the text's end; None if neither is near."""
    for stop in range(start + PIECE_CHARACTERS, min(len(text), start + LONGEST_PIECE), PIECE_CHARACTERS):
        first = stop - PIECE_CHARACTERS // 2
        for pattern in CUTS:
            places = [first + match.start() for match in re.finditer(pattern, text[first:stop])]
            for place in reversed(places[-TRIES:]):
                if place > first and _is_safe(text, place, encode):
                    return place
    return len(text) if len(text) - start <= LONGEST_PIECE else None


def _is_safe(text: str, place: int, encode: Callable[[str], list[int]]) -> bool:
    """Return whether a cut at a position would leave the tokens on both sides unchanged."""
    after = text[place : place + CONTEXT]
    long, short = (_ids_after(text[max(0, place - n) : place], after, encode) for n in (CONTEXT, CONTEXT // 2 - 1))
    return long is not None and long == short  # with an even and an odd context, since repeated characters may pair up


def _ids_after(before: str, after: str, encode: Callable[[str], list[int]]) -> list[int] | None:
    """Return the ids of `after` when it follows `before`; None if it changes the ids of `before`."""
    whole, first = encode(before + after), encode(before) if before else []
    return whole[len(first) :] if whole[: len(first)] == first else None
