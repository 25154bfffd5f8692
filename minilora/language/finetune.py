"""A fine-tuning run, from the model's files to the adapter's: open, load, adapt, fit to the machine, train, save."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..adaptation import ALL_LINEAR, adapt, adapters, check_target_modules, ends_of
from ..backend import Backend
from ..checks import MAX_ALPHA, MIN_ALPHA, Array, check_integer, check_number
from ..fast.accumulation import accumulate
from ..fast.threads import core_count
from ..fast.widths import by_width
from ..files import disk
from ..files.adapters import check_adapter_target, check_no_adapter, check_own_adapter, save_adapter
from ..files.checkpoint import CheckpointError
from ..files.patterns import are_named, within_time
from ..files.peft import CONFIG_NAME, WEIGHTS_NAME
from ..layer import parameter_count, walk
from ..layers.stacked import StackedLinear
from ..losses import IGNORE_INDEX, Loss
from ..optim import gradient_norm
from ..schedule import Schedule
from ..state import TrainingState
from ..texts import named, printable
from ..training import Passes, TrainingDiverged, train
from ..variants.dropout import check_dropped, with_dropout
from .data import EXAMPLES, BadLine, Data, by_reason, load_data
from .files.save import found_by_weight
from .llama import Llama, checkpointed
from .losstable import LOG_PATTERN, LossTable, shown_parts
from .memory import (
    EXPERT_ARRAYS,
    Memory,
    StepMemory,
    active_numbers,
    machine_memory,
    measured_memory,
    megabytes,
    parameter_bytes,
)
from .recipe import EVAL_SHARE, Recipe, ResolvedRecipe, option_name
from .resume import (
    Notes,
    StoppedRun,
    TuningCheckpoint,
    deferred_interrupts,
    digest_of_adapter,
    exclusive_lock,
    identity_of,
    read_stopped_run,
)
from .source import AdapterSource, ModelSource
from .text import HELD_OUT, check_vocabulary, evaluate_where_it_counts, gradients_at_targets, next_token_loss

SKIPPED_PATTERN = rb'\{"file": ".*?", "line": \d+, "reason": "'
"""A pattern for the start of a file of skipped lines."""
USABLE_SHARE = 0.9
"""The share of free memory that a run may plan to use; the rest is for temporary arrays."""


def finetune(recipe: Recipe, backend: Backend) -> LossTable:
    """Fine-tune a model, print the progress, and return the losses."""
    start, machine = time.perf_counter(), machine_memory(backend)  # before the model is loaded
    check_recipe(recipe)
    with exclusive_lock(recipe.checkpoint_path), exclusive_lock(recipe.save):
        source = ModelSource(recipe.model)
        recipe, stopped, start_from = open_inputs(recipe, source, backend)
        data, model, parameters = load_inputs(recipe, source, backend)
        resolved, rng = recipe.resolved(parameters), np.random.default_rng(recipe.seed)
        adapted = adapted_model(resolved, model, start_from, rng, backend)
        resolved, data = fit_to_machine(resolved, adapted, data, stopped, machine, backend)
        checkpoint = checkpoint_of(resolved, source, parameters, data, stopped, backend)
        table, trained = train_adapter(resolved, adapted, data, checkpoint, rng, backend)
        save(resolved, trained, system_to_keep(recipe, data), checkpoint)
    print(f"\nadapter written to {printable(str(resolved.save))} after {time.perf_counter() - start:.0f} s")
    if best := best_step(resolved, table):
        print(best)
    return table


# --- open: everything that can be refused before loading --------------------------------------------------------------


def open_inputs(
    recipe: Recipe, source: ModelSource, backend: Backend
) -> tuple[Recipe, StoppedRun | None, AdapterSource | None]:
    """Return the recipe with a checkpoint's settings filled in, the checkpoint, and the adapter to continue from."""
    recipe = replace(recipe, workers=recipe.workers or default_workers(backend))
    stopped = run_to_resume(recipe, source, backend)
    check_existing_outputs(recipe, stopped)
    if stopped is not None:
        recipe = recipe.resolved(stopped.notes["numbers"])
        place = stopped.place(None if recipe.epochs else recipe.steps)
        print(f"resume   from {place} ({printable(str(stopped.path))})")
    start_from = AdapterSource.open(recipe.adapter, recipe.dtype, backend) if recipe.adapter else None
    return recipe, stopped, start_from


