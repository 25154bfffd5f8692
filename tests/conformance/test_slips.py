"""Bugs planted one at a time in other people's code: each is named by its row of the table.

No line of `foreign/` comes from this library, so no row is compared with itself. ``slips.diff`` has the file of each
bug, its flag, and the edit that plants it.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

from minilora.conformance import check
from minilora.conformance.problems.bugs import known
from minilora.conformance.problems.kind import LAYER_FUNCTIONS
from tests.support.sample import one_in

from .checking.test_suite import FEW

FOREIGN = Path(__file__).with_name("foreign")
FUNCTIONS = (*LAYER_FUNCTIONS, "step", "cat", "linear", "svd")
FILES = {"rslora": "linear"}
"""The file of a kind, if it has another name."""
NAMES = {"convolution": ("conv1d", "conv2d")}


def slips():
    """Yield a kind, a flag, and a list of pairs of old and new text for each bug."""
    for slip in (FOREIGN / "slips.diff").read_text(encoding="utf-8").strip().split("\n\n"):
        title, *lines = slip.splitlines()
        edits, before = [], "+"
        for sign, text in ((line[0], line[1:]) for line in lines):
            if sign == "-" and before == "+":
                edits.append({"-": [], "+": []})
            edits[-1][sign].append(text)
            before = sign
        yield (*title.split(), [("\n".join(edit["-"]), "\n".join(edit["+"])) for edit in edits])


def implementation(kind, edits=()):
    """Return an implementation whose layer of one kind is a foreign file with edits."""
    source = (FOREIGN / f"{FILES.get(kind, kind)}.py").read_text(encoding="utf-8")
    for old, new in edits:
        assert old in source, old
        source = source.replace(old, new)
    found = {}
    exec(source, found)
    layer = SimpleNamespace(**{name: found[name] for name in FUNCTIONS if name in found})
    if kind == "linear":
        return layer
    return SimpleNamespace(
        forward=implementation("linear").forward, kinds=dict.fromkeys(NAMES.get(kind, [kind]), layer)
    )


@pytest.mark.parametrize("kind", sorted(path.stem for path in FOREIGN.glob("[!_]*.py")))
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.long)])
def test_foreign_code_without_edits_passes(kind, dtype):
    report = check(implementation(kind), dtype=dtype)
    assert report.passed, str(report)


def chosen():
    """Return all slips; the default run tests a third, or a sixth if `checking/test_suite.py` also tests the kind."""
    known, others = ([slip for slip in slips() if (slip[0] in FEW) is few] for few in (True, False))
    return [param for every, part in ((6, known), (3, others)) for param in one_in(every, part, [s[1] for s in part])]


@pytest.mark.parametrize(("kind", "flag", "edits"), chosen())
def test_a_slip_is_named(kind, flag, edits):
    bug, report = known(flag), check(implementation(kind, edits))
    found = [part.diagnoses for part in (report, *report.kinds.values()) if part.diagnoses]
    assert found
    for diagnoses in found:
        assert any(text.startswith(bug.says) and bug.source in text for text in diagnoses), diagnoses
