r"""The layer that is adapted: :math:`y = x W^T + b`.

Dimensions: ``N`` rows, ``in`` = in_features, ``out`` = out_features.

Weights lie as in PyTorch, one row for each output: W is (out, in). An input may carry any number of leading
axes, ``(..., in)``; they count as rows, ``N`` of them in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .backend import Backend, backend_or_numpy
from .checks import Array, check_array, check_cache, check_features, check_integer, check_matrix, check_rng, check_shape


def rows(x: Array) -> Array:  # (..., n) -> (N, n)
    """Flatten the leading axes into one axis of rows, without a copy where the memory allows it."""
    return x.reshape(-1, x.shape[-1])


@dataclass(eq=False, repr=False)
class Linear:
    r"""A full-rank linear layer, every weight of it trainable.

    Parameters
    ----------
    weight : array, shape (out, in)
        The weight W. The layer keeps the array it is given: an optimizer updates it in place.
    bias : array, shape (out,), optional
        The bias b, of the weight's dtype; none by default.

    Raises
    ------
    TypeError
        If an array is not floating point, or the two differ in dtype or library.
    ValueError
        If the shapes do not fit.
    """

    weight: Array
    bias: Array | None = None

    def __post_init__(self) -> None:
        check_matrix("weight", self.weight)
        if self.bias is not None:
            check_array("bias", self.bias, like=self.weight, like_name="weight")
            check_shape("bias", self.bias, (self.out_features,))

    @classmethod
    def init(
        cls,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        rng: np.random.Generator,
        dtype: str | type | np.dtype = "float32",
        backend: Backend | None = None,
    ) -> Linear:
        r"""Start as PyTorch does: weight and bias uniform in :math:`\pm 1/\sqrt{in}`.

        Parameters
        ----------
        in_features, out_features : int
            The widths of input and output.
        bias : bool
            Whether the layer has a bias.
        rng : numpy.random.Generator
            Source of the start values. They are drawn in float64 and then rounded to `dtype`, so one seed gives
            one start in every precision.
        dtype : float dtype
            Of the weights, float32 by default.
        backend : Backend, optional
            Where the arrays are to live, as `get_backend` returns it; NumPy by default.

        Returns
        -------
        Linear
            A new layer.

        Raises
        ------
        ValueError, TypeError
            If a width is below 1, or an argument is of another type.
        """
        in_features = check_integer("in_features", in_features, at_least=1)
        out_features = check_integer("out_features", out_features, at_least=1)
        check_rng(rng)
        backend = backend_or_numpy(backend)
        bound = 1 / math.sqrt(in_features)
        weight = backend.asarray(rng.uniform(-bound, bound, (out_features, in_features)), dtype)
        return cls(weight, backend.asarray(rng.uniform(-bound, bound, out_features), dtype) if bias else None)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.weight.shape[0])

    def __repr__(self) -> str:
        return f"Linear(in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None})"

    def trainable(self) -> dict[str, Array]:
        """Return the arrays that training updates, by name: the layer's own, not copies."""
        return {"weight": self.weight} if self.bias is None else {"weight": self.weight, "bias": self.bias}

    def __call__(self, x: Array) -> Array:  # (..., in) -> (..., out)
        """Return the output alone, for inference."""
        return self.forward(x)[0]

    def forward(self, x: Array) -> tuple[Array, tuple]:  # (..., in) -> (..., out)
        r"""Compute :math:`y = x W^T + b`.

        Parameters
        ----------
        x : array, shape (..., in)
            The input, of the weight's dtype.

        Returns
        -------
        y : array, shape (..., out)
            The output.
        cache : tuple
            What `backward` needs: the layer it belongs to, and x.

        Raises
        ------
        ValueError, TypeError
            If the last axis of x is not in_features long, or x differs in dtype or library.
        """
        check_features("x", x, self.in_features, "in_features", like=self.weight)
        y = x @ self.weight.T  # eq. (7)
        if self.bias is not None:
            y = y + self.bias
        return y, (self, x)

    def backward(self, dy: Array, cache: tuple, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        r"""Turn the gradient of a loss at the output into its gradients at the input and the weights.

        Parameters
        ----------
        dy : array, shape (..., out)
            :math:`\partial L / \partial y`.
        cache : tuple
            As `forward` returned it.
        need_dx : bool
            False spares the product for dx, which the first layer of a model has no use for.

        Returns
        -------
        dx : array, shape (..., in), or None
            :math:`\partial L / \partial x`.
        grads : dict
            ``weight`` (out, in) and, where there is one, ``bias`` (out,).

        Raises
        ------
        ValueError, TypeError
            If the cache is of another layer, or dy does not fit the output.
        """
        check_cache(self, dy, cache)
        _, x = cache
        grads = {"weight": rows(dy).T @ rows(x)}  # eq. (8)
        if self.bias is not None:
            grads["bias"] = rows(dy).sum(axis=0)  # eq. (9)
        return (self.input_gradient(dy) if need_dx else None), grads

    def input_gradient(self, dy: Array) -> Array:  # (..., out) -> (..., in)
        r"""Return dx alone: all that a frozen layer owes to the layers before it.

        Parameters
        ----------
        dy : array, shape (..., out)
            :math:`\partial L / \partial y`.

        Returns
        -------
        array, shape (..., in)
            :math:`\partial L / \partial x = dy\,W`.
        """
        check_features("dy", dy, self.out_features, "out_features", like=self.weight)
        return dy @ self.weight  # eq. (10)
