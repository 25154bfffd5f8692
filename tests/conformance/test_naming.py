"""The search for mistakes, in a world of three cases and three answers: which rows are named, and who wins ties."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from minilora.conformance.naming import MEASURED_COUNT, Named, World, Wrong, factor, name, off
from minilora.texts import enumerated

NUMBERS = np.arange(1.0, 61.0)


def answers(case, parts):
    """Return y = a + b, g = 2 a and h = 3 b, each times the case; with `none`, h is missing."""
    a, b = parts.get("a", NUMBERS) * case, parts.get("b", 1.0) * case
    found = {"y": parts.get("c", 0.0) + a + b, "g": 2 * a, "h": 3 * b + 0 * NUMBERS}
    return {**found, "h": None} if "none" in parts else found


def row(flag, parts, **more):
    return Wrong(flag, f"{flag} is wrong", parts, **more)


def world(*rows, cases=(1.0, 2.0, 3.0), **more):
    words = {"y": "the sum", "g": "the double", "h": "the triple"}
    return World(cases, answers, lambda case, key, parts: 1e-9, rows, **{"words": words} | more)


def given(parts, cases=(1.0, 2.0, 3.0), keys="ygh", also=lambda case: {}):
    """Return the answers of an implementation that replaces parts, restricted to some keys or changed by `also`."""
    return [{key: also(case).get(key, answers(case, parts)[key]) for key in keys} for case in cases]


def said(world, given):
    return [named.says for named in name(world, given)[1]]


def flags(world, given):
    return [named.flag for named in name(world, given)[1]]


A, B = row("a", {"a": NUMBERS + 1}), row("b", {"b": 5.0}, source="somebody/something #1")


@pytest.mark.parametrize(
    ("keys", "also", "where"),
    [
        ("ygh", {}, ""),
        ("yg", {}, ", in everything that is computed"),
        ("g", {}, ""),
        ("yg", {"g"}, ", only in the sum"),
    ],
)
def test_a_row_is_named_with_where_it_shows(keys, also, where):
    """The answers are named only if the mistake could have shown in others too."""
    wrong = given(A.parts, keys=keys, also=lambda case: {key: answers(case, {})[key] for key in also})
    assert said(world(A, B), wrong) == [f"a is wrong{where}"]
    assert said(world(A, B, words={}), wrong) == ["a is wrong"]


def test_a_name_has_its_flag_its_source_and_the_cases():
    assert name(world(A, B), given({})) == (frozenset(), [])  # right answers need no mistake
    (named,) = name(world(A, B), given(B.parts))[1]
    assert (named.flag, named.source, named.cases) == ("b", "somebody/something #1", (0, 1, 2))


def test_two_rows_are_named_each_for_what_it_explains():
    wrong = given(A.parts, keys="gh", also=lambda case: {"h": answers(case, B.parts)["h"]})
    assert {named.flag: named.explains for named in name(world(A, B), wrong)[1]} == {"a": {"g"}, "b": {"h"}}


def test_a_row_on_top_of_the_first_shows_with_it():
    wrong = given({**A.parts, **B.parts})
    first, second = name(world(A, B), wrong)[1]
    assert (first.says, first.on_top) == ("a is wrong", False)
    assert (second.flag, second.on_top, second.explains) == ("b", True, {"y", "h"})
    of_y = given({**A.parts, **B.parts}, also=lambda case: {"h": answers(case, {})["h"]})
    alone = row("alone", {"a": NUMBERS - 1, "b": 7.0})  # it would change g in addition to h
    assert flags(world(A, alone, B), of_y) == ["a", "b"]


def test_rows_of_two_slots_are_wrong_at_once():
    c = row("c", {"c": 7.0}, source="another #2")
    both = [replace(A, slot="scaling", source="one #1"), c]
    wrong = given({**A.parts, **c.parts}, keys="y")
    assert said(world(*both), wrong) == ["a is wrong and, at the same time, c is wrong"]
    assert said(world(*both[::-1]), wrong) == said(world(*both), wrong)
    (one,) = name(world(*both), wrong)[1]
    assert (one.flag, one.source) == ("a+c", "one #1, another #2")
    assert said(world(A, c), wrong) == []  # both have the same slot


def test_a_row_that_fits_by_itself_is_named_without_another():
    both = row("both", {**A.parts, "c": 7.0}, count=2)
    rows = [replace(A, slot="scaling"), row("c", {"c": 7.0}), both]
    assert flags(world(*rows), given(both.parts, keys="y")) == ["both"]


TIES = {
    "the one that explains more": ([row("z", A.parts, count=9), row("a", A.parts, shows=("y",))], "z"),
    "the one that would change fewer others": (
        [row("z", {**A.parts}), row("a", {**A.parts, "b": 5.0})], "z"),
    "the one that replaces fewer parts": ([row("z", A.parts), row("a", A.parts, count=2)], "z"),
    "a known one over a measured one": ([row("z", A.parts, count=9), row("a", A.parts, count=MEASURED_COUNT)], "z"),
    "the one whose flag comes first": ([row("z", A.parts), row("y", A.parts), row("x", A.parts)], "x"),
}  # fmt: skip


@pytest.mark.parametrize("which", TIES)
def test_the_order_of_the_rows_does_not_matter(which):
    rows, flag = TIES[which]
    for order in permutations(rows):
        assert name(world(*order), given(A.parts, keys="gh" if "others" in which else "ygh"))[1][0].flag == flag


def test_a_row_by_itself_wins_over_one_on_top():
    y = frozenset("y")
    alone, on_top = Named((row("z", A.parts, count=9),), y, y), Named((row("a", A.parts),), y, y, on_top=True)
    assert min(on_top, alone, key=lambda named: named.order) is alone


def test_a_row_that_does_not_fit_everywhere_is_not_named():
    wrong = given(A.parts)
    wrong[2] = {**wrong[2], "y": wrong[2]["y"] + 1}
    assert [named.explains for named in name(world(A, B), wrong)[1]] == [{"g"}]


def when(some, every):
    return "above one" if len(every) == 3 and min(some) > 1 else f"of {len(every)}"


def test_a_row_that_fits_some_cases_is_named_with_them():
    wrong = [given({})[0], *given(A.parts)[1:]]
    says = "on 2 of 3 problems, those above one: a is wrong"
    assert said(world(A, B, when=when), wrong) == [says]
    assert name(world(A, B, when=when), wrong)[1][0].cases == (1, 2)
    assert said(world(A, B), wrong) == []
    wrong = [*given({})[:2], given(A.parts)[2]]
    assert said(world(A, B, when=lambda some, every: ""), wrong)[0].startswith(
        "on 1 of 3 problems, the one where it shows: a"
    )


def test_rows_that_fit_different_cases_are_named_for_each_answer():
    wrong = given({}, keys="gh")
    for i, (key, parts) in ((0, ("h", B.parts)), (1, ("h", B.parts)), (1, ("g", A.parts)), (2, ("g", A.parts))):
        wrong[i] = {**wrong[i], key: answers(float(i + 1), parts)[key]}
    found = name(world(A, B, when=when), wrong)[1]
    assert [(named.flag, named.cases) for named in found] == [("a", (1, 2)), ("b", (0, 1))]


def test_cases_where_a_row_cannot_show_are_not_counted():
    some = row("some", lambda case: {"a": NUMBERS + 1} if case > 1 else {})
    wrong = [*given({})[:2], answers(3.0, {"a": NUMBERS + 1})]
    assert "of 2: some is wrong" in said(world(some, when=when), wrong)[0]


def test_rows_that_are_tried_last_explain_what_is_left():
    last = row("last", {"b": 5.0}, count=MEASURED_COUNT)
    assert flags(world(A, last=[last, B]), given(B.parts)) == ["b"]
    assert flags(world(B, last=[last]), given(B.parts)) == ["b"]
    only_one = [given({})[0], *given(B.parts)[1:]]
    assert flags(world(A, last=[last], when=when), only_one) == ["last"]
    assert name(world(A, last=[last]), only_one)[1] == []


def test_a_measured_row_is_not_used_for_other_answers():
    def measured(found):
        shift = float((found[0]["g"] / 2 - NUMBERS).mean())
        return [row("shifted", {"a": NUMBERS + shift}, count=MEASURED_COUNT)] if abs(shift) > 1e-6 else []

    here = world(B, measured=measured)
    for shift in (3.0, 4.0):
        assert flags(here, given({"a": NUMBERS + shift})) == ["shifted"]
    assert flags(world(A, measured=measured), given(A.parts)) == ["a"]


def test_a_missing_answer_is_explained_by_a_row_without_it():
    none = row("none", {"none": True})
    wrong = given({}, also=lambda case: {"h": None} if case else {})
    wrong = [{**found, "h": None} for found in wrong]
    assert name(world(A, none), wrong)[1][0].flag == "none"
    assert name(world(A, B), wrong) == ({"h"}, [])
    assert name(world(none), given({})) == (frozenset(), [])


@pytest.mark.parametrize(
    ("size", "entries", "times", "is_named"),
    [
        *((60, 0, 0, True), (60, 1, 99, True), (60, 2, 99, False), (60, 1, 101, False), (100, 2, 99, True)),
        *((49, 1, 99, True), (6, 1, 99, True), (6, 2, 99, False), (6, 1, 101, False)),
    ],
)
def test_one_entry_of_fifty_may_be_a_tie(monkeypatch, size, entries, times, is_named):
    """An answer with fewer than fifty entries may have one tie too."""
    monkeypatch.setitem(globals(), "NUMBERS", np.arange(1.0, 1.0 + size))
    moved, tied = np.where(np.arange(size) < entries, times * 1e-9, 0.0), row("a", {"a": NUMBERS + 1}, ties=100.0)
    wrong = [{"g": answers(case, tied.parts)["g"] + moved} for case in (1.0, 2.0, 3.0)]
    assert flags(world(tied), wrong) == ["a"] * is_named
    assert flags(world(replace(tied, ties=0.0)), wrong) == ["a"] * (entries == 0)


def test_the_tolerance_uses_the_parts_at_their_largest():
    def allowed(case, key, parts):
        return 1e-9 * parts.get("b", 1.0)

    wrong = [{"h": found["h"] + 4e-9} for found in given(B.parts)]
    for largest, found in ((None, ["b"]), (lambda case: {"b": 3.0}, [])):
        here = World((1.0, 2.0, 3.0), answers, allowed, [replace(B, largest=largest)])
        assert flags(here, wrong) == found


def test_rows_of_other_answers_are_not_computed():
    def refused(case, parts):
        assert "a" not in parts
        return answers(case, parts)

    here = World((1.0,), refused, lambda *_: 1e-9, [replace(A, shows=("g",)), B])
    assert flags(here, given(B.parts, cases=(1.0,))) == ["b"]


def test_predictions_are_cached_for_the_next_search():
    asked = []

    def counted(case, parts):
        asked.append(parts)
        return answers(case, parts)

    here = World((1.0, 2.0), counted, lambda *_: 1e-9, [A, B])
    name(here, given(A.parts, cases=(1.0, 2.0)))
    of_rows = [parts for parts in asked if parts]
    name(here, given(A.parts, cases=(1.0, 2.0)))
    assert [parts for parts in asked if parts] == of_rows


@pytest.mark.parametrize(
    ("found", "expected", "distance"),
    [
        (np.ones(2), np.ones(2) + 1e-9, 1),
        (np.ones(3), np.ones(2), np.inf),
        (np.array([1, np.nan]), np.ones(2), np.inf),
        (None, np.ones(2), np.inf),
        (np.ones(2), None, np.inf),
        (None, None, 0),
        (np.zeros(0), np.zeros(0), 0),
        (np.array([1e308]), np.array([-1e308]), np.inf),
    ],
)
def test_an_error_is_measured_in_tolerances(found, expected, distance):
    assert off(found, expected, 1e-9) == pytest.approx(distance)


def allowed(t):
    return 1e-9 * max(1.0, abs(t))


@pytest.mark.parametrize("t", [0.0, -1.5, 1.0, 1e6, 3e-8])
@pytest.mark.parametrize("size", [1.0, 1e200, 1e-200])
def test_a_factor_is_measured(t, size):
    measured = factor(5 + t * size * NUMBERS, size * NUMBERS, lambda t: size * allowed(t), without=np.full(60, 5.0))
    if size == 1.0:
        assert abs(measured.value - t) <= measured.slack < 1e-9 * max(1, abs(t))
        assert measured.differs_from(t + 1e-8 * max(1, abs(t)))
        assert not measured.differs_from(t)
    measured = factor(t * size * NUMBERS, size * NUMBERS, lambda t: size * allowed(t))
    assert measured.value == pytest.approx(t)


@pytest.mark.parametrize(
    "found", [NUMBERS**2, NUMBERS[:3], NUMBERS * np.nan, 1e306 * NUMBERS], ids=["square", "shape", "nan", "huge"]
)
def test_a_factor_must_fit_all_entries(found):
    assert factor(found, NUMBERS, allowed) is None
    assert factor(NUMBERS, 0 * NUMBERS, allowed) is None


@pytest.mark.parametrize(("times", "is_one"), [(0.9, True), (1.1, False)])
def test_a_factor_must_fit_within_the_tolerance(times, is_one):
    found = 2 * NUMBERS
    found[0] += times * allowed(2.0)
    assert (factor(found, NUMBERS, allowed) is not None) is is_one


@pytest.mark.parametrize(("names", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ("abc", "a, b and c")])
def test_names_are_listed_with_commas_and_an_and(names, text):
    assert not names or enumerated(names) == text
