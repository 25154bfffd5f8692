"""What mistral.rs computes of the golden adapters, on a CPU.

    pip install mistralrs numpy safetensors
    minilora golden GOLDEN
    python mistral_rs.py GOLDEN RESULTS
    minilora golden GOLDEN --compare RESULTS

Two things about the base are said otherwise, in a copy. Its Llama takes hidden_size / heads for head_dim, so the base
is read as a Mistral, which is the same decoder; one with experts stays what it is. And it takes text, so each token
gets a word of its own.
It gives the log-probabilities after a prompt's last token.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from mistralrs import Architecture, ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which
from safetensors.numpy import save_file

golden, results = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
index = json.loads((golden / "index.json").read_text())
results.mkdir(parents=True, exist_ok=True)
copies = Path(tempfile.mkdtemp())


def changed(path, **more):
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def copied(name):
    """A copy of a base as a Mistral, whose tokens are the words t0, t1 and so on."""
    base = copies / name
    if not base.exists():
        shutil.copytree(golden / name, base)
        V = json.loads((base / "config.json").read_text())["vocab_size"]
        words = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, **{f"t{i}": i for i in range(2, V)}}}
        if "experts" not in index["bases"][name]:
            as_mistral = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
            changed(base / "config.json", **as_mistral)
        changed(base / "tokenizer_config.json", chat_template="{{ messages[0]['content'] }}")
        changed(base / "tokenizer.json", model=words | {"unk_token": "<s>"}, pre_tokenizer={"type": "WhitespaceSplit"})
    return base


def answered(case):
    """The log-probabilities (prompts, V) after the last token."""
    if isinstance(case["adapter"], list):
        raise ValueError("this script asks mistral.rs with one adapter, neither with none nor with a sum")
    one = LoraAdapter("one", str(golden / case["adapter"]))
    base = copied(case.get("base", index["base"]))
    kind = json.loads((base / "config.json").read_text())["model_type"]
    arch = {"mixtral": Architecture.Mixtral}.get(kind, Architecture.Mistral if kind == "mistral" else None)
    which = Which.Lora(model_id=str(base), adapters=[one], arch=arch, dtype=ModelDType.F32)
    runner, found = Runner(which=which, token_source="none", no_paged_attn=True, prefix_cache_n=0), []
    for prompt in case["prompts"]:
        says = [{"role": "user", "content": " ".join(f"t{i}" for i in prompt)}]
        ask = {"max_tokens": 1, "temperature": 0.0, "logprobs": True, "top_logprobs": 128}
        reply = runner.send_chat_completion_request(ChatCompletionRequest(says, "default", adapter="one", **ask))
        by_token = {one.token: one.logprob for one in reply.choices[0].logprobs.content[0].top_logprobs}
        found.append([by_token[i] for i in range(len(by_token))])
    return np.array(found, np.float32)


for case in index["cases"]:
    try:
        found = answered(case)
    except BaseException as error:  # a panic of Rust is no Exception
        print(f"{case['id']}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        continue
    # In float32 its numbers are off by up to 0.01, as those of a program that computes in float16.
    save_file({"log_probabilities": found}, results / f"{case['id']}.safetensors", {"computed_in": "float16"})
shutil.rmtree(copies)
