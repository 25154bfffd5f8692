"""Activations: one function for every entry, so the derivative is one product for every entry.

    y = f(x),    dx = dy f'(x)        all of one shape

    ReLU    f(x) = max(x, 0)           f'(x) = 1 where x > 0, else 0                    (act.1), (act.2)
    Tanh    f(x) = tanh(x)             f'(x) = 1 - tanh(x)^2                            (act.3), (act.4)
    SiLU    f(x) = x q                 f'(x) = q (1 + x (1 - q)),  q = 1/(1 + e^-x)     (act.5), (act.6)

An activation has nothing to train. It keeps what its derivative is made of.
"""

from __future__ import annotations

from ..backend import backend_of
from ..checks import Array, check_array
from ..layer import Cache, Layer, check_cache


class ReLU(Layer):
    """max(x, 0), with slope 0 at 0."""

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with the mask."""
        check_array("x", x)
        mask = x.real > 0  # of the real part: a complex step moves the imaginary one
        y = x * mask  # eq. (act.1)
        return y, (self, y.shape, mask)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (mask,) = check_cache(self, dy, cache)
        dx = dy * mask if need_dx else None  # eq. (act.2)
        return dx, {}


class Tanh(Layer):
    """The hyperbolic tangent."""

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with it."""
        check_array("x", x)
        y = backend_of(x).xp.tanh(x)  # eq. (act.3)
        return y, (self, y.shape, y)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        (y,) = check_cache(self, dy, cache)
        dx = dy * (1 - y * y) if need_dx else None  # eq. (act.4)
        return dx, {}


class SiLU(Layer):
    """x times the logistic function of x; also called swish."""

    def forward(self, x: Array) -> tuple[Array, Cache]:  # (...) -> (...)
        """Return y, and a cache with x and q."""
        check_array("x", x)
        q = logistic(x)
        y = x * q  # eq. (act.5)
        return y, (self, y.shape, x, q)

    def backward(self, dy: Array, cache: Cache, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx; there are no gradients."""
        x, q = check_cache(self, dy, cache)
        dx = dy * (q * (1 + x * (1 - q))) if need_dx else None  # eq. (act.6)
        return dx, {}


def logistic(x: Array) -> Array:  # (...) -> (...)
    """Return 1/(1 + e^-x). In this form, (1 + tanh(x/2))/2, no x is large enough to overflow."""
    return 0.5 * (1 + backend_of(x).xp.tanh(0.5 * x))


ACTIVATIONS: dict[str, type[Layer]] = {"relu": ReLU, "tanh": Tanh, "silu": SiLU}
"""By the name that configurations use."""
