"""Rotary positions: rotate pairs of entries by an angle that grows with the row's position.

The product of a query at position t and a key at position u should depend only on t - u. It does if each is rotated by
an angle proportional to its position. A row of D entries is D/2 pairs. Pair j of the row at position t,
(x_tj, x_t,j+D/2), is rotated by the angle a_tj = t f_j:

    f_j = base^(-2j/D)                                     (rope.1)    j = 0 ... D/2 - 1
    y_tj      = x_tj cos a_tj - x_t,j+D/2 sin a_tj         (rope.2)    (..., T, D) -> (..., T, D)
    y_t,j+D/2 = x_t,j+D/2 cos a_tj + x_tj sin a_tj         (rope.3)

A rotation is an orthogonal matrix R: the gradient at its input, R^T dy, is the rotation back, by the angles -a:

    dx = dy rotated by -a                                  (rope.4)    (..., T, D)

Two pairings are in use. Here, as in transformers, the first half of a row pairs with the second half: "halves". The
paper, Meta's own files and GGUF files of Llama models pair neighbours, 2j with 2j+1: "interleaved". They differ only in
the order of a row's entries, which is the order of the rows of W_q and W_k: `halves_from_interleaved` changes one into
the other.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..backend import Backend, backend_of
from ..checks import Array, check_number, dtype_name
from ..layer import Cache, Layer


@dataclass(eq=False, repr=False)
class Rotary(Layer):
    """The rotation of rows by position. It has no trainable arrays: its frequencies are numbers, one for each pair."""

    frequencies: tuple[float, ...]  # f_j, D/2 of them

    takes = "... T in"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.frequencies = check_frequencies(self.frequencies)

    def forward(self, x: Array, start: int = 0) -> tuple[Array, Cache]:  # (..., T, D) -> (..., T, D)
        """Return y and the cache. The rows are at the positions `start`, `start` + 1, ..."""
        y = rotate(x, *self.angles(x, start))
        return y, (start,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (start,) = cache
        cos, sin = self.angles(dy, start)
        dx = rotate(dy, cos, -sin) if need_dx else None  # eq. (rope.4)
        return dx, {}

    def angles(self, x: Array, start: int) -> tuple[Array, Array]:  # -> (T, D/2), (T, D/2)
        """Return the cosines and sines of all positions of x, in its precision."""
        dtype = dtype_name(x.real)
        return _angles(self.frequencies, start, x.shape[-2], dtype, backend_of(x))

    shape = property(lambda self: (2 * len(self.frequencies),) * 2, doc="(D, D).")


def rotate(x: Array, cos: Array, sin: Array) -> Array:  # (..., T, D) -> (..., T, D)
    """Rotate each pair, first half with second half, by the angle with these cosines and sines."""
    half = cos.shape[-1]
    x1, x2 = x[..., :half], x[..., half:]
    y = backend_of(x).xp.empty_like(x, order="C")
    y[..., :half] = x1 * cos - x2 * sin  # eq. (rope.2)
    y[..., half:] = x2 * cos + x1 * sin  # eq. (rope.3)
    return y


def frequencies(width: int, base: float) -> tuple[float, ...]:
    """Return the frequencies for rows of `width` entries: from 1, one radian per position, down to nearly 1/base."""
    return tuple(base ** (-2 * j / width) for j in range(width // 2))  # eq. (rope.1)


def halves_from_interleaved(weight: Array, width: int) -> Array:  # (heads * D, in) -> (heads * D, in)
    """Reorder the rows of W_q or W_k, for heads of `width` rows: neighbours 2j, 2j+1 become j, j + D/2."""
    pairs = weight.reshape(-1, width // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def interleaved_from_halves(weight: Array, width: int) -> Array:  # (heads * D, in) -> (heads * D, in)
    """Undo `halves_from_interleaved`: j, j + D/2 become neighbours."""
    halves = weight.reshape(-1, 2, width // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@lru_cache(maxsize=8)  # every layer of a model uses the same angles
def _angles(frequencies: tuple[float, ...], start: int, length: int, dtype: str, backend: Backend) -> tuple[Array, ...]:
    """Return cosines and sines (length, D/2), computed in float64 and rounded once."""
    angles = np.outer(np.arange(start, start + length), frequencies)
    return backend.asarray(np.cos(angles), dtype), backend.asarray(np.sin(angles), dtype)


def check_frequencies(frequencies: Any) -> tuple[float, ...]:
    """Return the frequencies of rotations as floats; at least one is required."""
    if not isinstance(frequencies, (tuple, list)) or not frequencies:
        raise ValueError(f"frequencies must be a tuple of one number or more, got {frequencies!r}")
    return tuple(check_number(f"frequencies[{j}]", f, above=0, or_equal=True) for j, f in enumerate(frequencies))
