"""A test that passes on wrong code proves nothing: each of these bugs must be caught by the properties themselves.

`support/algebra.py` makes every small mistake in every function that a layer's forward, backward and merge run, in the
losses, in Adam and in the sums of adapters; `support/mutants.py` has bugs that are no mistake of algebra, and
`support/sometimes.py` those that only some shapes show.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from types import FunctionType

import numpy as np
import pytest
from hypothesis import Phase, given, settings

from minilora import Adam, adapt, best_of_rank, cross_entropy, gradcheck, merge, mse, weighted_sum
from minilora.fast import residual_form
from minilora.layers.router import balance
from minilora.variants.scaling import scaling

from .support import mutants
from .support.algebra import Mistake, functions, mistakes, place_of, reached
from .support.cases import CASES, lora_case
from .support.claims import (
    ADAM_CLAIMS,
    MSE_CLAIMS,
    adapted_begins_as_its_base,
    balance_is_the_sum_written_out,
    cross_entropy_is_the_mean_over_what_counts,
    merging_changes_no_output,
    rslora_divides_by_the_root,
    sums_are_exact,
    the_best_rank_leaves_the_discarded_values,
)
from .support.compare import gradients_are_the_slope_of_mse
from .support.formulas import AdamByFormulas
from .support.language_cases import attention_case, extended_by_its_past_is_the_whole
from .support.mutants import HIDDEN_AT_THE_START, MUTANTS
from .support.problems import SQUARE, Problem, problems
from .support.replaced import BUGS
from .support.sample import one_in
from .support.search import BY_DEFAULT, FAMILIES
from .support.sometimes import SOMETIMES


def rejected(claims, problem) -> bool:
    for claim in claims:
        try:
            claim(problem)
        except Exception:  # an assertion, or a shape that does not fit: either is a rejection
            return True
    return False


@cache
def ten_problems() -> list[Problem]:
    """Ten examples, as the property tests draw them, and the same ones for every mutant."""
    drawn = []

    @settings(max_examples=10, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(problem=problems())
    def draw(problem):
        drawn.append(problem)

    draw()
    assert len(drawn) <= 10
    return drawn


# --- mistakes of algebra --------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Code to be spoiled: what runs it, and what is claimed of it."""

    run: Callable[[Problem], object]
    claims: tuple[Callable[[Problem], None], ...]


def of_case(case) -> Subject:
    def run(problem):
        layer, x = case.build(problem, case.params(problem)), case.input(problem)
        y, cache = layer.forward(x)
        layer.backward(y, cache)
        merge(layer)

    more = (merging_changes_no_output,) if case in MERGED else ()
    return Subject(run, tuple(partial(claim, case) for claim in (*case.claims, *more)))


def of_claims(*claims, of) -> Subject:
    bound = tuple(partial(claim, of) for claim in claims)
    return Subject(lambda problem: [claim(problem) for claim in bound], bound)


