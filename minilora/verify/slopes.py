"""The slope of a function, measured without knowing its derivative.

Two ways to measure the slope of f(t) = L(p + t d) at 0, from p along d:

    complex step           Im f(i h) / h                            h = 1e-20
    central difference     (f(h) - f(-h)) / (2 h)                   at two steps h

Expand f(i h) = f(0) + i h f'(0) - ...: the imaginary part is h times the derivative. The complex step subtracts
nothing, so nothing cancels, and its answer is good to the last digits. The function must be analytic: no abs, no conj,
no cast to float. The central difference is for everything else. Its error is of order h^2, which two steps combined
take away (Richardson).

Source: Squire and Trapp, "Using complex variables to estimate derivatives of real functions", SIAM Review 40 (1998).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import backend_of, share_memory
from ..checks import Array, check_integer, check_kind, check_library, dtype_name
from ..layer import homes, sum_tied

Params = dict[str, Array]
Function = Callable[[Params], Any]
Slope = Callable[[str, np.ndarray], float]

COMPLEX_STEP = 1e-20
CENTRAL_STEP: float = float(np.finfo(np.float64).eps) ** (1 / 5)  # balances Richardson's h^4 against rounding's 1 / h


class CheckRefused(ValueError):
    """The check would be worthless, so it was not made; the message says why and what to change."""


class MeasuredLoss:
    """L = sum(cotangent * f) along a direction in one array of parameters, the others held.

    Making one calls f twice and refuses a function that nothing can be learned from: one that changes its input, is not
    finite, or gives another answer the second time. The caller's arrays are copied: f never sees them. An array that
    stands under several names is one, and moves under all of them.
    """

    home: dict[str, str]  # for each name, the first name of its array
    value: float  # L at the parameters themselves

    def __init__(self, f: Function, params: Mapping[str, Array], cotangent: Array | None) -> None:
        self.f, self.cotangent = f, cotangent
        self.home = homes(params)
        copies = {name: params[name].copy() for name in set(self.home.values())}
        self.params = {name: copies[home] for name, home in self.home.items()}
        twins = {name: p.astype("complex128") for name, p in copies.items()}
        self.complex_params = {name: twins[home] for name, home in self.home.items()}
        first = f(dict(self.params))
        for name, p in params.items():
            if not bool((p == self.params[name]).all()):
                raise CheckRefused(f"f changes params[{name!r}]: it must leave its input as it was")
        self._check_output(first)
        self.value = float(self.number(first))
        if not math.isfinite(self.value):
            raise CheckRefused(f"f is not finite at params: its value there is {self.value}")
        same = first == f(dict(self.params))
        if not bool(same.all() if hasattr(same, "all") else same):
            raise CheckRefused("f is not deterministic: two calls with the same params gave different results")

    def _check_output(self, output: Any) -> None:
        if not hasattr(output, "dtype") and not isinstance(output, float):
            raise CheckRefused(f"f returns {type(output).__name__}, expected a number or an array")
        shape = tuple(getattr(output, "shape", ()))
        if self.cotangent is None and shape != ():
            raise CheckRefused(f"f returns an array of shape {shape}: give a cotangent of that shape")
        if self.cotangent is not None and shape != tuple(self.cotangent.shape):
            raise CheckRefused(f"cotangent has shape {tuple(self.cotangent.shape)}, expected {shape} as f returns")
        if hasattr(output, "dtype") and dtype_name(output) != "float64":
            raise CheckRefused(f"f returns {output.dtype}, expected float64: it loses the digits to be checked")

    def number(self, output: Any) -> Any:
        """Return L from what f returned."""
        return output if self.cotangent is None else (self.cotangent * output).sum()

    def moved(self, params: Params, name: str, by: Array) -> Params:
        """Return the parameters with one array moved, under each of its names."""
        new = params[name] + by
        return {other: new if self.home[other] == name else p for other, p in params.items()}

    def at(self, name: str, direction: np.ndarray, t: float) -> float:
        """Return L with one array moved by t times the direction."""
        by = t * backend_of(self.params[name]).asarray(direction)
        return float(self.number(self.f(self.moved(self.params, name, by))))

    def complex_slope(self, name: str, direction: np.ndarray) -> float:
        """Return the slope along the direction by the complex step."""
        by = (1j * COMPLEX_STEP) * backend_of(self.params[name]).asarray(direction)
        value = complex(self.number(self.f(self.moved(self.complex_params, name, by))))
        return value.imag / COMPLEX_STEP

    def central_slope(self, name: str, direction: np.ndarray) -> float:
        """Return the slope along the direction by central differences at two steps."""
        h = self.step(name)
        # Halving h quarters the error of order h^2, so this combination cancels it.
        return (4 * self.difference(name, direction, h / 2) - self.difference(name, direction, h)) / 3

    def step(self, name: str) -> float:
        """Return the step for a central difference: fixed, but no less than is felt by the largest number it moves."""
        p = backend_of(self.params[name]).to_numpy(self.params[name])
        largest = float(np.abs(p).max())
        return CENTRAL_STEP * max(1.0, 1e-6 * largest)

    def difference(self, name: str, direction: np.ndarray, step: float) -> float:
        """Return one central difference, divided by the step actually taken: p + h is a rounded number."""
        p, d = backend_of(self.params[name]).to_numpy(self.params[name]), direction
        taken = float((((p + step * d) - (p - step * d)) * d).sum() / (d * d).sum())
        return (self.at(name, d, step) - self.at(name, d, -step)) / taken

    def sides(self, name: str, direction: np.ndarray) -> tuple[float, float] | None:
        """Return the slopes on the left and on the right where the function has a kink, or None."""
        h = self.step(name) / 4
        slopes = np.diff([self.at(name, direction, k * h) for k in range(-4, 5)]) / h
        # Over eight steps the slope of a smooth function changes bit by bit; across a kink, within two of them.
        changes = np.diff(slopes)
        total, across_two = np.abs(changes).sum(), np.abs(changes[:-1] + changes[1:]).max()
        kink = across_two > max(1e-4 * max(1.0, abs(slopes[0])), 0.75 * total)
        return (float(slopes[0]), float(slopes[-1])) if kink else None

    def distrust_complex_step(self, rng: np.random.Generator) -> str:
        """Return why the complex step cannot be used on this function, or "" if it can."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)
                output = self.f(dict(self.complex_params))
                if not isinstance(output, complex) and dtype_name(output) != "complex128":
                    return "f returns real numbers for complex ones"
                for name in dict.fromkeys(self.home.values()):
                    d = rng.standard_normal(self.params[name].shape)
                    by_complex, by_central = self.complex_slope(name, d), self.central_slope(name, d)
                    allowed = 1e-5 * max(1.0, abs(by_central), abs(self.value))
                    apart = abs(by_complex - by_central)
                    if apart > allowed:  # a kink within that step, perhaps: few lie within one a thousand times shorter
                        apart = abs(by_complex - self.difference(name, d, self.step(name) / 1000))
                    if not apart <= allowed:
                        return f"it gives {by_complex:.6g} for the slope {by_central:.6g} in {name}; is f analytic?"
        except Exception as error:  # whatever a function does when it is handed complex numbers
            return f"f does not take complex numbers ({type(error).__name__}: {error})"
        return ""


