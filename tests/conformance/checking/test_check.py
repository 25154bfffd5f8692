"""The suite itself: it passes what is right, fails what is wrong, and says what it sees."""

import json
import re
from dataclasses import replace
from itertools import cycle
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance.checking.claims import EDGES
from minilora.conformance.checking.contract import ids
from minilora.conformance.checking.kindreport import CANNOT_BE_TOLD, REFUSED, STATES, KindReport
from minilora.conformance.problems import Problem
from minilora.conformance.problems.formulas import RIGHT_FORMULAS
from minilora.conformance.problems.kinds import DECLARED, KINDS
from minilora.conformance.problems.plain import DoRAProblem
from minilora.conformance.problems.tolerance import Trial, drawn, round_to

from ...support.sample import one_in
from ..implementations import OURS, PLAIN, beside_forward, full_norm, functions_of, report_of, with_kinds

LEFT_OVER = (("in", 128), ("out", 64), ("rank", 16))
PRECISIONS = ("float32", "float64", "bfloat16")


@pytest.mark.parametrize("dtype", one_in(3, PRECISIONS, PRECISIONS))
def test_our_own_layers_pass_in_every_precision(dtype):
    ours = with_kinds(**OURS)
    report = check(ours, dtype=dtype, name="minilora")
    assert report.passed, str(report)
    assert not report.diagnoses
    others = {claim: verdict for claim, verdict in report.claims.items() if verdict != "ok"}
    assert others == {"alpha of 0": "refused", "row of zeros": "not offered", "merged and back": "not offered"}
    assert set(report.kinds) == set(DECLARED) - {"linear"}
    for name, kind in report.kinds.items():
        assert kind.dtype == ("float32" if name == "mixed" or (name, dtype) == ("nf4", "float64") else dtype)
        offered = {claim for claim, verdict in kind.claims.items() if verdict == "ok"}
        assert offered >= set(kind.claims) - {"adam", "alpha of 0", "more axes", "row of zeros", "merged and back"}
        edges = dict.fromkeys(EDGES, "ok") | ({"alpha of 0": REFUSED} if name not in ("dropout", "fused") else {})
        edges |= {"more axes": "not offered"} if name.startswith("conv") else {}
        edges |= {"row of zeros": "not offered"} if name != "dora" else {}
        assert {claim: kind.claims[claim] for claim in EDGES if claim in kind.claims}.items() <= edges.items()
    assert str(report).startswith(f"minilora: passed: in {dtype}; 5 of 5 functions offered\n")
    found = ids(ours)  # which are known before the check
    assert [case.id for case in report.every_case()] == found
    assert len(set(found)) == len(found)
    assert found[:5] == ["linear-0-forward", "linear-0-scaling", "linear-0-slope", "linear-0-merge", "linear-1-forward"]
    assert {"conv2d-6-merge", "conv2d-merged-and-back", "dora-row-of-zeros", "combine-12-svd"} <= set(found)


def test_doras_norm_may_pass_the_gradient_if_declared():
    assert report_of("dora", **vars(functions_of(full_norm)), detached_norm=False).passed
    report = check(beside_forward(kinds={"dora": functions_of(full_norm)}))
    (text,) = report.kinds["dora"].diagnoses
    says = "the gradient passes through DoRA's norm, which is a constant unless declared otherwise"
    assert text.startswith(says)
    assert f"dora: {text}" in str(report)
    report = report_of("dora", **vars(OURS["dora"]), detached_norm=False)
    assert report.diagnoses[0].startswith("the gradient treats DoRA's norm as a constant")


@pytest.mark.parametrize("problem", [DoRAProblem(3, 4, 1, 2), DoRAProblem(3, 1, 4, 2)], ids=["one output", "one input"])
def test_doras_formulas_hold_at_a_width_of_one(problem):
    """There the shape of a norm does not say which axis it was taken along."""
    trial = Trial.draw(problem, "float64", KINDS["dora-full"].formulas)
    p, full = trial.arrays, functions_of(full_norm)
    layer = [p["weight"], p["bias"], p["lora_A"], p["lora_B"], problem.alpha, p["magnitude"]]
    found = {"y": full.forward(p["x"], *layer), **full.backward(p["dy"], p["x"], *layer)}
    assert found.keys() == trial.right.keys() - {"merged"}
    assert [name for name, answer in found.items() if not trial.agrees(name, answer)] == []


