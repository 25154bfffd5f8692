"""What transformers' own `load_adapter` computes of the golden adapters: another reader over PEFT's layers.

    pip install -e '.[models]' torch transformers peft bitsandbytes accelerate
    minilora golden GOLDEN
    python transformers_alone.py GOLDEN RESULTS
    minilora golden GOLDEN --compare RESULTS

It has no weighted sum of adapters, so the case `two-adapters` stays without an answer.
"""

import torch
from asked import ask_cases, options
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

said, index = options(__doc__)


def answered(case):
    if isinstance(case["adapter"], list) and case["adapter"]:
        raise NotImplementedError("transformers has no sum of adapters")
    model = AutoModelForCausalLM.from_pretrained(said.golden / case["base"], dtype=torch.float32)
    if case["adapter"]:
        model.load_adapter(str(said.golden / case["adapter"]))
    with torch.no_grad():
        return {"logits": model(input_ids=torch.tensor(case["prompts"])).logits}


def notes(case):
    """Beside 4-bit weights, bitsandbytes computes in bfloat16 on processors that have instructions for it."""
    return {"computed_in": "bfloat16" if "quantised" in index["bases"][case["base"]] else "float32"}


ask_cases(said, index, answered, notes, save_file)
