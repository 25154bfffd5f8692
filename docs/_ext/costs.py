"""What a training step costs: by the shapes of its products, and by watching it run.

Dimensions: ``N`` rows, ``in``, ``out``, ``r`` = rank. Everything is float32, four bytes a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minilora import Adam, Linear, LoRA, LoRALinear, mse
from minilora.fast import residual_form

BYTES = 4


@dataclass(frozen=True)
class Way:
    """A way to a training step.

    Attributes
    ----------
    products : list of (int, int, int)
        The matrix products of forward and backward, each (m, k) @ (k, n) as (m, k, n).
    parameters : int
        How many numbers are trained.
    run : callable
        Takes the step on watched arrays.
    """

    products: list[tuple[int, int, int]]
    parameters: int
    run: Callable[[], object]

    @property
    def multiply_adds(self) -> int:
        """One multiplication and one addition for each m, k and n of each product."""
        return sum(m * k * n for m, k, n in self.products)

    @property
    def least_bytes(self) -> int:
        """Each product reads its factors and writes its result once; Adam reads g, p, m, v and writes p, m, v."""
        return BYTES * (sum(m * k + k * n + m * n for m, k, n in self.products) + 7 * self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """Adam's two running means."""
        return BYTES * 2 * self.parameters


def ways(N: int, n_in: int, n_out: int, r: int, need_dx: bool = False) -> dict[str, Way]:
    """Return the ways to a training step of the same layer, for N > 2 r.

    With `need_dx` the layer is one of a network: its input has a gradient, too. The short ways do not exist then.
    """
    forward, weight_gradient = (N, n_in, n_out), (n_out, N, n_in)
    to_input = [(N, n_out, n_in)] if need_dx else []
    down, up = (N, n_in, r), (N, r, n_out)  # equations (1) and (2)
    back = [(n_out, N, r), (N, n_out, r), (r, N, n_in)]  # (3), (4) and (5)
    adapter_to_input = [(N, r, n_in)] if need_dx else []  # (6)
    short = [down, (r, N, r), (n_out, r, r), (n_out, N, r), (r, n_out, r), (N, r, r), (N, n_out, r), (r, N, n_in)]
    few = r * (n_in + n_out)

    x, y = watched(N, n_in), watched(N, n_out)
    W, A, B = watched(n_out, n_in), watched(r, n_in), watched(n_out, r)
    base, adapter = Linear(W), LoRA(A, B, 1.0)
    both = LoRALinear(base, adapter)

    def by_backward(layer):
        prediction, cache = layer.forward(x)
        Adam(layer.trainable()).step(layer.backward(mse(prediction, y)[1], cache, need_dx=need_dx)[1])

    def by_the_article():
        product = A.T @ B.T
        _, dy = mse(x @ W.T + x @ product, y)
        d_product = x.T @ dy  # (in, out): as large as the weight
        if need_dx:
            _ = dy @ W + dy @ product.T
        Adam({"A": A, "B": B}).step({"A": (d_product @ B).T, "B": (A @ d_product).T})

    def by_residual_form(layer):
        Adam(layer.trainable()).step(residual_form(layer, x, y))

    article = [forward, (n_in, r, n_out), forward, (n_in, N, n_out), (n_in, n_out, r), (r, n_in, n_out), *to_input * 2]
    found = {
        "full training": Way([forward, weight_gradient, *to_input], n_in * n_out, lambda: by_backward(base)),
        "LoRA, the article's module": Way(article, few, by_the_article),
        "LoRA beside its base": Way(
            [forward, down, up, *back, *to_input, *adapter_to_input], few, lambda: by_backward(both)
        ),
    }
    if need_dx:
        return found
    thin_base = [(n_in, N, r), (n_out, n_in, r), (n_in, n_out, r), (N, n_in, r)]  # (19)
    return found | {
        "LoRA beside its base, residual form": Way([*short, *thin_base], few, lambda: by_residual_form(both)),
        "LoRA on the residual": Way([down, up, *back], few, lambda: by_backward(adapter)),
        "LoRA on the residual, residual form": Way(short, few, lambda: by_residual_form(adapter)),
    }


def large_products(way: Way, N: int, n_in: int, n_out: int) -> int:
    """Return how many of a way's products have all three of the large sizes."""
    return sum(sorted(product) == sorted((N, n_in, n_out)) for product in way.products)


class Watched(np.ndarray):
    """An array that adds up what every operation on it costs; what is computed from it is watched, too."""

    multiply_adds = 0
    bytes_moved = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        """Compute as NumPy does; note the bytes of all arrays that go in and come out, and the products' work."""
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul:
            Watched.multiply_adds += math.prod(result.shape) * plain[0].shape[-1]
        elif ufunc is np.multiply and result.size > max(np.size(x) for x in plain):
            Watched.multiply_adds += result.size  # an outer product, which is one of inner width 1
        Watched.bytes_moved += result.nbytes + sum(x.nbytes for x in plain if isinstance(x, np.ndarray))
        if out is not None:
            return out[0]
        return result.view(Watched) if isinstance(result, np.ndarray) else result


def watched(*shape: int) -> Watched:
    """Return a watched float32 array of that shape; its values do not matter."""
    return np.full(shape, 1e-3, np.float32).view(Watched)


def watch(run: Callable[[], object]) -> tuple[int, int]:
    """Run it; return the multiply-adds of its products, and the bytes that all its operations read and wrote."""
    Watched.multiply_adds = Watched.bytes_moved = 0
    run()
    return Watched.multiply_adds, Watched.bytes_moved