@pytest.mark.parametrize(
    ("axis", "block"), [("rows", 64), *(pytest.param(*more, marks=pytest.mark.long) for more in LEFT_OVER)]
)
def test_what_is_left_over_after_a_block_is_missed(axis, block):
    n, i, o, r = (block if name == axis else None for name in ("rows", "in", "out", "rank"))

    def forward(x, weight, bias, A, B, alpha):
        y = PLAIN.forward(x[:, :i], weight[:, :i], bias, A[:r, :i], B[:, :r], alpha * len(A[:r]) / len(A))
        y[n or len(y) :], y[:, o or y.shape[1] :] = 0, 0
        return y

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert " is off by " in text
    assert text.endswith("(N=67 in=130 out=69 r=17 alpha=24)")


@pytest.mark.parametrize(
    ("kind", "orientation", "fan_in_fan_out"),
    [
        *(("linear", orientation, turned) for orientation in ("out, in", "in, out") for turned in (False, True)),
        *((kind, "in, out", None) for kind in ("linear", "embedding", "dora")),
        *(pytest.param(kind, "in, out", True, marks=pytest.mark.long) for kind in ("rslora", "dora")),
    ],
)
def test_the_base_may_lie_otherwise_than_the_factors(kind, orientation, fan_in_fan_out):
    """Where nothing is said it lies as they do, but for an embedding's table (V, dim), which lies so already."""
    ours, fan = OURS[kind], kind != "embedding" if fan_in_fan_out is None else fan_in_fan_out

    def turned(W, A, B):
        W = W.T if fan else W
        return (W, A.T, B.T) if orientation == "in, out" else (W, A, B)

    def forward(x, weight, bias, A, B, *more):
        weight, A, B = turned(weight, A, B)
        return ours.forward(x, weight, bias, A, B, *more)

    def backward(dy, x, weight, bias, A, B, *more):
        weight, A, B = turned(weight, A, B)
        grads = ours.backward(dy, x, weight, bias, A, B, *more)
        return grads | dict(
            zip(("lora_A", "lora_B"), turned(weight, grads["lora_A"], grads["lora_B"])[1:], strict=True)
        )

    def merge(weight, A, B, *more):
        weight, A, B = turned(weight, A, B)
        merged = ours.merge(weight, A, B, *more)
        return merged.T if fan else merged

    def init(in_features, out_features, rank, rng, *weight):
        A, B, *m = ours.init(in_features, out_features, rank, rng, *(W.T if fan else W for W in weight))
        return *((A.T, B.T) if orientation == "in, out" else (A, B)), *m

    mine = SimpleNamespace(forward=forward, backward=backward, merge=merge, init=init, orientation=orientation)
    mine.fan_in_fan_out = fan_in_fan_out
    report = report_of(kind, **vars(mine))
    assert report.passed, str(report)
    mine.fan_in_fan_out = not fan
    assert kind == "embedding" or not report_of(kind, **vars(mine)).passed


def test_gradients_of_single_precision_alone_are_seen():
    """Keras keeps its factors in float32 beside a base in float64."""

    def backward(*arrays):
        return PLAIN.backward(*(a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in arrays))

    report = check(SimpleNamespace(forward=single, backward=backward))
    assert report.passed, str(report)
    assert report.dtype == "float32"


def test_what_is_not_finite_is_null_in_json():
    report = check(beside_forward(merge=lambda weight, *arrays: weight + np.nan))
    assert report.errors["merged"] == float("inf")
    assert report.claims["merge"] == "the merged weight is not finite (N=7 in=5 out=3 r=2 alpha=3)"
    assert report.habits["same bits twice"] == "ok"
    assert report.as_dict()["errors"]["merged"] is None
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["passed"] is False
    assert report.as_dict()["habits"] == report.habits


