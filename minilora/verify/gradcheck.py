"""Is a hand-written gradient right? Measure the slope of the function itself, and compare.

Give `gradcheck` a function of a dict of arrays and the gradients that you claim for it. Nothing here knows what a layer
is; `minilora.verify.slopes` measures the slopes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_integer, check_number
from ..layer import sum_tied
from .slopes import CheckRefused, Function, MeasuredLoss, Slope, check_arguments

Method = Literal["auto", "complex", "central"]

TOLERANCE = {"complex": 1e-12, "central": 1e-9}
NOISE = {"complex": 1e-13, "central": 1e-9}
"""Of the largest slope, or of the value: a slope below it is rounding."""


class GradientError(AssertionError):
    """A gradient is wrong. The message is the report, which is also the attribute `report`."""

    def __init__(self, report: GradReport) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class BlockReport:
    """What was found for one array of parameters."""

    name: str
    shape: tuple[int, ...]
    checked: str  # "12 entries" where each was checked, "8 directions" where the array is large
    error: float  # the largest difference of analytic and numeric slope
    allowed: float  # the largest error that would still pass
    worst: tuple[int, ...] | None  # the entry with that error; None for a direction through all of them
    analytic: float  # the claimed slope there
    numeric: float  # the measured one
    factor: float | None = None  # by which all entries are off, where it is one number: 2, N and alpha/r are telling
    left: float | None = None  # the slope on the left of a kink, where the function has one
    right: float | None = None  # and on its right
    passed: bool = True  # whether the error is allowed

    @property
    def ratio(self) -> float:
        """Analytic over numeric slope at the worst entry."""
        return self.analytic / self.numeric if self.numeric else math.nan

    @property
    def diagnosis(self) -> list[str]:
        """What is known of a wrong gradient beyond its worst entry, in sentences."""
        sentences = []
        if self.factor is not None:
            sentences.append(f"every slope is off by the same factor, {self.factor:.9g}")
        if self.left is not None:
            sentences.append(f"a kink, with slope {self.left:z.9g} on the left, {self.right:z.9g} on the right")
        return sentences


@dataclass(frozen=True, repr=False)
class GradReport:
    """What `gradcheck` found. It prints, and shows itself at a prompt and in a notebook, as a table."""

    method: str  # "complex" or "central": how slopes were measured
    blocks: tuple[BlockReport, ...]  # one for each array of parameters
    note: str = ""  # why the complex step was not used, where "auto" passed over it

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
        table = [head, *(_row(block) for block in self.blocks)]
        widths = [max(len(row[column]) for row in table) for column in range(len(head))]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
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
    """Compare the gradients that you claim for `f` with its slopes.

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
        central difference to five digits in one direction of each block.
    step : float, optional
        A step for plain central differences, in place of Richardson's two. On a function quadratic along each block,
        1.0 has no truncation error, and the least rounding.
    tolerance : float, optional
        The error allowed, times the largest of 1, the block's largest slope, and of f itself under central differences.
        By default 1e-12 for the complex step and 1e-9 for central differences.
    allow_zero : collection of str
        Names whose slope may be zero everywhere, up to rounding. Otherwise that is refused: it checks nothing.
    every_entry_below : int
        Blocks with more entries are checked along Gaussian directions, and a wrong one is searched for its worst entry.
    directions : int
        How many of them.
    seed : int
        Of the directions.

    Returns
    -------
    GradReport
        Errors, entries and slopes; every gradient passed.

    Raises
    ------
    GradientError
        If a gradient is wrong.
    CheckRefused
        If the check would be worthless, or a setting is out of range.
    TypeError
        If a setting is of another type, or an array is none or of a library that does not compute as NumPy does.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([0.3, -1.2, 2.0])
    >>> gradcheck(lambda p: (p["x"] ** 3).sum(), {"x": x}, {"x": 3 * x**2}).passed
    True
    """
    if method not in ("auto", "complex", "central"):
        raise CheckRefused(f"method must be 'auto', 'complex' or 'central', got {method!r}")
    if step is not None and method == "complex":
        raise CheckRefused(f"a step is for central differences, and method is 'complex', got step={step!r}")
    if isinstance(allow_zero, str):  # in which every part of a name would pass for a name
        raise TypeError(f"allow_zero must be a collection of names such as [{allow_zero!r}], got {allow_zero!r}")
    try:
        step = None if step is None else check_number("step", step, above=0)
        tolerance = None if tolerance is None else check_number("tolerance", tolerance, above=0, or_equal=True)
        every_entry_below = check_integer("every_entry_below", every_entry_below, at_least=0)
        directions = check_integer("directions", directions, at_least=1)
    except ValueError as refusal:  # f may raise one of its own: this can be told from it
        raise CheckRefused(str(refusal)) from None
    check_arguments(params, grads, cotangent)
    loss = MeasuredLoss(f, params, cotangent)
    rng = np.random.default_rng(seed)
    note = ""
    if method == "auto":
        note = "" if step is None else "a step for central differences was given"
        note = note or loss.distrust_complex_step(rng)
        method = "central" if note else "complex"
    slope: Slope = loss.complex_slope if method == "complex" else loss.central_slope
    if step is not None:
        slope = partial(loss.difference, step=step)

    claimed = {name: backend_of(g).to_numpy(g) for name, g in sum_tied(grads, loss.home).items()}
    tried = {}
    for name, g in claimed.items():
        few = g.size <= every_entry_below
        tried[name] = _Tried(g, slope, name, None if few else [rng.standard_normal(g.shape) for _ in range(directions)])
        if not np.isfinite(tried[name].numeric).all():
            raise CheckRefused(f"f is not finite close to params[{name!r}]: move away from that point")
    # Below this, a slope is rounding: that of a number which is zero in truth.
    rounding = NOISE[method] * max(abs(loss.value), *(float(np.abs(t.numeric).max()) for t in tried.values()))
    blocks = []
    for name, t in tried.items():
        if name not in allow_zero and max(np.abs(t.numeric).max(), np.abs(t.analytic).max()) <= rounding:
            raise CheckRefused(
                f"{name}: the slope is zero everywhere, so nothing was checked. Does f read {name!r} from the dict it "
                f"is handed? If zero is right, say allow_zero=[{name!r}]; for LoRA, move off B = 0"
            )
        scale = max(1.0, float(np.abs(t.numeric).max()), abs(loss.value) if method == "central" else 0.0)
        allowed = (TOLERANCE[method] if tolerance is None else tolerance) * scale
        block = t.report(allowed)
        blocks.append(block if block.passed else _explain(block, loss, slope, t, rng))

    report = GradReport(method, tuple(blocks), note)
    if not report.passed:
        raise GradientError(report)
    return report


class _Tried:
    """One array's claimed gradient, and its slopes along every entry, or along the given directions."""

    def __init__(self, claimed: np.ndarray, slope: Slope, name: str, directions: Sequence[np.ndarray] | None) -> None:
        self.claimed, self.name, self.directions = claimed, name, directions
        ways = [self.way(i) for i in range(claimed.size)] if directions is None else directions
        self.analytic = np.array([float((claimed * d).sum()) for d in ways])
        self.numeric = np.array([slope(name, d) for d in ways])
        self.worst = int(np.abs(self.analytic - self.numeric).argmax())

    def way(self, number: int) -> np.ndarray:
        """Return the direction that was tried under a number."""
        if self.directions is not None:
            return self.directions[number]
        return _entry(self.claimed.shape, _index(number, self.claimed.shape))

    def report(self, allowed: float) -> BlockReport:
        """Return what was found, with the worst slope."""
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


