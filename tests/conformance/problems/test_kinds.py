"""Kinds and their problems: their numbers, what they catch, what an implementation declares, and how to add a kind."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from minilora.conformance import CannotRun
from minilora.conformance.problems import kind as records
from minilora.conformance.problems.formulas import SCALINGS, Formulas
from minilora.conformance.problems.images import ConvolutionProblem
from minilora.conformance.problems.kind import Kind
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.problem import Problem
from minilora.conformance.problems.tolerance import Trial, drawn

from ...support.compare import refused
from ..implementations import OURS, report_of
from .test_lowprecision import update

FIRST = {"linear": 15, "rslora": 14, "dora": 14, "embedding": 6, "conv1d": 5, "conv2d": 7, "dropout": 14, "nf4": 5,
         "mixed": 9, "fused": 9, "experts": 10, "combine": 13, "dora-full": 14}  # fmt: skip
DIGEST = "5275375861fd459db488000d28b897fabf0c7671a3215ea03a71e548e302c32c"
"""The sha256 of each kind's first problems. Users list failures by a problem's number, so new ones come after these."""


def test_a_problem_keeps_its_number():
    lines = [f"{kind} {number} {problem!r}" for kind, count in FIRST.items()
             for number, problem in enumerate(KINDS[kind].problems[:count])]  # fmt: skip
    assert list(FIRST) == list(KINDS)
    assert len(lines) == 135
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == DIGEST


TOLD = {
    ("experts", 0): "N=11 in=5 out=4 r=2 alpha=3 experts=3",
    ("experts", 3): "N=7 in=5 out=3 r=2 alpha=5 experts=4, none for expert 2",
    ("combine", 6): "in=8 out=7 r=3,3 rsLoRA alpha=5,10 weights=0.8,-0.6 rank=4",
    ("nf4", 2): "N=4 in=15 out=9 r=3 alpha=2",
    ("nf4", 3): "N=2 in=160 out=110 r=5 alpha=16 scales of 8 bits",
    ("fused", 2): "N=5 in=6 out=12 slots=4,4,4 r=3,3,3 alpha=2,4,6",
}


def test_a_problem_prints_its_sizes():
    assert {(kind, number): str(KINDS[kind].problems[number]) for kind, number in TOLD} == TOLD
    assert str(replace(KINDS["experts"].problems[3], idle=0)).endswith(" experts=4, none for expert 0")


PLACES = {
    "fused": {
        ("y", (0, 3)): ", in slot 0", ("y", (0, 4)): ", in slot 1", ("lora_A", (2, 0)): ", in slot 0",
        ("lora_A", (3, 0)): ", in slot 1", ("lora_B", (8, 0)): ", in slot 2", ("merged", (7, 0)): ", in slot 1",
        ("x", (0, 0)): "",
    },
    "experts": {
        ("lora_A", (1, 2)): ", of expert 0", ("lora_A", (4, 0)): ", of expert 2", ("lora_B", (0, 4)): ", of expert 1",
        ("merged", (2, 0, 1)): ", of expert 2", ("y", (0, 0, 0)): "",
    },
}  # fmt: skip


def test_an_entry_is_located_by_slot_or_expert():
    for kind, number in (("fused", 2), ("experts", 0)):
        problem = KINDS[kind].problems[number]
        assert {place: problem.locate(*place) for place in PLACES[kind]} == PLACES[kind]
    assert [problem.locate("x", (i, 0)) for i in range(11)] == [f", of expert {e}" for e in problem.expert_ids]


LAYER, NF4_LAYER = "x weight bias lora_A lora_B alpha", "x packed absmax bias lora_A lora_B alpha"
HANDED = {
    **{kind: {"forward": LAYER} for kind in ("linear", "rslora", "embedding", "conv1d", "conv2d", "mixed")},
    **{kind: {"forward": f"{LAYER} magnitude"} for kind in ("dora", "dora-full")},
    "dropout": {"forward": f"{LAYER} mask", "backward": f"dy {LAYER} mask", "merge": "weight lora_A lora_B alpha"},
    "nf4": {"forward": NF4_LAYER, "backward": f"dy {NF4_LAYER}", "merge": "packed absmax lora_A lora_B alpha"},
    "fused": {"forward": f"{LAYER} widths", "merge": "weight lora_A lora_B alpha widths"},
    "experts": {"forward": "x weight lora_A lora_B alpha expert_ids", "merge": "weight lora_A lora_B alpha"},
    "combine": {"cat": "lora_A lora_B alpha use_rslora weights", "svd": "lora_A lora_B alpha use_rslora weights rank"},
}


@pytest.mark.parametrize("kind", HANDED)
def test_functions_get_their_arguments_in_this_order(kind):
    problem = KINDS[kind].problems[0]
    arrays = drawn(problem, "float64", KINDS[kind].formulas).arrays
    found = {function: " ".join(problem.arguments_of(function, arrays)) for function in HANDED[kind]}
    assert found == HANDED[kind]


A, OF_A = np.ones((3, 6)), "lora_A of slot"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([A, A], "2 arrays for lora_A, expected 3, one for each slot"),
        ([None] * 3, f"nothing for {OF_A} 0, expected shape (3, 6)"),
        ([A, A, A.T], f"shape (6, 3) for {OF_A} 2, expected shape (3, 6)"),
        (A, "a ndarray for lora_A, expected a list, one for each slot"),
    ],
)
def test_gradients_that_do_not_fit_the_slots_are_refused(parts, said):
    problem = KINDS["fused"].problems[2]
    with refused(said, ValueError):
        problem.from_returned("lora_A", parts, lambda value, name: value)


NUMBERS = {
    "linear": (152.447908, 175.237923, 194.571916),
    "rslora": (133.099453, 164.102449, 182.715526),
    "dora": (133.386716, 134.272729, 162.679636),
    "embedding": (49.735093, 53.34896, 56.646913),
    "conv1d": (42.19422, 49.622217, 55.829173),
    "conv2d": (73.100285, 86.316412, 96.886589),
    "dropout": (136.42109, 154.438984, 172.196859),
    "nf4": (74.86655, 67.604475, 72.944182),
    "mixed": (86.813081, 99.509431, 180.358536),
    "fused": (83.654429, 99.256924, 109.31919),
    "experts": (91.437583, 104.481278, 113.071141),
    "combine": (87.553072, 119.430382, 166.685832),
    "dora-full": (133.386716, 133.676946, 194.548172),
}
"""Three numbers for each kind: sums of logarithms of its problems' arrays, right answers and sizes, where each entry is
multiplied by its position."""


def logarithm(arrays):
    return np.log(sum((np.abs(a).ravel() * np.arange(1, a.size + 1)).sum() for a in arrays.values()))


@pytest.mark.parametrize("kind", NUMBERS)
def test_problems_keep_their_numbers_answers_and_sizes(kind):
    trials = [Trial.draw(problem, "float64", KINDS[kind].formulas) for problem in KINDS[kind].problems]
    found = [sum(logarithm(getattr(t, name)) for t in trials) for name in ("arrays", "right", "sizes")]
    np.testing.assert_allclose(found, NUMBERS[kind], rtol=0, atol=2e-6)


# --- what the problems catch ----------------------------------------------------------------------


def test_two_row_axes_cannot_be_confused_with_others():
    problems = {kind: KINDS[kind].problems[0].with_two_row_axes() for kind in KINDS}
    assert {kind for kind, p in problems.items() if p is None} == {"conv1d", "conv2d"}
    for kind, p in problems.items():
        sizes = (p.n, p.in_features, p.out_features, p.rank, 2, 3) if p else ()
        assert len(set(sizes)) >= len(sizes) - (kind in ("fused", "experts"))  # two of their sizes are equal


def test_a_nearest_matrix_does_not_depend_on_rounding():
    problems = KINDS["combine"].problems
    assert {(True, True), (False, False), (True, False), (False, True)} <= {p.stabilised for p in problems}
    assert {min(p.weights) < 0 for p in problems} == {True, False}
    assert {len(p.ranks) for p in problems} == {1, 2, 3}
    for p in problems:
        S = np.linalg.svd(OURS["combine"].cat(*p.arguments_of("cat", p.factors).values()), compute_uv=False)
        after = S[p.rank] if p.rank < len(S) else 0.0
        assert p.rank <= min(p.in_features, p.out_features, sum(p.ranks))
        assert S[p.rank - 1] - after > S[0] / 25


def test_the_base_is_exact_if_the_update_cancels_it():
    """Each partial sum of the base is an integer up to 256 in any order, and the update cancels it up to 1/2."""
    for problem in (problem for problem in KINDS["mixed"].problems if problem.near):
        trial = drawn(problem, "float32", KINDS["mixed"].formulas)
        p = trial.arrays
        assert (np.abs(p["x"]) @ np.abs(p["weight"]).T + np.abs(p["bias"])).max() <= 256
        assert np.abs(trial.right["y"]).max() <= 0.5 - 1e-6  # so that no BLAS rounds to another integer
        assert np.abs(update(p["x"], p["lora_A"], p["lora_B"], problem.alpha / problem.rank)).max() > 50


# --- declarations ---------------------------------------------------------------------------------


def seen(**declared):
    """Return the slots, ranks and alphas that an implementation of fused slots is called with."""
    asked = []

    def forward(x, weight, bias, A, B, alpha, widths):
        asked.append((widths, [None if a is None else len(a) for a in A], alpha))
        return OURS["fused"].forward(x, weight, bias, A, B, alpha, widths)

    assert report_of("fused", forward=forward, **declared).passed
    return asked


def test_all_forms_of_slots_are_tested_unless_declared():
    asked = seen()
    assert {len(widths) for widths, *_ in asked} == {2, 3}
    assert any(len(set(widths)) > 1 for widths, *_ in asked)
    assert any(len(set(filter(None, ranks))) > 1 for _, ranks, _ in asked)
    assert any(None in ranks for _, ranks, _ in asked)
    assert all([a is None for a in alpha] == [r is None for r in ranks] for _, ranks, alpha in asked)
    assert {len(widths) for widths, *_ in seen(slots=3)} == {3}
    assert all(len(set(widths)) == 1 for widths, *_ in seen(one_width=True, slots=2))
    for _, ranks, alpha in seen(one_rank=True):
        assert len(set(filter(None, ranks))) == len({a for a in alpha if a is not None}) == 1


@pytest.mark.parametrize(
    ("kind", "what", "value", "known"),
    [
        ("fused", "slots", 4, "2 or 3"),
        ("fused", "one_rank", "yes", "True or False"),
        ("mixed", "output", "float64", "'bfloat16' or 'float32'"),
        ("dora", "detached_norm", 2, "True or False"),
    ],
)
def test_what_a_kind_declares_must_be_known(kind, what, value, known):
    with refused(f"{what} of SimpleNamespace, {kind} must be {known}, got {value!r}", CannotRun):
        report_of(kind, **vars(OURS[kind]) | {what: value})


PRECISIONS = [("nf4", None, "float32"), ("nf4", "float16", "float16"), ("mixed", "bfloat16", "float32")]


@pytest.mark.parametrize(("kind", "dtype", "checked"), [*PRECISIONS, ("dora", None, "float64")])
def test_a_kind_is_checked_in_a_precision_that_it_supports(kind, dtype, checked):
    assert report_of(kind, dtype, **vars(OURS[kind])).dtype == checked


def test_a_function_gets_the_options_in_its_signature():
    def forward(x, weight, bias, A, B, alpha, *, stride, padding=0, **more):
        assert not more
        return OURS["conv2d"].forward(x, weight, bias, A, B, alpha, stride=stride, padding=padding)

    class Compiled:
        """A callable without a signature to inspect."""

        @property
        def __signature__(self):
            raise ValueError("no signature found")

        def __call__(self, *arrays):
            return OURS["conv2d"].forward(*arrays)

    assert report_of("conv2d", forward=forward).passed
    assert report_of("conv2d", forward=Compiled()).passed


def test_a_wrong_shape_reveals_swapped_axes_of_the_steps():
    steps = {"stride": (1, 2), "padding": (1, 2), "dilation": (2, 3)}
    swapped = {name: step[::-1] for name, step in steps.items()}
    own, other = (ConvolutionProblem(2, 3, 4, 2, kernel=(2, 3), sizes=(17, 14), **of) for of in (steps, swapped))
    assert own.shape_hint((2, 4, *other.positions)) == ", as it would be if the two axes of each step were swapped"


def turned(value, swapped=2):
    if isinstance(value, list):
        return [turned(one) for one in value]
    return np.ascontiguousarray(value.swapaxes(-1, -2)) if np.ndim(value) == swapped else value


def test_slots_may_have_the_orientation_in_out():
    ours = OURS["fused"]

    def forward(x, weight, bias, A, B, *more):
        return ours.forward(x, turned(weight), bias, turned(A), turned(B), *more)

    def backward(dy, x, weight, bias, A, B, *more):
        grads = ours.backward(dy, x, turned(weight), bias, turned(A), turned(B), *more)
        return {name: g if name == "x" else turned(g) for name, g in grads.items()}

    report = report_of("fused", forward=forward, backward=backward, orientation="in, out")
    assert report.passed, str(report)


@pytest.mark.parametrize("fan", [None, True])
def test_stacked_weights_may_have_the_orientation_in_out(fan):
    ours, declared = OURS["experts"], {"fan_in_fan_out": True} if fan else {"orientation": "in, out"}

    def forward(x, W, A, B, alpha, ids):
        return ours.forward(x, turned(W, 3), *((A, B) if fan else (A.T, B.T)), alpha, ids)

    def merge(W, A, B, alpha):
        return turned(ours.merge(turned(W, 3), *((A, B) if fan else (A.T, B.T)), alpha), 3)

    assert report_of("experts", forward=forward, merge=merge, **declared).passed


# --- adding a kind --------------------------------------------------------------------------------


class PlainProblem(Problem):
    layer = ("weight", "lora_A", "lora_B")


def test_a_kind_is_added_by_a_record_and_its_problems(monkeypatch):
    lines = [{"N": 5, "in": 4, "out": 3, "r": 2, "bias": False}, {"N": 1, "in": 3, "out": 6, "r": 1, "bias": False}]
    monkeypatch.setattr(records, "_lines", lambda: {"plain": lines})
    plain = Kind("plain", PlainProblem, Formulas(scaling=SCALINGS["1"]), functions=("forward", "merge"))
    assert [str(problem) for problem in plain.problems] == ["N=5 in=4 out=3 r=2 alpha=3", "N=1 in=3 out=6 r=1 alpha=3"]
    monkeypatch.setitem(KINDS, "plain", plain)
    monkeypatch.setattr("minilora.conformance.checking.contract.DECLARED", ("plain",))
    right = {"forward": lambda x, W, A, B, alpha: x @ (W + B @ A).T, "merge": lambda W, A, B, alpha: W + B @ A}
    report = report_of("plain", **right)
    assert report.passed, str(report)
    assert {report.claims[claim] for claim in ("forward", "merge", "memory order", "more axes")} == {"ok"}
    assert report.functions == {"forward": True, "merge": True}
    report = report_of("plain", **right | {"forward": lambda x, W, A, B, alpha: x @ (W + alpha * B @ A).T})
    assert not report.passed
