"""The units of a model: a unit is a tensor, or an array of a mixture's experts, whichever way the files store it.

So a folder with one tensor for all experts can be compared with a folder that has one for each. A unit has one matrix,
or one for each expert. It is read a few rows at a time, with rows in transformers' order.

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
from ..files.experts import EXPERT_PARTS, MIXTRAL, MIXTRAL_MLP
from ..files.tensors import NF4_STATE, numpy_dtype
from ..language.files.gguf import is_permuted
from ..language.files.nf4files import NF4Weights
from ..layers.rotary import halves_from_interleaved
from ..texts import FileRefused, short
from .headers import GGUF_FLOATS, ModelHeaders

BUFFERS = (".inv_freq", ".masked_bias", ".attn.bias", ".position_ids")
"""Suffixes of buffers, which a save may omit."""
COUNTER_DTYPES = ("I64", "BOOL")
"""Types of counters and masks, which no weight is quantised to."""
NUMBERS_AT_A_TIME = 1 << 17
"""How many numbers of a matrix are compared at a time."""
ONE_EXPERT = re.compile(r"(?P<experts>.+\.experts)\.(?P<number>\d+)\.(?P<name>[^.]+)")
OURS_OF_MIXTRAL = {theirs: ours for ours, theirs in MIXTRAL.items()}
ARRAYS = {part: array for array, parts in EXPERT_PARTS.items() for part in parts}
"""The array that contains a single expert's layer, by the layer's name."""


def unit_of(path: str) -> tuple[str, int | None, str]:
    """Return the unit of a module's path and, if it is a single expert's layer, its expert and its part."""
    path = path.replace(f".{MIXTRAL_MLP}.", ".mlp.")
    match = ONE_EXPERT.fullmatch(path)
    name = OURS_OF_MIXTRAL.get(match["name"], match["name"]) if match else ""
    if match is None or name not in ARRAYS:
        return path, None, ""
    return f"{match['experts']}.{ARRAYS[name]}", int(match["number"]), name


@dataclass(frozen=True)
class Matrix:
    """One matrix of a unit: rows of one tensor, or the same number of rows from several, stacked."""

    numbers: Callable[[str, int, int], np.ndarray]  # reads numbers start:stop of a flattened tensor
    dtype: Any  # of the numbers, see `Source.dtype`
    parts: tuple[tuple[str, int], ...]  # each tensor, and the offset of the matrix in it
    rows: int  # of each part
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and columns."""
        return self.rows * len(self.parts), self.columns

    @property
    def name(self) -> str:
        """The name of the first tensor, for messages."""
        return self.parts[0][0]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """Read the rows from `top` up to `bottom`."""
        blocks = []
        for i, (name, first) in enumerate(self.parts):
            start, stop = max(top - i * self.rows, 0), min(bottom - i * self.rows, self.rows)
            if start < stop:
                numbers = self.numbers(name, first + start * self.columns, first + stop * self.columns)
                blocks.append(numbers.reshape(-1, self.columns))
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def cut(self, top: int, bottom: int) -> Matrix:
        """Return the rows from `top` up to `bottom` as a matrix; if there are several tensors, only whole ones."""
        if len(self.parts) > 1:
            return replace(self, parts=self.parts[top // self.rows : bottom // self.rows])
        ((name, first),) = self.parts
        return replace(self, parts=((name, first + top * self.columns),), rows=bottom - top)

    def blocks(self, step: int = 1, first: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield start and stop of blocks of rows, in multiples of `step`; the first block has at most `first` rows."""
        count, height = self.shape[0], max(1, NUMBERS_AT_A_TIME // max(1, self.columns) // step) * step
        start, stop = 0, min(first or height, height)
        while start < count:
            yield start, min(stop, count)
            start, stop = stop, stop + height


class Source:
    """A reader of parts of a model's tensors."""

    def __init__(self, model: ModelHeaders, *, dequantize: bool = True) -> None:
        """Open a model; with `dequantize`, NF4 and a .gguf file's formats are compared as they are decoded."""
        self.model, self.dequantize, self.nf4, self.whole = model, dequantize, None, ("", np.empty(0))
        weights = model.tensors.weights
        if weights is not None and any(name.endswith(NF4_STATE) for name in weights.holder):
            self.nf4 = NF4Weights(model.path, weights, model.config.get("quantization_config"))
        self.numbering = ""  # of experts, if not from 0 without gaps; known after `units`
        self.quantized = {} if self.nf4 is None else self.nf4.shapes

    @property
    def quantized_dtype(self) -> Any:
        """The type to which an NF4 folder is dequantised; None for other models."""
        if self.nf4 is None or not self.nf4.states:
            return None
        named = next(iter(self.nf4.states.values())).dtype
        return next((dtype for dtype in FLOATS.values() if dtype.name == named), None)

    def dtype(self, name: str) -> Any:
        """Return the type in which a tensor is read: float32 if quantised, an unsigned integer if it is not a float."""
        if name in self.quantized:
            return np.dtype(np.float32)
        kind = self.model.tensors.dtypes[self.model.names[name]]
        if self.model.is_gguf:
            return np.dtype(np.float16 if kind == "F16" else np.float32)
        return numpy_dtype(kind)

    def is_exact(self, name: str) -> bool:
        """Return whether a tensor holds floats that we compute with; require that the order of its rows is known."""
        if self._is_permuted(name):
            head_dim(self.model)
        return not self.in_few_bits(name) and self.dtype(name) in FLOATS.values()

    def in_few_bits(self, name: str) -> bool:
        """Return whether a tensor is quantised."""
        return name in self.quantized or (self.model.is_gguf and self.kind(name) not in GGUF_FLOATS)

    def kind(self, name: str) -> str:
        """Return a tensor's type, as its format names it."""
        packed = self.nf4 is not None and name in self.nf4.tensors
        return "NF4" if packed else self.model.tensors.dtypes[self.model.names[name]]

    @cached_property
    def coded(self) -> dict[str, str]:
        """The types of few bits whose numbers are not known, such as FP8, with a file that has each."""
        if self.model.is_gguf and self.dequantize:
            return {}
        weights, files = self.model.tensors.weights, dict[str, str]()
        for name, own in self.model.names.items():
            kind = self.kind(name)
            known = kind in FLOATS or (kind == "NF4" and self.dequantize)
            if not known and (kind not in COUNTER_DTYPES or name.endswith(".weight")) and not name.endswith(BUFFERS):
                files[kind] = (self.model.path if weights is None else weights.holder[own].path).name
        return files

    def described(self, kind: str) -> str:
        """Return a text about a type whose numbers are not compared."""
        where = "base" if self.dequantize else "merged model"
        return f"the {where} is quantised ({short(self.coded[kind])} has {kind})"

    def axes(self, unit: str, matrices: list[Matrix]) -> tuple[int, ...]:
        """Return the shape of a unit: that of its tensor, or (E, out, in) for a mixture's experts."""
        shape = self.shape(matrices[0].name)
        if unit.rpartition(".")[2] in EXPERT_PARTS or (len(shape) == 3 and not unit.endswith(".weight")):
            return len(matrices), *matrices[0].shape
        return (matrices[0].rows, *shape[1:]) if shape else ()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, of one in NF4 that of the weight."""
        return self.quantized[name] if name in self.quantized else self.model.tensors.shapes[self.model.names[name]]

    def _is_permuted(self, name: str) -> bool:
        """Return whether a tensor's rows lie as llama.cpp has those of a Llama's W_q and W_k."""
        kind = self.model.config.get("general.architecture") if self.model.is_gguf else None
        return kind == "llama" and is_permuted(name.rpartition(".")[0], kind)

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return numbers start:stop of a flattened tensor."""
        if not self._is_permuted(name) and name not in self.quantized:
            return self.model.tensors.part(self.model.names[name], start, stop)
        if self.whole[0] != name:
            if self.nf4 is not None and name in self.quantized:
                self.whole = name, np.asarray(self.nf4.read(name).weight)
            else:
                array = self.model.tensors.read(self.model.names[name])
                self.whole = name, halves_from_interleaved(array, head_dim(self.model))
        return self.whole[1].reshape(-1)[start:stop]

    @cached_property
    def units(self) -> dict[str, list[Matrix]]:
        """The matrices of each unit, in the files' order."""
        packed = set() if self.nf4 is None else self.nf4.tensors - {*self.quantized}
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
            if sorted(experts) != [*range(len(experts))]:
                self.numbering = f"{', '.join(map(str, sorted(experts)[:4]))} and so on"
            for _, keys in sorted(experts.items()):
                names = [keys[part] for part in EXPERT_PARTS[unit.rpartition(".")[2]] if part in keys]
                found[unit].append(self._matrix(names, self.shape(names[0])))
        return found

    def _matrix(self, names: list[str], shape: Sequence[int], number: int = 0) -> Matrix:
        """Return the matrix that stacks tensors of one shape, or matrix `number` of a tensor that has several."""
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        places = tuple((name, number * rows * columns) for name in names)
        return Matrix(self.part, self.dtype(names[0]), places, rows, columns)


def head_dim(model: ModelHeaders) -> int:
    """Return the number of rows of W_q for each head."""
    config, kind = model.config, model.config.get("general.architecture")
    of_gguf = tuple(f"{kind}.{name}" for name in ("attention.key_length", "embedding_length", "attention.head_count"))
    names = of_gguf if model.is_gguf else ("head_dim", "hidden_size", "num_attention_heads")
    width, whole, heads = (int(config.get(name) or 0) for name in names)
    if not width and not (whole and heads):
        raise FileRefused(model.path, f"the width of a head is unknown: {names[0]} is missing")
    return width or whole // heads


def in_memory(array: np.ndarray, like: Matrix) -> Matrix:
    """Return an array as a matrix with as many columns as `like`."""
    numbers = array.reshape(-1)
    rows = array.size // like.columns
    return Matrix(lambda _, start, stop: numbers[start:stop], array.dtype, ((like.name, 0),), rows, like.columns)