def test_what_is_changed_is_told_first_and_other_claims_last():
    def backward(dy, x, *arrays):
        grads = PLAIN.backward(dy, x, *arrays)
        dy *= 2
        return {**grads, "lora_A": grads["lora_A"] + 1, "lora_B": 1.37 * grads["lora_B"]}

    report = check(beside_forward(backward=backward, init=lambda *sizes: None))
    found = report.diagnoses
    begins = [
        "backward changes dy",
        *(f"{of}'s gradient is off by " for of in ("lora_B", "lora_A")),
        "init returns None",
    ]
    assert all(text.startswith(said) for text, said in zip(found, begins, strict=True))
    assert report.found[0].cases == ("linear-nothing-is-changed",)
    assert "every entry is off by a factor of 1.37" in found[1]  # a factor is what one can act on


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dtype", "float8", "dtype of thing must be 'float64', 'float32', 'float16' or 'bfloat16', got 'float8'"),
        ("scaling", "r", "scaling of thing must be 'alpha / r', 'alpha / sqrt(r)', 'alpha' or '1', got 'r'"),
        ("orientation", "sideways", "orientation of thing must be 'out, in' or 'in, out', got 'sideways'"),
        ("fan_in_fan_out", "yes", "fan_in_fan_out of thing must be True or False, got 'yes'"),
        ("kinds", {"vera": 1}, f"thing has the kind 'vera', expected one of {', '.join(DECLARED)}"),
        ("kinds", ["dora"], "kinds of thing must be a dict of objects, got list"),
        ("forward", None, "thing has no function forward(x, weight, bias, lora_A, lora_B, alpha)"),
    ],
)
def test_what_is_declared_must_be_known(name, value, said):
    with pytest.raises(CannotRun) as refused:
        check(beside_forward(**{name: value}), name="thing")
    assert str(refused.value) == said
    if name == "kinds":
        with pytest.raises(CannotRun) as refused:
            ids(beside_forward(kinds=value))
        assert str(refused.value) == said.replace("thing", "it")


def test_an_answer_that_is_wrong_before_is_not_called_refused():
    """It was given: a forward that does not divide alpha answers for more axes and no rows, which cannot be judged."""

    def forward(x, weight, bias, lora_A, lora_B, alpha):
        return PLAIN.forward(x, weight, bias, lora_A, lora_B, alpha * len(lora_A))

    def plain(x, *layer):
        if x.ndim != 2 or not len(x):
            raise ValueError("not these")
        return forward(x, *layer)

    for answers, said in ((forward, CANNOT_BE_TOLD), (plain, REFUSED)):
        claims = check(beside_forward(forward=answers, merge=PLAIN.merge)).claims
        assert (claims["more axes"], claims["no rows"], claims["memory order"]) == (said, said, "ok")


@pytest.mark.parametrize("width", ["in", "out"])
def test_a_width_in_the_place_of_the_rank_is_named(width):
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        n_out, n_in = weight.shape
        return PLAIN.forward(x, weight, bias, lora_A, lora_B, alpha * len(lora_A) / (n_in if width == "in" else n_out))

    (found,) = check(beside_forward(forward=forward)).found
    assert f"; it is alpha / {width} instead of alpha / r: is the rank read from another axis?" in found.says


def test_an_object_of_a_module_is_suggested():
    """Not a class, a module or a private name; of a layer of torch, the file that can call it."""
    module = ModuleType("mine")
    module.__file__ = "/there/mine.py"
    vars(module).update(Mine=type(PLAIN), other=ModuleType("other"), _mine=PLAIN)
    module.other.forward = PLAIN.forward
    said = "mine has no function forward(x, weight, bias, lora_A, lora_B, alpha)"
    of_torch = type("Layer", (type("Module", (), {"__module__": "torch.nn.modules.module", "forward": print}),), {})
    layer = "a layer of torch, which functions in the file of `conformance --start torch` can call"
    for name, value, hint in (
        ("", None, ""),
        ("mine", PLAIN, "; its object mine has: check mine.py:mine"),
        ("Layer", of_torch, f"; Layer is {layer}"),
        ("layer", of_torch(), f"; layer is {layer}"),
    ):
        given = ModuleType("mine")
        vars(given).update(vars(module) | ({name: value} if name else {}))
        with pytest.raises(CannotRun, match=f"^{re.escape(said + hint)}$"):
            check(given)


def test_an_error_is_the_largest_beside_the_largest_entry():
    """It grows with the rows, and the problem that has most is not the last."""

    def forward(x, *layer):
        y = PLAIN.forward(x, *layer)
        y[np.unravel_index(abs(y).argmax(), y.shape)] *= 1 + 0.01 * len(x)
        return y

    errors = check(beside_forward(forward=forward, merge=PLAIN.merge)).errors
    assert errors["y"] == pytest.approx(0.01 * max(problem.n for problem in KINDS["linear"].problems), rel=1e-9)
    assert errors["merged"] < 1e-14


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -3.14159265], np.float64)
    expected = np.array([1.0, 1.0, 1 + 2**-7, 1 + 2**-6, -3.140625])
    np.testing.assert_array_equal(round_to(x, "bfloat16"), expected.astype(np.float32))


def test_what_a_problem_draws_is_the_callers_own():
    """It is drawn once and kept; who changes what he got changes nobody else's."""
    problem = Problem(3, 4, 5, 2)
    problem.x[...] = problem.factors["lora_A"][...] = 0
    assert problem.x.any()
    assert problem.factors["lora_A"].any()


