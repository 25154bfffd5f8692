"""``minilora finetune``: an adapter of a language model, trained on a text or on examples."""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..guards.errors import printable
from .cores import add_workers, workers
from .options import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    backend,
    check_plot,
    load_model,
    model_name,
    model_path,
    path,
    plot,
    target_modules,
    warn_beyond_context,
)
from .streams import say

if TYPE_CHECKING:
    import numpy as np

    from ..backend import Backend
    from ..language.examples import Data
    from ..language.llama import Llama
    from .costs import Costs
    from .learning import Table
    from .resume import Stopped

SMALL = 10_000_000
"""Parameters up to which a model is a small one."""
FITTING: dict[str, tuple[Any, Any]] = {"steps": (300, 80), "batch_size": (16, 4), "lr": (3e-3, 1e-3)}
"""What fits a small model, tried on glassllm's 0.85 million parameters, and a larger one, on SmolLM2's 135 million."""


def fitting(numbers: int) -> dict[str, Any]:
    """Return the settings that fit a model of so many parameters."""
    return {name: larger if numbers > SMALL else small for name, (small, larger) in FITTING.items()}


def add(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "finetune",
        help="train an adapter of a language model on a text, or on examples",
        description=(
            "Freeze a Llama-type language model, put LoRA beside the layers that you name, and train it to predict the "
            "next token of a text, or of examples. Every tenth window of the text, or example, is held out to measure "
            'the loss. Each line of a .jsonl file is an example: {"prompt": ..., "completion": ...}, where the loss '
            'counts the completion; {"messages": [{"role": ..., "content": ...}, ...]}, written by the model\'s chat '
            'template, where it counts the assistant\'s turns; or {"text": ...}.'
        ),
        epilog="example: minilora finetune notes.txt --model SmolLM2-135M --save my-notes",
        formatter_class=Defaults,
    )
    option = parser.add_argument
    option("text", type=path, metavar="TEXT", help="a text file in UTF-8, or a .jsonl file of examples")
    option("--save", metavar="DIR", type=path, required=True, help="write the adapter there, in PEFT's layout")
    add_model(parser)
    option(
        "--target-modules",
        default="all-linear",
        metavar="NAMES",
        help="what to adapt: names such as q_proj,v_proj, one regular expression for whole paths, or all-linear",
    )
    option("--rank", type=int, default=8, metavar="R", help="rank of each adapter")
    option("--alpha", type=float, default=16.0, help="strength of the update, which is scaled by alpha / rank")
    option("--steps", type=int, metavar="N", help=f"steps of Adam ({_by_size('steps')})")
    option(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"windows of the text, or examples, drawn for each step ({_by_size('batch_size')})",
    )
    option(
        "--micro-batch",
        type=int,
        metavar="N",
        help="windows computed at a time; their gradients add up to the batch's: the same step with less memory "
        "(default: half of the batch)",
    )
    add_workers(parser)
    option("--length", type=int, default=128, metavar="N", help="tokens in a window; longer examples are cut")
    option("--lr", type=float, help=f"Adam's step length ({_by_size('lr')})")
    option("--seed", type=int, default=0, metavar="N", help="seed of the adapters' start and the batches")
    option("--dtype", choices=["float32", "float64"], default="float32", help="type of all arrays")
    add_quantize(parser)
    add_backend(parser)
    option(
        "--checkpoint",
        metavar="FILE",
        type=path,
        help="save the training's state there after every step; the same command goes on from it, also to more --steps",
    )
    option("--plot", metavar="FILE", type=path, help="draw the training and the held-out loss (.png, .svg, .pdf)")
    parser.set_defaults(command=run)


def _by_size(name: str) -> str:
    small, larger = FITTING[name]
    return f"default: {small}; {larger} for a model of more than {SMALL // 1_000_000} million parameters"


def run(options: argparse.Namespace) -> int:
    """Train, print the losses as they are measured, and write the adapter."""
    from . import resume

    _check(options)  # all that could fail after the training is tried before it
    try:
        return _run(options)
    except KeyboardInterrupt:
        resume.say_stopped(options)
        return 130


