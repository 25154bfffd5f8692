"""Which bugs are told apart, which tokens a cache can have, and what is loaded: by hand."""

from pathlib import Path

import numpy as np
import pytest

from minilora.conformance.golden.sessions import Request, Use
from minilora.conformance.golden.signatures import _loaded, cached_length, distinct
from minilora.conformance.naming import Wrong

NUMBERS = {"": 0.0, "near": 0.9, "b": 5.0, "a": 5.5, "twin": 5.0, "far": 9.0, "less": -9.0}
COUNTS = {"near": 1, "b": 2, "a": 1, "twin": 3, "far": 1, "less": 1}


@pytest.mark.parametrize(
    ("order", "equal", "kept"),
    [
        ("near b a far less", -1.0, "a far less"),  # of b and a, which are near each other, that which gets less wrong
        ("near b twin far less", -1.0, "b far less"),
        ("less twin far b near", 0.0, "less twin far b"),  # of those that are equal both
        ("less twin far b near", 0.4, "less twin far b"),
        ("b near", -1.0, "b"),
    ],
)
def test_bugs_are_kept_that_are_told_apart(order, equal, kept):
    """From the right numbers and from each other by 1 at least, in the order of the table."""
    table = [Wrong(flag, "", {}, count=COUNTS[flag]) for flag in order.split()]
    numbers = {flag: np.array([0.0, value]) for flag, value in NUMBERS.items()}
    assert distinct(numbers, table, 1.0, equal) == kept.split()


def test_of_equal_counts_the_first_of_the_alphabet_is_kept():
    for order in ("ab", "ba"):
        table = [Wrong(flag, "", {}) for flag in order]
        assert distinct({"": np.zeros(1), "a": np.ones(1), "b": np.ones(1)}, table, 1.0) == ["a"]


@pytest.mark.parametrize(
    ("earlier", "count"),
    [
        ([], 0),
        ([[5, 2, 3, 4]], 0),
        ([[1, 2, 9, 4]], 2),  # what is the same behind the first difference has other keys
        ([[1, 9, 3, 4], [1, 2, 3, 9]], 3),
        ([[1, 2, 3, 4]], 3),  # never the last token, whose logits are asked for
    ],
)
def test_a_cache_has_what_a_prompt_begins_with(earlier, count):
    before = [Request(np.array([prompt]), (None,)) for prompt in earlier]
    assert cached_length(np.array([1, 2, 3, 4]), before) == count
    together = [Request(np.array(earlier), (None,) * len(earlier))] if earlier else []
    assert cached_length(np.array([1, 2, 3, 4]), together) == count


def test_what_was_loaded_stays_until_it_is_unloaded():
    a, b, again = Use("a", Path("one")), Use("b", Path("two")), Use("a", Path("three"))
    steps = [{"load": (a, b)}, {}, {"unload": ("b",)}, {"load": (again,)}, {"unload": ("a",), "load": (b,)}]
    requests = [Request(np.zeros((1, 1), int), (None,), **step) for step in steps]
    assert [_loaded(requests[:n]) for n in range(1, 6)] == [[a, b], [a, b], [a], [again], [b]]
