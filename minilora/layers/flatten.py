"""Flatten: each image becomes a row, between a convolution and a linear layer.

    y_n,(chw) = x_nchw          (flat.1)    (N, C, ...) -> (N, C * ...)
    dx_nchw = dy_n,(chw)        (flat.2)    every entry keeps its gradient

The layer has no trainable arrays.
"""

from __future__ import annotations

import math

from ..checks import Array
from ..layer import Cache, Layer


class Flatten(Layer):
    """Joins all axes except the first into one."""

    takes = "..."

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (N, ...) -> (N, M)
        """Return y, a copy, and a cache with the shape of x."""
        y = x.reshape(len(x), math.prod(x.shape[1:])).copy()  # eq. (flat.1)
        return y, (x.shape,)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (shape,) = cache
        dx = dy.reshape(shape).copy() if need_dx else None  # eq. (flat.2)
        return dx, {}
