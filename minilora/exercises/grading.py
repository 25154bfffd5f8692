"""How a grader finds a mistake.

It calls the learner's function with sizes that all differ, so that a wrong product mostly does not fit. Then it calls
it with all sizes equal: there every product fits, and the answer shows which one was taken.

A wrong answer is compared with every order and transposition of the right matrices, and with the mistakes that a grader
lists, each times any number. If up to three known factors make up that number, `minilora.conformance.naming` names
them. So a wrong product and a wrong factor in front of it are told apart, and both are named. A mistake that
`minilora.conformance.problems.bugs` knows has its sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import combinations, permutations, product
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np

from ..conformance import naming
from ..conformance.naming import World, Wrong
from ..conformance.problems.bugs import known

Data: TypeAlias = SimpleNamespace
Formula: TypeAlias = Callable[[Data], Any]
Hinted: TypeAlias = tuple[Formula, str]
"""What people write, or a factor in front of it, and the hint for that."""
AT_ONCE = 3
"""Wrong factors that are told apart in one answer."""

DIFFERENT = {"N": 11, "n_in": 7, "out": 5, "r": 3}
EQUAL = {"N": 6, "n_in": 6, "out": 6, "r": 6}  # no root of the size is another factor that a mistake brings

DIVISIONS: Sequence[Hinted] = [
    (lambda d: 1 / d.N, "wrong mean: the division by N is in dy already, so this divides twice"),
    (lambda d: 1 / d.out, "a division by out: the mean is in dy already"),
    (lambda d: 1 / d.r, "a division by r: only alpha is divided by the rank"),
    (lambda d: 1 / d.n_in, "a division by in: nothing here is a mean over inputs"),
]
SIGN: Hinted = (lambda d: -1, "the sign is wrong: no step here turns it")
SIZES: Sequence[Hinted] = [
    SIGN,
    (lambda d: 2, "a factor of 2 too many: it belongs to the loss, and is in dy"),
    *DIVISIONS,
]
NOT_DIVIDED: Hinted = (lambda d: d.r, known("alpha-is-not-divided-by-the-rank").says)
ROOT: Hinted = (lambda d: d.r**0.5, known("alpha-is-divided-by-the-root-of-the-rank").says)
TWICE: Hinted = (lambda d: d.s, f"{known('the-scaling-is-applied-twice').says}: s enters once, in dB and in dh")
SCALES: Sequence[Hinted] = [
    (lambda d: 1 / d.s, "alpha/r is missing: y = s h B^T, so what flows back through y gets a factor s = alpha/r"),
    TWICE,
    NOT_DIVIDED,
    ROOT,
    *SIZES,
]


def product_forms(
    one: tuple[str, Formula], two: tuple[str, Formula], *, transposed: tuple[bool, bool], like: str, why: str
) -> list[Hinted]:
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


class Unusable(Exception):
    """An answer that has no numbers to look at; the text is the hint."""


def grade(
    answer: Formula,
    forms: Mapping[str, Sequence[Hinted]],
    factors: Sequence[Hinted],
    praise: str,
    beside: Formula = lambda d: 0,
) -> bool:
    """Print the praise where the answer is right, or a hint for each wrong result; return which it was.

    `forms` has for each result the right formula and the wrong ones with their hints, and `factors` the wrong factors
    in front. `beside` is what the answer has beside each of them.
    """
    both = data(**DIFFERENT), data(**EQUAL)
    try:
        replies = [called(answer, d, {result: np.shape(own[0][0](d)) for result, own in forms.items()}) for d in both]
    except Unusable as hint:
        return say(str(hint))
    tries = [
        ({result: _less(value, beside(d)) for result, value in found.items()}, d)
        for (found, _), d in zip(replies, both, strict=True)
        if found
    ]
    right = {result for result, own in forms.items() for found, d in tries[:1] if same(found[result], own[0][0](d))}
    values, problem = replies[0]
    if problem is None and right == forms.keys():
        print(praise)
        return True
    lines, unknown = [], []
    for result in (result for result in forms if result not in right):
        hints = (explained(found[result], d, forms[result], factors) for found, d in tries)
        if said := next(filter(None, hints), ""):
            lines.append(f"{result}: {said}")
        else:
            unknown.append(result)
    if problem and (values or not lines):  # where a hint says what does not fit, NumPy's words for it add nothing
        lines.append(f"({problem})" if lines else problem)
    elif unknown:
        is_count = np.ndim(forms[unknown[0]][0][0](both[0])) == 0
        count, entry = "write down the shapes of A and B", "the right shape, the wrong values; write out an entry"
        lines.append(f"{' and '.join(unknown)}: {count if is_count else entry}")
    return say("\n".join(lines))


def explained(value: Any, d: Data, forms: Sequence[Hinted], factors: Sequence[Hinted]) -> str:
    """Say which form times which factors a value is; "" where it is none of them, or right."""
    if d.out == d.N:  # all sizes are equal: a division by one of them could be by any, and a count that of any others
        factors = [factor for factor in factors if factor not in DIVISIONS]
        forms = forms if np.ndim(value) else ()
    for formula, hint in forms:
        form = value_or_none(formula, d)
        times = multiple(value, form)
        if times is not None:
            return "; and ".join(filter(None, (hint, known_factors(value, form, d, factors, times))))
    return ""


def known_factors(value: Any, form: Any, d: Data, factors: Sequence[Hinted], times: float) -> str:
    """Say which of the factors, up to three, make a value of a form, or how many times the form it is; "" for once."""
    some = [chosen for count in range(1, AT_ONCE + 1) for chosen in combinations(factors, count)]
    rows = [
        Wrong(f"{place:04}", "; and ".join(hint for _, hint in chosen), {"": np.prod([f(d) for f, _ in chosen]) * form})
        for place, chosen in enumerate(some)  # a row's flag is its place: of equals that of the fewest factors is named
    ]
    world = World(
        [d], lambda _, parts: {"": form, **parts}, lambda d, _, parts: allowed(parts[""] if parts else form), rows
    )
    wrong, found = naming.name(world, [{"": value}])
    if found:
        return found[0].wrongs[0].says
    return f"a wrong factor in front: yours is {times:.7g} times what it should be" if wrong else ""


def multiple(value: Any, form: Any) -> float | None:
    """Return by which number a form must be multiplied to give a value; None where no number does."""
    if value is None or form is None or np.size(form) == 1:  # any number is a multiple of another
        return 1.0 if same(value, form) else None
    found = naming.factor(value, form, lambda times: allowed(times * form))
    return found.value if found and found.value else None  # nothing at all is no multiple


def called(answer: Formula, d: Data, shapes: Mapping[str, tuple]) -> tuple[dict[str, Any], str | None]:
    """Call the answer; return what it gave by its names, none where it stopped, and what is wrong with the shapes."""
    arguments = deepcopy(d)
    try:
        got = answer(arguments)
    except Exception as error:  # whatever a learner's code may raise
        return {}, stopped(error)
    changed = [name for name, value in vars(d).items() if not np.array_equal(getattr(arguments, name), value)]
    if changed:
        raise Unusable(f"your code changed its argument {changed[0]} in place; make a new array")
    if got is None:
        raise Unusable("your function returned None; is the return missing?")
    if len(shapes) == 1:
        got = (got,)
    elif not isinstance(got, (tuple, list)) or len(got) != len(shapes):
        raise Unusable(f"return {len(shapes)} arrays, ({', '.join(shapes)}); you returned {kind_of_value(got)}")
    values = dict(zip(shapes, got, strict=True))
    for result, value in values.items():
        if not is_numbers(value):
            raise Unusable(f"{result} must be numbers, you returned {kind_of_value(value)}")
    seen = {result: np.shape(value) for result, value in values.items()}
    wrong = next((result for result in shapes if seen[result] != shapes[result]), None)
    if wrong is None:
        return values, None
    for order in permutations(shapes):
        if [shapes[result] for result in order] == [*seen.values()]:
            asked, theirs = ", ".join(shapes), ", ".join(order)
            raise Unusable(f"swapped? ({asked}) is asked; you returned the shapes of ({theirs})")
    return values, f"wrong shape: {wrong} must be {shapes[wrong]}, you returned {kind_of_value(values[wrong])}"


def stopped(error: Exception) -> str:
    """Say that a function raised an error."""
    return f"your code stopped with {type(error).__name__}: {error}"


def is_numbers(value: Any) -> bool:
    """Return whether NumPy takes a value for numbers."""
    try:
        return np.asarray(value).dtype.kind in "iufc"
    except Exception:  # a list of lists of several lengths, a tensor that needs gradients, and whatever else there is
        return False


def _less(value: Any, beside: Any) -> Any:
    """Return a value without what is beside it; None where it has another shape, or is no real number."""
    real = np.real_if_close(value)
    try:
        return None if np.iscomplexobj(real) else real - beside
    except ValueError:
        return None


def say(hint: str) -> bool:
    """Print a hint; return False, which is the grade."""
    print(f"Not yet. {hint}")
    return False


def allowed(expected: Any) -> Any:
    """Return how far each entry may be off: rounding."""
    return 1e-12 + 1e-9 * np.abs(expected)


def same(value: Any, expected: Any) -> bool:
    """Return whether two arrays have one shape and, up to rounding, the same numbers."""
    return value is not None and expected is not None and naming.off(value, expected, allowed(expected)) <= 1


def value_or_none(formula: Formula, d: Data) -> Any:
    """Return what the formula gives, or None, which equals no answer, where its shapes do not fit."""
    try:
        return formula(d)
    except ValueError:
        return None


def kind_of_value(value: object) -> str:
    """Return what a value is, for a hint."""
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}"
    return f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"


def data(N: int, n_in: int, out: int, r: int) -> Data:
    """Return random arrays of these sizes. No scale is 1 or another size: a missing factor of 1 cannot be seen."""
    rng = np.random.default_rng(N)
    shapes: dict[str, tuple[int, ...]] = {"x": (N, n_in), "h": (N, r), "dh": (N, r)}
    shapes |= {"dy": (N, out), "p": (N, out), "t": (N, out), "W": (out, n_in), "A": (r, n_in), "B": (out, r)}
    shapes |= {"S": (N, n_in), "dP": (N, n_in), "V": (out, n_in), "dW": (out, n_in), "m": (out,)}
    arrays = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    exponentials = np.exp(arrays.pop("S"))
    arrays["P"] = exponentials / exponentials.sum(axis=1, keepdims=True)
    alpha = 1.3
    return SimpleNamespace(**arrays, N=N, n_in=n_in, out=out, r=r, alpha=alpha, s=alpha / r)
