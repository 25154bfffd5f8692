"""The suite itself: it passes what is right, fails what is wrong, and names each known bug that is planted."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import cli
from minilora.commands import conformance as command
from minilora.conformance import CannotRun, check
from minilora.conformance.bugs.table import BUGS, OF_NUMBERS
from minilora.conformance.checking.contract import contract
from minilora.conformance.checking.report import NOT_FAILED
from minilora.conformance.problems import Problem
from minilora.conformance.problems.adam_answers import AdamFormulas
from minilora.conformance.problems.kinds import DECLARED, SETS
from minilora.conformance.problems.reference import RIGHT, SCALINGS, StartFormulas
from minilora.conformance.problems.rounding import UNIT, round_to
from minilora.conformance.problems.trial import Trial
from minilora.conformance.running import child_process as apart
from minilora.conformance.running.target import imported

from .implementations import OURS, from_formulas, full_norm, functions_of, implementation, init, with_kinds

LINEAR = vars(OURS["linear"])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_our_own_layers_pass_in_every_precision(dtype):
    report = check(with_kinds(**OURS), dtype=dtype, name="minilora")
    assert report.passed, str(report)
    assert not report.diagnoses
    others = {claim: verdict for claim, verdict in report.claims.items() if verdict != "ok"}
    assert others == {"alpha of 0": "refused", "row of zeros": "not offered", "merged and back": "not offered"}
    assert set(report.kinds) == set(DECLARED) - {"linear"}
    for name, kind in report.kinds.items():
        assert kind.dtype == ("float32" if name == "mixed" or (name, dtype) == ("nf4", "float64") else dtype)
        offered = {claim for claim, verdict in kind.claims.items() if verdict == "ok"}
        assert offered >= set(kind.claims) - {"adam", "alpha of 0", "more axes", "row of zeros", "merged and back"}
    assert str(report).startswith(f"minilora: passed, in {dtype}; 5 of 5 functions offered\n")


def test_doras_norm_may_pass_the_gradient_if_declared():
    assert check(with_kinds(dora=functions_of(full_norm, detached_norm=False))).passed
    report = check(with_kinds(dora=functions_of(full_norm)))
    (text,) = report.kinds["dora"].diagnoses
    assert text.startswith("the gradient passes through DoRA's norm, which detached_norm declares a constant")
    assert str(report).startswith(f"dora: {text}")
    report = check(with_kinds(dora=SimpleNamespace(**vars(OURS["dora"]), detached_norm=False)))
    assert report.kinds["dora"].diagnoses[0].startswith("the gradient takes DoRA's norm for a constant")


def test_what_is_missing_is_not_offered_and_not_failed():
    report = check(SimpleNamespace(forward=LINEAR["forward"]))
    assert report.passed
    assert {claim for claim, verdict in report.claims.items() if verdict == "ok"} == {
        "forward", "scaling", "nothing is changed", "memory order", "more axes", "no rows"
    }  # fmt: skip
    assert {report.claims[c] for c in ("slope", "merge", "start", "adam", "frozen base")} == {"not offered"}


def start_of(**parts):
    """An init by the formulas of a start, with some parts replaced."""

    def start(in_features, out_features, rank, rng, kernel=()):
        A, B = init(in_features, out_features, rank, rng, kernel)
        sizes = (rank, in_features, out_features, int(np.prod(kernel)))
        return A * StartFormulas(**parts).spread(*sizes) / StartFormulas().spread(*sizes), B

    return start


def step_of(**parts):
    """A step by Adam's formulas, with some parts replaced."""

    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        new = {k: AdamFormulas(**parts).after(p, m[k], v[k], grads[k], t + 1) for k, p in params.items()}
        params, m, v = ({k: found[i] for k, found in new.items()} for i in range(3))
        return params, (m, v, t + 1)

    return step


def planted(bug):
    """The first kind that a bug is of, and an implementation of that kind that has it."""
    kind = bug.kinds[0]
    if bug.breaks == "adam":
        return "linear", implementation(step=step_of(**bug.parts))
    if bug.breaks == "start":
        return kind, SimpleNamespace(**vars(OURS[kind]) | {"init": start_of(**bug.parts)})
    if bug.breaks == "codes":
        return kind, SimpleNamespace(**vars(OURS[kind]) | bug.parts)
    if bug.breaks == "output dtype":
        return kind, SimpleNamespace(**vars(OURS[kind]) | {"forward": OURS["linear"].forward})
    return kind, from_formulas(kind, bug.parts, shows=bug.shows)


def report_of(kind, wrong, dtype="float64"):
    if kind == "linear":
        return check(wrong, dtype=dtype)
    declared = kind.removesuffix("-full")
    return check(SimpleNamespace(forward=LINEAR["forward"], kinds={declared: wrong}), dtype=dtype).kinds[declared]


EVERY_BUG = [
    pytest.param(bug, id=bug.flag, marks=() if number % 3 == 0 else pytest.mark.long) for number, bug in enumerate(BUGS)
]
"""A third of the rows in the default run, and all of them with `-m "long or not long"`."""


@pytest.mark.parametrize("bug", EVERY_BUG)
def test_a_known_bug_is_named(bug):
    report = report_of(*planted(bug))
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(bug.name)
    assert bug.source in text
    assert report.claims[bug.breaks] != "ok"


OF_LAYERS = [bug for bug in BUGS if bug.breaks in OF_NUMBERS]


@pytest.mark.parametrize("bug", OF_LAYERS[::12], ids=lambda bug: bug.flag)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_a_known_bug_is_named_in_lower_precision_too(bug, dtype):
    assert report_of(*planted(bug), dtype).diagnoses[0].startswith(bug.name)


