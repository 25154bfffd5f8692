"""Two losses and their gradients: mean squared error, and cross-entropy.

    mean squared error, over all N * out entries:

    L = mean_no (p_no - t_no)^2                       (15)    () from p, t (N, out)
    dp_no = 2 / (N out) (p_no - t_no)                 (16)    (N, out)

    cross-entropy of logits z (N, V) and target ids t (N,), over the M targets that count:

    q_nv = exp(z_nv) / sum_u exp(z_nu)                (ce.1)  the softmax, (N, V)
    L = -(1/M) sum_n log q_n,t_n                      (ce.2)
    dz_nv = (q_nv - [v = t_n]) / M                    (ce.3)  (N, V)

For (ce.3): log q_n,t = z_n,t - log sum_u exp(z_nu), and the derivative of that logarithm of a sum by z_nv is q_nv.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from .backend import backend_of
from .checks import Array, check_array, check_count, check_ids, check_shape

Loss: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]
"""``loss(prediction, target) -> (loss, d_prediction)``, a mean over the targets."""
IGNORED = -100
"""The target that `cross_entropy` passes over, as in PyTorch."""


def mse(prediction: Array, target: Array) -> tuple[Array, Array]:  # (..., out), (..., out) -> (), (..., out)
    """Return the mean squared error and its gradient at the prediction.

    The mean runs over all N * out entries, as in PyTorch: a layer twice as wide does not have twice the loss.

    Parameters
    ----------
    prediction, target : array, shape (..., out)
        Of one shape: nothing is broadcast, since a target of shape (N, 1) against (N, out) is a bug.

    Returns
    -------
    loss : array scalar
        In the prediction's dtype. On a GPU it stays there until ``float(loss)`` asks for it.
    d_prediction : array, shape (..., out)
        The gradient of the loss at the prediction.

    Raises
    ------
    ValueError
        If the shapes differ, or there is no entry to take the mean of.
    TypeError
        If the two differ in dtype or library.
    """
    check_array("prediction", prediction)
    check_array("target", target, like=prediction, like_name="prediction")
    check_shape("target", target, prediction.shape)
    count = check_count("prediction", prediction)
    error = prediction - target
    loss = (error * error).mean()  # eq. (15)
    d_prediction = (2 / count) * error  # eq. (16)
    return loss, d_prediction


def cross_entropy(  # (..., V), (...) -> (), (..., V)
    logits: Array, targets: Array, *, out: Array | None = None
) -> tuple[Array, Array]:
    """Return the mean cross-entropy, in nats, and its gradient at the logits.

    Parameters
    ----------
    logits : array, shape (..., V)
        The scores of V classes. Scores of any size are safe: the largest of a row is subtracted first.
    targets : array of int, shape (...)
        The right class of each row, from 0 to V - 1, or -100 for a row that does not count.
    out : array, shape (..., V), optional
        Where the gradient goes. It may be the logits themselves, which are then gone: they are the largest array of a
        language model, and this way it exists once.

    Returns
    -------
    loss : array scalar
        The mean over the rows that count; 0 where none does, as in a batch of padding alone.
    d_logits : array, shape (..., V)
        The gradient of the loss at the logits; zero in rows that do not count.

    Raises
    ------
    ValueError, TypeError
        If the shapes or types do not fit, or a target is out of range. On a GPU, targets are not looked at, since that
        waits for the device.
    """
    check_targets(logits, targets)
    xp = backend_of(logits).xp
    counts = (targets != IGNORED)[..., None]  # (..., 1)
    ids = xp.where(counts, targets[..., None], 0)
    M = count(targets)
    share = (counts / M).astype(logits.real.dtype)  # 1/M in rows that count, 0 elsewhere
    z = xp.subtract(logits, logits.real.max(axis=-1, keepdims=True), out=out)  # leaves q as it is, and exp finite
    z_t = xp.take_along_axis(z, ids, axis=-1)
    e = xp.exp(z, out=z)
    total = e.sum(axis=-1, keepdims=True)
    q = xp.divide(e, total, out=e)  # eq. (ce.1)
    log_q_t = xp.where(counts, z_t - xp.log(total), 0)
    loss = -(share * log_q_t).sum()  # eq. (ce.2)
    d_logits = xp.multiply(_minus_one_hot(q, ids), share, out=q)  # eq. (ce.3)
    return loss, d_logits


def count(target: Array) -> Array | int:
    """Return over how many entries the mean of a loss runs: all, or of class ids those that are not -100.

    Where no id counts it is 1, so that loss and gradient are zero and not 0 / 0.
    """
    if target.dtype.kind in "iu":
        return backend_of(target).xp.maximum((target != IGNORED).sum(), 1)
    return check_count("target", target)


def _minus_one_hot(q: Array, ids: Array) -> Array:  # (..., V), (..., 1) -> (..., V)
    """Subtract 1 from the entry of each row that its id names, in place."""
    xp = backend_of(q).xp
    xp.put_along_axis(q, ids, xp.take_along_axis(q, ids, axis=-1) - 1, axis=-1)
    return q


def check_targets(logits: Array, targets: Array) -> None:
    """Require logits (..., V), and a class id or `IGNORED` for each row of them."""
    check_array("logits", logits)
    if not logits.shape or 0 in logits.shape:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with no empty axis")
    check_ids("targets", targets, logits.shape[-1], like=logits, like_name="logits", ignored=IGNORED)
    check_shape("targets", targets, logits.shape[:-1])
