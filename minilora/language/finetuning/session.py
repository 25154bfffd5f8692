"""A fine-tuning, step by step: the data and the model, then the training with its table and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...adaptation import ALL_LINEAR, adapt, check_target_modules
from ...backend import Backend
from ...evaluation import Gradients
from ...fast.accumulation import Accumulated
from ...files.checkpoint import Checkpoint
from ...guards.boundedpatterns import Matching
from ...layer import parameter_count, walk
from ...training import train
from ...variants.adapter import Adapter
from ..data import HELD_OUT, Data, load_data
from ..llama import Llama
from ..namedmodel import load_model, model_path, with_adapters
from ..text import MeasuredWhereItCounts, next_token_loss, where_it_counts
from ..widths import by_width
from .costs import Costs
from .heartbeat import Heartbeat
from .keepingbest import KeepingBest
from .losstable import LOG_EVERY, Table, TrainingLoss, duration, write_line
from .recipe import Recipe, Settled
from .stopped import Stopped, signature
from .withdropout import WithDropout


def load(recipe: Recipe, where: Backend, write: Callable[[str], None]) -> tuple[Data, Llama]:
    """Return the data and the model. What is wrong with the data is an error before the model is read.

    What takes long is told by `write`.
    """
    with Heartbeat(write, "reading the tokenizer and the text") as beat:
        data = load_data(
            recipe.text,
            model_path(recipe.model),
            recipe.length,
            held_out=1 / HELD_OUT if recipe.valid is None else recipe.valid,
        )
        beat.now("reading the weights")
        model = load_model(recipe.model, recipe.dtype, where, recipe.quantize)
    data.check_vocabulary(model.lm_head.out_features)
    return data, model


def adapted_model(
    recipe: Settled, model: Llama, adapters: Mapping[str, Adapter], rng: np.random.Generator, where: Backend
) -> Llama:
    """Return the model with the adapters to go on from, where there are some, or with new ones."""
    if recipe.adapter is not None:
        return with_adapters(model, adapters, recipe.adapter, where, recipe.quantize)
    if isinstance(recipe.target_modules, str) and recipe.target_modules != ALL_LINEAR:
        check_target_modules(recipe.target_modules)
        with Matching(Path(recipe.target_modules)) as matching:  # an expression can run for years
            matching.whole("target_modules", recipe.target_modules, [path for path, _ in walk(model)])
    new: dict[str, Any] = {name: getattr(recipe, name) for name in ("target_modules", "rank", "alpha")}
    adapted: Llama = adapt(
        model,
        **new,
        rng=rng,
        target_parameters=recipe.target_parameters,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init=recipe.init,
    )
    return adapted


def gradients_of(recipe: Settled, rng: np.random.Generator, threads: int) -> Gradients:
    """Return what computes the gradients of a step, a part of its batch at a time."""
    gradients: Gradients = Accumulated(part_size(recipe), threads, where_it_counts, by_width)
    if recipe.dropout:
        gradients = WithDropout(gradients, recipe.dropout, rng)
    return MeasuredWhereItCounts(gradients, threads)


def part_size(recipe: Settled) -> int:
    """Return how many rows of the full width a part of the batch may have, which are computed at a time."""
    return min(recipe.micro_batch or math.ceil(recipe.batch_size / 2), recipe.batch_size)


def train_adapter(
    recipe: Settled,
    where: Backend,
    adapted: Any,
    data: Data,
    rng: np.random.Generator,
    threads: int,
    costs: Costs,
    stopped: Stopped | None,
) -> Table:
    """Train, print a row whenever the loss is measured, and return the rows.

    Parameters
    ----------
    recipe : Settled
        What is asked for.
    where : Backend
        Where the arrays live.
    adapted : Layer
        The model with its adapters, as they start.
    data : Data
        Its rows.
    rng : numpy.random.Generator
        Draws the batches, and the masks of dropout.
    threads : int
        Parts of the batch that are computed at once.
    costs : Costs
        As foretold.
    stopped : Stopped, optional
        What the checkpoint holds.

    Raises
    ------
    TrainingDiverged
        If a step leaves numbers that are not finite.
    """
    X, Y, X_held, Y_held = (where.asarray(array) for array in (data.X, data.Y, data.X_held, data.Y_held))
    done, learned = (stopped.saved.epoch, stopped.learned) if stopped else (0, None)
    loss = TrainingLoss(gradients_of(recipe, rng, threads), done, learned)
    tokens, measuring = round(recipe.batch_size * data.row_tokens), costs.measuring(data.held_windows)
    table = Table(recipe.steps, done, tokens, loss, measuring, recipe.log)
    before = stopped.before if stopped else None
    if before is None:
        what = f"      measuring the held-out loss before the first step, very roughly {duration(measuring)}"
        with Heartbeat(write_line, what):
            before = loss.evaluate(adapted, X_held, Y_held, next_token_loss)
    table.known(before, stopped.saved if stopped else None)
    checkpoint = None
    if recipe.checkpoint is not None:
        notes = {
            "asked": signature(recipe, where),
            "numbers": parameter_count(adapted) - parameter_count(adapted, trained=True),  # the model's
            "before": before,
            "learned": loss.sums,
        }
        checkpoint = Checkpoint(recipe.checkpoint, notes=notes)
    best = KeepingBest(checkpoint) if recipe.keep_best else None
    with Heartbeat(write_line, f"      computing step {done + 1}") as beat:
        loss.measures = lambda: beat.now("      measuring the held-out loss")
        table.begins = lambda step: beat.now(f"      computing step {step}")
        history = train(
            adapted,
            X,
            Y,
            epochs=recipe.steps,
            steps=1,
            batch_size=recipe.batch_size,
            lr=recipe.lr,
            rng=rng,
            log_every=LOG_EVERY,
            progress=True,
            checkpoint=best or checkpoint,
            loss=next_token_loss,
            gradients=loss,
            held_out=(X_held, Y_held),
            report=table,
            schedule=recipe.rates(),
        )
    table.last(history)
    if best is not None:
        table.best_step = best.bring_back(adapted, history)
    return table
