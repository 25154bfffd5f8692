"""Stop and resume, bit for bit.

A checkpoint is one safetensors file: the parameters and Adam's two running means as tensors, and beside them, as JSON
text, everything else that the next epoch depends on: the step count, the generator's state, the losses so far and
the configuration. It takes the place of the one before it in one stroke, so that whoever is killed, at any moment,
leaves a whole one behind. Nothing in it is executed when it is read: there is no pickle.

A checksum notices damage, and contents that contradict each other, the data or the model are refused. A file that
somebody forges until all of it agrees cannot be told from a true one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, check_path, dtype_name
from ..layer import Layer, parts, walk
from .checkpointfile import Checkpoint, CheckpointError, load_checkpoint, make_folder, save_checkpoint, state_text
from .errors import AdapterFileError, printable, short
from .state import TrainingState
from .tensorfile import read_json
from .writing import written_whole

__all__ = ["CheckpointError", "claim_folder", "describe", "keep", "resume"]

FINGERPRINT_NUMBERS = 1 << 20
"""Numbers of an array that are hashed at a time."""
PROBE_ENTRIES = 64
"""Numbers of the model's output that are kept, to tell one frozen base from another."""
MOST_MEAN = 60.0
"""m^2 is at most (1 - beta1)^2 / ((1 - beta2) (1 - beta1^2 / beta2)) = 53 times v, whatever the gradients were."""
MAX_SETTINGS = 1 << 16
"""Bytes of settings.json that we agree to parse."""


