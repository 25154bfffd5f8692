"""The questions: each has an experiment that answers it, the answer's reason, and hints for wrong answers.

`check_prediction` grades an answer. The site grades the same questions in the page: `sheet` is what it takes of them,
as JSON, and `verdict` is how both judge. A number is right to 5 %. A wrong answer that many people give has a hint of
its own. Any other gets the question's hint, and the next one a hint that says more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from ..checks import check_choice, check_number
from ..language.memory import LLAMA_2_7B, training_memory
from ..linear import Linear
from ..lora import LoRA
from ..optim import Adam
from ..training import evaluate, train
from ..variants.adapter import Adapter
from ..variants.dora import DoRA, DoRAAdapter
from ..verify.closed_form import best_adapter

TOLERANCE = 0.05
"""How far a number may be off, as a part of what the experiment gives."""
ZERO = 1e-6
"""How far it may be off where the experiment gives zero."""


class Question(NamedTuple):
    """A question, and what a grader says to each answer."""

    text: str
    run: Callable[[], float | str]  # the experiment: a number, or one of the choices
    why: str  # told with the right answer
    hints: tuple[str, str]  # for a wrong answer that is not known: the first, and any later one
    known: Mapping[float | str, str]  # wrong answers with hints of their own; all other choices, where there are some
    choices: tuple[str, ...] = ()


def check_prediction(question: str, guess: float | str) -> bool:
    """Grade an answer to a question: run its experiment and compare.

    Parameters
    ----------
    question : str
        Its name, of `QUESTIONS`, which has their texts.
    guess : float or str
        The number that you expect, right to 5 %; or one of the question's choices.

    Returns
    -------
    bool
        Whether it is right. The verdict is printed, and the experiment's number only where you had it. A second wrong
        answer to a question gets another hint than the first.

    Raises
    ------
    ValueError, TypeError
        If there is no such question or choice, or the guess is no number where one is asked.
    """
    check_choice("question", question, tuple(QUESTIONS))
    choices = QUESTIONS[question].choices
    if choices:
        guess = check_choice("guess", str(guess) if isinstance(guess, int) else guess, choices)
    else:
        guess = check_number("guess", guess, above=-np.inf)
    right, says = verdict(sheet(question), guess, earlier=_wrong[question])
    _wrong[question] = 0 if right else _wrong[question] + 1
    print(says)
    return right


_wrong: Counter[str] = Counter()
"""How many wrong answers each question got since its last right one: which hint comes next."""


def sheet(name: str) -> dict[str, Any]:
    """Return what an answer to a question is judged by, after its experiment; JSON can hold it."""
    question = QUESTIONS[name]
    answer = _answer(name)
    result = answer if isinstance(answer, str) else f"{answer:.4g}" if abs(answer) > ZERO else "0, but for rounding"
    told = f"{result}. {question.why}"
    data: dict[str, Any] = {"answer": answer, "right": f"Right: {told}", "solution": f"The answer is {told}"}
    data |= {"known": [list(pair) for pair in question.known.items()], "hints": list(question.hints)}
    return data | {"tolerance": TOLERANCE, "zero": ZERO, "choices": list(question.choices)}


@cache  # an experiment gives the same each time
def _answer(name: str) -> float | str:
    return QUESTIONS[name].run()


def verdict(data: Mapping[str, Any], guess: float | str, earlier: int) -> tuple[bool, str]:
    """Return whether an answer is right, and what to say to it after that many `earlier` wrong ones.

    `docs/_static/questions.js` has the same function.
    """

    def off(value: float | str) -> float:  # in tolerances
        if isinstance(guess, str) or isinstance(value, str):
            return 0.0 if guess == value else np.inf
        return float(abs(guess - value) / max(data["tolerance"] * abs(value), data["zero"]))

    if off(data["answer"]) <= 1:
        return True, data["right"]
    near = min(data["known"], key=lambda pair: off(pair[0]))
    hint = near[1] if off(near[0]) <= 1 else data["hints"][min(earlier, 1)]
    return False, f"Not yet. {hint}"


# --- the experiments --------------------------------------------------------------------------------------------------


def first_problem(alpha: float = 3.0) -> tuple[LoRA, np.ndarray, dict[str, np.ndarray]]:
    """Return an adapter at its start, inputs, and its gradients for a random dy."""
    rng = np.random.default_rng(5)
    layer = LoRA.init(6, 4, rank=2, alpha=alpha, rng=rng, dtype="float64")
    x, dy = rng.standard_normal((8, 6)), rng.standard_normal((8, 4))
    return layer, x, layer.backward(dy, layer.forward(x)[1])[1]


def _first_step(scale: float = 1.0) -> float:
    layer, _, grads = first_problem()
    Adam(layer.trainable(), lr=0.01).step({name: scale * g for name, g in grads.items()})
    return float(np.abs(layer.lora_B).max())


def _after_plain_step(alpha: float) -> float:
    layer, x, grads = first_problem(alpha)
    layer.lora_B -= 0.01 * grads["lora_B"]
    return float(np.abs(layer(x)).max())


def _slope_of_B(alpha: float) -> float:
    return float(np.abs(first_problem(alpha)[2]["lora_B"]).max())


def _off_by_one() -> float:
    X = np.random.default_rng(6).standard_normal((20_000, 50))
    return float(((X @ np.ones((50, 4))) ** 2).mean())


def _kept(rank: int | None = None, bits: int = 16) -> float:
    """Return the gigabytes that training a 7B model keeps, without activations."""
    parts = training_memory(LLAMA_2_7B, tokens=1, rank=rank, bits=bits)
    return sum(parts[part] for part in ("weights", "trained", "gradients", "Adam")) / 1e9


CURVE_RANKS = (1, 2, 4, 8, 16)


def rank_curve() -> dict[int, tuple[float, float]]:
    """Return for each rank the loss on the 60 rows that the best adapter was fitted to, and that on 2,000 new rows."""
    rng = np.random.default_rng(0)
    change = rng.standard_normal((24, 4)) @ rng.standard_normal((4, 32)) / 2

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((count, 32))
        return x, x @ change.T + 2 * rng.standard_normal((count, 24))

    seen, new = rows(60), rows(2000)
    adapters = {rank: best_adapter(*seen, rank=rank) for rank in CURVE_RANKS}
    return {
        rank: (float(((layer(seen[0]) - seen[1]) ** 2).mean()), float(((layer(new[0]) - new[1]) ** 2).mean()))
        for rank, layer in adapters.items()
    }


def _best_rank() -> str:
    curve = rank_curve()
    return str(min(curve, key=lambda rank: curve[rank][1]))


RATES = (0.0005, 0.002, 0.008, 0.03, 0.12)


@cache
def rate_curve() -> dict[float, tuple[float, float]]:
    """Return for each rate the loss of an adapter of rank 4 on the 60 rows of its training, and on 2,000 new rows."""
    rng = np.random.default_rng(3)
    change = rng.standard_normal((8, 4)) @ rng.standard_normal((4, 24)) / 6

    def rows(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((count, 24))
        return x, x @ change.T + rng.standard_normal((count, 8))

    seen, new, curve = rows(60), rows(2000), {}
    for rate in RATES:
        layer = LoRA.init(24, 8, rank=4, alpha=8, rng=np.random.default_rng(1), dtype="float64")
        train(layer, *seen, epochs=150, batch_size=20, lr=rate, rng=np.random.default_rng(2))
        curve[rate] = evaluate(layer, *seen), evaluate(layer, *new)
    return curve


def _best_rate() -> str:
    curve = rate_curve()
    return str(min(curve, key=lambda rate: curve[rate][1]))


FACTORS = {"1/16": 1 / 16, "1/4": 1 / 4, "1": 1, "4": 4, "16": 16}


def growth(rows: int, use_rslora: bool = False) -> float:
    """Return by which factor Adam's first move of the output grows from rank 4 to rank 64, on the rows of its step."""
    rng = np.random.default_rng(8)

    def move(rank: int) -> float:
        start = LoRA.init(128, 32, rank=rank, alpha=8, rng=rng, dtype="float64")
        layer = Adapter(start.lora_A, start.lora_B, 8, use_rslora=use_rslora)
        x, dy = rng.standard_normal((rows, 128)), rng.standard_normal((rows, 32))
        Adam(layer.trainable(), lr=1e-3).step(layer.backward(dy, layer.forward(x)[1])[1])
        return float(np.abs(layer(x)).mean())

    times = max(8, 64 // rows)  # the fewer rows, the more the moves differ
    few, many = (np.mean([move(rank) for _ in range(times)]) for rank in (4, 64))
    return float(many / few)


def _nearest_factor(rows: int, use_rslora: bool = False) -> str:
    measured = growth(rows, use_rslora)
    return min(FACTORS, key=lambda name: abs(np.log(FACTORS[name] / measured)))


def _along_V() -> float:
    """Return dV_o V_o of a DoRA layer's full gradient, the largest over its rows.

    The adapter's A is the identity and s = 1. So V = W + B, and dB is dV.
    """
    rng = np.random.default_rng(9)
    W, B, m = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), rng.standard_normal(3)
    layer = DoRA(Linear(W), DoRAAdapter(np.eye(4), B, alpha=4, magnitude=m, dora_norm="full"))
    x, dy = rng.standard_normal((6, 4)), rng.standard_normal((6, 3))
    _, grads = layer.backward(dy, layer.forward(x)[1])
    return float(np.abs((grads["lora_B"] * (W + B)).sum(axis=1)).max())


