"""Time the forward and the backward of a convolution and of an embedding with LoRA, beside torch with PEFT.

    python examples/benchmark_layers.py               the table
    python examples/benchmark_layers.py --json FILE   keep it

Both do the same work on the same numbers, in turn, in this one process, as `benchmark.py` explains: the output, the
gradients of both factors, and for the convolution the gradient at its input.
"""

import argparse
import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's minilora, installed or not

from benchmark import laps, machine, ratio

from minilora import Conv2d, Embedding, adapt

RANK, ALPHA = 8, 16.0
BARS = {"Conv2d with LoRA": 1.8, "Embedding with LoRA": 0.6}


def convolution(rng):
    """N 32, 16 -> 32 channels, 28 x 28, a kernel of 3 x 3."""
    weight, bias = rng.standard_normal((32, 16, 3, 3), "float32"), rng.standard_normal(32, "float32")
    x, dy = rng.standard_normal((32, 16, 28, 28), "float32"), rng.standard_normal((32, 32, 28, 28), "float32")
    theirs = torch.nn.Conv2d(16, 32, 3, padding=1)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(weight))
        theirs.bias.copy_(torch.from_numpy(bias))
    return Conv2d(weight, bias, padding=1), theirs, x, torch.from_numpy(x).requires_grad_(), dy


def embedding(rng):
    """V 50,000, dim 512, 4,096 ids."""
    weight, ids = rng.standard_normal((50_000, 512), "float32"), rng.integers(0, 50_000, 4096)
    theirs = torch.nn.Embedding.from_pretrained(torch.from_numpy(weight))
    return Embedding(weight), theirs, ids, torch.from_numpy(ids), rng.standard_normal((4096, 512), "float32")


def steps():
    """Return for each layer our step and the peer's."""
    rng = np.random.default_rng(0)
    found = {}
    for name, make in zip(BARS, (convolution, embedding), strict=True):
        layer, theirs, x, their_x, dy = make(rng)
        ours = adapt(layer, "", rank=RANK, alpha=ALPHA, rng=rng)
        peer = get_peft_model(torch.nn.Sequential(theirs), LoraConfig(target_modules=["0"], r=RANK, lora_alpha=ALPHA))
        found[f"{name}: minilora"] = partial(our_step, ours, x, dy)
        found[f"{name}: torch + PEFT"] = partial(their_step, peer, their_x, torch.from_numpy(dy))
    return found


def our_step(layer, x, dy):
    """Run our forward and backward; return y and dx."""
    y, cache = layer.forward(x)
    dx, _ = layer.backward(dy, cache)
    return y, dx


def their_step(peer, x, dy):
    """Run torch's forward and backward, from no gradients; return y and dx."""
    peer.zero_grad()
    if x.is_floating_point():
        x.grad = None
    y = peer(x)
    y.backward(dy)
    return y, x.grad


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=15, metavar="N", help="turns that both get (default 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and where they were measured")
    arguments = parser.parse_args()
    times = laps(steps(), arguments.laps)
    rows = []
    for name, bound in BARS.items():
        ours, theirs = f"{name}: minilora", f"{name}: torch + PEFT"
        row = {"name": name, "minilora_ms": np.median(times[ours]), "peft_ms": np.median(times[theirs])}
        rows.append({**row, "ratio": ratio(times, ours, [theirs]), "bound": bound})
        print(
            "{name:20} {minilora_ms:6.1f} ms, torch + PEFT {peft_ms:6.1f} ms: {ratio:.2f}, at most {bound}".format(
                **rows[-1]
            )
        )
    if arguments.json:
        found = {"date": date.today().isoformat(), "machine": machine(), "laps": arguments.laps, "layers": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
