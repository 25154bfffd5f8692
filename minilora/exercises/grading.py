"""The grader of functions, which finds a learner's mistakes.

It calls the learner's function with sizes that all differ, so that most wrong products do not fit. Then it calls the
function with equal sizes: there every product fits, and the answer shows which one was used.

A wrong answer is compared with every order and transposition of the right matrices, and with the mistakes that an
exercise lists, each times any number. If up to three known factors make up that number, `minilora.conformance.naming`
names them. So a wrong product and a wrong factor are told apart, and both are named. A mistake that is one of
`minilora.conformance.problems.bugs` is described in the same words.

The formulas are lines of NumPy as text. Python runs them here; on the site docs/_static/numpy.js runs the same lines,
and docs/_static/exercises.js does what `grade` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations, permutations, product
from types import CodeType, SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from ..conformance import naming
from ..conformance.naming import World, Wrong
from ..conformance.problems.bugs import known

ExerciseData: TypeAlias = SimpleNamespace
Hinted: TypeAlias = tuple[str, str]
"""A formula that people write, or a wrong factor, with its hint."""
MAX_FACTORS = 3
"""The most wrong factors that are identified in one answer."""

DIFFERENT = {"N": 11, "n_in": 7, "out": 5, "r": 3}
EQUAL_SIZES = {"N": 6, "n_in": 6, "out": 6, "r": 6}  # no power of the size equals a factor of another mistake
WIDE = {"N": 1, "n_in": 640, "out": 300, "r": 80}  # enough entries to measure their RMS to 2 %

DIVISIONS: Sequence[Hinted] = [
    ("1 / N", "wrong mean: dy already contains the division by N, so this divides twice"),
    ("1 / out", "a division by out: dy already contains the mean"),
    ("1 / r", "a division by r: only alpha is divided by the rank"),
    ("1 / n_in", "a division by in: nothing here is a mean over inputs"),
]
SIGN: Hinted = ("-1", "the sign is wrong: no step here changes it")
SIZE_HINTS: Sequence[Hinted] = [
    SIGN,
    ("2", "an extra factor of 2: it belongs to the loss, and dy already contains it"),
    *DIVISIONS,
]
NOT_DIVIDED: Hinted = ("r", known("alpha-is-not-divided-by-the-rank").says)
ROOT: Hinted = ("r**0.5", known("alpha-is-divided-by-the-root-of-the-rank").says)
TWICE: Hinted = ("s", f"{known('the-scaling-is-applied-twice').says}: s enters once, in dB and in dh")
SCALES: Sequence[Hinted] = [
    ("1 / s", "alpha/r is missing: y = s h B^T, so every gradient through y gets a factor s = alpha/r"),
    TWICE,
    NOT_DIVIDED,
    ROOT,
    *SIZE_HINTS,
]


@dataclass(frozen=True)
class Exercise:
    """A function to write, with its arguments, its results and the formulas that people write for it."""

    arguments: tuple[str, ...]
    returns: Mapping[str, str]  # the shape of each result, as text
    forms: Mapping[str, Sequence[Hinted]]  # the formulas for each judged quantity, the right one first
    praise: str
    scales: Sequence[Hinted] = ()  # wrong factors of any formula
    judged: Mapping[str, str] = field(default_factory=dict)  # how to compute a judged quantity that is no result
    unknown: Mapping[str, str] = field(default_factory=dict)  # the hint for an unknown mistake
    aim: str = ""  # hints give the distance of the wrong and of the right answer from this
    may_lack: str = ""  # the first result, if it is optional
    also: tuple[str, ...] = ()  # further variables that the page offers
    tolerance: float = 1e-9
    sizes: Sequence[Mapping[str, int]] = (DIFFERENT, EQUAL_SIZES)


def product_forms(factors: Mapping[str, str], like: str, why: str, transposed: str = "") -> list[Hinted]:
    """Return every product of two matrices, in both orders, each transposed or not, with hints; the right one is first.

    `factors` has a line for each of the two matrices, `like` describes the array that has the result's shape, and
    `transposed` names the matrix that the right product transposes.
    """
    (X, x), (Y, y) = factors.items()
    flips = (transposed == X, transposed == Y)

    def multiply(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        left, right = f"({x}){'.T' * flip_x}", f"({y}){'.T' * flip_y}"
        return f"{right} @ {left}" if swapped else f"{left} @ {right}"

    def mistake(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        if swapped and (flip_x, flip_y) == (not flips[0], not flips[1]):
            return f"the right numbers, transposed: the result must have the shape of {like}"
        hints = ["the factors are swapped"] if swapped else []
        for name, flip, right in ((X, flip_x, flips[0]), (Y, flip_y, flips[1])):
            if flip != right:
                hints.append(f"{name} must be transposed" if right else f"{name} must not be transposed")
        return f"{' and '.join(hints)}: {why}"

    right = (False, *flips)
    others = [form for form in product((False, True), repeat=3) if form != right]
    return [(multiply(*right), ""), *((multiply(*form), mistake(*form)) for form in others)]


class Unusable(Exception):
    """An answer without usable numbers; the message is the hint."""


def grade(exercise: Exercise, answer: Callable) -> bool:
    """Print praise if the answer is right, or else a hint for each wrong result; return whether it is right."""
    both, forms = [data(**sizes) for sizes in exercise.sizes], exercise.forms
    try:
        replies = [run_answer(exercise, answer, d) for d in both]
    except Unusable as hint:
        return print_hint(str(hint))
    tries = [(judged_values(exercise, found, d), d) for (found, _), d in zip(replies, both, strict=True) if found]
    right = {
        name
        for found, d in tries[:1]
        for name in forms
        if same(found[name], compute(forms[name][0][0], d), exercise.tolerance)
    }
    values, problem = replies[0]
    if problem is None and right == forms.keys():
        print(exercise.praise)
        return True
    lines, unknown = [], []
    for name in (name for name in forms if name not in right):
        hints = (explanation(exercise, name, found[name], d) for found, d in tries)
        if said := next(filter(None, hints), ""):
            lines.append(f"{name}: {said}")
        elif name in exercise.unknown and problem is None and tries[0][0][name] is not None:
            lines.append(f"{name}: {exercise.unknown[name].format(**distances(exercise, name, *tries[0]))}")
        else:
            unknown.append(name)
    if problem and (values or not lines):  # a hint about the product makes NumPy's error message redundant
        lines.append(f"({problem})" if lines else problem)
    elif unknown and not problem:
        lines.append(f"{' and '.join(unknown)}: the shape is right, but the values are wrong; write out one entry")
    return print_hint("\n".join(lines))


def run_answer(exercise: Exercise, answer: Callable, d: ExerciseData) -> tuple[dict[str, Any], str | None]:
    """Run the answer; return its results by name, empty if it raised an error, and the problem with their shapes."""
    arguments = [deepcopy(getattr(d, name)) for name in exercise.arguments]
    try:
        got = answer(*arguments)
    except Exception as error:  # a learner's code may raise anything
        return {}, stopped(error)
    for name, value in zip(exercise.arguments, arguments, strict=True):
        if isinstance(value, np.ndarray) and not np.array_equal(value, getattr(d, name)):
            raise Unusable(f"your code changed its argument {name} in place; make a new array")
    if got is None:
        raise Unusable("your function returned None; is the return missing?")
    names = [*exercise.returns]
    if len(names) == 1:
        got = (got,)
    elif not isinstance(got, (tuple, list)) or len(got) != len(names):
        if not exercise.may_lack or not isinstance(got, (tuple, list)) or len(got) != len(names) - 1:
            raise Unusable(f"return {len(names)} arrays, ({', '.join(names)}); you returned {kind_of_value(got)}")
        got = (compute(exercise.forms[names[0]][0][0], d), *got)
    values = dict(zip(names, got, strict=True))
    for name, value in values.items():
        if not is_numbers(value):
            raise Unusable(f"{name} must be numbers, you returned {kind_of_value(value)}")
    shapes = {name: shape(words, d) for name, words in exercise.returns.items()}
    seen = {name: np.shape(value) for name, value in values.items()}
    wrong = next((name for name in names if seen[name] != shapes[name]), None)
    if wrong is None:
        return values, None
    for order in permutations(names):
        if [shapes[name] for name in order] == [*seen.values()]:
            wanted, theirs = ", ".join(names), ", ".join(order)
            raise Unusable(f"swapped? expected ({wanted}), you returned the shapes of ({theirs})")
    expected = exercise.returns[wrong] + (f", here {shapes[wrong]}" if shapes[wrong] else "")
    return values, f"wrong shape: {wrong} must be {expected}; you returned {kind_of_value(values[wrong])}"


def shape(words: str, d: ExerciseData) -> tuple[int, ...]:
    """Return the shape that a text such as "(out, r)" means; for "a number" it is ()."""
    return tuple(getattr(d, name) for name in words[1:-1].split(", ")) if words[0] == "(" else ()


def judged_values(exercise: Exercise, values: Mapping[str, Any], d: ExerciseData) -> dict[str, Any]:
    """Return the quantities that are compared with the formulas: results, or values that are computed from them.

    A quantity is None if it cannot be computed, or if it is complex.
    """
    real = {name: np.real_if_close(value) for name, value in values.items()}
    names = SimpleNamespace(**{**vars(d), **real})
    found = {name: compute(exercise.judged.get(name, name), names) for name in exercise.forms}
    return {name: None if np.iscomplexobj(value) else value for name, value in found.items()}


def explanation(exercise: Exercise, name: str, value: Any, d: ExerciseData) -> str:
    """Return a hint if a value is a known formula times known factors; "" if it is right or unknown."""
    scales, forms = exercise.scales, exercise.forms[name]
    if d.out == d.N:  # equal sizes: a division could be by any of them, and a count could be any other
        scales = [scale for scale in scales if scale not in DIVISIONS]
        forms = forms if np.ndim(value) else ()
    for line, hint in forms:
        form = compute(line, d)
        times = multiple(value, form, exercise.tolerance)
        if times is not None:
            once = same(value, form, exercise.tolerance)
            return "; and ".join(filter(None, (hint, "" if once else known_factors(value, form, d, scales, times))))
    return ""


def known_factors(value: Any, form: Any, d: ExerciseData, scales: Sequence[Hinted], times: float) -> str:
    """Return the hint for a value that is a formula times up to three known factors, or times an unknown number."""
    factors = [(compute(line, d), hint) for line, hint in scales]
    some = [chosen for count in range(1, MAX_FACTORS + 1) for chosen in combinations(factors, count)]
    rows = [
        Wrong(f"{place:04}", "; and ".join(hint for _, hint in chosen), {"": np.prod([f for f, _ in chosen]) * form})
        for place, chosen in enumerate(some)  # the flag is the index: among equals, fewest factors win
    ]
    world = World(
        [d], lambda _, parts: {"": form, **parts}, lambda d, _, parts: allowed(parts[""] if parts else form), rows
    )
    _, found = naming.name(world, [{"": value}])
    if found:
        return found[0].wrongs[0].says
    return f"a wrong factor: yours is {times:.7g} times the right result"


def multiple(value: Any, form: Any, tolerance: float) -> float | None:
    """Return the number that times the formula's value gives `value`, or None if there is none."""
    if value is None or form is None or np.size(form) == 1:  # every number is a multiple of another
        return 1.0 if same(value, form, tolerance) else None
    found = naming.factor(value, form, lambda times: allowed(times * form))
    return found.value if found and found.value else None  # zero is not counted as a multiple


