"""The headers of adapter and model files: the modules of an adapter in any format, with a model's weights.

All adapter formats are reduced to the same parts. Each module has

    A (r, in)    B (out, r)    s            the weight W (out, in) becomes W + s B A

and possibly a magnitude and a bias. The format determines their names, their orientation and s: see `.formats`.

A model is a Hugging Face folder with one or more shards, only its weights, or a .gguf file, whose tensor names are
translated to those of transformers if there is one. A quantised weight has no shape here, since its files pack it.

No tensor is read before it is needed.
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
"""Suffixes of tensors that accompany or replace a quantised weight."""
GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


# --- tensors ---


@dataclass(frozen=True)
class Tensors:
    """The tensors of one file, or of all shards of one model or adapter."""

    path: Path  # for messages
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]  # in the format's own names: "F32", "BF16", "Q4_K"
    sizes: Mapping[str, int]  # in bytes
    metadata: Mapping[str, Any]  # of the header
    read: Callable[[str], np.ndarray]  # reads a tensor as floats; other types are refused
    part: Callable[[str, int, int], np.ndarray]  # reads numbers start:stop of a flattened tensor, in its own type
    weights: Weights | None = None  # None for a .gguf file


def open_tensors(path: Path) -> Tensors:
    """Open a .gguf file, a safetensors file, or an index of shards."""
    return _of_gguf(path) if _is_gguf(path) else _of_safetensors(path)


def _is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, whatever its name."""
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
        except Exception as error:  # the gguf package raises many types of exceptions
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
    """One adapted module, as its file stores it."""

    path: str  # of the module, or of a mixture's array, without the format's prefix
    tensors: Tensors  # of the whole file
    parts: Mapping[str, str]  # the names of the tensors "A", "B", "magnitude" and "bias"
    kind: str = "linear"  # or "embedding", "conv", "experts"
    transposed: str = ""  # the factors stored transposed: "AB" for (in, r) and (r, out), "A" for only (in, r)
    grouped: bool = False  # whether the expert is the slow index of B's columns
    experts: int = 1  # E; then A is (E r, in) and B is (out, r E)
    rank: int | None = None  # as configured; None if unknown
    alpha: float | None = None
    scaling: float | None = None  # s; None if unknown

    def shape(self, part: str) -> Shape | None:
        """Return the stored shape of a part, or None if the file does not have it."""
        name = self.parts.get(part)
        return None if name is None else self.tensors.shapes[name]

    @cached_property
    def factors(self) -> tuple[Shape | None, Shape | None]:
        """The shapes of A as (r, in) and of B as (out, r); for experts (E r, in) and (out, r E)."""
        return self._matrix_shape("A"), self._matrix_shape("B")

    def _matrix_shape(self, part: str) -> Shape | None:
        """Return a factor's shape as a matrix; return a shape that does not fit its kind unchanged."""
        shape = self.shape(part)
        if shape is None or len(shape) < 2:
            return shape
        if self.kind == "experts" and len(shape) == 3:  # (E, r, in) and (E, out, r)
            E, rows, columns = shape
            return (E * rows, columns) if part == "A" else (rows, columns * E)
        if part in self.transposed:
            return shape[::-1]
        return (shape[0], math.prod(shape[1:])) if self.kind == "conv" else shape

    @cached_property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """The shapes of A and B; None unless both are nonempty matrices."""
        A, B = self.factors
        if A is None or B is None or len(A) != 2 or len(B) != 2 or 0 in (*A, *B):
            return None
        return (A[0], A[1]), (B[0], B[1])

    @cached_property
    def rank_in_file(self) -> int | None:
        """The rank that the shapes imply; None if they disagree or a factor is missing."""
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
        """The shape (out, in) of the factors' product; None if they cannot be multiplied."""
        if self.matrices is None:
            return None
        (rows, width), (out, columns) = self.matrices
        fits = rows == columns or (self.kind == "conv" and rows % columns == 0)  # a grouped convolution
        return (out, width) if fits else None

    def pairs(self, A: np.ndarray, B: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the stored factors as pairs of A (r, in) and B (out, r), one for each expert of a mixture."""
        if self.kind != "experts":
            A, B = (factor.T if part in self.transposed else factor for part, factor in (("A", A), ("B", B)))
            return [(A.reshape(len(A), -1), B.reshape(len(B), -1))]
        if A.ndim == 3:
            return list(zip(A, B, strict=True))
        of_experts = B.reshape(len(B), self.experts, -1).swapaxes(0, 1) if self.grouped else stacked_B(B, self.experts)
        return list(zip(A.reshape(self.experts, -1, A.shape[1]), of_experts, strict=True))


@dataclass(frozen=True)
class AdapterFile:
    """An adapter, as its files store it."""

    path: Path  # as given
    format: str  # a description: "a PEFT folder"
    tensors: Tensors
    modules: dict[str, Module]  # by path, in layer order
    config: Mapping[str, Any] | None = None  # adapter_config.json; None if missing
    config_path: Path | None = None
    saved: dict[str, str] = field(default_factory=dict)  # path and tensor of fully trained weights and biases
    base_copies: dict[str, str] = field(default_factory=dict)  # module and tensor of copies of the base's weights
    findings: tuple[Finding, ...] = ()  # about names and configuration

    @property
    def is_peft(self) -> bool:
        """Whether the adapter has a PEFT configuration."""
        return self.config is not None and "PEFT" in self.format

    def get(self, key: str, default: Any = None) -> Any:
        """Return the configuration's value for a key, or the default if it is null, missing, or there is none."""
        value = (self.config or {}).get(key)
        return default if value is None else value

    @property
    def numbers(self) -> int:
        """The number of entries of all tensors in the file."""
        return sum(math.prod(shape) for shape in self.tensors.shapes.values())

    @property
    def bytes(self) -> int:
        """The size of all tensors in the file, in bytes."""
        return sum(self.tensors.sizes.values())


# --- a model ---


@dataclass(frozen=True)
class ModelHeaders:
    """The headers of a model's files."""

    path: Path
    tensors: Tensors
    config: Mapping[str, Any]  # config.json, or the metadata of a .gguf file
    tied: bool  # whether the head is the embedding

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a .gguf file."""
        return self.tensors.weights is None

    @cached_property
    def names(self) -> dict[str, str]:
        """The tensors' names in the file, keyed by their names in transformers."""
        return {from_gguf(name) if self.is_gguf else name: name for name in self.tensors.shapes}

    @cached_property
    def modules(self) -> dict[str, Shape | None]:
        """The shape of each module's weight, by the module's path; None if quantised. Norms are omitted."""
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
        """The shapes of tensors with three or more axes that are not a module's weight, such as a mixture's experts."""
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
        """Return the shape of a module's bias, or None if it has none."""
        own = self.names.get(f"{module}.bias")
        return None if own is None else self.tensors.shapes[own]


def open_model(path: Path) -> ModelHeaders:
    """Read a model's headers."""
    file = path
    if os.path.isdir(path) and not any(os.path.exists(path / name) for name in (INDEX_NAME, SINGLE_NAME)):
        files = [*path.glob("*.gguf"), *path.glob("*.safetensors")]
        if len(files) != 1:
            what = f"expected {SINGLE_NAME}, {INDEX_NAME} or one .gguf or .safetensors file, but there are {len(files)}"
            raise FileRefused(path, what)
        (file,) = files
    tensors = open_tensors(file)
    if tensors.weights is None:
        tied = not any(from_gguf(name) == HEAD_WEIGHT for name in tensors.shapes)
        return ModelHeaders(path, tensors, tensors.metadata, tied)
    beside = tensors.weights.path.parent / MODEL_CONFIG
    config: Mapping[str, Any] = read_json(beside) if os.path.exists(beside) else {}
    text = config.get("text_config")
    tied = ties_head(tensors.weights) or (isinstance(text, dict) and text.get("tie_word_embeddings") is True)
    return ModelHeaders(path, tensors, config, tied and HEAD_WEIGHT not in tensors.shapes)
