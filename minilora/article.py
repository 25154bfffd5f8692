"""The experiment of "Understanding LoRA with a minimal example" (Posit AI Blog), told with this library.

    y = x theta                (N, in) -> (N, out)     a linear model, learned in full: W is theta^T
    y2 = x2 (theta + 1)                                a new task: every entry grows by 1, a change of rank 1
    y2 = x2 W^T + s x2 A^T B^T                         the layer with an adapter of rank 1: W frozen, A and B learned

The adapter has 2,001 numbers where the model has 1,001,000, and the change that it should find is 1 in every entry.

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
    """What a run of the experiment found."""

    base: Linear  # the pre-trained layer
    adapter: LoRA  # trained
    merged: Linear  # the base with the adapter folded in
    base_history: History  # the losses as the first training went on
    lora_history: History  # the losses as the second went on
    shifted_loss: float  # of the base alone, on the shifted task
    merged_loss: float  # of the merged layer, on the shifted task
    delta: np.ndarray  # (out, in), on the host: the change of weight that was learned. The true one is 1 everywhere
    base_seconds: float  # what the first training took, the losses on the way included
    lora_seconds: float  # likewise the second
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
        Of the adapter.
    epochs, batch_size, lr
        Of both trainings.
    seed : int
        Of everything that is drawn.
    dtype : {"float32", "float64"}
        Of everything that is computed.
    backend : Backend, optional
        Where it is computed; NumPy by default.
    n, in_features, out_features : int
        The number of rows, and the widths.
    progress : bool
        Whether to show a progress bar for each training.
    checkpoint : path, optional
        A file that keeps the first training's state after every epoch, and the second's in one beside it, whose name
        says ``.adapter``. Where they are there already the run goes on from them, and ends with the same bits. The
        seconds are then those of this call.
    tell : callable, optional
        ``tell(text)``, called with each part of the report as soon as it is known: lines, each with its end.

    Returns
    -------
    ArticleResult
        Layers, losses and times.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range, before anything is trained.
    CheckpointError
        If a file holds a checkpoint of another configuration, naming the difference.
    """
    # All that decides the numbers: a checkpoint of other settings is refused before anything is computed.
    settings: dict[str, Any] = {
        "rank": rank, "alpha": alpha, "epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed,
        "dtype": dtype, "n": n, "in_features": in_features, "out_features": out_features,
    }  # fmt: skip
    # What the second training alone would refuse, after the first; all else the first refuses, before anything is told.
    check_sizes(rank=rank)
    alpha = check_number("alpha", alpha, above=0)
    check_integer("seed", seed, at_least=0)
    backend = backend_or_numpy(backend)
    checkpoints: dict[str, Keeper | None] = {}
    if checkpoint is not None:
        settings["backend"] = backend.name
        checkpoints = {name: keeper_of(file, settings) for name, file in checkpoint_files(checkpoint).items()}
    rng, told = np.random.default_rng(seed), Report(tell)
    training: dict[str, Any] = {
        "epochs": epochs, "batch_size": batch_size, "lr": lr, "rng": rng, "progress": progress, "report": told.epoch,
        "batches": None,  # each is drawn from all rows, as in the article
    }  # fmt: skip

    words = f"rank {rank}, alpha {alpha:g}, {epochs} epochs, batches of {batch_size}, lr {lr:g}, seed {seed}, {dtype}"
    words += f", {backend.device}"

    def randn(*shape: int) -> Array:
        return backend.asarray(rng.standard_normal(shape), dtype)

    # Step 1. Simulate data of a linear model.
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

    # Step 4. The base does not know it. Its error is the sum of each row of X2, whose variance is in_features.
    shifted_loss = evaluate(base, X2, Y2)
    told.shift(shifted_loss, in_features)

    # Step 5. Fine-tune with LoRA: the base is frozen, and the adapter beside it trains. `gradients` is for speed.
    # Without it a step is forward, mse and backward, and computes the same gradients. But the base is frozen and the
    # loss is the squared error, so they need the error only inside two thin products: `residual_form` never forms it.
    start = time.perf_counter()
    layer = LoRALinear(base, LoRA(randn(rank, in_features), backend.zeros((out_features, rank), dtype), alpha))
    told.training(f"5. Train an adapter, {share_of(layer.adapter, base)}", ARTICLE_LORA_LOSSES)
    lora_history = train(layer, X2, Y2, gradients=residual_form, checkpoint=checkpoints.get("adapter"), **training)
    lora_seconds = time.perf_counter() - start
    told.trained(lora_history, lora_seconds)

    # Step 6. Look at what was learned: a matrix of ones.
    delta = backend.to_numpy(layer.adapter.delta())
    told.change(delta)

    # Step 7. Merge: one layer again, no slower than the base, and as good as base and adapter together.
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
    """Return where each training is kept: the base's in the file itself, the adapter's in one beside it."""
    path = check_path("checkpoint", path)
    return {"base": path, "adapter": path.with_name(f"{path.stem}.adapter{path.suffix}")}