def run_to_resume(recipe: Recipe, source: ModelSource, backend: Backend) -> StoppedRun | None:
    """Return the run to resume, if there is one; a run with other options is replaced only with --overwrite."""
    try:
        if (stopped := read_stopped_run(recipe.checkpoint_path)) is None:
            return None
        resolved = recipe.resolved(stopped.notes["numbers"])
        asked = identity_of(resolved, source.path, backend)
        stopped.check_same(stopped.notes["asked"], asked, None if recipe.epochs else resolved.steps)
    except CheckpointError as error:
        hint = "start afresh with --overwrite" if recipe.checkpoint is None else "delete this one to start afresh"
        if recipe.checkpoint is not None or not recipe.overwrite:
            raise CheckpointError(f"{error}, or {hint}") from None
        disk.check_written_here("the checkpoint", recipe.checkpoint_path, disk.TENSORS_PATTERN)
        return None
    return stopped


def check_existing_outputs(recipe: Recipe, stopped: StoppedRun | None) -> None:
    """Require --overwrite to replace anything but the adapter, log and figure of the same run; others never are."""
    saved, own = (stopped.notes["saved"], stopped.notes["wrote"]) if stopped else ([], [])
    check_no_adapter(recipe.save, recipe.overwrite or digest_of_adapter(recipe.save) in saved)
    check_own_adapter(recipe.save)
    for what, path, pattern in (("log", recipe.log, LOG_PATTERN), ("plot file", recipe.plot, disk.FIGURE_PATTERN)):
        disk.check_new_file(what, path, recipe.overwrite or (path is not None and str(real(path)) in own), pattern)


def default_workers(backend: Backend) -> int:
    """Return how many parts of a batch to process in parallel: two with at least two cores, one on a GPU."""
    return min(2, core_count()) if backend.name == "numpy" else 1


def check_recipe(recipe: Recipe) -> None:
    """Require parameters in range and writable paths, before anything is read."""
    for option in fields(recipe):
        name, value, bounds = option_name(option.name), getattr(recipe, option.name), option.metadata["bounds"]
        if bounds and value is not None:
            (check_integer if "at_least" in bounds else check_number)(name, value, **bounds)
    if recipe.alpha is not None:
        check_number("--alpha", recipe.alpha, above=MIN_ALPHA, below=MAX_ALPHA)
    if recipe.steps is not None and recipe.epochs is not None:
        raise ValueError("--steps and --epochs both set the length of the training, expected only one of them")
    if isinstance(recipe.valid, float) and not 0 < recipe.valid <= 0.5:
        raise ValueError(f"valid must be a share above 0 and at most 0.5, or a file, got {recipe.valid}")
    if isinstance(recipe.valid, Path):
        disk.refuse_inputs("valid", recipe.valid, [(recipe.text, "the text to train on")])
    if recipe.adapter is not None:
        brought = ("rank", "alpha", "target_modules", "target_parameters", "use_rslora", "use_dora")
        names = [option_name(name) for name in brought if getattr(recipe, name) not in (None, False)]
        names += ["--init"] if recipe.init != "lora" else []
        if names:
            raise ValueError(f"leave out {' and '.join(names)}, which --adapter determines")
    if recipe.steps is not None:
        schedule_of(recipe, recipe.steps)
    check_consistent(recipe)
    check_output_paths(recipe)


