"""What adapter-format.md asserts and shows; the names are the page's own."""

from pages import block, shown

# %% Each key that changes numbers
from minilora.conformance.golden.adapters import DEFAULTS
from minilora.conformance.golden.cases import CASES
from minilora.files.peft import CHANGES_NUMBERS, CONFIG_KEYS

configs, lines = [(case.id, config) for case in CASES for config, _ in case.files()], []
always = {"peft_type", "r", "lora_alpha", "target_modules"}
for key in (key for key in CONFIG_KEYS if key in CHANGES_NUMBERS - always):
    own = [id for id, config in configs if config.get(key) != DEFAULTS.get(key)]
    if own:
        more = f", and {len(own) - 5} more" if len(own) > 5 else ""
        lines.append(f"{key:23} {', '.join(own[:5])}{more}")
shown("adapter-format-1", block(*lines))

# %% No key may be left out

import numpy as np

from minilora.conformance.golden.cases import LOGIT_TOLERANCE
from minilora.conformance.golden.signatures import answers

case = next(case for case in CASES if case.id == "rslora")
r = next(case.files())[0]["r"]
numbers = answers(case).tensors()
wrong = numbers["signature.rslora-root-is-ignored"]
off = float(np.abs(wrong - numbers["logits"][:, -1]).max())
told = (
    f"r = {r}: the update is {r**0.5:.2f} times too small; r = 64: {64**0.5:.0f} times",
    f"in the golden case {case.id} a logit is off by {off:.2f},",
    f"and bfloat16 may be off by {LOGIT_TOLERANCE['bfloat16']}",
)
shown("adapter-format-2", block(*told))
