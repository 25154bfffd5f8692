"""What transformers' own `load_adapter` computes of the golden adapters: another reader over PEFT's layers.

    pip install -e '.[models]' torch transformers peft bitsandbytes accelerate
    minilora golden GOLDEN
    python transformers_alone.py GOLDEN RESULTS
    minilora golden GOLDEN --compare RESULTS

It has no weighted sum of adapters, so the case `two-adapters` stays without an answer.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

golden, results = Path(sys.argv[1]), Path(sys.argv[2])
index = json.loads((golden / "index.json").read_text())
results.mkdir(parents=True, exist_ok=True)

for case in index["cases"]:
    base = case.get("base", index["base"])
    if isinstance(case["adapter"], list) and case["adapter"]:
        continue
    model = AutoModelForCausalLM.from_pretrained(golden / base, dtype=torch.float32)
    try:
        if case["adapter"]:
            model.load_adapter(str(golden / case["adapter"]))
    except Exception as error:
        print(f"{case['id']}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        continue
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(case["prompts"])).logits
    # Beside 4-bit weights, bitsandbytes computes in bfloat16 on processors that have instructions for it.
    notes = {"computed_in": "bfloat16" if "quantised" in index["bases"][base] else "float32"}
    save_file({"logits": logits}, results / f"{case['id']}.safetensors", metadata=notes)
