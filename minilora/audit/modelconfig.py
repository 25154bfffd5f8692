"""The comparison of a merged model's config.json with its base's: whether both compute the same from the same tensors.

The decoders that minilora computes are compared as it reads them, with transformers' defaults for missing settings and
with the rotary settings of versions 4 and 5. Any other model's settings are compared one by one:

    in both, with different values      the merged model computes something else
    in only one of the two              unknown, since the default depends on the model: reported as a difference
    about training, saving, generating  ignored
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files.tensors import MODEL_CONFIG
from ..language.config import MODEL_KINDS, from_json
from ..texts import short
from .headers import ModelHeaders

TIE, ROPE_SETTINGS = "tie_word_embeddings", ("rope_theta", "rope_scaling", "rope_parameters")
IGNORED_SETTINGS = re.compile(
    rf"_.*|{TIE}|vocab_size|architectures|auto_map|(torch_)?dtype|transformers_version|use_cache|pretraining_tp"
    r"|.*_token_id|.*(dropout|pdrop|initializer).*|output_.*|return_dict.*|id2label|label2id|problem_type"
    r"|task_specific_params|gradient_checkpointing|quantization_config|cache_implementation"
)
"""Matches settings that do not change what a model computes; vocabulary and tying are compared with the tensors."""
HARMLESS = ("max_position_embeddings",)
"""Settings that limit an input without changing the numbers that are computed for it."""
SIZE_SETTINGS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""Settings that every save has; without one, a loader takes the default of its class."""
WINDOW_SETTINGS = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
MISSING, QUANTIZATION = "missing", "quantization_config"
DYNAMIC_ROPE = {"dynamic", "yarn", "longrope"}
"""Rotary settings that depend on the largest number of positions."""


def text_settings(model: ModelHeaders) -> Mapping[str, Any]:
    """Return a model's settings, or those of its language part if it has others too."""
    inner = model.config.get("text_config")
    return {**inner, TIE: inner.get(TIE, model.config.get(TIE))} if isinstance(inner, dict) else model.config


def is_tied(model: ModelHeaders) -> bool:
    """Return whether transformers shares the embedding with a head for which the files have no tensor."""
    settings = text_settings(model)
    said = settings.get(TIE)
    return said is True or (said is None and settings.get("model_type") not in MODEL_KINDS and model.tied)


def other_settings(base: ModelHeaders, merged: ModelHeaders) -> tuple[list[str], list[str]]:
    """Return texts about the settings by which the merged model computes something else, and about any others."""
    if base.is_gguf or merged.is_gguf or not base.config:
        return [], []
    if not merged.config and not (merged.path / MODEL_CONFIG).exists():
        return [], ["the file is missing"]
    ours, theirs = _as_read(base.config), _as_read(merged.config)
    if ours is None or theirs is None:
        ours, theirs = ({"is_causal": True, **dict(_one_by_one(model.config))} for model in (base, merged))
    settings = text_settings(base), text_settings(merged)
    lost = [name for name in SIZE_SETTINGS if name in settings[0] and settings[1].get(name) is None]
    wrong, others = [f"{name} is missing" for name in lost], list[str]()
    if merged.config.get(QUANTIZATION) and not base.config.get(QUANTIZATION):
        others.append(f"{QUANTIZATION} is there")
    harmless = () if DYNAMIC_ROPE & set(map(str, ours.values())) else HARMLESS
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = (settings.get(name, MISSING) for settings in (ours, theirs))
        if name in lost or one == other or (one in (None, MISSING) and other in (None, MISSING)):
            continue
        shown = [x if x is MISSING else short(x, 40) for x in (other, one)]
        text = "other rotary frequencies" if name == "frequencies" else f"{name} is {shown[0]} instead of {shown[1]}"
        unknown = MISSING in (one, other) and "rope." not in name
        (others if unknown or name in harmless else wrong).append(text)
    return wrong, others


def _as_read(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the settings of a decoder as minilora reads them; None if it cannot."""
    unread = dict.fromkeys((*WINDOW_SETTINGS, "architectures", "quantization_config", TIE))
    try:
        read = vars(from_json(Path(MODEL_CONFIG), {**config, **unread}))
    except (ValueError, TypeError, KeyError):
        return None
    kind, context = read["model_type"], read["max_position_embeddings"]
    window = config.get("sliding_window", MODEL_KINDS[kind].defaults.get("sliding_window"))
    used = config.get("use_sliding_window") is True if kind.startswith("qwen") else kind != "llama"
    windows: dict[str, Any] = {"sliding_window": None, "layer_types": None}
    if not used and "sliding_attention" in (config.get("layer_types") or ()):  # which then has no window
        windows["layer_types"] = config["layer_types"]
    if used and type(window) is int and (context is None or window < context):
        windows |= {name: config.get(name) for name in WINDOW_SETTINGS[2:]} | {"sliding_window": window}
    mixture = {} if read["mixture"] is None else vars(read["mixture"])
    apart = ("rope", "vocab_size", "mixture", TIE)
    return {name: value for name, value in read.items() if name not in apart} | mixture | windows


def _one_by_one(config: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings that may change what a model computes, those in groups as "group.name"."""
    theta, old, new = (config.get(name) for name in ROPE_SETTINGS)
    if not start.endswith("rope.") and (theta or old or new):  # as transformers 5 writes them
        rope = {"rope_type": "default"} | ({"rope_theta": theta} if theta else {})
        rope |= {name: value for group in (new, old) if isinstance(group, Mapping) for name, value in group.items()}
        rope["rope_type"] = rope.pop("type", rope["rope_type"])
        config = {name: value for name, value in config.items() if name not in ROPE_SETTINGS} | {"rope": rope}
    for name, value in config.items():
        if isinstance(value, Mapping) and not IGNORED_SETTINGS.fullmatch(name):
            yield from _one_by_one(value, f"{start}{name}.")
        elif not IGNORED_SETTINGS.fullmatch(name):
            yield start + name, value
