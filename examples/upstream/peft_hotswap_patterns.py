"""PEFT 0.21.2: `hotswap_adapter` drops alpha_pattern and rank_pattern, so the adapter has another scaling than loaded.

    pip install torch peft
    python peft_hotswap_patterns.py

It looks up the patterns by the parameter's name, "fc.lora_A.default.weight", which no key such as "fc" matches: a key
has to match up to the name's end. Loading looks them up by the module's path. Two adapters whose configurations differ
in alpha_pattern are refused, so it shows where both have the same one; and the configurations are compared with that
of the active adapter, not with that of `adapter_name`.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter


def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5))


def saved(seed):
    config = LoraConfig(r=2, lora_alpha=4, alpha_pattern={"0": 40}, target_modules=["0"], init_lora_weights=False)
    model = base()
    torch.manual_seed(seed)
    folder = tempfile.mkdtemp()
    get_peft_model(model, config).save_pretrained(folder)
    return folder


first, second = saved(1), saved(2)
x = torch.ones(1, 4)
loaded = PeftModel.from_pretrained(base(), second)
swapped = PeftModel.from_pretrained(base(), first)
hotswap_adapter(swapped, second, adapter_name="default")
for name, model in (("loaded", loaded), ("swapped in", swapped)):
    print(f"{name:11} scaling {model.base_model.model[0].scaling['default']:5.1f}, output {model(x)[0, 0].item():.4f}")
