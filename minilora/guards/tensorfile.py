"""Files of tensors in the safetensors format, read with suspicion.

A file is 8 bytes with the header's length, a header in JSON, and the tensors' bytes, one after the other.

Promise: nothing in a file is executed, a small file fills no memory, and what is read is what was checked.
Kept by: the `safetensors` library judges the header (shapes, offsets, overlaps). What it lets pass and we do not, such
as a name that stands twice, is refused here before anything large is read. The file must be the same when it is
opened, read, and closed.
Shown by: tests/guards/test_tensorfile.py.

The tensors are read from the open file, not from the library's memory map: they are read one at a time, or a few
rows at a time, and a bfloat16 tensor, for which NumPy has no type, comes out as float32.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from ..checks import FileRefused, short
from .inputfiles import open_regular, parse_json
from .wholefiles import identity

MAX_HEADER = 8 << 20
"""Bytes of header, of some 60,000 tensors, that we agree to parse: parsing can take ten times the memory."""

BLOCK_BYTES = 4 << 20
"""Bytes of a tensor that are compared, copied or merged at a time."""

FLOATS = {"F16": "float16", "BF16": "uint16", "F32": "float32", "F64": "float64"}
"""The element types that we compute with, and the NumPy type of their bits."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where a tensor lies in its file."""

    dtype: str  # in the format's names: "F32", "BF16", ...
    shape: tuple[int, ...]
    start: int  # its first byte, counted from the file's first
    end: int  # the byte after its last


HINTS = {
    b"version ": "it is a pointer of Git LFS, in the place of the file ('git lfs pull' gets it)",
    b"<": "it is a page of HTML, in the place of the file",
    b"PK": "it is an archive, such as a pickle of torch's",
}
"""What a file with such a beginning is, which a download may leave in the place of a safetensors file."""


