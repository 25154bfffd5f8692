"""What no known bug explains: rows that are tried last, and what is seen in an array on every problem."""

import re

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.checking.describing import describe_wrong, wrong_array
from minilora.conformance.checking.suite import HALF_PRECISIONS, ORDERS, SUBSETS, last_rows
from minilora.conformance.naming import MEASURED_COUNT
from minilora.conformance.problems import Problem
from minilora.conformance.problems.formulas import RIGHT_FORMULAS
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn, round_to

from ...support.sample import one_in
from ..implementations import OURS, PLAIN, beside_forward, from_formulas, report_of


def half(array, name="float16"):
    return round_to(np.asarray(array), name).astype(np.float64)


def changed(change):
    """A forward of changed arguments: x, weight, A and B."""

    def forward(x, weight, bias, A, B, alpha):
        x, weight, A, B = change(x, weight, A, B)
        return PLAIN.forward(x, weight, bias, A, B, alpha)

    return {"forward": forward}


def added(update):
    """A forward with another update, by x, A, B and the scaling."""
    return {"forward": lambda x, W, b, A, B, alpha: PLAIN.forward(x, W, b, A, B, 0) + update(x, A, B, alpha / len(A))}


def biased(taken):
    """A forward with another bias, by the bias and the number of rows."""

    def forward(x, weight, bias, *more):
        y = PLAIN.forward(x, weight, None, *more)
        return y if bias is None else y + taken(bias, len(x))

    return {"forward": forward}


def afterwards(change):
    return {"forward": lambda x, *layer: change(PLAIN.forward(x, *layer), x, *layer)}


def gradients(change):
    """A backward whose gradients are changed, by the gradients and all arguments."""

    def backward(*arrays):
        grads = PLAIN.backward(*arrays)
        return {**grads, **change(grads, *arrays)}

    return {"backward": backward}


def merged(change):
    return {"merge": lambda *arrays: change(PLAIN.merge(*arrays), *arrays)}


def some_rows(name, rows):
    """A gradient that is a sum over some of the rows."""
    return gradients(lambda grads, dy, x, *layer: {name: PLAIN.backward(dy[rows], x[rows], *layer)[name]})


def cut(kept):
    """The same inputs of x, W and A, by their number."""

    def change(x, W, A, B):
        inputs = kept(x.shape[1])
        return x[:, inputs], W[:, inputs], A[:, inputs], B

    return changed(change)


def ranks(kept):
    return changed(lambda x, W, A, B: (x, W, A, B * kept(len(A))))


def places(n):
    return np.arange(n)


