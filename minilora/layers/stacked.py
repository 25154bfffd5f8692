"""A stack of linear layers in one parameter; each row passes through one of them.

Libraries keep the weights of all E experts of a layer in one array W (E, out, in). Expert e multiplies its own rows X_e
(n_e, in) of the input, which stand together, those of expert 0 first:

    Y_e = X_e W_e^T          (moe.5)    (n_e, in) -> (n_e, out)        for e = 0 ... E-1

So each W_e is a linear layer without a bias, and has the gradients of one:

    dW_e = dY_e^T X_e        (moe.6)    (out, in)      zero where n_e = 0: no row, no sum
    dX_e = dY_e W_e          (moe.7)    (n_e, in)

An expert's rows are one product of matrices, so a pass takes E of them, however many rows there are. A stack of one,
W (out, in), is a parameter that is no layer of its own in other libraries, such as the router's.

The array is the layer: its name is the layer's path, with nothing behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backend import backend_of
from ..checks import Array, check_array
from ..layer import Cache, Layer


@dataclass(eq=False, repr=False)
class StackedLinear(Layer):
    """E weights in one array. It stores the given array without copying; training changes it in place."""

    weight: Array  # (E, out, in), or (out, in) where there is one; float

    takes = "... in"

    def __post_init__(self) -> None:
        check_array("weight", self.weight)
        if len(self.weight.shape) not in (2, 3) or 0 in self.weight.shape:
            got = tuple(self.weight.shape)
            raise ValueError(f"weight has shape {got}, expected (E, out, in) or (out, in), with no empty axis")

    def forward(self, x: Array, counts: Sequence[int] | None = None) -> tuple[Array, Cache]:  # (R, in) -> (R, out)
        """Return y and the cache. Rows are sorted by expert, `counts` of each; a single expert has all rows."""
        counts = check_counts(x, counts, self.experts)
        y = grouped_matmul(x, self.stack, counts)
        return y, (None if self.frozen else x, counts)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (R, in), and the gradient of the array under the empty name."""
        x, counts = cache
        dx = grouped_matmul_dx(dy, self.stack, counts) if need_dx else None
        return dx, {} if self.frozen else {"": grouped_dw(dy, x, counts).reshape(self.weight.shape)}

    def trainable(self) -> dict[str, Array]:
        """Return the array under the empty name; in a model it has the layer's name."""
        return {} if self.frozen else {"": self.weight}

    @property
    def stack(self) -> Array:  # (E, out, in)
        """The array with its axis of experts, even for a single one."""
        return self.weight if len(self.weight.shape) == 3 else self.weight[None]

    experts = property(lambda self: int(self.stack.shape[0]), doc="How many weights there are, E.")
    shape = property(lambda self: self.weight.shape[-2:], doc="(out, in), of each.")


def grouped_matmul(x: Array, W: Array, counts: Sequence[int], onto: Array | None = None) -> Array:
    """Return each row times its expert's weight, (R, out) for x (R, in), or add it onto an array."""
    xp = backend_of(x).xp
    rows = xp.empty((len(x), W.shape[1]), xp.result_type(x, W)) if onto is None else onto
    for e, part in groups(counts):
        y = x[part] @ W[e].T  # eq. (moe.5)
        rows[part] = y if onto is None else rows[part] + y
    return rows


def grouped_matmul_dx(dy: Array, W: Array, counts: Sequence[int], onto: Array | None = None) -> Array:
    """Return each row of dy times its expert's weight, (R, in) for dy (R, out), or add it onto an array."""
    xp = backend_of(dy).xp
    rows = xp.empty((len(dy), W.shape[2]), xp.result_type(dy, W)) if onto is None else onto
    for e, part in groups(counts):
        dx = dy[part] @ W[e]  # eq. (moe.7)
        rows[part] = dx if onto is None else rows[part] + dx
    return rows


def grouped_dw(dy: Array, x: Array, counts: Sequence[int]) -> Array:  # (R, out), (R, in) -> (E, out, in)
    """Return the gradient of each expert's weight."""
    backend = backend_of(dy)
    dW = backend.zeros((len(counts), dy.shape[1], x.shape[1]), dy.dtype)
    for e, part in groups(counts):
        dW[e] = dy[part].T @ x[part]  # eq. (moe.6)
    return dW


def groups(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield the experts with rows, and the slices of these rows."""
    start = 0
    for e, count in enumerate(counts):
        if count:
            yield e, slice(start, start + count)
        start += count


def check_counts(x: Array, counts: Sequence[int] | None, experts: int) -> Sequence[int]:
    """Return the number of rows of each expert, which must sum to all of x."""
    if len(x.shape) != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected rows (R, in)")
    if counts is None and experts == 1:
        return [len(x)]
    if counts is None or len(counts) != experts or sum(counts) != len(x):
        raise ValueError(f"counts must be {experts} numbers of rows, {len(x)} in all, got {counts!r}")
    return counts
