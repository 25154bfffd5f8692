"""What mistral.rs computes of the golden adapters, and answers in the sessions, on a CPU.

    pip install mistralrs numpy safetensors, and for the sessions -e '.[models]'
    minilora golden GOLDEN
    python mistral_rs.py GOLDEN RESULTS [--sessions]
    minilora golden GOLDEN --compare RESULTS

Two things about the base are said otherwise, in a copy. Its Llama takes hidden_size / heads for head_dim, so the base
is read as a Mistral, which is the same decoder; one with experts stays what it is. And it takes text, so each token
gets a word of its own. It gives the log-probabilities after a prompt's last token.

SESSIONS. Adapters are loaded, replaced (`load_inplace`) and unloaded while it runs, with its cache of prefixes. It
scales and merges none. A prompt of a batch is a request of its own.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from asked import ask_cases, ask_sessions, options
from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

said, index = options(__doc__)
copies = Path(tempfile.mkdtemp())
COMPUTED_IN = "float16"  # in float32 its numbers are off by up to 0.01, as those of a program that computes in float16


def changed(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def copied(name):
    """A copy of a base as a Mistral, whose tokens are the words t0, t1 and so on."""
    base = copies / name
    if not base.exists():
        shutil.copytree(said.golden / name, base)
        V = json.loads((base / "config.json").read_text())["vocab_size"]
        words = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, V)}}}
        if "experts" not in index["bases"][name]:
            as_mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
            changed(base / "config.json", **as_mistral)
        changed(base / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
        changed(base / "tokenizer.json", model=words | {"unk_token": "<s>"}, pre_tokenizer={"type": "WhitespaceSplit"})
    return base


def runner_of(base, name, folder, prefixes):
    """A base that is read with one adapter, since it takes no fewer; others come by name."""
    kind = json.loads((copied(base) / "config.json").read_text())["model_type"]
    arch = {"mixtral": Architecture.Mixtral}.get(kind, Architecture.Mistral if kind == "mistral" else None)
    adapters = [LoraAdapter(name, str(folder))]
    which = Which.Lora(model_id=str(copied(base)), adapters=adapters, arch=arch, dtype=ModelDType.F32)
    return Runner(which=which, token_source="none", no_paged_attn=True, prefix_cache_n=prefixes)


def rows(runner, prompt, count=1, **adapter):
    """The log-probabilities (count, V) after a prompt, and after each token that follows but the last."""
    says = [{"role": "user", "content": " ".join(f"t{i}" for i in prompt)}]
    how = {"max_tokens": count, "temperature": 0.0, "logprobs": True, "top_logprobs": 128} | adapter
    reply = runner.send_chat_completion_request(ChatCompletionRequest(says, "default", **how))
    at = [{one.token: one.logprob for one in token.top_logprobs} for token in reply.choices[0].logprobs.content]
    return [[by_token[i] for i in range(len(by_token))] for by_token in at]


def answered(case):
    """The log-probabilities (prompts, V) after the last token."""
    if isinstance(case["adapter"], list):
        raise ValueError("this script asks mistral.rs with one adapter, neither with none nor with a sum")
    runner = runner_of(case["base"], "one", said.golden / case["adapter"], prefixes=0)
    found = [rows(runner, prompt, adapter="one")[0] for prompt in case["prompts"]]
    return {"log_probabilities": np.array(found, np.float32)}


def start(base):
    first = said.golden / "adapters" / "living-first"
    folders, runner = {"one": first}, runner_of(str(base.relative_to(said.golden)), "one", first, prefixes=16)

    def load(use):
        if folders.get(use.name) != use.folder:
            runner.load_lora_adapter(use.name, str(use.folder), load_inplace=use.name in folders)
            folders[use.name] = use.folder

    def each(prompt, use, count):
        if use and use.weight != 1:
            raise NotImplementedError("a request has no scale")
        if use:
            load(use)
        return rows(runner, prompt, count, **({"adapter": use.name} if use else {}))

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
        p = np.array([each(*pair, count) for pair in pairs], np.float32)
        return {"log_probabilities": p if request.generate else p[:, 0]}

    return answer


if said.sessions:
    ask_sessions(said, start, COMPUTED_IN)
else:
    ask_cases(said, index, answered, {"computed_in": COMPUTED_IN})
shutil.rmtree(copies)
