"""An embedding: a linear layer on one-hot rows that are never formed.

The input is ids i_1 ... i_N, each from 0 to V - 1. Write X (N, V) for the matrix with X_nv = [v = i_n]: row n has a 1
in column i_n. On these rows a table W (V, dim) is a linear layer without a bias:

    y_nj = sum_v X_nv W_vj      y = X W         (emb.1)    (N, V) -> (N, dim)      row n of y is row i_n of W
    dW_vj = sum_n X_nv dy_nj    dW = X^T dy     (emb.2)    (V, dim)                row n of dy is added to row i_n of dW

So neither product needs X: the first gathers rows, the second scatters them. Repeated ids accumulate. An id is not a
real number, so there is no dx.

LoRA needs the same two products. Its factors are A (r, V) and B (dim, r), and (1) and (5) of `minilora.lora` become

    h_nk = A_k,i_n                                         column i_n of A
    dA_kv = sum of dh_nk over the n with i_n = v           row n of dh is added to column i_n of dA

`OneHot` stands for X: it gathers and scatters where a matrix would multiply, so `LoRALinear` accepts it unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..backend import add_at, backend_of
from ..checks import Array, check_ids
from ..layer import Cache, Layer, rows
from ..linear import Linear


class OneHot:
    """The rows X (..., V), represented by their ids, with the two products that `Linear` and `LoRA` need."""

    __array_ufunc__ = None  # makes NumPy and CuPy leave `array @ self` to this class

    def __init__(self, ids: Array, width: int, like: Array) -> None:
        self.ids, self.like, self.dtype, self.shape = ids, like, like.dtype, (*ids.shape, width)

    def reshape(self, *shape: int) -> OneHot:
        """Return the same rows with other leading axes."""
        return OneHot(self.ids.reshape(shape[:-1]), self.shape[-1], self.like)

    def __matmul__(self, matrix: Array) -> Array:  # (..., V) @ (V, n) -> (..., n)
        return matrix[self.ids]

    def __rmatmul__(self, left: Array) -> Array:  # (n, N) @ (N, V) -> (n, V)
        out = backend_of(left).zeros((left.shape[0], self.shape[-1]), left.dtype)
        add_at(out, (slice(None), self.ids), left)
        return out


@dataclass(eq=False, repr=False)
class Embedding(Layer):
    """A table of vectors, looked up by id. It stores the given array without copying; training changes it in place."""

    weight: Annotated[Array, "V dim"]

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) ids -> (..., dim)
        """Return y and the cache. Ids must be integers from 0 to V - 1 (not checked on a GPU)."""
        X = self.to_rows(x)
        y = X @ self.weight  # eq. (emb.1)
        return y, (None if self.frozen else X,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[None, dict[str, Array]]:
        """Return None for dx, and the gradient of the table."""
        (X,) = cache
        if self.frozen:
            return None, {}
        dW = backend_of(dy).zeros(self.weight.shape, dy.dtype)
        add_at(dW, X.ids.reshape(-1), rows(dy))  # eq. (emb.2)
        return None, {"weight": dW}

    # --- as a linear layer on rows, for adapters (`minilora.variants.adapter`) ---

    def to_rows(self, x: Array) -> OneHot:  # (...) ids -> (..., V)
        """Return the ids as one-hot rows."""
        check_ids("x", x, self.weight.shape[0], like=self.weight)
        return OneHot(x, self.weight.shape[0], self.weight)

    rewrite = to_rows  # the name in the fifth edition

    input_gradient: ClassVar[None] = None  # ids have no derivative
    kernel: ClassVar[tuple[int, ...]] = ()

    def from_rows(self, y: Array, shape: tuple[int, ...]) -> Array:  # (..., dim) -> (..., dim)
        """Return the output unchanged."""
        return y

    def from_rows_adjoint(self, dy: Array) -> Array:  # (..., dim) -> (..., dim)
        """Return dy unchanged."""
        return dy

    def as_linear(self) -> Linear:
        """Return the layer on one-hot rows: W^T (dim, V), a view of the table."""
        return Linear(self.weight.T)

    def from_linear(self, linear: Linear) -> Embedding:
        """Return an embedding with another table, W^T (dim, V)."""
        return Embedding(backend_of(linear.weight).xp.ascontiguousarray(linear.weight.T))
