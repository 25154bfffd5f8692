"""The cost of a training step, measured by running it: its matrix products, with the bytes that it moves.

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
class Work:
    """The operations of a run: its products, each (m, k) @ (k, n) as (m, k, n), and the bytes that they moved."""

    products: list[tuple[int, int, int]]
    bytes_moved: int
    parameters: int = 0
    """The number of trained parameters."""

    @property
    def multiply_adds(self) -> int:
        """One multiplication and one addition for each m, k and n of each product."""
        return sum(map(math.prod, self.products))

    @property
    def least_bytes(self) -> int:
        """Each product reads its factors and writes its result once; Adam reads g, p, m, v and writes p, m, v."""
        return BYTES * (sum(m * k + k * n + m * n for m, k, n in self.products) + 7 * self.parameters)

    @property
    def optimizer_bytes(self) -> int:
        """The bytes of Adam's two running means."""
        return BYTES * 2 * self.parameters

    def large(self, *sizes: int) -> int:
        """Return the number of products with these sizes."""
        return sum(sorted(product) == sorted(sizes) for product in self.products)


def ways(N: int, n_in: int, n_out: int, r: int, need_dx: bool = False) -> dict[str, Work]:
    """Return the cost of each way of computing a training step of the same layer.

    With `need_dx`, the layer belongs to a network: its input has a gradient, too. The shortcuts do not exist then.
    """
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

    runs: dict[str, Callable[[], object]] = {
        "full training": lambda: by_backward(base),
        "LoRA, the article's module": by_the_article,
        "LoRA beside its base": lambda: by_backward(both),
    }
    if not need_dx:
        runs |= {
            "LoRA beside its base, residual form": lambda: by_residual_form(both),
            "LoRA on the residual": lambda: by_backward(adapter),
            "LoRA on the residual, residual form": lambda: by_residual_form(adapter),
        }
    few = A.size + B.size
    return {name: watch(run, W.size if name == "full training" else few) for name, run in runs.items()}


class Watched(np.ndarray):
    """An array that records the cost of every operation on it; arrays computed from it are watched, too."""

    products: list[tuple[int, int, int]] = []  # noqa: RUF012
    bytes_moved = 0

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        """Compute as NumPy does; record the products, and the bytes of all input and output arrays."""
        plain = [np.asarray(x) if isinstance(x, Watched) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(np.asarray(x) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        outer = ufunc is np.multiply and result.size > max(np.size(x) for x in plain)  # an outer product: inner width 1
        if ufunc is np.matmul or outer:
            *rows, n = result.shape
            Watched.products.append((math.prod(rows), 1 if outer else plain[0].shape[-1], n))
        Watched.bytes_moved += result.nbytes + sum(x.nbytes for x in plain if isinstance(x, np.ndarray))
        if out is not None:
            return out[0]
        return result.view(Watched) if isinstance(result, np.ndarray) else result


def watched(*shape: int) -> Watched:
    """Return a watched float32 array of that shape; its values do not matter."""
    return np.full(shape, 1e-3, np.float32).view(Watched)


def watch(run: Callable[[], object], parameters: int = 0) -> Work:
    """Call `run` and return the work that it did."""
    Watched.products, Watched.bytes_moved = [], 0
    run()
    return Work(Watched.products, Watched.bytes_moved, parameters)