# --- the questions ----------------------------------------------------------------------------------------------------

_SIGNS = "Each entry of B moves by lr, so the output moves by s times a sum of r terms, each lr |h_k| or its negative."
_MOVE = "Adam takes its first step from B = 0, at alpha/r. The rank goes from 4 to 64, and alpha stays."

QUESTIONS: dict[str, Question] = {
    "first step": Question(
        "B is zero, and Adam takes its first step with lr = 0.01. How large is the largest entry of B?",
        _first_step,
        "Adam's first step is lr times the sign of the gradient.",
        (
            "Look at (22) to (24) for t = 1: what are m_hat and v_hat?",
            "At t = 1, m_hat = g and the root of v_hat is |g|. Put both into (24).",
        ),
        {
            0: "B does not stay at zero: dB = s dy^T h contains h = x A^T, and A is not zero.",
            1: "This is the step in units of lr.",
            0.001: "m is (1 - beta1) g, but (22) divides it by 1 - beta1 at t = 1.",
            -0.01: "This is the sign of a step. How large is the largest entry, without its sign?",
        },
    ),
    "larger gradients": Question(
        "The same step, with all gradients 100 times larger. By what factor is B's largest entry larger?",
        lambda: _first_step(100) / _first_step(),
        "m_hat and the root of v_hat grow alike, and their ratio stays.",
        (
            "Numerator and denominator of (24) both contain the gradient.",
            "m_hat grows by 100. v_hat is a mean of squares: by what does its root grow?",
        ),
        {
            100: "So it is for a plain step, B -= lr dB. Adam divides by something that grows, too.",
            0.01: "The denominator grows by 100, and so does the numerator.",
            10: "The root in (24) is of v_hat, which holds g^2: the root grows by 100, not by 10.",
        },
    ),
    "larger alpha": Question(
        "B is zero, and alpha doubles. By what factor does dB grow, for the same dy?",
        lambda: _slope_of_B(6.0) / _slope_of_B(3.0),
        "dB = s dy^T h contains s once.",
        ("How often does s stand in (3)?", "In dB = s dy^T h, with h = x A^T, alpha is in s alone, and s = alpha/r."),
        {
            1: "dB contains s, and s = alpha/r.",
            4: "So the output of a plain step grows. dB itself contains s once.",
            1.414: "alpha has no root in s: s = alpha/r. rsLoRA takes a root, of the rank.",
            0.5: "s = alpha/r grows with alpha.",
        },
    ),
    "larger alpha, plain steps": Question(
        "B is zero, alpha doubles, and one plain step B -= lr dB is taken. By what factor is the new output larger?",
        lambda: _after_plain_step(6.0) / _after_plain_step(3.0),
        "s enters twice: once through dB, and once through y = s h B^T. Under Adam it would be once.",
        (
            "s stands in (3), which makes B, and again in (2), which uses it.",
            "B = -lr s dy^T h after the step. Put that into y = s h B^T and count the s.",
        ),
        {
            1: "Both dB and y contain s.",
            2: "So B grows. The output is y = s h B^T, with the same s in front.",
            8: "s stands in dB and in y. A has not moved, so nothing brings a third.",
        },
    ),
    "off by one": Question(
        "Inputs are 50 normal numbers of variance 1. Every weight is off by 1. What is the mean squared error?",
        _off_by_one,
        "The error of an output is a sum of 50 such numbers, and the variances add.",
        (
            "The error of one output is the sum of a row of inputs. What is the mean of its square?",
            "The square of a sum has 50 squares, each 1 in the mean, and products of two, each 0 in the mean.",
        ),
        {
            0: "The errors have both signs and mean 0. Their squares do not.",
            1: "So it is for one input. Here 50 of them add up.",
            7.071: "This is the root of it: the size of an error, not its square.",
            2500: "So it is where all inputs are 1. Inputs of both signs cancel in part.",
        },
    ),
    "7B in full": Question(
        "Llama 2 7B has 6.74 billion weights. Full fine-tuning keeps each in 16 bits, a copy of it in float32 that the "
        "optimizer updates, its gradient in 16 bits, and Adam's two moments in float32. How many GB (10^9 bytes) is "
        "this, without activations?",
        _kept,
        "2 + 4 + 2 + 8 = 16 bytes for each weight.",
        (
            "Count the bytes for one weight first: 16 bits are 2 bytes, a float32 is 4.",
            "For one weight: 2 in 16 bits, 4 of the copy, 2 of its gradient, 4 of m and 4 of v. Multiply by 6.74.",
        ),
        {
            13.48: "These are the weights alone.",
            26.95: "This is one float32 for each weight. What else is kept?",
            53.91: "8 bytes a weight: half of what is kept. Adam's two moments alone take this much.",
            80.86: "12 bytes a weight: 4 are missing. Adam has two moments.",
            94.34: "14 bytes a weight: the weights themselves, in 16 bits, are missing, or the gradients.",
            100.4: "This is in GiB, of 2^30 bytes. A GB is 10^9 bytes.",
            121.3: "18 bytes a weight: 2 too many. The gradient has 16 bits here.",
        },
    ),
    "7B at 4 bits": Question(
        "The same model, frozen: 6.48 billion weights in its layers at 4.127 bits each, the other 0.26 billion in 16 "
        "bits. Each of its 32 layers has seven matrices, four of 4096 x 4096 and three of 11008 x 4096 or turned, and "
        "each matrix an adapter of rank 16. A number of an adapter takes 16 bytes, with its gradient and its moments. "
        "How many GB is this?",
        lambda: _kept(rank=16, bits=4),
        "3.87 GB of weights, and 0.64 GB for the 40 million numbers of the adapters.",
        (
            "Add two parts: the weights, in bits / 8 bytes, and 16 bytes for each of r (in + out) numbers.",
            "Weights: 6.48 x 4.127 / 8 + 0.26 x 2. Adapters: 32 x 16 x (4 x 8192 + 3 x 15104) numbers of 16 bytes.",
        ),
        {
            0.64: "These are the adapters alone. LoRA keeps the weights, too.",
            3.866: "These are the weights alone.",
            14.12: "So it is with the weights in 16 bits.",
            107.8: "So it is in full.",
        },
    ),
    "rank from a curve": Question(
        "Adapters of rank 1, 2, 4, 8 and 16 were fitted to the same 60 rows. The curve, which "
        "exercises.rank_curve() returns, has the loss of "
        "each on these rows, and on new ones. Which rank do you take?",
        _best_rank,
        "There the loss on new rows is least: the true change has rank 4. More rank learns the noise of the 60 rows.",
        ("Read the curve of the new rows.", "Look for the lowest point of the curve of the new rows."),
        {
            "1": "On both curves the loss falls a lot from here. One direction is too few.",
            "2": "On both curves the loss still falls a lot from here.",
            "8": "From the rank before, the loss on the fitted rows falls and that on new rows rises.",
            "16": "Here the loss on the fitted rows is least, as it must be. Look at the rows that were not seen.",
        },
        tuple(map(str, CURVE_RANKS)),
    ),
    "rate from a curve": Question(
        "An adapter of rank 4 was trained on the same 60 rows at five rates, 450 steps each. The curve, which "
        "exercises.rate_curve() returns, has the loss on these rows, and on new ones. Which rate do you take?",
        _best_rate,
        "There the loss on new rows is least. Larger rates end higher there: the 60 rows have noise, which they learn.",
        ("Read the curve of the new rows.", "Look for the lowest point of the curve of the new rows."),
        {
            "0.0005": "Both losses still fall from here: this rate was not done after 450 steps.",
            "0.008": "Here the loss on the rows it trained on is least. Look at the rows that it did not see.",
            "0.03": "Both curves are higher than at a smaller rate.",
            "0.12": "Here the steps are so large that even the loss on the rows it trained on is higher.",
        },
        tuple(map(str, RATES)),
    ),
    "first move, one row": Question(
        f"{_MOVE} The step is taken for one row. About how many times as far does it move that row's output?",
        lambda: _nearest_factor(1),
        "B takes the signs of h, so the r terms add up: the sum grows like r, and s = alpha/r shrinks like 1/r.",
        (_SIGNS, "For one row B takes the signs of h. What does the sum of |h_k| do as r grows, and what does s?"),
        {
            "1/16": "s falls to 1/16. But 16 times as many entries of B move.",
            "1/4": "So it is for unrelated rows, where the signs are mixed. For one row all terms have one sign.",
            "4": "So it would be at alpha/sqrt(r), where s falls to 1/4 only.",
            "16": "The sum has 16 times as many terms. But s = alpha/r falls.",
        },
        tuple(FACTORS),
    ),
    "first move, many rows": Question(
        f"{_MOVE} The step is taken for 512 unrelated rows. About how many times as far does it move their outputs?",
        lambda: _nearest_factor(512),
        "The signs of the terms are mixed, so the sum grows like sqrt(r), and s = alpha/r shrinks like 1/r. Here "
        "alpha/sqrt(r) would keep the move.",
        (_SIGNS, "B cannot take the signs of 512 rows. How does a sum of r terms of mixed signs grow?"),
        {
            "1/16": "s falls to 1/16. But the sum grows, if slowly: terms of mixed signs cancel in part, not in full.",
            "1": "So it is for one row, whose signs B takes. B cannot take those of 512 rows.",
            "4": "The sum grows 4 times, like sqrt(r). But s = alpha/r falls to 1/16.",
            "16": "The sum has 16 times as many terms, of mixed signs, and s = alpha/r falls.",
        },
        tuple(FACTORS),
    ),
    "along V": Question(
        "DoRA's weight is m_o V_oi / n_o with n_o = |V_o|. dV is the full gradient, with what passes through n. What "
        "is the sum over i of dV_oi V_oi?",
        _along_V,
        "V twice as long gives the same weight. So the loss has no slope along V_o, and dV_o is orthogonal to it.",
        (
            "Which change of V_o leaves m_o V_oi / n_o as it is?",
            "Stretch V_o by any factor: the weight stays. What is the slope of the loss in that direction?",
        ),
        {
            1: "This is the length of V_o / n_o. The question is about the slope of the loss along V_o.",
            -1: "The slope along V_o has no sign to lose. What does a longer V_o change?",
        },
    ),
}
"""The questions by their names, for `check_prediction`."""
