"""Reader and writer of safetensors files: a single file, or a model's shards with their index.

A file consists of 8 bytes with the header's length, a header in JSON, and the tensors' bytes in sequence. The library
`safetensors` validates the header: shapes, types, offsets, overlaps. The tensors are then read with plain reads, as a
whole or in blocks, to bound the memory: the pages of a memory map would count as used. Nothing in a file is executed,
and pickles are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from ..texts import FileRefused, named, reading, short
from .disk import RegularFile, member, parse_json, read_whole
from .dtypes import FLOATS, cast

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
MODEL_CONFIG = "config.json"
NF4_STATE = "quant_state.bitsandbytes__nf4"
"""The suffix of the tensor in which bitsandbytes stores a weight's quantisation state."""

BLOCK_BYTES = 4 << 20
"""The number of bytes of a tensor that are compared, copied or merged at a time."""

DTYPE_NAMES = {dtype.name: name for name, dtype in FLOATS.items()} | {"uint8": "U8"}
"""The format's names for the NumPy dtypes that `write_tensors` accepts."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype for a name of the format; for types that are only copied, an unsigned integer as wide."""
    digits = "".join(filter(str.isdigit, name.partition("_")[0]))
    return FLOATS.get(name) or np.dtype(f"<u{max(1, int(digits or 8) // 8)}")


OTHER_FORMATS = {
    b"version ": "it is a Git LFS pointer instead of the file itself ('git lfs pull' fetches the file)",
    b"<": "it is an HTML page instead of the file itself",
    b"PK": "it is an archive, such as a pickle saved by torch",
    b"GGUF": "it is a .gguf file. `minilora export` converts an adapter to a file for llama.cpp's --lora; "
    "`minilora merge` merges into a file with the suffix .gguf",
}
"""Descriptions of files of other formats, by their first bytes, for errors."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The position of a tensor in its file."""

    dtype: str  # the format's name: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # the offset of its first byte in the file
    end: int  # the offset after its last byte


class TensorFile:
    """A safetensors file with a validated header and its tensors still on the disk; an invalid one is a FileRefused."""

    path: Path
    file: RegularFile  # stays open while this object lives, so all tensors come from the validated file
    header: bytes  # everything before the tensors' bytes
    metadata: dict[str, str]  # the header's metadata, possibly empty
    tensors: dict[str, TensorSpec]  # in file order

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = RegularFile(self.path)
        with reading(self.path):
            first = self.file.read(8)
            try:
                safe_open(self.path, framework="numpy")
            except SafetensorError as error:
                other = (what for start, what in OTHER_FORMATS.items() if first.startswith(start))
                raise FileRefused(path, next(other, str(error))) from error
            self.header = first + self.file.read(int.from_bytes(first, "little"))
        self.file.check_unchanged(in_place=True)  # so this is the file that the library validated
        entries, data = json.loads(self.header[8:]), len(self.header)
        self.metadata = entries.pop("__metadata__", None) or {}
        specs = {
            name: TensorSpec(entry["dtype"], (*entry["shape"],), *(data + at for at in entry["data_offsets"]))
            for name, entry in entries.items()
        }
        self.tensors = dict(sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)))

    def read(self, name: str) -> np.ndarray:
        """Read a floating-point tensor; bfloat16 becomes float32, which is exact."""
        spec = self.tensors[name]
        if spec.dtype not in FLOATS:
            raise FileRefused(self.path, f"{short(name)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}")
        with reading(self.path), named(short(name)):
            numbers = self.numbers(name).reshape(spec.shape)
        return cast(numbers, "float32" if numbers.dtype == bfloat16 else numbers.dtype.newbyteorder("="))

    def numbers(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read a slice of a tensor's entries in row-major order, with the dtype from `numpy_dtype`."""
        spec, dtype = self.tensors[name], numpy_dtype(self.tensors[name].dtype)
        end = spec.end if stop is None else spec.start + stop * dtype.itemsize
        return self._bytes(spec.start + start * dtype.itemsize, end).view(dtype)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the bytes of one tensor, `BLOCK_BYTES` at a time."""
        spec = self.tensors[name]
        for start in range(spec.start, spec.end, BLOCK_BYTES):
            yield self._bytes(start, min(start + BLOCK_BYTES, spec.end))

    def _bytes(self, start: int, end: int) -> np.ndarray:
        """Read the bytes of the file between two offsets."""
        with reading(self.path):
            self.file.seek(start)
            raw = np.fromfile(self.file, np.uint8, end - start)
            self.file.check_unchanged()
        return raw

    def digest(self) -> str:
        """Return a hash of the tensors' bytes, in file order."""
        sha = hashlib.sha256()
        for block in (block for name in self.tensors for block in self.blocks(name)):
            sha.update(block.data)
        return sha.hexdigest()

    def header_with(self, key: str, value: str) -> bytes:
        """Return the header with another entry, or another word of an entry, in the metadata."""
        entries = json.loads(self.header[8:])
        more = {key: f"{self.metadata.get(key, '')} {value}".strip()}
        return _header({"__metadata__": {}} | entries | {"__metadata__": {"format": "pt"} | self.metadata | more})

    def with_copy(self, name: str, second: str) -> TensorFile:
        """Return a view of the file with a copy of the tensor `name` at its end, named `second`."""
        entries, spec = json.loads(self.header[8:]), self.tensors[name]
        end = max(other.end for other in self.tensors.values()) - len(self.header)
        offsets = [end, end + spec.end - spec.start]
        entries[second] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        file = copy(self)
        file.tensors, file.header = self.tensors | {second: spec}, _header(entries)
        return file


def same_bytes(first: TensorFile, name: str, other: TensorFile, other_name: str) -> bool:
    """Return whether two tensors have the same type, shape and bits."""
    ours, theirs = first.tensors[name], other.tensors[other_name]
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        np.array_equal(a, b) for a, b in zip(first.blocks(name), other.blocks(other_name), strict=True)
    )


