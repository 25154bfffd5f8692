"""Which pattern matches a path first, as the bounded process answers it: here asked in this process."""

import pytest

from minilora.guards.patternanswers import answer


def first(patterns, *paths, how="match"):
    question = {"patterns": patterns, "paths": [(p, None) if isinstance(p, str) else p for p in paths], "how": how}
    return answer(question)["first"]


def test_of_patterns_that_match_the_first_decides():
    assert first([(3, "a"), (5, ".b"), (7, "a")], "ab", "cb", "cc") == [(3, None), (5, None), None]


def test_a_match_may_go_on_where_a_full_match_may_not():
    assert first([(0, "a")], "ab", "a") == [(0, None), (0, None)]
    assert first([(0, "a")], "ab", "a", how="fullmatch") == [None, (0, None)]


def test_patterns_behind_a_paths_limit_do_not_count():
    patterns = [(0, "x"), (4, "a"), (6, "a")]
    assert first(patterns, ("a", 3), ("a", 4), ("a", 5)) == [None, (4, None), (4, None)]


def test_what_stands_in_the_group_layer_is_answered_with_the_number():
    assert first([(2, r"h\.(?P<layer>\d+)\.")], "h.10.q", "g.1.q") == [(2, "10"), None]


@pytest.mark.parametrize(
    ("pattern", "error"),
    [("a(", "missing ), unterminated subpattern at position 1"), ("[[a]", "Possible nested set at position 1")],
)
def test_what_is_no_pattern_is_answered_with_its_number(pattern, error):
    """What a later Python may read differently is none."""
    assert answer({"patterns": [(1, "a"), (8, pattern)], "paths": [], "how": "match"}) == {"number": 8, "error": error}
