"""A fine-tuning that is kept in a checkpoint: what was asked for, where it stands, and its best step.

A checkpoint of ``minilora finetune`` notes what was asked for beside what `train` keeps and compares. So another text
or another rank is refused before a model is loaded, in the words of the command line.
"""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from ..backend import Backend
from ..extras import needed
from ..files.checkpoint import Checkpoint, CheckpointError, Saved, check_no_differences, describe, read_checkpoint
from ..files.disk import open_regular
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
"""Bytes at a model file's start and end that tell it from another; all weights are compared once they are loaded."""
SHARE = 0.02
"""Share of the time that checkpoints may take for which nobody asked."""
DIGESTED = {
    "TEXT": "the text", "--model": "the model", "--adapter": "the adapter to go on from", "--valid": "what is held out",
}  # fmt: skip
"""What is noted as a digest, which says nothing to a reader."""
DATA, MODEL = "what the tokenizer makes of the text", "the model"
ARRAY_OWNERS = {"X": DATA, "Y": DATA, "held_out": DATA, "model": MODEL, "params": MODEL, "frozen": MODEL}
"""What differs where an array does that is trained on or with, by the first word of its name in the configuration."""


class Notes(TypedDict):
    """What a checkpoint of ``minilora finetune`` notes."""

    asked: dict[str, Any]  # what must be the same, as `identity_of` returns it
    numbers: int  # of the model
    length: int  # of the longest row: where none is asked for, the data's own, or what memory had room for
    before: float  # the held-out loss before the first step
    losses: Losses
    saved: list[str]  # the digests of the adapters that this training wrote, or was about to write
    wrote: list[str]  # where its logs and figures lie


@dataclass(frozen=True)
class Kept:
    """A fine-tuning as its checkpoint has it."""

    path: Path
    saved: Saved
    notes: Notes

    def place(self, steps: int | None) -> str:
        """Return how far it is, in words."""
        return f"step {self.saved.epoch}" + ("" if steps is None else f" of {steps}")

    def check_same(self, there: Mapping[str, Any], here: Mapping[str, Any], steps: int | None = None) -> None:
        """Require that what it has is the same here, and that no fewer steps are asked for than are done."""
        names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
        differences = [_difference(name, there.get(name), here.get(name)) for name in names]
        if steps is not None and steps < self.saved.epoch:
            differences.append(f"--steps is {steps} here, and {self.saved.epoch} are done there")
        check_no_differences(self.path, [*dict.fromkeys(differences)])


def _difference(name: str, there: Any, here: Any) -> str:
    """Return a difference in words: of files and arrays, that they differ; of all else, both values."""
    array = name.partition("[")[0]
    if (name in DIGESTED and str in (type(there), type(here))) or array in ARRAY_OWNERS:
        return f"{DIGESTED.get(name) or ARRAY_OWNERS[array]} is another"
    return f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else printable(str(value), 100)


def read_kept(path: Path) -> Kept | None:
    """Return what a checkpoint holds; None where there is none yet."""
    if (saved := read_checkpoint(path)) is None:
        return None
    try:
        return Kept(path, saved, msgspec.convert(saved.notes, Notes))
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of something else than minilora finetune, or of another version of it"
        ) from error


def identity_of(recipe: Recipe, model: Path, backend: Backend) -> dict[str, Any]:
    """Return what must be the same for a fine-tuning to go on, by the words of the command line."""
    targets, parameters = recipe.target_modules, recipe.target_parameters
    by_steps = recipe.schedule != "constant" or 0 < recipe.warmup < 1  # then more steps are other rates
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
    """Return a hash of what is in files, or of their sizes and first and last `ends` bytes; paths do not matter."""
    sha = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            sha.update(f"{size} ".encode() + file.read(ends or -1))
            if ends is not None:
                file.seek(max(0, size - ends))
                sha.update(file.read(ends))
    return sha.hexdigest()


