"""A checkpoint of a model: one safetensors file, or several with an index that says which holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .tensorfile import AdapterFileError, TensorFile, member, read_json

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
MAX_INDEX = 16 << 20


@dataclass(frozen=True)
class Base:
    """A checkpoint: its files, which of them holds which tensor, and the index where it has one."""

    files: list[TensorFile]
    holder: Mapping[str, TensorFile]
    index: Path | None


def open_base(path: Path) -> Base:
    """Open the base, whichever of its names was given; refuse an index that is not of its shards."""
    if path.is_dir():
        path = path / (INDEX_NAME if (path / INDEX_NAME).exists() else SINGLE_NAME)
    if path.suffix != ".json":
        file = TensorFile(path)
        return Base([file], dict.fromkeys(file.tensors, file), None)
    weight_map = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AdapterFileError(path, f"weight_map is {str(weight_map)[:60]}, expected an object of tensors' files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise AdapterFileError(path, f"weight_map[{name!r}] is {str(shard)[:60]!r}, expected a .safetensors file")
    files = {shard: TensorFile(member(path.parent, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise AdapterFileError(files[shard].path, f"there is no {name!r}, which {path.name} says it holds")
    return Base(list(files.values()), {name: files[shard] for name, shard in weight_map.items()}, path)