def _explain(
    block: BlockReport, loss: MeasuredLoss, slope: Slope, tried: _Tried, rng: np.random.Generator
) -> BlockReport:
    """Say more about a block that failed: its worst entry, a factor common to all slopes tried, a kink."""
    way = tried.way(tried.worst)
    if block.worst is None:
        worst = _search(block.name, slope, tried.claimed, rng)
        analytic, numeric = float(tried.claimed[worst]), slope(block.name, _entry(block.shape, worst))
        if abs(analytic - numeric) > block.allowed:  # else the error is in no single entry: a kink across, for one
            way = _entry(block.shape, worst)
            block = replace(block, worst=worst, analytic=analytic, numeric=numeric)
    seen = np.abs(tried.numeric) > 1e-6 * np.abs(tried.numeric).max()
    ratios = tried.analytic[seen] / tried.numeric[seen]
    if len(ratios) > 1 and np.ptp(ratios) <= 1e-5 * abs(ratios[0]):
        block = replace(block, factor=float(np.median(ratios)))
    sides = loss.sides(block.name, way)
    return block if sides is None else replace(block, left=sides[0], right=sides[1])


def _search(name: str, slope: Slope, claimed: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
    """Find a wrong entry of a large block: halve it again and again, going on with the half whose error is larger."""
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
    """Return the index of an entry from its place in reading order."""
    return tuple(int(i) for i in np.unravel_index(flat, shape))


def _entry(shape: tuple[int, ...], index: tuple[int, ...]) -> np.ndarray:
    """Return the direction that moves one entry alone."""
    d = np.zeros(shape)
    d[index] = 1.0
    return d
