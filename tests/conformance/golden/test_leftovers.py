"""What each bug of an engine adds to the base for one prompt, by hand: adapters are letters, and times their weight."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from minilora.conformance.golden import leftovers
from minilora.conformance.golden.leftovers import LEFTOVERS, Engine, Moment
from minilora.conformance.golden.sessions import Use


@dataclass(frozen=True)
class Drawn:
    """An adapter of which only the configuration and the modules' names matter."""

    name: str
    config: dict = field(default_factory=dict)
    modules: dict = field(default_factory=dict)


PATTERNS = {"rank_pattern": {"q": 1}, "alpha_pattern": {"q": 2}}
ADAPTERS = {
    "a": Drawn("a", {"r": 1, **PATTERNS}, {"q": "q of a", "v": "v of a"}),
    "b": Drawn("b", {"r": 2, **PATTERNS}, {"q": "q of b", "lm_head": "head of b"}),
    "c": Drawn("c"),
    "d": Drawn("d"),
}
A, AGAIN, B = Use("x", Path("a"), 2.0), Use("x", Path("a"), 11.0), Use("x", Path("b"), 3.0)
C, D = Use("y", Path("c"), 5.0), Use("z", Path("d"), 7.0)
BEFORE, BATCH, LOADED = [A, C, None, AGAIN, D], (D, None, B, A, C), [C, D]
ANOTHER = Moment(B, BEFORE, BATCH, LOADED)  # of this name another adapter was asked for before, twice
NOBODY = Moment(None, BEFORE, BATCH, LOADED)
SAME = Moment(B, [None, B], (B, B))
RIGHT = None
SUMS = {
    "the-adapter-that-had-this-name-answers": ("2 a", RIGHT, RIGHT),
    "the-scale-is-ignored": ("1 b", RIGHT, "1 b"),
    "the-scale-of-the-request-before-stays": ("11 b", RIGHT, "3 b"),
    "the-first-scale-stays": ("2 b", RIGHT, "3 b"),
    "the-scales-of-requests-are-multiplied": ("66 b", RIGHT, "9 b"),
    "the-scale-acts-squared": ("9 b", RIGHT, "9 b"),
    "the-first-adapter-of-a-batch-is-taken-for-all": ("7 d", "7 d", RIGHT),
    "the-last-adapter-of-a-batch-is-taken-for-all": ("5 c", "5 c", RIGHT),
    "prompts-without-an-adapter-get-the-first-of-the-batch": ("3 b", "7 d", RIGHT),
    "prompts-without-an-adapter-get-the-last-of-the-batch": ("3 b", "5 c", RIGHT),
    "all-adapters-of-a-batch-are-added-to-each-prompt": ("7 d + 3 b + 2 a + 5 c",) * 2 + (RIGHT,),
    "the-adapters-of-a-batch-are-sorted-and-its-prompts-are-not": ("2 a", "3 b", RIGHT),  # as None, b, a, c, d
    "each-prompt-of-a-batch-gets-the-next-ones-adapter": ("2 a", "3 b", RIGHT),
    "each-prompt-of-a-batch-gets-the-adapter-before": ("", "7 d", RIGHT),
    "what-was-added-stays-in-the-weights": ("2 a + 5 c + 11 a + 7 d + 3 b", "2 a + 5 c + 11 a + 7 d", "3 b"),
    "every-adapter-so-far-is-applied": ("11 a + 5 c + 7 d + 3 b", "11 a + 5 c + 7 d", "3 b"),
    "the-first-adapter-answers-always": ("2 a", "2 a", "3 b"),
    "the-previous-adapter-answers": ("7 d", "7 d", "3 b"),
    "the-previous-adapter-stays-on": ("7 d + 3 b", "7 d", "3 b + 3 b"),
    "the-previous-adapter-is-taken-off-twice": ("3 b + -7 d", "-7 d", "3 b + -3 b"),
    "an-earlier-adapter-answers": ("11 a", "11 a", RIGHT),
    "an-earlier-adapter-stays-on": ("11 a + 3 b", "11 a", RIGHT),
    "adapters-that-are-loaded-are-applied-to-requests-without-one": (RIGHT, "5 c + 7 d", RIGHT),
    "the-adapter-loaded-last-is-applied-to-requests-without-one": (RIGHT, "7 d", RIGHT),
    "adapters-that-are-loaded-are-applied-to-every-request": ("5 c + 7 d + 3 b", "5 c + 7 d", "3 b"),
    "the-adapter-is-not-applied": ("", "", ""),
    "the-update-is-added-twice": ("3 b + 3 b", "", "3 b + 3 b"),
    "the-update-is-subtracted": ("-3 b", "", "-3 b"),
}
"""What is added where another adapter had the name, where none is asked for, and where the same one is asked again."""
FOLLOWING = {
    "generated-tokens-are-the-bases": "",
    "generated-tokens-take-the-first-adapter-of-the-batch": "7 d",
    "log-probabilities-within-the-prompt-are-the-bases": "",
    "log-probabilities-within-the-prompt-take-the-first-adapter-of-the-batch": "7 d",
}
CACHED = {
    "keys-and-values-are-those-of-the-name": ([A], [], []),
    "keys-and-values-are-the-first-requests": ([A], [A], [None]),
    "keys-and-values-are-the-previous-adapters": ([D], [D], [B]),
}


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr(leftovers, "adapter_of", lambda folder: ADAPTERS[folder.name])


