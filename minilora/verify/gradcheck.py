"""Gradient checking: measure the slopes of a function, and compare them with its hand-written gradient.

Give `gradcheck` a function of a dict of arrays and the gradients that you claim for it. Nothing here knows what a layer
is. There are two ways to measure the slope of f(t) = L(p + t d) at 0, from p along d:

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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from ..backend import backend_of, check_apart, check_finite
from ..checks import (
    Array,
    check_choice,
    check_dict,
    check_integer,
    check_kind,
    check_number,
    check_same_keys,
    check_shape,
    dtype_name,
)
from ..layer import first_names, sum_tied
from ..texts import align

Method = Literal["auto", "complex", "central"]
Params = dict[str, Array]
Function = Callable[[Params], Any]
SlopeOf = Callable[[str, np.ndarray], float]

SLOPE_TOLERANCE = {"complex": 1e-12, "central": 1e-9}
NOISE = {"complex": 1e-13, "central": 1e-9}
"""The share of the largest slope, or of the value, below which a slope is rounding."""
WELL_ABOVE = 10
"""A slope must exceed the tolerance by this factor, or even a gradient of zeros would pass."""
COMPLEX_STEP = 1e-20
STEEP = 1e-5
"""A share of a slope; if halving the step changes the slope by more, central differences take shorter steps."""
CENTRAL_STEP: float = float(np.finfo(np.float64).eps) ** (1 / 5)  # balances Richardson's h^4 against rounding's 1 / h


class CheckRefused(ValueError):
    """The check would be worthless, so it was not made; the message says why, and what to change."""


@contextmanager
def refused() -> Iterator[None]:
    """Turn a ValueError about an argument into `CheckRefused`, to tell it from an error of f."""
    try:
        yield
    except ValueError as reason:
        raise CheckRefused(str(reason)) from None


class GradientError(AssertionError):
    """A gradient is wrong. The message is the report, also available as the attribute `report`."""

    def __init__(self, report: GradReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class BlockReport:
    """The result for one array of parameters."""

    name: str
    shape: tuple[int, ...]
    checked: str  # "12 entries" if each was checked, "8 directions" if the array is large
    error: float  # the largest difference between analytic and numeric slope
    allowed: float  # the largest error that would still pass
    worst: tuple[int, ...] | None  # the entry with that error; None for a direction
    analytic: float  # its claimed slope
    numeric: float  # its measured slope
    factor: float | None = None  # a common factor of all entries, if there is one: 2, N and alpha/r are telling
    left: float | None = None  # the slope on the left of a kink, if there is one
    right: float | None = None  # the slope on its right
    unread: bool = False  # whether every measured slope is exactly zero
    passed: bool = True  # whether the error is within the tolerance

    @property
    def ratio(self) -> float:
        """The ratio of analytic to numeric slope at the worst entry."""
        return self.analytic / self.numeric if self.numeric else math.nan

    @property
    def diagnosis(self) -> list[str]:
        """Sentences about a wrong gradient in addition to its worst entry."""
        sentences = []
        if self.unread:
            sentences.append(f"every measured slope is 0: does f read {self.name!r} from the dict it is handed?")
        if self.factor is not None:
            sentences.append(f"every slope is off by the same factor, {self.factor:.9g}")
        if self.left is not None:
            sentences.append(f"a kink, with slope {self.left:z.9g} on the left, {self.right:z.9g} on the right")
        return sentences


@dataclass(frozen=True, repr=False)
class GradReport:
    """The report of `gradcheck`. It displays itself as a table in print, at a prompt and in a notebook."""

    method: str  # "complex" or "central": how slopes were measured
    blocks: tuple[BlockReport, ...]  # one block for each array of parameters
    note: str = ""  # why "auto" did not use the complex step

    @property
    def passed(self) -> bool:
        """Whether every block passed."""
        return all(block.passed for block in self.blocks)

    def __str__(self) -> str:
        way = {"complex": "complex step", "central": "central differences"}[self.method]
        lines = [f"gradcheck by {way}: {sum(b.passed for b in self.blocks)} of {len(self.blocks)} gradients agree"]
        if self.note:
            lines.append(f"(not by complex step: {self.note})")
        head = ("gradient", "shape", "checked", "error", "allowed", "worst at", "analytic", "numeric", "ratio", "")
        lines += align([head, *(_row(block) for block in self.blocks)], left=range(len(head)))
        lines += [f"{block.name}: {sentence}" for block in self.blocks for sentence in block.diagnosis]
        return "\n".join(lines)

    __repr__ = __str__


def _row(block: BlockReport) -> tuple[str, ...]:
    where = "all" if block.worst is None else str(block.worst)
    numbers = (f"{block.analytic:.7g}", f"{block.numeric:.7g}", f"{block.ratio:.9g}")
    verdict = "ok" if block.passed else "WRONG"
    shape = str(block.shape)
    return block.name, shape, block.checked, f"{block.error:.1e}", f"{block.allowed:.1e}", where, *numbers, verdict


def gradcheck(
    f: Function,
    params: Mapping[str, Array],
    grads: Mapping[str, Array],
    *,
    cotangent: Array | None = None,
    method: Method = "auto",
    step: float | None = None,
    tolerance: float | None = None,
    allow_zero: Collection[str] = (),
    every_entry_below: int = 1000,
    directions: int = 8,
    seed: int = 0,
) -> GradReport:
    """Compare claimed gradients of `f` with its measured slopes.

    Parameters
    ----------
    f : callable
        ``f(params)`` returns a number, or an array where `cotangent` is given. It must compute from the dict it is
        handed, and change nothing in it.
    params : dict of str to array
        Where to check, in float64. Random values are best: at zeros many errors cannot be seen.
    grads : dict of str to array
        The claimed gradients, under the same names and in the same shapes: of `f` itself, or of
        L = sum_j c_j f_j with the cotangent c. That is what a ``backward(c, cache)`` returns. An array under
        several names is one parameter: it is checked once, against the sum of its gradients.
    cotangent : array, optional
        Of the shape of f's output. Random values are best: all ones hide mixed-up axes.
    method : {"auto", "complex", "central"}
        "auto" takes the complex step where it can be trusted: where `f` accepts complex numbers, and agrees with a
        central difference, as far as that is good, in one direction of each block.
    step : float, optional
        A step for plain central differences, in place of Richardson's two. On a function quadratic along each block,
        1.0 has no truncation error, and the least rounding.
    tolerance : float, optional
        The error allowed, times the largest of 1, the block's largest slope, and of f itself under central differences.
        By default 1e-12 for the complex step and 1e-9 for central differences.
    allow_zero : collection of str
        Names whose slope may be zero everywhere, up to rounding. Otherwise that is refused: it checks nothing.
    every_entry_below, directions, seed : int
        Blocks with more entries are checked along that many Gaussian directions, and a wrong one is searched for its
        worst entry.

    Returns
    -------
    GradReport
        Errors, entries and slopes; every gradient passed.

    Raises
    ------
    GradientError
        If a gradient is wrong.
    CheckRefused
        If the check would be worthless, a gradient does not fit its array, or a setting is out of range.
    TypeError
        If an argument is of another type.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([0.3, -1.2, 2.0])
    >>> gradcheck(lambda p: (p["x"] ** 3).sum(), {"x": x}, {"x": 3 * x**2}).passed
    True
    """
    with refused():
        check_choice("method", method, ("auto", "complex", "central"))
        step = None if step is None else check_number("step", step, above=0)
        tolerance = None if tolerance is None else check_number("tolerance", tolerance, above=0, or_equal=True)
        directions = check_integer("directions", directions, at_least=1)
        check_claim(params, grads, cotangent)
    if step is not None and method == "complex":
        raise CheckRefused(f"a step is for central differences, and method is 'complex', got step={step!r}")
    if isinstance(allow_zero, str):  # in a string every substring would pass for a name
        raise TypeError(f"allow_zero must be a collection of names such as [{allow_zero!r}], got {allow_zero!r}")
    slopes = Slopes(f, params, cotangent)
    rng = np.random.default_rng(seed)
    note = ""
    if method == "auto":
        note = "" if step is None else "a step for central differences was given"
        note = note or slopes.distrust_complex_step(rng)
        method = "central" if note else "complex"
    slope: SlopeOf = slopes.complex_slope if method == "complex" else slopes.central_slope
    if step is not None:
        slope = partial(slopes.difference, step=step)

    claimed = {name: backend_of(g).to_numpy(g) for name, g in sum_tied(grads, slopes.home).items()}
    tried = {}
    for name, g in claimed.items():
        few = g.size <= every_entry_below
        tried[name] = _Tried(g, slope, name, None if few else [rng.standard_normal(g.shape) for _ in range(directions)])
        if not np.isfinite(tried[name].numeric).all():
            raise CheckRefused(f"f is not finite close to params[{name!r}]: move away from that point")
    # Slopes below this are rounding, whose true value may be zero.
    rounding = NOISE[method] * max(abs(slopes.value), *(float(np.abs(t.numeric).max()) for t in tried.values()))
    blocks = []
    for name, t in tried.items():
        if name not in allow_zero and max(np.abs(t.numeric).max(), np.abs(t.analytic).max()) <= rounding:
            raise CheckRefused(
                f"{name}: the slope is zero everywhere, so nothing was checked. Does f read {name!r} from the dict it "
                f"is handed? If zero is right, say allow_zero=[{name!r}]; for LoRA, move off B = 0"
            )
        largest = float(np.abs(t.numeric).max())
        scale = max(1.0, largest, abs(slopes.value) if method == "central" else 0.0)
        allowed = (SLOPE_TOLERANCE[method] if tolerance is None else tolerance) * scale
        seen = max(largest, float(np.abs(t.analytic).max()))
        if tolerance is None and name not in allow_zero and seen <= WELL_ABOVE * allowed:
            raise CheckRefused(
                f"{name}: no slope is larger than {largest:.3g}, and {allowed:.3g} is allowed, so next to nothing was "
                f"checked: give f times a number, or a smaller tolerance"
            )
        block = t.report(allowed)
        blocks.append(block if block.passed else _explain(block, slopes, slope, t, rng))

    report = GradReport(method, tuple(blocks), note)
    if not report.passed:
        raise GradientError(report)
    return report


class _Tried:
    """One array's claimed gradient, with its slopes along every entry or along the given directions."""

    def __init__(self, claimed: np.ndarray, slope: SlopeOf, name: str, directions: Sequence[np.ndarray] | None) -> None:
        self.claimed, self.name, self.directions = claimed, name, directions
        ways = [self.way(i) for i in range(claimed.size)] if directions is None else directions
        self.analytic = np.array([float((claimed * d).sum()) for d in ways])
        self.numeric = np.array([slope(name, d) for d in ways])
        self.worst = int(np.abs(self.analytic - self.numeric).argmax())

    def way(self, number: int) -> np.ndarray:
        """Return the direction with this index."""
        if self.directions is not None:
            return self.directions[number]
        return _entry(self.claimed.shape, _index(number, self.claimed.shape))

    def report(self, allowed: float) -> BlockReport:
        """Return the result with the worst slope."""
        entries = self.directions is None
        error = float(abs(self.analytic[self.worst] - self.numeric[self.worst]))
        return BlockReport(
            name=self.name,
            shape=tuple(self.claimed.shape),
            checked=f"{len(self.analytic)} {'entries' if entries else 'directions'}",
            error=error,
            allowed=allowed,
            worst=_index(self.worst, self.claimed.shape) if entries else None,
            analytic=float(self.analytic[self.worst]),
            numeric=float(self.numeric[self.worst]),
            passed=error <= allowed,  # False for NaN
        )