def check_arguments(params: Mapping[str, Array], grads: Mapping[str, Array], cotangent: Array | None) -> None:
    """Refuse what cannot be checked, before f is called."""
    for label, value in (("params", params), ("grads", grads)):
        if not isinstance(value, Mapping):
            raise CheckRefused(f"{label} must be a dict, got {type(value).__name__}")
    if not params:
        raise CheckRefused("params is empty: there is nothing to check")
    if params.keys() != grads.keys():
        raise CheckRefused(f"grads has the keys {sorted(grads)}, expected {sorted(params)} as in params")
    arrays = {f"params[{name!r}]": p for name, p in params.items()}
    arrays |= {f"grads[{name!r}]": g for name, g in grads.items()}
    arrays |= {} if cotangent is None else {"cotangent": cotangent}
    for label, array in arrays.items():
        check_kind(label, array)
        check_library(label, array, like=next(iter(params.values())), like_name="params")
        if dtype_name(array) != "float64":
            raise CheckRefused(f"{label} has dtype {array.dtype}, expected float64: slopes of less cannot be trusted")
        if not bool(backend_of(array).xp.isfinite(array).all()):
            raise CheckRefused(f"{label} is not finite")
    for name, p in params.items():
        if p.size == 0:
            raise CheckRefused(f"params[{name!r}] has shape {tuple(p.shape)}: there is nothing to check")
        if tuple(grads[name].shape) != tuple(p.shape):
            raise CheckRefused(f"grads[{name!r}] has shape {tuple(grads[name].shape)}, expected {tuple(p.shape)}")
        for other, q in params.items():
            if other < name and p is not q and share_memory(p, q):
                raise CheckRefused(
                    f"params[{other!r}] and params[{name!r}] share memory and are two arrays: f cannot see one move "
                    "alone. Give one array both names, and it is checked as one, with the sum of its gradients"
                )


