"""Slips in what others wrote, one at a time: each is named by the row of the table that it is.

No line of `foreign/` is of this library, so no row is held against itself. ``slips.diff`` has the file, the row's flag,
and what is edited.
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
"""The file of a kind, where it has another name."""
NAMES = {"convolution": ("conv1d", "conv2d")}


def slips():
    """Yield a kind, a flag, and what is replaced by what."""
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
    """An implementation whose layer of one kind is a file of others, with edits."""
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
def test_what_others_wrote_passes(kind, dtype):
    report = check(implementation(kind), dtype=dtype)
    assert report.passed, str(report)


def chosen():
    """All slips: a third in the default run, a sixth where `checking/test_suite.py` has the rows of the kind there."""
    known, others = ([slip for slip in slips() if (slip[0] in FEW) is few] for few in (True, False))
    return [param for every, part in ((6, known), (3, others)) for param in one_in(every, part, [s[1] for s in part])]


@pytest.mark.parametrize(("kind", "flag", "edits"), chosen())
def test_a_slip_is_named(kind, flag, edits):
    bug, report = known(flag), check(implementation(kind, edits))
    found = [part.diagnoses for part in (report, *report.kinds.values()) if part.diagnoses]
    assert found
    for diagnoses in found:
        assert any(text.startswith(bug.says) and bug.source in text for text in diagnoses), diagnoses
