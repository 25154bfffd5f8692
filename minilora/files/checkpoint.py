"""Stop and resume, bit for bit.

A checkpoint is one safetensors file: the parameters and Adam's two running means as tensors, and beside them, as JSON
text, everything else that the next epoch depends on: the step count, the generator's state, the losses so far and
the configuration. It takes the place of the one before it in one stroke, so that whoever is killed, at any moment,
leaves a whole one behind. Nothing in it is executed when it is read: there is no pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import backend_of
from ..checks import Array, dtype_name
from .checkpointfile import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from .errors import AdapterFileError
from .state import TrainingState
from .tensorfile import read_json
from .writing import written_whole

__all__ = ["CheckpointError", "claim_folder", "describe", "keep", "resume"]

FINGERPRINT_ROWS = 1024
"""Rows of the data, evenly spaced, that are hashed to tell one data set from another."""
PROBE_ENTRIES = 64
"""Numbers of the model's output that are kept, to tell one frozen base from another."""
MAX_SETTINGS = 1 << 16
"""Bytes of settings.json that we agree to parse."""


def check_same_configuration(path: str | Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another configuration, and name every difference."""
    differences = [
        f"{key} is {saved.get(key)!r} there and {asked.get(key)!r} here"
        for key in dict.fromkeys([*asked, *saved])
        if saved.get(key) != asked.get(key)
    ]
    if differences:
        raise CheckpointError(
            f"{str(path)!r} is a checkpoint of another configuration: {'; '.join(differences)}. Ask for the same, or "
            "name another checkpoint"
        )


def seed_of(rng: np.random.Generator) -> str:
    """Return what a generator was seeded with, in words: it stays the same while the generator moves on."""
    bits = rng.bit_generator
    seed = getattr(bits, "seed_seq", None)
    entropy, spawned = getattr(seed, "entropy", None), getattr(seed, "spawn_key", ())
    return f"{type(bits).__name__} of {entropy}{f', spawned {tuple(spawned)}' if spawned else ''}"


def fingerprint(data: Array) -> str:
    """Return a short hash of some rows of the data, to tell one data set from another."""
    step = max(1, data.shape[0] // FINGERPRINT_ROWS)
    rows = np.ascontiguousarray(backend_of(data).to_numpy(data[::step]))
    digest = hashlib.sha256(rows.tobytes()).hexdigest()[:16]
    return f"{dtype_name(data)} {tuple(data.shape)}, hash {digest}"


def describe(state: TrainingState, X: Array, Y: Array, batch_size: int, log_every: int) -> dict[str, Any]:
    """Return what must be the same for a training to go on, in words that name a difference.

    The number of epochs is not among them: a training that is done can be made longer. Nor are the parameters, which
    the checkpoint brings.
    """
    optimizer = state.optimizer
    return {
        "backend": backend_of(X).name,
        "batch_size": batch_size,
        "lr": optimizer.lr,
        "log_every": log_every,
        "rng": seed_of(state.rng),
        "model": type(state.model).__name__,
        **{f"params[{name!r}]": f"{dtype_name(p)} {tuple(p.shape)}" for name, p in optimizer.params.items()},
        "X": fingerprint(X),
        "Y": fingerprint(Y),
    }


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
    start = state.copy_arrays()
    try:
        # The state is tried on another generator first.
        type(state.rng.bit_generator)().state = checkpoint.rng_state
        asarray = backend_of(X).asarray
        params, m, v = (
            {name: asarray(array) for name, array in arrays.items()}
            for arrays in (checkpoint.params, checkpoint.optimizer["m"], checkpoint.optimizer["v"])
        )
        state.restore_arrays((params, {"t": checkpoint.optimizer["t"], "m": m, "v": v}))
        _check_probe(path, state, X, checkpoint.probe)
    except CheckpointError:
        state.restore_arrays(start)
        raise
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        state.restore_arrays(start)
        raise CheckpointError(f"{str(path)!r} is not a whole checkpoint: {error}") from error
    state.rng.bit_generator.state = checkpoint.rng_state
    state.epoch = checkpoint.epoch
    state.history.epochs[:], state.history.losses[:] = checkpoint.epochs, checkpoint.losses


def _probe(state: TrainingState, X: Array) -> np.ndarray:
    """Return some of the model's output on the first row of the data: it depends on what is frozen, too."""
    with np.errstate(over="ignore", invalid="ignore"):
        output = backend_of(X).to_numpy(state.model(X[:1])).reshape(-1)[:PROBE_ENTRIES]
    return np.nan_to_num(np.asarray(output, np.float64))


def _check_probe(path: str | Path, state: TrainingState, X: Array, saved: list[float]) -> None:
    """Refuse a checkpoint whose parameters, in this model, give another output than they gave."""
    now, then = _probe(state, X), np.array(saved, np.float64)
    tolerance = min(0.01, 1000 * float(np.finfo(dtype_name(next(iter(state.optimizer.params.values())))).eps))
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
    path = Path(folder) / "settings.json"
    try:
        if path.exists():
            check_same_configuration(folder, read_json(path, MAX_SETTINGS), settings)
            return
    except AdapterFileError as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())