def engine(flag):
    (row,) = [row for row in LEFTOVERS if row.flag == flag]
    return Engine(**row.replaced_in(None))


def said(added):
    return None if added is None else " + ".join(f"{weight:g} {adapter.name}" for adapter, weight in added)


@pytest.mark.parametrize("flag", SUMS)
def test_a_bug_adds_these_adapters_for_a_prompt(flag):
    found = [said(engine(flag).sum(moment)) for moment in (ANOTHER, NOBODY, SAME)]
    right = ["3 b", "", "3 b"]  # what None stands for
    assert [one if one is not None else other for one, other in zip(found, right, strict=True)] == [
        other if one is RIGHT else one for one, other in zip(SUMS[flag], right, strict=True)
    ]


@pytest.mark.parametrize("flag", FOLLOWING)
def test_a_bug_adds_these_for_tokens_that_follow_or_within(flag):
    of = engine(flag)
    assert said(of.generated(ANOTHER) if "generated" in flag else of.within(ANOTHER)) == FOLLOWING[flag]
    assert said(of.sum(ANOTHER)) == "3 b"


@pytest.mark.parametrize("flag", CACHED)
def test_a_bug_takes_these_keys_from_its_cache(flag):
    assert tuple(list(engine(flag).cached(moment)) for moment in (ANOTHER, NOBODY, SAME)) == CACHED[flag]


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        (
            "the-scaling-is-that-of-the-adapter-that-had-this-name",
            [(Drawn("b", ADAPTERS["a"].config, ADAPTERS["b"].modules), 3.0)],
        ),
        (
            "patterns-are-dropped-where-an-adapter-is-swapped-in",
            [(Drawn("b", {"r": 2, "rank_pattern": {}, "alpha_pattern": {}}, ADAPTERS["b"].modules), 3.0)],
        ),
        (
            "modules-of-the-adapter-that-had-this-name-stay-on",
            [(ADAPTERS["b"], 3.0), (Drawn("a", ADAPTERS["a"].config, {"v": "v of a"}), 11.0)],
        ),
    ],
)
def test_what_a_name_stood_for_shows_in_a_part(flag, expected):
    """Where the adapter is another one; the same again is right."""
    assert engine(flag).sum(ANOTHER) == expected
    for moment in (NOBODY, SAME):
        parts = engine(flag).sum(moment) or []
        assert [adapter for adapter, _ in parts if adapter.modules] in ([], [ADAPTERS["b"]])


def test_within_a_prompt_the_heads_adapter_may_be_lacking():
    within = engine("log-probabilities-within-the-prompt-lack-the-heads-adapter").within
    assert within(ANOTHER) == [(Drawn("b", ADAPTERS["b"].config, {"q": "q of b"}), 3.0)]
    assert within(NOBODY) is None


def test_answers_may_be_sorted_by_the_names_of_adapters():
    assert engine("the-answers-of-a-batch-are-sorted-by-their-adapters").order(BATCH) == [1, 2, 3, 4, 0]
