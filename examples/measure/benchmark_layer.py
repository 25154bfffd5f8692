"""Time a training step of one layer: ours, torch's and PEFT's, and the floor that this machine sets.

    python examples/measure/benchmark_layer.py                the table, and the bars we hold ourselves to
    python examples/measure/benchmark_layer.py --sizes        also how our step grows with rank, width, batch and rows
    python examples/measure/benchmark_layer.py --json FILE    keep it

Everybody does the same work on the same arrays in this one process, in turn (see timing.py): draw a batch without
replacement, gather its rows, forward, mean squared error, backward, a step of Adam. A peer is written as its users
write it. Without torch and PEFT the table has our rows and the floors.
"""

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout's minilora, installed or not

from timing import (
    GROUPS,
    Load,
    bars_table,
    exponent,
    growth_table,
    laps,
    machine,
    machine_line,
    peak_bytes,
    ratio,
    too_busy,
)
from written import keep, written

from minilora import Adam, Linear, LoRA, LoRALinear
from minilora.fast import residual_form
from minilora.training import backpropagate, draw_batches, take_rows

try:
    import torch
    from peft import LoraConfig, get_peft_model
except ImportError as error:
    torch, ABSENCE = None, f"without torch and PEFT ({error}): pip install torch peft"
else:
    ABSENCE = ""

Step = Callable[[], object]


class Task:
    """Data, weights and draws for every contender; the article's sizes by default."""

    def __init__(self, n=10_000, in_features=1001, out_features=1000, batch=128, rank=1):
        self.n, self.in_features, self.out_features, self.batch, self.rank = n, in_features, out_features, batch, rank
        self.rng, self.drawn = np.random.default_rng(0), []
        self.X = self.rng.standard_normal((n, in_features), dtype=np.float32)
        self.Y = self.rng.standard_normal((n, out_features), dtype=np.float32)
        self.W = self.rng.standard_normal((out_features, in_features), dtype=np.float32)
        self.W *= in_features**-0.5
        self.residual = self.Y  # its values cost nothing and change no time: as good as Y - X W^T here

    def draw(self):
        """Return the rows of the next batch; an epoch's batches are drawn at once, as `train` does."""
        if not self.drawn:
            self.drawn = list(draw_batches(self.rng, self.n, self.batch))[::-1]
        return self.drawn.pop()


# --- ours, and the floors ---------------------------------------------------------------------------------------------


def our_step(task, model, gradients=backpropagate):
    """Return the step that `minilora.train` takes, from the same public pieces."""
    optimizer, x, y = Adam(model.trainable()), task.X[: task.batch].copy(), task.Y[: task.batch].copy()

    def step():
        rows = task.draw()
        optimizer.step(gradients(model, take_rows(task.X, rows, out=x), take_rows(task.Y, rows, out=y)))

    return step


def full(task):
    return Linear(task.W.copy())


def adapter(task):
    return LoRA.init(task.in_features, task.out_features, rank=task.rank, alpha=1, rng=task.rng)


def beside(task):
    return LoRALinear(full(task), adapter(task))


def floor(task, gathers, products):
    """Return the least that a step must do: some of gathering its rows, x W^T, and dy^T x."""
    batches = cycle([task.draw() for _ in range(1000)])
    x, y = task.X[: task.batch].copy(), task.Y[: task.batch].copy()

    def step():
        if gathers:
            rows = next(batches)
            take_rows(task.X, rows, out=x)
            take_rows(task.Y, rows, out=y)
        if products >= 1:
            x @ task.W.T
        if products >= 2:
            y.T @ x

    return step


OURS: dict[str, Callable[[Task], Step]] = {
    "full: minilora": lambda task: our_step(task, full(task)),
    "lora: minilora": lambda task: our_step(task, beside(task)),
    "lora: minilora, residual form": lambda task: our_step(task, beside(task), residual_form),
    "residual: minilora": lambda task: our_step(task, adapter(task)),
    "residual: minilora, residual form": lambda task: our_step(task, adapter(task), residual_form),
}
FLOORS: dict[str, Callable[[Task], Step]] = {
    "full: floor, two products": lambda task: floor(task, False, 2),
    "full: floor, and gathers": lambda task: floor(task, True, 2),
    "lora: floor, if the base is run": lambda task: floor(task, True, 1),
    "residual: floor, gathers": lambda task: floor(task, True, 0),
}
FLOOR_OF = {  # what a step of each kind cannot do without
    "full": "full: floor, two products",
    "lora": "lora: floor, if the base is run",
    "residual": "residual: floor, gathers",
}


# --- the peers --------------------------------------------------------------------------------------------------------

