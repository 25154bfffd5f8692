"""What OpenVINO GenAI computes of the golden adapters, and answers in the sessions, on a CPU.

    pip install openvino-genai optimum-intel && pip install -e '.[models]'
    minilora golden GOLDEN
    python openvino_engine.py GOLDEN RESULTS [safetensors|gguf|scaled]
    python openvino_engine.py GOLDEN RESULTS --sessions [prefixes|scheduler|plain]
    minilora golden GOLDEN --compare RESULTS

OpenVINO gives no logits. All log-probabilities after a prompt come from a beam search of one token with as many beams
as there are tokens.

CASES. With `gguf` it reads each adapter as `minilora export` writes it for llama.cpp; with `scaled` the adapter's
weight is alpha / r, as the configuration says for all modules.

SESSIONS. A pipeline is given all adapters at its start, and a request says which it uses and how strongly. So a name is
nothing more than the adapter it stands for, and nothing is unloaded or merged. OpenVINO reads no alpha and no patterns:
this script multiplies each lora_B by its scaling before. It has a scheduler that caches prefixes, one that does not,
or, with `plain`, none. Prompts of a batch are requests of their own.
"""

import json
import math
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from asked import ask_cases, ask_sessions, given, options
from safetensors.numpy import load_file, save_file

said, index = options(__doc__, ("safetensors", "gguf", "scaled", "prefixes", "scheduler", "plain"))
how = said.way or ("prefixes" if said.sessions else "safetensors")
made = Path(tempfile.mkdtemp())
PRECISION = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def converted(base):
    """A base in OpenVINO's format, in float32."""
    model = made / base.relative_to(said.golden)
    if not model.exists():
        command = ["optimum-cli", "export", "openvino", "-m", base, "--task", "text-generation-with-past"]
        subprocess.run([*command, "--weight-format", "fp32", model], check=True, capture_output=True)
    return model


def row(pipeline, prompt, adapters, V):
    """The log-probabilities (V,) after a prompt's last token."""
    ask = genai.GenerationConfig()
    ask.max_new_tokens, ask.ignore_eos, ask.adapters = 1, True, adapters
    ask.num_beams = ask.num_return_sequences = V
    reply, numbers = pipeline.generate(openvino.Tensor(np.array([prompt])), ask), np.full(V, np.nan, np.float32)
    for tokens, score in zip(reply.tokens, reply.scores, strict=True):
        numbers[tokens[-1]] = score
    return numbers


def vocabulary(model):
    return json.loads((model / "config.json").read_text())["vocab_size"]


# --- cases ------------------------------------------------------------------------------------------------------------


def adapter_file(folder, base):
    if how != "gguf":
        return said.golden / folder / "adapter_model.safetensors"
    file = made / f"{Path(folder).name}.gguf"
    adapter, model = said.golden / folder, said.golden / base
    subprocess.run(["minilora", "export", adapter, "--model", model, "-o", file], check=True)
    return file


def scale_of(folder):
    config = json.loads((said.golden / folder / "adapter_config.json").read_text())
    r = max(config["r"], 1)
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r) if how == "scaled" else 1.0


def answered(case):
    if "quantised" in index["bases"][case["base"]]:
        raise ValueError("this script converts no base in 4 bits")
    adapters = genai.AdapterConfig()
    for folder, weight in given(case):
        adapters.add(genai.Adapter(adapter_file(folder, case["base"])), weight * scale_of(folder))
    model = converted(said.golden / case["base"])
    pipeline = genai.LLMPipeline(model, "CPU", adapters=adapters, **PRECISION)
    found = [row(pipeline, prompt, adapters, vocabulary(model)) for prompt in case["prompts"]]
    return {"log_probabilities": np.array(found)}


# --- sessions ---------------------------------------------------------------------------------------------------------


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
    model = converted(base)
    adapters = {folder.name: scaled(folder) for folder in (said.golden / "adapters").glob("living-*")}
    every = genai.AdapterConfig()
    for adapter in adapters.values():
        every.add(adapter, 0.0)
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.cache_size = how == "prefixes", 1
    more = {} if how == "plain" else {"scheduler_config": scheduler}
    pipeline = genai.LLMPipeline(model, "CPU", adapters=every, **PRECISION, **more)

    def of(prompt, use):
        used = genai.AdapterConfig()
        if use:
            used.add(adapters[use.folder.name], use.weight)
        return row(pipeline, prompt, used, vocabulary(model))

    def answer(request):
        if request.merged or request.unload:
            raise NotImplementedError("it merges and unloads nothing")
        if request.generate or request.each:
            raise NotImplementedError("a beam search as wide as the vocabulary gives one token's log-probabilities")
        pairs = zip(request.prompts, request.adapters, strict=True)
        return {"log_probabilities": np.stack([of(*pair) for pair in pairs])}

    return answer


if said.sessions:
    ask_sessions(said, start)
else:
    ask_cases(said, index, answered)
