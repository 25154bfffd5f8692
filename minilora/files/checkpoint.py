"""Stop and resume, bit for bit.

A checkpoint is one safetensors file: the parameters and Adam's two running means as tensors, and beside them, as JSON
text, everything else that the next epoch depends on: the step count, the generator's state, the losses so far and
the configuration. It takes the place of the one before it in one stroke, so that whoever is killed, at any moment,
leaves a whole one behind. Nothing in it is executed when it is read: there is no pickle.

One file may keep several trainings that follow one another, each under its name: the article's two.

A checksum notices damage. The configuration has a hash of all data and of every frozen array, so a checkpoint of
another training is refused, and so are contents that the model cannot take. A file that somebody forges until all of
it agrees cannot be told from a true one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..backend import backend_of
from ..checks import Array, FileRefused, check_path, dtype_name, printable, short
from ..guards.inputfiles import parse_json
from ..guards.tensorfile import TensorFile
from ..guards.wholefiles import written_whole
from ..layer import Layer, parts, walk
from ..state import TrainingState

__all__ = ["Checkpoint", "CheckpointError"]

METADATA_KEY, CHECKSUM_KEY = "minilora_checkpoint", "crc32"
VERSION = 2
PARTS = ("params", "m", "v")
"""The tensors' names are ``params.NAME``, ``m.NAME`` and ``v.NAME``."""
BEST = "best"
"""Of the parameters of the best epoch so far, ``best.NAME``, where a training keeps them."""
BY_NAME = "/"
"""Stands between a training's name and the rest, where a file has several trainings: ``base/params.NAME``."""
FIELDS = {"t": int, "rng_state": dict, "epoch": int, "epochs": list, "losses": list, "configuration": dict}
"""What the text has besides the version, and `notes` where there are any. Another field is passed over."""
DIFFERENCES = 3
"""The most differences between two configurations that a message tells."""
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
    name : str
        Of the training, where one file keeps several, one after the other, as the article's two.
    best : dict of str to array, optional
        Parameters besides those of the last epoch, by their names: kept with each state, and brought back here.

    Raises
    ------
    TypeError
        If a setting is something else.
    CheckpointError
        If the file is there and is damaged, or has other settings; the differences are named.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any] | None = None,
        *,
        notes: Mapping[str, Any] | None = None,
        name: str = "",
        best: dict[str, Array] | None = None,
    ) -> None:
        self.path = check_path("checkpoint", path)
        self.settings, self.notes, self.name = dict(settings or {}), notes, name
        self.best: dict[str, Array] = {} if best is None else best
        self.others = Contents({}, {})  # the other trainings of the file
        for key, value in self.settings.items():
            if not isinstance(key, str) or not isinstance(value, (bool, int, float, str)):
                raise TypeError(f"settings[{key!r}] is {short(value)}, expected a number, a text or a bool by its name")
        self.configuration = self.settings
        if self.settings and (saved := read(self.path, name)) is not None:
            before = {key: value for key, value in saved.configuration.items() if key in self.settings}
            check_same_configuration(self.path, before, self.settings)

    def resume(self, state: TrainingState, epochs: int, settings: Mapping[str, Any], data: Mapping[str, Any]) -> None:
        """Put a training where the file left it; where there is none yet, write one of the start.

        Parameters
        ----------
        state : TrainingState
            Of a training that has not begun.
        epochs : int
            How many it is to have in all.
        settings : mapping
            ``batch_size``, ``steps``, ``log_every`` and ``loss``, the loss's name; ``schedule`` where there is one.
        data : mapping
            ``X``, ``Y`` and ``held_out``, which may be None.

        Raises
        ------
        CheckpointError
            If the checkpoint is not of this training. Nothing has changed then.
        """
        self.configuration = {**self.settings, **describe(state, settings, data)}
        saved = read(self.path, self.name)
        if self.name and os.path.lexists(self.path):
            self.others = contents(self.path).without(self.name)
        if saved is None:
            self.keep(state)  # better that it fails now than after an epoch
            return
        check_same_configuration(self.path, saved.configuration, self.configuration)
        if saved.epoch > epochs:
            raise CheckpointError(
                f"{str(self.path)!r} is a checkpoint of another configuration: epochs is {epochs} here, and "
                f"{saved.epoch} are done there"
            )
        check_contents(self.path, saved, state, self.configuration)
        asarray = backend_of(data["X"]).asarray
        params, m, v = ({n: asarray(a) for n, a in saved.arrays[part].items()} for part in PARTS)
        state.optimizer.load_state_dict({"t": saved.t, "m": m, "v": v})
        for name, p in state.optimizer.params.items():
            p[...] = params[name]
        self.best.update({name: asarray(array) for name, array in saved.arrays[BEST].items()})
        state.rng.bit_generator.state = saved.rng_state
        state.epoch = saved.epoch
        state.history.epochs[:], state.history.losses[:] = saved.epochs, saved.losses

    def keep(self, state: TrainingState) -> None:
        """Write down where a training stands after an epoch, in the place of what the file held.

        Raises
        ------
        CheckpointError, OSError
            If the file cannot be written. The one before it is left as it was.
        """
        optimizer, history = state.optimizer, state.history
        arrays = {"params": optimizer.params, "m": optimizer.m, "v": optimizer.v, BEST: self.best}
        tensors = {
            f"{_start(self.name)}{part}.{name}": np.ascontiguousarray(backend_of(array).to_numpy(array))
            for part, named in arrays.items()
            for name, array in named.items()
        }
        text = state_text(
            {
                "version": VERSION,
                "t": optimizer.t,
                "rng_state": state.rng.bit_generator.state,
                "epoch": state.epoch,
                "epochs": history.epochs,
                "losses": history.losses,
                "configuration": self.configuration,
                **({} if self.notes is None else {"notes": self.notes}),
            }
        )
        whole = Contents({**self.others.tensors, **tensors}, {**self.others.texts, self.name: text})
        make_folder(self.path.parent)
        with written_whole(self.path) as file:
            file.write(whole.as_file())


