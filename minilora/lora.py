r"""LoRA: learn a weight's change as a product of two thin matrices.

Read this page with a pencil. It needs matrix products and the chain rule, nothing else.

Dimensions: ``N`` rows, ``in`` = in_features, ``out`` = out_features, ``r`` = rank.

**The idea.** A layer :math:`y = x W^T` is already trained; W is (out, in) and large. To adapt it to a new task,
leave W alone and add a change of low rank r, made of :math:`A` (r, in) and :math:`B` (out, r):

.. math::
   y = x W^T + s\,x A^T B^T, \qquad s = \alpha / r

A and B have r (in + out) numbers where W has in * out. Here is the added path alone, with a name for what
stands between the two factors, one row of x at a time being (in,), of h (r,) and of y (out,):

.. math::
   h = x A^T \quad (1) \qquad\qquad y = s\,h B^T \quad (2)

**The gradients.** Let L be any number computed from y, and write dy for :math:`\partial L/\partial y`, the (N, out)
matrix of its derivatives, likewise dh, dA, dB and dx. In entries, (2) says
:math:`y_{no} = s \sum_k h_{nk} B_{ok}`. Entry :math:`B_{ok}` therefore reaches L through column o of y only, and the
chain rule adds up its rows: :math:`dB_{ok} = \sum_n dy_{no}\, s\, h_{nk}`. Entry :math:`h_{nk}` reaches it through
row n: :math:`dh_{nk} = \sum_o dy_{no}\, s\, B_{ok}`. As products of matrices:

.. math::
   dB = s\,dy^T h \quad (3) \qquad\qquad dh = s\,dy\,B \quad (4)

Equation (1) has the same form, :math:`h_{nk} = \sum_i x_{ni} A_{ki}`, so the same two steps give

.. math::
   dA = dh^T x \quad (5) \qquad\qquad dx = dh\,A \quad (6)

There is a check that costs nothing: each gradient has the shape of its array, and each product fits in only one way.

At the usual start B is zero. Then y is zero, so the adapted layer begins exactly as the base; dh, dA and dx are
zero too, by (4), and only B moves in the first step. If A were zero as well, h and dB would vanish, and nothing
would ever move.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .backend import Backend, backend_of, backend_or_numpy
from .checks import (
    Array,
    check_array,
    check_cache,
    check_count,
    check_features,
    check_instance,
    check_integer,
    check_matrix,
    check_number,
    check_rng,
    check_shape,
)
from .linear import Linear, rows


def widen(narrow: Array, factor: Array) -> Array:  # (..., r), (r, n) -> (..., n)
    """Return ``narrow @ factor``, the product that leads out of the narrow space.

    Of inner width 1 it is an outer product. NumPy keeps that from the BLAS: 128 rows of 1000 entries take 0.14 ms as a
    product of matrices, and 0.03 ms so.
    """
    return narrow * factor[0] if factor.shape[0] == 1 else narrow @ factor


@dataclass(eq=False, repr=False)
class LoRA:
    r"""The adapter: :math:`y = s\,x A^T B^T` with :math:`s = \alpha / r`.

    Parameters
    ----------
    lora_A : array, shape (r, in)
        The factor that reads the input. The layer keeps the arrays it is given: an optimizer updates them in place.
    lora_B : array, shape (out, r)
        The factor that writes the output, of the same dtype.
    alpha : float
        Strength of the update, finite and above 0; the rank divides it.

    Raises
    ------
    TypeError
        If an array is not floating point, or the two differ in dtype or library.
    ValueError
        If the factors disagree on the rank, or alpha is out of range.
    """

    lora_A: Array
    lora_B: Array
    alpha: float

    def __post_init__(self) -> None:
        check_matrix("lora_A", self.lora_A)
        check_matrix("lora_B", self.lora_B, like=self.lora_A, like_name="lora_A")
        if self.lora_A.shape[0] != self.lora_B.shape[1]:
            raise ValueError(
                "lora_A (r, in) and lora_B (out, r) disagree on the rank: "
                f"lora_A has {self.lora_A.shape[0]} rows, lora_B has {self.lora_B.shape[1]} columns"
            )
        self.alpha = check_number("alpha", self.alpha, above=0)

    @classmethod
    def init(
        cls,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        rng: np.random.Generator,
        dtype: str | type | np.dtype = "float32",
        backend: Backend | None = None,
    ) -> LoRA:
        r"""Start as PEFT does: A uniform in :math:`\pm 1/\sqrt{in}`, B zero, so the adapter adds nothing yet.

        Parameters
        ----------
        in_features, out_features, rng, dtype, backend
            As in `Linear.init`.
        rank : int
            At least 1. Above min(in, out) it is allowed and buys nothing.
        alpha : float
            Finite and above 0.

        Returns
        -------
        LoRA
            A new adapter.

        Raises
        ------
        ValueError, TypeError
            If a width or the rank is below 1, alpha out of range, or an argument is of another type.
        """
        in_features = check_integer("in_features", in_features, at_least=1)
        out_features = check_integer("out_features", out_features, at_least=1)
        rank = check_integer("rank", rank, at_least=1)
        check_rng(rng)
        backend = backend_or_numpy(backend)
        bound = 1 / math.sqrt(in_features)
        lora_A = backend.asarray(rng.uniform(-bound, bound, (rank, in_features)), dtype)
        return cls(lora_A, backend.zeros((out_features, rank), dtype), alpha)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return int(self.lora_A.shape[1])

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return int(self.lora_B.shape[0])

    @property
    def rank(self) -> int:
        """The width r between the factors."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """The factor s = alpha / r."""
        return self.alpha / self.rank

    def __repr__(self) -> str:
        return (
            f"LoRA(in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, alpha={self.alpha:g})"
        )

    def trainable(self) -> dict[str, Array]:
        """Return the arrays that training updates, by name: the layer's own, not copies."""
        return {"lora_A": self.lora_A, "lora_B": self.lora_B}

    def __call__(self, x: Array) -> Array:  # (..., in) -> (..., out)
        """Return the output alone, for inference."""
        return self.forward(x)[0]

    def forward(self, x: Array) -> tuple[Array, tuple]:  # (..., in) -> (..., out)
        r"""Return :math:`y = s\,x A^T B^T` and the cache. From the left: the (out, in) product B A is never formed."""
        check_features("x", x, self.in_features, "in_features", like=self.lora_A)
        s = self.scaling
        h = x @ self.lora_A.T  # eq. (1)  (..., r)
        y = widen(s * h, self.lora_B.T)  # eq. (2)  (..., out)
        return y, (self, x, h)

    def backward(self, dy: Array, cache: tuple, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx and the gradients of both factors. Arguments and results are as in `Linear.backward`."""
        check_cache(self, dy, cache)
        _, x, h = cache
        s = self.scaling
        dB = rows(dy).T @ rows(h) * s  # eq. (3)  (out, r)
        dh = dy @ self.lora_B * s  # eq. (4)  (..., r)
        dA = rows(dh).T @ rows(x)  # eq. (5)  (r, in)
        dx = widen(dh, self.lora_A) if need_dx else None  # eq. (6)  (..., in)
        return dx, {"lora_A": dA, "lora_B": dB}

    def delta(self) -> Array:  # -> (out, in)
        r"""Return the weight change that the adapter stands for, :math:`\Delta W = s\,B A`, of rank r at most."""
        return widen(self.scaling * self.lora_B, self.lora_A)  # eq. (13)

    def mse_gradients(self, x: Array, residual: Array) -> dict[str, Array]:
        """Return the gradients of ``mse(self(x), residual)``, without ever forming the (N, out) error.

        The residual is what the adapter should give: the targets less the frozen base's output.
        """
        check_features("x", x, self.in_features, "in_features", like=self.lora_A)
        check_array("residual", residual, like=self.lora_A)
        check_shape("residual", residual, (*x.shape[:-1], self.out_features))
        X, R = rows(x), rows(residual)
        H = X @ self.lora_A.T  # eq. (1)  (N, r)
        return self.residual_form(X, H, R.T @ H, R @ self.lora_B, check_count("residual", residual))

    def residual_form(self, X: Array, H: Array, RtH: Array, RB: Array, count: int) -> dict[str, Array]:
        r"""Return the gradients of the mean squared error from two thin products of the residual R with H and B.

        With :math:`c = 2 s / (N\,out)`, put the error :math:`s H B^T - R` into (3) and (4) and multiply out. What
        remains are products of shape (r, r), (out, r) and (N, r).
        """
        B, s = self.lora_B, self.scaling
        c = 2 * s / count
        dB = c * (s * B @ (H.T @ H) - RtH)  # eq. (17)  (out, r)
        dH = c * (s * H @ (B.T @ B) - RB)  # eq. (18)  (N, r)
        dA = dH.T @ X  # eq. (5)  (r, in)
        return {"lora_A": dA, "lora_B": dB}


@dataclass(eq=False, repr=False)
class LoRALinear:
    r"""A frozen layer and its adapter side by side: ``base(x) + adapter(x)``.

    Only the adapter is trainable. That is all there is to freezing: the base's arrays are not in `trainable()`,
    and their gradients, the product :math:`dy^T x` of N * out * in multiply-adds, are never computed.

    Parameters
    ----------
    base : Linear
        The trained layer, left as it is.
    adapter : LoRA
        Of the same widths and dtype.

    Raises
    ------
    ValueError
        If the widths differ.
    TypeError
        If they are not a Linear and a LoRA, or differ in dtype or library.
    """

    base: Linear
    adapter: LoRA

    def __post_init__(self) -> None:
        check_instance("base", self.base, Linear)
        check_instance("adapter", self.adapter, LoRA)
        check_array("adapter", self.adapter.lora_A, like=self.base.weight, like_name="base")
        for width in ("in_features", "out_features"):
            base, adapter = getattr(self.base, width), getattr(self.adapter, width)
            if base != adapter:
                raise ValueError(f"adapter has {width} = {adapter}, expected {base} as in base")

    @classmethod
    def from_linear(cls, linear: Linear, *, rank: int, alpha: float, rng: np.random.Generator) -> LoRALinear:
        """Put a new adapter on a trained layer; the output does not change until the first training step.

        `linear` is shared, not copied, and the adapter takes its dtype and its library; `rank`, `alpha` and `rng` are
        as in `LoRA.init`.
        """
        check_instance("linear", linear, Linear)
        widths, where = (linear.in_features, linear.out_features), backend_of(linear.weight)
        return cls(
            linear, LoRA.init(*widths, rank=rank, alpha=alpha, rng=rng, dtype=linear.weight.dtype, backend=where)
        )

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    @property
    def rank(self) -> int:
        """The adapter's rank r."""
        return self.adapter.rank

    @property
    def scaling(self) -> float:
        """The adapter's factor s = alpha / r."""
        return self.adapter.scaling

    def __repr__(self) -> str:
        return f"LoRALinear({self.base!r}, {self.adapter!r})"

    def trainable(self) -> dict[str, Array]:
        """Return the adapter's arrays, by name: the base is frozen by its absence."""
        return self.adapter.trainable()

    def __call__(self, x: Array) -> Array:  # (..., in) -> (..., out)
        """Return the output alone, for inference."""
        return self.forward(x)[0]

    def forward(self, x: Array) -> tuple[Array, tuple]:  # (..., in) -> (..., out)
        """Return the base's output plus the adapter's, and the cache. The base needs none of its own."""
        update, adapter_cache = self.adapter.forward(x)
        y = self.base(x) + update  # eq. (11)
        return y, (self, x, adapter_cache)

    def backward(self, dy: Array, cache: tuple, *, need_dx: bool = True) -> tuple[Array | None, dict[str, Array]]:
        """Return dx, through both paths, and the gradients of the adapter's factors. The base gets none."""
        check_cache(self, dy, cache)
        _, _, adapter_cache = cache
        dx, grads = self.adapter.backward(dy, adapter_cache, need_dx=need_dx)
        if need_dx:
            dx = self.base.input_gradient(dy) + dx  # eq. (12)
        return dx, grads

    def delta(self) -> Array:  # -> (out, in)
        r"""Return the adapter's weight change, :math:`\Delta W = s\,B A`."""
        return self.adapter.delta()

    def merge(self) -> Linear:
        r"""Return a new `Linear` of weight :math:`W + \Delta W`: as fast as the base, and this layer's output.

        The two agree up to rounding. This layer stays as it is, and shares no memory with the new one.
        """
        bias = self.base.bias
        return Linear(self.base.weight + self.delta(), None if bias is None else bias.copy())  # eq. (14)

    def mse_gradients(self, x: Array, target: Array) -> dict[str, Array]:
        r"""Return the gradients of ``mse(self(x), target)``: the adapter's, on the residual :math:`R = T - b - X W^T`.

        R is asked for in two products alone. Multiplied from their thin side, they need no output of the base: W takes
        part in 2 r in out multiply-adds, and not in N in out. At the article's sizes, 128 rows and r = 1, the gradients
        take 0.12 ms and not 1.6. With a rank above half the rows that would be more work, and the base is run.
        """
        W, bias, A, B = self.base.weight, self.base.bias, self.adapter.lora_A, self.adapter.lora_B
        check_features("x", x, self.in_features, "in_features", like=W)
        check_array("target", target, like=W)
        check_shape("target", target, (*x.shape[:-1], self.out_features))
        X, T, count = rows(x), rows(target), check_count("target", target)
        if 2 * self.rank > X.shape[0]:
            return self.adapter.mse_gradients(X, T - self.base(X))
        T = T if bias is None else T - bias
        H = X @ A.T  # eq. (1)  (N, r)
        RtH, RB = T.T @ H - W @ (X.T @ H), T @ B - X @ (W.T @ B)  # eq. (19)  (out, r), (N, r)
        return self.adapter.residual_form(X, H, RtH, RB, count)