class TensorFile:
    """A safetensors file, its header checked and its tensors still on the disk.

    Raises
    ------
    FileRefused
        If the path is no regular file, or the file is missing, cut, or not of this format.
    """

    path: Path
    metadata: dict[str, str]  # the text beside the tensors; empty where there is none
    tensors: dict[str, TensorSpec]  # in the order of their bytes
    data_start: int  # where the header ends, in bytes
    second_name: str | None = None  # of a tensor whose bytes stand once more behind all others, when it is written

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_regular(self.path) as file:
            self._identity = identity(os.fstat(file.fileno()))
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                first = length.to_bytes(8, "little")
                other = next((what for start, what in HINTS.items() if first.startswith(start)), "")
                raise FileRefused(path, other or f"the header would be {length} bytes long and the file has {size}")
            if length > MAX_HEADER:
                raise FileRefused(path, f"the header is {length} bytes long, expected at most {MAX_HEADER}")
            try:
                with safe_open(self.path, framework="numpy") as judged:
                    names, metadata = judged.keys(), judged.metadata() or {}
            except (SafetensorError, OSError, ValueError) as error:
                raise FileRefused(path, f"not a sound safetensors file: {error}") from error
            text = file.read(length)
        self.data_start = 8 + length
        # The library skips fields that it does not know, however much is in them.
        expected = sum(_parts(part.encode()) + 4 for pair in metadata.items() for part in pair)
        expected += sum(_parts(name.encode()) + 25 for name in names)
        if _parts(text) > expected + 100:
            raise FileRefused(path, f"the header holds far more than its {len(names)} tensors")
        header = parse_json(self.path, text, "header", self._spec)
        self.metadata = header.pop("__metadata__", None) or {}
        for name, spec in header.items():
            if not isinstance(spec, TensorSpec):
                raise FileRefused(path, f"the header's entry {short(name)} is not dtype, shape and data_offsets")
        specs: dict[str, TensorSpec] = header
        self.tensors = dict(sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)))
        self.check_unchanged()  # the library opened the file by its name: it must have been this one

    def _spec(self, entry: dict[str, Any]) -> Any:
        """Turn an entry of the header into what we keep of it, at once: a tenth of the memory."""
        if entry.keys() != {"dtype", "shape", "data_offsets"} or not isinstance(entry["shape"], list):
            return entry
        start, end = (self.data_start + offset for offset in entry["data_offsets"])
        return TensorSpec(sys.intern(entry["dtype"]), tuple(entry["shape"]), start, end)

    @contextlib.contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """Open the file to read its tensors; refuse it if it is not, or is no longer, the one that was checked."""
        with open_regular(self.path) as file:
            if identity(os.fstat(file.fileno())) != self._identity:
                raise FileRefused(self.path, "the file changed after it was checked")
            yield file
            if identity(os.fstat(file.fileno())) != self._identity:
                raise FileRefused(self.path, "the file changed while it was read")

    def check_unchanged(self) -> None:
        """Refuse a file that is no longer the one that was checked."""
        with self.opened():
            pass

    def also_named(self, name: str, second: str) -> TensorFile:
        """Return the file with a tensor under a second name too, which stands last."""
        file = copy(self)
        file.tensors, file.second_name = self.tensors | {second: self.tensors[name]}, second
        return file

    def header(self, file: BinaryIO) -> bytes:
        """Return all that comes before the tensors' bytes, bit for bit; a second name is added to it."""
        file.seek(0)
        text = self.read_bytes(file, self.data_start).tobytes()
        if self.second_name is None:
            return text
        entries, spec = json.loads(text[8:]), self.tensors[self.second_name]
        end = max(other.end for other in self.tensors.values()) - self.data_start
        offsets = [end, end + spec.end - spec.start]
        entries[self.second_name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
        return _header(entries)

    def read(self, name: str, file: BinaryIO) -> np.ndarray:
        """Return one whole tensor of a floating-point type; bfloat16 comes as float32, which holds it exactly."""
        spec = self.tensors[name]
        if spec.dtype not in FLOATS:
            expected = ", ".join(FLOATS)
            raise FileRefused(self.path, f"{short(name)} has dtype {spec.dtype}, expected one of {expected}")
        file.seek(spec.start)
        return decode(self.read_bytes(file, spec.end - spec.start), spec.dtype).reshape(spec.shape)

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the bytes of one tensor, `BLOCK_BYTES` at a time."""
        spec = self.tensors[name]
        with self.opened() as file:
            file.seek(spec.start)
            for start in range(spec.start, spec.end, BLOCK_BYTES):
                yield self.read_bytes(file, min(BLOCK_BYTES, spec.end - start))

    def read_bytes(self, file: BinaryIO, count: int) -> np.ndarray:
        """Return the next `count` bytes of the open file, into memory of their own."""
        raw = np.empty(count, np.uint8)
        try:
            count_read = file.readinto(raw.data)  # type: ignore[attr-defined]
        except OSError as error:
            raise FileRefused(self.path, f"cannot be read: {error}") from error
        if count_read != count:
            raise FileRefused(self.path, "the file was cut while it was read")
        return raw


def in_dtype(array: np.ndarray, dtype: Any, path: Path, reaches: str) -> np.ndarray:
    """Return finite numbers of a file in another type; refuse those that it cannot hold, where `reaches` says whose."""
    with np.errstate(over="ignore"):
        rounded = array.astype(np.dtype(dtype).name, copy=False)
    if rounded.itemsize < array.itemsize and not np.isfinite(rounded).all():
        largest = float(np.abs(array).max())
        raise FileRefused(path, f"{reaches} {largest:g}, which {rounded.dtype} cannot hold")
    return rounded


def same_bytes(first: TensorFile, name: str, other: TensorFile, other_name: str) -> bool:
    """Return whether two tensors have one type, one shape and the same bits."""
    ours, theirs = first.tensors[name], other.tensors[other_name]
    return (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and all(
        np.array_equal(a, b) for a, b in zip(first.blocks(name), other.blocks(other_name), strict=True)
    )


def _parts(text: bytes) -> int:
    """Count the marks that make up JSON: at most 20 or so for a tensor, whatever its size."""
    return sum(text.count(mark) for mark in (b",", b"[", b"{", b'"'))


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Turn the bytes of a tensor into numbers, bfloat16 into float32."""
    bits = raw.view(np.dtype(FLOATS[dtype]).newbyteorder("<")).astype(FLOATS[dtype], copy=False)
    return (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits


def encode(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Turn numbers into the bytes of a tensor, each rounded once, to nearest with ties to even."""
    if dtype == "BF16":
        bits = np.asarray(numbers, np.float32).view(np.uint32)
        # Half a unit, less one where the last kept bit is even: a tie then carries only into an odd number.
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        rounded = np.where(np.isnan(numbers), (bits >> 16) | np.uint32(0x40), rounded)
    else:
        rounded = numbers
    return np.ascontiguousarray(rounded, np.dtype(FLOATS[dtype]).newbyteorder("<")).ravel().view(np.uint8)


def tensor_header(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """Return all of a safetensors file that comes before the tensors' bytes, which follow in this order.

    The library's own `save` puts metadata in an order that changes from run to run.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    types, end = {name: key for key, name in FLOATS.items()} | {"uint8": "U8"}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        dtype, shape = types[tensor.dtype.name], list(tensor.shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return _header(entries)


def _header(entries: Mapping[str, Any]) -> bytes:
    """Return the length of a header, and the header, filled up to 8 bytes."""
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
