"""What transformers with PEFT computes of the golden adapters.

    pip install -e '.[models]' torch transformers peft bitsandbytes accelerate
    minilora golden GOLDEN
    python transformers_peft.py GOLDEN RESULTS [float64|float32|bfloat16 [BEGINNING]]
    minilora golden GOLDEN --compare RESULTS

Beside the logits it writes merged weights. An adapter that PEFT refuses, with an error or with a warning that its
tensors do not fit, gets no answers. With BEGINNING, only the cases are answered whose ids begin so. Mixtures of experts
run "eager", since the usual way takes no float64.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

golden, results = Path(sys.argv[1]), Path(sys.argv[2])
precision = sys.argv[3] if len(sys.argv) > 3 else "float64"
dtype = getattr(torch, precision)
index = json.loads((golden / "index.json").read_text())
beginning = sys.argv[4] if len(sys.argv) > 4 else ""
results.mkdir(parents=True, exist_ok=True)


def adapted(case):
    """The base with the case's adapter, or with the weighted sum of its adapters."""
    base = case.get("base", index["base"])
    how = {"experts_implementation": "eager"} if "experts" in index["bases"][base] else {}
    base = AutoModelForCausalLM.from_pretrained(golden / base, dtype=dtype, **how)
    given = case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]
    if not given:
        return base
    model = PeftModel.from_pretrained(base, golden / given[0][0], "0", autocast_adapter_dtype=False)
    for i, (folder, _) in enumerate(given[1:], start=1):
        model.load_adapter(golden / folder, str(i), autocast_adapter_dtype=False)
    if len(given) > 1:
        names, weights = [str(i) for i in range(len(given))], [weight for _, weight in given]
        model.add_weighted_adapter(names, weights, "sum", combination_type="cat")
        model.set_adapter("sum")
    return model


for case in index["cases"]:
    if not case["id"].startswith(beginning):
        continue
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing adapter keys|invalid shape).*")
            model = adapted(case)
    except Exception as error:
        print(f"{case['id']}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        continue
    with torch.no_grad():
        tensors = {"logits": model(input_ids=torch.tensor(case["prompts"])).logits}
    try:
        merged = (model.merge_and_unload() if case["adapter"] else model).state_dict()
        tensors |= {
            f"merged.{name}": weight.clone()
            for name, weight in merged.items()
            if weight.ndim >= 2 and weight.is_floating_point()
        }
    except RuntimeError as error:  # lora_bias, where the layer has no bias to add it to
        print(f"{case['id']}: no merged weights: {str(error)[:100]}")
    # Beside 4-bit weights, bitsandbytes computes in bfloat16 on processors that have instructions for it.
    nf4 = "quantised" in index["bases"][case.get("base", index["base"])]
    notes = {"computed_in": "bfloat16" if nf4 else precision}
    save_file(tensors, results / f"{case['id']}.safetensors", metadata=notes)
