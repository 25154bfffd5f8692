"""What a model's files say of its weights, their numbers not read: names, shapes, types, and what is tied.

A model is a folder of Hugging Face's layout, one shard or many; weights alone; or a .gguf file, whose names become
those of transformers where they have one. A weight in few bits has no shape here: its files pack it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import FileRefused
from ..files.disk import read_json
from ..files.modelfolder import HEAD_WEIGHT, ties_head
from ..files.tensors import FLOATS, INDEX_NAME, MODEL_CONFIG, SINGLE_NAME
from ..language.gguf import from_gguf
from .tensors import Tensors, is_gguf, open_tensors

Shape = tuple[int, ...]
PACKED = (".qweight", ".weight_packed", ".weight.absmax", ".weight_format", ".scales")
"""Ends of the names of what stands beside, or in the place of, a weight in few bits."""
GGUF_FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class ModelHeaders:
    """The headers of a model's files."""

    path: Path
    tensors: Tensors
    config: Mapping[str, Any]  # config.json, or a .gguf file's keys
    is_gguf: bool
    tied: bool  # whether the head is the embedding

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

    def bias(self, module: str) -> Shape | None:
        """Return the shape of a module's bias, where it has one."""
        own = self.names.get(f"{module}.bias")
        return None if own is None else self.tensors.shapes[own]

    def read(self, module: str) -> np.ndarray:
        """Read a module's weight, or an array."""
        return self.tensors.read(self.names[self._name(module)])

    def is_exact(self, module: str) -> bool:
        """Return whether a module's weight is stored in a floating-point type, and not in few bits."""
        own = self.names.get(self._name(module))
        seen = module in self.arrays or self.modules.get(module) is not None
        return own is not None and seen and self.tensors.dtypes[own] in (GGUF_FLOATS if self.is_gguf else FLOATS)

    def _name(self, module: str) -> str:
        return module if module in self.arrays else f"{module}.weight"


def open_model(path: Path) -> ModelHeaders:
    """Read a model's headers.

    Raises
    ------
    FileRefused
        If there is no model, or a file is damaged.
    """
    file = path
    if os.path.isdir(path) and not any(os.path.exists(path / name) for name in (INDEX_NAME, SINGLE_NAME)):
        files = sorted([*path.glob("*.gguf"), *path.glob("*.safetensors")])
        if len(files) != 1:
            raise FileRefused(
                path, f"expected {SINGLE_NAME}, {INDEX_NAME} or one .gguf file, and there is none of them"
            )
        (file,) = files
    if is_gguf(file):
        tensors = open_tensors(file)
        tied = not any(from_gguf(name) == HEAD_WEIGHT for name in tensors.shapes)
        return ModelHeaders(path, tensors, tensors.notes, True, tied)
    tensors = open_tensors(file)
    assert tensors.base is not None
    config: Mapping[str, Any] = {}
    beside = tensors.base.path.parent / MODEL_CONFIG
    if os.path.exists(beside):
        config = read_json(beside)
    text = config.get("text_config")
    tied = ties_head(tensors.base) or (isinstance(text, dict) and text.get("tie_word_embeddings") is True)
    return ModelHeaders(path, tensors, config, False, tied and HEAD_WEIGHT not in tensors.shapes)