MERGED = [case for case in CASES if case.name != "LoRALinear, dropout"]
"""What gives the same output merged: a mask is of one step."""
ATTENTIONS = [attention_case(row) for row in ("Attention", "Attention, by blocks")]
SUBJECTS = [
    *(of_claims(extended_by_its_past_is_the_whole, of=case) for case in ATTENTIONS),
    of_claims(*MSE_CLAIMS, of=mse),
    of_claims(cross_entropy_is_the_mean_over_what_counts, of=cross_entropy),
    of_claims(balance_is_the_sum_written_out, of=balance),
    of_claims(*ADAM_CLAIMS, of=Adam),
    of_claims(gradients_are_the_slope_of_mse, of=residual_form),
    of_claims(rslora_divides_by_the_root, of=scaling),
    of_claims(sums_are_exact, of=weighted_sum),
    of_claims(the_best_rank_leaves_the_discarded_values, of=best_of_rank),
    of_claims(adapted_begins_as_its_base, of=adapt),
    of_claims(mutants.a_start_has_the_fan_of_the_input, of=mutants.start_of_library),
    *map(of_case, CASES),
]
ATTEND, WITHOUT = ("attend", "attend_backward"), ("without the right", "other operation")
SAME = {
    "layers.activation.ReLU.forward: off by one: x.real > 0": "ReLU is 0 at 0 either way",
    **dict.fromkeys(
        (
            *(f"fast.blockwise.BlockwiseAttention.{f}: off by one: q.shape[-2] <= blocks.plain_up_to" for f in ATTEND),
            "fast.experts_by_rows.ExpertsByRows.gated: off by one: len(c) <= self.rows",
            "fast.residual.residual_form: off by one: 2 * adapter.rank > X.shape[0]",
            "fast.residual.residual_form: without the right: 2 * adapter.rank",
            "fast.residual.residual_form: without the left: 2 * adapter.rank",
            "fast.residual.residual_form: other operation: 2 * adapter.rank",
            "variants.sums.singular_values: off by one: F.shape[0] > F.shape[1]",
        ),
        "both ways are one number",
    ),
    "fast.residual.residual_form: right transposed: s * B @ (H.T @ H)": "H^T H is its transpose",
    "fast.residual.residual_form: right transposed: s * H @ (B.T @ B)": "B^T B is its transpose",
    **dict.fromkeys(
        (f"layers.attention.softmax: {what}: S - S.real.max(axis=-1, keepdims=True)" for what in WITHOUT),
        "the sum divides it out, and exp overflows: test_large_scores_do_not_overflow",
    ),
    "fast.blockwise.attend_backward: without the left: past + t.stop": "no backward has a past",
    "variants.dora.with_magnitude: other operation: base.weight + adapter.delta()": "PiSSA's parts are at right angles",
    "variants.dropout.DroppingLoRALinear.mask: off by one: drawn.reshape(x.shape) >= self.dropout": "no draw is p",
    "variants.stackedlora.StackedLoRA.delta: off by one: self.experts > 1": "of one expert: "
    "test_delta_has_each_experts_own_product",
    **dict.fromkeys(
        (f"variants.dora.divisible: {what}: n + (n == 0)" for what in WITHOUT),
        "of rows of zeros: test_our_dora_is_finite_at_a_row_of_zeros",
    ),
    **dict.fromkeys(
        (
            "variants.pissa.pissa: without the right: S[:r] / s",
            "variants.pissa.pissa: other operation: S[:r] / s",
            "variants.pissa.pissa: without the left: root[:, None] * Vt[:r]",
            "variants.pissa.pissa: other operation: root[:, None] * Vt[:r]",
            "variants.pissa.pissa: without the right: U[:, :r] * root",
            "variants.pissa.pissa: other operation: U[:, :r] * root",
        ),
        "another part of W: test_pissa_takes_the_leading_singular_values_away",
    ),
}
"""Mistakes that change nothing, or what another test holds."""


@cache
def subjects_of() -> dict[FunctionType, list[Subject]]:
    """Return for each function of the mathematics what runs it, the most particular first."""
    made, found = functions(), {}
    for subject in SUBJECTS:
        for code in reached(partial(subject.run, SQUARE)) & made.keys():
            found.setdefault(made[code], []).append(subject)
    return found


def examples() -> list[Problem]:
    return [*ten_problems()[:-5:-1], SQUARE]


def is_caught(mistake: Mistake) -> bool:
    """Whether what runs the function rejects it with the mistake, within five examples."""
    for subject in subjects_of()[mistake.function][:6]:
        for problem in examples():
            subject.run(problem)  # once by the right code, so that what is drawn until it fits is there
            with mistake.made():
                if rejected(subject.claims, problem):
                    return True
    return False


MODULES = sorted({function.__module__ for function in subjects_of()})