@pytest.mark.parametrize("kind", SETS)
def test_the_formulas_without_a_bug_pass(kind):
    report = report_of(kind, from_formulas(kind))
    assert report.passed, str(report)


def test_a_start_and_an_adam_without_a_bug_pass():
    report = check(with_kinds(linear=implementation(init=start_of(), step=step_of()), conv2d=SimpleNamespace(
        **vars(OURS["conv2d"]) | {"init": start_of()})))  # fmt: skip
    assert report.passed, str(report)


@pytest.mark.parametrize("problem", [Problem(3, 4, 1, 2), Problem(3, 1, 4, 2)], ids=["one output", "one input"])
def test_doras_formulas_hold_at_a_width_of_one(problem):
    """There the shape of a norm does not say which axis it was taken along."""
    trial = Trial.draw(problem, "float64", SETS["dora-full"].formulas)
    p, full = trial.arrays, functions_of(full_norm)
    layer = [p["weight"], p["bias"], p["lora_A"], p["lora_B"], problem.alpha, p["magnitude"]]
    found = {"y": full.forward(p["x"], *layer), **full.backward(p["dy"], p["x"], *layer)}
    assert found.keys() == trial.right.keys() - {"merged"}
    assert [name for name, answer in found.items() if not trial.agrees(name, answer)] == []


FLAGS = Path(__file__).with_name("flags.txt").read_text(encoding="utf-8").split()
"""Those that minilora 0.3 has. Programs keep them, so they stay, whatever sentence comes to stand beside them."""


def test_each_bug_has_a_flag_of_its_own():
    flags = [bug.flag for bug in BUGS]
    assert len(set(flags)) == len(flags)
    assert [flag for flag in flags if not re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", flag)] == []


def test_a_flag_stays():
    assert len(FLAGS) == 81
    assert set(FLAGS) <= {bug.flag for bug in BUGS}


def test_a_bug_is_of_known_kinds_and_claims():
    for bug in BUGS:
        assert set(bug.kinds) <= ({"adam"} if bug.breaks == "adam" else set(SETS))
        assert bug.breaks in contract(bug.kinds[0])
        assert str(bug) == bug.name + (f" (made in {bug.source})" if bug.source else "")


@pytest.mark.parametrize(
    ("shows", "where"),
    [
        (("y", "x", "lora_A", "lora_B"), ", in the output, dx, lora_A's gradient and lora_B's gradient alone"),
        (("y",), ", in the output alone"),
        (("merged",), ", in the merged weight alone"),
        (None, ", in all that is computed"),
    ],
)
def test_where_a_bug_shows_is_told(shows, where):
    wrong = from_formulas("linear", {"scaling": SCALINGS["alpha"]}, shows=shows)
    (text,) = check(wrong).diagnoses
    assert text.startswith(f"{BUGS[0].name}{where} (made in rasbt/LLMs-from-scratch #821")


def test_a_scaling_may_be_declared():
    plain = from_formulas("linear", {"scaling": SCALINGS["alpha"]})
    assert not check(plain).passed
    plain.scaling = "alpha"
    assert check(plain).passed
    wrong = from_formulas("linear", {"scaling": lambda alpha, r: alpha / (r + 0.5)})
    said = check(wrong).claims["scaling"]
    assert said.startswith("the update is multiplied by 1.2, expected 1.5 (N=7 in=5 out=3 r=2 alpha=3)")
    (text,) = check(wrong).diagnoses
    first = "1.2 at in=5 out=3 r=2 alpha=3, expected 1.5; 2.22222 at in=3 out=6 r=4 alpha=10, expected 2.5; "
    assert text.startswith(f"the update has another scaling: {first}")
    assert text.endswith("in all that is computed")


def test_another_scaling_is_told_beside_the_declared_one():
    report = report_of("rslora", from_formulas("rslora", {"scaling": lambda alpha, r: alpha / (r + 0.5)}))
    assert report.claims["scaling"].startswith("the update is multiplied by 1.2, expected 2.12132 (")
    assert report.diagnoses[0].startswith(
        "the update has another scaling: 1.2 at in=5 out=3 r=2 alpha=3, expected 2.12132;"
    )


def test_another_scaling_is_told_where_it_is_another():
    def forward(x, weight, bias, *arrays):
        return x @ weight.T if bias is None else LINEAR["forward"](x, weight, bias, *arrays)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(
        "the update has another scaling, wherever there is no bias: 0 at in=3 out=6 r=4 alpha=10, expected 2.5; "
    )


HOW = {
    "it is 1.25 times the right one": lambda alpha, r: 1.25 * alpha / r,
    "it is -1 times the right one": lambda alpha, r: -alpha / r,
    "it is the right one rounded to float16": lambda alpha, r: float(np.float16(alpha / r)),
    "it is the right one in single precision": lambda alpha, r: float(np.float32(1) / np.float32(r)) * alpha,
    "it is that of the first problem everywhere (is something kept between calls?)": lambda alpha, r: 1.5,
}


@pytest.mark.parametrize("how", HOW)
def test_how_another_scaling_comes_from_the_right_one_is_told(how):
    (text,) = check(from_formulas("linear", {"scaling": HOW[how]})).diagnoses
    assert text.startswith("the update has another scaling: ")
    assert text.endswith(f"; {how}, in all that is computed")


def test_a_scaling_without_a_rule_has_none_told():
    (text,) = check(from_formulas("linear", {"scaling": lambda alpha, r: alpha / (r + 1)})).diagnoses
    assert "; it is" not in text


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda p: len(p["x"]) > 128, "for more than 128 rows"),
        (lambda p: len(p["weight"]) > 128, "for more than 128 outputs"),
        (lambda p: len(p["lora_A"]) > 32, "at ranks above 32"),
        (lambda p: len(p["lora_A"]) % 32 == 0, "at a rank that is a multiple of 32"),
    ],
)
def test_what_is_wrong_beyond_a_tile_alone_is_told(wrong, where):
    def forward(x, weight, bias, A, B, alpha):
        y = LINEAR["forward"](x, weight, bias, A, B, alpha)
        return 1.01 * y if wrong({"x": x, "weight": weight, "lora_A": A}) else y

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {where}, is off by ")


