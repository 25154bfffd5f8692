"""How a grader finds a mistake.

It calls the learner's function with sizes that all differ, so that a wrong product mostly does not fit. Then it calls
it with all sizes equal: there every product fits, and the answer shows which one was taken. A wrong answer is compared
with every order and transposition of the right factors, and with the mistakes that a grader lists, each times any
number. So a wrong product and a wrong factor in front of it are told apart, and both are named. A mistake that
`minilora.conformance.problems.bugs` knows has its sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations, permutations, product
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from ..conformance.problems.bugs import known

Data: TypeAlias = SimpleNamespace
Formula: TypeAlias = Callable[[Data], Any]
Mistake: TypeAlias = tuple[Formula, str]
Mistakes: TypeAlias = Sequence[Mistake]

DIFFERENT = {"N": 11, "n_in": 7, "out": 5, "r": 3}
EQUAL = {"N": 6, "n_in": 6, "out": 6, "r": 6}  # no root of the size is another factor that a mistake brings

DIVISIONS: Mistakes = [
    (lambda d: 1 / d.N, "wrong mean: the division by N is in dy already, so this divides twice"),
    (lambda d: 1 / d.out, "a division by out: the mean is in dy already"),
    (lambda d: 1 / d.r, "a division by r: only alpha is divided by the rank"),
    (lambda d: 1 / d.n_in, "a division by in: nothing here is a mean over inputs"),
]
SIGN: Mistake = (lambda d: -1, "the sign is wrong: no step here turns it")
SIZES: Mistakes = [
    SIGN,
    (lambda d: 2, "a factor of 2 too many: it belongs to the loss, and is in dy"),
    *DIVISIONS,
]
NOT_DIVIDED: Mistake = (lambda d: d.r, known("alpha-is-not-divided-by-the-rank").says)
ROOT: Mistake = (lambda d: d.r**0.5, known("alpha-is-divided-by-the-root-of-the-rank").says)
TWICE: Mistake = (lambda d: d.s, f"{known('the-scaling-is-applied-twice').says}: s enters once, in dB and in dh")
SCALES: Mistakes = [
    (lambda d: 1 / d.s, "alpha/r is missing: y = s h B^T, so what flows back through y gets a factor s = alpha/r"),
    TWICE,
    NOT_DIVIDED,
    ROOT,
    *SIZES,
]


def product_forms(
    one: tuple[str, Formula], two: tuple[str, Formula], *, transposed: tuple[bool, bool], like: str, why: str
) -> list[tuple[Formula, str]]:
    """Return every product of two matrices, in both orders, each transposed or not; the right one first.

    With each comes what is wrong with it. `transposed` says which of the two the right product transposes, `like`
    which array has the result's shape.
    """
    (X, x), (Y, y) = one, two

    def multiply(swapped: bool, flip_x: bool, flip_y: bool) -> Formula:
        def formula(d: Data) -> Any:
            left, right = x(d).T if flip_x else x(d), y(d).T if flip_y else y(d)
            return right @ left if swapped else left @ right

        return formula

    def mistake(swapped: bool, flip_x: bool, flip_y: bool) -> str:
        if swapped and (flip_x, flip_y) == (not transposed[0], not transposed[1]):
            return f"the right numbers, transposed: the result must have the shape of {like}"
        hints = ["swapped factors"] if swapped else []
        for name, flip, right in ((X, flip_x, transposed[0]), (Y, flip_y, transposed[1])):
            if flip != right:
                hints.append(f"a missing transpose, of {name}" if right else f"a transpose too many, of {name}")
        return f"{' and '.join(hints)}: {why}"

    right = (False, *transposed)
    others = [form for form in product((False, True), repeat=3) if form != right]
    return [(multiply(*right), ""), *((multiply(*form), mistake(*form)) for form in others)]


def grade(
    answer: Formula,
    forms: Mapping[str, Mistakes],
    scales: Mistakes,
    praise: str,
    prepare: Callable[[Any, Data], Any] = lambda got, d: got,
) -> bool:
    """Print the praise where the answer is right, or a hint for each wrong result; return which it was.

    `forms` has for each result the right formula and the wrong ones with their hints, and `scales` the wrong factors in
    front. `prepare` takes from a result what is the same in all of them.
    """
    different, equal = data(**DIFFERENT), data(**EQUAL)
    rights = {name: known[0][0] for name, known in forms.items()}
    tries = []
    for d in (different, equal):
        got, problem, stop = call_answer(answer, d, {name: np.shape(right(d)) for name, right in rights.items()})
        if stop:
            return say(stop)
        tries.append(({name: _prepared(value, d, prepare) for name, value in got.items()}, problem))
    (values, problem), (again, _) = tries
    right = {name for name, formula in rights.items() if same(values.get(name), formula(different))}
    if problem is None and right == rights.keys():
        print(praise)
        return True
    if not values:  # it stopped on sizes that differ, so what it gave on equal ones is all there is
        right = {name for name, formula in rights.items() if same(again.get(name), formula(equal))}
    hints = {}
    for name in rights.keys() - right:
        hint = _identify(values.get(name), different, forms[name], scales)
        if not hint and np.shape(rights[name](equal)) != ():  # where all sizes are equal, many wrong counts are, too
            hint = _identify(again.get(name), equal, forms[name], scales)
        if hint:
            hints[name] = hint
    lines = [f"{name}: {hints[name]}" for name in rights if name in hints]
    if problem and (values or not lines):  # where a hint says what does not fit, NumPy's words for it add nothing
        lines.append(f"({problem})" if lines else problem)
    elif unknown := [name for name in rights if name not in right and name not in hints]:
        scalar = np.shape((values or again)[unknown[0]]) == ()
        advice = (
            "write down the shapes of A and B" if scalar else "the right shape, the wrong values; write out an entry"
        )
        lines.append(f"{' and '.join(unknown)}: {advice}")
    return say("\n".join(lines))


def _identify(value: Any, d: Data, forms: Mistakes, scales: Mistakes) -> str:
    """Say which form times which factors a value is; "" where it is none of them."""
    for formula, hint in forms:
        ratio = _ratio(value, value_or_none(formula, d))
        if ratio is None or (ratio == 1 and not hint):
            continue
        return "; and ".join(part for part in (hint, _factors(ratio, d, scales)) if part)
    return ""


def _factors(ratio: float, d: Data, scales: Mistakes) -> str:
    """Say which wrong factors, of those known up to three, make up a ratio."""
    if ratio == 1:
        return ""
    if d.out == d.N:  # all sizes are equal: a division by one of them could be by any
        scales = [scale for scale in scales if scale not in DIVISIONS]
    for some in (some for count in (1, 2, 3) for some in combinations(scales, count)):
        if np.isclose(np.prod([scale(d) for scale, _ in some]), ratio, rtol=1e-9):
            return "; and ".join(hint for _, hint in some)
    return f"a wrong factor in front: yours is {ratio:.7g} times what it should be"


def _ratio(value: Any, other: Any) -> float | None:
    """Return by which number `other` must be multiplied to give `value`, 1 exactly where it is the same; or None."""
    if other is None or value is None or np.shape(value) != np.shape(other):
        return None
    if same(value, other):
        return 1.0
    scale = np.vdot(other, other)
    if np.size(other) == 1 or scale == 0:
        return None
    ratio = float(np.vdot(other, value) / scale)
    return ratio if ratio and np.allclose(value, ratio * np.asarray(other), rtol=1e-9, atol=1e-12) else None


def call_answer(
    answer: Formula, d: Data, shapes: dict[str, tuple]
) -> tuple[dict[str, np.ndarray], str | None, str | None]:
    """Call the answer; return the arrays it gave, what is wrong with their shapes, and what ends the grading."""
    arguments = deepcopy(d)
    try:
        got = answer(arguments)
    except Exception as error:  # whatever a learner's code may raise
        return {}, f"your code stopped with {type(error).__name__}: {error}", None
    changed = [name for name, value in vars(d).items() if not np.array_equal(getattr(arguments, name), value)]
    if changed:
        return {}, None, f"your code changed its argument {changed[0]} in place; make a new array"
    if got is None:
        return {}, None, "your function returned None; is the return missing?"
    if len(shapes) == 1:
        got = (got,)
    elif not isinstance(got, (tuple, list)) or len(got) != len(shapes):
        return {}, None, f"return {len(shapes)} arrays, ({', '.join(shapes)}); you returned {describe(got)}"
    arrays = dict(zip(shapes, got, strict=True))
    for name, value in arrays.items():
        if not is_numbers(value):
            return {}, None, f"{name} must be numbers, you returned {describe(value)}"
    wrong = [name for name, value in arrays.items() if np.shape(value) != shapes[name]]
    if wrong:
        seen = [np.shape(value) for value in got]
        orders = [order for order in permutations(shapes) if [shapes[name] for name in order] == seen]
        if orders:
            order, theirs = ", ".join(shapes), ", ".join(orders[0])
            return {}, None, f"swapped? ({order}) is asked; you returned the shapes of ({theirs})"
        shape, value = shapes[wrong[0]], arrays[wrong[0]]
        return arrays, f"wrong shape: {wrong[0]} must be {shape}, you returned {describe(value)}", None
    return arrays, None, None


def is_numbers(value: Any) -> bool:
    """Return whether NumPy takes a value for numbers."""
    try:
        return np.issubdtype(np.asarray(value).dtype, np.number)
    except ValueError:  # a list of lists of several lengths
        return False


def _prepared(value: Any, d: Data, prepare: Callable[[Any, Data], Any]) -> Any:
    try:
        return prepare(np.asarray(value), d)
    except ValueError:  # a shape that does not fit
        return None


def say(hint: str) -> bool:
    """Print a hint; return False, which is the grade."""
    print(f"Not yet. {hint}")
    return False


def same(value: Any, other: Any) -> bool:
    """Return whether two arrays have one shape and, up to rounding, the same numbers."""
    return value is not None and np.shape(value) == np.shape(other) and np.allclose(value, other, rtol=1e-9, atol=1e-12)


def value_or_none(formula: Formula, d: Data) -> Any:
    """Return what the formula gives, or None, which equals no answer, where its shapes do not fit."""
    try:
        return formula(d)
    except ValueError:
        return None


def describe(value: object) -> str:
    """Return what a value is, for a hint."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


def data(N: int, n_in: int, out: int, r: int) -> Data:
    """Return random arrays of these sizes. No scale is 1 or another size: a missing factor of 1 cannot be seen."""
    rng = np.random.default_rng(N)
    shapes: dict[str, tuple[int, ...]] = {
        "x": (N, n_in),
        "h": (N, r),
        "dh": (N, r),
        "dy": (N, out),
        "p": (N, out),
        "t": (N, out),
    }
    shapes |= {"W": (out, n_in), "A": (r, n_in), "B": (out, r)}
    shapes |= {"S": (N, n_in), "dP": (N, n_in), "V": (out, n_in), "dW": (out, n_in), "m": (out,)}
    arrays = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    exponentials = np.exp(arrays.pop("S"))
    arrays["P"] = exponentials / exponentials.sum(axis=1, keepdims=True)
    alpha = 1.3
    return SimpleNamespace(**arrays, N=N, n_in=n_in, out=out, r=r, alpha=alpha, s=alpha / r)
