"""The claims that compare no numbers of a problem: a new adapter, Adam, the base, a merge, the edge of the contract."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check
from minilora.conformance.checking.claims import EDGES
from minilora.conformance.checking.kindreport import REFUSED
from minilora.conformance.problems.bugs import bugs_of
from minilora.conformance.problems.kinds import KINDS
from minilora.report import Diagnosis

from ..implementations import ORDERS, OURS, PLAIN, beside_forward, init, lora, product, report_of, step_of


def failing(report):
    return [case.id for case in report.cases if case.failed]


# --- a new adapter --------------------------------------------------------------------------------

WIDE, NONE = "PEFT's is 1 / sqrt(3 in)", ""
ALIKE, MEAN = "dependent directions may stay dependent", "expected mean 0"
STARTS = {
    "both factors start at zero: both gradients are zero, so nothing is ever learned": lambda A, B, r: (0 * A, B),
    "neither factor starts at zero: the new adapter changes the output before the first step": (
        lambda A, B, r: (A, B + 1)),
    "A's initial spread is that of fan r = 9, not fan in = 400: 0.192": lambda A, B, r: (A * (len(A[0]) / r) ** 0.5, B),
    "A's initial spread is that of fan out = 100, not fan in = 400: 0.141": (  # as he_uniform has it
        lambda A, B, r: (6**0.5 * A * (A.shape[1] / len(B)) ** 0.5, B)),
    f"A starts with standard deviation 2.89; {WIDE} = 0.0289": lambda A, B, r: (100 * A, B),
    f"A starts with standard deviation 2.89e-07; {WIDE} = 0.0289": lambda A, B, r: (1e-5 * A, B),
    "A starts with standard deviation 0.00144, from 1 / in: PEFT's 1 / sqrt(in) lacks its root": (
        lambda A, B, r: (A / A.shape[1] ** 0.5, B)),
    f"A starts with mean 0.0249 and standard deviation 0.0144, {MEAN}": lambda A, B, r: ((A + 0.05) / 2, B),
    f"A starts with mean -0.0251 and standard deviation 0.0144, {MEAN}": lambda A, B, r: ((A - 0.05) / 2, B),
    f"lora_A starts with rank 8, expected 9: {ALIKE}": (
        lambda A, B, r: (np.concatenate([A[:-1], A[:1]]) if r == 9 else A, B)),
    f"lora_A starts with rank 1, expected 9: {ALIKE}": lambda A, B, r: (0 * A + A[:1], B),
    "lora_A starts with shape (400, 9), expected (9, 400)": lambda A, B, r: (A.T, B),
    "lora_A starts with shape (150, 30), expected (30, 150)": lambda A, B, r: (A if r == 9 else A.T, B),
    "lora_B starts with numbers that are not finite": lambda A, B, r: (A, B + np.nan),
    "init returns None, expected lora_A and lora_B": lambda A, B, r: None,
    "init returns a tuple of 1, expected lora_A and lora_B": lambda A, B, r: (A,),
}  # fmt: skip
FANS = {
    "A's initial spread is that of fan r = 9": ("a-starts-with-the-fan-of-the-rank", "lora-pytorch 0.2.0"),
    "A's initial spread is that of fan out = 100": ("a-starts-with-the-fan-of-the-output", ""),
}
"""Those that are known mistakes, with their flags and where they were made."""


@pytest.mark.parametrize("said", STARTS)
def test_a_wrong_start_is_named(said):
    def wrong(in_features, out_features, rank, rng):
        return STARTS[said](*init(in_features, out_features, rank, rng), rank)

    flag, source = FANS.get(said.partition(",")[0], ("", ""))
    assert check(beside_forward(init=wrong)).found == [Diagnosis(said, flag, source, ("linear-start",))]


SPREADS = {
    "uniform": (lambda A, rng: A, NONE),
    "he_uniform": (lambda A, rng: 6**0.5 * A, NONE),
    "uniform, of a mean of two fifths of its spread": (lambda A, rng: A + 0.4 * A.std(), NONE),
    "ten times as wide": (lambda A, rng: 10 * A, NONE),
    "N(0, 1/in)": (lambda A, rng: rng.standard_normal(A.shape) / A[0].size ** 0.5, NONE),
    "N(0, 1)": (lambda A, rng: rng.standard_normal(A.shape), "0.997 at {}, 1 at {}: the same at every width"),
    "N(0, 1/r)": (
        lambda A, rng: rng.standard_normal(A.shape) / len(A) ** 0.5,
        "0.332 at {}, 0.183 at {}: not set by the input's width"),
    "uniform(-0.1, 0.1)": (
        lambda A, rng: rng.uniform(-0.1, 0.1, A.shape), "0.058 at {}, 0.058 at {}: the same at every width"),
    "0.0547": (lambda A, rng: 0.0547 * rng.standard_normal(A.shape),
               "0.0545 at {}, 0.0548 at {}: the same at every width"),
    "0.47": (lambda A, rng: 0.47 * rng.standard_normal(A.shape), "0.468 at {}, 0.471 at {}: the same at every width"),
    "A zero": (lambda A, rng: 0 * A, NONE),
}  # fmt: skip
OF_KERNELS = {"0.47 of a kernel": (SPREADS["0.47"][0], "0.466 at {}, 0.466 at {}: the same at every width")}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("linear", name) for name in SPREADS), *(("conv2d", name) for name in OF_KERNELS)]
)
def test_other_starts_in_use_are_right_and_described(kind, name):
    change, habit = {**SPREADS, **OF_KERNELS}[name]

    def other(in_features, out_features, rank, rng, *kernel):
        A, B = init(in_features, out_features, rank, rng, *kernel)
        A = change(A, rng)
        return A, B if A.any() else rng.standard_normal(B.shape)

    report = report_of(kind, forward=OURS[kind].forward, init=other)
    assert report.claims["start"] == "ok"
    sizes = (f"in={n_in} out={n_out} r={rank}" for rank, n_in, n_out, _ in KINDS[kind].starts)
    told = f"{habit.format(*sizes)}; {WIDE}" if habit else None
    assert report.habits.get("spread of A") == told


OTHERWISE = "DoRA's magnitude does not start as the norm of each row of the weight, so the output changes"
MAGNITUDES = [
    (lambda m, W: np.linalg.norm(W, axis=0),
     "DoRA's magnitude starts with 400 entries, one for each input, expected 100, one for each output"),
    (lambda m, W: 0 * m + 1, OTHERWISE), (lambda m, W: m[:-1], OTHERWISE), (lambda m, W: m[:, None], "ok"),
    (lambda m, W: 1.001 * m, OTHERWISE),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), MAGNITUDES)
def test_a_magnitudes_start_is_the_length_of_each_row(change, said):
    def start(in_features, out_features, rank, rng, weight):
        A, B, m = OURS["dora"].init(in_features, out_features, rank, rng, weight)
        return A, B, change(m, weight)

    report = report_of("dora", forward=OURS["dora"].forward, init=start)
    assert report.claims["start"] == said


def test_a_start_that_takes_no_generator_is_described_only():
    def start(in_features, out_features, rank, rng):
        return init(in_features, out_features, rank, np.random.default_rng(0))

    report = check(beside_forward(init=start))
    assert report.passed
    assert report.habits["start"] == "two generators give the same numbers: all adapters of one size start alike"
    assert "start" not in check(beside_forward(init=init)).habits


def test_an_embedding_may_start_either_factor_at_zero():
    """A is not multiplied with x there, so no spread is asked of it."""
    for start in (lambda i, o, r, rng: (rng.standard_normal((r, i)), np.zeros((o, r))), OURS["embedding"].init):
        report = report_of("embedding", forward=OURS["embedding"].forward, init=start)
        assert report.claims["start"] == "ok"
        assert not {"spread of A", "start"} & {*report.habits}


# --- Adam -----------------------------------------------------------------------------------------


def adam(eps_inside=False, correction=True, root=True, gradient=False, betas=(0.9, 0.999), decay=0.0, norm=np.inf,
         dtype=np.float64, kept=None, spoil=False):  # fmt: skip
    """Algorithm 1, in a precision, with mistakes; parameters may be kept in another, and gradients used up."""

    def step(params, grads, state):
        m, v, t = state or ({k: 0 * p for k, p in params.items()}, {k: 0 * p for k, p in params.items()}, 0)
        (beta1, beta2), t, new = betas, t + 1, {}
        whole = sum((g * g).sum() for g in grads.values()) ** 0.5
        for k, given in grads.items():
            g = (given * min(1, norm / whole)).astype(dtype)
            m[k], v[k] = beta1 * m[k] + (1 - beta1) * g, beta2 * v[k] + (1 - beta2) * g * g
            a, b = (m[k] / (1 - beta1**t), v[k] / (1 - beta2**t)) if correction else (m[k], v[k])
            below = np.sqrt(b + 1e-8) if eps_inside else (np.sqrt(b) if root else b) + 1e-8
            new[k] = (params[k] - 1e-3 * (g if gradient else a / below + decay * params[k])).astype(dtype)
            new[k] = new[k].astype(kept or dtype).astype(dtype)
            given *= not spoil
        return new, (m, v, t)

    return step


ELSEWHERE = "ten steps of Adam (lr 1e-3, betas 0.9 and 0.999, eps 1e-8) give a wrong result: "


STEPS = [
    (adam(eps_inside=True), "Adam's eps is inside the square root"),
    (adam(correction=False), "Adam has no bias correction"),
    (adam(root=False), "Adam divides by v, not by its square root"),
    (adam(gradient=True), "the step is plain gradient descent"),
    (adam(betas=(0.999, 0.9)), "Adam's betas are swapped"),
    (adam(decay=0.01), "a weight decay of 0.01 is added to Adam's step, as in AdamW"),
    (adam(betas=(0.9, 0.99)), f"{ELSEWHERE}lora_B is -2.319252 at [1, 0], expected -2.319235"),
    (adam(norm=1.0), f"{ELSEWHERE}lora_A is 0.9463391 at [1, 2], expected 0.9408755"),
    (step_of(step=lambda d, theta, g: 10 * d), "Adam's steps are 10 times as long as expected, with lr 1e-3"),
    (step_of(step=lambda d, theta, g: d / 4), "Adam's steps are 0.25 times as long as expected, with lr 1e-3"),
    (lambda params, grads, state: (params, state), "the step changes nothing"),
    (lambda params, grads, state: params, "step returns a dict, expected the two params and state"),
    (lambda params, *_: ({k: np.zeros(5) for k in params}, 0),
     "lora_A has shape (5,) after ten steps of Adam, expected (2, 5)"),
    (lambda params, *_: ({k: p + np.nan for k, p in params.items()}, 0),
     "lora_A is not finite after ten steps of Adam"),
    (adam(kept=np.float32), f"{ELSEWHERE}lora_A is 1.305384 at [1, 1], expected 1.305384"),  # which is to be declared
]  # fmt: skip


@pytest.mark.parametrize(("step", "said"), STEPS, ids=[said for _, said in STEPS])
def test_a_wrong_adam_is_named_or_described(step, said):
    flag = next((row.flag for row in bugs_of("adam", ("adam",)) if row.says == said), "")
    assert check(beside_forward(step=step)).found == [Diagnosis(said, flag, cases=("linear-adam",))]


@pytest.mark.parametrize(
    ("step", "dtype"),
    [(adam(), None), (adam(spoil=True), None), (adam(dtype=np.float32), None), (adam(kept=np.float32), "float32")],
)
def test_an_adam_is_right_in_the_precision_declared_or_seen(step, dtype):
    assert check(beside_forward(step=step), dtype=dtype).claims["adam"] == "ok"


@pytest.mark.parametrize(("dtype", "least"), [("float32", 2e-6), ("float64", 1e-9)])
def test_ten_steps_of_adam_may_be_off_by_rounding(dtype, least):
    def claimed(off):
        def step(*given):
            params, state = adam()(*given)
            return {k: p + off / 10 for k, p in params.items()}, state

        return check(beside_forward(step=step), dtype=dtype).claims["adam"]

    assert claimed(0.9 * least) == "ok"
    assert claimed(1.1 * least).startswith(ELSEWHERE)


# --- the base, and a merge ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"), [(["weight"], "weight"), (["bias"], "bias"), (["weight", "bias"], "bias and weight")]
)
def test_a_gradient_of_the_frozen_base_is_named(names, said):
    def backward(dy, x, weight, *arrays):
        base = {"weight": dy.T @ x, "bias": dy.sum(axis=0)}
        return {**PLAIN.backward(dy, x, weight, *arrays), **{name: base[name] for name in names}}

    assert check(beside_forward(backward=backward)).diagnoses == [f"backward returns gradients of the frozen {said}"]


class Merging:
    """A right one: a second merge, or a second unmerge, changes nothing."""

    merged = False

    def __init__(self, weight, bias, A, B, alpha):
        self.weight, self.bias, self.A, self.B, self.s = weight, bias, A, B, alpha / len(A)

    def change(self):
        return self.s * (self.B @ self.A)

    def forward(self, x):
        y = x @ self.weight.T + (0 if self.bias is None else self.bias)
        return y if self.merged else y + self.s * (x @ self.A.T @ self.B.T)

    def merge(self):
        if not self.merged:
            self.weight += self.change()  # in place, in the array that it was handed
        self.merged = True

    def unmerge(self):
        if self.merged:
            self.weight -= self.change()
        self.merged = False


def merging(**methods):
    return type("Mine", (Merging,), methods)


def refusing(merged, step):
    def method(self):
        if self.merged is merged:
            raise ValueError("it is so already")
        getattr(Merging, step)(self)

    return method


def without_unmerge(self, name):
    if name == "unmerge":
        raise AttributeError(name)
    return object.__getattribute__(self, name)


def unmerged(change):
    """An unmerge that takes something else away."""

    def unmerge(self):
        self.weight, self.merged = self.weight - change(self), False

    return unmerge


def merge_twice(self):
    self.weight, self.merged = self.weight + self.change(), True


def stay_merged(self):
    self.weight = self.weight - self.change()


def merge_once(self):
    """After one round, it takes itself for merged for ever."""
    self.rounds = getattr(self, "rounds", 0) + 1
    Merging.merge(self)
    if self.rounds > 2:
        self.weight = self.weight - self.change()


def raising(self):
    return 1 / 0


LAYERS = {
    "as often as it is asked": (Merging, "ok"),
    "refusing what is done": (merging(merge=refusing(True, "merge"), unmerge=refusing(False, "unmerge")), "ok"),
    "never back": (merging(__getattribute__=without_unmerge), "ok"),
    "merges twice": (merging(merge=merge_twice), "after a second merge the output contains the update 2 times"),
    "adds again": (
        merging(forward=lambda self, x: Merging.forward(self, x) + self.merged * self.s * (x @ self.A.T @ self.B.T)),
        "after merge the output contains the update 2 times",
    ),
    "unmerges nothing": (
        merging(unmerge=unmerged(lambda self: 0)), "after unmerge the output contains the update 2 times"),
    "unmerges twice": (
        merging(unmerge=unmerged(Merging.change)), "after a second unmerge the output contains the update 0 times"),
    "forgets the scaling": (
        merging(unmerge=unmerged(lambda self: self.B @ self.A)),
        "after unmerge the output contains the update 1.33333 times",
    ),
    "stays merged": (merging(unmerge=stay_merged), "after unmerge the output contains the update 0 times"),
    "merges once": (merging(merge=merge_once), "after unmerge and merge the output contains the update 0 times"),
    "another layer": (
        lambda W, b, A, *more: Merging(W, b, A + 0.5, *more),
        "the output is off by 3.18 at [5, 1]: 3.679704, expected 0.5027149"),
    "raising": (merging(merge=raising), "merging raises ZeroDivisionError: division by zero, in test_claims.py, line "
                f"{raising.__code__.co_firstlineno + 1}"),
    "without a merge": (
        lambda *layer: SimpleNamespace(forward=1), "merging returns a SimpleNamespace without forward and merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_same_merged_and_back(name):
    layer, said = LAYERS[name]
    for dtype in ("float64", "float32"):
        report = check(beside_forward(merging=layer), dtype=dtype)
        assert report.claims["merged and back"] == said
        assert report.passed is (said == "ok")
        assert failing(report) == (["linear-merged-and-back"] if said != "ok" else [])


@pytest.mark.parametrize("kind", ["dora", "conv2d", "embedding", "dropout", "mixed"])
def test_a_layer_of_every_kind_that_merges_exactly_is_judged(kind):
    class Layer:
        def __init__(self, *arrays, **steps):
            self.arrays, self.steps = arrays, steps

        def forward(self, x):
            return OURS[kind].forward(x, *self.arrays, **self.steps)

        def merge(self):
            self.arrays[2][...] *= np.sqrt(2)  # a change that shows

    def of_steps(*arrays, stride, padding, dilation):
        return Layer(*arrays, stride=stride, padding=padding, dilation=dilation)

    made = of_steps if kind == "conv2d" else Layer
    report = report_of(kind, forward=OURS[kind].forward, merging=made)
    said = "not offered" if kind in ("dropout", "mixed") else "after merge the output "
    assert report.claims["merged and back"].startswith(said)


# --- the edge of the contract ---------------------------------------------------------------------


def on_rows(functions):
    """Functions on rows, for any number of axes. They refuse nothing; our own layers refuse an alpha of 0."""

    def forward(x, weight, *more):
        return functions.forward(x.reshape(-1, x.shape[-1]), weight, *more).reshape(*x.shape[:-1], len(weight))

    def backward(dy, x, *more):
        grads = functions.backward(dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), *more)
        return {**grads, "x": grads["x"].reshape(x.shape)}

    return {"forward": forward, "backward": backward, "merge": functions.merge}


ON_ROWS = on_rows(PLAIN)


def every_function(change):
    """Plain functions, each with its arguments or its answer changed: `change(name, function, arrays)` answers."""

    def changed(name):
        return lambda *arrays: change(name, ON_ROWS[name], arrays)

    return SimpleNamespace(**{name: changed(name) for name in ON_ROWS})


AT = {
    "memory order": lambda arrays: not all(a.flags.c_contiguous for a in arrays if isinstance(a, np.ndarray)),
    "more axes": lambda arrays: arrays[0].ndim == 3,
    "no rows": lambda arrays: len(arrays[0]) == 0,
    "alpha of 0": lambda arrays: arrays[-1] == 0,
}


def in_fortran_order(arrays):
    return any(a.flags.f_contiguous and not a.flags.c_contiguous for a in arrays if isinstance(a, np.ndarray))


def in_strides(arrays):
    return any(not (a.flags.f_contiguous or a.flags.c_contiguous) for a in arrays if isinstance(a, np.ndarray))


@pytest.mark.parametrize(
    ("where", "refused"),
    [*((at, [claim]) for claim, at in AT.items()), (in_fortran_order, []), (in_strides, [])],
    ids=[*AT, "Fortran order alone", "strides alone"],
)
def test_what_is_refused_at_the_edge_is_no_failure(where, refused):
    def change(name, function, arrays):
        if where(arrays):
            raise ValueError("not here")
        return function(*arrays)

    report = check(every_function(change))
    assert report.passed, str(report)
    assert {claim: report.claims[claim] for claim in AT} == dict.fromkeys(AT, "ok") | dict.fromkeys(refused, REFUSED)
    assert failing(report) == []


SAYS = {"memory order": "for arrays in Fortran order, ", "more axes": "for rows with two axes ",
        "no rows": "for an empty batch ", "alpha of 0": "for an alpha of 0 "}  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "wrong"),
    [*((claim, name) for claim in AT for name in ("forward", "backward")), ("memory order", "merge"),
     ("alpha of 0", "merge")],
)  # fmt: skip
def test_what_is_wrong_at_the_edge_alone_is_named(claim, wrong):
    def change(name, function, arrays):
        found = function(*arrays)
        if name != wrong or not AT[claim](arrays):
            return found
        if claim == "no rows":
            return {name: g + 1 for name, g in found.items()} if wrong == "backward" else np.ones((1, 3))
        return {name: 2 * g for name, g in found.items()} if wrong == "backward" else found + 1

    report = check(every_function(change))
    (text,) = report.diagnoses
    assert report.claims[claim] == text
    assert [case.claim for case in report.cases if case.failed] == [claim]
    assert text.startswith(SAYS[claim])


@pytest.mark.parametrize("shape", [(2, 4), (6, 4), (3, 2, 4)])
def test_rows_of_two_axes_in_another_shape_are_refused(shape):
    def change(name, function, arrays):
        if not AT["more axes"](arrays):
            return function(*arrays)
        shapes = {"x": (*shape[:-1], 5), "lora_A": (3, *shape), "lora_B": shape}
        return np.ones(shape) if name == "forward" else {name: np.ones(s) for name, s in shapes.items()}

    report = check(every_function(change))
    assert report.passed, str(report)
    assert report.claims["more axes"] == REFUSED


def test_a_mean_over_no_rows_is_not_zero():
    def change(name, function, arrays):
        found = function(*arrays)
        return found | {"lora_A": found["lora_A"] * np.nan} if name == "backward" and not len(arrays[0]) else found

    assert check(every_function(change)).diagnoses == ["for an empty batch lora_A's gradient is not zero"]


def test_an_answer_that_is_wrong_everywhere_is_judged_once():
    layer = LAYERS["merges twice"][0]
    report = check(SimpleNamespace(forward=lambda *arrays: PLAIN.forward(*arrays) + 1, merging=layer))
    assert len(report.diagnoses) == 1
    assert {report.claims.get(claim, "not offered") for claim in (*EDGES, "merged and back")} == {"not offered"}


@pytest.mark.parametrize("wrong", [("forward",), ("backward",), ("merge",), tuple(ON_ROWS)])
@pytest.mark.parametrize(("other", "said"), [(lambda r: r, "the rank, as in"), (lambda r: 1, "1, as in")])
def test_an_alpha_of_0_that_is_another_number_is_named(wrong, other, said):
    """Summed in another order there: an update is rounded which the right answer has not."""
    summed = on_rows(lora(product(ORDERS["large ones first"])))

    def change(name, function, arrays):
        if arrays[-1] or name not in wrong:
            return function(*arrays)
        return summed[name](*arrays[:-1], other(len(arrays[-3])))

    (one,) = check(every_function(change)).found
    assert one.says.startswith(f"an alpha of 0 is replaced by {said}")
    assert one.flag.startswith("an-alpha-of-0-")


def test_beside_another_mistake_an_alpha_of_0_is_described():
    def change(name, function, arrays):
        if arrays[-1] or name == "merge":
            return function(*arrays)
        return function(*arrays[:-1], 1) if name == "forward" else {"x": 1 + function(*arrays)["x"]}

    (one,) = check(every_function(change)).found
    assert (one.flag, one.says[:39]) == ("", "for an alpha of 0 the output is off by ")


def test_without_an_alpha_an_alpha_of_0_changes_nothing():
    def forward(x, weight, bias, A, B, alpha):
        return PLAIN.forward(x, weight, bias, A, B, len(A))

    report = check(SimpleNamespace(forward=forward, scaling="1"))
    assert report.passed, str(report)
    assert report.claims["alpha of 0"] == "ok"


def refuses(m, n):
    if not n.all():
        raise ValueError("a row of zeros")
    return m / n


NAN = "DoRA divides by the norm of a row of zeros"
GAINS = {
    "plain": (lambda m, n: m / n, NAN),
    "guarded": (lambda m, n: m / np.where(n == 0, 1, n), "ok"),
    "shifted": (lambda m, n: m / n if n.all() else 1.0 + m, "where a row of the weight is zero the output is off by "),
    "refused": (refuses, REFUSED),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float64") for name in GAINS), ("plain", "bfloat16")])
def test_dora_at_a_row_of_zeros_is_the_bias(name, dtype):
    gain, said = GAINS[name]

    def forward(x, weight, bias, A, B, alpha, m):
        V = weight + alpha / len(A) * (B @ A)
        y = gain(m, np.sqrt((V * V).sum(axis=1))) * (x @ V.T)
        return y if bias is None else y + bias

    report = report_of("dora", dtype, forward=forward)
    assert report.claims["row of zeros"].startswith(said)
    assert report.passed is (said in ("ok", REFUSED))
    assert failing(report) == ([] if report.passed else ["dora-row-of-zeros"])


# --- habits ---------------------------------------------------------------------------------------


def test_habits_are_told_and_do_not_count():
    rng = np.random.default_rng(0)

    def forward(x, *arrays):
        if not x.flags.c_contiguous:
            raise TypeError("C order only")
        return PLAIN.forward(x, *arrays).astype(np.longdouble) * (1 + np.longdouble(1e-16) * rng.standard_normal())

    report = check(beside_forward(forward=forward))
    assert report.passed
    assert report.habits["dtype kept"] == f"{np.dtype(np.longdouble)} is returned for float64"
    assert report.habits["same bits twice"] == "two calls differ"
    assert report.habits["memory order"].startswith("in Fortran order forward raises TypeError: C order only (N=7")
