"""A training between two epochs, as a file: tensors, and beside them, as JSON text, everything else.

There is no pickle: nothing in it is executed when it is read.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ..backend import backend_of
from ..checks import Array
from .errors import AdapterFileError, short
from .tensorfile import TensorFile, parse_json
from .writing import written_whole

METADATA_KEY, CHECKSUM_KEY = "minilora_checkpoint", "crc32"
VERSION = 2
PARTS = ("params", "m", "v")
"""The tensors' names are ``params.NAME``, ``m.NAME`` and ``v.NAME``."""
KINDS = {
    "t": int,
    "rng_state": dict,
    "epoch": int,
    "epochs": list,
    "losses": list,
    "probe": list,
    "configuration": dict,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be resumed: it is damaged, or of another configuration; the message says which."""


@dataclass(frozen=True)
class Checkpoint:
    """A training between two epochs.

    Attributes
    ----------
    params : dict of str to array
        The trained arrays.
    optimizer : dict
        As `Adam.state_dict` returns it.
    rng_state : dict
        The state of the generator that draws the batches.
    epoch : int
        The number of epochs done.
    epochs, losses : list
        The history up to there.
    probe : list of float
        The model's output on the first row of the data: it depends on what is frozen, too.
    configuration : dict
        What must be the same for the training to go on.
    """

    params: Mapping[str, Array]
    optimizer: Mapping[str, Any]
    rng_state: Mapping[str, Any]
    epoch: int
    epochs: list[int]
    losses: list[float]
    probe: list[float]
    configuration: Mapping[str, Any]


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, in the place of the one that may be there.

    Raises
    ------
    OSError
        If the file cannot be written. The one before it is left as it was.
    """
    parts = {"params": checkpoint.params, "m": checkpoint.optimizer["m"], "v": checkpoint.optimizer["v"]}
    tensors = {
        f"{part}.{name}": np.ascontiguousarray(backend_of(array).to_numpy(array))
        for part, arrays in parts.items()
        for name, array in arrays.items()
    }
    rest = {
        "version": VERSION,
        "t": checkpoint.optimizer["t"],
        "rng_state": checkpoint.rng_state,
        "epoch": checkpoint.epoch,
        "epochs": checkpoint.epochs,
        "losses": checkpoint.losses,
        "probe": checkpoint.probe,
        "configuration": checkpoint.configuration,
    }
    text = state_text(rest)
    metadata = {METADATA_KEY: text, CHECKSUM_KEY: _checksum(tensors, text)}
    path = Path(path)
    make_folder(path.parent)
    with written_whole(path) as file:
        file.write(save(tensors, metadata=metadata))


def make_folder(folder: Path) -> None:
    """Make the folder that checkpoints go to, where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be kept in {str(folder)!r}: {error}") from error


def state_text(state: Mapping[str, Any]) -> str:
    """Return a state as JSON.

    Python writes a float with as many digits as it takes to read the same float again. Some bit generators keep arrays
    in their state, and take lists back.
    """
    return json.dumps(state, default=lambda array: array.tolist())


def load_checkpoint(path: str | Path) -> Checkpoint | None:
    """Read a checkpoint; None where there is no such file yet.

    Raises
    ------
    CheckpointError
        If the file is not a whole checkpoint.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return None
    try:
        file = TensorFile(path)
        rest = parse_json(path, file.metadata.get(METADATA_KEY, "{}").encode(), "checkpoint's text")
        if rest.get("version") != VERSION:
            raise CheckpointError(
                f"{str(path)!r} is not a checkpoint of this version of minilora: its version is "
                f"{short(rest.get('version'))}, expected {VERSION}"
            )
        with file.opened() as opened:
            tensors = {key: file.read(key, opened) for key in file.tensors}
        if file.metadata.get(CHECKSUM_KEY) != _checksum(tensors, file.metadata[METADATA_KEY]):
            raise CheckpointError(f"{str(path)!r} is damaged: its checksum is not that of its contents")
        parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in PARTS}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise CheckpointError(f"{str(path)!r} holds {short(key)}, expected only {', '.join(PARTS)}")
            parts[part][name] = tensor
        for key, kind in KINDS.items():
            if type(rest.get(key)) is not kind:
                raise CheckpointError(f"{str(path)!r}: {key} is {short(rest.get(key))}, expected {kind.__name__}")
        return Checkpoint(
            params=parts["params"],
            optimizer={"t": rest["t"], "m": parts["m"], "v": parts["v"]},
            **{key: rest[key] for key in KINDS if key != "t"},
        )
    except (AdapterFileError, KeyError, UnicodeError) as error:
        raise CheckpointError(f"the checkpoint cannot be read: {error}") from error


def _checksum(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """Return a number that a damaged file does not have, but by a chance of 1 in 4 billion."""
    total = zlib.crc32(text.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].ravel().view(np.uint8).data, zlib.crc32(name.encode(), total))
    return str(total)
