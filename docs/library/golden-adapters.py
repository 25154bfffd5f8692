"""Checks and computed contents of golden-adapters.md; its parts see the page's own names."""

# %% What is in the folder

import math

import numpy as np
from pages import says

from minilora import NF4, Llama
from minilora.conformance.golden.bases import EXPERT_COUNT, EXPERTS_PER_TOKEN, to_bfloat16
from minilora.conformance.golden.cases import CASES
from minilora.conformance.golden.reading import Reading

plain = [case.base.config for case in CASES if not case.base.mixture]
says(f"multiples of {math.gcd(*(size for one in plain for of in one.shapes().values() for size in of))},")

margins, moved = [], []
for of in (of for of in CASES if of.base.mixture and of.answered):
    arrays = of.base.arrays
    model = Llama.build(of.base.config, arrays | Reading().changed(arrays, of.given))
    block, h, scores = model.model.layers[0], model.model.embed_tokens(np.asarray(of.prompts)), []
    for rounded in (np.asarray, lambda x: to_bfloat16(x).astype(float)):
        u = rounded(h + rounded(block.self_attn(rounded(block.input_layernorm(h)))))
        x = rounded(block.post_attention_layernorm(u)).reshape(-1, u.shape[-1])
        scores.append(rounded(block.mlp.gate.weight(x)))
    best = np.sort(scores[0])[..., ::-1]
    margins.append(np.min(best[..., EXPERTS_PER_TOKEN - 1] - best[..., EXPERTS_PER_TOKEN]))
    moved.append(np.abs(scores[1] - scores[0]).max())
assert (EXPERTS_PER_TOKEN, EXPERT_COUNT) == (2, 4)
says(
    "A mixture keeps two of four experts",
    f"at least {min(margins):.2f}, and bfloat16 moves a score by {max(moved):.2f} at most.",
)

# %% What to write

from safetensors.numpy import load_file

from minilora.conformance.golden.signatures import APART

files = [load_file(golden / one["answers"]) for one in index["cases"] if "answers" in one]
says(f"whose spread is about {np.mean([np.std(one['logits']) for one in files]):.0f}.")
[small] = {one["apart"] for one in index["cases"] if "apart" in one}
times = small / index["tolerance"]["bfloat16"]
assert times == 2.5 and index["apart"] == APART == 10 * index["tolerance"]["bfloat16"]
says("ten tolerances of bfloat16 apart", f"there the distance is {small:g},\ntwo and a half tolerances of bfloat16.")

# %% The report

assert status == 1

# %% Sessions

assert status == 1
assert printed.getvalue().split("\n")[0].endswith(f"[{flag}]")

from minilora.conformance.golden.sessions import PREFIX_TOKENS

says(f"they share {PREFIX_TOKENS} tokens.")

# %% What an adapter means

says(f"A {math.log2(len(NF4)):.0f}-bit weight has its codes under its own name, two in a byte")

# %% What an adapter of experts means

# Facts from elsewhere: the names of transformers' own releases.
says("Adapters of transformers 4 have")
