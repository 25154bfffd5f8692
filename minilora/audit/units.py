"""The tensors of a model, unit by unit: a unit is a tensor, or an array of a mixture's experts however it is stored.

So two folders can be compared of which one has a tensor for all experts, and the other one for each. A unit has one
matrix, or one for each expert, and is read some rows at a time, in the order of rows that transformers has.

    name in the files                                         unit
    model.layers.0.mlp.experts.3.up_proj.weight               model.layers.0.mlp.experts.gate_up_proj, matrix 3
    model.layers.0.block_sparse_moe.experts.3.w3.weight       the same
    model.norm.weight                                         the same name, one column
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..files.dtypes import FLOATS
from ..files.experts import MIXTRAL, MIXTRAL_MLP, PARTS
from ..files.tensors import NF4_STATE, type_named
from ..language.files.gguf import is_permuted
from ..language.files.nf4files import NF4Weights
from ..layers.rotary import halves_from_interleaved
from ..texts import FileRefused
from .headers import GGUF_FLOATS, ModelHeaders

BLOCK = 1 << 17
"""Numbers of a matrix that are compared at a time."""
ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>[^.]+)")
OURS = {theirs: ours for ours, theirs in MIXTRAL.items()}
ARRAYS = {part: array for array, parts in PARTS.items() for part in parts}
"""The array that has each layer of one expert."""


def unit_of(path: str) -> tuple[str, int | None, str]:
    """Return the unit of a module's path, and the expert and the part of its matrix that the module is."""
    path = path.replace(f".{MIXTRAL_MLP}.", ".mlp.")
    match = ONE_EXPERT.fullmatch(path)
    name = OURS.get(match["name"], match["name"]) if match else ""
    if match is None or name not in ARRAYS:
        return path, None, ""
    return f"{match['experts']}.{ARRAYS[name]}", int(match["number"]), name