def check_consistent(recipe: Recipe) -> None:
    """Require consistent options before a model is read, which may take minutes."""
    parameters, dora, dropout = recipe.target_parameters, recipe.use_dora, recipe.dropout
    of_lines = any(str(file).lower().endswith(EXAMPLES) for file in (recipe.text, recipe.valid))
    for wrong, message in (
        (parameters and dora, "--target-parameters cannot be combined with --use-dora, as in PEFT"),
        (parameters and recipe.init != "lora", "--target-parameters cannot be combined with --init pissa, as in PEFT"),
        (dropout and dora, "--dropout cannot be combined with --use-dora: DoRA has no dropout here"),
        (dropout and parameters, "--dropout cannot be combined with --target-parameters, as in PEFT"),
        (recipe.skip_bad and not of_lines, "--skip-bad skips lines of a .jsonl file, but no such file is read"),
    ):
        if wrong:
            raise ValueError(message)


def check_output_paths(recipe: Recipe) -> None:
    """Require that adapter, checkpoint and log can be written without replacing an input or each other."""
    save, read = real(recipe.save), inputs(recipe)
    adapter = [
        (path, "a path of the adapter") for path in (save, *save.parents, save / WEIGHTS_NAME, save / CONFIG_NAME)
    ]
    to_write = further_outputs(recipe)
    check_adapter_target(recipe.save)
    if recipe.model is not None:
        disk.refuse_inputs("save", recipe.save, [(recipe.model, "the model's folder")])
    disk.refuse_inputs("the checkpoint", recipe.checkpoint_path, adapter)
    disk.check_writable(recipe.checkpoint_path.parent)
    disk.check_replaceable(recipe.checkpoint_path)
    taken = [*read, *adapter]
    for path, what in to_write:
        disk.check_file(what, path, taken)
        taken.append((path, what))


def further_outputs(recipe: Recipe) -> list[tuple[Path, str]]:
    """Return the files written before and during the training, each with its name in messages."""
    files = ((recipe.log, "the log"), (recipe.skip_bad, "the file of skipped lines"))
    return [(path, what) for path, what in files if path is not None]


def inputs(recipe: Recipe) -> list[tuple[Path, str]]:
    """Return the files that the run reads, and its checkpoint, each with its name in messages."""
    named = {
        "the text": recipe.text,
        "the text to measure the loss on": recipe.valid,
        "the checkpoint": recipe.checkpoint_path,
        "the model": recipe.model,
    }
    files = [(path, what) for what, path in named.items() if isinstance(path, Path)]
    for folder, what in ((recipe.model, "a file of the model"), (recipe.adapter, "a file of the adapter")):
        files += [(path, what) for path in folder.rglob("*")] if folder is not None else []
    return files


def real(path: Path) -> Path:
    """Resolve a path, even in a cycle of links, where `Path.resolve` fails before Python 3.13."""
    return Path(os.path.realpath(path))


# --- load: the data and the model -------------------------------------------------------------------------------------


def load_inputs(recipe: Recipe, source: ModelSource, backend: Backend) -> tuple[Data, Llama, int]:
    """Return the data, the model, and its parameter count; bad data are refused before the model is loaded."""
    print(f"model    {source.name}", end="", flush=True)  # before loading, which takes a while
    try:
        share = 1 / HELD_OUT if recipe.valid is None else recipe.valid
        skipped: list[BadLine] | None = None if recipe.skip_bad is None else []
        data = load_data(
            recipe.text, source, recipe.length, held_out=share, measured=recipe.eval_rows,
            system=recipe.system, skipped=skipped,
        )  # fmt: skip
        if recipe.system and not data.chats:
            raise ValueError(f"--system applies to chats, but {printable(str(recipe.text))} has none")
        if recipe.skip_bad is not None and skipped:
            write_skipped(recipe.skip_bad, skipped, recipe.overwrite)
        check_batch_size(recipe, data)
        model = source.load(recipe.dtype, backend, recipe.quantize)
        check_vocabulary(data.largest_id, model.lm_head.out_features)
    except BaseException:
        print(flush=True)
        raise
    parameters = parameter_count(model)
    active = f" ({active_numbers(model.config):,} of them active per token)" if model.config.mixture else ""
    print(f": {parameters:,} parameters{active} in {recipe.dtype}, {backend.device}", flush=True)
    if recipe.skip_bad is not None and skipped:
        print_skipped(recipe.skip_bad, skipped)
    if recipe.quantize:
        whole, coded = megabytes(parameters * np.dtype(recipe.dtype).itemsize), megabytes(parameter_bytes(model))
        print(f"weights  {coded} MB with quantised linear layers, {whole} MB without")
    return data, model, parameters


