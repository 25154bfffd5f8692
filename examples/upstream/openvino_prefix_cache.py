"""OpenVINO GenAI 2026.4.1.0 answers with another adapter's keys and values: its cache of prefixes goes by tokens alone.

    pip install openvino-genai optimum-intel transformers
    python openvino_prefix_cache.py

A random Llama, and one prompt: with an adapter, and then without. The second answer is held against that of a pipeline
that never had the adapter on. It happens with a pipeline's defaults, and not where `enable_prefix_caching` is false.
"""

import subprocess
import tempfile
from pathlib import Path

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
rng, name = np.random.default_rng(0), "base_model.model.model.layers.0.self_attn.v_proj.lora_{}.weight"
factors = {name.format(x): rng.standard_normal(shape).astype("f4") for x, shape in (("A", (4, 64)), ("B", (64, 4)))}
save_file(factors, folder / "adapter.safetensors")
adapter, none = genai.AdapterConfig(genai.Adapter(folder / "adapter.safetensors")), genai.AdapterConfig()


def pipeline(**options):
    return genai.LLMPipeline(folder / "ov", "CPU", adapters=adapter, INFERENCE_PRECISION_HINT="f32", **options)


def answer(pipe, adapters):
    """The log-probabilities of the next token: a beam search of one token with as many beams as there are tokens."""
    ask = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, num_beams=V, num_return_sequences=V)
    ask.adapters = adapters
    reply, found = pipe.generate(openvino.Tensor(np.arange(10, 90)[None]), ask), np.empty(V)
    for tokens, score in zip(reply.tokens, reply.scores, strict=True):
        found[tokens[-1]] = score
    return found


without = genai.SchedulerConfig()
without.enable_prefix_caching, without.cache_size = False, 1
right = answer(pipeline(), none)
for what, options in (("defaults", {}), ("enable_prefix_caching=False", {"scheduler_config": without})):
    pipe = pipeline(**options)
    adapted, base = answer(pipe, adapter), answer(pipe, none)
    print(
        f"{what}: the adapter changes a log-probability by {np.abs(adapted - right).max():.5f}; the base is then off",
        end=" ",
    )
    print(f"by {np.abs(base - right).max():.5f}")
