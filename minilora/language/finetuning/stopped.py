"""A fine-tuning that was stopped: what it was, and where it stands.

Beside what `train` compares, a checkpoint of ``minilora finetune`` notes what was asked for, in the words of the
command line. So another text or another rank is refused before a model is loaded, and not by the shapes of arrays.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ...backend import Backend
from ...checks import printable
from ...files.checkpoint import CheckpointError, Saved, read, refuse_another
from ...files.inputs import open_regular
from ...files.peft.adapterconfig import CONFIG_NAME
from ...files.peft.adapterfolder import WEIGHTS_NAME
from ...files.tensors import MODEL_CONFIG, open_weights
from ..data import HELD_OUT
from ..namedmodel import model_path
from .recipe import Recipe

NOTES = {"asked": dict, "numbers": int, "before": float, "learned": dict}
"""What ``minilora finetune`` notes in a checkpoint."""
LEARNED = {"rows": dict, "sum": float, "targets": int}
"""What it notes of the training loss."""
ENDS = 1 << 20
"""Bytes at a model file's start and end that tell it from another; `train` compares all of its weights later."""


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


SAME = (
    *("length", "rank", "alpha", "batch_size", "lr", "seed", "dtype", "quantize", "use_rslora", "use_dora", "init"),
    *("schedule", "warmup", "dropout", "keep_best"),
)
"""The options that must be the same, besides the text, the model, the layers and the backend."""
LATER = {_option(field.name): field.default for field in fields(Recipe) if field.default is not MISSING}
"""Options that an earlier version's checkpoint does not speak of, and what they were."""


@dataclass(frozen=True)
class Stopped:
    """A fine-tuning as its checkpoint has it. One that an earlier version kept has no notes."""

    saved: Saved
    signature: Mapping[str, Any]  # what was asked for, by the words of the command line
    numbers: int | None = None  # of the model
    before: float | None = None  # the held-out loss before the first step
    learned: dict[str, Any] | None = None  # the training loss so far, as `TrainingLoss` keeps it

    def where(self, steps: int | None) -> str:
        """Return how far it is."""
        return f"step {self.saved.epoch}" + ("" if steps is None else f" of {steps}")


def read_stopped(path: Path | None) -> Stopped | None:
    """Return what a checkpoint holds; None where there is none yet."""
    saved = read(path) if path is not None else None
    if saved is None:
        return None
    if saved.notes is None:
        return Stopped(saved, {})
    if not _has(saved.notes, NOTES) or not _has(saved.notes["learned"], LEARNED):
        raise CheckpointError(f"{str(path)!r} is a checkpoint of something else than minilora finetune")
    return Stopped(saved, *(saved.notes[name] for name in NOTES))


def _has(value: Any, kinds: Mapping[str, type]) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name, kind in kinds.items())


def signature(recipe: Recipe, where: Backend) -> dict[str, Any]:
    """Return what must be the same for a fine-tuning to go on, by the words of the command line."""
    targets, parameters = recipe.target_modules, recipe.target_parameters
    by_steps = recipe.schedule != "constant" or 0 < recipe.warmup < 1  # then more steps are other rates
    of_adapter = [] if recipe.adapter is None else [recipe.adapter / name for name in (CONFIG_NAME, WEIGHTS_NAME)]
    return {
        "TEXT": mark(recipe.text),
        "--model": model_mark(model_path(recipe.model)),
        "--adapter": mark(*of_adapter) if of_adapter else None,
        "--target-modules": ",".join(sorted(targets)) if isinstance(targets, list) else targets,
        "--target-parameters": ",".join(sorted(parameters)) if parameters else None,
        "--valid": mark(recipe.valid) if isinstance(recipe.valid, Path) else _other_share(recipe.valid),
        "--backend": where.name,
        "--steps, on which the rates depend,": recipe.steps if by_steps and recipe.epochs is None else None,
        "--epochs, on which the rates depend,": recipe.epochs if by_steps else None,
        **{_option(name): getattr(recipe, name) for name in SAME},
    }


def _other_share(share: float | None) -> float | None:
    """Return the share that is held out, where it is not the usual one."""
    return None if share == 1 / HELD_OUT else share


def mark(*paths: Path, ends: int | None = None) -> str:
    """Return a hash of what is in files, or of their sizes and so many bytes at the ends; where they lie is nothing."""
    digest = hashlib.sha256()
    for path in paths:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode() + file.read(ends or -1))
            if ends is not None:
                file.seek(max(0, size - ends))
                digest.update(file.read(ends))
    return digest.hexdigest()


def model_mark(model: Path) -> str:
    """Return what tells a model from another."""
    files = [model / MODEL_CONFIG, *(file.path for file in open_weights(model).files)] if model.is_dir() else [model]
    return mark(*files, ends=ENDS)


def check_same(path: Path, stopped: Stopped, current: Mapping[str, Any], steps: int | None) -> None:
    """Refuse to go on where something else was asked for, in the user's words."""
    differences = []
    options = LATER | dict(stopped.signature) if stopped.signature else {}
    for name, value in current.items():
        if name in options and value != options[name]:
            before = options[name]
            another = {"TEXT": "the text is another", "--model": "the model is another"}
            if None not in (value, before):
                another["--adapter"] = "the adapter to go on from is another"
            if str in (type(value), type(before)):
                another["--valid"] = "what is held out is another"
            differences.append(another.get(name, f"{name} is {_shown(before)} there and {_shown(value)} here"))
    if steps is not None and steps < stopped.saved.epoch:
        differences.append(f"--steps is {steps} here, and {stopped.saved.epoch} are done there")
    refuse_another(path, differences)


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else printable(str(value), 100)
