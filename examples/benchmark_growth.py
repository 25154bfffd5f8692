"""How the cost of a language model's step grows: with the length of a text, the rank, the rows of a batch, the layers.

    python examples/benchmark_growth.py               the table
    python examples/benchmark_growth.py --json FILE   keep it

A Llama decoder with random weights and adapters beside all its linear layers takes forward, cross-entropy and backward.
One size grows, and the others stay at `USUAL`. Each size's time stands beside its floor, the products with the frozen
weights alone, on the same operands, and beside the bytes that a step keeps for its backward. The exponent is the p of
the size^p that fits best; a part that does not grow brings it below 1.
"""

import argparse
import json
import sys
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's minilora, installed or not

import benchmark
import benchmark_model
import benchmark_report as report

from minilora import Llama, LlamaConfig, adapt
from minilora.fast import keep_pages
from minilora.language.memory import cache_bytes
from minilora.layers.rotary import frequencies

WIDTHS = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
USUAL = {"length": 256, "rank": 8, "rows": 1, "layers": 4}
AXES = {
    "length": [128, 256, 512, 1024, 2048, 4096],
    "rank": [1, 4, 16, 64, 256],
    "rows": [1, 2, 4, 8, 16],
    "layers": [1, 2, 4, 8, 16],
}


def task_of(length, rank, rows, layers):
    """Return a model with adapters that have moved, ids, and the next ids, as `benchmark_model` has them."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(**WIDTHS, num_hidden_layers=layers, rms_norm_eps=1e-5, frequencies=frequencies(32, 1e4))
    shapes = config.shapes()
    arrays = {
        name: rng.standard_normal(shape, "float32") / np.float32(shape[-1] ** 0.5) for name, shape in shapes.items()
    }
    base = Llama.build(config, arrays)
    model = adapt(base, "all-linear", rank=rank, alpha=2 * rank, rng=rng)
    for name, p in model.trainable().items():
        if name.endswith("lora_B"):
            p += 0.02 * rng.standard_normal(p.shape, p.dtype)
    ids = rng.integers(0, WIDTHS["vocab_size"], (rows, length + 1))
    return SimpleNamespace(base=base, model=model, ids=ids[:, :-1], targets=ids[:, 1:])


def growth(axis, count):
    """Return the times of a step and of its floor, and what it keeps, at each size along an axis, with exponents."""
    sizes, steps, megabytes = AXES[axis], {}, []
    for size in sizes:
        task = task_of(**USUAL | {axis: size})
        megabytes.append(cache_bytes(task.model.forward(task.ids)[1]) / 1e6)
        steps[size, "ms"] = partial(benchmark_model.whole_step, task)
        steps[size, "floor"] = partial(benchmark_model.multiply, benchmark_model.frozen_products(task))
    times = benchmark.laps(steps, count, warm_up=1, least=1)
    found = {"sizes": sizes, "mb": megabytes}
    for what in ("ms", "floor"):
        found[what] = [float(np.median(times[size, what])) for size in sizes]
    found["of floor"] = [benchmark.ratio(times, (size, "ms"), [(size, "floor")]) for size in sizes]
    return found | {"exponents": {what: exponent(sizes, found[what]) for what in ("ms", "floor", "mb")}}


def exponent(sizes, values):
    """Return the p of the size^p that fits best."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def table(found):
    """Lay the axes out, one below the other."""
    lines = []
    for axis, curve in found.items():
        lines += ["", f"{axis:28}" + "".join(f"{size:10,}" for size in curve["sizes"]) + f"{'p':>8}"]
        rows = {"ms": "ms a step", "floor": "ms, frozen products alone", "of floor": "of the floor", "mb": "MB kept"}
        for what, label in rows.items():
            p = f"{curve['exponents'][what]:8.2f}" if what in curve["exponents"] else ""
            digits = 1 if what != "of floor" else 2
            lines.append(f"  {label:26}" + "".join(f"{value:10,.{digits}f}" for value in curve[what]) + p)
    return "\n".join(lines[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=7, metavar="N", help="turns that each size gets (default 7)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and where they were measured")
    arguments = parser.parse_args()
    if arguments.laps < 1:
        parser.error("--laps must be at least 1")
    keep_pages()
    load = benchmark.Load()
    found = {axis: growth(axis, arguments.laps) for axis in AXES}
    where = benchmark.machine() | {"others": load.others()}
    print(report.cpu_line(where))
    print(", ".join(f"{name} {size}" for name, size in USUAL.items()) + " where they do not grow\n")
    print(table(found))
    if busy := report.too_busy(where):
        print(f"\n{busy}")
    if arguments.json:
        result = {"date": date.today().isoformat(), "machine": where, "laps": arguments.laps, "usual": USUAL}
        arguments.json.write_text(json.dumps(result | {"growth": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
