"""Each row of the suite's table, planted in the answers of each kind: it is named, alone, wherever it stands."""

import numpy as np
import pytest

from minilora.conformance.checking.suite import Suite, factors_of
from minilora.conformance.naming import name
from minilora.conformance.problems.bugs import bugs_of
from minilora.conformance.problems.kinds import KINDS
from minilora.conformance.problems.tolerance import drawn


def answers_with(suite, row):
    """What a row makes of every problem, in the answers in which it may show; None for what it leaves out."""
    replies = []
    for problem, trial in suite.trials.items():
        bad = suite.answers(problem, row.of(problem))
        replies.append({key: bad[key] if key in (row.shows or trial.right) else a for key, a in trial.right.items()})
    return replies


def same(given, other):
    """Whether two rows make the same numbers: then the one of fewer parts, or first in the alphabet, is named."""
    pairs = [(one[key], two[key]) for one, two in zip(given, other, strict=True) for key in one]
    return all(a is b or (a is not None and b is not None and np.allclose(a, b, rtol=1e-12)) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_row_is_named_alone(kind):
    suite = Suite(kind, [drawn(problem, "float64", KINDS[kind].formulas) for problem in KINDS[kind].problems])
    rows = {row.flag: answers_with(suite, row) for row in bugs_of(kind)}
    for row in bugs_of(kind):
        given = rows[row.flag]
        wrong, found = name(suite.world(factors_of(list(suite.trials.values()), given)), given)
        flags = [wrong.flag for named in found for wrong in named.wrongs]
        if not wrong:  # it makes no difference to this kind
            assert same(given, [trial.right for trial in suite.trials.values()])
            continue
        assert len(flags) == 1, (row.flag, flags)
        assert flags == [row.flag] or same(given, rows[flags[0]]), (row.flag, flags)