class Report:
    """A run in words, told as it goes."""

    def __init__(self, tell: Callable[[str], object] | None) -> None:
        self.tell, self.text, self.told = tell, "", 0

    def add(self, text: str) -> None:
        """Add whole lines, and tell all that were not told."""
        self.text += text
        if self.tell is not None and self.told < len(self.text):
            self.tell(self.text[self.told :])
        self.told = len(self.text)

    def data(self, settings: str, in_features: int, out_features: int) -> None:
        """Note the settings, and step 1, to be told when a training has begun: it may refuse them."""
        self.text += f"Understanding LoRA with a minimal example\n({settings})\n\n"
        self.text += f"1. Simulate y = x theta, theta of {in_features} x {out_features}.\n"

    def training(self, title: str, theirs: Sequence[float]) -> None:
        """Note the head of a loss table, to which `epoch` and `trained` add rows."""
        self.theirs, self.rows = dict(zip(ARTICLE_EPOCHS, theirs, strict=True)), 0
        self.text += f"{title}:\n\n   epoch          loss       article\n"

    def epoch(self, state: TrainingState) -> None:
        """Tell what was noted or measured since the last call. This is the `report` of `train`."""
        self.add("")
        self.losses(state.history)

    def losses(self, history: History) -> None:
        """Tell the losses that were not told yet, with the article's wherever it printed one."""
        for epoch, loss in list(zip(history.epochs, history.losses, strict=True))[self.rows :]:
            theirs = f"{self.theirs[epoch]:13.7g}" if epoch in self.theirs else f"{'-':>13}"
            self.add(f"   {epoch:5d} {loss:13.7g} {theirs}\n")
        self.rows = len(history.epochs)

    def trained(self, history: History, seconds: float) -> None:
        """Tell the last losses, and how long the training took."""
        self.losses(history)
        self.add(f"   ({seconds:.1f} s)\n\n")

    def shift(self, loss: float, in_features: int) -> None:
        """Tell steps 3 and 4."""
        self.add("3. A new task: theta + 1.\n")
        article = f"(article {ARTICLE_SHIFTED_LOSS}, expectation {in_features})"
        self.add(f"4. The base's loss on it: {loss:.3f}   {article}\n")

    def change(self, delta: np.ndarray) -> None:
        """Tell step 6."""
        corner = "".join("   " + " ".join(f"{value:8.4f}" for value in row) + "\n" for row in delta[:5, :5])
        self.add(f"6. What it learned, delta[:5, :5]; the truth is 1 everywhere:\n\n{corner}")
        self.add(f"   all {delta.size:,} entries lie between {delta.min():.4f} and {delta.max():.4f}\n\n")

    def merged(self, loss: float) -> None:
        """Tell step 7."""
        self.add(f"7. Merged into one layer, loss {loss:.7g}   (article {ARTICLE_MERGED_LOSS})\n")


def share_of(adapter: LoRA, base: Linear) -> str:
    """Say how many parameters an adapter has, and which share of the base's that is."""
    count = sum(p.size for p in adapter.trainable().values())
    return f"{count:,} parameters, 1/{base.weight.size / count:.0f} of the base's"
