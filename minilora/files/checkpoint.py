"""Stop and resume, bit for bit.

A checkpoint is one safetensors file: the parameters and Adam's two running means as tensors, and beside them, as JSON
text, everything else that the next epoch depends on: the step count, the generator's state, the losses so far and the
configuration. A new one replaces the one before it in a single rename, so a kill at any moment leaves a whole one.
Nothing in it is executed when it is read: there is no pickle.

A checksum over tensors and text notices damage. The configuration has a hash of all data and of every frozen array, so
a training never goes on with other data, another model or other settings.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from ..backend import backend_of
from ..checks import Array, check_path, dtype_name
from ..layer import Layer, members, walk
from ..state import TrainingState
from ..texts import FileRefused, printable, reading, short
from .disk import written_whole
from .tensors import TensorFile, write_tensors

__all__ = ["Checkpoint", "CheckpointError"]

TEXT_KEY, CHECKSUM_KEY = "minilora_checkpoint", "crc32"
VERSION = 2
PARTS = ("params", "m", "v", "best")
"""The tensors' names are ``params.NAME``, ``m.NAME``, ``v.NAME`` and, where a training keeps them, ``best.NAME``."""
FINGERPRINT_NUMBERS = 1 << 20
"""Numbers of an array that are hashed at a time."""


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed: it is damaged, or of another configuration; the message says which."""


class Checkpoint:
    """A file that keeps a training's state after every epoch, for ``train(..., checkpoint=Checkpoint(path))``.

    Parameters
    ----------
    path : path
        The file. Its folder is made where there is none.
    settings : mapping of str to number, str or bool, optional
        What else must be the same for the training to go on, besides what `train` describes by itself.
    notes : mapping, optional
        What is kept with each state and not compared, as JSON has it. It may change between two epochs.

    Attributes
    ----------
    best : dict of str to array
        Parameters besides those of the last epoch, by their names, that whoever trains puts here: they are kept with
        each state, and brought back by `resume`.

    Raises
    ------
    CheckpointError
        If the file is there and is damaged, or has other settings; the differences are named.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any] | None = None, *, notes: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.notes = check_path("checkpoint", path), notes
        self.settings = self.configuration = dict(settings or {})
        self.best: dict[str, Array] = {}
        if self.settings and (saved := read_checkpoint(self.path)) is not None:
            before = {key: value for key, value in saved.configuration.items() if key in self.settings}
            check_same_configuration(self.path, before, self.settings)

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put a training that has not begun where the file left it; where there is none yet, write one of the start.

        `settings` are ``batch_size``, ``steps``, ``log_every``, the ``loss``'s name and maybe ``schedule``,
        ``weight_decay`` and ``max_grad_norm``; `data` are ``X``, ``Y`` and ``held_out``, which may be None. A
        checkpoint of another training is a CheckpointError, and then nothing has changed.
        """
        self.configuration = {**self.settings, **describe(state, settings, data)}
        saved = read_checkpoint(self.path)
        if saved is None:
            self.keep(state)  # better that it fails now than after an epoch
            return
        check_same_configuration(self.path, saved.configuration, self.configuration)
        if saved.epoch > epochs:
            check_no_differences(self.path, [f"epochs is {epochs} here, and {saved.epoch} are done there"])
        self.restore(state, saved)

    def restore(self, state: TrainingState, saved: Saved) -> None:
        """Put a training where a checkpoint that was read left it."""
        asarray = backend_of(next(iter(state.optimizer.params.values()))).asarray
        params, m, v, best = ({n: asarray(a) for n, a in saved.arrays[part].items()} for part in PARTS)
        state.optimizer.load_state_dict({"t": saved.t, "m": m, "v": v})
        for name, p in state.optimizer.params.items():
            p[...] = params[name]
        self.best.update(best)
        state.rng.bit_generator.state = saved.rng_state
        state.epoch = saved.epoch
        state.history.epochs[:], state.history.losses[:] = saved.epochs, saved.losses

    def keep(self, state: TrainingState) -> None:
        """Write down where a training stands after an epoch, in the place of what the file held."""
        optimizer, history = state.optimizer, state.history
        arrays = (optimizer.params, optimizer.m, optimizer.v, self.best)
        tensors = {
            f"{part}.{name}": backend_of(array).to_numpy(array)
            for part, by_name in zip(PARTS, arrays, strict=True)
            for name, array in by_name.items()
        }
        rest = {
            "version": VERSION,
            "t": optimizer.t,
            "rng_state": state.rng.bit_generator.state,
            "epoch": state.epoch,
            "epochs": history.epochs,
            "losses": history.losses,
            "configuration": self.configuration,
            "notes": self.notes,
        }
        text = json.dumps(rest, default=lambda array: array.tolist())  # some generators keep arrays, and take lists
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as file:
            write_tensors(file, tensors, {TEXT_KEY: text, CHECKSUM_KEY: checksum(tensors, text)})


# --- the file -----------------------------------------------------------------------------------------------------


class Saved(msgspec.Struct):
    """A training between two epochs, as a file has it."""

    version: Literal[2]
    t: int  # Adam's count of steps
    rng_state: dict[str, Any]  # of the generator that draws the batches
    epoch: int  # the number of epochs done
    epochs: list[int]  # the history up to there: after which epochs the loss was measured
    losses: list[float]  # the loss measured after each of them
    configuration: dict[str, Any]  # what must be the same for the training to go on
    notes: Any = None  # what is kept and not compared
    arrays: dict[str, dict[str, Any]] = {}  # not in the text: the tensors by part and name


def read_checkpoint(path: Path) -> Saved | None:
    """Read a checkpoint; None where there is none yet. What is not a whole one is a CheckpointError."""
    if not os.path.lexists(path):
        return None
    try:
        file = TensorFile(path)
        tensors = {key: file.read(key) for key in file.tensors}
        with reading(path):
            text = file.metadata[TEXT_KEY]
            if file.metadata.get(CHECKSUM_KEY) != checksum(tensors, text):
                raise ValueError("damaged: its checksum is not that of its contents")
            saved = msgspec.json.decode(text, type=Saved)
    except FileRefused as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    saved.arrays = {part: {} for part in PARTS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        saved.arrays.setdefault(part, {})[name] = tensor
    return saved


def checksum(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """Return a number that a damaged file does not have, but by a chance of 1 in 4 billion."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].tobytes(), zlib.crc32(name.encode(), total))
    return str(total)


