"""What the headers of files say: of an adapter its modules, whichever program wrote it, and of a model its weights.

Every format of an adapter comes down to this. For each module there are

    A (r, in)    B (out, r)    s            the weight W (out, in) becomes W + s B A

and perhaps a magnitude and a bias. A format says under which names, which way round, and what s is: see `.formats`.

A model is a folder of Hugging Face's layout, one shard or many; weights alone; or a .gguf file, whose names become
those of transformers where they have one. A weight in few bits has no shape here: its files pack it.

No tensor is read until it is asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import needed
from ..files.disk import read_json, read_start
from ..files.dtypes import FLOATS
from ..files.modelfolder import HEAD_WEIGHT, ties_head
from ..files.tensors import INDEX_NAME, MODEL_CONFIG, SINGLE_NAME, Weights, open_weights
from ..language.files.gguf import from_gguf, read_gguf
from ..texts import FileRefused, short
from ..variants.stackedlora import stacked_B
from .findings import Finding

Shape = tuple[int, ...]
PACKED = (".qweight", ".weight_packed", ".weight.absmax", ".weight_format", ".scales")
"""Ends of the names of what stands beside, or in the place of, a weight in few bits."""
GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


# --- tensors ---


@dataclass(frozen=True)
class Tensors:
    """The tensors of one file, or of the shards of one."""

    path: Path  # to name in a message
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]  # in the format's own names: "F32", "BF16", "Q4_K"
    sizes: Mapping[str, int]  # in bytes
    notes: Mapping[str, Any]  # what the header says besides
    read: Callable[[str], np.ndarray]  # one of them, as floats; what is none is refused
    part: Callable[[str, int, int], np.ndarray]  # some numbers of one, from one place to another, in its own type
    weights: Weights | None = None  # of safetensors


def open_tensors(path: Path) -> Tensors:
    """Open a .gguf file, a safetensors file, or the index of shards."""
    return _of_gguf(path) if _is_gguf(path) else _of_safetensors(path)


def _is_gguf(path: Path) -> bool:
    """Return whether a path is a file of llama.cpp's format, whatever it is called."""
    return not os.path.isdir(path) and read_start(path, 4) == b"GGUF"


def _of_safetensors(path: Path) -> Tensors:
    weights = open_weights(path)
    specs = {name: weights.spec(name) for name in weights.holder}

    return Tensors(
        weights.path,
        {name: spec.shape for name, spec in specs.items()},
        {name: spec.dtype for name, spec in specs.items()},
        {name: spec.end - spec.start for name, spec in specs.items()},
        {key: text for file in weights.files for key, text in file.metadata.items()},
        weights.read,
        lambda name, start, stop: weights.holder[name].numbers(name, start, stop),
        weights,
    )


