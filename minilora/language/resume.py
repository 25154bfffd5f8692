"""The checkpoint of a fine-tuning run: its options, its state, its best step.

Besides the state that `train` saves and compares, a checkpoint of ``minilora finetune`` records the options. So a
different text or rank is refused before a model is loaded, in the terms of the command line.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from ..backend import Backend
from ..extras import needed
from ..files.checkpoint import Checkpoint, CheckpointError, Saved, check_no_differences, describe, read_checkpoint
from ..files.disk import RegularFile
from ..files.peft import CONFIG_NAME, WEIGHTS_NAME
from ..files.tensors import MODEL_CONFIG, open_weights
from ..layer import rebuild
from ..state import History, TrainingState
from ..texts import printable
from .llama import Llama
from .losstable import Losses
from .recipe import Recipe, option_name
from .text import HELD_OUT

HASHED_BYTES = 1 << 20
"""The number of bytes at a model file's start and end that are hashed; all weights are compared after loading."""
CHECKPOINT_SHARE = 0.02
"""The largest share of the time that writing implicit checkpoints may take."""
DIGESTED = {
    "TEXT": "the text", "--model": "the model", "--adapter": "the adapter to continue", "--valid": "the held-out text",
}  # fmt: skip
"""The entries that are recorded as a digest, with their names in messages."""
DATA, MODEL = "the tokenised text", "the model"
ARRAY_OWNERS = {"X": DATA, "Y": DATA, "held_out": DATA, "model": MODEL, "params": MODEL, "frozen": MODEL}
"""What a difference in an array is attributed to, by the first word of the array's name in the configuration."""


class Notes(TypedDict):
    """The notes in a checkpoint of ``minilora finetune``."""

    asked: dict[str, Any]  # the options that must match, from `identity_of`
    numbers: int  # the model's parameter count
    length: int  # the row length: by default the longest row's, or the longest that memory allowed
    before: float  # the held-out loss before the first step
    losses: Losses
    saved: list[str]  # the digests of the adapters that this run wrote or was about to write
    wrote: list[str]  # the paths of its logs and figures


@dataclass(frozen=True)
class StoppedRun:
    """A fine-tuning run, as read from its checkpoint."""

    path: Path
    saved: Saved
    notes: Notes

    def place(self, steps: int | None) -> str:
        """Describe the progress."""
        return f"step {self.saved.epoch}" + ("" if steps is None else f" of {steps}")

    def check_same(self, there: Mapping[str, Any], here: Mapping[str, Any], steps: int | None = None) -> None:
        """Require equal options and arrays, and at least the number of steps that are done."""
        names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        differences = [_difference(name, there.get(name), here.get(name)) for name in names]
        if steps is not None and steps < self.saved.epoch:
            differences.append(f"--steps is {steps} here, but {self.saved.epoch} are done there")
        check_no_differences(self.path, [*dict.fromkeys(differences)])


def _difference(name: str, there: Any, here: Any) -> str:
    """Describe a difference, with both values unless they are files or arrays."""
    array = name.partition("[")[0]
    if (name in DIGESTED and str in (type(there), type(here))) or array in ARRAY_OWNERS:
        return f"{DIGESTED.get(name) or ARRAY_OWNERS[array]} differs"
    return f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else printable(str(value), 100)


def read_stopped_run(path: Path) -> StoppedRun | None:
    """Read a run's checkpoint; return None if there is none yet."""
    if (saved := read_checkpoint(path)) is None:
        return None
    try:
        return StoppedRun(path, saved, msgspec.convert(saved.notes, Notes))
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{str(path)!r} is not a checkpoint of minilora finetune, or is from another version of it. "
            "Choose another checkpoint"
        ) from error


def identity_of(recipe: Recipe, model: Path, backend: Backend) -> dict[str, Any]:
    """Return the options that must match to resume a run, by their names on the command line."""
    targets, parameters = recipe.target_modules, recipe.target_parameters
    by_steps = recipe.schedule != "constant" or 0 < recipe.warmup < 1  # then more steps change the rates
    adapter = recipe.adapter
    weights = [model / MODEL_CONFIG, *(file.path for file in open_weights(model).files)] if model.is_dir() else [model]
    share = None if recipe.valid == 1 / HELD_OUT else recipe.valid
    return {
        "TEXT": file_digest(recipe.text),
        "--model": file_digest(*weights, ends=HASHED_BYTES),
        "--adapter": digest_of_adapter(adapter) if adapter is not None else None,
        "--target-modules": ",".join(sorted(targets)) if isinstance(targets, list) else targets,
        "--target-parameters": ",".join(sorted(parameters)) if parameters else None,
        "--valid": file_digest(share) if isinstance(share, Path) else share,
        "--backend": backend.name,
        "--steps, on which the rates depend,": recipe.steps if by_steps and recipe.epochs is None else None,
        "--epochs, on which the rates depend,": recipe.epochs if by_steps else None,
        **{option_name(f.name): getattr(recipe, f.name) for f in fields(Recipe) if f.metadata["same"]},
    }


