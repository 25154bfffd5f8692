"""A checkpoint of a model: one safetensors file, or several with an index that says which holds which tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ...checks import FileRefused, short
from ...guards.inputfiles import member, parse_json, read_whole
from ...guards.tensorfile import TensorFile, TensorSpec

INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"
MODEL_CONFIG = "config.json"
MAX_INDEX = 16 << 20
"""Bytes of an index that we agree to parse."""
MAX_MODEL_CONFIG = 4 << 20
"""Bytes of a model's config.json, generation_config.json or tokenizer_config.json that we agree to parse."""
NF4_STATE = "quant_state.bitsandbytes__nf4"
"""The end of the name under which bitsandbytes keeps how a weight was quantised."""


@dataclass(frozen=True)
class Base:
    """A checkpoint: its files, which of them holds which tensor, and the index, with its text, where it has one."""

    files: list[TensorFile]
    holder: Mapping[str, TensorFile]
    index: Path | None = None
    index_text: bytes = b""

    @property
    def path(self) -> Path:
        """What to name in a message about the whole of it."""
        return self.index or self.files[0].path

    def spec(self, name: str) -> TensorSpec:
        """Return the shape, the type and the place of a tensor."""
        return self.holder[name].tensors[name]


def open_base(path: Path) -> Base:
    """Open the base, whichever of its names was given; refuse an index that is not of its shards.

    In a folder with both an index and a single file, transformers takes the file, and other programs the shards: such a
    folder is refused, unless the index names that file alone. Whoever merges can name the one or the other.
    """
    if not os.path.isdir(path):
        return _open_file(path)
    if not os.path.exists(path / INDEX_NAME):
        return _open_file(path / SINGLE_NAME)
    base = _open_file(path / INDEX_NAME)
    single = path / SINGLE_NAME
    if os.path.exists(single) and [file.path for file in base.files] != [single]:
        raise FileRefused(
            single,
            f"beside {INDEX_NAME}, which names other files: programs differ in which they take. Remove one of them",
        )
    return base


def _open_file(path: Path) -> Base:
    if path.suffix != ".json":
        file = TensorFile(path)
        return Base([file], dict.fromkeys(file.tensors, file))
    text = read_whole(path, MAX_INDEX)
    weight_map = parse_json(path, text, "file").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileRefused(path, f"weight_map is {short(weight_map)}, expected an object of tensors' files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors"):
            raise FileRefused(path, f"weight_map[{short(name)}] is {short(shard)}, expected a .safetensors file")
    files = {shard: TensorFile(member(path.parent, shard)) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in files[shard].tensors:
            raise FileRefused(files[shard].path, f"there is no {short(name)}, which {path.name} says it holds")
    # What a shard holds belongs to the checkpoint, also where the index leaves it out: transformers has it so.
    holder = {name: files[shard] for name, shard in weight_map.items()}
    for file in files.values():
        for name in file.tensors:
            if holder.setdefault(name, file) is not file:
                raise FileRefused(
                    file.path, f"{short(name)} stands here and in {holder[name].path.name}: expected once"
                )
    return Base(list(files.values()), holder, path, text)