# --- what fails, where, and what is said of it ----------------------------------------------------


WHERE = {
    "everywhere": lambda problem: True,
    "without a bias": lambda problem: not problem.bias,
    "at rank 1": lambda problem: problem.rank == 1,
    "where lora_B is not zero": lambda problem: not problem.start,
    "with a bias, and lora_B is not zero": lambda problem: problem.bias and not problem.start,
    "first": lambda problem: problem == KINDS["linear"].problems[0],
}


def numbers(where):
    """The ids of the linear layer's problems that have something."""
    return [f"linear-{number}" for number, problem in enumerate(KINDS["linear"].problems) if WHERE[where](problem)]


def backward(change):
    """A backward whose gradients are changed, by the gradients and all arguments."""
    return {"backward": lambda *arrays: change(PLAIN.backward(*arrays), *arrays)}


def forward(change):
    return {"forward": lambda x, *layer: change(PLAIN.forward(x, *layer), x, *layer)}


def single(x, *layer):
    layer = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in layer]
    return PLAIN.forward(x.astype(np.float32), *layer).astype(np.float64)


def kept():
    left = []

    def forward(x, *layer):
        left.append(x)
        return PLAIN.forward(x, *layer)

    return {"forward": forward, "backward": lambda dy, x, *layer: PLAIN.backward(dy, left[-1], *layer)}


def forgetful():
    """A backward that leaves a gradient out when it is asked again."""
    asked = []

    def change(grads, dy, *arrays):
        asked.append(dy)
        again = any(np.array_equal(dy, before) for before in asked[:-1])
        return without("lora_A")(grads) if again else grads

    return backward(change)


def raises_at_other_values(dy, x, *layer):
    """Of the same shape: on the problem that is asked for between two calls with the same arguments."""
    first = KINDS["linear"].problems[0]
    if np.array_equal(x, replace(first, seed=1 + first.seed).x):
        raise RuntimeError("another batch")
    return PLAIN.backward(dy, x, *layer)


def without(*names):
    return lambda grads, *arrays: {name: grad for name, grad in grads.items() if name not in names}


def noisy():
    rng = np.random.default_rng(0)
    return forward(lambda y, *layer: y + rng.standard_normal(y.shape))


