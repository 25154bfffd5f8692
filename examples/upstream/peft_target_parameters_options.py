"""PEFT's target_parameters beside other options: two are passed over, and a warning about patterns is false.

    pip install torch transformers peft; python peft_target_parameters_options.py

peft 0.21.2, transformers 5.24.0: with layers_to_transform=[0], and with exclude_modules, the arrays of both layers get
an adapter, without an error. A rank_pattern and an alpha_pattern are said to match no module, and are applied.
"""

import warnings

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
CONFIG = transformers.MixtralConfig(
    **SIZES, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
)


def adapted(**options):
    """The layers whose gate_up_proj has an adapter, with its rank and scaling, and what PEFT says of patterns."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"], **options)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        model = get_peft_model(transformers.MixtralForCausalLM(CONFIG), config)
    layers = {
        name.split("layers.")[1].split(".")[0]: (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "parameter_name")
    }
    return layers, [str(note.message)[:150] for note in notes if "pattern" in str(note.message)]


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
print("layers_to_transform=[0]: adapters in layers", [*adapted(layers_to_transform=[0])[0]], "expected ['0']")
layers, _ = adapted(exclude_modules=["model.layers.0.mlp.experts"])
print("exclude_modules of layer 0: adapters in layers", [*layers], "expected ['1']")
layers, notes = adapted(rank_pattern={"gate_up_proj": 6}, alpha_pattern={"gate_up_proj": 9})
print("rank_pattern 6 and alpha_pattern 9: rank and scaling", layers["0"], "and the warnings (expected: none)")
for note in notes:
    print("   ", note)