def check_batch_size(recipe: Recipe, data: Data) -> None:
    """Require a batch size that is at most the number of training rows; by default it depends only on the model."""
    if recipe.batch_size is not None and recipe.batch_size > len(data.X):
        shorter = f", and a --length below {data.length} makes more" if data.unit == "windows" else ""
        raise ValueError(
            f"a batch of {recipe.batch_size} is larger than the {len(data.X)} {data.unit} to train on: --batch-size "
            f"{len(data.X)} fits{shorter}"
        )


def write_skipped(path: Path, skipped: Sequence[BadLine], overwrite: bool) -> None:
    """Write unusable lines with their reasons to a .jsonl file; replacing a file of others needs `overwrite`."""
    # The key is not "text", so that this file is not mistaken for one of examples.
    records = ({"file": bad.file, "line": bad.number, "reason": bad.reason, "content": bad.text} for bad in skipped)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if not (path.exists() and path.read_bytes() == lines):
        disk.check_new_file("file of skipped lines", path, overwrite, SKIPPED_PATTERN)
    with disk.written_whole(path) as file:
        file.write(lines)


def print_skipped(path: Path, skipped: Sequence[BadLine]) -> None:
    """Report how many lines are skipped, and why."""
    print(f"skipped  {len(skipped):,} unusable lines, now in {printable(str(path))}")
    for reason in by_reason(skipped):
        print(f"         {reason}")


# --- adapt ------------------------------------------------------------------------------------------------------------


def adapted_model(
    recipe: ResolvedRecipe, model: Llama, start_from: AdapterSource | None, rng: np.random.Generator, backend: Backend
) -> Llama:
    """Return the model with the adapter to continue, or else with new adapters."""
    if start_from is not None:
        return start_from.attached(model, backend, recipe.quantize)
    if isinstance(recipe.target_modules, str) and recipe.target_modules != ALL_LINEAR:
        check_target_modules(recipe.target_modules)
        with named("target_modules"), within_time():  # a regular expression can run for years
            are_named(recipe.target_modules, [path for path, _ in walk(model)])
    new: dict[str, Any] = {name: getattr(recipe, name) for name in ("target_modules", "rank", "alpha")}
    adapted: Llama = adapt(
        model, **new, rng=rng, target_parameters=recipe.target_parameters, use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora, init=recipe.init,
    )  # fmt: skip
    if (by_weight := found_by_weight(adapted)) and (recipe.use_dora or recipe.dropout):
        raise ValueError(
            "--use-dora and --dropout do not work for the dense layers of a Qwen3-MoE, such as "
            f"{by_weight[0].removesuffix('.weight')}: PEFT loads their adapters without either"
        )
    return adapted


# --- fit: the memory of a step and of the machine -------------------------------------------------------------------