@dataclass(frozen=True)
class TaylorOrders:
    """How fast two remainders of f(h) = L(p + h d) shrink with the step, for a claimed gradient g.

    A right gradient gives the orders 1 and 2, a wrong one 1 and 1.
    """

    steps: np.ndarray  # (k,), the steps h, each half of the one before
    zeroth: np.ndarray  # (k,), |f(h) - f(0)|
    first: np.ndarray  # (k,), |f(h) - f(0) - h <g, d>|
    zeroth_orders: np.ndarray  # (k - 1,), the power of h seen in `zeroth` from one step to the next
    first_orders: np.ndarray  # (k - 1,), the same of `first`


def taylor_orders(
    f: Function,
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    *,
    cotangent: Array | None = None,
    halvings: int = 12,
    seed: int = 0,
) -> TaylorOrders:
    """Return the orders at which the Taylor remainders of `f` vanish along one Gaussian direction through all params.

    Parameters
    ----------
    f, params, grads, cotangent
        As in `gradcheck`, with the same refusals.
    halvings : int
        How many times the step is halved, from 1/4 of a direction of length 1.
    seed : int
        Of the direction.

    Returns
    -------
    TaylorOrders
        For a plot: both remainders against the step, on logarithmic axes, are straight lines.

    Raises
    ------
    CheckRefused
        If the orders would be worthless, as in `gradcheck`.
    ValueError, TypeError
        If `halvings` is not an integer from 1 to 1000, or as in `gradcheck`.
    """
    halvings = check_integer("halvings", halvings, at_least=1, at_most=1000)  # beyond, the step itself is 0
    check_arguments(params, grads, cotangent)
    loss = MeasuredLoss(f, params, cotangent)
    rng = np.random.default_rng(seed)
    directions = {name: rng.standard_normal(params[name].shape) for name in dict.fromkeys(loss.home.values())}
    length = math.sqrt(sum(float((d * d).sum()) for d in directions.values()))
    directions = {name: d / length for name, d in directions.items()}
    claimed = sum_tied(grads, loss.home)
    slope = sum(float((backend_of(g).to_numpy(g) * directions[name]).sum()) for name, g in claimed.items())

    def along(h: float) -> float:
        moved = {name: loss.params[name] + h * backend_of(claimed[name]).asarray(d) for name, d in directions.items()}
        return float(loss.number(f({name: moved[home] for name, home in loss.home.items()})))

    steps = 0.25 * 0.5 ** np.arange(halvings + 1)
    change = np.array([along(float(h)) - loss.value for h in steps])
    zeroth, first = np.abs(change), np.abs(change - steps * slope)
    with np.errstate(divide="ignore", invalid="ignore"):
        orders = [np.log2(remainder[:-1] / remainder[1:]) for remainder in (zeroth, first)]
    return TaylorOrders(steps, zeroth, first, *orders)
