"""What OpenVINO GenAI computes of the golden adapters, on a CPU.

    pip install openvino-genai optimum-intel && pip install -e '.[models]'
    minilora golden GOLDEN
    python openvino_engine.py GOLDEN RESULTS [safetensors|gguf|scaled]
    minilora golden GOLDEN --compare RESULTS

With `gguf` it reads each adapter as `minilora export` writes it for llama.cpp; with `scaled` the adapter's weight is
alpha / r, as the configuration says for all modules. OpenVINO gives no logits. All log-probabilities after a prompt
come from a beam search of one token with as many beams as there are tokens.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import openvino
import openvino_genai as genai
from safetensors.numpy import save_file

golden, results = Path(sys.argv[1]), Path(sys.argv[2])
how = sys.argv[3] if len(sys.argv) > 3 else "safetensors"
index = json.loads((golden / "index.json").read_text())
results.mkdir(parents=True, exist_ok=True)
made = Path(tempfile.mkdtemp())


def converted(base):
    """A base in OpenVINO's format, in float32."""
    command = ["optimum-cli", "export", "openvino", "-m", golden / base, "--task", "text-generation-with-past"]
    if not (made / base).exists():
        subprocess.run([*command, "--weight-format", "fp32", made / base], check=True, capture_output=True)
    return made / base


def adapter_file(folder, base):
    if how != "gguf":
        return golden / folder / "adapter_model.safetensors"
    file = made / f"{Path(folder).name}.gguf"
    subprocess.run(["minilora", "export", golden / folder, "--model", golden / base, "-o", file], check=True)
    return file


def scale_of(folder):
    config = json.loads((golden / folder / "adapter_config.json").read_text())
    r = max(config["r"], 1)
    return config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r) if how == "scaled" else 1.0


def answered(case):
    """The log-probabilities (prompts, V) after the last token."""
    base = case.get("base", index["base"])
    if "quantised" in index["bases"][base]:
        raise ValueError("this script converts no base in 4 bits")
    given = case["adapter"] if isinstance(case["adapter"], list) else [[case["adapter"], 1.0]]
    adapters = genai.AdapterConfig()
    for folder, weight in given:
        adapters.add(genai.Adapter(adapter_file(folder, base)), weight * scale_of(folder))
    model, ask = converted(base), genai.GenerationConfig()
    ask.max_new_tokens, ask.ignore_eos, ask.adapters = 1, True, adapters
    ask.num_beams = ask.num_return_sequences = V = json.loads((model / "config.json").read_text())["vocab_size"]
    options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    pipeline = genai.LLMPipeline(model, "CPU", adapters=adapters, **options)
    found = np.full((len(case["prompts"]), V), np.nan, np.float32)
    for row, prompt in zip(found, case["prompts"], strict=True):
        reply = pipeline.generate(openvino.Tensor(np.array([prompt])), ask)
        for tokens, score in zip(reply.tokens, reply.scores, strict=True):
            row[tokens[-1]] = score
    return found


for case in index["cases"]:
    try:
        found = answered(case)
    except Exception as error:
        print(f"{case['id']}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:160]}", flush=True)
        continue
    save_file({"log_probabilities": found}, results / f"{case['id']}.safetensors")
