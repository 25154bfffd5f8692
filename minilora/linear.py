"""The layer that is adapted: y = x W^T + b.

    y = x W^T + b        (7)     (N, in) -> (N, out)        W (out, in), b (out,)

In entries, y_no = sum_i x_ni W_oi + b_o. So W_oi and b_o act on the loss through column o of y, and x_ni through row n.
The chain rule sums over what each of them reaches:

    dW_oi = sum_n dy_no x_ni        dW = dy^T x           (8)     (out, in)
    db_o  = sum_n dy_no             db = sum_n dy_n       (9)     (out,)
    dx_ni = sum_o dy_no W_oi        dx = dy W             (10)    (N, in)

Weights lie as in PyTorch, one row for each output. An input may have any number of leading axes, (..., in): they count
as rows, N of them in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .backend import Backend, backend_or_numpy
from .checks import Array, check_array, check_flag, check_start
from .layer import Cache, Layer, first_array, rows


@dataclass(eq=False, repr=False)
class Linear(Layer):
    """The full-rank layer. It keeps the arrays that it is given; training changes them in place.

    Arrays that do not fit together are a ValueError or a TypeError.
    """

    weight: Array  # (out, in), float
    bias: Array | None = None  # (out,), of the same dtype

    fits = {"x": "... in", "weight": "out in", "bias": "out"}

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. A frozen layer keeps no x: only the gradient of W asks for it."""
        W, b = self.weight, self.bias
        y = x @ W.T if b is None else x @ W.T + b  # eq. (7)
        return y, (None if self.frozen else x,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx (..., in), and the gradients of the weight and the bias."""
        (x,) = cache
        dx, grads = self.input_gradient(dy) if need_dx else None, {}
        if not self.frozen:
            grads["weight"] = rows(dy).T @ rows(x)  # eq. (8)
            if self.bias is not None:
                grads["bias"] = rows(dy).sum(axis=0)  # eq. (9)
        return dx, grads

    def input_gradient(self, dy: Array) -> Array:  # (..., out) -> (..., in)
        """Return dx alone. It is all that a frozen layer passes on."""
        check_array("dy", dy, like=first_array(self))
        return dy @ self.weight  # eq. (10)

    @classmethod
    def init(
        cls, in_features: int, out_features: int, *, bias: bool = True, rng: np.random.Generator,
        dtype: Any = "float32", backend: Backend | None = None,
    ) -> Linear:  # fmt: skip
        """Start as PyTorch does: weight and bias uniform in +-1/sqrt(in).

        `rng`, a `numpy.random.Generator`, draws in float64, then the values are rounded to `dtype`: one seed gives one
        start in every precision. `backend` says where the arrays live, as `get_backend` returns it; NumPy by default.
        """
        n_in, n_out = check_start(rng, dtype, in_features=in_features, out_features=out_features)
        bias, backend, bound = check_flag("bias", bias), backend_or_numpy(backend), 1 / math.sqrt(n_in)
        weight = backend.asarray(rng.uniform(-bound, bound, (n_out, n_in)), dtype)
        return cls(weight, backend.asarray(rng.uniform(-bound, bound, n_out), dtype) if bias else None)

    shape = property(lambda self: self.weight.shape, doc="(out, in), as the weight's.")