Module = torch.nn.Module if torch else object


def their_step(task, model, *, fused=False, compiled=False, residual=False) -> Step:
    """Return a function that takes one training step in torch, on the arrays of `task` and with its draws."""
    X, Y = torch.from_numpy(task.X), torch.from_numpy(task.residual if residual else task.Y)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, **({"fused": True} if fused else {}))
    forward = torch.compile(model) if compiled else model

    def step():
        rows = torch.from_numpy(task.draw())
        # index_select, not X[rows]: it is the faster of the two
        loss = torch.nn.functional.mse_loss(forward(X.index_select(0, rows)), Y.index_select(0, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    if compiled:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step()  # compiles, or raises here and not in the middle of the laps
    return step


def their_full(task):
    """Return a linear layer, every weight of it trainable."""
    layer = torch.nn.Linear(task.in_features, task.out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(task.W))
    return layer


class ArticleModule(Module):
    """The article's module: it forms A B, a matrix as large as the weight, in every step."""

    def __init__(self, task):
        super().__init__()
        self.linear = their_full(task).requires_grad_(False)
        self.A = torch.nn.Parameter(torch.randn(task.in_features, task.rank))
        self.B = torch.nn.Parameter(torch.zeros(task.rank, task.out_features))
        self.scaling = 1 / task.rank

    def forward(self, x):
        return self.linear(x) + torch.matmul(x, torch.matmul(self.A, self.B) * self.scaling)


class TheirAdapter(Module):
    """The adapter alone, for a residual that was taken off by hand."""

    def __init__(self, task):
        super().__init__()
        self.A = torch.nn.Parameter(torch.randn(task.rank, task.in_features))
        self.B = torch.nn.Parameter(torch.zeros(task.out_features, task.rank))
        self.scaling = 1 / task.rank

    def forward(self, x):
        linear = torch.nn.functional.linear
        return linear(linear(x, self.A), self.B) * self.scaling


def peft_model(task):
    """Return a module with one linear layer, and PEFT's adapter on it."""
    model = torch.nn.Sequential(their_full(task))
    return get_peft_model(model, LoraConfig(r=task.rank, lora_alpha=1, target_modules=["0"]))


FUSED, COMPILED = {"fused": True}, {"fused": True, "compiled": True}
PEERS: dict[str, Callable[[Task], Step]] = {
    "full: torch": lambda task: their_step(task, their_full(task)),
    "full: torch, fused Adam": lambda task: their_step(task, their_full(task), **FUSED),
    "full: torch, fused, compiled": lambda task: their_step(task, their_full(task), **COMPILED),
    "lora: the article's module": lambda task: their_step(task, ArticleModule(task)),
    "lora: the article's, compiled": lambda task: their_step(task, ArticleModule(task), compiled=True),
    "lora: PEFT": lambda task: their_step(task, peft_model(task)),
    "residual: torch": lambda task: their_step(task, TheirAdapter(task), residual=True),
    "residual: torch, fused": lambda task: their_step(task, TheirAdapter(task), residual=True, **FUSED),
    "residual: torch, compiled": lambda task: their_step(task, TheirAdapter(task), residual=True, **COMPILED),
}
BEST_TORCH = ["residual: torch", "residual: torch, fused", "residual: torch, compiled"]
FULL, LORA_LINEAR, _, ADAPTER, ADAPTER_SHORT = OURS
BARS = [  # what is measured, of which, of the best of which, at most
    ("full-rank step, of torch", FULL, ["full: torch"], 1.10),
    ("adapter step, of the best torch has", ADAPTER, BEST_TORCH, 0.75),
    ("adapter step, of PEFT", ADAPTER, ["lora: PEFT"], 1 / 7),
    ("adapter step by the residual form, of the best torch has", ADAPTER_SHORT, BEST_TORCH, 0.50),
    ("adapter step by the residual form, of PEFT", ADAPTER_SHORT, ["lora: PEFT"], 1 / 10),
    ("LoRALinear step, of PEFT", LORA_LINEAR, ["lora: PEFT"], 1.0),
]


# --- what is measured -------------------------------------------------------------------------------------------------


def contenders():
    """Return everyone who is here, in the order of the table."""
    everyone = OURS | (PEERS if torch else {}) | FLOORS
    return {name: make for group in GROUPS for name, make in everyone.items() if name.startswith(group)}


def print_memory(name):
    """Print what 20 steps of one contender add to the memory of a process that holds the data already."""
    make, task = contenders()[name], Task()
    before = peak_bytes(forget=True)
    step = make(task)
    for _ in range(20):
        step()
    print(peak_bytes() - before)


def memory(name):
    """Measure that in a process of its own, in megabytes."""
    found = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True)
    return int(found.stdout.split()[-1]) / 1e6 if found.returncode == 0 else None


GROWTH = {
    "rank": [1, 2, 4, 8, 16, 32, 64],
    "width": [256, 512, 1024, 2048, 4096],
    "batch": [32, 64, 128, 256, 512, 1024],
    "n": [2500, 5000, 10_000, 20_000, 40_000],
}


def growth(count):
    """Time our steps at many sizes; return medians and the exponent p of the size^p that fits them best."""
    found = {}
    for axis, sizes in GROWTH.items():
        steps = {}
        for size in sizes:
            task = Task(in_features=size, out_features=size) if axis == "width" else Task(**{axis: size})
            steps |= {(name, size): make(task) for name, make in OURS.items()}
        times = laps(steps, count)
        for name in OURS:
            medians = [float(np.median(times[name, size])) for size in sizes]
            found.setdefault(axis, {})[name] = {"sizes": sizes, "ms": medians, "exponent": exponent(sizes, medians)}
    return found


def measure(lap_count, with_growth):
    """Do all that was asked for; return it as JSON has it."""
    load, task, steps, left_out = Load(), Task(), {}, [ABSENCE] if ABSENCE else []
    for name, make in contenders().items():
        try:
            steps[name] = make(task)
        except Exception as error:  # torch.compile fails in as many ways as there are compilers
            left_out.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    times = laps(steps, lap_count)
    rows = []
    for name, milliseconds in times.items():
        low, median, high = np.percentile(milliseconds, [25, 50, 75])
        same_work = next(our for our in OURS if our.split(":")[0] == name.split(":")[0])
        row = {"name": name, "ms": median, "low": low, "high": high, "ratio": ratio(times, name, [same_work])}
        row["of floor"] = ratio(times, name, [FLOOR_OF[name.split(":")[0]]])
        rows.append({**row, "memory_mb": None if "floor" in name else memory(name)})
    bars = [
        {"what": what, "ratio": ratio(times, name, others), "bound": bound}
        for what, name, others, bound in BARS
        if any(other in times for other in others)
    ]
    where = machine() | {"others": load.others()}
    result = {"machine": where, "laps": lap_count, "left_out": left_out}
    result |= {"task": {"rows": task.n, "in": task.in_features, "out": task.out_features, "batch": task.batch}}
    return result | {"steps": rows, "bars": bars, "growth": growth(max(3, lap_count // 3)) if with_growth else None}


def steps_table(steps):
    """Lay out one row for each contender, ours first in its group."""
    lines = [f"{'':36}{'ms a step':>10}  {'middle half':>15}  {'of ours':>8}  {'of floor':>8}  {'memory':>8}"]
    for group, title in GROUPS.items():
        lines += ["", title]
        for row in steps:
            if row["name"].startswith(group):
                name = row["name"].split(": ", 1)[1]
                spread = f"{row['low']:.3f} - {row['high']:.3f}"
                kept = "" if row["memory_mb"] is None else f"{row['memory_mb']:.1f} MB"
                ratios = f"{row['ratio']:7.2f}x  {row['of floor']:8.2f}"
                lines.append(f"  {name:34}{row['ms']:10.3f}  {spread:>15}  {ratios}  {kept:>8}")
    return "\n".join(lines)


def sizes_table(found):
    """Lay out our step at each size, and the exponent that fits."""
    lines = ["How our step grows, ms, and the p of the size^p that fits best"]
    for axis, curves in found.items():
        rows = [(name.replace(": minilora", ""), curve["ms"], 3, curve["exponent"]) for name, curve in curves.items()]
        lines.append(growth_table(axis, next(iter(curves.values()))["sizes"], rows))
    return "\n".join(lines)


def text(result):
    """Return the run as several lines for a terminal."""
    parts = [machine_line(result | written(__file__)), steps_table(result["steps"])]
    parts += [f"not measured {reason}" for reason in result["left_out"]]
    if result["bars"]:
        parts.append(bars_table(result["bars"], too_busy(result["machine"])))
    if result["growth"]:
        parts.append(sizes_table(result["growth"]))
    return "\n\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=15, metavar="N", help="turns that everyone gets (default 15)")
    parser.add_argument("--sizes", action="store_true", help="time our step at many sizes, and fit exponents")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and where they were measured")
    parser.add_argument("--memory", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        print_memory(options.memory)
        return
    if options.laps < 1:
        parser.error("--laps must be at least 1")
    result = measure(options.laps, options.sizes)
    print(text(result))
    if options.json:
        keep(options.json, __file__, result)


if __name__ == "__main__":
    main()