def _run(options: argparse.Namespace) -> int:
    import numpy as np

    from ..adaptation import adapt, adapters
    from ..fast import keep_pages
    from ..files.adapters import save_adapter
    from ..layer import parameter_count
    from ..training import TrainingDiverged

    keep_pages()
    where, start = backend(options), time.perf_counter()
    threads = workers(options, where)
    stopped = _stopped(options, where)
    data, model = _load(options, where)
    warn_beyond_context(model, data.X.shape[1], "an example has" if data.example else "a window has")
    _tell(options, data)
    rng = np.random.default_rng(options.seed)
    adapted = adapt(model, target_modules(options), rank=options.rank, alpha=options.alpha, rng=rng)
    trained = parameter_count(adapted, trained=True)
    print(f"adapter  rank {options.rank} beside {len(adapters(adapted))} layers: {trained:,} parameters", flush=True)
    costs = _say_costs(options, where, adapted, data, threads, stopped)
    try:
        table = _train(options, where, adapted, data, rng, threads, costs, stopped)
    except TrainingDiverged as error:
        raise TrainingDiverged(_diverged(options, error.epoch), error.epoch) from error
    save_adapter(options.save, adapters(adapted), base_model=options.model and str(options.model))
    print(f"\nadapter written to {printable(str(options.save))} after {time.perf_counter() - start:.0f} s")
    if best := table.best(kept=options.checkpoint is not None):
        print(best)
    if options.plot is not None:
        from .. import figures

        plot(figures.plot_learning(table.rows), options.plot)
    return 0


