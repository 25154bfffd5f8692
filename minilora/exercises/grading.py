"""How a grader finds a mistake.

It calls the learner's function with sizes that all differ, so that a wrong product mostly does not fit. Then it calls
it with all sizes equal: there every product fits, and the answer shows which one was taken.

A wrong answer is compared with every order and transposition of the right matrices, and with the mistakes that an
exercise lists, each times any number. If up to three known factors make up that number, `minilora.conformance.naming`
names them. So a wrong product and a wrong factor in front of it are told apart, and both are named. A mistake that
`minilora.conformance.problems.bugs` knows has its sentence.

The formulas are lines of NumPy as text. Python runs them here; on the site docs/_static/numpy.js runs the same lines,
and docs/_static/exercises.js judges as `grade` does.
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

Data: TypeAlias = SimpleNamespace
Hinted: TypeAlias = tuple[str, str]
"""A line that people write, or a factor in front of it, and the hint for that."""
AT_ONCE = 3
"""Wrong factors that are told apart in one answer."""

DIFFERENT = {"N": 11, "n_in": 7, "out": 5, "r": 3}
EQUAL = {"N": 6, "n_in": 6, "out": 6, "r": 6}  # no root of the size is another factor that a mistake brings
WIDE = {"N": 1, "n_in": 640, "out": 300, "r": 80}  # so many entries that their size can be told to 2 %

DIVISIONS: Sequence[Hinted] = [
    ("1 / N", "wrong mean: the division by N is in dy already, so this divides twice"),
    ("1 / out", "a division by out: the mean is in dy already"),
    ("1 / r", "a division by r: only alpha is divided by the rank"),
    ("1 / n_in", "a division by in: nothing here is a mean over inputs"),
]
SIGN: Hinted = ("-1", "the sign is wrong: no step here turns it")
SIZES: Sequence[Hinted] = [
    SIGN,
    ("2", "a factor of 2 too many: it belongs to the loss, and is in dy"),
    *DIVISIONS,
]
NOT_DIVIDED: Hinted = ("r", known("alpha-is-not-divided-by-the-rank").says)
ROOT: Hinted = ("r**0.5", known("alpha-is-divided-by-the-root-of-the-rank").says)
TWICE: Hinted = ("s", f"{known('the-scaling-is-applied-twice').says}: s enters once, in dB and in dh")
SCALES: Sequence[Hinted] = [
    ("1 / s", "alpha/r is missing: y = s h B^T, so what flows back through y gets a factor s = alpha/r"),
    TWICE,
    NOT_DIVIDED,
    ROOT,
    *SIZES,
]


@dataclass(frozen=True)
class Exercise:
    """A function to write: its arguments and results, and each formula that people write, the right one first."""

    arguments: tuple[str, ...]
    returns: Mapping[str, str]  # each result with its shape in words
    forms: Mapping[str, Sequence[Hinted]]  # by what is judged
    praise: str
    scales: Sequence[Hinted] = ()  # wrong factors in front of any form
    judged: Mapping[str, str] = field(default_factory=dict)  # the line that makes it, where it is no result as it is
    unknown: Mapping[str, str] = field(default_factory=dict)  # what is said to a wrong answer that is no known one
    aim: str = ""  # a wrong answer is told how far from this the judged one is, and how far the right one
    may_lack: str = ""  # the first result, where an answer without it will do
    also: tuple[str, ...] = ()  # what the site's page gives beside the arguments
    tolerance: float = 1e-9
    sizes: Sequence[Mapping[str, int]] = (DIFFERENT, EQUAL)


def product_forms(factors: Mapping[str, str], like: str, why: str, transposed: str = "") -> list[Hinted]:
    """Return every product of two matrices, in both orders, each transposed or not; the right one first.

    With each comes what is wrong with it. `factors` has a line for each of the two, `like` is the array that has the
    result's shape, and `transposed` is which of the two the right product transposes.
    """
    (X, x), (Y, y) = factors.items()
    turned = (transposed == X, transposed == Y)

    def multiply(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        left, right = f"({x}){'.T' * flip_x}", f"({y}){'.T' * flip_y}"
        return f"{right} @ {left}" if swapped else f"{left} @ {right}"

    def mistake(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        if swapped and (flip_x, flip_y) == (not turned[0], not turned[1]):
            return f"the right numbers, transposed: the result must have the shape of {like}"
        hints = ["swapped factors"] if swapped else []
        for name, flip, right in ((X, flip_x, turned[0]), (Y, flip_y, turned[1])):
            if flip != right:
                hints.append(f"a missing transpose, of {name}" if right else f"a transpose too many, of {name}")
        return f"{' and '.join(hints)}: {why}"

    right = (False, *turned)
    others = [form for form in product((False, True), repeat=3) if form != right]
    return [(multiply(*right), ""), *((multiply(*form), mistake(*form)) for form in others)]


class Unusable(Exception):
    """An answer that has no numbers to look at; the text is the hint."""


def grade(exercise: Exercise, answer: Callable) -> bool:
    """Print the praise where the answer is right, or a hint for each wrong result; return which it was."""
    both, forms = [data(**sizes) for sizes in exercise.sizes], exercise.forms
    try:
        replies = [called(exercise, answer, d) for d in both]
    except Unusable as hint:
        return say(str(hint))
    tries = [(judged(exercise, found, d), d) for (found, _), d in zip(replies, both, strict=True) if found]
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
        hints = (explained(exercise, name, found[name], d) for found, d in tries)
        if said := next(filter(None, hints), ""):
            lines.append(f"{name}: {said}")
        elif name in exercise.unknown and problem is None and tries[0][0][name] is not None:
            lines.append(f"{name}: {exercise.unknown[name].format(**distances(exercise, name, *tries[0]))}")
        else:
            unknown.append(name)
    if problem and (values or not lines):  # where a hint says what does not fit, NumPy's words for it add nothing
        lines.append(f"({problem})" if lines else problem)
    elif unknown and not problem:
        lines.append(f"{' and '.join(unknown)}: the right shape, the wrong values; write out an entry")
    return say("\n".join(lines))


def called(exercise: Exercise, answer: Callable, d: Data) -> tuple[dict[str, Any], str | None]:
    """Call the answer; return what it gave by its names, none where it stopped, and what is wrong with the shapes."""
    arguments = [deepcopy(getattr(d, name)) for name in exercise.arguments]
    try:
        got = answer(*arguments)
    except Exception as error:  # whatever a learner's code may raise
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
            asked, theirs = ", ".join(names), ", ".join(order)
            raise Unusable(f"swapped? ({asked}) is asked; you returned the shapes of ({theirs})")
    must = exercise.returns[wrong] + (f", here {shapes[wrong]}" if shapes[wrong] else "")
    return values, f"wrong shape: {wrong} must be {must}; you returned {kind_of_value(values[wrong])}"


def shape(words: str, d: Data) -> tuple[int, ...]:
    """Return the shape that "(out, r)" means, () of "a number"."""
    return tuple(getattr(d, name) for name in words[1:-1].split(", ")) if words[0] == "(" else ()


def judged(exercise: Exercise, values: Mapping[str, Any], d: Data) -> dict[str, Any]:
    """Return what is held against the formulas: the results, or what the exercise makes of them; None where it cannot.

    A complex number is nothing that can be right.
    """
    real = {name: np.real_if_close(value) for name, value in values.items()}
    names = SimpleNamespace(**{**vars(d), **real})
    found = {name: compute(exercise.judged.get(name, name), names) for name in exercise.forms}
    return {name: None if np.iscomplexobj(value) else value for name, value in found.items()}


def explained(exercise: Exercise, name: str, value: Any, d: Data) -> str:
    """Say which form times which factors a value is; "" where it is none of them, or right."""
    scales, forms = exercise.scales, exercise.forms[name]
    if d.out == d.N:  # all sizes are equal: a division by one of them could be by any, and a count that of any others
        scales = [scale for scale in scales if scale not in DIVISIONS]
        forms = forms if np.ndim(value) else ()
    for line, hint in forms:
        form = compute(line, d)
        times = multiple(value, form, exercise.tolerance)
        if times is not None:
            once = same(value, form, exercise.tolerance)
            return "; and ".join(filter(None, (hint, "" if once else known_factors(value, form, d, scales, times))))
    return ""


def known_factors(value: Any, form: Any, d: Data, scales: Sequence[Hinted], times: float) -> str:
    """Say which of the factors, up to three, make a value of a form, or how many times the form it is."""
    factors = [(compute(line, d), hint) for line, hint in scales]
    some = [chosen for count in range(1, AT_ONCE + 1) for chosen in combinations(factors, count)]
    rows = [
        Wrong(f"{place:04}", "; and ".join(hint for _, hint in chosen), {"": np.prod([f for f, _ in chosen]) * form})
        for place, chosen in enumerate(some)  # a row's flag is its place: of equals that of the fewest factors is named
    ]
    world = World(
        [d], lambda _, parts: {"": form, **parts}, lambda d, _, parts: allowed(parts[""] if parts else form), rows
    )
    _, found = naming.name(world, [{"": value}])
    if found:
        return found[0].wrongs[0].says
    return f"a wrong factor in front: yours is {times:.7g} times what it should be"


def multiple(value: Any, form: Any, tolerance: float) -> float | None:
    """Return by which number a form must be multiplied to give a value; None where no number does."""
    if value is None or form is None or np.size(form) == 1:  # any number is a multiple of another
        return 1.0 if same(value, form, tolerance) else None
    found = naming.factor(value, form, lambda times: allowed(times * form))
    return found.value if found and found.value else None  # nothing at all is no multiple


def distances(exercise: Exercise, name: str, values: Mapping[str, Any], d: Data) -> dict[str, str]:
    """Return how far a wrong answer is from the exercise's aim, and how far the right one is."""
    if not exercise.aim:
        return {}
    aim, right = compute(exercise.aim, d), compute(exercise.forms[name][0][0], d)
    return {"off": f"{np.linalg.norm(values[name] - aim):.3g}", "least": f"{np.linalg.norm(right - aim):.3g}"}