def file_digest(*paths: Path, ends: int | None = None) -> str:
    """Return a hash of files' contents, or of their sizes and first and last `ends` bytes; paths do not matter."""
    sha = hashlib.sha256()
    for path in paths:
        with RegularFile(path) as file:
            size = os.fstat(file.fileno()).st_size
            sha.update(f"{size} ".encode() + file.read(ends or -1))
            if ends is not None:
                file.seek(max(0, size - ends))
                sha.update(file.read(ends))
    return sha.hexdigest()


def digest_of_adapter(folder: Path) -> str:
    """Return a hash of an adapter's two files; "" if one is missing."""
    files = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    return file_digest(*files) if all(file.exists() for file in files) else ""


def digest_of_contents(*files: bytes) -> str:
    """Return the hash of files that are not written yet, equal to `file_digest` of the written ones."""
    return hashlib.sha256(b"".join(b"%d %b" % (len(file), file) for file in files)).hexdigest()


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Lock an output path for this process; it is an error if another process holds the lock."""
    filelock = needed("filelock", "a checkpoint")
    place = hashlib.sha256(f"{Path.home()} {os.path.realpath(path)}".encode()).hexdigest()
    lock = Path(tempfile.gettempdir(), f"minilora-{place[:32]}.lock")  # the folder may not exist yet
    try:
        with filelock.FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # some systems do not delete an open file
                    lock.unlink()
    except filelock.Timeout:
        raise ValueError(f"another run is writing {str(path)!r}: wait for it to end, or use another path") from None


@contextmanager
def deferred_interrupts(report: Callable[[str], None]) -> Iterator[list[int]]:
    """Record the first Ctrl-C in the list that is yielded, and report it, instead of interrupting a step.

    A second one interrupts at once. Nothing changes outside the main thread, or if SIGINT already has another handler.
    """
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        report("      stopping after this step; Ctrl-C again stops at once")

    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield received
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, usual)


class TuningCheckpoint(Checkpoint):
    """The checkpoint of a fine-tuning run, for ``train(..., checkpoint=...)``.

    A run resumes from the state that was read before the model was loaded. `finish` writes the last step, together with
    the digest of its adapter. The parameters of the step with the lowest measured held-out loss are always saved too: a
    resumed run may have another --keep-best.

    Parameters
    ----------
    path : Path
        The checkpoint's file.
    notes : Notes
        The notes to write with each state.
    stopped : StoppedRun, optional
        The run to resume.
    each : bool
        Whether to write after each step. Otherwise writing takes at most `CHECKPOINT_SHARE` of the time, and a full
        disk is only a warning.
    """

    notes: Any  # a `Notes`
    last: TrainingState  # after the last step

    def __init__(self, path: Path, notes: Notes, stopped: StoppedRun | None = None, *, each: bool) -> None:
        super().__init__(path, notes=notes)
        self.stopped, self.each = stopped, each
        self.steps = 0  # of the whole run, set by `resume`
        self.written, self.took = 0.0, 0.0  # the time of the last write, and its duration, in seconds

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Restore a stopped run, or write the start of a new one."""
        self.steps = epochs
        settings = {name: value for name, value in settings.items() if name != "log_every"}  # it changes no step
        if self.stopped is None:
            super().resume(state, epochs, settings, data)
            return
        self.configuration = describe(state, settings, data)
        self.stopped.check_same(self.stopped.saved.configuration, self.configuration)
        self.restore(state, self.stopped.saved)
        if state.epoch == epochs:
            self._end(state)

    def keep(self, state: TrainingState, due: bool = False) -> None:
        """Write the state after a step, if it is due."""
        epochs, losses = state.history.epochs, state.history.losses
        if epochs[-1:] == [state.epoch] and losses[-1] < min(losses[:-1], default=math.inf):
            self.best.update({name: p.copy() for name, p in state.optimizer.params.items()})
        start = time.perf_counter()
        if state.epoch == self.steps and not due:
            self._end(state)
        elif self.each:
            super().keep(state)
        elif due or (start - self.written) * CHECKPOINT_SHARE >= self.took:
            try:
                super().keep(state)
            except OSError as error:
                warnings.warn(f"no checkpoint after step {state.epoch}, the training continues: {error}", stacklevel=2)
                self.took = math.inf  # no further attempts
                return
            self.written = time.perf_counter()
            self.took = self.written - start

    def _end(self, state: TrainingState) -> None:
        """Store the last step with a copy of the history, to which `train` then adds a loss that no checkpoint has."""
        self.last = replace(state, history=History([*state.history.epochs], [*state.history.losses]))

    def finish(self, *adapter: bytes) -> None:
        """Write the last step, and record the two files about to be written, which the resumed run may replace."""
        self.notes["saved"].append(digest_of_contents(*adapter))
        # If the checkpoint is implicit, a full disk is no reason not to save the adapter.
        with nullcontext() if self.each else suppress(OSError):
            super().keep(self.last)

    def best_of(self, model: Llama, history: History) -> tuple[Llama, int]:
        """Return the trained model with the parameters of its best step, and the number of that step."""
        place = min(range(len(history.losses)), key=history.losses.__getitem__)
        if place < len(history.losses) - 1:
            best = {id(p): self.best[name] for name, p in model.trainable().items()}
            model = rebuild(model, array=lambda array: best.get(id(array), array))
        return model, history.epochs[place]
