"""The claims that compare no layer's numbers: the frozen base, the start, Adam; and habits."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import check

from ..implementations import OURS, implementation, init
from ..planting import report_of, step_of

LINEAR = vars(OURS["linear"])


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


@pytest.mark.parametrize(("kind", "spread"), [*(("linear", spread) for spread in SPREADS), ("conv2d", "0.47")])
def test_a_spread_of_no_fan_is_described_only(kind, spread):
    def other(in_features, out_features, rank, rng, kernel=()):
        A, B = init(in_features, out_features, rank, rng, kernel)
        return SPREADS[spread](rng, A.shape), B

    report = report_of(kind, SimpleNamespace(**vars(OURS[kind]) | {"init": other}))
    assert report.claims["start"] == "ok"
    assert not report.diagnoses
    assert report.habits["spread of A"].endswith(": the same at every width; PEFT's is 1 / sqrt(3 in)")


@pytest.mark.parametrize("gain", [1, 10])
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