@pytest.mark.parametrize(("axis", "block"), [("rows", 64), ("in", 128), ("out", 64), ("rank", 16)])
def test_what_is_left_over_after_a_block_is_missed(axis, block):
    n, i, o, r = (block if name == axis else None for name in ("rows", "in", "out", "rank"))

    def forward(x, weight, bias, A, B, alpha):
        y = LINEAR["forward"](x[:, :i], weight[:, :i], bias, A[:r, :i], B[:, :r], alpha * len(A[:r]) / len(A))
        y[n or len(y) :], y[:, o or y.shape[1] :] = 0, 0
        return y

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert " is off by " in text
    assert text.endswith("(N=67 in=130 out=69 r=17 alpha=24)")


def test_two_bugs_at_once_are_both_named():
    one = from_formulas("linear", {"dx_base": 0.0, "s_in_dB": lambda s: 1.0})
    assert [text[:25] for text in check(one).diagnoses] == ["dx lacks dy W: the base p", "lora_B's gradient lacks t"]


def test_a_bug_on_top_of_another_is_named():
    both = from_formulas("linear", {"dx_base": 0.0, "scaling": SCALINGS["alpha"]})
    first, second = check(both).diagnoses
    assert first.startswith("alpha is not divided by the rank")
    assert second.startswith("dx lacks dy W")


def test_two_bugs_in_one_number_are_named_together():
    both = from_formulas("linear", {"bias": lambda b, G: 0 * b, "scaling": SCALINGS["alpha"]}, shows=("y",))
    (text,) = check(both).diagnoses
    assert text.startswith("alpha is not divided by the rank")
    assert "and, at once, the output lacks the bias" in text


def test_both_of_two_bugs_have_their_sources():
    both = from_formulas("linear", {"dx_base": 0.0, "scaling": SCALINGS["alpha"]}, shows=("x",))
    (text,) = check(both).diagnoses
    assert "and, at once, dx lacks dy W" in text
    assert text.endswith(" (made in rasbt/LLMs-from-scratch #821, Blaizzy/mlx-vlm #846, lora-pytorch 0.2.0)")
    assert "at once" not in str(check(both, dtype="bfloat16"))  # there two of many fit by chance


def test_a_wrong_number_that_nobody_knows_is_described():
    def forward(x, *arrays):
        return 1.25 * LINEAR["forward"](x, *arrays)

    (text,) = check(implementation(forward=forward)).diagnoses
    assert text.startswith("the output is off by ")
    assert "every entry is off by the factor 1.25" in text
    assert text.endswith("(N=7 in=5 out=3 r=2 alpha=3)")


@pytest.mark.parametrize("size", [1e-12, 1e-9])
def test_an_error_of_a_billionth_fails_in_float64(size):
    def backward(dy, x, *arrays):
        grads = LINEAR["backward"](dy, x, *arrays)
        return {**grads, "lora_A": grads["lora_A"] + size}

    assert not check(implementation(backward=backward)).passed


def test_single_precision_inside_double_is_named():
    def forward(x, *arrays):
        single = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in (x, *arrays)]
        return LINEAR["forward"](*single).astype(np.float64)

    (text,) = check(implementation(forward=forward)).diagnoses
    assert text.startswith("the output: right to float32 only: computed, or kept, in single precision")
    assert check(implementation(forward=forward), dtype="float32").passed


def test_a_right_layer_with_other_sums_passes_at_4096():
    """In float32, added up one term after another, the worst order there is."""
    trial = Trial.draw(Problem(2, 4096, 33, 5, alpha=3.0), "float32", RIGHT)
    p = trial.arrays
    terms = p["x"][:, None, :] * p["weight"][None]
    total = np.cumsum(terms, axis=-1, dtype=np.float32)[..., -1]
    h = np.cumsum(p["x"][:, None, ::-1] * p["lora_A"][None, :, ::-1], axis=-1, dtype=np.float32)[..., -1]
    y = total + p["bias"] + np.float32(3 / 5) * (h @ p["lora_B"].T)
    assert y.dtype == np.float32
    assert trial.agrees("y", y)
    assert not trial.agrees("y", y * np.float32(1.001))


def test_weights_may_lie_the_other_way():
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        y = x @ weight + alpha / lora_A.shape[1] * (x @ lora_A @ lora_B)
        return y if bias is None else y + bias

    def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
        s = alpha / lora_A.shape[1]
        dh = s * dy @ lora_B.T
        return {"x": dy @ weight.T + dh @ lora_A.T, "lora_A": x.T @ dh, "lora_B": s * (x @ lora_A).T @ dy}

    def merge(weight, lora_A, lora_B, alpha):
        return weight + alpha / lora_A.shape[1] * lora_A @ lora_B

    article = SimpleNamespace(forward=forward, backward=backward, merge=merge, orientation="in, out")
    report = check(article)
    assert report.passed, str(report)
    with pytest.raises(CannotRun, match="forward raises ValueError: matmul"):
        check(SimpleNamespace(**{**vars(article), "orientation": "out, in"}))