def fit_to_machine(
    recipe: ResolvedRecipe, adapted: Llama, data: Data, stopped: StoppedRun | None, machine: Memory | None,
    backend: Backend,
) -> tuple[ResolvedRecipe, Data]:  # fmt: skip
    """Print and return the final recipe and data; require that the training fits into memory."""
    of_layers, masked, X = adapters(adapted), adapted, backend.asarray(data.X)
    if recipe.dropout:
        check_dropped(of_layers)
        masked = with_dropout(adapted, recipe.dropout, [0])
    recomputing = checkpointed(masked)
    lean = measured_memory(recomputing, X, backend)
    needs = lean if recipe.recompute else measured_memory(masked, X, backend)
    if stopped is not None:
        data = data.of_length(stopped.notes["length"])  # the length of the first run, whatever memory is free now
    elif recipe.length is None and machine is not None:
        data = cut_to_fit(data, needs, min(recipe.workers, recipe.batch_size), USABLE_SHARE * machine.free)
    recipe = recipe.for_rows(len(data.X))
    if stopped is not None:
        stopped.check_same({}, {}, recipe.steps)  # --epochs becomes a number of steps only now
    schedule_of(recipe, recipe.steps)  # refuses a warmup over all steps
    longest = max(data.X.shape[1], data.X_held.shape[1])
    warn_beyond_context(adapted, longest, "an example has" if data.example else "a window has")
    check_batch_size(recipe, data)  # memory may have allowed fewer
    print(f"{'data' if data.example else 'text':8} {printable(str(recipe.text))}: {data.summary}")
    for note in data.notes:
        print(f"         {note}")
    if message := system_to_keep(recipe, data):
        own = "; chats with their own keep it" if message != data.system else ""
        print(f"system   {printable(message, 80)}\n         is saved with the adapter for generate and evaluate{own}")
    ranks = "-".join(map(str, sorted({adapter.rank for adapter in of_layers.values()})))
    trained = parameter_count(adapted, trained=True)
    print(f"adapter  rank {ranks} in {len(of_layers)} layers: {trained:,} parameters")
    if left_out := experts_left_out(adapted):
        print(f"         {left_out}")
    parts = min(recipe.workers, math.ceil(recipe.batch_size / recipe.part_rows))  # in parallel
    sizes = data.X.shape[1], recipe.workers, data.X_held.shape
    memory = needs(*sizes)
    print_memory(memory, parts, recipe.part_rows, data.unit, machine)
    for line in plan(recipe, data, stopped.saved.epoch if stopped else None):
        print(line)
    print()
    if data.example:
        print(f"{data.example}\n")
    if machine is not None and memory.together(parts * recipe.part_rows) > USABLE_SHARE * machine.free:
        hint = what_fits(memory, None if recipe.recompute else lean(*sizes), parts, recipe.part_rows, machine)
        if not recipe.anyway:
            raise ValueError(f"{hint}; --anyway starts regardless")
        warnings.warn(hint, stacklevel=3)
    return recipe, data


def system_to_keep(recipe: Recipe, data: Data) -> str | None:
    """Return the system message to save with the adapter: the requested one, or the one that all chats share."""
    return (data.system if recipe.system is None else recipe.system) or None


def plan(recipe: ResolvedRecipe, data: Data, done: int | None) -> list[str]:
    """Describe the number of steps, and when and on how many rows the held-out loss is measured."""
    left, passes = recipe.steps - (done or 0), recipe.steps / math.ceil(len(data.X) / recipe.batch_size)
    lines = [f"time     {left} steps of {recipe.batch_size} {data.unit}{f', {recipe.steps} in all' if done else ''}: "]
    lines[0] += f"{passes:.3g} {'pass' if passes == 1 else 'passes'} over all {len(data.X):,}"
    measured = len(data.X_held)
    every = recipe.eval_interval(measured)
    times = math.ceil(recipe.steps / every) - (done or 0) // every + (done is None)
    effort = recipe.eval_cost(measured)
    share = times * effort / (times * effort + left) if left else 0.0
    which = f"all {measured:,}" if measured == data.held else f"{measured:,} of {data.held:,}"
    when = f", every {every} steps" if every < recipe.steps else ""
    text = f"measure  {which} held-out {data.unit}: before the first step{when} and after the last"
    if left:
        text += f", about {share:.0%} of the time"
    if share > 2 * EVAL_SHARE and (fewer := int(measured * EVAL_SHARE / (1 - EVAL_SHARE) * left / (times * effort))):
        text += f"; --eval-rows {fewer} takes {EVAL_SHARE:.0%}"
    return [*lines, text]


