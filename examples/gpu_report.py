"""Measure minilora on this machine's GPU beside its CPU, and PyTorch where it is installed, and write the report.

    python examples/gpu_report.py docs/gpu-report.md

It takes a few minutes, and nothing is written where CuPy cannot compute.
"""

import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import minilora
from minilora import Adam, Backend, BackendUnavailable, Linear, LoRALinear, article, get_backend
from minilora.training import backpropagate, draw_batches

KINDS = ("full layer", "layer with adapter", "adapter on the residual")


@dataclass(frozen=True)
class Sizes:
    """The article's sizes."""

    n: int = 10_000
    in_features: int = 1001
    out_features: int = 1000
    batch_size: int = 128
    epochs: int = 100


def minilora_epoch(backend: Backend, kind: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that takes an epoch's steps, as `train` takes them."""
    rng = np.random.default_rng(0)
    X, Y = (
        backend.asarray(rng.standard_normal((sizes.n, width)), "float32")
        for width in (sizes.in_features, sizes.out_features)
    )
    base = Linear.init(sizes.in_features, sizes.out_features, bias=False, rng=rng, backend=backend)
    layer = LoRALinear.from_linear(base, rank=1, alpha=1, rng=rng)
    model = {"full layer": base, "layer with adapter": layer, "adapter on the residual": layer.adapter}[kind]
    optimizer = Adam(model.trainable())
    batches = backend.asarray(draw_batches(rng, sizes.n, sizes.batch_size))

    def epoch() -> None:
        for rows in batches:
            optimizer.step(backpropagate(model, X[rows], Y[rows]))
        backend.synchronize()

    return epoch


def torch_epoch(device: str, kind: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that does the same with PyTorch, its fused Adam, and autograd."""
    import torch

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int):
        return torch.randn(*shape, generator=generator).to(device)

    X, Y = randn(sizes.n, sizes.in_features), randn(sizes.n, sizes.out_features)
    W, A = randn(sizes.out_features, sizes.in_features), randn(1, sizes.in_features)
    B = torch.zeros(sizes.out_features, 1, device=device)
    outputs = {
        "full layer": ([W], lambda x: x @ W.T),
        "layer with adapter": ([A, B], lambda x: x @ W.T + x @ A.T @ B.T),
        "adapter on the residual": ([A, B], lambda x: x @ A.T @ B.T),
    }
    params, output = outputs[kind]
    for p in params:
        p.requires_grad_(True)
    optimizer = torch.optim.Adam(params, fused=True)
    batches = torch.from_numpy(draw_batches(np.random.default_rng(0), sizes.n, sizes.batch_size)).to(device)

    def epoch() -> None:
        for rows in batches:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(output(X[rows]), Y[rows]).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return epoch


def milliseconds_a_step(epoch: Callable[[], None], sizes: Sizes, repeats: int = 7) -> float:
    """Return the median over a few epochs, after one that warms up and is not counted."""
    epoch()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / (sizes.n // sizes.batch_size)


def columns(backends: list[Backend], sizes: Sizes, torch_device: str | None = None) -> dict[str, list[str]]:
    """Measure everything: a column of figures for each library, under its name."""
    table = {}
    for backend in backends:
        steps = [milliseconds_a_step(minilora_epoch(backend, kind, sizes), sizes) for kind in KINDS]
        run = article.run(
            backend=backend,
            epochs=sizes.epochs,
            batch_size=sizes.batch_size,
            n=sizes.n,
            in_features=sizes.in_features,
            out_features=sizes.out_features,
        )
        seconds = [f"{run.base_seconds:.2f} s", f"{run.lora_seconds:.2f} s", f"{run.merged_loss:.4g}"]
        table[f"minilora, {backend.name}"] = [f"{step:.3f} ms" for step in steps] + seconds
    if torch_device is not None:
        steps = [milliseconds_a_step(torch_epoch(torch_device, kind, sizes), sizes) for kind in KINDS]
        table[f"torch, {torch_device}"] = [f"{step:.3f} ms" for step in steps] + ["", "", ""]
    return table


def page(table: dict[str, list[str]], sizes: Sizes, machine: dict[str, str]) -> str:
    """Return the report as Markdown."""
    rows = [f"{kind}, a step" for kind in KINDS]
    rows += [f"base, {sizes.epochs} epochs", f"LoRA, {sizes.epochs} epochs", "loss of the merged layer"]
    lines = ["# On a GPU: measured", ""]
    lines += [f"- {what}: {value}" for what, value in machine.items()]
    lines += ["", f"{sizes}, float32, rank 1. A step is the median of 7 epochs, the device waited for after each.", ""]
    lines += ["| | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(cells) + " |"
        for row, cells in zip(rows, zip(*table.values(), strict=True), strict=True)
    ]
    return "\n".join(lines) + "\n"


def machine(gpu: Backend) -> dict[str, str]:
    """Return what the figures hold for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    found = {
        "card": gpu.device,
        "driver": driver,
        "CPU": f"{platform.processor() or platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "minilora": minilora.__version__,
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "CuPy": str(getattr(gpu.xp, "__version__", "unknown")),
    }
    if "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].__version__
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__)
        return 2
    try:
        gpu = get_backend("cupy")
    except BackendUnavailable as reason:
        print(f"no report: {reason}", file=sys.stderr)
        return 2
    try:
        import torch

        torch_device = "cuda" if torch.cuda.is_available() else None
    except ImportError:
        torch_device = None
    sizes = Sizes()
    table = columns([get_backend("numpy"), gpu], sizes, torch_device)
    Path(arguments[0]).write_text(page(table, sizes, machine(gpu)))
    print(f"written to {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