def test_an_embeddings_factors_may_lie_the_other_way():
    """Its table (V, dim) lies so already."""

    def forward(ids, table, bias, lora_A, lora_B, alpha):
        return table[ids] + alpha / lora_A.shape[1] * lora_A[ids] @ lora_B

    def backward(dy, ids, table, bias, lora_A, lora_B, alpha):
        s, dA = alpha / lora_A.shape[1], np.zeros_like(lora_A)
        np.add.at(dA, ids, s * dy @ lora_B.T)
        return {"lora_A": dA, "lora_B": s * lora_A[ids].T @ dy}

    def merge(table, lora_A, lora_B, alpha):
        return table + alpha / lora_A.shape[1] * lora_A @ lora_B

    rows = SimpleNamespace(forward=forward, backward=backward, merge=merge, orientation="in, out")
    report = check(with_kinds(embedding=rows)).kinds["embedding"]
    assert report.passed, str(report)
    assert report.claims["merge"] == report.claims["slope"] == "ok"


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("orientation", ["out, in", "in, out"])
@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("rslora", "dora"))]
)
def test_the_base_may_lie_otherwise_than_the_factors(kind, orientation, fan_in_fan_out):
    ours = OURS[kind]

    def turned(W, A, B):
        W = W.T if fan_in_fan_out else W
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
        return merged.T if fan_in_fan_out else merged

    mine = SimpleNamespace(forward=forward, backward=backward, merge=merge, orientation=orientation)
    mine.fan_in_fan_out = fan_in_fan_out
    report = report_of(kind, mine)
    assert report.passed, str(report)
    mine.fan_in_fan_out = not fan_in_fan_out
    assert not report_of(kind, mine).passed


def test_a_gradient_of_lower_precision_than_its_output_fails():
    def backward(dy, x, *arrays):
        grads = LINEAR["backward"](dy, x, *arrays)
        return {**grads, "lora_A": grads["lora_A"].astype(np.float32)}

    report = check(implementation(backward=backward))
    assert report.dtype == "float64"
    assert report.diagnoses[0].startswith("lora_A's gradient: right to float32 only")


def test_gradients_of_single_precision_alone_are_seen():
    """Keras keeps its factors in float32 beside a base in float64."""

    def single(function):
        def rounded(*arrays):
            return LINEAR[function](*(a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in arrays))

        return rounded

    def forward(*arrays):
        return single("forward")(*arrays).astype(np.float64)

    report = check(SimpleNamespace(forward=forward, backward=single("backward")))
    assert report.passed, str(report)
    assert report.dtype == "float32"


def test_what_the_last_forward_left_behind_is_no_argument():
    left = []

    def forward(x, *arrays):
        left.append(x)
        return LINEAR["forward"](x, *arrays)

    def backward(dy, x, *arrays):
        return LINEAR["backward"](dy, left[-1], *arrays)

    (text,) = check(implementation(forward=forward, backward=backward)).diagnoses
    assert text == "lora_A's gradient is another one the second time it is asked for: something is kept between calls"


def test_what_is_not_finite_is_null_in_json():
    report = check(implementation(merge=lambda weight, *arrays: weight + np.nan))
    assert report.errors["merged"] == float("inf")
    assert report.claims["merge"] == "the merged weight is not finite (N=7 in=5 out=3 r=2 alpha=3)"
    assert report.habits["same bits twice"] == "ok"
    assert report.as_dict()["errors"]["merged"] is None
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["passed"] is False
    assert report.as_dict()["habits"] == report.habits


# --- the other claims -----------------------------------------------------------------------------


def test_what_is_changed_is_told_first_and_other_claims_last():
    def backward(dy, x, *arrays):
        grads = LINEAR["backward"](dy, x, *arrays)
        dy *= 2
        return {**grads, "lora_A": grads["lora_A"] + 1, "lora_B": 1.37 * grads["lora_B"]}

    found = check(implementation(backward=backward, init=lambda *sizes: None)).diagnoses
    begins = [
        "backward changes dy",
        "lora_B's gradient is off by ",
        "lora_A's gradient is off by ",
        "init returns None",
    ]
    assert len(found) == len(begins)
    assert all(text.startswith(said) for text, said in zip(found, begins, strict=True))
    assert "every entry is off by the factor 1.37" in found[1]  # a factor is what one can act on


def test_a_gradient_in_the_place_of_another_is_told():
    def backward(*arrays):
        grads = LINEAR["backward"](*arrays)
        return {**grads, "lora_A": grads["lora_B"], "lora_B": grads["lora_A"]}

    said = check(implementation(backward=backward)).claims["slope"]
    assert said == (
        "lora_B's gradient is where lora_A's gradient belongs; lora_A's gradient is where lora_B's gradient belongs"
    )


def test_a_transposed_weight_is_told():
    report = check(implementation(merge=lambda *arrays: LINEAR["merge"](*arrays).T))
    assert report.claims["merge"] == "the merged weight is transposed (N=7 in=5 out=3 r=2 alpha=3)"


def test_an_argument_that_is_changed_is_named():
    def backward(dy, x, *arrays):
        dy *= 2
        return LINEAR["backward"](dy / 2, x, *arrays)

    report = check(implementation(backward=backward))
    assert report.claims["nothing is changed"] == "backward changes dy, which belongs to the caller"
    assert report.diagnoses == ["backward changes dy, which belongs to the caller"]


@pytest.mark.parametrize(
    ("names", "said"), [(["weight"], "weight"), (["bias"], "bias"), (["weight", "bias"], "bias and weight")]
)
def test_a_gradient_of_the_frozen_base_is_named(names, said):
    def backward(dy, x, weight, *arrays):
        base = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        return {**LINEAR["backward"](dy, x, weight, *arrays), **{name: base[name] for name in names}}

    assert check(implementation(backward=backward)).diagnoses == [f"backward returns gradients of the frozen {said}"]


