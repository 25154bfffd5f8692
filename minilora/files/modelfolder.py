"""A merged model as a folder that loads: what stands beside the weights, and a head of its own where it had none.

Besides the weights, a model's folder holds its configuration and its tokenizer. They are copied as they are.

Many small models are tied: one array is both the embedding and the head. An adapter of `embed_tokens` changes what goes
in, and one of `lm_head` what comes out, and neither changes the other. So after such a merge the two differ, and the
merged model needs both: the head is written as an array of its own, and config.json says so. (PEFT's merge_and_unload
changes the one array for both, warns, and advises to untie first: what comes of that is written here.)
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..guards.errors import FileRefused
from ..guards.tensorfile import open_regular, parse_json, read_json
from ..guards.writing import synced
from .basefile import MAX_MODEL_CONFIG, Base
from .peftconfig import CONFIG_NAME as ADAPTER_CONFIG

CONFIG = "config.json"
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""What files end in that say how a model is built, how it generates, and how its tokenizer splits text."""
TIED = ("embed_tokens", "lm_head")
"""The ends of the paths of an embedding and a head, which some models tie; PEFT's list."""
HEAD = "lm_head.weight"


def files_beside(folder: Path, *, untied: bool) -> dict[str, Path | bytes]:
    """Return what a new folder gets of a model's, by name: a file to copy, or a text.

    Of an untied model config.json says that it is. An index is of the weights that are written apart, an adapter's
    configuration of an adapter that is not written. What is no regular file is refused, and a configuration that is no
    JSON.
    """
    config, found = read_json(folder / CONFIG, MAX_MODEL_CONFIG), {}
    for path in sorted(folder.iterdir()):
        passed = path.name.startswith(".") or path.name.endswith(".index.json") or path.name == ADAPTER_CONFIG
        if path.suffix in COPIED and not passed and not path.is_dir():
            open_regular(path).close()
            found[path.name] = path
    return found | ({CONFIG: _json(config | {"tie_word_embeddings": False})} if untied else {})


def write_beside(files: Mapping[str, Path | bytes], part: Path) -> None:
    """Write them into the new folder."""
    for name, content in files.items():
        with synced(part / name) as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with open_regular(content) as source:
                    shutil.copyfileobj(source, target)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def with_own_head(base: Base) -> Base:
    """Return a tied base whose head is a tensor of its own: the embedding's bytes, under a second name."""
    if HEAD in base.holder:  # some files hold it twice
        return base
    embeddings = [name for name in base.holder if name.endswith(f"{TIED[0]}.weight")]
    if len(embeddings) != 1:
        raise FileRefused(base.path, f"it has {len(embeddings)} tensors named {TIED[0]}.weight, expected one to untie")
    (name,) = embeddings
    old, new = base.holder[name], base.holder[name].also_named(name, HEAD)
    files = [new if file is old else file for file in base.files]
    holder = {name: new if file is old else file for name, file in base.holder.items()}
    spec = new.tensors[HEAD]
    index = _index_with_head(base, old.path.name, spec.end - spec.start, math.prod(spec.shape)) if base.index else b""
    return replace(base, files=files, holder=holder | {HEAD: new}, index_text=index)


def _index_with_head(base: Base, shard: str, size: int, numbers: int) -> bytes:
    """Return the index with the head in it, its totals too."""
    index: dict[str, Any] = parse_json(base.path, base.index_text, "file")
    index["weight_map"][HEAD] = shard
    metadata = index.get("metadata")
    for total, more in (("total_size", size), ("total_parameters", numbers)):
        if isinstance(metadata, dict) and type(metadata.get(total)) is int:
            metadata[total] += more
    return _json(index)