def check_same_configuration(path: str | Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another configuration, and name every difference."""
    differences = [
        f"{key} is {short(saved.get(key))} there and {short(asked.get(key))} here"
        for key in dict.fromkeys([*asked, *saved])
        if saved.get(key) != asked.get(key)
    ]
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


def describe(
    state: TrainingState, X: Array, Y: Array, batch_size: int, log_every: int, steps: int, held_out: Any
) -> dict[str, Any]:
    """Return what must be the same for a training to go on, in words that name a difference.

    The number of epochs is not among them: a training that is done can be made longer. Nor are the parameters, which
    the checkpoint brings. All rows of the data are read once for this, those in a file too.
    """
    optimizer = state.optimizer
    return {
        "backend": backend_of(X).name,
        "batch_size": batch_size,
        "steps": steps,
        "lr": optimizer.lr,
        "log_every": log_every,
        "rng": seed_of(state.rng),
        "model": type(state.model).__name__,
        **{f"params[{name!r}]": f"{dtype_name(p)} {tuple(p.shape)}" for name, p in optimizer.params.items()},
        **frozen(state.model, optimizer.params),
        "X": fingerprint(X),
        "Y": fingerprint(Y),
        **({} if held_out is None else {"held_out": [fingerprint(array) for array in held_out]}),
    }


def frozen(model: Any, params: Mapping[str, Array]) -> dict[str, str]:
    """Return what the model computes with and does not train: arrays by their fingerprints, numbers as they are."""
    trained = {id(p) for p in params.values()}
    found: dict[str, str] = {}
    for path, layer in walk(model):
        if path:
            found[path] = type(layer).__name__
        for name, value in vars(layer).items():
            if isinstance(value, (bool, int, float, str, tuple)):
                found[f"{path}.{name}".removeprefix(".")] = repr(value)
        for name, part in parts(layer):
            if not isinstance(part, Layer) and id(part) not in trained:
                found[f"{path}.{name}".removeprefix(".")] = fingerprint(part)
    return {f"frozen[{name!r}]": text for name, text in found.items()}


def keep(path: str | Path, state: TrainingState, X: Array, configuration: Mapping[str, Any]) -> None:
    """Write down where a training stands after an epoch."""
    params, optimizer = state.copy_arrays()
    checkpoint = Checkpoint(
        params=params,
        optimizer=optimizer,
        rng_state=state.rng.bit_generator.state,
        epoch=state.epoch,
        epochs=state.history.epochs,
        losses=state.history.losses,
        probe=_probe(state, X).tolist(),
        configuration=configuration,
    )
    save_checkpoint(path, checkpoint)


def resume(path: str | Path, state: TrainingState, X: Array, configuration: Mapping[str, Any], epochs: int) -> None:
    """Put a training where a checkpoint left it; where there is none yet, write one of the start.

    Raises
    ------
    CheckpointError
        If the checkpoint is not of this training. Nothing has changed then.
    """
    path = check_path("checkpoint", path)
    checkpoint = load_checkpoint(path)
    if checkpoint is None:
        keep(path, state, X, configuration)  # better that it fails now than after an epoch
        return
    check_same_configuration(path, checkpoint.configuration, configuration)
    if checkpoint.epoch > epochs:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of another configuration: epochs is {epochs} here, and "
            f"{checkpoint.epoch} are done there"
        )
    _check_contents(path, checkpoint, state, configuration)
    start = state.copy_arrays()
    try:
        asarray = backend_of(X).asarray
        params, m, v = (
            {name: asarray(array) for name, array in arrays.items()}
            for arrays in (checkpoint.params, checkpoint.optimizer["m"], checkpoint.optimizer["v"])
        )
        state.restore_arrays((params, {"t": checkpoint.optimizer["t"], "m": m, "v": v}))
        _check_probe(path, state, X, checkpoint.probe)
    except BaseException:
        state.restore_arrays(start)
        raise
    state.rng.bit_generator.state = checkpoint.rng_state
    state.epoch = checkpoint.epoch
    state.history.epochs[:], state.history.losses[:] = checkpoint.epochs, checkpoint.losses


def _check_contents(path: Path, checkpoint: Checkpoint, state: TrainingState, configuration: Mapping[str, Any]) -> None:
    """Refuse numbers that a training of this configuration cannot have written, before any of them is used."""
    steps, epoch = configuration["steps"], checkpoint.epoch
    logged = list(range(configuration["log_every"], epoch + 1, configuration["log_every"]))
    bits = state.rng.bit_generator
    for what, sound, expected in (
        ("epoch", epoch >= 0, "at least 0"),
        ("t", checkpoint.optimizer["t"] == epoch * steps, f"{epoch} epochs of {steps} steps"),
        ("epochs", json.dumps(checkpoint.epochs) == json.dumps(logged), f"{logged}"),  # 2.0 is no 2
        ("losses", len(checkpoint.losses) == len(logged) and _are_finite(checkpoint.losses), "finite numbers"),
        ("probe", _are_finite(checkpoint.probe), "finite numbers"),
        ("rng_state", _is_state_of(type(bits), checkpoint.rng_state), f"a state of {type(bits).__name__}"),
    ):
        if not sound:
            value = checkpoint.optimizer["t"] if what == "t" else getattr(checkpoint, what)
            raise CheckpointError(
                printable(f"{str(path)!r} is not a whole checkpoint: {what} is {short(value)}, expected {expected}")
            )
    for part, arrays in (("params", checkpoint.params), *((k, checkpoint.optimizer[k]) for k in ("m", "v"))):
        for name, like in state.optimizer.params.items():
            array = arrays.get(name)
            if array is None or (array.shape, array.dtype.name) != (tuple(like.shape), dtype_name(like)):
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise CheckpointError(f"{str(path)!r} is not a whole checkpoint: {part}.{name} is {found}")
            if not np.isfinite(array).all() or (part == "v" and (array < 0).any()):
                raise CheckpointError(
                    f"{str(path)!r} is not a whole checkpoint: {part}.{name} holds NaN, infinity or a negative square"
                )
        if len(arrays) > len(state.optimizer.params):
            raise CheckpointError(f"{str(path)!r} is not a whole checkpoint: {part} holds arrays of no parameter")
    for name, m in checkpoint.optimizer["m"].items():
        v = checkpoint.optimizer["v"][name].astype("float64")
        # What is added is for squares so small that they are zero in v.
        if (m.astype("float64") ** 2 > (MOST_MEAN * v + 1e-36 if epoch else 0)).any() or (v.any() and not epoch):
            raise CheckpointError(
                f"{str(path)!r} is not a whole checkpoint: m.{name} and v.{name} are not means of the same gradients"
            )


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


def _probe(state: TrainingState, X: Array) -> np.ndarray:
    """Return some of the model's output on the first row of the data: it depends on what is frozen, too."""
    with np.errstate(over="ignore", invalid="ignore"):
        output = backend_of(X).to_numpy(state.model(X[:1])).ravel()[:PROBE_ENTRIES]
    return np.asarray(np.nan_to_num(output))


def _check_probe(path: str | Path, state: TrainingState, X: Array, saved: list[float]) -> None:
    """Refuse a checkpoint whose parameters, in this model, give another output than they gave."""
    now, then = _probe(state, X), np.array(saved)
    tolerance = 1000 * float(np.finfo(dtype_name(next(iter(state.optimizer.params.values())))).eps)
    tolerance *= float(np.abs(now).max())
    if now.shape != then.shape or not (np.abs(now - then) <= tolerance).all():
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of another configuration: what is frozen in the model, its base's weight "
            "or its alpha, is not the same"
        )


def claim_folder(folder: str | Path, settings: Mapping[str, Any]) -> None:
    """Keep a folder of checkpoints for one configuration: note it where it is new, and refuse another.

    Raises
    ------
    CheckpointError
        If the folder belongs to another configuration, naming the differences.
    """
    path = check_path("checkpoint", folder) / "settings.json"
    try:
        if os.path.lexists(path):
            check_same_configuration(folder, read_json(path, MAX_SETTINGS), settings)
            return
    except AdapterFileError as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    make_folder(path.parent)
    with written_whole(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