STARTS = {
    "both factors start at zero": lambda A, B, r: (0 * A, B),
    "neither factor starts at zero": lambda A, B, r: (A, B + 1),
    "A's start has the spread of fan r = 9, not fan in = 400": lambda A, B, r: (A * (A.shape[1] / r) ** 0.5, B),
    "A's start has the spread of fan out = 100, not fan in = 400": lambda A, B, r: (
        A * (A.shape[1] / len(B)) ** 0.5,
        B,
    ),
    "A's start has the spread 2.8": lambda A, B, r: (100 * A, B),
    "A's start has the spread 2.89e-07; PEFT's is 1 / sqrt(3 in) = 0.0289": lambda A, B, r: (1e-5 * A, B),
    "lora_A starts with rank 8, expected 9": lambda A, B, r: (np.concatenate([A[:-1], A[:1]]) if r == 9 else A, B),
    "lora_B starts with numbers that are not finite": lambda A, B, r: (A, B + np.nan),
    "lora_A starts with rank 1, expected 9": lambda A, B, r: (0 * A + A[:1], B),
    "A's start has the mean 0.02": lambda A, B, r: ((A + 0.05) / 2, B),
    "A's start has the spread 0.00144, of 1 / in": lambda A, B, r: (A / A.shape[1] ** 0.5, B),
    r"lora_A starts with shape \(400, 9\), expected \(9, 400\)": lambda A, B, r: (A.T, B),
}


@pytest.mark.parametrize("said", STARTS)
def test_a_wrong_start_is_named(said):
    def wrong(in_features, out_features, rank, rng):
        return STARTS[said](*init(in_features, out_features, rank, rng), rank)

    (text,) = check(implementation(init=wrong)).diagnoses
    assert text.startswith(said.replace("\\", ""))


@pytest.mark.parametrize(
    "start", ["uniform", "he_uniform", "N(0, 1)", "N(0, 1/r)", "N(0, 1/r^2)", "N(0, 1/in)", "A zero"]
)
def test_other_starts_in_use_are_right_too(start):
    def other(in_features, out_features, rank, rng):
        A, B = init(in_features, out_features, rank, rng)
        normal = rng.standard_normal(A.shape)
        starts = {
            "he_uniform": 6**0.5 * A,
            "N(0, 1)": normal,
            "N(0, 1/r)": normal / rank**0.5,
            "N(0, 1/r^2)": normal / rank,
            "N(0, 1/in)": normal / in_features**0.5,
        }
        return (0 * A, rng.standard_normal(B.shape)) if start == "A zero" else (starts.get(start, A), B)

    assert check(implementation(init=other)).claims["start"] == "ok"


SPREADS = {
    "uniform(-0.1, 0.1)": lambda rng, shape: rng.uniform(-0.1, 0.1, shape),
    "0.0547": lambda rng, shape: 0.0547 * rng.standard_normal(shape),
    "0.2": lambda rng, shape: 0.2 * rng.standard_normal(shape),
    "0.47": lambda rng, shape: 0.47 * rng.standard_normal(shape),
}


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("spread", SPREADS)
def test_a_spread_of_no_fan_is_described_only(spread, kind):
    def other(in_features, out_features, rank, rng, kernel=()):
        A, B = init(in_features, out_features, rank, rng, kernel)
        return SPREADS[spread](rng, A.shape), B

    report = report_of(kind, SimpleNamespace(**vars(OURS[kind]) | {"init": other}))
    assert report.claims["start"] == "ok"
    assert not report.diagnoses
    assert report.habits["spread of A"].endswith(": the same at every width; PEFT's is 1 / sqrt(3 in)")


@pytest.mark.parametrize("gain", [1, 3**0.5, 6**0.5, 2, 10])
def test_a_start_that_follows_the_width_is_no_habit(gain):
    def other(*sizes, **more):
        A, B = init(*sizes, **more)
        return gain * A, B

    report = check(implementation(init=other))
    assert report.claims["start"] == "ok"
    assert "spread of A" not in report.habits


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda m, W: np.linalg.norm(W, axis=0),
            "DoRA's magnitude starts with 400 entries, one for each input, expected 100",
        ),
        (lambda m, W: 0 * m + 1, "DoRA's magnitude does not start as the length of each row"),
        (lambda m, W: m[:-1], "DoRA's magnitude does not start as the length of each row"),
        (lambda m, W: m[:, None], "ok"),
    ],
)
def test_a_magnitudes_start_is_the_length_of_each_row(change, said):
    def start(in_features, out_features, rank, rng, weight):
        A, B, m = OURS["dora"].init(in_features, out_features, rank, rng, weight)
        return A, B, change(m, weight)

    report = report_of("dora", SimpleNamespace(**vars(OURS["dora"]) | {"init": start}))
    assert report.claims["start"].startswith(said)


def test_a_start_that_takes_no_generator_is_described_only():
    def start(in_features, out_features, rank, rng):
        return init(in_features, out_features, rank, np.random.default_rng(0))

    report = check(implementation(init=start))
    assert report.passed
    assert report.habits["start"] == "the same numbers from two generators: all adapters of one size start alike"
    assert "start" not in check(implementation(init=init)).habits


def test_a_start_is_asked_for_two_sizes():
    def other(in_features, out_features, rank, rng):
        A, B = init(in_features, out_features, rank, rng)
        return (A if in_features == 400 else A.T), B

    (text,) = check(implementation(init=other)).diagnoses
    assert text == "lora_A starts with shape (150, 30), expected (30, 150)"