def in_dtype(array: np.ndarray, dtype: Any, path: Path, subject: str) -> np.ndarray:
    """Cast a file's finite numbers to another dtype; refuse overflow, with an error that begins with `subject`."""
    rounded = cast(array, np.dtype(dtype).name)
    if rounded.itemsize < array.itemsize and not np.isfinite(rounded).all():
        raise FileRefused(path, f"{subject} {float(np.abs(array).max()):g}, which {rounded.dtype} cannot hold")
    return rounded


# --- writing ---


def write_tensors(file: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in the given order; the library's own `save` orders metadata differently each time."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    file.write(_header(entries))
    for tensor in tensors.values():
        little = np.ascontiguousarray(tensor, tensor.dtype.newbyteorder("<"))
        file.write(little.reshape(-1).view(np.uint8).data)


def _header(entries: Mapping[str, Any]) -> bytes:
    """Encode a header, preceded by its length and padded to a multiple of 8 bytes."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- a model's weights, in one file or several ---


class Index(msgspec.Struct):
    """The index of a model's shards, ``model.safetensors.index.json``."""

    weight_map: dict[str, str]  # the file name of each tensor, by the tensor's name


@dataclass(frozen=True)
class Weights:
    """A model's weights: their files, the file of each tensor, and the index if there is one."""

    files: list[TensorFile]
    holder: Mapping[str, TensorFile]
    index: Path | None = None
    index_text: bytes = b""

    @property
    def path(self) -> Path:
        """The path to name in errors about the weights as a whole."""
        return self.index or self.files[0].path

    def spec(self, name: str) -> TensorSpec:
        """Return the shape, dtype and position of a tensor."""
        return self.holder[name].tensors[name]

    def read(self, name: str) -> np.ndarray:
        """Read a floating-point tensor."""
        return self.holder[name].read(name)


def open_weights(path: Path) -> Weights:
    """Open a safetensors file, an index of shards, or a folder with one of the two: programs differ on both."""
    if not os.path.isdir(path):
        return _open_shards(path) if path.suffix == ".json" else _open_single(path)
    if not os.path.exists(path / INDEX_NAME):
        return _open_single(path / SINGLE_NAME)
    weights = _open_shards(path / INDEX_NAME)
    single = path / SINGLE_NAME
    if os.path.exists(single) and [file.path for file in weights.files] != [single]:
        raise FileRefused(
            single,
            f"next to {INDEX_NAME}, which lists other files: programs differ in which they read. Remove one of the two",
        )
    return weights


def _open_single(path: Path) -> Weights:
    file = TensorFile(path)
    return Weights([file], dict.fromkeys(file.tensors, file))


def _open_shards(path: Path) -> Weights:
    """Open the shards of an index; each tensor must occur once, in the file that the index names."""
    index, text = RegularFile(path), read_whole(path)
    weight_map = parse_json(path, text, Index).weight_map
    files = {shard: TensorFile(member(path.parent, shard)) for shard in sorted(set(weight_map.values()))}
    index.check_unchanged(in_place=True)  # so the files come from the same save
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise FileRefused(files[shard].path, f"there is no {short(name)}, although {path.name} lists it")
    # As in transformers, all tensors of a shard belong to the model, even if the index omits them.
    holder = {name: files[shard] for name, shard in weight_map.items()}
    for file in files.values():
        for name in file.tensors:
            if holder.setdefault(name, file) is not file:
                raise FileRefused(file.path, f"{short(name)} is also in {holder[name].path.name}, expected only one")
    return Weights(list(files.values()), holder, path, text)
