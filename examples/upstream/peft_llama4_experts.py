"""PEFT and the experts of a Llama 4, whose weights lie (E, in, out): in and out are exchanged since 0.19.1.

    pip install torch transformers peft; python peft_llama4_experts.py

PEFT takes an array of three axes for (E, out, in), unless the module says `is_transposed`. gpt-oss does, Llama 4 not.
So lora_A has the width of the output, and lora_B the height of the input. PEFT reads its own file back; a program that
goes by the names does not. And target_modules="all-linear" wraps the router, and the forward raises.

peft 0.21.2, transformers 5.24.0: of gate_up_proj (4, 16, 24), from 16 to 24, lora_A is (12, 24) and lora_B (16, 12).
"""

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

CONFIG = transformers.Llama4TextConfig(
    vocab_size=40, hidden_size=16, intermediate_size=12, intermediate_size_mlp=20, num_hidden_layers=2, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    interleave_moe_layer_step=1, attn_temperature_tuning=False, pad_token_id=0,
)  # fmt: skip


def base():
    torch.manual_seed(0)
    return transformers.Llama4ForCausalLM(CONFIG).eval()


print(f"peft {peft.__version__}, transformers {transformers.__version__}")
ids = torch.arange(3, 11)[None]
experts = base().model.layers[0].feed_forward.experts
print(
    "gate_up_proj", tuple(experts.gate_up_proj.shape), "is_transposed:", getattr(experts, "is_transposed", "not said")
)
names = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
model = get_peft_model(base(), LoraConfig(r=3, target_modules=[], target_parameters=names))
for module in model.base_model.model.model.layers[0].modules():
    if hasattr(module, "parameter_name"):
        A, B = (tuple(factor["default"].weight.shape) for factor in (module.lora_A, module.lora_B))
        width, out = getattr(experts, module.parameter_name).shape[1:]
        print(f"{module.parameter_name}: lora_A {A}, lora_B {B}; expected (12, {width}) and ({out}, 12)")
try:
    with torch.no_grad():
        get_peft_model(base(), LoraConfig(r=3, target_modules="all-linear"))(input_ids=ids)
    print("all-linear: the forward runs")
except Exception as error:
    print(f"all-linear: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