@dataclass(frozen=True)
class Matrix:
    """One matrix of a unit: the same number of rows from each of some tensors, one below the other."""

    numbers: Callable[[str, int, int], np.ndarray]  # some of a tensor's
    dtype: Any  # of the numbers, see `Source.dtype`
    parts: tuple[tuple[str, int], ...]  # the tensors, and where in each the matrix begins
    rows: int  # of each part
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""
        return self.rows * len(self.parts), self.columns

    @property
    def name(self) -> str:
        """What to call it: the name of its first tensor."""
        return self.parts[0][0]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Return some rows."""
        blocks = []
        for i, (name, first) in enumerate(self.parts):
            start, stop = max(top - i * self.rows, 0), min(bottom - i * self.rows, self.rows)
            if start < stop:
                numbers = self.numbers(name, first + start * self.columns, first + stop * self.columns)
                blocks.append(numbers.reshape(-1, self.columns))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def cut(self, top: int, bottom: int) -> Matrix:
        """Return some of its rows as a matrix: of one tensor any, of several those of whole ones."""
        if len(self.parts) > 1:
            return replace(self, parts=self.parts[top // self.rows : bottom // self.rows])
        ((name, first),) = self.parts
        return replace(self, parts=((name, first + top * self.columns),), rows=bottom - top)

    def blocks(self, step: int = 1, first: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield the ends of blocks of rows, each but the last a multiple of `step`; the first may have fewer rows."""
        count, height = self.shape[0], max(1, BLOCK // max(1, self.columns) // step) * step
        start, stop = 0, min(first or height, height)
        while start < count:
            yield start, min(stop, count)
            start, stop = stop, stop + height


class Source:
    """A model's files, whose tensors are read in parts."""

    def __init__(self, model: ModelHeaders) -> None:
        self.model, self.nf4, self.whole = model, None, ("", np.empty(0))
        weights = model.tensors.weights
        if weights is not None and any(name.endswith(NF4_STATE) for name in weights.holder):
            self.nf4 = NF4Weights(model.path, weights, model.config.get("quantization_config"))
        self.coded = {} if self.nf4 is None else self.nf4.shapes

    @property
    def quantised_in(self) -> Any:
        """The type in which a folder in NF4 is dequantised."""
        if self.nf4 is None or not self.nf4.states:
            return None
        named = next(iter(self.nf4.states.values())).dtype
        return next((dtype for dtype in FLOATS.values() if dtype.name == named), None)

    def dtype(self, name: str) -> Any:
        """Return the type of a tensor's numbers: float32 of those in few bits, an unsigned one of what is no float."""
        if name in self.coded:
            return np.dtype(np.float32)
        kind = self.model.tensors.dtypes[self.model.names[name]]
        if self.model.is_gguf:
            return np.dtype(np.float16 if kind == "F16" else np.float32)
        return type_named(kind)

    def is_exact(self, name: str) -> bool:
        """Return whether a tensor holds floats that we compute with; require that the order of its rows is known."""
        if self._is_permuted(name):
            head_dim(self.model)
        return not self.in_few_bits(name) and self.dtype(name) in FLOATS.values()

    def in_few_bits(self, name: str) -> bool:
        """Return whether a tensor is quantised."""
        dtypes, names = self.model.tensors.dtypes, self.model.names
        return name in self.coded or (self.model.is_gguf and dtypes[names[name]] not in GGUF_FLOATS)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, of one in NF4 that of the weight."""
        return self.coded[name] if name in self.coded else self.model.tensors.shapes[self.model.names[name]]

    def _is_permuted(self, name: str) -> bool:
        """Return whether a tensor's rows lie as llama.cpp has those of a Llama's W_q and W_k."""
        kind = self.model.config.get("general.architecture") if self.model.is_gguf else None
        return kind == "llama" and is_permuted(name.rpartition(".")[0], kind)

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return some of a tensor's numbers."""
        if not self._is_permuted(name) and name not in self.coded:
            return self.model.tensors.part(self.model.names[name], start, stop)
        if self.whole[0] != name:
            if self.nf4 is not None and name in self.coded:
                self.whole = name, np.asarray(self.nf4.read(name).weight)
            else:
                array = self.model.tensors.read(self.model.names[name])
                self.whole = name, halves_from_interleaved(array, head_dim(self.model))
        return self.whole[1].reshape(-1)[start:stop]

    @cached_property
    def units(self) -> dict[str, list[Matrix]]:
        """The matrices of each unit, in the order of the files."""
        packed = set() if self.nf4 is None else self.nf4.tensors - {*self.coded}
        found: dict[str, list[Matrix]] = {}
        apart: dict[str, dict[int, dict[str, str]]] = {}
        for name in self.model.names:
            unit, expert, part = unit_of(name.removesuffix(".weight"))
            if expert is not None and name.endswith(".weight"):
                apart.setdefault(unit, {}).setdefault(expert, {})[part] = name
                found.setdefault(unit, [])
            elif name not in packed:
                key = f"{unit}.weight" if name.endswith(".weight") else unit
                stacked = key != f"{unit}.weight" and len(self.shape(name)) == 3
                E, *shape = self.shape(name) if stacked else (1, *self.shape(name))
                found[key] = [self._matrix([name], shape, e) for e in range(E)]
        for unit, experts in apart.items():
            for _, of_it in sorted(experts.items()):
                names = [of_it[part] for part in PARTS[unit.rpartition(".")[2]] if part in of_it]
                found[unit].append(self._matrix(names, self.shape(names[0])))
        return found

    def _matrix(self, names: list[str], shape: Sequence[int], number: int = 0) -> Matrix:
        """Return the matrix of some tensors that have a shape each; of a tensor with several the one of a number."""
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        places = tuple((name, number * rows * columns) for name in names)
        return Matrix(self.part, self.dtype(names[0]), places, rows, columns)


def head_dim(model: ModelHeaders) -> int:
    """Return how many rows of W_q a head has."""
    config, kind = model.config, model.config.get("general.architecture")
    of_gguf = tuple(f"{kind}.{name}" for name in ("attention.key_length", "embedding_length", "attention.head_count"))
    names = of_gguf if model.is_gguf else ("head_dim", "hidden_size", "num_attention_heads")
    width, whole, heads = (int(config.get(name) or 0) for name in names)
    if not width and not (whole and heads):
        raise FileRefused(model.path, f"nothing says how wide a head is: there is no {names[0]}")
    return width or whole // heads


def in_memory(array: np.ndarray, like: Matrix) -> Matrix:
    """Return an array as a matrix with the columns of another one."""
    numbers = array.reshape(-1)
    rows = array.size // like.columns
    return Matrix(lambda _, start, stop: numbers[start:stop], array.dtype, ((like.name, 0),), rows, like.columns)
