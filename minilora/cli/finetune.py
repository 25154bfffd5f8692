"""``minilora finetune``: an adapter of a language model, trained on a text or on examples."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..language.finetuning.cores import one_blas_thread
from ..language.finetuning.defaults import ADAPTER, FITTING, SMALL
from .options import (
    Defaults,
    add_backend,
    add_model,
    add_quantize,
    backend,
    check_plot,
    model_name,
    path,
    plot,
    target_modules,
    target_parameters,
    warn_beyond_context,
)
from .streams import printable, say, say_goes_on, say_interrupted

if TYPE_CHECKING:
    from ..backend import Backend
    from ..guards.machinememory import Memory
    from ..language.data import Data
    from ..language.finetuning.costs import Costs, Fit, Measured
    from ..language.finetuning.losstable import Table
    from ..language.finetuning.recipe import Recipe, Settled
    from ..language.finetuning.stopped import Stopped
    from ..language.llama import Llama


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
    option("--overwrite", action="store_true", help="replace an adapter that the folder of --save holds")
    add_model(parser)
    option(
        "--target-modules",
        metavar="NAMES",
        help="what to adapt: names such as q_proj,v_proj, one regular expression for whole paths, or all-linear "
        f"(default: {ADAPTER['target_modules']})",
    )
    option(
        "--target-parameters",
        metavar="NAMES",
        help="of a mixture of experts, besides: arrays such as mlp.experts.gate_up_proj,mlp.experts.down_proj, whose "
        'experts get an adapter each, or mlp.gate.weight, the router; with --target-modules "" they alone are adapted',
    )
    option("--rank", type=int, metavar="R", help=f"rank of each adapter (default: {ADAPTER['rank']})")
    option(
        "--alpha",
        type=float,
        help=f"strength of the update, which is scaled by alpha / rank (default: {ADAPTER['alpha']})",
    )
    option("--use-rslora", action="store_true", help="scale the update by alpha / sqrt(rank) (rank-stabilised LoRA)")
    option("--use-dora", action="store_true", help="train the length of each row of a weight apart (DoRA)")
    option(
        "--init",
        choices=["lora", "pissa"],
        default="lora",
        help="start at zero, or from the leading singular vectors of the weights (PiSSA), which writes twice the rank",
    )
    option(
        "--adapter",
        type=path,
        metavar="DIR",
        help="go on from an adapter of this model, in the place of a new one: its rank, alpha and layers are that "
        "adapter's",
    )
    option(
        "--dropout",
        type=float,
        default=0.0,
        metavar="P",
        help="in a step, drop each entry of an adapter's input with the probability P",
    )
    option("--epochs", type=float, metavar="E", help="train on as many windows as E times all, in place of --steps")
    option(
        "--valid",
        type=_share_or_path,
        metavar="FILE|SHARE",
        help="measure the loss on another file, or hold out another share than a tenth, such as 0.2",
    )
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
        help="windows, or examples as long as the longest, computed at a time; their gradients add up to the batch's: "
        "the same step with less memory (default: half of the batch)",
    )
    option(
        "--workers",
        type=int,
        metavar="N",
        help="parts of a batch (see --micro-batch) that are computed at once, each on a core: 2 by default where there "
        "are two cores, 1 on a GPU. The result is the same to the last bit",
    )
    option(
        "--length",
        type=int,
        metavar="N",
        help="tokens in a window (default: 128); longer examples are cut (default: the longest, as far as memory has "
        "room)",
    )
    option("--lr", type=float, help=f"Adam's step length ({_by_size('lr')})")
    option(
        "--schedule",
        choices=["constant", "linear", "cosine"],
        default="constant",
        help="how the step length falls to the end of the training: not, along a line, or along a half cosine",
    )
    option(
        "--warmup",
        type=_steps_or_share,
        default=0,
        metavar="N|SHARE",
        help="steps at the start in which the step length grows, or a share of all steps, such as 0.1",
    )
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
    option(
        "--keep-best",
        action="store_true",
        help="save the adapter of the step with the least held-out loss, in the place of the last step's",
    )
    option("--anyway", action="store_true", help="train even if that needs more memory than is free")
    option("--log", metavar="FILE", type=path, help="write a line of JSON there for each step: its losses")
    option("--plot", metavar="FILE", type=path, help="draw the training and the held-out loss (.png, .svg, .pdf)")
    parser.set_defaults(command=run, before_numpy=one_blas_thread)


def _share_or_path(text: str) -> float | Path:
    try:
        return float(text)
    except ValueError:
        return path(text)


def _steps_or_share(text: str) -> int | float:
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = -1
    if not 0 <= value < (1 if "." in text else math.inf):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of steps nor a share below 1, such as 0.1")
    return value


def _by_size(name: str) -> str:
    small, larger = FITTING[name]
    return f"default: {small}; {larger} for a model of more than {SMALL // 1_000_000} million parameters"


def run(options: argparse.Namespace) -> int:
    """Train, print the losses as they are measured, and write the adapter."""
    recipe = _recipe(options)
    recipe.check()  # all that could fail after the training is tried before it
    if options.plot is not None:
        inputs = [(options.text, "the text"), (options.checkpoint, "the checkpoint"), (options.model, "the model")]
        inputs += [(options.valid, "the text to measure the loss on"), (options.log, "the log")]
        inputs += [(file, "a file of the adapter") for file in options.adapter.rglob("*")] if options.adapter else []
        check_plot(options.plot, [(file, what) for file, what in inputs if isinstance(file, Path)])
    try:
        return _run(options, recipe)
    except KeyboardInterrupt:
        _say_stopped(recipe, options.typed)
        return 130


def _recipe(options: argparse.Namespace) -> Recipe:
    """Return what was asked for."""
    from dataclasses import fields

    from ..language.finetuning.recipe import Recipe

    if options.adapter is None:
        for name, usual in ADAPTER.items():
            if getattr(options, name) is None:
                setattr(options, name, usual)
    values = {field.name: getattr(options, field.name) for field in fields(Recipe)}
    targets = {"target_modules": target_modules(options), "target_parameters": target_parameters(options)}
    return Recipe(**values | targets)


def _run(options: argparse.Namespace, recipe: Recipe) -> int:
    import numpy as np

    from ..adaptation import adapters, ends_of
    from ..fast import keep_pages
    from ..files.adapters import load_adapter, save_adapter
    from ..guards.machinememory import memory
    from ..language.finetuning.costs import measure
    from ..language.finetuning.heartbeat import Heartbeat
    from ..language.finetuning.losstable import write_line
    from ..language.finetuning.session import adapted_model, train_adapter
    from ..language.finetuning.stopped import check_same
    from ..layer import parameter_count
    from ..training import TrainingDiverged
    from ..variants.dropout import check_dropped, with_dropout

    keep_pages()
    where, start = backend(options), time.perf_counter()
    threads, machine = _threads(options.workers, where), memory(where)
    stopped = _stopped(recipe, where)
    if stopped is not None:
        recipe = _going_on(recipe, stopped)
    start_from = load_adapter(recipe.adapter, dtype=recipe.dtype, backend=where) if recipe.adapter else {}
    if recipe.dropout:
        check_dropped(start_from)
    data, model = _load(recipe, where)
    settled = recipe.settled(parameter_count(model))
    rng = np.random.default_rng(settled.seed)
    adapted = adapted_model(settled, model, start_from, rng, where)
    with Heartbeat(write_line, "         measuring what a step takes"):
        with_masks = with_dropout(adapted, settled.dropout, [0]) if settled.dropout else adapted
        measured = measure(with_masks, where.asarray(data.X), where)
    data = _within(data, settled, measured, machine, threads)
    settled = settled.of(len(data.X), data.length)
    settled.rates()  # a warmup of all steps is refused
    if stopped is not None and settled.checkpoint is not None:  # epochs are steps only now
        check_same(settled.checkpoint, stopped, {}, settled.steps)
    longest = max(data.X.shape[1], data.X_held.shape[1])
    warn_beyond_context(model, longest, "an example has" if data.example else "a window has")
    _print_data(settled, data)
    trained = parameter_count(adapted, trained=True)
    ranks = "-".join(map(str, sorted({adapter.rank for adapter in adapters(adapted).values()})))
    print(f"adapter  rank {ranks} beside {len(adapters(adapted))} layers: {trained:,} parameters", flush=True)
    costs = measured.at(data.X.shape[1], threads, *data.X_held.shape)
    _print_costs(settled, costs, machine, data, threads, stopped, options.anyway)
    try:
        table = train_adapter(settled, where, adapted, data, rng, threads, costs, stopped)
    except TrainingDiverged as error:
        raise TrainingDiverged(_diverged(settled, error.epoch), error.epoch) from error
    save_adapter(
        settled.save,
        adapters(adapted),
        base_model=None if settled.model is None else str(settled.model),
        task_type="CAUSAL_LM",
        target_modules=ends_of(adapted),
        lora_dropout=settled.dropout,
    )
    print(f"\nadapter written to {printable(str(settled.save))} after {time.perf_counter() - start:.0f} s")
    if best := _best(settled, table):
        print(best)
    if options.plot is not None:
        from .. import figures

        plot(figures.plot_learning(table.rows, table.loss.each()), options.plot)
    return 0


# --- before the model is loaded -----------------------------------------------------------------------------------


def _threads(workers: int | None, where: Backend) -> int:
    from ..checks import check_integer
    from ..language.finetuning.cores import worker_count

    return worker_count(None if workers is None else check_integer("workers", workers, at_least=1), where.name)


def _stopped(recipe: Recipe, where: Backend) -> Stopped | None:
    """Return what the checkpoint holds, if there is one; refuse that of another training."""
    from ..language.finetuning.stopped import check_same, read_stopped, signature

    stopped = read_stopped(recipe.checkpoint)
    if stopped is None or recipe.checkpoint is None:
        return None
    expected = _going_on(recipe, stopped)
    steps = None if recipe.epochs else expected.steps
    check_same(recipe.checkpoint, stopped, signature(expected, where), steps)
    print(f"resume   goes on from {stopped.where(steps)} ({printable(str(recipe.checkpoint))})", flush=True)
    return stopped


def _going_on(recipe: Recipe, stopped: Stopped) -> Recipe:
    """Return a recipe with what a training that goes on had settled."""
    from dataclasses import replace

    if recipe.length is None:
        recipe = replace(recipe, length=stopped.signature.get("--length"))
    return recipe if stopped.numbers is None else recipe.settled(stopped.numbers)


def _say_stopped(recipe: Recipe, typed: list[str]) -> None:
    """Tell that Ctrl-C ended the command, what is kept, and the command that goes on."""
    from ..language.finetuning.stopped import read_stopped

    say_interrupted()
    path, stopped = recipe.checkpoint, read_stopped(recipe.checkpoint)
    if path is None:
        say("nothing is kept: with --checkpoint FILE the same command would go on from where it was")
    elif stopped is None:
        say(f"nothing is kept in {path} yet")
    else:
        known = stopped.numbers is not None and recipe.epochs is None
        steps = recipe.settled(stopped.numbers or 0).steps if known else recipe.steps
        say_goes_on(f"{stopped.where(steps)} is kept in {path}", typed)


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


def _load(recipe: Recipe, where: Backend) -> tuple[Data, Llama]:
    """Return the data and the model, and print which model it is."""
    import numpy as np

    from ..language.finetuning.session import load
    from ..language.trainingmemory import megabytes, parameter_bytes
    from ..layer import parameter_count

    with _doing(f"model    {model_name(recipe.model)}"):
        data, model = load(recipe, where, lambda what: print(f" ... {what}", end="", flush=True))
    count = parameter_count(model)
    print(f": {count:,} parameters in {recipe.dtype}, {where.device}", flush=True)
    if recipe.quantize:
        whole, coded = megabytes(count * np.dtype(recipe.dtype).itemsize), megabytes(parameter_bytes(model))
        print(f"weights  {coded} with quantised linear layers, {whole} without")
    return data, model


def _within(data: Data, recipe: Settled, measured: Measured, machine: Memory | None, threads: int) -> Data:
    """Return the data; where nobody named a length and the longest example does not fit, in rows that do."""
    from ..language.finetuning.costs import longest_that_fits

    if recipe.length is not None or data.with_length is None:
        return data
    length = longest_that_fits(measured, machine, data.length, min(threads, recipe.batch_size), len(data.X_held))
    return data if length in (1, data.length) else data.with_length(length)


def _print_data(recipe: Settled, data: Data) -> None:
    """Print what there is to train on; refuse a batch that is larger."""
    n, size = len(data.X), recipe.batch_size
    if size > n:
        raise ValueError(
            f"--batch-size {size} is more than the {n} {data.unit} that there are to train on at --length "
            f"{recipe.length}: a smaller one of the two fits"
        )
    print(f"{'data' if data.example else 'text':8} {printable(str(recipe.text))}: {data.summary}", flush=True)


# --- the training -------------------------------------------------------------------------------------------------


def _print_costs(
    recipe: Settled,
    costs: Costs,
    machine: Memory | None,
    data: Data,
    threads: int,
    stopped: Stopped | None,
    anyway: bool,
) -> None:
    """Print what memory and time the training is going to take; refuse one that needs more memory than is free."""
    from ..language.finetuning.costs import fit
    from ..language.finetuning.losstable import duration, rows_to_come
    from ..language.finetuning.session import part_size
    from ..language.trainingmemory import megabytes

    rows = part_size(recipe)
    parts = min(threads, math.ceil(recipe.batch_size / rows))  # at once
    most = parts * rows
    what = f"for the backward of {parts} x {rows} {data.unit} at a time"
    print(f"memory   {megabytes(costs.activations(most))} of activations {what}")
    line, hint = _beside_the_machine(costs, fit(costs, machine, rows, parts), most, parts)
    print(f"         {line}")
    done, known = (stopped.saved.epoch, stopped.before is not None) if stopped else (0, False)
    steps, filled = recipe.steps - done, data.row_tokens / data.X.shape[1]  # the rest of a row is not computed
    seconds = steps * filled * costs.step(recipe.batch_size)
    seconds += (rows_to_come(recipe.steps, done) + (not known)) * costs.measuring(data.held_windows)
    print(f"time     {steps} steps of {recipe.batch_size} {data.unit}, very roughly {duration(seconds)}\n", flush=True)
    if data.example:
        print(f"{data.example}\n", flush=True)
    if hint and not anyway:
        raise ValueError(f"{hint}; --anyway begins all the same")
    if hint:
        say(hint)


def _beside_the_machine(costs: Costs, fit: Fit, windows: int, workers: int) -> tuple[str, str]:
    """Return the line that holds the memory against the machine's; and where it does not fit, what would.

    Raises
    ------
    ValueError
        If the machine has less in all: the system would end the process in the first step.
    """
    from ..language.trainingmemory import in_megabytes, megabytes

    line = (
        f"with weights {in_megabytes(costs.weights)}, Adam and gradients {in_megabytes(costs.state)}, "
        f"logits {in_megabytes(costs.all_logits(windows))}: {megabytes(fit.needed)} together"
    )
    if fit.machine is None:
        return line, ""
    line += f"; {in_megabytes(fit.machine.free)} of {megabytes(fit.machine.whole)} are free"
    if fit.fits:
        return line, ""
    hint = (
        f"--micro-batch {fit.micro_batch} fits, and takes the same steps"
        if fit.micro_batch
        else f"not even --micro-batch 1 fits; {'--workers 1' if workers > 1 else 'a smaller --length'} needs less"
    )
    if fit.needed > fit.machine.whole:
        raise ValueError(
            f"the training needs {megabytes(fit.needed)} and the machine has {megabytes(fit.machine.whole)}: {hint}"
        )
    return (
        line,
        f"the training needs {megabytes(fit.needed)} of the {megabytes(fit.machine.free)} that are free: {hint}",
    )


def _diverged(recipe: Settled, step: int) -> str:
    """Say that a training broke down, what may help, and what is left of it."""
    rest = ""
    if recipe.checkpoint is not None:
        rest = f"; {printable(str(recipe.checkpoint))} keeps step {step - 1}, and another --lr needs another file"
    return (
        f"step {step} left numbers that are not finite: --lr {recipe.lr:g} is too large for this training. No adapter "
        f"is written{rest}"
    )


def _best(recipe: Settled, table: Table) -> str:
    """Return a sentence about the lowest held-out loss, where it is not the last one's; or "".

    A training that is kept in a checkpoint does not go back: to end earlier, another begins.
    """
    if table.best_step is not None:
        loss = next(row[2] for row in table.rows if row[0] == table.best_step)
        before = f"; before the training it was {table.rows[0][2]:.3f}" if table.rows[0][2] <= loss else ""
        return (
            f"the adapter is that of step {table.best_step}, the one with the least held-out loss: {loss:.3f}{before}"
        )
    lowest = table.lowest()
    if lowest is None:
        return ""
    step, loss = lowest
    others = [f"--steps {step}" + (" in place of --epochs" if recipe.epochs is not None else "")]
    others += ["another --checkpoint"] if recipe.checkpoint is not None else []
    others += [] if recipe.overwrite else ["--overwrite"]  # the adapter of this one lies there now
    return f"the held-out loss was lowest at step {step}: {loss:.3f}" + (
        f"; the same command with {' and '.join(others)} ends there" if step else ", before the training"
    )
