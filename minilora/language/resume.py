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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from ..backend import Backend
from ..extras import needed
from ..files.checkpoint import (
    Checkpoint,
    CheckpointError,
    Saved,
    change_notes,
    check_no_differences,
    read_checkpoint,
)
from ..files.disk import open_regular
from ..files.peft import CONFIG_NAME, WEIGHTS_NAME
from ..files.tensors import MODEL_CONFIG, open_weights
from ..layer import Layer
from ..state import History, TrainingState
from ..texts import printable
from .losstable import Losses
from .recipe import Recipe, option_name
from .text import HELD_OUT

ENDS = 1 << 20
"""Bytes at a model file's start and end that tell it from another; `train` compares all of its weights later."""
SHARE = 0.02
"""Of the time, what keeping a training may take that nobody asked to keep."""
FILES = {
    "TEXT": "the text", "--model": "the model", "--adapter": "the adapter to go on from", "--valid": "what is held out",
}  # fmt: skip
"""What is noted as a digest, which says nothing to a reader."""


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
        "TEXT": digest(recipe.text),
        "--model": digest(*weights, ends=ENDS),
        "--adapter": digest_of_adapter(adapter) if adapter is not None else None,
        "--target-modules": ",".join(sorted(targets)) if isinstance(targets, list) else targets,
        "--target-parameters": ",".join(sorted(parameters)) if parameters else None,
        "--valid": digest(share) if isinstance(share, Path) else share,
        "--backend": backend.name,
        "--steps, on which the rates depend,": recipe.steps if by_steps and recipe.epochs is None else None,
        "--epochs, on which the rates depend,": recipe.epochs if by_steps else None,
        **{option_name(f.name): getattr(recipe, f.name) for f in fields(Recipe) if f.metadata["same"]},
    }


def digest(*paths: Path, ends: int | None = None) -> str:
    """Return a hash of what is in files, or of their sizes and so many bytes at the ends; where they lie is nothing."""
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
    return digest(*files) if all(file.exists() for file in files) else ""


def note_saved(kept: Path, adapter: Path) -> None:
    """Note in a checkpoint an adapter that its training is about to write: it may replace this one, and no other."""
    if (saved := read_checkpoint(kept)) is not None:
        change_notes(kept, {**saved.notes, "saved": [*saved.notes["saved"], digest_of_adapter(adapter)]})


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


class ThrottledCheckpoint(Checkpoint):
    """A checkpoint that is written as often as takes `SHARE` of the time, and not after every step."""

    written, took = 0.0, 0.0  # when it was last, and how long that was, in seconds

    def keep(self, state: TrainingState) -> None:
        """Write down where a training stands, if it is time."""
        start = time.perf_counter()
        if (start - self.written) * SHARE >= self.took:
            try:
                super().keep(state)
            except OSError as error:
                warnings.warn(f"the training is not kept after step {state.epoch}, and goes on: {error}", stacklevel=2)
                self.took = math.inf  # never again
                return
            self.written = time.perf_counter()
            self.took = self.written - start


def check_same(kept: Kept, here: Mapping[str, Any], steps: int | None) -> None:
    """Require that the same was asked for, and no fewer steps than are done."""
    there = kept.notes["asked"]
    differences = [
        _difference(name, there.get(name), value) for name, value in here.items() if there.get(name) != value
    ]
    if steps is not None and steps < kept.saved.epoch:
        differences.append(f"--steps is {steps} here, and {kept.saved.epoch} are done there")
    check_no_differences(kept.path, differences)


def _difference(name: str, there: Any, here: Any) -> str:
    """Return a difference in words: of files, that they differ; of all else, both values."""
    if name in FILES and str in (type(there), type(here)):
        return f"{FILES[name]} is another"
    return f"{name} is {_shown(there)} there and {_shown(here)} here"


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else printable(str(value), 100)


class BestStep:
    """A checkpoint for `train` that keeps the parameters of the measured step with the least held-out loss besides."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.params = checkpoint, checkpoint.best

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put the training where it was left, with the best step so far."""
        self.checkpoint.resume(state, epochs, settings, data)

    def keep(self, state: TrainingState) -> None:
        """Copy the parameters where their loss is below all others so far, and keep where the training stands."""
        losses = state.history.losses
        measured = state.history.epochs[-1:] == [state.epoch]
        if measured and losses[-1] < min(losses[:-1], default=math.inf):
            self.params.update({name: p.copy() for name, p in state.optimizer.params.items()})
        self.checkpoint.keep(state)

    def bring_back(self, model: Layer, history: History) -> int:
        """Give a model that was trained the parameters of the best step, and return which one it is."""
        place = min(range(len(history.losses)), key=history.losses.__getitem__)
        if place < len(history.losses) - 1:
            params = model.trainable()
            for name, array in self.params.items():
                params[name][...] = array
        return history.epochs[place]
