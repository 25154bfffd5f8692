"""The best rank-r adapter in closed form: the answer that training should find.

Which change of weight D (out, in), of rank r at most, brings X D^T closest to the residual R, in the sum of squares?

    X D^T ~ R                  (25)    least squares, without the bound on the rank: D (out, in)
    X D^T = U S V^T            (26)    the singular value decomposition of its fitted values
    D_r = V_r V_r^T D          (27)    V_r (out, r), the leading r columns of V

Why (27): R - X D^T is orthogonal to everything that X can produce. So for any other change D' the loss splits in two,

    |R - X D'^T|^2 = |R - X D^T|^2 + |X D^T - X D'^T|^2

No change makes the first term smaller. The second is the distance of X D'^T, of rank r at most, from X D^T. By Eckart
and Young it is least where all but the r leading singular values are dropped: at X D^T V_r V_r^T, which is X D_r^T.
There it is S_{r+1}^2 + S_{r+2}^2 + ...

(27) is a product of two thin matrices, so B = V_r and A = V_r^T D / s is an adapter.

Source: Izenman, "Reduced-rank regression for the multivariate linear model", Journal of Multivariate Analysis 5 (1975).
"""

from __future__ import annotations

import numpy as np

from ..backend import all_finite, backend_of
from ..checks import Array, check_matrix, check_number, check_shape, check_sizes, check_trainable
from ..layer import rows
from ..lora import LoRA


def best_adapter(X: Array, residual: Array, *, rank: int, alpha: float = 1.0) -> LoRA:
    """Return the adapter of that rank with the least ``mse(adapter(X), residual)``.

    Parameters
    ----------
    X : array, shape (..., in)
        Inputs.
    residual : array, shape (..., out)
        What the adapter should give for them: the targets less the frozen base's output.
    rank : int
        At least 1. Where fewer directions do, the rest of the adapter is zero.
    alpha : float
        Of the adapter; its factors are chosen so that the result does not depend on it.

    Returns
    -------
    LoRA
        In the dtype and library of X. The columns of its ``lora_B`` are orthonormal, or zero.

    Raises
    ------
    ValueError, TypeError
        If the shapes, dtypes or libraries do not fit, the data are not finite or in half precision, or rank or alpha
        are out of range.
    """
    check_trainable("X", X)
    check_trainable("residual", residual, like=X, like_name="X")
    for name, data in (("X", X), ("residual", residual)):
        if len(data.shape) < 2 or 0 in data.shape:
            raise ValueError(f"{name} has shape {tuple(data.shape)}, expected (rows, ..., width) with no empty axis")
    check_shape("residual", residual, (*X.shape[:-1], *residual.shape[-1:]))
    _check_finite("X", X, "residual", residual)
    # With X = Q T, the fitted values Q (T D^T) have the right singular vectors of the small matrix T D^T.
    Q, T = backend_of(X).xp.linalg.qr(rows(X))
    return _best(T, Q.T @ rows(residual), rank, alpha)


def best_adapter_from_gram(XtX: Array, XtR: Array, *, rank: int, alpha: float = 1.0) -> LoRA:
    """Return the same adapter from X^T X and X^T R alone, so that rows may stream past.

    Both are sums over rows: add them up a block at a time and the data never need to be in memory at once. The price:
    directions of X whose singular value is below sqrt(eps) of the largest are dropped.

    Parameters
    ----------
    XtX : array, shape (in, in)
        The sum of ``x.T @ x`` over blocks x of rows.
    XtR : array, shape (in, out)
        The sum of ``x.T @ residual`` over the same blocks.
    rank, alpha
        As in `best_adapter`.

    Returns
    -------
    LoRA
        As in `best_adapter`.

    Raises
    ------
    ValueError, TypeError
        As in `best_adapter`, or if XtX is not symmetric, or has an eigenvalue below zero: no sum of ``x.T @ x`` does.
    """
    check_trainable("XtX", XtX)
    check_matrix("XtX", XtX)
    check_shape("XtX", XtX, (XtX.shape[0], XtX.shape[0]))
    check_trainable("XtR", XtR, like=XtX, like_name="XtX")
    check_matrix("XtR", XtR)
    check_shape("XtR", XtR, (XtX.shape[0], XtR.shape[1]))
    _check_finite("XtX", XtX, "XtR", XtR)
    xp = backend_of(XtX).xp
    _check_symmetric(XtX)
    # A root T of the Gram matrix, T^T T = X^T X, takes the place of the T above, and T^-T X^T R that of Q^T R.
    squares, E = xp.linalg.eigh(XtX)
    if float(squares[0]) < -(float(xp.finfo(XtX.dtype).eps) ** 0.5) * float(squares[-1]):
        raise ValueError(
            f"XtX has the eigenvalue {float(squares[0]):.3g}, expected none below zero: it is no sum of x.T @ x"
        )
    known = squares > squares[-1] * len(squares) * xp.finfo(XtX.dtype).eps
    root, E = xp.sqrt(squares[known]), E[:, known]
    return _best(root[:, None] * E.T, (E.T @ XtR) / root[:, None], rank, alpha)