NAMED = {
    "the factors are rounded to float16": changed(lambda x, W, A, B: (x, W, half(A), half(B))),
    "lora_A is rounded to float16": changed(lambda x, W, A, B: (x, W, half(A), B)),
    "lora_B is rounded to bfloat16": changed(lambda x, W, A, B: (x, W, A, half(B, "bfloat16"))),
    "the weight is rounded to bfloat16": changed(lambda x, W, A, B: (x, half(W, "bfloat16"), A, B)),
    "the scaling is rounded to float16, only in the merged weight": merged(
        lambda change, W, A, B, alpha: W + half(alpha / len(A)) * (B @ A)
    ),
    "x A^T is rounded to float16": added(lambda x, A, B, s: s * half(x @ A.T) @ B.T),
    "the update is rounded to bfloat16": added(lambda x, A, B, s: half(s * (x @ A.T @ B.T), "bfloat16")),
    "the update is rounded to float16 before it is scaled": added(lambda x, A, B, s: s * half(x @ A.T @ B.T)),
    "the ranks of lora_B stand in another order than those of lora_A: one place on": changed(
        lambda x, W, A, B: (x, W, A, np.roll(B, 1, axis=1))
    ),
    "the bias is taken at a wrong index: one place back": biased(lambda b, n: np.roll(b, -1)),
    "the bias is taken by the row and not by the output": biased(lambda b, n: b[places(n) % len(b)][:, None]),
    "it sums all inputs but the last only": cut(lambda n: slice(None, -1)),
    "it sums the last half of the inputs, and the one in the middle, only": cut(lambda n: slice(n // 2, None)),
    "it sums the first half of the inputs only in the update": changed(
        lambda x, W, A, B: (x, W, A * (places(A.shape[1]) < A.shape[1] // 2), B)
    ),
    "it sums all rows but the last only, only in lora_A's gradient": some_rows("lora_A", slice(None, -1)),
    "it sums whole blocks of 16 inputs only": cut(lambda n: slice(0, n - n % 16 if n > 16 else n)),
    "it sums all ranks but the first only, only in the merged weight": merged(
        lambda change, W, A, B, alpha: W + alpha / len(A) * (B * (places(len(A)) > 0)) @ A
    ),
    "it sums all rows but the first only, only in lora_B's gradient": some_rows("lora_B", slice(1, None)),
    "on 13 of 15 problems, those where r is above 1: it sums the first half of the ranks only": ranks(
        lambda r: places(r) < max(1, r // 2)
    ),
    "it sums all inputs but the first only in x W^T": changed(
        lambda x, W, A, B: (x, W * (places(len(W[0])) > 0), A, B)
    ),
}


@pytest.mark.parametrize("says", one_in(2, [*NAMED], NAMED))
def test_what_nobody_is_known_to_have_made_is_named_last(says):
    first = check(beside_forward(**NAMED[says])).found[0]
    assert first.says.removesuffix(", only in the output").removesuffix(", in everything that is computed") == says
    assert first.flag


OF_FIVE = {
    "one place on": [4, 0, 1, 2, 3],
    "one place back": [1, 2, 3, 4, 0],
    "half of the places back": [2, 3, 4, 0, 1],
    "from last to first": [4, 3, 2, 1, 0],
    "the even places first": [0, 2, 4, 1, 3],
    "the first one everywhere": [0, 0, 0, 0, 0],
    "all {} but the last": [0, 1, 2, 3],
    "all {} but the first": [1, 2, 3, 4],
    "the first half of the {}": [0, 1],
    "the first half of the {}, and the one in the middle,": [0, 1, 2],
    "the last half of the {}": [3, 4],
    "the last half of the {}, and the one in the middle,": [2, 3, 4],
}


def test_orders_and_parts_of_sums_are_what_they_say():
    kept = {words: of(5).nonzero()[0].tolist() for words, of in SUBSETS.items() if "blocks" not in words}
    assert {words: order(5).tolist() for words, order in ORDERS.items()} | kept == OF_FIVE
    for size in (16, 32, 64, 128):
        whole = SUBSETS[f"whole blocks of {size} {{}}"]
        assert [whole(n).sum() for n in (size - 1, size, 2 * size - 1, 2 * size)] == [size - 1, size, size, 2 * size]
        assert whole(2 * size - 1)[:size].all()


CHANGES = {
    "the factors are rounded to {half}": "y x lora_A lora_B merged",
    "lora_A is rounded to {half}": "y x lora_B merged",
    "lora_B is rounded to {half}": "y x lora_A merged",
    "the weight is rounded to {half}": "y x merged",
    "the scaling is rounded to {half}": "y x lora_A lora_B merged",
    "x A^T is rounded to {half}": "y",
    "the update is rounded to {half}": "y",
    "the update is rounded to {half} before it is scaled": "y",
    "the ranks of lora_B stand in another order than those of lora_A: {order}": "y x merged",
    "the bias is taken at a wrong index: {order}": "y",
    "the bias is taken by the row and not by the output": "y",
    "it sums {ranks} only": "y merged",
    "it sums {inputs} only": "y",
    "it sums {inputs} only in x W^T": "y",
    "it sums {inputs} only in the update": "y",
    "it sums {rows} only": "lora_A lora_B",
}
"""The answers in which each row that is tried last shows, and is looked for."""


def test_rows_that_are_tried_last_change_their_answers_alone():
    trial = drawn(Problem(131, 130, 5, 131, alpha=7.0), "float64", RIGHT_FORMULAS)  # of more than a block of 128 each
    filled = [{"half": half} for half in HALF_PRECISIONS] + [{"order": order} for order in ORDERS]
    filled += [{whose: kept.format(whose) for whose in ("ranks", "inputs", "rows")} for kept in SUBSETS]
    expected = {says.format(**words): answers.split() for says, answers in CHANGES.items() for words in filled
                if {*re.findall("{(.*)}", says)} <= words.keys()}  # fmt: skip
    found = {}
    for row in last_rows.__wrapped__(RIGHT_FORMULAS.scaling):  # made anew, whatever was kept
        wrong = trial.answer(**row.replaced_in(trial.problem))
        found[row.says] = [key for key in row.shows or trial.right if not trial.agrees(key, wrong[key])]
        assert row.flag.replace("-", "") == re.sub("[^a-z0-9]", "", row.says.lower())
        assert row.count == MEASURED_COUNT
    assert found == expected


def a_trial(kind, dtype="float64", number=0):
    """One of a kind's problems in a precision."""
    return drawn(KINDS[kind].problems[number], dtype, KINDS[kind].formulas)


def every_trial(kind, dtype="float64"):
    return [a_trial(kind, dtype, number) for number in range(len(KINDS[kind].problems))]


PREFIX_ALIASES = {
    "the output, where N is above 7, is off by 316 at [65, 6]: 0, expected 315.8647; "
    "it is right up to row 63, and zero from row 64 on (N=67 in=130 out=69 r=17 alpha=24)": (
        "y", lambda y, trial: y * (places(len(y)) < 64)[:, None]),
    "the output, where out is above 40, is off by 167 at [48, 66]: -10.41297, expected -176.9545; "
    "it is right up to output 63, and without the update from output 64 on (N=67 in=130 out=69 r=17 alpha=24)": (
        "y", lambda y, trial: trial.answer(used_B=lambda B: B * (places(len(B)) < 64)[:, None])["y"]),
    "the output, where out is above 6, is off by 1 at [0, 8]: 1.357817, expected 0.3578173; "
    "it is right up to output 7, and wrong from output 8 on (N=3 in=4 out=9 r=5 alpha=2.5)": (
        "y", lambda y, trial: y + (places(y.shape[1]) > 7)),
    "dx, the gradient at the input is off by 210 at [42, 51]: 0, expected 209.7069; "
    "it is right up to row 32, and zero from row 33 on (N=67 in=130 out=69 r=17 alpha=24)": (
        "x", lambda dx, trial: dx * (places(len(dx)) < len(dx) // 2)[:, None]),
    "the output is off by 11.4 at [2, 2]: -11.79449, expected -0.4001996; "
    "its update's outputs are the right ones in another order: 2, 0, 1 (N=7 in=5 out=3 r=2 alpha=3)": (
        "y", lambda y, trial: trial.answer(used_B=lambda B: np.roll(B, 1, axis=0))["y"]),
    "lora_B's gradient is off by 6.25 at [0, 0]: 4.890806, expected -1.359055; "
    "its outputs are the right ones in another order: 2, 1, 0 (N=7 in=5 out=3 r=2 alpha=3)": (
        "lora_B", lambda dB, trial: dB[::-1]),
    "the merged weight is off by 4.68 at [1, 3]: -0.5773334, expected -5.254511; "
    "its update's outputs are the right ones in another order: 1, 2, 0 (N=7 in=5 out=3 r=2 alpha=3)": (
        "merged", lambda V, trial: trial.answer(used_B=lambda B: np.roll(B, -1, axis=0))["merged"]),
    "the merged weight is off by 0.0117 at [1, 1]: 4.28125, expected 4.292915; "
    "it is rounded to bfloat16 (N=7 in=5 out=3 r=2 alpha=3)": ("merged", lambda V, trial: half(V, "bfloat16")),
    "the output is off by 2.5 at [2, 1]: -12.51061, expected -10.00849; "
    "every entry is off by a factor of 1.25 (N=7 in=5 out=3 r=2 alpha=3)": ("y", lambda y, trial: 1.25 * y),
    "dx, the gradient at the input, where N is above 1, is off by 6.96 at [1, 3]: -1.159484, expected -8.116391; "
    "every entry is off by a factor of 0.142857 (N=7 in=5 out=3 r=2 alpha=3)": ("x", lambda dx, trial: dx / len(dx)),
    "lora_A's gradient is off by 4.86 at [1, 4]: 14.5763, expected 9.71753; "
    "every entry is off by a factor of 1.5 (N=7 in=5 out=3 r=2 alpha=3)": (
        "lora_A", lambda dA, trial: 1.5 * dA.astype(np.float32)),
}  # fmt: skip


@pytest.mark.parametrize("words", PREFIX_ALIASES)
def test_what_is_seen_in_an_array_is_told(words):
    key, change = PREFIX_ALIASES[words]
    pairs = [(trial, change(trial.right[key], trial)) for trial in every_trial("linear")]
    assert describe_wrong(key, pairs) == words


UNSEEN = {
    "a ReLU": (
        added(lambda x, A, B, s: s * np.maximum(x @ A.T, 0) @ B.T),
        "the output is off by 9.86 at [3, 1]: 0.04123983, expected 9.896411 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "a tanh": (
        added(lambda x, A, B, s: s * np.tanh(x @ A.T) @ B.T),
        "the output is off by 8.57 at [2, 1]: -1.434178, expected -10.00849 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "rounding to three places": (
        added(lambda x, A, B, s: s * np.round(x @ A.T, 3) @ B.T),
        "the output is off by 0.00118 at [4, 1]: 6.269837, expected 6.268653 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "the first output everywhere": (
        afterwards(lambda y, *layer: 0 * y + y[:, :1]),
        "the output is off by 11.5 at [2, 1]: 1.499262, expected -10.00849 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "one row in the middle": (
        afterwards(lambda y, *layer: y + (places(len(y)) == 10)[:, None]),
        "the output, where N is above 7, is off by 1 at [10, 0]: -41.16212, expected -42.16212 "
        "(N=67 in=130 out=69 r=17 alpha=24)",
    ),
    "the first row alone": (
        afterwards(lambda y, *layer: y * (places(len(y)) < 1)[:, None]),
        "the output, where N is above 1, is off by 10 at [2, 1]: -0, expected -10.00849 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "outputs in another order on some problems": (
        afterwards(lambda y, x, *layer: y[:, ::-1] if len(x) > 4 else y + 1),
        "the output is off by 2.75 at [3, 0]: 0.9218142, expected 3.667463 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
    "a factor on some problems": (
        afterwards(lambda y, x, *layer: 2 * y if len(x) > 4 else y + 1),
        "the output is off by 10 at [2, 1]: -20.01698, expected -10.00849 (N=7 in=5 out=3 r=2 alpha=3)",
    ),
}


@pytest.mark.parametrize("what", UNSEEN)
def test_what_does_not_hold_on_every_problem_is_not_told(what):
    functions, said = UNSEEN[what]
    assert check(beside_forward(**functions)).diagnoses == [said]


def test_of_a_sum_the_wrong_entrys_place_is_told():
    trial = a_trial("fused")
    wrong = trial.right["y"].copy()
    wrong[3, 8] += 1
    said = f"is off by 1 at [3, 8], in slot 1: {wrong[3, 8]:.7g}, expected {trial.right['y'][3, 8]:.7g}"
    assert wrong_array("y", wrong, trial) == said


@pytest.mark.parametrize("kind", ["embedding", *(pytest.param(kind, marks=pytest.mark.long) for kind in KINDS)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_in_noise_nothing_is_seen(kind, dtype):
    rng = np.random.default_rng(0)
    trials = every_trial(kind, dtype)
    for name in trials[0].right:
        for size in (1, 1e-3):
            rights = [(trial, trial.right[name]) for trial in trials if name in trial.right]
            pairs = [(trial, right + size * rng.standard_normal(right.shape)) for trial, right in rights]
            assert all(trial.agrees(name, array) for trial, array in pairs) or ";" not in describe_wrong(name, pairs)


def test_of_a_long_order_eight_places_are_told():
    trial = a_trial("linear", number=9)
    said = describe_wrong("y", [(trial, trial.right["y"][:, ::-1])])
    assert "in another order: 68, 67, 66, 65, 64, 63, 62, 61, ... (N=67 " in said


@pytest.mark.parametrize(("times", "seen"), [(1.0009, False), (1.0011, True), (0.9989, True)])
def test_a_factor_is_seen_from_a_thousandth_on(times, seen):
    trial = a_trial("linear")
    said = wrong_array("y", times * trial.right["y"], trial)
    assert said.endswith(f"; every entry is off by a factor of {times}") is seen


def test_of_few_rows_no_tail_is_told():
    trial = a_trial("linear")
    assert ";" not in describe_wrong("y", [(trial, trial.right["y"] + (places(7) > 4)[:, None])])


def test_in_half_precision_only_a_factor_is_seen():
    trial = a_trial("linear", "bfloat16", 9)
    assert ";" not in describe_wrong("y", [(trial, trial.right["y"][::-1])])
    assert "; every entry is off by a factor of 3 (" in describe_wrong("y", [(trial, 3 * trial.right["y"])])


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
def test_beside_a_half_base_a_factors_gradient_is_not_rounded(key, name):
    trial = a_trial("mixed", "float32")
    assert f"; it is rounded to {name} (" in describe_wrong(key, [(trial, half(trial.right[key], name))])


@pytest.mark.long
@pytest.mark.parametrize("kind", ["embedding", "dora", "dora-full", "conv1d", "conv2d"])
def test_an_order_is_told_in_every_kind(kind):
    wrong = from_formulas(kind)
    right = wrong.forward

    def forward(*arrays, **steps):
        return right(*arrays, **steps)[:, ::-1]

    def of_steps(*arrays, stride, padding, dilation, groups):
        return forward(*arrays, stride=stride, padding=padding, dilation=dilation, groups=groups)

    wrong.forward = of_steps if kind.startswith("conv") else forward
    assert "; its outputs are the right ones in another order: " in report_of(kind, **vars(wrong)).diagnoses[0]


STEPS = {
    "if stride were 1": lambda stride, padding, dilation: (1, padding, dilation),
    "without padding": lambda stride, padding, dilation: (stride, 0, dilation),
    "if dilation were 1": lambda stride, padding, dilation: (stride, padding, 1),
    "if stride and dilation were swapped": lambda stride, padding, dilation: (dilation, padding, stride),
    "if the two axes of each step were swapped": lambda *steps: tuple(step[::-1] for step in steps),
}


@pytest.mark.parametrize("words", STEPS)
def test_steps_that_give_an_outputs_shape_are_told(words):
    said = []
    for trial in every_trial("conv2d"):
        p, problem = trial.arrays, trial.problem
        steps = STEPS[words](problem.stride, problem.padding, problem.dilation)
        layer = [p["weight"], p.get("bias"), p["lora_A"], p["lora_B"], problem.alpha]
        if problem.groups == 1:
            y = OURS["conv2d"].forward(
                p["x"], *layer, **dict(zip(("stride", "padding", "dilation"), steps, strict=True))
            )
            said += [wrong_array("y", y, trial)] if y.shape != trial.right["y"].shape else []
    assert said[0].endswith(f", as it would be {words}")
    assert trial.problem.shape_hint((2, 4, 99, 99)) == ""
