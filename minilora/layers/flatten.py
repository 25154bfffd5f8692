"""Images as rows: what stands between a convolution and a linear layer.

    y_n,(chw) = x_nchw          (flat.1)    (N, C, ...) -> (N, C * ...)
    dx_nchw = dy_n,(chw)        (flat.2)    every entry keeps its gradient

The first axis, of the images, stays as it is.
"""

from __future__ import annotations

import math

from ..checks import Array, check_array
from ..layer import Cache, Layer, check_cache


class Flatten(Layer):
    """All axes but the first become one."""

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (N, ...) -> (N, M)
        """Return y, a copy, and a cache with the shape of x."""
        check_array("x", x)
        _check_rows(x)
        y = x.reshape(x.shape[0], math.prod(x.shape[1:])).copy()  # eq. (flat.1)
        return y, (self, y.shape, x.shape)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (shape,) = check_cache(self, dy, cache)
        dx = dy.reshape(shape).copy() if need_dx else None  # eq. (flat.2)
        return dx, {}


def _check_rows(x: Array) -> None:
    """Refuse a number: there is no axis of images."""
    if not x.shape:
        raise ValueError("x has no axes, expected (N, ...)")
