"""Helpers for merging a model's whole folder: copying its other files, untying its head.

The head of a tied model is its embedding: one array in two modules. An adapter of `embed_tokens` changes only the
input, one of `lm_head` only the output. The merged model needs both arrays, so the head gets its own tensor, and
config.json says so. (PEFT's merge_and_unload changes the shared array, with a warning.)

Configuration and tokenizer are copied unchanged.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..texts import FileRefused
from .disk import RegularFile, parse_json, read_json, synced
from .peft import CONFIG_NAME
from .tensors import MODEL_CONFIG, Weights

# --- the head ---------------------------------------------------------------------------------------------------------

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The names of the two modules that some models tie, as in PEFT."""
HEAD_WEIGHT = f"{HEAD}.weight"


def ties_head(weights: Weights) -> bool:
    """Return whether config.json ties the head to the embedding, or the files have no tensor for the class's head."""
    try:
        config = read_json(weights.path.parent / MODEL_CONFIG)
    except FileRefused:
        return False
    tied, classes = config.get("tie_word_embeddings"), str(config.get("architectures"))
    # Some classes of models tie the two by default.
    headless = not any(name.endswith(HEAD_WEIGHT) for name in weights.holder)
    return tied is True or (tied is None and headless and ("ForCausalLM" in classes or "LMHead" in classes))


def with_own_head(weights: Weights) -> Weights:
    """Return a tied model's weights with a copy of the embedding as the head, in the files and the index."""
    if HEAD_WEIGHT in weights.holder:  # some tied models store both
        return weights
    names = [name for name in weights.holder if name.endswith(f"{EMBEDDING}.weight")]
    if len(names) != 1:
        raise FileRefused(weights.path, f"{len(names)} tensors are named {EMBEDDING}.weight, expected exactly one")
    old, spec = weights.holder[names[0]], weights.spec(names[0])
    new = old.with_copy(names[0], HEAD_WEIGHT)
    holder = {name: new if file is old else file for name, file in weights.holder.items()} | {HEAD_WEIGHT: new}
    files = [new if file is old else file for file in weights.files]
    if weights.index is None:
        return replace(weights, files=files, holder=holder)
    index: dict[str, Any] = parse_json(weights.index, weights.index_text)
    index["weight_map"][HEAD_WEIGHT] = old.path.name
    totals = index.get("metadata")
    for total, more in (("total_size", spec.end - spec.start), ("total_parameters", math.prod(spec.shape))):
        if isinstance(totals, dict) and type(totals.get(total)) is int:
            totals[total] += more
    return replace(weights, files=files, holder=holder, index_text=_json(index))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


# --- the other files --------------------------------------------------------------------------------------------------

FURTHER_TEMPLATES = "additional_chat_templates"
"""The folder with further chat templates, such as ``tool_use.jinja``."""
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""The suffixes of the files with a model's configuration, generation settings and tokenizer."""


def companions(folder: Path, *, untied: bool) -> dict[str, Path | bytes]:
    """Return the other files of a merged folder by name: each is a path to copy, or the bytes to write."""
    config, files = read_json(folder / MODEL_CONFIG), {}
    for path in [*sorted(folder.iterdir()), *sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))]:
        # The index is written separately, and an adapter's configuration does not belong in a merged folder.
        skipped = path.name.startswith(".") or path.name.endswith(".index.json") or path.name == CONFIG_NAME
        if path.suffix in COPIED and not skipped and not path.is_dir():
            RegularFile(path).close()
            _check_within(folder, path)
            files[path.relative_to(folder).as_posix()] = path
    return files | ({MODEL_CONFIG: _json(config | {"tie_word_embeddings": False})} if untied else {})


def _check_within(folder: Path, path: Path) -> None:
    """Require that a link stays in the model's folder or in the hub's cache; files elsewhere may be private."""
    target, home = path.resolve(), folder.resolve()
    # In the cache, models--NAME/snapshots/REVISION/FILE links to models--NAME/blobs/HASH.
    cache = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not {home, cache} & set(target.parents):
        raise FileRefused(path, "a link to a file outside the model's folder, which is not copied: expected one inside")


def copy_companions(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write these files into a new folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with synced(folder / name) as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with RegularFile(content) as source:
                    shutil.copyfileobj(source, target)