def experts_left_out(adapted: Llama) -> str:
    """Report the experts' share of a mixture's weights if none of them is adapted; else return ""."""
    stacks: list[Any] = [
        layer for path, layer in walk(adapted) if path.endswith(tuple(f".{name}" for name in EXPERT_ARRAYS))
    ]
    if not stacks or not all(isinstance(layer, StackedLinear) for layer in stacks):
        return ""
    of_the_model = parameter_count(adapted) - parameter_count(adapted, trained=True)
    share = sum(layer.weight.size for layer in stacks) / of_the_model
    names = ",".join(f"mlp.{name}" for name in EXPERT_ARRAYS)
    return f"the experts, {share:.0%} of the weights, are not adapted: --target-parameters {names} adapts them"


def cut_to_fit(data: Data, needs: Callable[[int, int, tuple[int, int]], StepMemory], parts: int, free: float) -> Data:
    """Truncate examples to the largest length that fits into memory; windows of a text stay unchanged."""
    held, lengths = len(data.X_held), range(1, data.length + 1)
    length = bisect_right(lengths, free, key=lambda n: needs(n, parts, (held, n)).together(parts))
    return data.of_length(length) if length > 1 else data


def warn_beyond_context(model: Llama, tokens: int, what: str) -> None:
    """Warn if a row has more tokens than the model's context; the model still computes it."""
    context = model.config.max_position_embeddings
    if context is not None and tokens > context:
        message = f"{what} {tokens:,} tokens, but the model's context is {context:,}: its output beyond may be nonsense"
        warnings.warn(message, stacklevel=2)


def print_memory(memory: StepMemory, parts: int, rows: int, unit: str, machine: Memory | None) -> None:
    """Print how much memory the training needs, and how much the machine has."""
    at_once = parts * rows
    activations, logits = megabytes(memory.activations(at_once)), megabytes(memory.all_logits(at_once))
    there = f"; {megabytes(machine.free)} of {megabytes(machine.whole)} MB are free" if machine else ""
    print(
        f"memory   {activations} MB of activations for the backward of {parts} x {rows} {unit} at a time\n"
        f"         with weights {megabytes(memory.weights)}, Adam and gradients {megabytes(memory.state)}, logits "
        f"{logits}: {megabytes(memory.together(at_once))} MB together{there}"
    )


def what_fits(memory: StepMemory, lean: StepMemory | None, parts: int, rows: int, machine: Memory) -> str:
    """Suggest options for a training that does not fit; `lean` is its memory with --recompute."""
    needed, free, fit = memory.together(parts * rows), USABLE_SHARE * machine.free, []
    if fitting := memory.rows_that_fit(free, rows - 1, parts):
        fit.append(f"--micro-batch {fitting}")
    if lean and (more := lean.rows_that_fit(free, rows, parts)) > fitting:
        fit.append("--recompute" if more == rows else f"--recompute --micro-batch {more}")
    hint = f"{' or '.join(fit)} fits, and takes the same steps"
    if not fit:
        smaller = "--workers 1" if parts > 1 else "a smaller --length"
        hint = f"not even {'--recompute ' if lean else ''}--micro-batch 1 fits; {smaller} needs less"
    if needed > machine.whole:  # the system would kill the process in the first step
        raise ValueError(
            f"the training needs {megabytes(needed)} MB and the machine has {megabytes(machine.whole)} MB: {hint}"
        )
    return f"the training needs {megabytes(needed)} MB of the {megabytes(machine.free)} MB that are free: {hint}"


