"""What OpenVINO GenAI answers in the golden sessions, on a CPU, with its cache of prefixes.

    pip install openvino-genai optimum-intel && pip install -e '.[models]'
    minilora golden GOLDEN
    python sessions_openvino.py GOLDEN RESULTS [prefixes|scheduler|plain]
    minilora golden GOLDEN --compare RESULTS

A pipeline is given all adapters at its start, and a request says which it uses and how strongly. So a name is nothing
more than the adapter it stands for, and nothing is unloaded or merged. OpenVINO reads no alpha and no patterns: this
script multiplies each lora_B by its scaling before. It has a scheduler that caches prefixes, one that does not, or,
with `plain`, none. Prompts of a batch are requests of their own. How all log-probabilities are had is said in
openvino_engine.py.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from safetensors.numpy import load_file, save_file

from minilora.conformance.golden.asking import ask

golden, results = Path(sys.argv[1]), sys.argv[2]
how = sys.argv[3] if len(sys.argv) > 3 else "prefixes"
made = Path(tempfile.mkdtemp())
V = 128


def scaled(folder):
    """An adapter's file with the scalings of the configuration in lora_B."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "lora_B" in name:
            patterns = config["alpha_pattern"].items()
            alphas = (alpha for key, alpha in patterns if re.search(rf"\.{key}\.lora_B", name))
            tensors[name] = tensor * np.float32(next(alphas, config["lora_alpha"]) / tensor.shape[1])
    save_file(tensors, made / f"{folder.name}.safetensors")
    return genai.Adapter(made / f"{folder.name}.safetensors")


def start(base):
    model = made / base.name
    if not model.exists():
        command = ["optimum-cli", "export", "openvino", "-m", base, "--task", "text-generation-with-past"]
        subprocess.run([*command, "--weight-format", "fp32", model], check=True, capture_output=True)
    adapters = {folder.name: scaled(folder) for folder in (golden / "adapters").glob("living-*")}
    every = genai.AdapterConfig()
    for adapter in adapters.values():
        every.add(adapter, 0.0)
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.cache_size = how == "prefixes", 1
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    options |= {} if how == "plain" else {"scheduler_config": scheduler}
    pipeline = genai.LLMPipeline(model, "CPU", adapters=every, **options)

    def row(prompt, use):
        config = genai.GenerationConfig(max_new_tokens=1, ignore_eos=True, num_beams=V, num_return_sequences=V)
        config.adapters = genai.AdapterConfig()
        if use:
            config.adapters.add(adapters[use.folder.name], use.weight)
        reply, numbers = pipeline.generate(openvino.Tensor(prompt[None]), config), np.full(V, np.nan, np.float32)
        for tokens, score in zip(reply.tokens, reply.scores, strict=True):
            numbers[tokens[-1]] = score
        return numbers

    def answer(request):
        if request.merged or request.unload:
            raise NotImplementedError("it merges and unloads nothing")
        if request.generate or request.each:
            raise NotImplementedError("a beam search as wide as the vocabulary gives one token's log-probabilities")
        pairs = zip(request.prompts, request.adapters, strict=True)
        return {"log_probabilities": np.stack([row(prompt, use) for prompt, use in pairs])}

    return answer


for id, error in ask(golden, start, results).items():
    print(f"{id}: {error[:200]}")