# --- the file -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A training between two epochs, as a file has it."""

    arrays: Mapping[str, Mapping[str, np.ndarray]]  # by part, ``params``, ``m``, ``v`` and ``best``, and by name
    t: int  # Adam's count of steps
    rng_state: Mapping[str, Any]  # of the generator that draws the batches
    epoch: int  # the number of epochs done
    epochs: list[int]  # the history up to there: after which epochs the loss was measured
    losses: list[float]  # the loss measured after each of them
    configuration: Mapping[str, Any]  # what must be the same for the training to go on
    notes: Any  # what is kept beside; None where there is nothing


@dataclass(frozen=True)
class Contents:
    """What is in a file: of one training without a name, or of several with names."""

    tensors: Mapping[str, np.ndarray]  # by their names in the file
    texts: Mapping[str, str]  # the state besides, as JSON, by the training's name

    def without(self, name: str) -> Contents:
        """Return the other trainings."""
        tensors = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(_start(name))}
        return Contents(tensors, {other: text for other, text in self.texts.items() if other != name})

    def as_file(self) -> bytes:
        """Return the file's bytes."""
        texts = {METADATA_KEY + name: text for name, text in self.texts.items()}
        return save(dict(self.tensors), metadata=texts | {CHECKSUM_KEY: self.checksum()})

    def checksum(self) -> str:
        """Return the number that the file carries."""
        return checksum(self.tensors, "".join(name + text for name, text in sorted(self.texts.items())))


def _start(name: str) -> str:
    return f"{name}{BY_NAME}" if name else ""


def contents(path: Path) -> Contents:
    """Return what is in a checkpoint, or refuse what is damaged."""
    file = TensorFile(path)
    texts = {
        key.removeprefix(METADATA_KEY): text for key, text in file.metadata.items() if key.startswith(METADATA_KEY)
    }
    for text in texts.values() or ["{}"]:
        version = parse_json(path, text.encode(), "checkpoint's text").get("version")
        if version != VERSION:
            raise CheckpointError(
                f"{str(path)!r} is not a checkpoint of this version of minilora: its version is {short(version)}, "
                f"expected {VERSION}"
            )
    with file.opened() as opened:
        whole = Contents({key: file.read(key, opened) for key in file.tensors}, texts)
    if file.metadata.get(CHECKSUM_KEY) != whole.checksum():
        raise CheckpointError(f"{str(path)!r} is damaged: its checksum is not that of its contents")
    return whole