def test_an_embedding_may_start_either_factor_at_zero():
    """A is not multiplied with x there, so no spread is asked of it."""
    both = (lambda i, o, r, rng: (rng.standard_normal((r, i)), np.zeros((o, r))), OURS["embedding"].init)
    for start in both:
        functions = SimpleNamespace(**vars(OURS["embedding"]) | {"init": start})
        report = report_of("embedding", functions)
        assert report.claims["start"] == "ok"
        assert "spread of A" not in report.habits


def test_a_start_that_is_no_pair_is_named():
    assert check(implementation(init=lambda *sizes: None)).diagnoses == [
        "init returns None, expected lora_A and lora_B"
    ]


def adam(eps_inside=False, correction=True, root=True, gradient=False, betas=(0.9, 0.999), decay=0.0, norm=np.inf):
    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        (beta1, beta2), t, new = betas, t + 1, {}
        whole = sum((g * g).sum() for g in grads.values()) ** 0.5
        for k, g in grads.items():
            g = g * min(1, norm / whole)
            m[k], v[k] = beta1 * m[k] + (1 - beta1) * g, beta2 * v[k] + (1 - beta2) * g * g
            a, b = (m[k] / (1 - beta1**t), v[k] / (1 - beta2**t)) if correction else (m[k], v[k])
            below = np.sqrt(b + 1e-8) if eps_inside else (np.sqrt(b) if root else b) + 1e-8
            new[k] = params[k] - 1e-3 * (g if gradient else a / below + decay * params[k])
        return new, (m, v, t)

    return step


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"eps_inside": True}, "Adam's eps stands inside the root"),
        ({"correction": False}, "Adam has no bias correction"),
        ({"root": False}, "Adam divides by v, not by its root"),
        ({"gradient": True}, "the step is plain gradient descent"),
        ({"betas": (0.999, 0.9)}, "Adam's betas are exchanged"),
        ({"decay": 0.01}, "a weight decay of 0.01 is added to Adam's step, as in AdamW"),
    ],
)
def test_a_wrong_adam_is_named(options, said):
    assert check(implementation(step=adam(**options))).diagnoses == ([said] if said else [])


def test_adam_may_keep_single_precision_if_declared():
    def single(params, grads, state):
        new, state = adam()(params, grads, state)
        return {name: p.astype(np.float32).astype(np.float64) for name, p in new.items()}, state

    assert check(implementation(step=single), dtype="float32").claims["adam"] == "ok"
    assert check(implementation(step=single)).claims["adam"] != "ok"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (adam(betas=(0.9, 0.99)), "end elsewhere: lora_B is -2.319252 at [1, 0], expected -2.319235"),
        (adam(norm=1.0), "end elsewhere: lora_A is "),
        (step_of(step=lambda d, theta, g: 10 * d), "Adam's steps are 10 times as long as they should be, with lr 1e-3"),
        (
            step_of(step=lambda d, theta, g: d / 4),
            "Adam's steps are 0.25 times as long as they should be, with lr 1e-3",
        ),
        (lambda params, grads, state: (params, state), "the step moves nothing"),
        (lambda params, grads, state: params, "step returns a dict, expected the two params and state"),
        (
            lambda params, *_: ({k: np.zeros(5) for k in params}, 0),
            "lora_A has shape (5,) after ten steps of Adam, expected (2, 5)",
        ),
        (lambda params, *_: ({k: p + np.nan for k, p in params.items()}, 0), "lora_A is not finite after ten steps"),
    ],
)
def test_an_adam_that_nobody_knows_is_described(step, said):
    (text,) = check(implementation(step=step)).diagnoses
    assert said in text


def test_habits_are_told_and_do_not_count():
    rng = np.random.default_rng(0)

    def forward(x, *arrays):
        if not x.flags.c_contiguous:
            raise TypeError("C order only")
        return LINEAR["forward"](x, *arrays).astype(np.longdouble) * (1 + np.longdouble(1e-16) * rng.standard_normal())

    report = check(implementation(forward=forward))
    assert report.passed
    assert report.habits["dtype kept"] == "longdouble is returned for float64".replace(
        "longdouble", str(np.dtype(np.longdouble))
    )
    assert report.habits["same bits twice"] == "two calls differ"
    assert report.habits["memory order"].startswith("in Fortran order forward raises TypeError: C order only (N=7")


# --- what cannot be run ---------------------------------------------------------------------------


def test_without_a_forward_nothing_can_be_checked():
    with pytest.raises(CannotRun, match=r"thing has no function forward\(x, weight, bias, lora_A, lora_B, alpha\)"):
        check(SimpleNamespace(backward=LINEAR["backward"]), name="thing")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("dtype", "float8", "float8"),
        ("scaling", "r", "scaling of thing .* 'r'"),
        ("orientation", "sideways", "sideways"),
        ("fan_in_fan_out", "yes", "fan_in_fan_out of thing must be True or False, got 'yes'"),
        ("kinds", {"vera": 1}, "vera"),
        ("kinds", ["dora"], "kinds of thing must be a dict of objects, got list"),
    ],
)
def test_what_is_declared_must_be_known(name, value, said):
    with pytest.raises(CannotRun, match=said):
        check(implementation(**{name: value}), name="thing")


def test_a_gradient_that_is_not_returned_is_named():
    def backward(*arrays):
        return {name: grad for name, grad in LINEAR["backward"](*arrays).items() if name != "lora_A"}

    report = check(implementation(backward=backward))
    assert report.diagnoses == ["backward returns no gradient of lora_A; it returns those of x, lora_B"]
    assert report.claims["slope"] == report.diagnoses[0]


