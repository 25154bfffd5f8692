"""A fine-tuning, step by step: the data and the model, then the training with its table and its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...backend import Backend
from ...fast import accumulate
from ...files.checkpoint import Checkpoint
from ...layer import parameter_count
from ...training import evaluate, train
from ..examples import Data, WithoutFilling, load_data
from ..llama import Llama
from ..namedmodel import load_model, model_path
from ..text import HELD_OUT, next_token_loss, where_it_counts
from .costs import Costs
from .heartbeat import Heartbeat
from .losstable import LOG_EVERY, Table, TrainingLoss, duration, write_line
from .recipe import Recipe, Settled
from .stopped import Stopped, signature


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


def part_size(recipe: Settled) -> int:
    """Return how many rows a part of the batch has, which are computed at a time."""
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
        Draws the batches.
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
    loss = TrainingLoss(WithoutFilling(accumulate(part_size(recipe), threads, where_it_counts)), done, learned)
    tokens, measuring = round(recipe.batch_size * data.row_tokens), costs.measuring(len(X_held))
    table = Table(recipe.steps, done, tokens, loss, measuring, recipe.log)
    before = stopped.before if stopped else None
    if before is None:
        what = f"      measuring the held-out loss before the first step, very roughly {duration(measuring)}"
        with Heartbeat(write_line, what):
            before = evaluate(adapted, X_held, Y_held, next_token_loss, threads)
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
            checkpoint=checkpoint,
            loss=next_token_loss,
            gradients=loss,
            held_out=(X_held, Y_held),
            report=table,
        )
    table.last(history)
    return table