def digest_of_adapter(folder: Path) -> str:
    """Return a hash of an adapter's two files; "" where one is missing."""
    files = [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
    return file_digest(*files) if all(file.exists() for file in files) else ""


def digest_of_contents(*files: bytes) -> str:
    """Return the hash of files that are not written yet, as `file_digest` has it of those that are."""
    return hashlib.sha256(b"".join(b"%d %b" % (len(file), file) for file in files)).hexdigest()


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold what a training writes for this process while it trains; where another one holds it, that is an error."""
    filelock = needed("filelock", "a training that is kept")
    place = hashlib.sha256(f"{Path.home()} {os.path.realpath(path)}".encode()).hexdigest()
    lock = Path(tempfile.gettempdir(), f"minilora-{place[:32]}.lock")  # the folder may not be there yet
    try:
        with filelock.FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # some systems keep an open file
                    lock.unlink()
    except filelock.Timeout:
        raise ValueError(f"another training writes {str(path)!r}: wait for its end, or name another") from None


class TuningCheckpoint(Checkpoint):
    """The checkpoint of a fine-tuning, for ``train(..., checkpoint=...)``.

    A training resumes from what was read before the model was loaded. The last step is kept by `finish`, together with
    the digest of the adapter that it leads to.

    Parameters
    ----------
    path : Path
        The file.
    notes : Notes
        What is kept with each state.
    kept : Kept, optional
        The training to resume.
    each : bool
        Whether each step is kept. Otherwise as many are as takes `SHARE` of the time, and that the disk is full is a
        warning.
    best : bool
        Whether the parameters of the measured step with the least held-out loss are kept too.
    """

    notes: Any  # of the type `Notes`
    last: TrainingState  # after the last step

    def __init__(self, path: Path, notes: Notes, kept: Kept | None = None, *, each: bool, best: bool) -> None:
        super().__init__(path, notes=notes)
        self.kept, self.each, self.keeps_best = kept, each, best
        self.steps = 0  # of the whole training, which `resume` is told
        self.written, self.took = 0.0, 0.0  # when it was last, and how long that was, in seconds

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put the training where it was left, or keep its start."""
        self.steps = epochs
        if self.kept is None:
            super().resume(state, epochs, settings, data)
            return
        self.configuration = describe(state, settings, data)
        self.kept.check_same(self.kept.saved.configuration, self.configuration)
        self.restore(state, self.kept.saved)
        if state.epoch == epochs:
            self._end(state)

    def keep(self, state: TrainingState) -> None:
        """Keep where the training stands after a step, if it is time."""
        epochs, losses = state.history.epochs, state.history.losses
        if self.keeps_best and epochs[-1:] == [state.epoch] and losses[-1] < min(losses[:-1], default=math.inf):
            self.best.update({name: p.copy() for name, p in state.optimizer.params.items()})
        start = time.perf_counter()
        if state.epoch == self.steps:
            self._end(state)
        elif self.each:
            super().keep(state)
        elif (start - self.written) * SHARE >= self.took:
            try:
                super().keep(state)
            except OSError as error:
                warnings.warn(f"the training is not kept after step {state.epoch}, and goes on: {error}", stacklevel=2)
                self.took = math.inf  # never again
                return
            self.written = time.perf_counter()
            self.took = self.written - start

    def _end(self, state: TrainingState) -> None:
        """Remember the last step, with the history as it is now: `train` adds a loss that no checkpoint has."""
        self.last = replace(state, history=History([*state.history.epochs], [*state.history.losses]))

    def finish(self, *adapter: bytes) -> None:
        """Keep the last step, and note the two files that are about to be written: its training may replace these."""
        self.notes["saved"].append(digest_of_contents(*adapter))
        # Where nobody asked for a checkpoint, a full disk is no reason not to save the adapter.
        with nullcontext() if self.each else suppress(OSError):
            super().keep(self.last)

    def best_of(self, model: Llama, history: History) -> tuple[Llama, int]:
        """Return a trained model with the parameters of its best step, and which step that is."""
        place = min(range(len(history.losses)), key=history.losses.__getitem__)
        if place < len(history.losses) - 1:
            best = {id(p): self.best[name] for name, p in model.trainable().items()}
            model = rebuild(model, array=lambda array: best.get(id(array), array))
        return model, history.epochs[place]
