"""OpenVINO GenAI 2026.4.1.0 takes a GGUF adapter as llama.cpp names its tensors, and ignores all of it.

    pip install openvino-genai optimum-intel transformers gguf
    python openvino_gguf.py

A random Llama with one adapter in three files: with PEFT's names in safetensors, with llama.cpp's names in GGUF, and
with PEFT's names in GGUF. The second changes nothing. Its names become `...down_proj.weight.lora_a`, and the pattern
wants `lora_A.weight`; and the pipeline asks for the prefix `base_model.model.`, which llama.cpp's names do not have.
The third is applied, so the route itself works.
"""

import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
import openvino
import openvino_genai as genai
import torch
from safetensors.numpy import save_file
from transformers import LlamaConfig, LlamaForCausalLM

folder, V = Path(tempfile.mkdtemp()), 100
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).save_pretrained(folder / "base")
command = ["optimum-cli", "export", "openvino", "-m", folder / "base", "--task", "text-generation-with-past"]
subprocess.run([*command, "--weight-format", "fp32", folder / "ov"], check=True, capture_output=True)

rng = np.random.default_rng(0)
factors = {"A": rng.standard_normal((4, 128)).astype("f4"), "B": rng.standard_normal((64, 4)).astype("f4")}
PEFT, LLAMA = "base_model.model.model.layers.0.mlp.down_proj.lora_{}.weight", "blk.0.ffn_down.weight.lora_{}"
save_file({PEFT.format(x): factor for x, factor in factors.items()}, folder / "peft.safetensors")
named = {
    "llama.gguf": {LLAMA.format(x.lower()): factor for x, factor in factors.items()},
    "peft.gguf": {PEFT.format(x): factor for x, factor in factors.items()},
}
for name, tensors in named.items():
    writer = gguf.GGUFWriter(folder / name, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)  # of rank 4: the scaling is 1
    for key, tensor in tensors.items():
        writer.add_tensor(key, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answer(file):
    """The log-probabilities of the next token: a beam search of one token with as many beams as there are tokens."""
    adapters = genai.AdapterConfig()
    if file:
        adapters.add(genai.Adapter(folder / file), 1.0)
    ask = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, num_beams=V, num_return_sequences=V)
    ask.adapters = adapters
    pipeline = genai.LLMPipeline(folder / "ov", "CPU", adapters=adapters, INFERENCE_PRECISION_HINT="f32")
    reply, found = pipeline.generate(openvino.Tensor(np.arange(10, 20)[None]), ask), np.empty(V)
    for tokens, score in zip(reply.tokens, reply.scores, strict=True):
        found[tokens[-1]] = score
    return found


base = answer(None)
for file in ("peft.safetensors", *named):
    print(f"{file:16} changes a log-probability by up to {np.abs(answer(file) - base).max():.5f}")
