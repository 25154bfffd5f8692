"""The experiment of "Understanding LoRA with a minimal example" (Posit AI Blog), reproduced with this library.

    y = x theta                (N, in) -> (N, out)     a linear model, trained in full: W is theta^T
    y2 = x2 (theta + 1)                                a new task: every entry grows by 1, a change of rank 1
    y2 = x2 W^T + s x2 A^T B^T                         the layer with an adapter of rank 1: W frozen, A and B learned

The adapter has 2,001 parameters, the model 1,001,000, and the change to learn is 1 in every entry.

The article writes x A B with A (in, r) and B (r, out): its A is our ``lora_A.T``, its B our ``lora_B.T``. It calls the
shift a rotation; it is the addition of a rank-1 matrix. Its ``Y2`` is ``y2``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Backend, backend_or_numpy
from .checks import Array, check_integer, check_number, check_path, check_sizes
from .fast import residual_form
from .linear import Linear
from .lora import LoRA, LoRALinear
from .state import History, Keeper, TrainingState
from .training import evaluate, keeper_of, train

ARTICLE_EPOCHS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
ARTICLE_BASE_LOSSES = (
    *(577.075, 312.2, 155.055, 68.49202, 25.68243),
    *(7.620944, 1.607114, 0.2077137, 0.01392935, 0.0004785107),
)
ARTICLE_LORA_LOSSES = (
    *(798.6073, 485.8804, 257.3518, 118.4895, 46.34769),
    *(14.46207, 3.185689, 0.4264134, 0.02732975, 0.001300132),
)
ARTICLE_SHIFTED_LOSS = 992.673
ARTICLE_MERGED_LOSS = 0.00130013


@dataclass(frozen=True)
class ArticleResult:
    """The results of a run of the experiment."""

    base: Linear  # the pre-trained layer
    adapter: LoRA  # trained
    merged: Linear  # the base with the adapter merged in
    base_history: History  # the losses during the first training
    lora_history: History  # the losses during the second training
    shifted_loss: float  # the base's loss on the shifted task
    merged_loss: float  # the merged layer's loss on the shifted task
    delta: np.ndarray  # (out, in), on the host: the change of weight that was learned. The true one is 1 everywhere
    base_seconds: float  # seconds of the first training, including its evaluations
    lora_seconds: float  # the same for the second training
    settings: str  # the configuration, in words
    told: str  # the report


def run(
    *,
    rank: int = 1,
    alpha: float = 1.0,
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    dtype: str = "float32",
    backend: Backend | None = None,
    n: int = 10_000,
    in_features: int = 1001,
    out_features: int = 1000,
    progress: bool = False,
    checkpoint: str | Path | None = None,
    tell: Callable[[str], object] | None = None,
) -> ArticleResult:
    """Run the experiment; the defaults are the article's.

    Parameters
    ----------
    rank, alpha
        Rank and alpha of the adapter.
    epochs, batch_size, lr
        The settings of both trainings.
    seed : int
        The seed of all random numbers.
    dtype : {"float32", "float64"}
        The dtype of all arrays.
    backend : Backend, optional
        The backend; NumPy by default.
    n, in_features, out_features : int
        The number of rows, and the widths.
    progress : bool
        Whether to show a progress bar for each training.
    checkpoint : path, optional
        A file for the first training's state after every epoch; the second's is in a file next to it, with ``.adapter``
        in its name. If they exist, the run resumes from them, and ends with the same bits. The seconds are then those
        of this call.
    tell : callable, optional
        ``tell(text)`` is called with each part of the report as soon as it is known: whole lines with newlines.

    Returns
    -------
    ArticleResult
        Layers, losses and times.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, before anything is trained.
    CheckpointError
        If a file is a checkpoint of another configuration; the message lists the differences.
    """
    # Everything that decides the numbers: a checkpoint of other settings is refused before anything is computed.
    settings: dict[str, Any] = {
        "rank": rank, "alpha": alpha, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "dtype": dtype, "n": n, "in_features": in_features, "out_features": out_features,
    }  # fmt: skip
    # Settings that only the second training would refuse, after the first; the first refuses all others at once.
    check_sizes(rank=rank)
    alpha = check_number("alpha", alpha, above=0)
    check_integer("seed", seed, at_least=0)
    backend = backend_or_numpy(backend)
    checkpoints: dict[str, Keeper | None] = {}
    if checkpoint is not None:
        settings["backend"] = backend.name
        checkpoints = {name: keeper_of(file, settings) for name, file in checkpoint_files(checkpoint).items()}
    rng, told = np.random.default_rng(seed), RunReport(tell)
    training: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "rng": rng, "progress": progress, "report": told.epoch,
        "batches": None,  # each batch is drawn from all rows, as in the article
    }  # fmt: skip

    words = f"rank {rank}, alpha {alpha:g}, {epochs} epochs, batches of {batch_size}, lr {lr:g}, seed {seed}, {dtype}"
    words += f", {backend.device}"

    def randn(*shape: int) -> Array:
        return backend.asarray(rng.standard_normal(shape), dtype)

    # Step 1. Simulate data from a linear model.
    told.data(words, in_features, out_features)
    theta = randn(in_features, out_features)
    X = randn(n, in_features)
    Y = X @ theta

    # Step 2. Train a full-rank layer on it: the "pre-trained" model.
    start = time.perf_counter()
    base = Linear.init(in_features, out_features, bias=False, rng=rng, dtype=dtype, backend=backend)
    told.training(f"2. Train the base, {base.weight.size:,} parameters", ARTICLE_BASE_LOSSES)
    base_history = train(base, X, Y, checkpoint=checkpoints.get("base"), **training)
    base_seconds = time.perf_counter() - start
    told.trained(base_history, base_seconds)

    # Step 3. A new task: every entry of theta grows by 1, and the inputs are new.
    X2 = randn(n, in_features)
    Y2 = X2 @ (theta + 1)

    # Step 4. The base has not learned it. Its error is the sum of each row of X2, whose variance is in_features.
    shifted_loss = evaluate(base, X2, Y2)
    told.shift(shifted_loss, in_features)

    # Step 5. Fine-tune with LoRA: the base is frozen, and only the adapter trains. `gradients` is for speed.
    # Without it a step is forward, mse and backward, and computes the same gradients. But the base is frozen and the
    # loss is the squared error, so they need the error only inside two thin products: `residual_form` never forms it.
    start = time.perf_counter()
    layer = LoRALinear(base, LoRA(randn(rank, in_features), backend.zeros((out_features, rank), dtype), alpha))
    told.training(f"5. Train an adapter, {share_of(layer.adapter, base)}", ARTICLE_LORA_LOSSES)
    lora_history = train(layer, X2, Y2, gradients=residual_form, checkpoint=checkpoints.get("adapter"), **training)
    lora_seconds = time.perf_counter() - start
    told.trained(lora_history, lora_seconds)

    # Step 6. Inspect the learned change: a matrix of ones.
    delta = backend.to_numpy(layer.adapter.delta())
    told.change(delta)

    # Step 7. Merge: a single layer again, as fast as the base, and as good as base and adapter together.
    merged = layer.merge()
    merged_loss = evaluate(merged, X2, Y2)
    told.merged(merged_loss)

    return ArticleResult(
        base=base,
        adapter=layer.adapter,
        merged=merged,
        base_history=base_history,
        lora_history=lora_history,
        shifted_loss=shifted_loss,
        merged_loss=merged_loss,
        delta=delta,
        base_seconds=base_seconds,
        lora_seconds=lora_seconds,
        settings=words,
        told=told.text,
    )


def checkpoint_files(path: str | Path) -> dict[str, Path]:
    """Return the checkpoints of the trainings: the base's in the file itself, the adapter's in one next to it."""
    path = check_path("checkpoint", path)
    return {"base": path, "adapter": path.with_name(f"{path.stem}.adapter{path.suffix}")}


class RunReport:
    """The report of a run, printed as it proceeds."""

    def __init__(self, tell: Callable[[str], object] | None) -> None:
        self.tell, self.text, self.told = tell, "", 0

    def add(self, text: str) -> None:
        """Add whole lines, and emit all pending ones."""
        self.text += text
        if self.tell is not None and self.told < len(self.text):
            self.tell(self.text[self.told :])
        self.told = len(self.text)

    def data(self, settings: str, in_features: int, out_features: int) -> None:
        """Add the settings and step 1, to be emitted once a training has begun, since it may refuse them."""
        self.text += f"Understanding LoRA with a minimal example\n({settings})\n\n"
        self.text += f"1. Simulate y = x theta, theta of {in_features} x {out_features}.\n"

    def training(self, title: str, theirs: Sequence[float]) -> None:
        """Add the head of a loss table, to which `epoch` and `trained` add rows."""
        self.theirs, self.rows = dict(zip(ARTICLE_EPOCHS, theirs, strict=True)), 0
        self.text += f"{title}:\n\n   epoch          loss       article\n"

    def epoch(self, state: TrainingState) -> None:
        """Emit the lines and losses since the last call. This is the `report` of `train`."""
        self.add("")
        self.losses(state.history)

    def losses(self, history: History) -> None:
        """Emit the new losses, with the article's where it printed one."""
        for epoch, loss in list(zip(history.epochs, history.losses, strict=True))[self.rows :]:
            theirs = f"{self.theirs[epoch]:13.7g}" if epoch in self.theirs else f"{'-':>13}"
            self.add(f"   {epoch:5d} {loss:13.7g} {theirs}\n")
        self.rows = len(history.epochs)

    def trained(self, history: History, seconds: float) -> None:
        """Emit the last losses and the duration of the training."""
        self.losses(history)
        self.add(f"   ({seconds:.1f} s)\n\n")

    def shift(self, loss: float, in_features: int) -> None:
        """Emit steps 3 and 4."""
        self.add("3. A new task: theta + 1.\n")
        article = f"(article {ARTICLE_SHIFTED_LOSS}, expectation {in_features})"
        self.add(f"4. The base's loss on it: {loss:.3f}   {article}\n")

    def change(self, delta: np.ndarray) -> None:
        """Emit step 6."""
        corner = "".join("   " + " ".join(f"{value:8.4f}" for value in row) + "\n" for row in delta[:5, :5])
        self.add(f"6. What it learned, delta[:5, :5]; the truth is 1 everywhere:\n\n{corner}")
        self.add(f"   all {delta.size:,} entries lie between {delta.min():.4f} and {delta.max():.4f}\n\n")

    def merged(self, loss: float) -> None:
        """Emit step 7."""
        self.add(f"7. Merged into one layer, loss {loss:.7g}   (article {ARTICLE_MERGED_LOSS})\n")


def share_of(adapter: LoRA, base: Linear) -> str:
    """Return the parameter count of an adapter, with its share of the base's, in words."""
    count = sum(p.size for p in adapter.trainable().values())
    return f"{count:,} parameters, 1/{base.weight.size / count:.0f} of the base's"
