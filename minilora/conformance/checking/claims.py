"""The claims that compare more than the problems' answers: one function each, which returns a verdict.

An implementation may refuse edge cases of the contract, by raising or by returning an array of another shape. That is
no failure, but any answer that it gives must be right. Answers that are already wrong on the problems are not judged
again: `right` has the answers that are right on all of them. A verdict is a text, or the diagnosis of a known mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...report import Diagnosis
from ..naming import World, Wrong, factor, name
from ..problems.bugs import bugs_of, known
from ..problems.formulas import QUANTITIES, RIGHT_FORMULAS, StartFormulas, adam_problem, run_adam
from ..problems.lowprecision import as_bfloat16
from ..problems.plain import DoRAProblem
from ..problems.problem import ROW_ARRAYS, Arrays
from ..problems.tolerance import Trial, drawn, round_to
from .calling import Watch, as_choice, describe_type, forward, reply_to
from .describing import wrong_array
from .kindreport import CANNOT_BE_TOLD, NOT_OFFERED, REFUSED
from .places import error_text, line_of

ClaimVerdict = str | Diagnosis


def _known(bug: Wrong) -> Diagnosis:
    """Return the diagnosis of a known bug."""
    return Diagnosis(bug.says, bug.flag, bug.source)


# --- a new adapter --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """The sizes of a layer whose new adapter is checked."""

    rank: int
    n_in: int
    n_out: int
    kernel: tuple[int, ...]

    def __str__(self) -> str:
        return f"in={self.n_in} out={self.n_out} r={self.rank}"

    @property
    def weight(self) -> np.ndarray:
        """The base's weight, (out, in), which DoRA's start depends on."""
        return np.random.default_rng(1).standard_normal((self.n_out, self.n_in))

    def spread(self, **parts: Any) -> float:
        """Return the standard deviation of A in PEFT's start, or with some of its parts replaced."""
        return StartFormulas(**parts).spread(self.rank, self.n_in, self.n_out, math.prod(self.kernel))

    def fan(self, **parts: Any) -> int:
        """Return the fan that this standard deviation is computed from."""
        return StartFormulas(**parts).fan(self.rank, self.n_in, self.n_out, math.prod(self.kernel))


