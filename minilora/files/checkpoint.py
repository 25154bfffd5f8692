"""Checkpoints from which a training run resumes bit for bit.

A checkpoint is one safetensors file. Its tensors are the parameters and Adam's two moments. Its metadata contains, as
JSON, everything else that the next epoch depends on: the step count, the generator's state, the losses so far and the
configuration. A new checkpoint replaces the old one by a single rename, so a kill at any moment leaves a complete file.
Reading it executes no code: there is no pickle.

A checksum over the tensors and the JSON text detects damage. The configuration includes hashes of all data and of every
frozen array, so a run never resumes with different data, another model or other settings.
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
SAVED_GROUPS = ("params", "m", "v", "best")
"""The prefixes of the tensors' names: ``params.NAME``, ``m.NAME``, ``v.NAME`` and, if `best` is used, ``best.NAME``."""
FINGERPRINT_NUMBERS = 1 << 20
"""The number of entries of an array that are hashed at a time."""


class CheckpointError(ValueError):
    """A run cannot resume from a checkpoint, because it is damaged or has a different configuration."""


class Checkpoint:
    """A file that stores a run's state after every epoch, for ``train(..., checkpoint=Checkpoint(path))``.

    Parameters
    ----------
    path : path
        The file. Its folder is created if necessary.
    settings : mapping of str to number, str or bool, optional
        Further settings that must be the same when a run resumes, in addition to those that `train` records itself.
    notes : mapping, optional
        JSON values to store with each state. They are not compared, and may change between two epochs.

    Attributes
    ----------
    best : dict of str to array
        Further parameters by name, set by the caller. Each save stores them, and `resume` restores them.

    Raises
    ------
    CheckpointError
        If the file exists, and is damaged or has other settings; the message lists the differences.
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
        """Restore the file's state to a run that has not started; if there is no file yet, write the initial state.

        `settings` are ``batch_size``, ``steps``, ``log_every``, the ``loss``'s name and possibly ``schedule``,
        ``weight_decay`` and ``max_grad_norm``; `data` are ``X``, ``Y`` and ``held_out``, which may be None. A
        checkpoint of another run raises a CheckpointError and changes nothing.
        """
        self.configuration = {**self.settings, **describe(state, settings, data)}
        saved = read_checkpoint(self.path)
        if saved is None:
            self.keep(state)  # fail now rather than after an epoch
            return
        check_same_configuration(self.path, saved.configuration, self.configuration)
        if saved.epoch > epochs:
            check_no_differences(self.path, [f"epochs is {epochs}, but the checkpoint has {saved.epoch}"])
        self.restore(state, saved)

    def restore(self, state: TrainingState, saved: Saved) -> None:
        """Restore the state of a checkpoint that has been read."""
        params = state.optimizer.params
        for key, array in ((f"{part}.{name}", a) for part in SAVED_GROUPS for name, a in saved.arrays[part].items()):
            p = params[key.partition(".")[2]]
            if (array.dtype, array.shape) != (p.dtype, p.shape):  # the checksum covers only the numbers
                found, expected = f"{array.dtype} {array.shape}", f"{p.dtype} {tuple(p.shape)}"
                raise CheckpointError(f"{str(self.path)!r}: {key} is {found}, expected {expected}: the file is damaged")
        asarray = backend_of(next(iter(params.values()))).asarray
        params, m, v, best = ({n: asarray(a) for n, a in saved.arrays[part].items()} for part in SAVED_GROUPS)
        state.optimizer.load_state_dict({"t": saved.t, "m": m, "v": v})
        for name, p in state.optimizer.params.items():
            p[...] = params[name]
        self.best.update(best)
        state.rng.bit_generator.state = saved.rng_state
        state.epoch = saved.epoch
        state.history.epochs[:], state.history.losses[:] = saved.epochs, saved.losses

    def keep(self, state: TrainingState) -> None:
        """Write the state after an epoch, replacing the file."""
        optimizer, history = state.optimizer, state.history
        arrays = (optimizer.params, optimizer.m, optimizer.v, self.best)
        tensors = {
            f"{part}.{name}": backend_of(array).to_numpy(array)
            for part, by_name in zip(SAVED_GROUPS, arrays, strict=True)
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
        # Some generators' states contain arrays, and accept lists.
        text = json.dumps(rest, default=lambda array: array.tolist())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.path) as file:
            write_tensors(file, tensors, {TEXT_KEY: text, CHECKSUM_KEY: checksum(tensors, text)})


# --- the file -----------------------------------------------------------------------------------------------------


class Saved(msgspec.Struct):
    """A run's state between two epochs, as stored in a file."""

    version: Literal[2]
    t: int  # Adam's step count
    rng_state: dict[str, Any]  # the state of the generator that draws the batches
    epoch: int  # the number of completed epochs
    epochs: list[int]  # the history so far: the epochs after which the loss was measured
    losses: list[float]  # the losses measured after these
    configuration: dict[str, Any]  # must be the same when a run resumes
    notes: Any = None  # stored, not compared
    arrays: dict[str, dict[str, Any]] = {}  # not in the JSON: the tensors by part and name