# --- train ------------------------------------------------------------------------------------------------------------


def checkpoint_of(
    recipe: ResolvedRecipe, source: ModelSource, parameters: int, data: Data, stopped: StoppedRun | None,
    backend: Backend,
) -> TuningCheckpoint:  # fmt: skip
    """Return the checkpoint of the run; a resumed run keeps its notes."""
    notes = stopped.notes if stopped else Notes(
        asked=identity_of(recipe, source.path, backend), numbers=parameters, length=data.length, before=math.nan,
        losses={}, saved=[], wrote=[],
    )  # fmt: skip
    notes["wrote"] = sorted({*notes["wrote"], *(str(real(path)) for path in (recipe.log, recipe.plot) if path)})
    return TuningCheckpoint(recipe.checkpoint_path, notes, stopped, each=recipe.checkpoint is not None)


def train_adapter(
    recipe: ResolvedRecipe, adapted: Llama, data: Data, checkpoint: TuningCheckpoint, rng: np.random.Generator,
    backend: Backend,
) -> tuple[LossTable, Llama]:  # fmt: skip
    """Train, printing a row whenever the loss is measured. Return the rows, and the model whose adapter to save."""
    X, Y, X_held, Y_held = (backend.asarray(array) for array in (data.X, data.Y, data.X_held, data.Y_held))
    stopped, notes = checkpoint.stopped, checkpoint.notes
    every = recipe.eval_interval(len(X_held))
    table = LossTable(
        recipe.steps, stopped.saved.epoch if stopped else 0, data.row_tokens, notes["losses"], recipe.log,
        log_every=recipe.log_every, eval_every=every,
    )  # fmt: skip
    step, start = Step(recipe, rng, table), time.perf_counter()
    table.print_head()
    if stopped is None:
        notes["before"] = step.evaluate(adapted, X_held, Y_held, next_token_loss)
        recipe.checkpoint_path.unlink(missing_ok=True)  # left by another run, and --overwrite is given
    table.print_known_rows(notes["before"], time.perf_counter() - start, stopped.saved if stopped else None)

    def report(state: TrainingState) -> None:
        table.on_step(state)
        if interrupted:
            checkpoint.keep(state, due=True)
            raise KeyboardInterrupt

    try:
        with deferred_interrupts(table.show) as interrupted:
            history = train(
                adapted, X, Y, max_steps=recipe.steps, batches=Passes(len(X), recipe.batch_size, recipe.seed),
                lr=recipe.lr, rng=rng, log_every=every, progress=True, checkpoint=checkpoint, loss=next_token_loss,
                gradients=step, held_out=(X_held, Y_held), report=report, weight_decay=recipe.weight_decay,
                schedule=schedule_of(recipe, recipe.steps), max_grad_norm=recipe.max_grad_norm,
            )  # fmt: skip
    except TrainingDiverged as error:
        if recipe.checkpoint is None:  # it would only diverge again
            recipe.checkpoint_path.unlink(missing_ok=True)
        raise TrainingDiverged(diverged(recipe, error.step), error.epoch, error.step) from error
    table.print_last_row(history)
    if recipe.keep_best:
        adapted, table.best_step = checkpoint.best_of(adapted, history)
    return table, adapted