WRONG_WHERE = {
    "with the sizes of an earlier problem (is something kept between calls?)": lambda W, b, A, B, alpha: alpha == 4.5,
    "with lora_A's shape of an earlier problem (is something kept between calls?)": lambda W, b, A, B, alpha: (
        alpha == 4.5 or len(B) == 133),
    "where in = out": lambda W, b, A, B, alpha: W.shape[0] == W.shape[1],
    "where in and out differ": lambda W, b, A, B, alpha: W.shape[0] != W.shape[1],
    "where in is below out": lambda W, b, A, B, alpha: W.shape[1] < W.shape[0],
    "where in is above out": lambda W, b, A, B, alpha: W.shape[1] > W.shape[0],
    "where the rank is above a width": lambda W, b, A, B, alpha: len(A) > A.shape[1] or len(A) > len(B),
    "in wide layers": lambda W, b, A, B, alpha: W.shape[1] > 100,
    "in layers that are not wide": lambda W, b, A, B, alpha: W.shape[1] <= 100,
    "wherever there is a bias": lambda W, b, A, B, alpha: b is not None,
    "wherever there is no bias": lambda W, b, A, B, alpha: b is None,
    "at rank 1": lambda W, b, A, B, alpha: len(A) == 1,
    "where alpha is below the rank": lambda W, b, A, B, alpha: alpha / len(A) < 1,
    "where alpha is above the rank": lambda W, b, A, B, alpha: alpha / len(A) > 1,
    "where alpha / r is no whole number": lambda W, b, A, B, alpha: alpha / len(A) != round(alpha / len(A)),
    "where lora_B is zero": lambda W, b, A, B, alpha: not B.any(),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("words", WRONG_WHERE)
def test_what_the_wrong_problems_have_in_common_is_told(words):
    def forward(x, *layer):
        return LINEAR["forward"](x, *layer) + WRONG_WHERE[words](*layer)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")


@pytest.mark.parametrize(("words", "few"), [("at a single row", True), ("for more than one row", False)])
def test_how_many_rows_are_wrong_is_told(words, few):
    def forward(x, *layer):
        return LINEAR["forward"](x, *layer) + ((len(x) == 1) == few)

    (text,) = check(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")


WRONG_STEPS = {
    "where the kernel has more than one entry": lambda kernel, stride, padding, dilation, groups: kernel != (1, 1),
    "at a stride above 1": lambda kernel, stride, padding, dilation, groups: stride != (1, 1),
    "with padding": lambda kernel, stride, padding, dilation, groups: padding != (0, 0),
    "with dilation": lambda kernel, stride, padding, dilation, groups: dilation != (1, 1),
    "with groups": lambda kernel, stride, padding, dilation, groups: groups != 1,
}


@pytest.mark.long
@pytest.mark.parametrize("words", WRONG_STEPS)
def test_what_the_wrong_convolutions_have_in_common_is_told(words):
    right = from_formulas("conv2d")

    def forward(x, weight, *layer, stride, padding, dilation, groups):
        steps = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        return right.forward(x, weight, *layer, **steps) + WRONG_STEPS[words](weight.shape[2:], **steps)

    (text,) = check(with_kinds(conv2d=SimpleNamespace(forward=forward))).kinds["conv2d"].diagnoses
    assert text.startswith(f"the output, {words}, is off by 1 at ")


def test_an_error_is_the_largest_beside_the_largest_entry():
    """It grows with the rows, and the problem that has most is not the last."""

    def forward(x, *layer):
        y = LINEAR["forward"](x, *layer)
        y[np.unravel_index(abs(y).argmax(), y.shape)] *= 1 + 0.01 * len(x)
        return y

    errors = check(implementation(forward=forward)).errors
    assert errors["y"] == pytest.approx(0.01 * max(problem.n for problem in SETS["linear"].problems), rel=1e-9)
    assert errors["merged"] < 1e-14


STEPS = {
    "if stride were 1": lambda stride, padding, dilation: (1, padding, dilation),
    "without padding": lambda stride, padding, dilation: (stride, 0, dilation),
    "if dilation were 1": lambda stride, padding, dilation: (stride, padding, 1),
    "if stride and dilation were exchanged": lambda stride, padding, dilation: (dilation, padding, stride),
    "if a step of two axes were exchanged": lambda *steps: tuple(step[::-1] for step in steps),
}


@pytest.mark.parametrize("words", STEPS)
def test_steps_that_give_an_outputs_shape_are_told(words):
    def forward(*arrays, stride, padding, dilation):
        steps = zip(("stride", "padding", "dilation"), STEPS[words](stride, padding, dilation), strict=True)
        return OURS["conv2d"].forward(*arrays, **dict(steps))

    report = check(with_kinds(conv2d=SimpleNamespace(forward=forward))).kinds["conv2d"]
    (text,) = report.diagnoses
    assert f", as it would be {words} (N=" in text


def test_where_a_gradient_must_be_zero_it_says_nothing():
    """Where lora_B is zero, so is lora_A's gradient, and twice that is right: it says nothing of the bias."""

    def backward(dy, x, weight, bias, *arrays):
        grads = LINEAR["backward"](dy, x, weight, bias, *arrays)
        return grads if bias is None else {**grads, "lora_A": 2 * grads["lora_A"]}

    (text,) = check(implementation(backward=backward)).diagnoses
    assert text.startswith("lora_A's gradient, wherever there is a bias, is off by ")


def test_an_exception_on_one_problem_is_a_broken_claim():
    def forward(x, weight, bias, *arrays):
        return LINEAR["forward"](x, weight, bias + 0, *arrays)

    report = check(implementation(forward=forward))
    assert not report.passed
    assert report.claims["forward"].startswith("forward, wherever there is no bias, raises TypeError: ")
    assert "no bias" in report.diagnoses[0]


@pytest.mark.parametrize("function", ["backward", "merge", "init", "step"])
def test_a_function_that_ends_the_process_raises(function):
    def ends(*arguments):
        raise SystemExit(0)

    report = check(implementation(**{function: ends}))
    (text,) = report.diagnoses
    assert text.startswith(f"{function} raises SystemExit: 0")
    wrong = {claim for claim, verdict in report.claims.items() if verdict not in NOT_FAILED}
    assert wrong == {{"backward": "slope", "merge": "merge", "init": "start", "step": "adam"}[function]}


def test_a_message_of_several_lines_is_told_on_one():
    def backward(*arrays):
        raise RuntimeError("one\n  two")

    def merge(*arrays):
        raise NotImplementedError

    report = check(implementation(backward=backward, merge=merge))
    assert report.claims["slope"].startswith("backward raises RuntimeError: one two (N=7")
    assert report.claims["merge"].startswith("merge raises NotImplementedError (N=7")


@pytest.mark.parametrize(("value", "said"), [("y", "a str"), ((1, 2), "a tuple of 2"), (None, "None")])
def test_what_is_no_array_is_no_answer(value, said):
    report = check(implementation(merge=lambda *arrays: value))
    assert report.claims["merge"].startswith(f"merge returns {said}, expected one array (N=7 ")


def test_an_exception_on_every_problem_cannot_be_checked():
    with pytest.raises(CannotRun, match="forward raises ZeroDivisionError: division by zero"):
        check(SimpleNamespace(forward=lambda *a: 1 / 0))


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


def test_every_problem_can_tell_a_scaling():
    for problem in (p for kind in DECLARED for p in SETS[kind].problems if p.rank > 1):
        s = problem.alpha / problem.rank
        assert len({round(v, 9) for v in (s, 1.0, problem.alpha, 1 / s, s * s, 1 / problem.rank)}) >= 5


# --- from the command line ------------------------------------------------------------------------

MODULE = """
import numpy as np

def forward(x, weight, bias, lora_A, lora_B, alpha):
    y = x @ weight.T + alpha / len(lora_A) * x @ lora_A.T @ lora_B.T
    return y if bias is None else y + bias

class wrong:
    @staticmethod
    def forward(x, weight, bias, lora_A, lora_B, alpha):
        return forward(x, weight, bias, lora_A, lora_B, alpha * len(lora_A))
"""


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("my_lora", 0, "my_lora: passed, in float64; 1 of 5 functions offered"),
        ("my_lora:wrong", 1, "alpha is not divided by the rank"),
        pytest.param("my_lora.py:wrong", 1, "alpha is not divided by the rank", marks=pytest.mark.long),
        pytest.param("./my_lora.py", 0, "./my_lora.py: passed", marks=pytest.mark.long),
        pytest.param("my_lora:nothing", 2, "my_lora:nothing could not be checked: ", marks=pytest.mark.long),
        pytest.param("no_such", 2, "no_such could not be checked: No module named 'no_such'", marks=pytest.mark.long),
    ],
)
def test_the_command_line_checks_a_module(tmp_path, monkeypatch, capfd, target, code, said):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["conformance", target, "--json", "found.json"]) == code
    out, err = capfd.readouterr()
    assert (out if code < 2 else err).startswith(said)
    assert (tmp_path / "found.json").exists() is (code < 2)
    if code < 2:
        assert not err
        found = json.loads((tmp_path / "found.json").read_text())
        assert (found["passed"], found["status"]) == (code == 0, code)
        assert set(found["versions"]) == {"minilora", "numpy", "python"}
        assert [case["id"] for case in found["cases"] if case["failed"]] == found["failing"] == found["unexpected"]
        assert found["functions"] == {"forward": True, "backward": False, "merge": False, "init": False, "step": False}