def read_checkpoint(path: Path) -> Saved | None:
    """Read a checkpoint; return None if there is no file yet. A damaged one raises a CheckpointError."""
    if not os.path.lexists(path):
        return None
    try:
        file = TensorFile(path)
        tensors = {key: file.read(key) for key in file.tensors}
        with reading(path):
            text = file.metadata[TEXT_KEY]
            if file.metadata.get(CHECKSUM_KEY) != checksum(tensors, text):
                raise ValueError("damaged: its checksum does not match its contents")
            saved = msgspec.json.decode(text, type=Saved)
    except FileRefused as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}. Choose another checkpoint") from error
    saved.arrays = {part: {} for part in SAVED_GROUPS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        saved.arrays.setdefault(part, {})[name] = tensor
    return saved


def checksum(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """Return a checksum of tensors and text. It misses damage with a probability of 1 in 4 billion."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].tobytes(), zlib.crc32(name.encode(), total))
    return str(total)


# --- the configuration ------------------------------------------------------------------------------------------------


def describe(state: TrainingState, settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Describe everything that must be the same when a run resumes."""
    params, held_out = state.optimizer.params, data["held_out"]
    # Not the number of epochs, since a run can be extended, and not the micro-batch size: it only changes the rounding.
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
    """Require that a checkpoint has the configuration `here`; the error lists all differences."""
    check_no_differences(
        path,
        [
            f"{key} is {short(saved.get(key))} there and {short(here.get(key))} here"
            for key in dict.fromkeys([*here, *saved])
            if saved.get(key) != here.get(key)
        ],
    )


def check_no_differences(path: str | Path, differences: Sequence[str]) -> None:
    """Raise a CheckpointError that lists the differences, if there are any."""
    if differences:
        raise CheckpointError(
            printable(f"{str(path)!r} is a checkpoint with a different configuration: {'; '.join(differences)}. ")
            + "Use the same configuration, or choose another checkpoint"
        )


def seed_of(rng: np.random.Generator) -> str:
    """Describe a generator's seed, which does not change when it draws."""
    bits = rng.bit_generator
    spawned = tuple(getattr(bits.seed_seq, "spawn_key", ()))  # only a SeedSequence has these two
    entropy = getattr(bits.seed_seq, "entropy", None)
    return f"{type(bits).__name__} of {entropy}{f', spawned {spawned}' if spawned else ''}"


def fingerprint(array: Array) -> str:
    """Return an array's dtype, shape and hash, to tell data sets apart. It hashes a block of rows at a time."""
    digest, to_numpy, rows = hashlib.sha256(), backend_of(array).to_numpy, array if array.shape else array[None]
    height = max(1, FINGERPRINT_NUMBERS // max(1, math.prod(rows.shape[1:])))
    for top in range(0, len(rows), height):
        digest.update(to_numpy(rows[top : top + height]).tobytes())
    return f"{dtype_name(array)} {tuple(array.shape)}, hash {digest.hexdigest()[:16]}"


def frozen_parts(model: Any, params: Mapping[str, Array]) -> dict[str, str]:
    """Describe what the model computes with but does not train: layer classes, settings, and arrays by fingerprint."""
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
