"""When something is wrong: what all problems have in common on which it is, and no other problem.

A problem has fields: each may be true of all of them, above or below what it is elsewhere, or stand to another one as
it does nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import fields
from typing import Any

from ..problems.problem import Problem

WORDS = {"n": "N", "in_features": "in", "out_features": "out", "rank": "r"}
WORDS |= {"widths": "slots", "stabilised": "use_rslora"}
"""How a field is told, where it is not by its own name."""
TOLD = {
    "bias": ("there is a bias", "there is no bias"),
    "start": ("lora_B is zero", ""),  # the rule is no clue: where it is zero, a wrong update is right
    "near": ("the update cancels the base's output", "the update does not cancel the base's output"),
}
"""How a field is told that is true or false; empty where it is no clue."""
COUNTED = {"ranks": "adapters"}
"""What has one entry of a field each, where it is not told by the field."""
UNTOLD = {"seed", "idle", "sizes"}
SHAPES = {
    "the sizes": ("N", "in", "out", "r"),
    "lora_A's shape": ("r", "in"),
    "lora_B's shape": ("out", "r"),
    "the weight's shape": ("out", "in"),
}
"""What some keep results by. Where one comes again with other numbers, these are wrong."""
FEW = 3
"""Of so many problems anything decides."""
NUMBERS = ("no", "one", "two", "three", "four", "five")


def in_common(wrong: Sequence[Any], every: Sequence[Any]) -> str:
    """Say when it is wrong, where one thing decides that; empty where nothing does."""
    states = [problem in wrong for problem in every]
    return next(_deciding(every, states), "") if len(set(states)) > 1 and len(every) > FEW else ""


def _deciding(problems: Sequence[Problem], wrong: list[bool]) -> Iterator[str]:
    """Yield what decides, that which tells most first: what a kind has of its own, then what all problems have."""
    own = {field.name for field in fields(problems[0])} - {field.name for field in fields(Problem)}
    for names in (own, {field.name for field in fields(Problem)}):
        rows = [_traits(problem, names) for problem in problems]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if names is not own:
            yield from _relations(columns, wrong)
        # What is one and the same wherever it is right, as a dilation of 1, is told before what differs there too.
        usual = {name: {v for v, state in zip(columns[name], wrong, strict=True) if not state} for name in columns}
        for name in sorted(columns, key=lambda name: len(usual[name]) > 1 and not name.startswith("the number of")):
            values = columns[name]
            if text := (_so if isinstance(values[0], bool) else _apart)(name, values, wrong):
                yield text


def _traits(problem: Problem, names: Set[str]) -> dict[str, Any]:
    """Return fields of a problem under their words; of a tuple how many there are, how large, and whether alike."""
    traits: dict[str, Any] = {}
    for name in (field.name for field in fields(problem) if field.name in names - UNTOLD):
        value, words = getattr(problem, name), WORDS.get(name, name)
        if not isinstance(value, tuple):
            traits[words] = value
        elif isinstance(value[0], bool):
            traits |= {f"all {words} are True": all(value), f"some {words} are True": any(value)}
            traits[f"{words} differ"] = len({*value}) > 1
        else:
            traits |= {f"the number of {COUNTED.get(name, words)}": len(value), f"the largest of {words}": max(value)}
            traits |= {f"the smallest of {words}": min(value), f"{words} differ": len({*value} - {0}) > 1}
    return traits


def _relations(columns: dict[str, list[Any]], wrong: list[bool]) -> Iterator[str]:
    """Yield how the sizes of a problem stand to one another, or to those of an earlier one."""
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
        yield "where alpha / r is no whole number"


def _so(name: str, values: list[bool], wrong: list[bool]) -> str:
    """Say whether something is so where it is wrong, and not elsewhere, or the other way round."""
    yes, no = TOLD.get(name, (name, f"not so: {name}"))
    words = yes if values == wrong else no if values == [not state for state in wrong] else ""
    return f"where {words}" if words else ""


def _apart(name: str, values: Sequence[Any], wrong: Sequence[bool]) -> str:
    """Say whether a number is above or below what it is elsewhere."""
    states = list(zip(values, wrong, strict=True))
    bad, good = [value for value, state in states if state], [value for value, state in states if not state]
    count = name.partition("the number of ")[2]
    if count and len({*bad}) == 1 and bad[0] not in good:
        return f"of {NUMBERS[bad[0]]} {count if bad[0] > 1 else count.removesuffix('s')}"
    if min(bad) > max(good):
        above = next((bound for bound in (0, 1) if max(good) <= bound < min(bad)), max(good))  # what is easier to say
        return f"where {name} is above {above:g}"
    if max(bad) < min(good):
        below = next((bound for bound in (0, 1) if max(bad) < bound <= min(good)), min(good))
        return f"where {name} is {bad[0]:g}" if len({*bad}) == 1 else f"where {name} is below {below:g}"
    return ""
