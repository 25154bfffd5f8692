"""The suite itself: it passes what is right, fails what is wrong, and names each known bug that is planted."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import Adam, Linear, LoRA, LoRALinear
from minilora.conformance import CannotRun, check
from minilora.conformance.diagnoses import BUGS
from minilora.conformance.problems import Problem
from minilora.conformance.reference import KINDS, RIGHT, RSLORA, Trial, round_to
from minilora.conformance.suite import PROBLEMS


def layer(weight, bias, lora_A, lora_B, alpha):
    return LoRALinear(Linear(weight, bias), LoRA(lora_A, lora_B, alpha))


def step(params, grads, state):
    state = state or Adam(params)
    state.step(grads)
    return state.params, state


def backward(dy, x, *arrays):
    built = layer(*arrays)
    dx, grads = built.backward(dy, built.forward(x)[1])
    return {"x": dx, **grads}


def init(in_features, out_features, rank, rng):
    lora = LoRA.init(in_features, out_features, rank=rank, alpha=1, rng=rng)
    return lora.lora_A, lora.lora_B


OURS = {
    "forward": lambda x, *arrays: layer(*arrays)(x),
    "backward": backward,
    "merge": lambda weight, A, B, alpha: layer(weight, None, A, B, alpha).merge().weight,
    "init": init,
    "step": step,
}


def implementation(**functions):
    return SimpleNamespace(**{**OURS, **functions})


def from_formulas(formulas, *, shows=None, right=RIGHT):
    """An implementation that answers by formulas: in what `shows`, and elsewhere by the right ones."""

    def answer(names, **arrays):
        alpha = arrays.pop("alpha")
        p = {name: np.asarray(a, np.float64) for name, a in arrays.items() if a is not None}
        wrong, good = formulas.answers(p, alpha), right.answers(p, alpha)
        return {n: (wrong if shows is None or n in shows else good)[n] for n in names}

    def forward(x, weight, bias, lora_A, lora_B, alpha):
        dy = np.zeros((len(x), len(weight)))
        given = {"weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B, "alpha": alpha}
        return answer(["y"], x=x, dy=dy, **given)["y"]

    def backward(dy, x, weight, bias, lora_A, lora_B, alpha):
        given = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "alpha": alpha}
        return answer(["x", "lora_A", "lora_B"], x=x, dy=dy, **given)

    def merge(weight, lora_A, lora_B, alpha):
        x, dy = np.zeros((1, weight.shape[1])), np.zeros((1, len(weight)))
        return answer(["merged"], x=x, dy=dy, weight=weight, lora_A=lora_A, lora_B=lora_B, alpha=alpha)["merged"]

    return SimpleNamespace(forward=forward, backward=backward, merge=merge)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_our_own_layer_passes_in_every_precision(dtype):
    report = check(implementation(), dtype=dtype, name="minilora")
    assert report.passed
    assert not report.diagnoses
    assert set(report.claims.values()) == {"ok"}
    assert str(report).startswith(f"minilora: passed, in {dtype}\n")


def test_what_is_missing_is_not_offered_and_not_failed():
    report = check(SimpleNamespace(forward=OURS["forward"]))
    assert report.passed
    assert report.claims["forward"] == report.claims["nothing is changed"] == "ok"
    assert {report.claims[c] for c in ("slope", "merge", "start", "adam", "frozen base")} == {"not offered"}


PLANTED = [bug for bug in BUGS if "rsLoRA's root is ignored" not in bug.name]


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_known_bug_is_named(bug):
    report = check(from_formulas(replace(RIGHT, **bug.parts), shows=bug.shows))
    assert not report.passed
    assert report.diagnoses == [str(bug)]
    assert str(report).startswith(f"{bug}\n")


@pytest.mark.parametrize("bug", PLANTED[::4], ids=lambda bug: bug.name)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_known_bug_is_named_in_lower_precision_too(bug, dtype):
    report = check(from_formulas(replace(RIGHT, **bug.parts), shows=bug.shows), dtype=dtype)
    assert report.diagnoses[0] == str(bug)


def test_a_root_that_is_ignored_is_named_under_rslora():
    right = from_formulas(RSLORA, right=RSLORA)
    assert check(SimpleNamespace(**OURS, kinds={"rslora": right})).passed
    report = check(SimpleNamespace(**OURS, kinds={"rslora": from_formulas(RIGHT)}))
    assert not report.passed
    assert not report.diagnoses
    assert report.kinds["rslora"].diagnoses[0].startswith("rsLoRA's root is ignored")
    assert "huggingface/peft #2733" in str(report)


def test_two_bugs_at_once_are_both_named():
    one = from_formulas(replace(RIGHT, dx_base=0.0, s_in_dB=lambda s: 1.0))
    assert [text[:25] for text in check(one).diagnoses] == ["dx lacks dy W: the base p", "lora_B's gradient lacks t"]


def test_a_wrong_number_that_nobody_knows_is_described():
    def forward(x, *arrays):
        return 1.25 * OURS["forward"](x, *arrays)

    (text,) = check(implementation(forward=forward)).diagnoses
    assert text.startswith("the output is off by ")
    assert "every entry is off by the factor 1.25" in text
    assert "(N=7 in=5 out=3 r=2 alpha=3)" in text


@pytest.mark.parametrize("size", [1e-12, 1e-9])
def test_an_error_of_a_billionth_fails_in_float64(size):
    def backward(dy, x, *arrays):
        grads = OURS["backward"](dy, x, *arrays)
        return {**grads, "lora_A": grads["lora_A"] + size}

    assert not check(implementation(backward=backward)).passed


def test_single_precision_inside_double_is_named():
    def forward(x, *arrays):
        single = [a.astype(np.float32) if isinstance(a, np.ndarray) else a for a in (x, *arrays)]
        return OURS["forward"](*single).astype(np.float64)

    (text,) = check(implementation(forward=forward)).diagnoses
    assert text == "the output is right to float32 only: it is computed, or kept, in single precision"
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


# --- the other claims -----------------------------------------------------------------------------


def test_an_argument_that_is_changed_is_named():
    def backward(dy, x, *arrays):
        dy *= 2
        return OURS["backward"](dy / 2, x, *arrays)

    report = check(implementation(backward=backward))
    assert report.claims["nothing is changed"] == "backward changes dy, which belongs to the caller"
    assert report.diagnoses == ["backward changes dy, which belongs to the caller"]


def test_a_gradient_of_the_frozen_base_is_named():
    def backward(dy, x, weight, *arrays):
        return {**OURS["backward"](dy, x, weight, *arrays), "weight": dy.T @ x}

    assert check(implementation(backward=backward)).diagnoses == ["backward returns gradients of the frozen weight"]


STARTS = {
    "both factors start at zero": lambda A, B, r: (0 * A, B),
    "neither factor starts at zero": lambda A, B, r: (A, B + 1),
    "A's start has the spread of fan r = 9, not fan in = 400": lambda A, B, r: (A * (400 / r) ** 0.5, B),
    "A's start has the spread 0.289": lambda A, B, r: (10 * A, B),
    r"lora_A starts with shape \(400, 9\), expected \(9, 400\)": lambda A, B, r: (A.T, B),
}


@pytest.mark.parametrize("said", STARTS)
def test_a_wrong_start_is_named(said):
    def wrong(in_features, out_features, rank, rng):
        return STARTS[said](*init(in_features, out_features, rank, rng), rank)

    (text,) = check(implementation(init=wrong)).diagnoses
    assert text.startswith(said.replace("\\", ""))


@pytest.mark.parametrize("start", ["he_uniform", "normal over r", "B random, A zero"])
def test_other_starts_in_use_are_right_too(start):
    def other(in_features, out_features, rank, rng):
        A, B = init(in_features, out_features, rank, rng)
        if start == "he_uniform":
            return 6**0.5 * A, B
        return (0 * A, rng.standard_normal(B.shape)) if "zero" in start else (A, B)

    assert check(implementation(init=other)).claims["start"] == "ok"


def adam(eps_inside=False, correction=True, root=True, gradient=False):
    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        t, new = t + 1, {}
        for k, g in grads.items():
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g * g
            a, b = (m[k] / (1 - 0.9**t), v[k] / (1 - 0.999**t)) if correction else (m[k], v[k])
            below = np.sqrt(b + 1e-8) if eps_inside else (np.sqrt(b) if root else b) + 1e-8
            new[k] = params[k] - 1e-3 * (g if gradient else a / below)
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
    ],
)
def test_a_wrong_adam_is_named(options, said):
    assert check(implementation(step=adam(**options))).diagnoses == ([said] if said else [])


def test_habits_are_told_and_do_not_count():
    rng = np.random.default_rng(0)

    def forward(x, *arrays):
        if not x.flags.c_contiguous:
            raise TypeError("C order only")
        return OURS["forward"](x, *arrays).astype(np.longdouble) * (1 + 1e-16 * rng.standard_normal())

    report = check(implementation(forward=forward))
    assert report.passed
    assert report.habits["dtype kept"] == "longdouble is returned for float64".replace(
        "longdouble", str(np.dtype(np.longdouble))
    )
    assert report.habits["same bits twice"] == "two calls differ"
    assert report.habits["memory order"] == "ok"  # a failing forward there gives nothing to compare


# --- what cannot be run ---------------------------------------------------------------------------


def test_without_a_forward_nothing_can_be_checked():
    with pytest.raises(CannotRun, match=r"thing has no function forward\(x, weight, bias, lora_A, lora_B, alpha\)"):
        check(SimpleNamespace(backward=backward), name="thing")


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("orientation", "sideways"), ("kinds", {"vera": 1})])
def test_what_is_declared_must_be_known(name, value):
    with pytest.raises(CannotRun, match=str(value) if isinstance(value, str) else "vera"):
        check(implementation(**{name: value}))


def test_an_exception_on_one_problem_is_a_broken_claim():
    def forward(x, weight, bias, *arrays):
        return OURS["forward"](x, weight, bias + 0, *arrays)

    report = check(implementation(forward=forward))
    assert not report.passed
    assert report.claims["forward"].startswith("forward raises TypeError: unsupported operand")
    assert "no bias" in report.diagnoses[0]


def test_an_exception_on_every_problem_cannot_be_checked():
    with pytest.raises(CannotRun, match="forward raises ZeroDivisionError: division by zero"):
        check(SimpleNamespace(forward=lambda *a: 1 / 0))


def test_rounding_to_bfloat16_is_to_the_nearest_even():
    x = np.array([1.0, 1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 3 * 2**-8, -3.14159265], np.float64)
    expected = np.array([1.0, 1.0, 1 + 2**-7, 1 + 2**-6, -3.140625])
    np.testing.assert_array_equal(round_to(x, "bfloat16"), expected.astype(np.float32))


def test_every_problem_can_tell_a_scaling():
    for problem in PROBLEMS:
        s = problem.alpha / problem.rank
        assert len({round(v, 9) for v in (s, 1.0, problem.alpha, 1 / s, s * s, 1 / problem.rank)}) >= 5
    assert set(KINDS) == {"linear", "rslora"}


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
        ("my_lora", 0, "my_lora: passed, in float64"),
        ("my_lora:wrong", 1, "alpha is not divided by the rank"),
        ("my_lora:nothing", 2, "could not be checked"),
        ("no_such_module", 2, "could not be checked: No module named 'no_such_module'"),
    ],
)
def test_the_command_line_checks_a_module(tmp_path, target, code, said):
    (tmp_path / "my_lora.py").write_text(MODULE, encoding="utf-8")
    command = [sys.executable, "-m", "minilora.conformance", target, "--json", "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr
    assert (tmp_path / "found.json").exists() is (code < 2)
    if code < 2:
        assert json.loads((tmp_path / "found.json").read_text())["passed"] is (code == 0)
