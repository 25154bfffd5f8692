"""Checks and computed contents of hold-yours-against-it.md; its parts see the page's own names."""

from pages import block, says, shown

# %% A file to fill in

assert code == 2 and "fill in `layer`" in said.getvalue()

# %% Functions on arrays

assert not report.passed and len(report.diagnoses) == 2
assert report.diagnoses[0].startswith("dx lacks dy W")
assert report.diagnoses[1].startswith("lora_B's gradient lacks the scaling")

assert unknown.diagnoses[0].startswith("the update has a different scaling: 1 at")

# %% On the command line

from minilora.cli.judge import TIMEOUT

says(f"the import, and then the\ncheck: {TIMEOUT:.0f} by default")

# %% What a report says

from minilora.report import LONGEST_FIRST_LINE

says(f"of {LONGEST_FIRST_LINE} characters at most")

# %% What it may define

import numpy as np

from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.kinds import DECLARED, KINDS

bugs = f"{len(BUGS)} known bugs, {sum(bool(bug.source) for bug in BUGS)} of them with the place where they were made"
shown("hold-yours-against-it-1", block(bugs, str({kind: f"{len(KINDS[kind].problems)} problems" for kind in DECLARED})))

from minilora.conformance.problems.tolerance import TOLERANCE, UNIT

says(f"| `slots` | for `fused`: {', '.join(map(str, KINDS['fused'].declares['slots']))} |")
assert TOLERANCE == 16
says("An error of sixteen units of rounding")
inputs = 4096
terms = np.random.default_rng(0).standard_normal((100, inputs)).astype("float32")
right, allowed = terms.sum(axis=1, dtype="float64"), max(TOLERANCE, inputs**0.5) * np.abs(terms).sum(axis=1)
for order in (terms, terms[:, ::-1], np.sort(terms, axis=1)):  # one term at a time
    assert np.all(abs(np.cumsum(order, axis=1)[:, -1] - right) < allowed * UNIT["float32"])
assert np.any(abs(right * 1e-9) > allowed * UNIT["float64"])  # off by a billionth
says(f"float32 layer of {inputs:,} inputs that adds its terms in another order passes;")

# %% Slots of one weight

assert check(engine).kinds["fused"].diagnoses[0].startswith("the slots are assumed to have equal widths")

# %% A stack of experts

assert (
    check(mixture)
    .kinds["experts"]
    .diagnoses[0]
    .startswith("lora_B (out, r E) is read with the expert as its slow index")
)

# %% Sums of adapters

assert check(library).kinds["combine"].diagnoses[0].startswith("the new adapter keeps the first adapter's use_rslora")

# %% In another language

from minilora.conformance.vectors import STARTER

says(f"`--starter` writes {len(STARTER)} small files")

if compiler:
    assert bug and verdict.startswith("alpha is not divided by the rank")
shutil.rmtree(folder)
