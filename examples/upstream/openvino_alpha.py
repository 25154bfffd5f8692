"""OpenVINO GenAI 2026.4.1.0 does not read lora_alpha: an adapter as PEFT saves it acts as if alpha were r.

    pip install openvino-genai optimum-intel transformers peft
    python openvino_alpha.py

A random Llama with an adapter of scaling 4, in transformers with PEFT and in OpenVINO GenAI: the log-probabilities of
the next token, and how far they are off. With the weight 4 in `AdapterConfig.add` they agree.
"""

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

folder, V = Path(tempfile.mkdtemp()), 100
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).eval()
for name, array in model.named_parameters():  # larger than transformers draws them, so that attention is not uniform
    array.data *= 5 if "proj" in name else 1
model.save_pretrained(folder / "base")
lora = LoraConfig(r=4, lora_alpha=16, target_modules=["v_proj", "down_proj"], init_lora_weights="gaussian")
adapted = get_peft_model(model, lora).eval()
for name, array in adapted.named_parameters():
    if "lora_B" in name:
        torch.nn.init.normal_(array, std=0.5)
adapted.save_pretrained(folder / "adapter")
assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 16

command = ["optimum-cli", "export", "openvino", "-m", folder / "base", "--task", "text-generation-with-past"]
subprocess.run([*command, "--weight-format", "fp32", folder / "ov"], check=True, capture_output=True)
ids = np.arange(10, 20)[None]
with torch.no_grad():
    right = torch.log_softmax(adapted(input_ids=torch.tensor(ids)).logits[0, -1], -1).numpy()
    with adapted.disable_adapter():
        without = torch.log_softmax(adapted(input_ids=torch.tensor(ids)).logits[0, -1], -1).numpy()
print(f"base      off by {np.abs(without - right).max():.5f}")
for weight in (1.0, 4.0):
    adapters = genai.AdapterConfig()
    adapters.add(genai.Adapter(folder / "adapter" / "adapter_model.safetensors"), weight)
    ask = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, num_beams=V, num_return_sequences=V)
    ask.adapters = adapters
    pipeline = genai.LLMPipeline(folder / "ov", "CPU", adapters=adapters, INFERENCE_PRECISION_HINT="f32")
    reply = pipeline.generate(openvino.Tensor(ids), ask)
    found = np.empty(V)
    for tokens, score in zip(reply.tokens, reply.scores, strict=True):
        found[tokens[-1]] = score
    print(f"weight {weight:.0f}  off by {np.abs(found - right).max():.5f}")