SINGLE = (
    "right to float32 only: computed, or stored, in single precision. If that is intended, declare dtype float32, or"
    " answer only the float32 vectors"
)
FAILS = {
    "another scaling at rank 1": (
        {"forward": lambda x, W, b, A, B, alpha: PLAIN.forward(x, W, b, A, B, alpha * (1 + (len(A) == 1))),
         "backward": PLAIN.backward},
        {"forward": "at rank 1", "scaling": "at rank 1"},
        ["the update has a different scaling, where r is 1: "
            "10 at in=7 out=4 r=1 alpha=5, expected 5, only in the output"],
    ),
    "an error of a ten-billionth": (
        backward(lambda grads, *arrays: {**grads, "lora_A": grads["lora_A"] + 1e-10}),
        {"slope": "everywhere"},
        ["lora_A's gradient is off by 1e-10 at "],
    ),
    "single precision beside a factor, which may come of it": (
        {"forward": single, "merge": lambda *arrays: 2 * PLAIN.merge(*arrays)},
        {"forward": "everywhere", "merge": "everywhere"},
        [f"the output: {SINGLE}", "the merged weight is off by "]),
    "a gradient in single precision": (
        backward(lambda grads, *arrays: {**grads, "lora_A": grads["lora_A"].astype(np.float32)}),
        {"slope": "where lora_B is not zero"},
        [f"lora_A's gradient: {SINGLE}"],
    ),
    "where a gradient must be zero it says nothing": (
        backward(lambda grads, dy, x, W, b, *more: grads if b is None else {**grads, "lora_A": 2 * grads["lora_A"]}),
        {"slope": "with a bias, and lora_B is not zero"},
        ["lora_A's gradient, where there is a bias, is off by 9.72 at [1, 4]: 19.43506, expected 9.71753; every entry "
         "is off by a factor of 2 (N=7 in=5 out=3 r=2 alpha=3)"],
    ),
    "a transposed weight": (
        {"merge": lambda *arrays: PLAIN.merge(*arrays).T},
        {"merge": "everywhere"},
        ["the merged weight is transposed (N=7 in=5 out=3 r=2 alpha=3)"],
    ),
    "gradients in the place of each other": (
        backward(lambda grads, *arrays: {**grads, "lora_A": grads["lora_B"], "lora_B": grads["lora_A"]}),
        {"slope": "everywhere"},
        [f"lora_{one}'s gradient is returned as lora_{other}'s gradient" for one, other in ("BA", "AB")],
    ),
    "no gradient of a factor": (
        backward(without("lora_A", "lora_B")),
        {"slope": "everywhere"},
        ["backward returns no gradient of lora_A and lora_B; it returns those of x"],
    ),
    "no gradient": (
        backward(lambda grads, *arrays: {}),
        {"slope": "everywhere"},
        ["backward returns no gradient of lora_A and lora_B; it returns none"],
    ),
    "a gradient that is not returned without a bias": (
        backward(lambda grads, dy, x, W, b, *more: grads if b is not None else without("lora_A")(grads)),
        {"slope": "without a bias"},
        ["backward returns no gradient of lora_A, where there is no bias, (N=4 in=3 out=6 r=4 alpha=10)"],
    ),
    "a forward that raises without a bias": (
        {"forward": lambda x, W, b, *more: PLAIN.forward(x, W, b + 0, *more)},
        {"forward": "without a bias"},
        ["forward, where there is no bias, raises TypeError: unsupported operand type(s) for +: 'NoneType' and 'int' "
         "(N=4 in=3 out=6 r=4 alpha=10, no bias), in test_check.py, line "],
    ),
    "a backward that raises at other values": (
        {"backward": raises_at_other_values},
        {"slope": "first"},
        ["backward raises RuntimeError: another batch (N=7 in=5 out=3 r=2 alpha=3, a bias), in test_check.py, line "],
    ),
    "what is kept between calls": (
        kept(),
        {"slope": "first"},
        ["lora_A's gradient changes on a second call with the same arguments: something is kept between calls"],
    ),
    "dropout that is on": (
        noisy(),
        {"forward": "everywhere"},
        ["the output changes on every call with the same arguments: is dropout on?",
         "the output is off by 2.33 at [4, 0]: 0.5867597, expected 2.91179 (N=7 in=5 out=3 r=2 alpha=3)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FAILS)
def test_what_fails_is_told_where_it_does(what):
    functions, where, says = FAILS[what]
    report = check(beside_forward(**functions))
    failing = [case.id for case in report.cases if case.failed]
    assert failing == sorted(
        (f"{id}-{claim}" for claim, places in where.items() for id in numbers(places)),
        key=lambda id: (int(id.split("-")[1]), list(KINDS["linear"].claims).index(id.split("-")[2])),
    )
    assert len(report.diagnoses) == len(says)
    assert all(text.startswith(said) for text, said in zip(report.diagnoses, says, strict=True)), report.diagnoses
    assert {id for one in report.found for id in one.cases} == set(failing)
    assert {claim for claim, text in report.claims.items() if text not in STATES} == {*where}


@pytest.mark.parametrize(
    "functions",
    [forgetful(), backward(without("x")), backward(lambda grads, *arrays: {**grads, "x": None})],
    ids=["left out again", "no dx", "dx is None"],
)
def test_a_gradient_that_may_be_missing_ends_nothing(functions):
    """What was returned at first is judged, and a first layer needs no dx."""
    assert check(beside_forward(**functions)).passed


@pytest.mark.parametrize("times", [0.001, 1, 1000])
def test_two_orders_of_a_sum_are_no_change_of_mind(times):
    """Each is off by rounding, and they are further apart than one may be off; so are those of a wrong one.

    A wrong one that is larger is rounded as what it is, and one that is smaller as the terms that cancelled.
    """
    trial, signs = drawn(KINDS["linear"].problems[0], "float64", RIGHT_FORMULAS), cycle((0.9, -0.9))

    def forward(x, *layer):
        off = trial.allowed(trial.sizes["y"]) if layer[-1] and np.array_equal(x, trial.arrays["x"]) else 0
        return times * PLAIN.forward(x, *layer) + max(times, 1) * next(signs) * off

    report = check(beside_forward(forward=forward))
    assert report.passed is (times == 1)
    assert not [text for text in report.diagnoses if "another one" in text]


def test_a_kinds_summary_says_what_was_offered():
    assert KindReport("mine", dtype="float32").summary() == "in float32"
    assert KindReport("mine", habits={"cases answered": "3 of 5"}).summary() == "in float64; 3 of 5 cases answered"
    assert KindReport("mine", functions={"f": True, "g": False}).summary() == "in float64; 1 of 2 functions offered"
