"""What mistral.rs answers in the golden sessions, on a CPU, with its cache of prefixes.

    pip install -e '.[models]' mistralrs
    minilora golden GOLDEN
    python sessions_mistral_rs.py GOLDEN RESULTS
    minilora golden GOLDEN --compare RESULTS

Adapters are loaded, replaced (`load_inplace`) and unloaded while it runs. It scales and merges none. A prompt of a
batch is a request of its own. The base is read as a Mistral, and each token is a word: see mistral_rs.py.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

from minilora.conformance.golden.asking import ask

golden, results = Path(sys.argv[1]).resolve(), sys.argv[2]
FIRST = str(golden / "adapters" / "living-first")
ASK = {"temperature": 0.0, "logprobs": True, "top_logprobs": 128}


def changed(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def copied(base):
    """A copy of a base as a Mistral, whose tokens are the words t0, t1 and so on."""
    copy = Path(tempfile.mkdtemp()) / base.name
    shutil.copytree(base, copy)
    V = json.loads((copy / "config.json").read_text())["vocab_size"]
    words = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, V)}}}
    changed(copy / "config.json", architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)
    changed(copy / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
    changed(copy / "tokenizer.json", model=words | {"unk_token": "<s>"}, pre_tokenizer={"type": "WhitespaceSplit"})
    return copy


def start(base):
    folders = {"one": FIRST}
    adapters = [LoraAdapter("one", FIRST)]  # it reads a base with one adapter at least; others come by name
    which = Which.Lora(model_id=str(copied(base)), adapters=adapters, arch=Architecture.Mistral, dtype=ModelDType.F32)
    runner = Runner(which=which, token_source="none", no_paged_attn=True, prefix_cache_n=16)

    def load(use):
        if folders.get(use.name) != str(use.folder):
            runner.load_lora_adapter(use.name, str(use.folder), load_inplace=use.name in folders)
            folders[use.name] = str(use.folder)

    def rows(prompt, use, count):
        if use and use.weight != 1:
            raise NotImplementedError("a request has no scale")
        if use:
            load(use)
        says = [{"role": "user", "content": " ".join(f"t{i}" for i in prompt)}]
        adapter = {"adapter": use.name} if use else {}
        reply = runner.send_chat_completion_request(
            ChatCompletionRequest(says, "default", max_tokens=count, **adapter, **ASK)
        )
        at = [{one.token: one.logprob for one in token.top_logprobs} for token in reply.choices[0].logprobs.content]
        return [[by_token[i] for i in range(len(by_token))] for by_token in at]

    def answer(request):
        if request.merged:
            raise NotImplementedError("it merges nothing")
        if request.each or any(use and use.folder.name == "living-head" for use in request.adapters):
            raise NotImplementedError("it gives no log-probabilities within a prompt, and reads no adapter of lm_head")
        for name in request.unload:
            runner.unload_lora_adapter(name)
            del folders[name]
        for use in request.load:
            load(use)
        pairs, count = zip(request.prompts, request.adapters, strict=True), request.generate or 1
        p = np.array([rows(*pair, count) for pair in pairs], np.float32)
        return {"log_probabilities": p if request.generate else p[:, 0]}

    return answer


# In float32 its numbers are off by up to 0.01, as those of a program that computes in float16.
for id, error in ask(golden, start, results, computed_in="float16").items():
    print(f"{id}: {error[:160]}")
