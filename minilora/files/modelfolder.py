"""A model's folder, so that a merged one loads: a tied head, and the weights' companions.

The head of a tied model is its embedding: one array, two modules. An adapter of `embed_tokens` changes what goes in,
one of `lm_head` what comes out, and neither changes the other. Merged, such a model needs both, so the head gets a
tensor of its own, and config.json says so. (PEFT's merge_and_unload changes the one array for both and warns.)

Configuration and tokenizer are copied as they are.
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
from .disk import open_regular, parse_json, read_json, synced
from .peft import CONFIG_NAME
from .tensors import MODEL_CONFIG, Weights

# --- the head ---------------------------------------------------------------------------------------------------------

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The ends of the paths of the two modules that some models tie; PEFT's list."""
HEAD_WEIGHT = f"{HEAD}.weight"


def ties_head(weights: Weights) -> bool:
    """Return whether config.json says that the head is the embedding, or its class has a head and the files none."""
    try:
        config = read_json(weights.path.parent / MODEL_CONFIG)
    except FileRefused:
        return False
    tied, classes = config.get("tie_word_embeddings"), str(config.get("architectures"))
    # Some kinds of model are tied where config.json says nothing.
    headless = not any(name.endswith(HEAD_WEIGHT) for name in weights.holder)
    return tied is True or (tied is None and headless and ("ForCausalLM" in classes or "LMHead" in classes))


def with_own_head(weights: Weights) -> Weights:
    """Return a tied model's weights with the embedding's bytes once more, as the head, in the files and the index."""
    if HEAD_WEIGHT in weights.holder:  # some files hold it twice
        return weights
    names = [name for name in weights.holder if name.endswith(f"{EMBEDDING}.weight")]
    if len(names) != 1:
        raise FileRefused(weights.path, f"it has {len(names)} tensors named {EMBEDDING}.weight, expected one to untie")
    old, spec = weights.holder[names[0]], weights.spec(names[0])
    new = old.also_named(names[0], HEAD_WEIGHT)
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


# --- the companions of the weights ------------------------------------------------------------------------------------

FURTHER_TEMPLATES = "additional_chat_templates"
"""A folder with chat templates for other occasions than the default: ``tool_use.jinja``."""
COPIED = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
"""What files end in that say how a model is built, how it generates, and how its tokenizer splits text."""


def companions(folder: Path, *, untied: bool) -> dict[str, Path | bytes]:
    """Return what a merged folder gets besides weights and index, by name: a file to copy, or a text."""
    config, files = read_json(folder / MODEL_CONFIG), {}
    for path in [*sorted(folder.iterdir()), *sorted((folder / FURTHER_TEMPLATES).glob("*.jinja"))]:
        # An index is of weights that are written apart, and an adapter's configuration of what is merged now.
        passed = path.name.startswith(".") or path.name.endswith(".index.json") or path.name == CONFIG_NAME
        if path.suffix in COPIED and not passed and not path.is_dir():
            open_regular(path).close()
            _check_within(folder, path)
            files[path.relative_to(folder).as_posix()] = path
    return files | ({MODEL_CONFIG: _json(config | {"tie_word_embeddings": False})} if untied else {})


def _check_within(folder: Path, path: Path) -> None:
    """Require that a link stays in the model's folder, or in the hub's cache: what it leads to elsewhere is private."""
    place, home = path.resolve(), folder.resolve()
    # There, models--NAME/snapshots/REVISION/FILE is a link to models--NAME/blobs/HASH.
    cache = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not {home, cache} & set(place.parents):
        raise FileRefused(path, "a link out of the model's folder, whose file would be copied: expected one in it")


def copy_companions(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Write companions into a new folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with synced(folder / name) as target:
            if isinstance(content, bytes):
                target.write(content)
            else:
                with open_regular(content) as source:
                    shutil.copyfileobj(source, target)