def distances(exercise: Exercise, name: str, values: Mapping[str, Any], d: ExerciseData) -> dict[str, str]:
    """Return the distances of a wrong answer and of the right one from the exercise's aim, as texts for a hint."""
    if not exercise.aim:
        return {}
    aim, right = compute(exercise.aim, d), compute(exercise.forms[name][0][0], d)
    return {"off": f"{np.linalg.norm(values[name] - aim):.3g}", "least": f"{np.linalg.norm(right - aim):.3g}"}


def stopped(error: Exception) -> str:
    """Return a hint that the learner's code raised an error."""
    return f"your code stopped with {type(error).__name__}: {error}"


def is_numbers(value: Any) -> bool:
    """Return whether NumPy can read a value as integers, floats or complex numbers."""
    try:
        return np.asarray(value).dtype.kind in "iufc"
    except Exception:  # ragged lists, tensors that need gradients, and anything else
        return False


def print_hint(hint: str) -> bool:
    """Print a hint, and return False as the grade."""
    print(f"Not yet. {hint}")
    return False


def allowed(expected: Any, tolerance: float = 1e-9) -> Any:
    """Return the rounding error that is allowed in each entry."""
    return 1e-12 + tolerance * np.abs(expected)


def same(value: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two arrays have the same shape and, within the tolerance, the same numbers."""
    if value is None or expected is None:
        return False
    return naming.off(value, expected, allowed(expected, tolerance)) <= 1


def compute(line: str, d: ExerciseData) -> Any:
    """Return the value of a line of NumPy, or None, which equals no answer, if its shapes do not fit."""
    try:
        return eval(compiled_line(line), {"np": np}, vars(d))  # only lines from this package, never an answer
    except ValueError:
        return None


@cache
def compiled_line(line: str) -> CodeType:
    """Return a line as compiled Python code."""
    return compile(line, "<formula>", "eval")


def kind_of_value(value: object) -> str:
    """Return a description of a value, for a hint."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


@cache  # answers get copies
def data(N: int, n_in: int, out: int, r: int) -> ExerciseData:
    """Return random arrays of these sizes. No scale is 1 or equals another, since a missing factor of 1 goes unnoticed.

    The arrays have four decimals, which keeps the page small.
    """
    rng = np.random.default_rng(N)
    shapes: dict[str, tuple[int, ...]] = {"x": (N, n_in), "dy": (N, out), "prediction": (N, out), "target": (N, out)}
    shapes |= {"W": (out, n_in), "A": (r, n_in), "B": (out, r), "S": (N, n_in), "dP": (N, n_in)}
    shapes |= {"V": (out, n_in), "dW": (out, n_in), "m": (out,)}
    d = SimpleNamespace(**{name: rng.standard_normal(sizes).round(4) for name, sizes in shapes.items()})
    d.P = np.exp(d.S) / np.exp(d.S).sum(axis=1, keepdims=True)
    d.alpha, d.rng = 1.3, rng
    d.s = d.alpha / r
    d.h, d.dh = d.x @ d.A.T, d.s * d.dy @ d.B
    d.N, d.T, d.out, d.r, d.rank, d.out_features = N, N, out, r, r, out
    d.n_in = d.U = d.in_features = vars(d)["in"] = n_in
    d.dL_dy, d.change = d.dy, d.W
    d.left, d.singular, d.right = np.linalg.svd(d.W, full_matrices=False)
    return d
