"""The tensors of a file, whichever format it has: their names, shapes and types, and how one is read.

Headers alone are read until a tensor is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import FileRefused, needed, short
from ..files.disk import read_start
from ..files.tensors import Weights, open_weights
from ..language.gguf import read_gguf

GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Tensors:
    """The tensors of one file, or of the shards of one."""

    path: Path  # to name in a message
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # in the format's own names: "F32", "BF16", "Q4_K"
    sizes: Mapping[str, int]  # in bytes
    notes: Mapping[str, Any]  # what the header says besides
    read: Callable[[str], np.ndarray]  # one of them, as floats; what is none is refused
    base: Weights | None = None  # of safetensors


def open_tensors(path: Path) -> Tensors:
    """Open a .gguf file, a safetensors file, or the index of shards; refuse what is damaged."""
    return _of_gguf(path) if is_gguf(path) else _of_safetensors(path)


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file of llama.cpp's format, whatever it is called."""
    return not os.path.isdir(path) and read_start(path, 4) == GGUF_MAGIC


def _of_safetensors(path: Path) -> Tensors:
    base = open_weights(path)
    specs = {name: base.spec(name) for name in base.holder}
    return Tensors(
        base.path,
        {name: spec.shape for name, spec in specs.items()},
        {name: spec.dtype for name, spec in specs.items()},
        {name: spec.end - spec.start for name, spec in specs.items()},
        {key: text for file in base.files for key, text in file.metadata.items()},
        base.read,
        base,
    )


def _of_gguf(path: Path) -> Tensors:
    dequantize = needed("gguf", "a .gguf file").dequantize
    in_file, fields = read_gguf(path)
    by_name = {tensor.name: tensor for tensor in in_file}

    def read(name: str) -> np.ndarray:
        tensor = by_name[name]
        try:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type))
        except Exception as error:  # the package raises many kinds
            raise FileRefused(path, f"{short(name)} cannot be read: {error}") from error

    return Tensors(
        path,
        {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in by_name.items()},
        {name: getattr(tensor.tensor_type, "name", str(tensor.tensor_type)) for name, tensor in by_name.items()},
        {name: int(tensor.n_bytes) for name, tensor in by_name.items()},
        fields,
        read,
    )