# --- the configuration: what must be the same -------------------------------------------------------------------------


def describe(state: TrainingState, settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a training to go on, in words: not its length, nor the way to the gradients."""
    params, held_out = state.optimizer.params, data["held_out"]
    # A training that is done can be made longer, and another micro-batch gives the same gradients but for rounding.
    return {
        "backend": backend_of(data["X"]).name,
        **settings,
        "lr": state.optimizer.lr,
        "rng": seed_of(state.rng),
        "model": type(state.model).__name__,
        **{f"params[{name!r}]": f"{dtype_name(p)} {tuple(p.shape)}" for name, p in params.items()},
        **frozen_parts(state.model, params),
        "X": fingerprint(data["X"]),
        "Y": fingerprint(data["Y"]),
        **({} if held_out is None else {"held_out": [fingerprint(array) for array in held_out]}),
    }


def check_same_configuration(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Require that a checkpoint is of this configuration; each difference is named."""
    check_no_differences(
        path,
        [
            f"{key} is {short(saved.get(key))} there and {short(here.get(key))} here"
            for key in dict.fromkeys([*here, *saved])
            if saved.get(key) != here.get(key)
        ],
    )


def check_no_differences(path: str | Path, differences: Sequence[str]) -> None:
    """Require that a checkpoint's configuration does not differ from the one that is asked for."""
    if differences:
        raise CheckpointError(
            printable(f"{str(path)!r} is a checkpoint of another configuration: {'; '.join(differences)}. ")
            + "Ask for the same, or name another checkpoint"
        )


def seed_of(rng: np.random.Generator) -> str:
    """Return what a generator was seeded with, in words: it stays the same while the generator moves on."""
    bits = rng.bit_generator
    spawned = tuple(getattr(bits.seed_seq, "spawn_key", ()))  # of SeedSequence: others need no name
    entropy = getattr(bits.seed_seq, "entropy", None)
    return f"{type(bits).__name__} of {entropy}{f', spawned {spawned}' if spawned else ''}"


def fingerprint(array: Array) -> str:
    """Return the type, the shape and a hash of an array, some rows at a time: to tell one data set from another."""
    digest, to_numpy, rows = hashlib.sha256(), backend_of(array).to_numpy, array if array.shape else array[None]
    height = max(1, FINGERPRINT_NUMBERS // max(1, math.prod(rows.shape[1:])))
    for top in range(0, len(rows), height):
        digest.update(to_numpy(rows[top : top + height]).tobytes())
    return f"{dtype_name(array)} {tuple(array.shape)}, hash {digest.hexdigest()[:16]}"


def frozen_parts(model: Any, params: Mapping[str, Array]) -> dict[str, str]:
    """Return what the model computes with and does not train: arrays by their fingerprints, numbers as they are."""
    trained = {id(p) for p in params.values()}
    texts: dict[str, str] = {}
    for path, layer in walk(model):
        if path:
            texts[path] = type(layer).__name__
        for name, value in vars(layer).items():
            if isinstance(value, (bool, int, float, str, tuple)):
                texts[f"{path}.{name}".removeprefix(".")] = repr(value)
        for name, part in members(layer):
            if not isinstance(part, Layer) and id(part) not in trained:
                texts[f"{path}.{name}".removeprefix(".")] = fingerprint(part)
    return {f"frozen[{name!r}]": text for name, text in texts.items()}
