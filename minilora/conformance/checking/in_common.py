"""Find what the problems with a wrong answer have in common that the other problems do not.

It may be a field that is true only there, a field whose values are all above or all below those elsewhere, or a
relation between two fields.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import fields
from typing import Any

from ..problems.problem import Problem

SIZE_WORDS = {"n": "N", "in_features": "in", "out_features": "out", "rank": "r"}
SIZE_WORDS |= {"widths": "slots", "stabilised": "use_rslora"}
"""The words for fields that messages do not call by their own name."""
BOOLEANS = {
    "bias": ("there is a bias", "there is no bias"),
    "start": ("lora_B is zero", ""),  # the converse is no clue: if lora_B is zero, even a wrong update is right
    "near": ("the update cancels the base's output", "the update does not cancel the base's output"),
}
"""The words for boolean fields, if true and if false; empty if the value is no clue."""
ENTRIES = {"ranks": "adapters"}
"""The things that a tuple field has one entry for, if the field has another name."""
UNMENTIONED = {"seed", "idle", "sizes"}
SHAPES = {
    "the sizes": ("N", "in", "out", "r"),
    "lora_A's shape": ("r", "in"),
    "lora_B's shape": ("out", "r"),
    "the weight's shape": ("out", "in"),
}
"""Shapes that an implementation may cache results by; when a shape recurs with other numbers, these are wrong."""
TOO_FEW_PROBLEMS = 3
"""With this many problems or fewer, some field always fits by chance."""
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five")


def in_common(wrong: Sequence[Any], every: Sequence[Any]) -> str:
    """Say when an answer is wrong, if one condition decides it; empty if none does."""
    states = [problem in wrong for problem in every]
    return next(_rules(every, states), "") if len(set(states)) > 1 and len(every) > TOO_FEW_PROBLEMS else ""


def _rules(problems: Sequence[Problem], wrong: list[bool]) -> Iterator[str]:
    """Yield the conditions that decide, the most telling first: a kind's own fields, then those of all problems."""
    own = {field.name for field in fields(problems[0])} - {field.name for field in fields(Problem)}
    for names in (own, {field.name for field in fields(Problem)}):
        rows = [_traits(problem, names) for problem in problems]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if names is not own:
            yield from _relations(columns, wrong)
        # A field with one value wherever the answer is right, such as a dilation of 1, comes before one that varies.
        usual = {name: {v for v, state in zip(columns[name], wrong, strict=True) if not state} for name in columns}
        for name in sorted(columns, key=lambda name: len(usual[name]) > 1 and not name.startswith("the number of")):
            values = columns[name]
            if text := (_boolean_rule if isinstance(values[0], bool) else _number_rule)(name, values, wrong):
                yield text


def _traits(problem: Problem, names: Set[str]) -> dict[str, Any]:
    """Return a problem's fields, keyed by their words; a tuple gives its length, extremes, and whether they differ."""
    traits: dict[str, Any] = {}
    for name in (field.name for field in fields(problem) if field.name in names - UNMENTIONED):
        value, words = getattr(problem, name), SIZE_WORDS.get(name, name)
        if not isinstance(value, tuple):
            traits[words] = value
        elif isinstance(value[0], bool):
            traits |= {f"all {words} are True": all(value), f"some {words} are True": any(value)}
            traits[f"{words} differ"] = len({*value}) > 1
        else:
            traits |= {f"the number of {ENTRIES.get(name, words)}": len(value), f"the largest of {words}": max(value)}
            traits |= {f"the smallest of {words}": min(value), f"{words} differ": len({*value} - {0}) > 1}
    return traits


def _relations(columns: dict[str, list[Any]], wrong: list[bool]) -> Iterator[str]:
    """Yield the relations that decide, between sizes of one problem, or to the shapes of an earlier one."""
    for what, names in SHAPES.items():
        met = list(zip(*(columns[name] for name in names), strict=True))
        if [shape in met[:i] for i, shape in enumerate(met)] == wrong:
            yield f"with {what} of an earlier problem (is something kept between calls?)"
    width = [min(widths) for widths in zip(columns["in"], columns["out"], strict=True)]
    pairs = [("in", "out", columns["out"]), ("r", "the smaller width", width), ("alpha", "r", columns["r"])]
    for one, other, values in pairs:
        signs = [(a > b) - (a < b) for a, b in zip(columns[one], values, strict=True)]
        for words, signs_of in {"=": (0,), "is above": (1,), "is below": (-1,), "is not": (-1, 1)}.items():
            if [sign in signs_of for sign in signs] == wrong:
                yield f"where {one} {words} {other}"
    if [a % r != 0 for a, r in zip(columns["alpha"], columns["r"], strict=True)] == wrong:
        yield "where alpha / r is not a whole number"


def _boolean_rule(name: str, values: list[bool], wrong: list[bool]) -> str:
    """Return the condition on a boolean field, if it holds exactly where the answer is wrong, or exactly elsewhere."""
    yes, no = BOOLEANS.get(name, (name, f"it is not true that {name}"))
    words = yes if values == wrong else no if values == [not state for state in wrong] else ""
    return f"where {words}" if words else ""


def _number_rule(name: str, values: Sequence[Any], wrong: Sequence[bool]) -> str:
    """Return the condition on a number, if it is above or below its values elsewhere wherever the answer is wrong."""
    states = list(zip(values, wrong, strict=True))
    bad, good = [value for value, state in states if state], [value for value, state in states if not state]
    count = name.partition("the number of ")[2]
    if count and len({*bad}) == 1 and bad[0] not in good:
        return f"with {NUMBER_WORDS[bad[0]]} {count if bad[0] > 1 else count.removesuffix('s')}"
    if min(bad) > max(good):
        above = next((bound for bound in (0, 1) if max(good) <= bound < min(bad)), max(good))  # 0 and 1 read best
        return f"where {name} is above {above:g}"
    if max(bad) < min(good):
        below = next((bound for bound in (0, 1) if max(bad) < bound <= min(good)), min(good))
        return f"where {name} is {bad[0]:g}" if len({*bad}) == 1 else f"where {name} is below {below:g}"
    return ""