@pytest.mark.parametrize(
    ("target", "content", "said"),
    [
        (
            "raises_now",
            "x = 1\nraise RuntimeError('boom')",
            "importing it raises RuntimeError: boom (raises_now.py, line 2)",
        ),
        ("exits_now", "raise SystemExit(0)", "importing it raises SystemExit: 0 (exits_now.py, line 1)"),
        ("no_python", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("no_python.py", "def forward(:", "importing it raises SyntaxError: invalid syntax (no_python.py, line 1)"),
        ("other/no_python.py", "", "there is no file 'other/no_python.py'"),
        ("./no_python", "", "expected the name of a module"),
        (":forward", "", "expected the name of a module"),
        ("needs_more", "import no_such_package", "No module named 'no_such_package'"),
    ],
)
def test_what_cannot_be_imported_is_said(tmp_path, monkeypatch, target, content, said):
    file = tmp_path / f"{target.removeprefix('./').removesuffix('.py').strip(':')}.py"
    if content:
        file.write_text(content + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises((CannotRun, ImportError)) as refused:
        imported(target)
    assert str(refused.value).startswith(said)


def test_a_file_is_imported_whatever_has_its_name(tmp_path, monkeypatch):
    """And the modules that lie beside it are found."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "string.py").write_text("from beside import forward\n", encoding="utf-8")
    (folder / "beside.py").write_text("forward = 'found'\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "modules", {**sys.modules})
    assert imported(f"{folder}/string.py:forward") == "found"


def test_the_command_knows_every_precision():
    assert set(command.DTYPES) == set(UNIT)
    assert command.TIMEOUT == apart.TIMEOUT == 20