class Step:
    """The gradients of a step and the held-out loss, for ``train(..., gradients=Step(...))``."""

    def __init__(self, recipe: ResolvedRecipe, rng: np.random.Generator, table: LossTable) -> None:
        self.dropout, self.recompute, self.rng, self.table = recipe.dropout, recipe.recompute, rng, table
        self.parts = accumulate(recipe.part_rows, recipe.workers, gradients_at_targets, by_width)
        self.evaluate = partial(evaluate_where_it_counts, workers=recipe.workers, shown=shown_parts)

    def __call__(self, model: Llama, x: Array, y: Array, loss: Loss) -> dict[str, Array]:
        """Return the gradients, computed part by part with new dropout masks; record the losses."""
        start, losses = time.perf_counter(), []
        if self.dropout:
            keys = self.rng.integers(1 << 64, size=len(x), dtype=np.uint64).tolist()
            model = with_dropout(model, self.dropout, keys)
        if self.recompute:
            model = checkpointed(model)

        def recording(logits: Array, targets: Array) -> tuple[Array, Array]:
            value, d_logits = loss(logits, targets)
            losses.append((value, (targets != IGNORE_INDEX).sum()))
            return value, d_logits

        grads = self.parts(model, x, y, recording)
        self.table.note(start, losses, gradient_norm(grads), len(x))
        return grads


def schedule_of(recipe: Recipe, steps: int) -> Schedule | None:
    """Return the learning-rate schedule, with warmup, over `steps` steps; None if the rate is constant."""
    warmup, decay = recipe.warmup, recipe.schedule
    if decay == "constant" and not warmup:
        return None
    schedule = Schedule(decay, steps, math.ceil(warmup * steps) if warmup < 1 else int(warmup))
    # After the warmup a constant rate does not depend on the number of steps, so a resumed run may have more of them.
    return replace(schedule, steps=schedule.warmup + 1) if decay == "constant" else schedule


def diverged(recipe: ResolvedRecipe, step: int) -> str:
    """Explain at which step the training diverged, and what is saved of it."""
    rest = ""
    if recipe.checkpoint is not None:
        rest = f"; {printable(str(recipe.checkpoint))} has step {step - 1}, and another --lr needs another file"
    return (
        f"step {step} produced NaN or infinity: --lr {recipe.lr:g} is too large for this training. No adapter is "
        f"written{rest}"
    )


# --- save -------------------------------------------------------------------------------------------------------------


def save(recipe: ResolvedRecipe, adapted: Llama, system: str | None, checkpoint: TuningCheckpoint) -> None:
    """Write the adapter with the names that PEFT and llama.cpp need, and the chats' system message."""
    by_weight = found_by_weight(adapted)
    ends = [name for name in ends_of(adapted) if f"{name}.weight" not in by_weight]
    with deferred_interrupts(lambda message: None):  # the adapter is written in a moment
        save_adapter(
            recipe.save, adapters(adapted), base_model=None if recipe.model is None else str(recipe.model),
            task_type="CAUSAL_LM", target_modules=ends, target_parameters=by_weight, lora_dropout=recipe.dropout,
            system=system, overwrite=True,
            before=checkpoint.finish,  # the process may be killed as soon as the adapter is written
        )  # fmt: skip
    if recipe.checkpoint is None:
        recipe.checkpoint_path.unlink(missing_ok=True)


def best_step(recipe: ResolvedRecipe, table: LossTable) -> str:
    """Report the lowest held-out loss if the last one is higher; else return ""."""
    if table.best_step is not None:
        loss = next(row[2] for row in table.rows if row[0] == table.best_step)
        before = f"; before training it was {table.rows[0][2]:.3f}" if table.rows[0][2] <= loss else ""
        return f"the adapter is from step {table.best_step}, with the lowest held-out loss: {loss:.3f}{before}"
    measured = [(step, loss) for step, _, loss in table.rows if loss == loss]
    step, loss = min(measured, key=lambda row: round(row[1], 3))
    if round(loss, 3) == round(measured[-1][1], 3):
        return ""
    others = [f"--steps {step}" + (" instead of --epochs" if recipe.epochs is not None else "")]
    others += ["another --checkpoint"] if recipe.checkpoint is not None else []
    others += [] if recipe.overwrite else ["--overwrite"]  # this step's adapter is there now
    ends = f"; the same command with {' and '.join(others)} ends there" if step else ", before training"
    return f"the held-out loss was lowest at step {step}: {loss:.3f}{ends}"
