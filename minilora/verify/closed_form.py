"""The best adapter of rank r in closed form, which training should approach.

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

from ..backend import backend_of, check_finite
from ..checks import Array, check_number, check_shape, check_sizes, check_trainable
from ..layer import rows
from ..lora import LoRA


def best_adapter(X: Array, residual: Array, *, rank: int, alpha: float = 1.0) -> LoRA:
    """Return the adapter of this rank with the smallest ``mse(adapter(X), residual)``.

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
    if len(X.shape) < 2 or 0 in (*X.shape, *residual.shape):
        raise ValueError(f"X has shape {X.shape}, residual {residual.shape}, expected (rows, ..., width), none empty")
    check_shape("residual", residual, (*X.shape[:-1], *residual.shape[-1:]))
    check_finite(X=X, residual=residual)
    # With X = Q T, the fitted values Q (T D^T) have the right singular vectors of the small matrix T D^T.
    Q, T = backend_of(X).xp.linalg.qr(rows(X))
    return _best(T, Q.T @ rows(residual), rank, alpha)


def best_adapter_from_gram(XtX: Array, XtR: Array, *, rank: int, alpha: float = 1.0) -> LoRA:
    """Return the same adapter from only X^T X and X^T R, which can be accumulated over rows.

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
    check_shape("XtX", XtX, XtX.shape[:1] * 2)
    check_trainable("XtR", XtR, like=XtX, like_name="XtX")
    check_shape("XtR", XtR, (XtX.shape[0], *XtR.shape[-1:]))
    check_finite(XtX=XtX, XtR=XtR)
    _check_symmetric(XtX)
    xp = backend_of(XtX).xp
    # A root T of the Gram matrix, T^T T = X^T X, replaces the T above, and T^-T X^T R replaces Q^T R.
    squares, E = xp.linalg.eigh(XtX)
    if float(squares[0]) < -(float(xp.finfo(XtX.dtype).eps) ** 0.5) * float(squares[-1]):
        raise ValueError(f"XtX has eigenvalue {float(squares[0]):.3g}, expected none below 0: it is no sum of x.T @ x")
    known = squares > squares[-1] * len(squares) * xp.finfo(XtX.dtype).eps
    root, E = xp.sqrt(squares[known]), E[:, known]
    return _best(root[:, None] * E.T, (E.T @ XtR) / root[:, None], rank, alpha)


def _check_symmetric(XtX: Array) -> None:
    """Require a symmetric matrix, up to rounding, since only one triangle is read."""
    xp = backend_of(XtX).xp
    roots = xp.sqrt(abs(xp.diagonal(XtX)))  # |XtX[i, j]| is at most roots[i] roots[j]
    allowed = float(xp.finfo(XtX.dtype).eps) ** 0.5 * roots[:, None] * roots
    if bool((xp.abs(XtX - XtX.T) > allowed).any()):
        raise ValueError("XtX is not symmetric, expected the sum of x.T @ x over blocks x of rows")


def _best(T: Array, Z: Array, rank: int, alpha: float) -> LoRA:  # (k, in), (k, out)
    """Solve the problem with k rows, with T and Z instead of X and R."""
    (rank,), alpha = check_sizes(rank=rank), check_number("alpha", alpha, above=0)
    xp = backend_of(T).xp
    D = xp.linalg.lstsq(T, Z, rcond=None)[0].T  # eq. (25)  (out, in)
    _, _, Vt = xp.linalg.svd(T @ D.T, full_matrices=False)  # eq. (26)
    V = Vt[:rank].T  # (out, r), or fewer columns where fewer exist
    lora_A = xp.zeros((rank, T.shape[1]), dtype=T.dtype)
    lora_B = xp.zeros((Z.shape[1], rank), dtype=T.dtype)
    lora_B[:, : V.shape[1]] = V  # eq. (27)
    lora_A[: V.shape[1]] = V.T @ D * (rank / alpha)
    return LoRA(lora_A, lora_B, alpha)