# --- before the model is loaded -----------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> None:
    """Refuse numbers out of range and places that cannot be written, before anything is read."""
    from ..checks import check_integer, check_number
    from ..files.adapterfolder import WEIGHTS_NAME
    from ..files.adapters import check_adapter_target
    from ..files.checkpoint import check_place
    from ..files.peftconfig import CONFIG_NAME, MAX_ALPHA, MIN_ALPHA

    for name in ("rank", "steps", "batch_size", "micro_batch", "length"):
        if getattr(options, name) is not None:
            check_integer(name, getattr(options, name), at_least=1)
    check_integer("seed", options.seed, at_least=0)
    check_number("alpha", options.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
    if options.lr is not None:
        check_number("lr", options.lr, above=0)
    check_adapter_target(options.save)
    save = _place(options.save)
    if options.model is not None and save == _place(options.model):
        raise ValueError(f"save {str(options.save)!r} is the model's folder, expected one of the adapter's own")
    if options.checkpoint is not None:
        file = _place(options.checkpoint)
        if file in (save, *save.parents, save / WEIGHTS_NAME, save / CONFIG_NAME):
            raise ValueError(f"the checkpoint {str(file)!r} would lie where the adapter goes: name another file")
        check_place(options.checkpoint)
    if options.plot is not None:
        check_plot(options.plot)


def _place(path: Path) -> Path:
    """Return where a path leads. `Path.resolve` says the same, and fails on a circle of links before Python 3.13."""
    return Path(os.path.realpath(path))


def _settle(options: argparse.Namespace, numbers: int) -> None:
    """Put what fits a model of so many parameters in the place of what was not given."""
    for name, value in fitting(numbers).items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _stopped(options: argparse.Namespace, where: Backend) -> Stopped | None:
    """Return what the checkpoint holds, if there is one; refuse that of another training."""
    from .resume import asked, check_same, stopped

    found = stopped(options.checkpoint)
    if found is not None:
        if found.numbers is not None:
            _settle(options, found.numbers)
        check_same(options.checkpoint, found, asked(options, where), options.steps)
        print(f"resume   goes on from {found.where(options.steps)} ({printable(str(options.checkpoint))})", flush=True)
    return found


# --- the model and the data ---------------------------------------------------------------------------------------


@contextmanager
def _doing(what: str) -> Iterator[None]:
    """Print what may take a while, without the line's end: that is for what comes of it."""
    print(what, end="", flush=True)
    try:
        yield
    except BaseException:
        print(flush=True)
        raise


def _load(options: argparse.Namespace, where: Backend) -> tuple[Data, Llama]:
    """Return the data and the model, and say which model it is. What is wrong with the data is told first."""
    import numpy as np

    from ..language.examples import load_data
    from ..layer import parameter_bytes, parameter_count
    from .costs import megabytes

    with _doing(f"model    {model_name(options)}"):
        data = load_data(options.text, model_path(options), options.length)
        model = load_model(options, options.dtype, where)
        data.check_vocabulary(model.lm_head.out_features)
    count = parameter_count(model)
    print(f": {count:,} parameters in {options.dtype}, {where.device}", flush=True)
    if options.quantize:
        whole, kept = megabytes(count * np.dtype(options.dtype).itemsize), megabytes(parameter_bytes(model))
        print(f"weights  {kept} with quantised linear layers, {whole} without")
    _settle(options, count)
    return data, model


def _tell(options: argparse.Namespace, data: Data) -> None:
    """Say what there is to train on; refuse a batch that is larger."""
    n, size = len(data.X), options.batch_size
    if size > n:
        raise ValueError(
            f"--batch-size {size} is more than the {n} {data.rows} that there are to train on at --length "
            f"{options.length}: a smaller one of the two fits"
        )
    print(f"{'data' if data.example else 'text':8} {printable(str(options.text))}: {data.summary}", flush=True)


# --- the training, and what it shows ------------------------------------------------------------------------------


def _rows(options: argparse.Namespace) -> int:
    """Return how many windows a part of the batch has."""
    size: int = options.batch_size
    return min(options.micro_batch or math.ceil(size / 2), size)


def _say_costs(
    options: argparse.Namespace, where: Backend, adapted: Any, data: Data, threads: int, stopped: Stopped | None
) -> Costs:
    """Say what memory and time the training is going to take."""
    from .costs import costs_of, held_against, megabytes
    from .learning import duration, rows_to_come

    rows = _rows(options)
    parts = min(threads, math.ceil(options.batch_size / rows))  # at once
    costs = costs_of(adapted, where.asarray(data.X), where, threads, len(data.X_held))
    most = costs.at_once(parts * rows)
    what = f"for the backward of {parts} x {rows}" if most == parts * rows else f"to measure the loss of {most}"
    print(f"memory   {megabytes(costs.activations(most))} of activations {what} {data.rows} at a time")
    line, hint = held_against(costs, where, rows, parts)
    print(f"         {line}")
    done, known = (stopped.saved.epoch, stopped.before is not None) if stopped else (0, False)
    steps, filled = options.steps - done, data.row_tokens / data.X.shape[1]  # the rest of a row is not computed
    seconds = steps * filled * costs.step(options.batch_size)
    seconds += (rows_to_come(options.steps, done) + (not known)) * costs.measuring(len(data.X_held))
    print(f"time     {steps} steps of {options.batch_size} {data.rows}, very roughly {duration(seconds)}\n", flush=True)
    if data.example:
        print(f"{data.example}\n", flush=True)
    if hint:
        say(hint)
    return costs


def _diverged(options: argparse.Namespace, step: int) -> str:
    """Say that a training broke down, what may help, and what is left of it."""
    kept = ""
    if options.checkpoint is not None:
        kept = f"; {printable(str(options.checkpoint))} keeps step {step - 1}, and another --lr needs another file"
    return (
        f"step {step} left numbers that are not finite: --lr {options.lr:g} is too large for this training. No adapter "
        f"is written{kept}"
    )


def _train(
    options: argparse.Namespace,
    where: Backend,
    adapted: Any,
    data: Data,
    rng: np.random.Generator,
    threads: int,
    costs: Costs,
    stopped: Stopped | None,
) -> Table:
    """Train, and print a row whenever the loss is measured."""
    from ..fast import accumulate
    from ..files.checkpoint import Checkpoint
    from ..language.examples import WithoutFilling
    from ..language.text import next_token_loss
    from ..layer import parameter_count
    from ..training import evaluate, train
    from .learning import LOG_EVERY, Table, TrainingLoss
    from .resume import asked

    X, Y, X_held, Y_held = (where.asarray(array) for array in (data.X, data.Y, data.X_held, data.Y_held))
    done, learned = (stopped.saved.epoch, stopped.learned) if stopped else (0, None)
    loss = TrainingLoss(WithoutFilling(accumulate(_rows(options), threads)), done, learned)
    tokens, measuring = round(options.batch_size * data.row_tokens), costs.measuring(len(X_held))
    table = Table(options.steps, done, tokens, loss, measuring)
    before = stopped.before if stopped else None
    if before is None:
        before = evaluate(adapted, X_held, Y_held, next_token_loss, threads)
    table.known(before, stopped.saved if stopped else None)
    checkpoint = None
    if options.checkpoint is not None:
        notes = {
            "asked": asked(options, where),
            "numbers": parameter_count(adapted) - parameter_count(adapted, trained=True),  # the model's
            "before": before,
            "learned": loss.kept,
        }
        checkpoint = Checkpoint(options.checkpoint, notes=notes)
    history = train(
        adapted,
        X,
        Y,
        epochs=options.steps,
        steps=1,
        batch_size=options.batch_size,
        lr=options.lr,
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
