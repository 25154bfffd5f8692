"""The linear layer: y = x W^T + b.

    y = x W^T + b        (7)     (N, in) -> (N, out)        W (out, in), b (out,)

In entries, y_no = sum_i x_ni W_oi + b_o. So W_oi and b_o act on the loss through column o of y, and x_ni through row n.
The chain rule sums over what each of them reaches:

    dW_oi = sum_n dy_no x_ni        dW = dy^T x           (8)     (out, in)
    db_o  = sum_n dy_no             db = sum_n dy_n       (9)     (out,)
    dx_ni = sum_o dy_no W_oi        dx = dy W             (10)    (N, in)

Weights are stored as in PyTorch, one row per output. Inputs may have any number of leading axes, (..., in): they count
as rows, N of them in all, and rows(x) is x with these axes made one, (N, in).

HOW A LAYER IS WRITTEN, here and on every page:

    y, cache  = layer.forward(x)                          the cache is what backward needs, and nothing else
    dx, grads = layer.backward(dy, cache, need_dx=True)   one gradient for each array that trains, under its name

`need_dx` is false where no lower layer asks for dx, which can be half of the work. A layer whose `frozen` is true does
not train: it has no gradients of its own, and only passes dx. The annotations of a class give the axes of its arrays;
arrays that do not fit together, or do not fit the input, are refused (`minilora.layer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from .backend import Backend, backend_or_numpy
from .checks import Array, check_flag, check_layer
from .layer import Cache, Layer, rows


@dataclass(eq=False, repr=False)
class Linear(Layer):
    """The full-rank layer. It stores the given arrays without copying; training changes them in place.

    Arrays that do not fit together are a ValueError or a TypeError.
    """

    weight: Annotated[Array, "out in"]
    bias: Annotated[Array | None, "out"] = None

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (..., in) -> (..., out)
        """Return y and the cache. A frozen layer keeps no x, which only the gradient of W needs."""
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
        """Return only dx, all that a frozen layer passes on."""
        return dy @ self.weight  # eq. (10)

    @classmethod
    def init(
        cls, in_features: int, out_features: int, *, bias: bool = True, rng: np.random.Generator,
        dtype: Any = "float32", backend: Backend | None = None,
    ) -> Linear:  # fmt: skip
        """Start as PyTorch does: weight and bias uniform in +-1/sqrt(in).

        `rng`, a `numpy.random.Generator`, draws in float64, then the values are rounded to `dtype`: one seed gives one
        start in every precision. `backend`, from `get_backend`, holds the arrays; NumPy by default.
        """
        check_layer(rng, dtype, in_features=in_features, out_features=out_features)
        bias, backend, bound = check_flag("bias", bias), backend_or_numpy(backend), 1 / math.sqrt(in_features)
        weight = backend.asarray(rng.uniform(-bound, bound, (out_features, in_features)), dtype)
        return cls(weight, backend.asarray(rng.uniform(-bound, bound, out_features), dtype) if bias else None)