def new_adapter(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> ClaimVerdict:
    """Check that a new adapter adds nothing, can learn, and has a standard deviation that suits the input's width."""
    sizes, other = (Sizes(*numbers) for numbers in watch.kind.starts)
    new = _initial(watch, sizes)
    if isinstance(new, str):
        return new
    A, B, *magnitude = new
    if not A.any() and not B.any():
        return "both factors start at zero: both gradients are zero, so nothing is ever learned"
    if A.any() and B.any():
        return "neither factor starts at zero: the new adapter changes the output before the first step"
    which, random = ("lora_A", A.reshape(len(A), -1)) if A.any() else ("lora_B", B.reshape(len(B), -1))
    if (rank := np.linalg.matrix_rank(random.astype(np.float64))) < sizes.rank:
        return f"{which} starts with rank {rank}, expected {sizes.rank}: dependent directions may stay dependent"
    once_more = _initial(watch, sizes, seed=1)
    if not isinstance(once_more, str) and all(map(np.array_equal, once_more, new)):
        watch.notes["start"] = "two generators give the same numbers: all adapters of one size start alike"
    if magnitude:
        return _magnitude(magnitude[0], sizes.weight)
    if not A.any() or not watch.kind.spread_follows_fan:
        return "ok"
    if isinstance(again := _initial(watch, other), str):
        return again
    if abs(mean := float(A.mean())) > A.std() / 2:
        return f"A starts with mean {mean:.3g} and standard deviation {A.std():.3g}, expected mean 0"
    return _spread(watch, {sizes: float(A.std()), other: float(again[0].std())})


def _initial(watch: Watch, sizes: Sizes, seed: int = 0) -> list[np.ndarray] | str:
    """Return A, B and, for DoRA, the magnitude of a new adapter, or what is wrong with their shapes."""
    names = watch.kind.init_returns
    arguments: dict[str, Any] = {"in_features": sizes.n_in, "out_features": sizes.n_out, "rank": sizes.rank}
    arguments["rng"] = np.random.default_rng(seed)
    if sizes.kernel:
        arguments["kernel"] = sizes.kernel
    if "magnitude" in names:
        arguments["weight"] = sizes.weight
    returned = watch.call("init", arguments)
    if not isinstance(returned, (tuple, list)) or len(returned) < 2:
        return f"init returns {describe_type(returned)}, expected lora_A and lora_B"
    new = {name: np.asarray(watch.reorient(name, array)) for name, array in zip(names, returned)}  # noqa: B905  DoRA: three
    ones = (1 for _ in sizes.kernel)
    shapes = {"lora_A": (sizes.rank, sizes.n_in, *sizes.kernel), "lora_B": (sizes.n_out, sizes.rank, *ones)}
    for which, shape in shapes.items():
        if new[which].shape != shape:
            return f"{which} starts with shape {new[which].shape}, expected {shape}"
        if not np.isfinite(new[which]).all():
            return f"{which} starts with numbers that are not finite"
    return [*new.values()]


def _spread(watch: Watch, spreads: Mapping[Sizes, float]) -> ClaimVerdict:
    """Check that A's standard deviation suits the input's width, which keeps A x about as large as x."""
    (sizes, spread), (other, second) = spreads.items()
    if all(0.9 < measured * 3**0.5 * at.fan() < 1.1 for at, measured in spreads.items()):
        return f"A starts with standard deviation {spread:.3g}, from 1 / in: PEFT's 1 / sqrt(in) lacks its root"
    world = World(
        cases=[*spreads],
        answers=lambda at, parts: {"spread": np.array(at.spread(**parts))},
        allowed=lambda at, _, parts: 0.1 * at.spread(**parts),
        table=bugs_of(watch.kind.name, ("start",)),
    )
    for gain in (1.0, 6**0.5):  # PEFT's start, he_uniform
        _, found = name(world, [{"spread": np.array(measured / gain)} for measured in spreads.values()])
        for (bug,) in (named.wrongs for named in found):
            says = f"{bug.says} = {sizes.fan(**bug.replaced_in(sizes))}, not fan in = {sizes.fan()}: {spread:.3g}"
            return Diagnosis(says, bug.flag, bug.source)
    if not 1e-3 < spread / sizes.spread() < 50:
        return f"A starts with standard deviation {spread:.3g}; PEFT's is 1 / sqrt(3 in) = {sizes.spread():.3g}"
    if not 0.9 < second / spread * sizes.spread() / other.spread() < 1.1:
        width = "the same at every width" if 0.9 < second / spread < 1.1 else "not set by the input's width"
        said = f"{spread:.3g} at {sizes}, {second:.3g} at {other}: {width}; PEFT's is 1 / sqrt(3 in)"
        watch.notes["spread of A"] = said
    return "ok"


def _magnitude(m: np.ndarray, weight: np.ndarray) -> str:
    n_out, n_in = weight.shape
    if m.size == n_in:
        return f"DoRA's magnitude starts with {n_in} entries, one for each input, expected {n_out}, one for each output"
    if m.size != n_out or not np.allclose(m.ravel(), np.linalg.norm(weight, axis=1)):
        return "DoRA's magnitude does not start as the norm of each row of the weight, so the output changes"
    return "ok"


# --- Adam -----------------------------------------------------------------------------------------


def adam(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> ClaimVerdict:
    """Check ten steps of Adam. The tolerance is float32's if that is declared, or if an array of it is returned."""
    begin, steps = adam_problem()
    params, state = {which: p.copy() for which, p in begin.items()}, None
    for grads in steps:
        moved = watch.functions.step(params, {which: g.copy() for which, g in grads.items()}, state)
        if not isinstance(moved, tuple) or len(moved) != 2:
            return f"step returns {describe_type(moved)}, expected the two params and state"
        params, state = moved
    single = dtype != "float64" or any(np.asarray(p).dtype.itemsize < 8 for p in params.values())
    return adam_verdict(begin, steps, params, 2e-6 if single else 1e-9)


def adam_verdict(begin: Arrays, steps: list[Arrays], ends: Mapping[str, Any], tolerance: float = 1e-9) -> ClaimVerdict:
    """Compare where an implementation's Adam ends with the right end, and with the ends of known bugs."""
    right = run_adam(begin, steps)
    reached = {which: np.asarray(ends[which], np.float64) for which in right}
    for which, p in right.items():
        if reached[which].shape != p.shape:
            return f"{which} has shape {reached[which].shape} after ten steps of Adam, expected {p.shape}"
        if not np.isfinite(reached[which]).all():
            return f"{which} is not finite after ten steps of Adam"

    def flattened(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([arrays[which].ravel() for which in right])

    world = World(
        cases=[begin],
        answers=lambda begin, parts: {"ends": flattened(run_adam(begin, steps, **parts))},
        allowed=lambda *_: tolerance,
        table=bugs_of("adam", ("adam",)),
    )
    wrong, found = name(world, [{"ends": flattened(reached)}])
    if not wrong:
        return "ok"
    if found:
        return _known(found[0].wrongs[0])
    start, change = flattened(begin), flattened(right) - flattened(begin)
    if times := factor(flattened(reached), change, lambda t: tolerance * max(1.0, abs(t)), start):
        return f"Adam's steps are {times.value:.6g} times as long as expected, with lr 1e-3"
    off = {which: np.abs(reached[which] - p) for which, p in right.items()}
    which = max(off, key=lambda which: float(off[which].max()))
    at = np.unravel_index(int(off[which].argmax()), off[which].shape)
    where = f"{which} is {reached[which][at]:.7g} at [{', '.join(map(str, at))}], expected {right[which][at]:.7g}"
    return f"ten steps of Adam (lr 1e-3, betas 0.9 and 0.999, eps 1e-8) give a wrong result: {where}"


# --- the base and a merge -------------------------------------------------------------------------


def frozen_base(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Check that the backward returns no gradient for the frozen base."""
    if "backward" in watch.failed:
        return NOT_OFFERED
    arguments = trial.problem.arguments_of("backward", trial.arrays)
    grads = watch.call("backward", arguments, watch.options("backward", trial.problem))
    extra = sorted(which for which in ("weight", "bias") if grads.get(which) is not None)
    return f"backward returns gradients of the frozen {' and '.join(extra)}" if extra else "ok"


STEPS = (
    ("", "", False),
    ("merge", "after merge", False),
    ("merge", "after a second merge", True),
    ("unmerge", "after unmerge", False),
    ("unmerge", "after a second unmerge", True),
    ("merge", "after unmerge and merge", False),
)
"""The methods to call one after another, the words for each, and whether it may raise, if it then changes nothing."""


def merged_and_back(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Merge and unmerge a stateful layer, and check that its output stays the same after every step."""
    if "y" not in right or not watch.kind.merge_keeps_output:
        return NOT_OFFERED
    layer = watch.build_layer(trial)
    if missing := [which for which in ("forward", "merge") if not callable(getattr(layer, which, None))]:
        return f"merging returns {describe_type(layer)} without {' and '.join(missing)}"
    for step, words, may_be_refused in STEPS:
        if step == "unmerge" and not hasattr(layer, "unmerge"):
            break
        try:
            if step:
                getattr(layer, step)()
        except Exception:
            if not may_be_refused:
                raise
        y = watch.array(layer.forward(trial.arrays["x"].copy()), "y")
        if not trial.agrees("y", y):
            return f"{words} the output {_repeated(y, trial) or wrong_array('y', y, trial)}".lstrip()
    return "ok"


def _repeated(y: np.ndarray, trial: Trial) -> str:
    """Say how many times an output contains the update, if nothing else is wrong with it; empty otherwise."""
    base = trial.answer(update=0.0)["y"]
    times = factor(y, trial.right["y"] - base, lambda t: trial.allowed(trial.sizes["y"] * max(1.0, abs(t))), base)
    return f"contains the update {round(times.value, 6) + 0.0:g} times" if times else ""


def output_dtype(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> ClaimVerdict:
    """Check that a bfloat16 base's output is rounded to bfloat16, unless the implementation declares float32.

    Adding a float32 update to a bfloat16 output promotes it to float32. If the forward returns that, the next layer
    gets a different precision than it would without the adapter.
    """
    if "y" not in right:
        return NOT_OFFERED
    choices = watch.kind.declares["output"]
    declared = as_choice(getattr(watch.functions, "output", choices[0]), choices)
    y = np.asarray(forward(Watch(watch.functions, watch.kind), trial), np.float64)
    if np.array_equal(y, as_bfloat16(y)) == (declared == "bfloat16"):
        return "ok"
    if declared == "bfloat16":
        return _known(known("mixed-the-output-is-float32"))
    return 'the output is rounded to bfloat16, but the implementation declares output = "float32"'


# --- the edge of the contract ---------------------------------------------------------------------

MEMORY_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "in Fortran order": np.asfortranarray,
    "with a stride of two": lambda array: np.repeat(array, 2, axis=-1)[..., ::2],
}
"""Memory layouts other than C order in which arrays may be passed."""


def memory_order(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Check that the memory order of the arguments makes no difference."""
    verdicts = []
    for words, layout in MEMORY_LAYOUTS.items():
        quiet = Watch(watch.functions, watch.kind, layout)
        verdicts.append(_wrong_among(reply_to(quiet, trial), trial, right, f"for arrays {words},"))
        for function in quiet.failed.keys() - watch.failed.keys():
            watch.notes.setdefault("memory order", f"{words} {function} {quiet.first_failure(function)}")
    return max(verdicts, key=lambda verdict: (verdict not in ("ok", REFUSED, CANNOT_BE_TOLD), verdict == "ok"))


def more_axes(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Check that rows may have two axes: pass six rows as two times three."""
    problem = trial.problem.with_two_row_axes()
    if problem is None:
        return NOT_OFFERED
    rows = drawn(problem, dtype, trial.formulas)

    def split(arrays: Arrays) -> Arrays:
        return {which: a.reshape(2, 3, *a.shape[1:]) if which in ROW_ARRAYS else a for which, a in arrays.items()}

    axes = replace(rows, arrays=split(rows.arrays), right=split(rows.right), sizes=split(rows.sizes))
    reply = reply_to(Watch(watch.functions, watch.kind), axes)
    fit = {key: a for key, a in reply.items() if a.shape == axes.right[key].shape and key != "merged"}
    return _wrong_among(fit, axes, right, "for rows with two axes")


def no_rows(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> str:
    """Check that an empty batch gives an empty output, and gradients of zero."""
    empty = replace(trial, arrays={which: a[:0] if which in ROW_ARRAYS else a for which, a in trial.arrays.items()})
    reply = reply_to(Watch(watch.functions, watch.kind), empty)
    reply.pop("merged", None)
    for key, a in ((key, a) for key, a in reply.items() if key in right):
        if a.size if key in ROW_ARRAYS else a.any():  # NaN is not zero either
            said = f"has shape {a.shape}" if key in ROW_ARRAYS else "is not zero"
            return f"for an empty batch {QUANTITIES[key]} {said}"
    return _verdict(reply, right)


def alpha_of_0(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> ClaimVerdict:
    """Check that the update is zero for an alpha of 0, unless the declared scaling does not contain alpha."""
    zero = drawn(replace(trial.problem, alpha=0.0), dtype, trial.formulas)
    reply = reply_to(Watch(watch.functions, watch.kind), zero)
    world = World(
        cases=[zero],
        answers=lambda trial, parts: trial.answer(**parts) if parts else trial.right,
        allowed=lambda trial, key, parts: trial.allowed(trial.size(**parts)[key]),
        table=bugs_of(watch.kind.name, ("alpha of 0",)),
    )
    wrong, found = name(world, [{key: a for key, a in reply.items() if key in right}])
    explained = {key for named in found[:1] for key in named.explains}
    if wrong and wrong == explained:
        return _known(found[0].wrongs[0])
    return _wrong_among(reply, zero, right, "for an alpha of 0")


@dataclass(frozen=True)
class ZeroRow(DoRAProblem):
    """A new DoRA adapter where one row of the weight, and its magnitude, is zero."""

    start: bool = True

    @property
    def full(self) -> Arrays:
        """The weight, whose third row is zero, and the bias."""
        return {**super().full, "weight": super().full["weight"] * (np.arange(self.out_features) != 2)[:, None]}


def row_of_zeros(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> ClaimVerdict:
    """Check that DoRA gives the base's output where a row of the weight is zero; the backward is not checked."""
    if "magnitude" not in trial.arrays or "y" not in right:
        return NOT_OFFERED
    # As lora_B is zero, DoRA's output is that of LoRA.
    base = drawn(ZeroRow(5, 4, 6, 3, seed=22), dtype, RIGHT_FORMULAS)
    lengths = np.linalg.norm(base.arrays["weight"].astype(np.float64), axis=1)
    zeros = replace(base, arrays=base.arrays | {"magnitude": round_to(lengths, dtype)})
    with np.errstate(all="ignore"):  # the verdict reports a 0 / 0
        y = forward(Watch(watch.functions, watch.kind), zeros)
    if y is not None and y.shape == base.right["y"].shape and not np.isfinite(y).all():
        return _known(known("dora-divides-by-the-length-of-a-row-of-zeros"))
    return _wrong_among({} if y is None else {"y": y}, zeros, right, "where a row of the weight is zero")


def _wrong_among(reply: Arrays, trial: Trial, right: Set[str], where: str) -> str:
    """Return the verdict on answers that are right elsewhere: "ok", "refused", "cannot be told", or what is wrong."""
    for key in reply:
        if key in right and not trial.agrees(key, reply[key]):
            return f"{where} {QUANTITIES[key]} {wrong_array(key, reply[key], trial)}"
    return _verdict(reply, right)


def _verdict(reply: Arrays, right: Set[str]) -> str:
    """Return the verdict on answers without a mistake: those that are wrong elsewhere cannot tell."""
    return REFUSED if not reply else CANNOT_BE_TOLD if right.isdisjoint(reply) else "ok"


# --- all of them ----------------------------------------------------------------------------------

Claim = Callable[..., ClaimVerdict]  # of watch, trial, dtype, right
OF_FUNCTIONS: dict[str, tuple[str, Claim]] = {
    "merged and back": ("merging", merged_and_back),
    "start": ("init", new_adapter),
    "adam": ("step", adam),
    "frozen base": ("backward", frozen_base),
}
"""The claims about one function each; if the function is missing, the claim is not offered."""
EDGES: dict[str, Claim] = {
    "memory order": memory_order,
    "more axes": more_axes,
    "no rows": no_rows,
    "alpha of 0": alpha_of_0,
    "row of zeros": row_of_zeros,
    "output dtype": output_dtype,
}
"""The claims about edge cases, judged only for answers that are right elsewhere."""


def judge_claims(watch: Watch, trial: Trial, dtype: str, right: Set[str]) -> dict[str, Diagnosis]:
    """Return the verdicts on the claims about a kind as a whole; `trial` is the first problem's."""
    verdicts: dict[str, ClaimVerdict] = {}
    for claim, (function, judge) in OF_FUNCTIONS.items():
        if claim not in watch.kind.claims:
            continue
        try:
            verdicts[claim] = judge(watch, trial, dtype, right) if watch.offers(function) else NOT_OFFERED
        except (Exception, SystemExit) as error:  # a foreign function may raise anything
            verdicts[claim] = f"{function} raises {error_text(error)}{line_of(error)}"
    verdicts["nothing is changed"] = watch.find_changes() or "ok"
    for claim, edge in EDGES.items():
        if claim in watch.kind.claims:
            verdicts[claim] = edge(watch, trial, dtype, right) if right else NOT_OFFERED
    return {claim: diagnosed(verdict) for claim, verdict in verdicts.items()}


def diagnosed(verdict: ClaimVerdict) -> Diagnosis:
    """Return a verdict as a diagnosis; a plain text gets no flag."""
    return Diagnosis(verdict) if isinstance(verdict, str) else verdict


def habits(watch: Watch, trial: Trial, reply: Arrays) -> dict[str, str]:
    """Return the habits: observations that are useful but no reason to fail."""
    again = reply_to(watch, trial)
    twice = all(np.array_equal(reply[key], again[key], equal_nan=True) for key in reply if key in again)
    others = sorted({str(a.dtype) for a in reply.values()} - {str(trial.arrays["lora_A"].dtype)})
    return {
        "same bits twice": "ok" if twice else "two calls differ",
        "memory order": "ok",
        "dtype kept": f"{', '.join(others)} is returned for {trial.arrays['lora_A'].dtype}" if others else "ok",
        **watch.notes,  # these replace an "ok"
    }
