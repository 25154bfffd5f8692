"""Write a report that compares minilora on this machine's GPU with its CPU (with PyTorch too, if installed).

    python examples/gpu_report.py docs/recordings/gpu-report.md

It takes a few minutes. Nothing is written if CuPy does not work.
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
from minilora import (
    Adam,
    Backend,
    BackendUnavailable,
    Conv2d,
    Embedding,
    Linear,
    LoRALinear,
    adapt,
    article,
    cross_entropy,
    get_backend,
)
from minilora.language.config import LlamaConfig
from minilora.language.llama import Llama
from minilora.layer import Layer, rebuild
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate, draw_batches

KINDS = ("full layer", "layer with adapter", "adapter on the residual")
OTHERS = ("convolution with an adapter", "embedding with an adapter", "Llama with adapters")
RANK = 8


@dataclass(frozen=True)
class Sizes:
    """The article's sizes, with those of the other models."""

    n: int = 10_000
    in_features: int = 1001
    out_features: int = 1000
    batch_size: int = 128
    epochs: int = 100
    images: int = 32
    pixels: int = 28
    ids: int = 4096
    vocabulary: int = 50_000
    windows: int = 16
    length: int = 128
    blocks: int = 4


def minilora_epoch(backend: Backend, kind: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that runs the steps of an epoch as `train` does."""
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
    """Return a function that does the same with PyTorch, using autograd and its fused Adam."""
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


def other_models(sizes: Sizes) -> dict[str, tuple[Layer, np.ndarray]]:
    """Return other models, each with an input, both random and on the host. The decoder has glassllm's sizes."""
    rng = np.random.default_rng(0)

    def randn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, "float32") / np.float32(shape[-1] ** 0.5)

    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=341, num_hidden_layers=sizes.blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6, frequencies=frequencies(32, 10_000.0),
        tie_word_embeddings=True,
    )  # fmt: skip
    arrays = {name: randn(*shape) + np.float32(len(shape) == 1) for name, shape in config.shapes().items()}
    convolution = Conv2d(randn(32, 16, 3, 3), randn(32), padding=1)
    images = randn(sizes.images, 16, sizes.pixels, sizes.pixels)
    ids, text = rng.integers(0, sizes.vocabulary, sizes.ids), rng.integers(0, 1024, (sizes.windows, sizes.length))
    models = (convolution, images), (Embedding(randn(sizes.vocabulary, 512)), ids), (Llama.build(config, arrays), text)
    return dict(zip(OTHERS, models, strict=True))


