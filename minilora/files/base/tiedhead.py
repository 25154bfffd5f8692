"""A head of its own for a model that had none: of a tied model, one array is both the embedding and the head.

Many small models are tied. An adapter of `embed_tokens` changes what goes in, and one of `lm_head` what comes out, and
neither changes the other. So after such a merge the two differ, and the merged model needs both: the head is written
as an array of its own, and config.json says so. (PEFT's merge_and_unload changes the one array for both, warns, and
advises to untie first: what comes of that is written here.)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ...checks import FileRefused
from ..inputs import parse_json, read_json
from ..tensors import MODEL_CONFIG, Weights
from .companions import json_bytes

EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The ends of the paths of the two modules that some models tie; PEFT's list."""
HEAD_WEIGHT = f"{HEAD}.weight"


def ties_head(base: Weights) -> bool:
    """Return whether a config.json beside a base says that the head is the embedding.

    One that cannot be read says nothing. Some kinds of model are tied where it says nothing: then the class has a head,
    and the files have none.
    """
    try:
        config = read_json(base.path.parent / MODEL_CONFIG)
    except FileRefused:
        return False
    tied, classes = config.get("tie_word_embeddings"), str(config.get("architectures"))
    headless = not any(name.endswith(HEAD_WEIGHT) for name in base.holder)
    return tied is True or (tied is None and headless and ("ForCausalLM" in classes or "LMHead" in classes))


def with_own_head(base: Weights) -> Weights:
    """Return a tied base whose head is a tensor of its own: the embedding's bytes, under a second name."""
    if HEAD_WEIGHT in base.holder:  # some files hold it twice
        return base
    embeddings = [name for name in base.holder if name.endswith(f"{EMBEDDING}.weight")]
    if len(embeddings) != 1:
        raise FileRefused(
            base.path, f"it has {len(embeddings)} tensors named {EMBEDDING}.weight, expected one to untie"
        )
    (name,) = embeddings
    old, new = base.holder[name], base.holder[name].also_named(name, HEAD_WEIGHT)
    files = [new if file is old else file for file in base.files]
    holder = {name: new if file is old else file for name, file in base.holder.items()}
    spec = new.tensors[HEAD_WEIGHT]
    index = _index_with_head(base, old.path.name, spec.end - spec.start, math.prod(spec.shape)) if base.index else b""
    return replace(base, files=files, holder=holder | {HEAD_WEIGHT: new}, index_text=index)


def _index_with_head(base: Weights, shard: str, size: int, numbers: int) -> bytes:
    """Return the index with the head in it, its totals too."""
    index: dict[str, Any] = parse_json(base.path, base.index_text)
    index["weight_map"][HEAD_WEIGHT] = shard
    metadata = index.get("metadata")
    for total, more in (("total_size", size), ("total_parameters", numbers)):
        if isinstance(metadata, dict) and type(metadata.get(total)) is int:
            metadata[total] += more
    return json_bytes(index)