@pytest.mark.long
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_every_mistake_of_algebra_is_caught(module):
    spoiled = [f for f in sorted(subjects_of(), key=place_of) if f.__module__ == module]
    made = [mistake for function in spoiled for mistake in mistakes(function)]
    with np.errstate(all="ignore"):
        survived = {str(mistake) for mistake in made if not is_caught(mistake)}
    assert survived == SAME.keys() & set(map(str, made))


OF_CLAIMS, OF_CASES = SUBJECTS[: -len(CASES)], SUBJECTS[-len(CASES) :]  # test_gradients has the cases' claims too


@pytest.mark.parametrize("subject", [*OF_CLAIMS, *one_in(10, OF_CASES, [case.name for case in CASES])])
def test_without_a_mistake_every_claim_is_kept(subject):
    """Otherwise whatever fails then would pass for a mistake that is caught."""
    for problem in examples():
        for claim in subject.claims:
            claim(problem)


@pytest.mark.parametrize("case", MERGED, ids=lambda case: case.name)
def test_merging_changes_no_output_of_any_case(case):
    for problem in (*ten_problems()[:2], SQUARE):
        merging_changes_no_output(case, problem)


def test_there_are_hundreds_of_mistakes():
    assert sum(len(mistakes(function)) for function in subjects_of()) > 800


# --- bugs that are no mistake of algebra ----------------------------------------------------------

EVERY_MUTANT = one_in(3, MUTANTS, [mutant.name for mutant in MUTANTS])


@pytest.mark.parametrize("mutant", EVERY_MUTANT)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_this_bug_is_caught_within_ten_examples(mutant):
    assert any(rejected(mutant.claims, problem) for problem in ten_problems())


@pytest.mark.parametrize("bug", one_in(3, BUGS, [bug.name for bug in BUGS]))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_wrong_function_in_the_right_ones_place_is_caught(bug):
    (case,) = [case for case in CASES if case.name == bug.subject]
    for problem in ten_problems():
        case.params(problem)  # an instance is drawn by right code, and kept
    with bug.planted():
        assert any(rejected(of_case(case).claims, problem) for problem in ten_problems())


@pytest.mark.parametrize("bug", one_in(4, SOMETIMES, [bug.name for bug in SOMETIMES]))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_wrong_at_some_shapes_only_is_found(bug):
    """Within as many examples as `test_gradients.py` draws by default; no example is made for it."""

    @settings(max_examples=BY_DEFAULT, derandomize=True, database=None, phases=[Phase.generate])
    @given(problem=FAMILIES[bug.subject].drawn())
    def search(problem):
        problem.holds()

    with bug.planted(), pytest.raises(AssertionError):
        search()


def test_the_same_code_without_a_bug_passes():
    """Otherwise the scaffold of the bugs, and not the bugs, might be what is caught."""
    problem = ten_problems()[-1]
    for claim in mutants.with_parts().claims:
        claim(mutants.with_parts(), problem)
    for claim in ADAM_CLAIMS:
        claim(AdamByFormulas, problem)
    for start in (mutants.start_of_library, mutants.uniform_start()):
        mutants.a_start_has_the_fan_of_the_input(start, problem)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


SHOWN_LATER = {bug.name: bug for bug in BUGS if bug.name.startswith(("dA of the first row", "dh doubled"))}


@pytest.mark.parametrize("name", [*HIDDEN_AT_THE_START, *SHOWN_LATER])
@given(problem=problems())
@settings(max_examples=10)
def test_at_the_start_of_lora_this_bug_is_invisible(name, problem):
    """At B = 0 a wrong backward agrees with every measured slope. So nothing is ever checked there."""
    factors = {"lora_A": problem.factors["lora_A"], "lora_B": np.zeros_like(problem.factors["lora_B"])}
    case, params = HIDDEN_AT_THE_START.get(name, lora_case()), {"x": problem.x, **factors}
    with SHOWN_LATER[name].planted() if name in SHOWN_LATER else nullcontext():
        grads = case.gradients(problem, params, problem.dy)
    gradcheck(case.output(problem), params, grads, cotangent=problem.dy, allow_zero=["x", "lora_A"])