def minilora_step(backend: Backend, kind: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that runs the forward and backward pass of one of these models with LoRA."""
    model, x = other_models(sizes)[kind]
    rng = np.random.default_rng(1)
    targets = "all-linear" if isinstance(model, Llama) else ""  # the path of a single layer is empty
    adapted = adapt(rebuild(model, array=backend.asarray), targets, rank=RANK, alpha=RANK, rng=rng)
    x = backend.asarray(x)

    def step() -> None:
        y, cache = adapted.forward(x)
        dy = cross_entropy(y, x, out=y)[1] if isinstance(model, Llama) else y
        adapted.backward(dy, cache)
        backend.synchronize()

    return step


def torch_step(device: str, kind: str, sizes: Sizes) -> Callable[[], None]:
    """Return a function that does the same with PyTorch, and with transformers and PEFT for the decoder."""
    import torch
    from torch.nn.functional import conv2d

    model, host = other_models(sizes)[kind]
    x = torch.from_numpy(host).to(device)
    if isinstance(model, Llama):
        from peft import LoraConfig, get_peft_model
        from transformers import LlamaConfig as TheirConfig
        from transformers import LlamaForCausalLM

        ours = ("frequencies", "attention_bias", "mlp_bias", "model_type", "max_position_embeddings")
        names = [field for field in vars(model.config) if field not in ours]
        config = TheirConfig(**{name: getattr(model.config, name) for name in names})
        lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
        decoder = get_peft_model(LlamaForCausalLM(config).to(device), lora)
        trained = [p for p in decoder.parameters() if p.requires_grad]

        def output():
            z = decoder(x).logits
            return torch.nn.functional.cross_entropy(z.flatten(0, 1), x.flatten())
    else:
        W = torch.from_numpy(model.weight).to(device)
        n_in, n_out = (W.shape[1], W.shape[0]) if isinstance(model, Conv2d) else W.shape
        A = torch.randn(RANK, n_in, *W.shape[2:], device=device, requires_grad=True)
        B = torch.randn(n_out, RANK, *(1 for _ in W.shape[2:]), device=device, requires_grad=True)
        trained = [A, B]
        if isinstance(model, Conv2d):
            x.requires_grad_()
            trained.append(x)

        def output():
            if isinstance(model, Conv2d):
                return conv2d(x, W, padding=1) + conv2d(conv2d(x, A, padding=1), B)
            return W[x] + A.T[x] @ B.T

    def step() -> None:
        y = output()
        torch.autograd.grad(y, trained, None if y.ndim == 0 else y)
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def milliseconds(run: Callable[[], None], steps: int = 1, repeats: int = 7) -> float:
    """Return the median time of a step, after one warm-up run."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times) / steps


def columns(backends: list[Backend], sizes: Sizes, torch_device: str | None = None) -> dict[str, list[str]]:
    """Measure everything, and return a column of figures for each library, under its name."""
    table = {}
    steps = sizes.n // sizes.batch_size
    for backend in backends:
        times = [milliseconds(minilora_epoch(backend, kind, sizes), steps) for kind in KINDS]
        times += [milliseconds(minilora_step(backend, kind, sizes)) for kind in OTHERS]
        run = article.run(
            backend=backend,
            epochs=sizes.epochs,
            batch_size=sizes.batch_size,
            n=sizes.n,
            in_features=sizes.in_features,
            out_features=sizes.out_features,
        )
        seconds = [f"{run.base_seconds:.2f} s", f"{run.lora_seconds:.2f} s", f"{run.merged_loss:.4g}"]
        table[f"minilora, {backend.name}"] = [f"{t:.3f} ms" for t in times] + seconds
    if torch_device is not None:
        cells = [f"{milliseconds(torch_epoch(torch_device, kind, sizes), steps):.3f} ms" for kind in KINDS]
        for kind in OTHERS:
            try:
                cells.append(f"{milliseconds(torch_step(torch_device, kind, sizes)):.3f} ms")
            except ImportError as error:
                cells.append(f"needs {error.name}")
        table[f"torch, {torch_device}"] = [*cells, "", "", ""]
    return table


def page(table: dict[str, list[str]], sizes: Sizes, machine: dict[str, str]) -> str:
    """Return the report as Markdown."""
    rows = [f"{kind}, one step" for kind in KINDS] + [f"{kind}, forward and backward" for kind in OTHERS]
    rows += [f"base, {sizes.epochs} epochs", f"LoRA, {sizes.epochs} epochs", "loss of the merged layer"]
    lines = ["# On a GPU: measured", ""]
    lines += [f"- {what}: {value}" for what, value in machine.items()]
    lines += ["", f"{sizes}, float32. The linear layers have an adapter of rank 1, the others of rank {RANK}."]
    lines += ["A step's time is the median over 7 epochs, or over 7 steps, synchronised after each.", ""]
    lines += ["| | " + " | ".join(table) + " |", "|---" * (len(table) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(cells) + " |"
        for row, cells in zip(rows, zip(*table.values(), strict=True), strict=True)
    ]
    return "\n".join(lines) + "\n"


def machine(gpu: Backend) -> dict[str, str]:
    """Return the hardware and the versions that the figures are for."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    found = {
        "GPU": gpu.device,
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
    print(f"wrote {arguments[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
