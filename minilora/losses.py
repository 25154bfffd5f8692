r"""Mean squared error and its gradient.

Dimensions: ``N`` rows, ``out`` columns.

.. math::
   L = \frac{1}{N\,out} \sum_{n,o} (p_{no} - t_{no})^2, \qquad
   \frac{\partial L}{\partial p_{no}} = \frac{2}{N\,out} (p_{no} - t_{no})
"""

from __future__ import annotations

from .checks import Array, check_array, check_count, check_shape


def mse(prediction: Array, target: Array) -> tuple[Array, Array]:  # (..., out), (..., out) -> (), (..., out)
    """Return the mean squared error and its gradient at the prediction.

    The mean runs over all entries, N times out of them, as in PyTorch: a layer twice as wide does not have
    twice the loss.

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
