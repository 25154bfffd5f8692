"""transformers' own load_adapter beside a DoRA adapter that PEFT saved: the magnitudes are not read.

    pip install torch transformers peft; python transformers_dora.py

transformers 5.24.0, peft 0.21.2: PEFT reads its adapter back to 0; `load_adapter` reports the parameters
``lora_magnitude_vector.default.weight`` as missing and ``lora_magnitude_vector.default`` as unexpected, raises nothing,
and the logits are off.
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
ids = torch.arange(8)[None]
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    LlamaForCausalLM(config).save_pretrained(f"{folder}/base")

    def base():
        return LlamaForCausalLM.from_pretrained(f"{folder}/base")

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    trained = get_peft_model(base(), lora).eval()
    for name, parameter in trained.named_parameters():
        if "magnitude" in name:
            parameter *= 2
    trained.save_pretrained(f"{folder}/adapter")
    right = trained(ids).logits
    print("PEFT:", (PeftModel.from_pretrained(base(), f"{folder}/adapter").eval()(ids).logits - right).abs().max())
    alone = base()
    loaded = alone.load_adapter(f"{folder}/adapter")
    print("load_adapter:", (alone.eval()(ids).logits - right).abs().max())
    print("missing", sorted(loaded.missing_keys)[:1], "unexpected", sorted(loaded.unexpected_keys)[:1])