def _check_finite(name: str, first: Array, other_name: str, second: Array) -> None:
    """Refuse NaN and infinity, on which a decomposition would not converge."""
    if not all_finite([first, second]):
        raise ValueError(f"{other_name if all_finite([first]) else name} holds NaN or infinity")


def _check_symmetric(XtX: Array) -> None:
    """Refuse a matrix that is further from its transpose than rounding explains."""
    xp = backend_of(XtX).xp
    diagonal = xp.diagonal(XtX)
    if float(diagonal.min()) < 0:
        raise ValueError(f"XtX has {float(diagonal.min()):.3g} on its diagonal, expected sums of squares")
    roots = xp.sqrt(diagonal)  # |XtX[i, j]| is at most roots[i] roots[j]
    allowed = float(xp.finfo(XtX.dtype).eps) ** 0.5 * roots[:, None] * roots
    if bool((xp.abs(XtX - XtX.T) > allowed).any()):
        raise ValueError("XtX is not symmetric, expected the sum of x.T @ x over blocks x of rows")


def _best(T: Array, Z: Array, rank: int, alpha: float) -> LoRA:  # (k, in), (k, out)
    """Solve the problem of k rows, T and Z in the places of X and R."""
    (rank,), alpha = check_sizes(rank=rank), check_number("alpha", alpha, above=0)
    xp = backend_of(T).xp
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused
        D = xp.linalg.lstsq(T, Z, rcond=None)[0].T  # eq. (25)  (out, in)
        _check_range(alpha / rank, D, T @ D.T)
    _, _, Vt = xp.linalg.svd(T @ D.T, full_matrices=False)  # eq. (26)
    V = Vt[:rank].T  # (out, r), or fewer columns where fewer exist
    lora_A = xp.zeros((rank, T.shape[1]), dtype=T.dtype)
    lora_B = xp.zeros((Z.shape[1], rank), dtype=T.dtype)
    lora_B[:, : V.shape[1]] = V  # eq. (27)
    lora_A[: V.shape[1]] = V.T @ D * (rank / alpha)
    return LoRA(lora_A, lora_B, alpha)


def _check_range(scaling: float, D: Array, fitted: Array) -> None:
    """Refuse numbers near the ends of their type: the adapter would not give what it stands for.

    Between the roots of the smallest and the largest number, a product of two is neither lost nor infinite.
    """
    info = backend_of(D).xp.finfo(D.dtype)
    least, most = float(info.tiny) ** 0.5, float(info.max) ** 0.5
    if not least < scaling < most:
        raise ValueError(
            f"alpha makes the adapter's scaling {scaling:.3g}, expected one from {least:.0e} to {most:.0e} in {D.dtype}"
        )
    largest = float(abs(D).max())
    if not all_finite([fitted]) or not largest / scaling < float(info.max):
        raise ValueError(f"the best change of weight reaches {largest:.3g}, too much for {D.dtype}: scale the data")
    if largest / scaling < float(info.tiny) / float(info.eps) <= largest:
        raise ValueError(
            f"alpha makes lora_A so small, {largest / scaling:.3g}, that {D.dtype} loses digits: take a smaller alpha"
        )
