"""Checks and computed contents of is-my-adapter-applied.md; its parts see the page's own names."""

import contextlib
import io
import re
import shutil
import tempfile
from pathlib import Path
from unittest import mock

from pages import DOCS, ROOT, holds, says

from minilora.audit import changes
from minilora.cli import main
from minilora.conformance.golden.answerfiles import MAX_ANSWER

PAGE = DOCS.joinpath("library", "is-my-adapter-applied.md").read_text(encoding="utf-8")

with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
    assert main(["golden", made + "/golden"]) == 0
    shutil.copytree(Path(made, "golden", "bases", "tied"), "model")
    shutil.copytree(Path(made, "golden", "adapters", "rslora"), "adapter")

# %% Is my adapter applied?

questions = re.findall(r"^## (\d)\. (.*)\?$", PAGE, re.M)
assert len(questions) == 6
for number, question in questions:
    says(f"| {number} | {question}")

# %% 1. Is there anything in the file?

assert status == 1

shutil.copytree("adapter", "no-alpha")
config = Path("no-alpha", "adapter_config.json")
config.write_text(config.read_text().replace('"lora_alpha"', '"no_alpha"'))
with contextlib.redirect_stdout(io.StringIO()) as told:
    main(["audit", "no-alpha"])
[said] = {said[0] for said in re.finditer("PEFT uses its default, .* or the rank", told.getvalue())}
says(f"another default: {', '.join(sorted(re.findall(r'[0-9]+', said), key=int))}, or the rank")
shutil.rmtree("no-alpha")

# %% 2. Does every tensor land?

assert status == 1

report = ROOT.joinpath("examples", "upstream", "peft_dense_layers_of_a_mixture.py").read_text(encoding="utf-8")
peft, transformers = re.search(r"peft ([\d.]+), transformers (\d+)", report).groups()
says(f"PEFT {peft} over transformers {transformers} takes")

# Facts from elsewhere: an example; only the headers are read, which takes seconds at any size.
says("a folder of 70 billion weights takes seconds")

# %% 3. What does the engine do with it?

assert status == 1

assert status == 1

rank = 4
assert (1 / rank**0.5) / (1 / rank) == 2  # twice the update
says(f"a tensor may have {MAX_ANSWER / 1e6:.0f} MB.", f"at rank {rank}, say,")

# %% 4. Does it survive merging?

inputs, added, Q = [], [], changes.STORED_FORMATS["bfloat16"]
with (
    mock.patch.dict(changes.STORED_FORMATS, bfloat16=lambda W: inputs.append(W) or Q(W)),
    mock.patch.object(changes.Sums, "add", lambda self, *sides: added.append(sides)),
    contextlib.redirect_stdout(io.StringIO()),
):
    main(["audit", "adapter", "--model", "model", "--merge"])
(E, delta), W = added[0], inputs[1]
holds("E =", E=E, Q=Q, W=W, Delta=delta)
E, delta = (side[:7, :5].astype(float) for side in added[list(changes.STORED_FORMATS).index("NF4")])
sums = changes.Sums()
sums.add(E, delta)
holds(r"\text{kept} =", E=E, Delta=delta, kept=sums.kept, noise=sums.noise)

# %% 5. Is it merged?

assert status == 0

linears = 4 * 7  # of the example's four layers
says(
    f"({linears} of {linears} modules, float32, at most",
    f"equal to the base: all {linears} modules [not-merged]",
    f"with a factor of 2 (twice): all {linears} modules [factor]",
    f"with a factor of {8**-0.5:.3f} (alpha / r instead of alpha / sqrt(r)): all {linears} modules [factor]",
    f"before being stored as float32: all {linears} modules [rounded-further]",
    f"not merged: the folder has {3 * linears} tensors of an unmerged PeftModel",  # of each the weight, A and B
)
# A run next to PEFT printed this; tests/peers/test_audit_peers.py repeats it.
says("at most 2.4 ulp")
