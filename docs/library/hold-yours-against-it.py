"""What hold-yours-against-it.md asserts and shows; the names are the page's own."""

from pages import block, shown

# %% A file to fill in

assert code == 2 and "fill in `layer`" in said.getvalue()

# %% Functions on arrays

assert not report.passed and len(report.diagnoses) == 2
assert report.diagnoses[0].startswith("dx lacks dy W")
assert report.diagnoses[1].startswith("lora_B's gradient lacks the scaling")

assert unknown.diagnoses[0].startswith("the update has another scaling: 1 at")

# %% What it may define

from minilora.conformance.problems.bugs import BUGS
from minilora.conformance.problems.kinds import DECLARED, KINDS

bugs = f"{len(BUGS)} known bugs, {sum(bool(bug.source) for bug in BUGS)} of them with the place where they were made"
shown("hold-yours-against-it-1", block(bugs, str({kind: f"{len(KINDS[kind].problems)} problems" for kind in DECLARED})))

# %% Slots of one weight

assert check(engine).kinds["fused"].diagnoses[0].startswith("the slots are taken for equally wide")

# %% A stack of experts

assert (
    check(mixture)
    .kinds["experts"]
    .diagnoses[0]
    .startswith("lora_B (out, r E) is read with the expert as its slow index")
)

# %% Sums of adapters

assert check(library).kinds["combine"].diagnoses[0].startswith("the new adapter keeps the first one's use_rslora")

# %% In another language

if compiler:
    assert bug and verdict.startswith("alpha is not divided by the rank")
shutil.rmtree(folder)