def stopped(error: Exception) -> str:
    """Say that a function raised an error."""
    return f"your code stopped with {type(error).__name__}: {error}"


def is_numbers(value: Any) -> bool:
    """Return whether NumPy takes a value for numbers."""
    try:
        return np.asarray(value).dtype.kind in "iufc"
    except Exception:  # a list of lists of several lengths, a tensor that needs gradients, and whatever else there is
        return False


def say(hint: str) -> bool:
    """Print a hint; return False, which is the grade."""
    print(f"Not yet. {hint}")
    return False


def allowed(expected: Any, tolerance: float = 1e-9) -> Any:
    """Return how far each entry may be off: rounding."""
    return 1e-12 + tolerance * np.abs(expected)


def same(value: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two arrays have one shape and, up to the tolerance, the same numbers."""
    if value is None or expected is None:
        return False
    return naming.off(value, expected, allowed(expected, tolerance)) <= 1


def compute(line: str, d: Data) -> Any:
    """Return what a line of NumPy gives, or None, which equals no answer, where its shapes do not fit."""
    try:
        return eval(compiled(line), {"np": np}, vars(d))  # a line of our own tables, never an answer
    except ValueError:
        return None


@cache
def compiled(line: str) -> CodeType:
    """Return a line as Python runs it."""
    return compile(line, "<formula>", "eval")


def kind_of_value(value: object) -> str:
    """Return what a value is, for a hint."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


@cache  # an answer gets copies
def data(N: int, n_in: int, out: int, r: int) -> Data:
    """Return random arrays of these sizes. No scale is 1 or another size: a missing factor of 1 cannot be seen.

    They have four decimals, so that a page can hold them.
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