def read(path: Path, name: str = "") -> Saved | None:
    """Read a training's checkpoint; None where there is none yet. What is not a whole one is a CheckpointError."""
    if not os.path.lexists(path):
        return None
    try:
        whole = contents(path)
        if name not in whole.texts and name and "" not in whole.texts:
            return None  # the training before it is still going on
        if name not in whole.texts or (not name and len(whole.texts) > 1):
            names = " and ".join(sorted(filter(None, whole.texts)))
            trainings = f"the trainings {names}" if names else "one training without a name"
            expected = f"one of the name {name}" if name else "one without a name"
            raise CheckpointError(printable(f"{str(path)!r} keeps {trainings}, expected {expected}"))
        rest = parse_json(path, whole.texts[name].encode(), "checkpoint's text")
        arrays: dict[str, dict[str, np.ndarray]] = {part: {} for part in (*PARTS, BEST)}
        for key, tensor in whole.tensors.items():
            if not key.startswith(_start(name)):
                continue
            part, _, parameter = key.removeprefix(_start(name)).partition(".")
            if part not in arrays:
                raise CheckpointError(f"{str(path)!r} holds {short(key)}, expected only {', '.join(PARTS)}")
            arrays[part][parameter] = tensor
        for field, kind in FIELDS.items():
            if type(rest.get(field)) is not kind:
                raise CheckpointError(f"{str(path)!r}: {field} is {short(rest.get(field))}, expected {kind.__name__}")
        return Saved(arrays, **{field: rest[field] for field in FIELDS}, notes=rest.get("notes"))
    except (FileRefused, KeyError, UnicodeError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error


def checksum(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """Return a number that a damaged file does not have, but by a chance of 1 in 4 billion."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].ravel().view(np.uint8).data, zlib.crc32(name.encode(), total))
    return str(total)


def state_text(state: Mapping[str, Any]) -> str:
    """Return a state as JSON.

    Python writes a float with as many digits as it takes to read the same float again. Some bit generators keep arrays
    in their state, and take lists back.
    """
    return json.dumps(state, default=lambda array: array.tolist())


def check_place(path: Path) -> None:
    """Refuse a file that no checkpoint could be written to, before there is one to write."""
    if path.is_dir():
        raise CheckpointError(f"the checkpoint {str(path)!r} is a folder, expected a file or a new name")
    parent = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise CheckpointError(f"checkpoints cannot be kept in {str(path.parent)!r}: {str(parent)!r} takes no files")


def make_folder(folder: Path) -> None:
    """Make the folder that checkpoints go to, where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be kept in {str(folder)!r}: {error}") from error


# --- the configuration: what must be the same -------------------------------------------------------------------------


def describe(state: TrainingState, settings: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same for a training to go on, in words that name a difference.

    The number of epochs is not among them: a training that is done can be made longer. Nor are the parameters, which
    the checkpoint brings, nor the way to the gradients: another one, such as another micro-batch, gives the same
    numbers but for rounding. All rows of the data are read once for this, those in a file too.
    """
    optimizer = state.optimizer
    X, Y, held_out = data["X"], data["Y"], data["held_out"]
    return {
        "backend": backend_of(X).name,
        "batch_size": settings["batch_size"],
        "steps": settings["steps"],
        "lr": optimizer.lr,
        **({"schedule": settings["schedule"]} if "schedule" in settings else {}),
        "log_every": settings["log_every"],
        "loss": settings["loss"],
        "rng": seed_of(state.rng),
        "model": type(state.model).__name__,
        **{f"params[{name!r}]": f"{dtype_name(p)} {tuple(p.shape)}" for name, p in optimizer.params.items()},
        **frozen_parts(state.model, optimizer.params),
        "X": fingerprint(X),
        "Y": fingerprint(Y),
        **({} if held_out is None else {"held_out": [fingerprint(array) for array in held_out]}),
    }


def check_same_configuration(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another configuration, and name the first differences."""
    refuse_another(
        path,
        [
            f"{key} is {short(saved.get(key))} there and {short(here.get(key))} here"
            for key in dict.fromkeys([*here, *saved])
            if saved.get(key) != here.get(key)
        ],
    )


def refuse_another(path: str | Path, differences: Sequence[str]) -> None:
    """Refuse a checkpoint where there are differences, of which the first are told."""
    if more := differences[DIFFERENCES:]:
        differences = [*differences[:DIFFERENCES], f"and {len(more)} more"]
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
    """Return the type, the shape and a hash of an array, all of its rows: to tell one data set from another.

    Its rows pass through memory some at a time. At the article's 40 MB this takes 30 ms, a tenth of an epoch.
    """
    digest, to_numpy = hashlib.sha256(), backend_of(array).to_numpy
    for some in _blocks(tuple(array.shape), FINGERPRINT_NUMBERS):
        digest.update(np.ascontiguousarray(to_numpy(array[some])).tobytes())
    return f"{dtype_name(array)} {tuple(array.shape)}, hash {digest.hexdigest()[:16]}"


def _blocks(shape: tuple[int, ...], numbers: int) -> Iterator[Any]:
    """Yield indices that cut an array into runs of rows, of about so many numbers each."""
    if not shape:
        yield ...
        return
    height = max(1, numbers // max(1, math.prod(shape[1:])))
    yield from (slice(start, start + height) for start in range(0, shape[0], height))


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
        for name, part in parts(layer):
            if not isinstance(part, Layer) and id(part) not in trained:
                texts[f"{path}.{name}".removeprefix(".")] = fingerprint(part)
    return {f"frozen[{name!r}]": text for name, text in texts.items()}


# --- the contents: what a model can take ------------------------------------------------------------------------------


def check_contents(path: Path, saved: Saved, state: TrainingState, configuration: Mapping[str, Any]) -> None:
    """Refuse numbers that a training of this configuration cannot have written, before any of them is used."""
    steps, epoch, log_every = configuration["steps"], saved.epoch, configuration["log_every"]
    logged = list(range(log_every, epoch + 1, log_every))
    bits = state.rng.bit_generator
    for what, sound, expected in (
        ("epoch", epoch >= 0, "at least 0"),
        ("t", saved.t == epoch * steps, f"{epoch} epochs of {steps} steps"),
        ("epochs", json.dumps(saved.epochs) == json.dumps(logged), f"{logged}"),  # 2.0 is no 2
        ("losses", len(saved.losses) == len(logged) and _are_finite(saved.losses), "finite numbers"),
        ("rng_state", _is_state_of(type(bits), saved.rng_state), f"a state of {type(bits).__name__}"),
    ):
        if not sound:
            value = short(getattr(saved, what))
            raise CheckpointError(
                printable(f"{str(path)!r} is not a whole checkpoint: {what} is {value}, expected {expected}")
            )
    for part, arrays in saved.arrays.items():
        for name, like in state.optimizer.params.items() if arrays or part != BEST else ():
            array = arrays.get(name)
            if array is None or (array.shape, array.dtype.name) != (tuple(like.shape), dtype_name(like)):
                what = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise CheckpointError(f"{str(path)!r} is not a whole checkpoint: {part}.{name} is {what}")
            if not np.isfinite(array).all() or (part == "v" and (array < 0).any()):
                raise CheckpointError(
                    f"{str(path)!r} is not a whole checkpoint: {part}.{name} holds NaN, infinity or a negative square"
                )
        if len(arrays) > len(state.optimizer.params):
            raise CheckpointError(f"{str(path)!r} is not a whole checkpoint: {part} holds arrays of no parameter")


def _are_finite(values: list[Any]) -> bool:
    return all(type(value) is float and math.isfinite(value) for value in values)


def _is_state_of(kind: type[np.random.BitGenerator], saved: Mapping[str, Any]) -> bool:
    """Return whether a bit generator of that kind takes a state, and gives it back unchanged."""
    trial = kind()
    try:
        trial.state = saved
        return state_text(trial.state) == state_text(saved)
    except (ValueError, TypeError, KeyError, OverflowError, IndexError):
        return False
