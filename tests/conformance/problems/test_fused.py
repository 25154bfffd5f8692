"""Fused slots: right ones pass in each form, wrong ones written by hand are named, and wrong lists are told."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance.problems.kinds import KINDS

from ..implementations import OURS, with_kinds

RIGHT = OURS["fused"]


def start(widths, i):
    return sum(widths[:i])


def by_hand(
    place=lambda widths, i, adapted: start(widths, i),
    scaling=lambda alpha, A, i, adapted: alpha[i] / len(A[i]),
    factor=lambda i, adapted: i,
    left_out=lambda i, adapted: False,
):
    """Slots added one after another; where a wrong place or factor does not fit, the right one."""

    def updates(A, B, alpha, widths):
        adapted = [i for i, a in enumerate(A) if a is not None]
        for i in adapted:
            if not left_out(i, adapted):
                first = place(widths, i, adapted)
                fits = all(place(widths, j, adapted) + widths[j] <= sum(widths) for j in adapted)
                first = first if fits else start(widths, i)
                same = len({len(A[j]) for j in adapted}) == 1
                down = A[factor(i, adapted)] if same else A[i]
                yield slice(first, first + widths[i]), scaling(alpha, A, i, adapted), down, B[i]

    def forward(x, weight, bias, *slots):
        y = x @ weight.T + (0 if bias is None else bias)
        for rows, s, A, B in updates(*slots):
            y[..., rows] += s * (x @ A.T @ B.T)
        return y

    def merge(weight, *slots):
        merged = weight.copy()
        for rows, s, A, B in updates(*slots):
            merged[rows] += s * B @ A
        return merged

    return SimpleNamespace(forward=forward, merge=merge)


def report_of(implementation):
    return check(SimpleNamespace(forward=OURS["linear"].forward, kinds={"fused": implementation})).kinds["fused"]


def next_of_its_width(widths, i, adapted):
    return start(widths, i + (i + 1 < len(widths) and widths[i + 1] == widths[i]))


WRONG = {
    "the slots' updates stand in the opposite order": {"place": lambda w, i, adapted: sum(w[i + 1 :])},
    "a slot's update is added to the rows of the next one": {"place": next_of_its_width},
    "the slots are taken for equally wide": {"place": lambda w, i, adapted: i * (sum(w) // len(w))},
    "a slot without an adapter gets an update": {"place": lambda w, i, adapted: sum(w[j] for j in adapted if j < i)},
    "the last slot's update is left out": {"left_out": lambda i, adapted: i == adapted[-1]},
    "the first slot alone gets its update": {"left_out": lambda i, adapted: i != adapted[0]},
    "the first slot's scaling is taken for all": {
        "scaling": lambda alpha, A, i, adapted: alpha[adapted[0]] / len(A[adapted[0]])
    },
    "alpha is divided by the ranks of all slots together": {
        "scaling": lambda alpha, A, i, adapted: alpha[i] / sum(len(A[j]) for j in adapted)
    },
    "alpha is not divided by the rank": {"scaling": lambda alpha, A, i, adapted: alpha[i]},
    "the first slot's lora_A is used for all": {"factor": lambda i, adapted: adapted[0]},
}


def test_slots_added_one_after_another_pass():
    assert report_of(by_hand()).passed


@pytest.mark.long
@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_place_scale_or_factor_is_named(said):
    report = report_of(by_hand(**WRONG[said]))
    assert not report.passed
    (text,) = report.diagnoses
    assert text.startswith(said)


@pytest.mark.long
def test_a_path_that_dx_lacks_is_named():
    def backward(dy, x, weight, bias, A, B, alpha, widths):
        grads = RIGHT.backward(dy, x, weight, bias, A, B, alpha, widths)
        i = next(i for i, a in enumerate(A) if a is not None)
        own = dy[..., start(widths, i) : start(widths, i + 1)]
        return grads | {"x": dy @ weight + alpha[i] / len(A[i]) * own @ B[i] @ A[i]}

    (text,) = report_of(SimpleNamespace(**vars(RIGHT) | {"backward": backward})).diagnoses
    assert text.startswith("dx has the first slot's path alone")


def one_array(grads):
    return grads | {"lora_B": grads["lora_B"][-1]}


def without_the_last(grads):
    return grads | {"lora_B": grads["lora_B"][:-1]}


def transposed(grads):
    return grads | {"lora_A": [None if g is None else np.ascontiguousarray(g.T) for g in grads["lora_A"]]}


def of_all_slots(grads):
    return grads | {"lora_A": [np.ones((2, 5)) if g is None else g for g in grads["lora_A"]]}


def without_b(grads):
    return grads | {"lora_B": [None] * len(grads["lora_B"])}


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (one_array, "returns a ndarray for lora_B's gradient, expected a list, one for each slot"),
        (without_the_last, "returns gradients with 2 arrays for lora_B, expected 3, one for each slot"),
        (transposed, "returns gradients with shape (5, 2) for lora_A of slot 0, expected shape (2, 5)"),
        (of_all_slots, "returns gradients with lora_A of slot 1, which has no adapter"),
        (without_b, "returns gradients with nothing for lora_B of slot 0, expected shape (8, 2)"),
    ],
)
def test_a_gradient_that_is_no_such_list_is_told(change, said):
    def backward(*arrays):
        return change(RIGHT.backward(*arrays))

    report = report_of(SimpleNamespace(forward=RIGHT.forward, backward=backward))
    assert report.claims["slope"].startswith("backward")
    assert said in report.claims["slope"]
    assert any(said in text for text in report.diagnoses)


def test_a_factor_of_a_slot_that_is_changed_is_told():
    def forward(x, weight, bias, A, *slots):
        y = RIGHT.forward(x, weight, bias, A, *slots)
        A[-1][0, 0] += 1
        return y

    report = report_of(SimpleNamespace(forward=forward))
    assert report.claims["nothing is changed"] == "forward changes lora_A[2], which belongs to the caller"


def seen(**declared):
    """The slots, ranks and alphas that an implementation is asked for."""
    asked = []

    def forward(x, weight, bias, A, B, alpha, widths):
        asked.append((widths, [None if a is None else len(a) for a in A], alpha))
        return RIGHT.forward(x, weight, bias, A, B, alpha, widths)

    assert report_of(SimpleNamespace(forward=forward, **declared)).passed
    return asked


def test_the_slot_of_the_worst_entry_is_told():
    """In the array that stands for a list, and in the output."""

    def backward(*arrays):
        grads = RIGHT.backward(*arrays)
        return grads | {"lora_A": [*grads["lora_A"][:-1], 1.1 * grads["lora_A"][-1] + 0.01]}

    def forward(x, weight, bias, A, B, alpha, widths):
        y = RIGHT.forward(x, weight, bias, A, B, alpha, widths)
        y[..., widths[0]] += 1
        return y

    of_y, of_A = report_of(SimpleNamespace(forward=forward, backward=backward)).diagnoses
    assert ", 8], in slot 1: " in of_y
    assert ", in slot 2: " in of_A


@pytest.mark.long
@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (lambda A, widths: any(a is None for a in A), "where a slot has no adapter"),
        (lambda A, widths: len(widths) == 2, "of two slots"),
        (lambda A, widths: len(set(widths)) > 1, "where slots differ in width"),
    ],
)
def test_what_problems_with_a_wrong_answer_share_is_told(wrong, where):
    def forward(x, weight, bias, A, B, alpha, widths):
        y = RIGHT.forward(x, weight, bias, A, B, alpha, widths)
        return y + 0.1 * np.sin(y) if wrong(A, widths) else y

    (text,) = report_of(SimpleNamespace(forward=forward)).diagnoses
    assert text.startswith(f"the output, {where}, is off by ")


def test_all_forms_are_asked_for_unless_one_is_declared():
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


def test_another_number_of_slots_is_refused():
    with pytest.raises(CannotRun, match=r"slots of .* must be 2 or 3, got 4"):
        report_of(SimpleNamespace(forward=RIGHT.forward, slots=4))


@pytest.mark.long
@pytest.mark.parametrize("orientation", ["out, in", "in, out"])
def test_a_slots_factors_may_lie_the_other_way(orientation):
    def turned(value):
        if isinstance(value, list):
            return [turned(one) for one in value]
        return value.T if isinstance(value, np.ndarray) and value.ndim == 2 and orientation == "in, out" else value

    def forward(x, weight, bias, A, B, *more):
        return RIGHT.forward(x, turned(weight), bias, turned(A), turned(B), *more)

    def backward(dy, x, weight, bias, A, B, *more):
        grads = RIGHT.backward(dy, x, turned(weight), bias, turned(A), turned(B), *more)
        return {name: g if name == "x" else turned(g) for name, g in grads.items()}

    report = report_of(SimpleNamespace(forward=forward, backward=backward, orientation=orientation))
    assert report.passed, str(report)


def test_problems_tell_one_order_of_slots_from_another():
    """Widths, ranks and alphas of slots differ, where a bug would not be seen if they did not."""
    problems = KINDS["fused"].problems
    assert any(len(set(p.widths)) < len(p.widths) for p in problems)
    assert all(len({(a / r) for a, r in zip(p.alphas, p.ranks, strict=True) if r}) == len(p.adapted) for p in problems)


@pytest.mark.long
def test_slots_stand_beside_other_kinds():
    report = check(with_kinds(fused=RIGHT))
    assert report.passed
    assert "start" not in report.kinds["fused"].claims