def _explain(block: BlockReport, slopes: Slopes, slope: SlopeOf, t: _Tried, rng: np.random.Generator) -> BlockReport:
    """Add details to a failed block: its worst entry, a common factor of all slopes, a kink."""
    way = t.way(t.worst)
    if block.worst is None:
        worst = _search(block.name, slope, t.claimed, rng)
        analytic, numeric = float(t.claimed[worst]), slope(block.name, _entry(block.shape, worst))
        if abs(analytic - numeric) > block.allowed:  # otherwise no single entry is wrong, as with a kink in between
            way = _entry(block.shape, worst)
            block = replace(block, worst=worst, analytic=analytic, numeric=numeric)
    seen = np.abs(t.numeric) > 1e-6 * np.abs(t.numeric).max()
    block, ratios = replace(block, unread=not t.numeric.any()), t.analytic[seen] / t.numeric[seen]
    if len(ratios) > 1 and np.ptp(ratios) <= 1e-5 * abs(ratios[0]):
        block = replace(block, factor=float(np.median(ratios)))
    sides = slopes.sides(block.name, way)
    return block if sides is None else replace(block, left=sides[0], right=sides[1])


def _search(name: str, slope: SlopeOf, claimed: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Find a wrong entry of a large block by bisection, following the half with the larger error."""
    low, high = 0, claimed.size
    while high - low > 1:
        middle = (low + high) // 2
        halves = np.zeros((2, claimed.size))
        halves[0, low:middle] = rng.standard_normal(middle - low)
        halves[1, middle:high] = rng.standard_normal(high - middle)
        first, second = (abs((claimed * d).sum() - slope(name, d)) for d in halves.reshape(2, *claimed.shape))
        low, high = (low, middle) if first >= second else (middle, high)
    return _index(low, claimed.shape)


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of an entry from its flat index."""
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _entry(shape: tuple[int, ...], index: tuple[int, ...]) -> np.ndarray:
    """Return the direction that moves a single entry."""
    d = np.zeros(shape)
    d[index] = 1.0
    return d


class Slopes:
    """The slopes of L = sum(cotangent * f) along directions in one array, moved under all of its names.

    To make one calls f twice, on copies. Required is a finite f that leaves its input and answers alike both times.
    """

    home: dict[str, str]  # for each name, the first name of its array
    value: float  # L at the parameters themselves

    def __init__(self, f: Function, params: Mapping[str, Array], cotangent: Array | None) -> None:
        self.f, self.cotangent = f, cotangent
        self.home = first_names(params)
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
        shape = tuple(getattr(output, "shape", ()))
        if shape != tuple(getattr(self.cotangent, "shape", ())):
            raise CheckRefused(f"f returns an array of shape {shape}: give a cotangent of that shape")
        if hasattr(output, "dtype") and dtype_name(output) != "float64":
            raise CheckRefused(f"f returns {output.dtype}, expected float64: it loses the digits to be checked")

    def number(self, output: Any) -> Any:
        """Return L from the value of f."""
        return output if self.cotangent is None else (self.cotangent * output).sum()

    def moved(self, params: Params, name: str, by: Array) -> Params:
        """Return the parameters with one array moved under all of its names."""
        new = params[name] + by
        return {other: new if self.home[other] == name else p for other, p in params.items()}

    def at(self, name: str, direction: np.ndarray, t: float) -> float:
        """Return L with one array moved by t times the direction."""
        by = t * backend_of(self.params[name]).asarray(direction)
        return float(self.number(self.f(self.moved(self.params, name, by))))

    def complex_slope(self, name: str, direction: np.ndarray) -> float:
        """Return the slope along the direction by the complex step."""
        by = (1j * COMPLEX_STEP) * backend_of(self.params[name]).asarray(direction)
        return complex(self.number(self.f(self.moved(self.complex_params, name, by)))).imag / COMPLEX_STEP

    def central_slope(self, name: str, direction: np.ndarray) -> float:
        """Return the slope along the direction by central differences at two steps, shorter ones where f is steep."""
        slope, best, h = math.nan, math.inf, self.step(name)
        for step in (h, h / 8, h / 64, h / 512):
            half, whole = (self.difference(name, direction, s) for s in (step / 2, step))
            # Halving h quarters the h^2 error, so this combination cancels it; an error of about its square remains.
            combined = (4 * half - whole) / 3
            error = abs(combined - half)
            if not error >= best:  # NaN too: f is not finite there
                slope, best = combined, error
            if not error > STEEP * max(1.0, abs(slope)):
                break
        return slope

    def step(self, name: str) -> float:
        """Return the step of a central difference: fixed, but large enough to change the largest entry."""
        p = backend_of(self.params[name]).to_numpy(self.params[name])
        return CENTRAL_STEP * max(1.0, 1e-6 * float(np.abs(p).max()))

    def difference(self, name: str, direction: np.ndarray, step: float) -> float:
        """Return one central difference, divided by the actual step, since p + h is rounded."""
        p, d = backend_of(self.params[name]).to_numpy(self.params[name]), direction
        taken = float((((p + step * d) - (p - step * d)) * d).sum() / (d * d).sum())
        return (self.at(name, d, step) - self.at(name, d, -step)) / taken

    def sides(self, name: str, direction: np.ndarray) -> tuple[float, float] | None:
        """Return the slopes on both sides of a kink, or None if there is no kink."""
        h, centre, seen = self.step(name) / 4, 0.0, []
        for _ in range(3):  # closer each time: the slope of a function that is only steep then changes gradually
            slopes = np.diff([self.at(name, direction, centre + k * h) for k in range(-4, 5)]) / h
            # Over eight steps a smooth function's slope changes gradually; across a kink, within two of them.
            changes = np.diff(slopes)
            across_two = np.abs(changes[:-1] + changes[1:])
            if not across_two.max() > max(1e-4 * max(1.0, abs(slopes[0])), 0.75 * np.abs(changes).sum()):
                return None
            seen.append((float(slopes[0]), float(slopes[-1])))
            centre, h = centre + (int(across_two.argmax()) - 2.5) * h, h / 4
        return seen[0]

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
                    allowed = SLOPE_TOLERANCE["central"] * max(1.0, abs(by_central), abs(self.value))
                    allowed += 10 * abs(by_central - self.difference(name, d, self.step(name)))  # of two steps
                    apart = abs(by_complex - by_central)
                    if apart > allowed:  # perhaps a kink, which a step a thousand times shorter rarely meets
                        apart = abs(by_complex - self.difference(name, d, self.step(name) / 1000))
                    if not apart <= allowed:
                        return f"it gives {by_complex:.6g} for the slope {by_central:.6g} in {name}; is f analytic?"
        except Exception as error:  # a function may do anything with complex numbers
            return f"f does not take complex numbers ({type(error).__name__}: {error})"
        return ""


def check_claim(params: Mapping[str, Array], grads: Mapping[str, Array], cotangent: Array | None) -> None:
    """Require one finite gradient in float64 for each array, before f is called."""
    check_dict("params", params)
    check_same_keys("grads", grads, params)
    if not params:
        raise CheckRefused("params is empty: there is nothing to check")
    arrays = {f"params[{name!r}]": p for name, p in params.items()}
    arrays |= {f"grads[{name!r}]": g for name, g in grads.items()}
    arrays |= {} if cotangent is None else {"cotangent": cotangent}
    for label, array in arrays.items():
        check_kind(label, array)
        if dtype_name(array) != "float64":
            raise CheckRefused(f"{label} has dtype {array.dtype}, expected float64: slopes of less cannot be trusted")
    for name, p in params.items():
        check_shape(f"grads[{name!r}]", grads[name], p.shape)
        if 0 in p.shape:
            raise CheckRefused(f"params[{name!r}] has shape {tuple(p.shape)}: an empty array has no slope to check")
    check_finite(**arrays)
    if cotangent is not None and not cotangent.any():
        raise CheckRefused("cotangent is 0 everywhere, and so is every slope: give random numbers, for example")
    check_apart(params)  # f would see only one of them move