def _of_gguf(path: Path) -> Tensors:
    dequantize = needed("gguf", "a .gguf file").dequantize
    in_file, fields = read_gguf(path)
    by_name = {tensor.name: tensor for tensor in in_file}

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        tensor = by_name[name]
        try:
            return np.asarray(dequantize(tensor.data[rows], tensor.tensor_type))
        except Exception as error:  # the package raises many kinds
            raise FileRefused(path, f"{short(name)} cannot be read: {error}") from error

    def part(name: str, start: int, stop: int) -> np.ndarray:
        tensor = by_name[name]
        row = math.prod(map(int, tensor.shape)) // len(tensor.data)
        return read(name, slice(start // row, -(-stop // row))).reshape(-1)[start % row :][: stop - start]

    return Tensors(
        path,
        {name: tuple(map(int, reversed(tensor.shape))) for name, tensor in by_name.items()},
        {name: getattr(tensor.tensor_type, "name", str(tensor.tensor_type)) for name, tensor in by_name.items()},
        {name: int(tensor.n_bytes) for name, tensor in by_name.items()},
        fields,
        read,
        part,
    )


# --- an adapter ---


@dataclass(frozen=True)
class Module:
    """What a file has for one module."""

    path: str  # of the module, or of a mixture's array, without the prefix of the format
    tensors: Tensors  # of the file
    parts: Mapping[str, str]  # the tensors' names: of "A", "B", "magnitude", "bias"
    kind: str = "linear"  # or "embedding", "conv", "experts"
    turned: str = ""  # the factors that lie transposed: "AB" for (in, r) and (r, out), "A" for (in, r) alone
    grouped: bool = False  # whether B's slow index is the expert
    experts: int = 1  # E, of which A (E r, in) and B (out, r E) have one each
    rank: int | None = None  # as it is configured; None where nothing says it
    alpha: float | None = None
    scaling: float | None = None  # s; None where nothing says it

    def shape(self, part: str) -> Shape | None:
        """Return the shape of a part as the file has it, None where it has none."""
        name = self.parts.get(part)
        return None if name is None else self.tensors.shapes[name]

    @cached_property
    def factors(self) -> tuple[Shape | None, Shape | None]:
        """The shapes of A as (r, in) and of B as (out, r), of experts (E r, in) and (out, r E)."""
        return self._lying("A"), self._lying("B")

    def _lying(self, part: str) -> Shape | None:
        """Return a factor's shape as that of a matrix, where it has one; a shape that is none stays as it is."""
        shape = self.shape(part)
        if shape is None or len(shape) < 2:
            return shape
        if self.kind == "experts" and len(shape) == 3:  # (E, r, in) and (E, out, r)
            E, rows, columns = shape
            return (E * rows, columns) if part == "A" else (rows, columns * E)
        if part in self.turned:
            return shape[::-1]
        return (shape[0], math.prod(shape[1:])) if self.kind == "conv" else shape

    @cached_property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The shapes of A and B where both are matrices with numbers in them."""
        A, B = self.factors
        if A is None or B is None or len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
            return None
        return (A[0], A[1]), (B[0], B[1])

    @cached_property
    def rank_in_file(self) -> int | None:
        """The rank as the shapes have it, None where they do not agree or a factor is missing."""
        if self.matrices is None:
            return None
        (rows, _), (_, columns) = self.matrices
        stored = [self.tensors.shapes[self.parts[part]] for part in "AB"]
        stacked = self.kind == "experts" and {len(shape) for shape in stored} != {2}
        if stacked and not all(len(shape) == 3 and shape[0] == self.experts for shape in stored):
            return None
        return rows // self.experts if rows == columns and rows % self.experts == 0 else None

    @cached_property
    def widths(self) -> tuple[int, int] | None:
        """(out, in) of the matrix that the factors make, None where they make none."""
        if self.matrices is None:
            return None
        (rows, width), (out, columns) = self.matrices
        fits = rows == columns or (self.kind == "conv" and rows % columns == 0)  # of a convolution with groups
        return (out, width) if fits else None

    def pairs(self, A: np.ndarray, B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return A (r, in) and B (out, r) of the factors as the file has them; of a mixture a pair for each expert."""
        if self.kind != "experts":
            A, B = (factor.T if part in self.turned else factor for part, factor in (("A", A), ("B", B)))
            return [(A.reshape(len(A), -1), B.reshape(len(B), -1))]
        if A.ndim == 3:
            return list(zip(A, B, strict=True))
        of_experts = B.reshape(len(B), self.experts, -1).swapaxes(0, 1) if self.grouped else stacked_B(B, self.experts)
        return list(zip(A.reshape(self.experts, -1, A.shape[1]), of_experts, strict=True))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as its files have it."""

    path: Path  # as it was named
    format: str  # in words: "a PEFT folder"
    tensors: Tensors
    modules: dict[str, Module]  # by path, in the order of layers
    config: Mapping[str, Any] | None = None  # adapter_config.json, where there is one
    config_path: Path | None = None
    saved: dict[str, str] = field(default_factory=dict)  # weights and biases that were trained in full: path, tensor
    base_copies: dict[str, str] = field(default_factory=dict)  # the base's own weights: module's path, tensor
    findings: tuple[Finding, ...] = ()  # what is wrong with names and configuration

    @property
    def is_peft(self) -> bool:
        """Whether it has a configuration of PEFT's."""
        return self.config is not None and "PEFT" in self.format

    def get(self, key: str, default: Any = None) -> Any:
        """Return what the configuration has for a key; null, and no configuration, is the default."""
        value = (self.config or {}).get(key)
        return default if value is None else value

    @property
    def numbers(self) -> int:
        """How many numbers the file's tensors hold."""
        return sum(math.prod(shape) for shape in self.tensors.shapes.values())

    @property
    def bytes(self) -> int:
        """How many bytes they take."""
        return sum(self.tensors.sizes.values())


# --- a model ---


@dataclass(frozen=True)
class ModelHeaders:
    """The headers of a model's files."""

    path: Path
    tensors: Tensors
    config: Mapping[str, Any]  # config.json, or a .gguf file's keys
    tied: bool  # whether the head is the embedding

    @property
    def is_gguf(self) -> bool:
        """Whether it is a file of llama.cpp's."""
        return self.tensors.weights is None

    @cached_property
    def names(self) -> dict[str, str]:
        """Tensors' names in the file, by their names in transformers."""
        return {from_gguf(name) if self.is_gguf else name: name for name in self.tensors.shapes}

    @cached_property
    def modules(self) -> dict[str, Shape | None]:
        """The shape of each module's weight, by the module's path; None of one in few bits. Norms are left out."""
        shapes: dict[str, Shape | None] = {}
        for name, own in self.names.items():
            end = next((end for end in PACKED[:2] if name.endswith(end)), None)
            if end is not None:
                shapes[name.removesuffix(end)] = None
            elif name.endswith(".weight"):
                module, shape = name.removesuffix(".weight"), self.tensors.shapes[own]
                packed = any(f"{module}{end}" in self.tensors.shapes for end in PACKED)
                dtype = self.tensors.dtypes[own]
                if packed or not (self.is_gguf or dtype in FLOATS or dtype.startswith("F8")):
                    shapes[module] = None
                elif len(shape) > 1:
                    shapes[module] = shape
        return shapes

    @cached_property
    def arrays(self) -> dict[str, Shape]:
        """The shapes of tensors with three axes or more that are no module's weight, such as a mixture's experts."""
        return {
            name: self.tensors.shapes[own]
            for name, own in self.names.items()
            if len(self.tensors.shapes[own]) > 2 and not name.endswith(".weight")
        }

    @cached_property
    def paths(self) -> list[str]:
        """The paths of modules and arrays."""
        return [*self.modules, *self.arrays]

    def bias(self, module: str) -> Shape | None:
        """Return the shape of a module's bias, where it has one."""
        own = self.names.get(f"{module}.bias")
        return None if own is None else self.tensors.shapes[own]


def open_model(path: Path) -> ModelHeaders:
    """Read a model's headers."""
    file = path
    if os.path.isdir(path) and not any(os.path.exists(path / name) for name in (INDEX_NAME, SINGLE_NAME)):
        files = [*path.glob("*.gguf"), *path.glob("*.safetensors")]
        if len(files) != 1:
            what = f"expected {SINGLE_NAME}, {INDEX_NAME} or one .gguf or .safetensors file, and there are {len(files)}"
            raise FileRefused(path, what)
        (file,) = files
    tensors = open_tensors(file)
    if tensors.weights is None:
        tied = not any(from_gguf(name) == HEAD_WEIGHT for name in tensors.shapes)
        return ModelHeaders(path, tensors, tensors.notes, tied)
    beside = tensors.weights.path.parent / MODEL_CONFIG
    config: Mapping[str, Any] = read_json(beside) if os.path.exists(beside) else {}
    text = config.get("text_config")
    tied = ties_head(tensors.weights) or (isinstance(text, dict) and text.get("tie_word_embeddings") is True)
    return ModelHeaders(path, tensors, config, tied and HEAD_WEIGHT not in tensors.shapes)
