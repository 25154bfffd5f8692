"""The keys of adapter_config.json that change what an adapter computes, and which programs read them.

`READERS` is what the golden adapters showed: the page docs/library/golden-adapters.md has the versions and the scripts.
"no place" means that the program's files or layers cannot hold it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..files.expert_adapters import B_LAYOUTS
from ..files.peft import DIGEST_KEY, KEYS, UNSET, config_text, digest
from ..texts import short
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, found
from .headers import AdapterFile

OTHER_STARTS = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga|eva")
"""Values of init_lora_weights that PEFT knows and that change the base weight before the training, but for "eva"."""


@dataclass(frozen=True)
class Key:
    """A key that changes the meaning of the factors."""

    name: str
    meaning: str
    is_set: Callable[[Any], bool] = bool
    readers: str = ""  # who reads it and who does not


READERS = (
    Key("use_rslora", "the update is multiplied by alpha / sqrt(r), and not by alpha / r",
        readers="read by PEFT 0.21, vLLM 0.32 and mistral.rs 0.9; not by llama.cpp's converter, nor by OpenVINO GenAI"),
    Key("rank_pattern", "some modules have another rank, and so another scaling",
        readers="read by PEFT, vLLM and mistral.rs; a file of llama.cpp's holds it; not by OpenVINO GenAI"),
    Key("alpha_pattern", "some modules have another alpha",
        readers="read by PEFT, vLLM and mistral.rs; not by llama.cpp's converter, nor by OpenVINO GenAI"),
    Key("use_dora", "each row of the changed weight gets the length that the file has for it",
        readers="read by PEFT and mlx-lm; refused by vLLM and mistral.rs; transformers alone does not read the "
        "lengths, llama.cpp has no place for them, OpenVINO GenAI passes over them"),
    Key("lora_bias", "the adapter adds a bias of its own, times the scaling",
        readers="read by PEFT; refused by vLLM and mistral.rs; no place in llama.cpp and mlx-lm"),
    Key("bias", "biases of the base were trained too", lambda value: value not in (None, "none"),
        readers="read by PEFT; other programs were not measured"),
    Key("target_parameters", "arrays without a module of their own, such as a mixture's experts, are adapted",
        readers="read by PEFT from 0.18; its packing was exchanged after 0.19.0; other programs were not measured"),
    Key("lora_B_layout", "which index of lora_B is the expert's; a key of unsloth's",
        lambda value: isinstance(value, str), "read by unsloth, refused by minilora; other programs were not measured"),
    Key("trainable_token_indices", "rows of an embedding were trained in full",
        readers="read by PEFT; other programs were not measured"),
    Key("layer_replication", "layers stand in the model several times, with adapters of their own",
        readers="read by PEFT; other programs were not measured"),
    Key("alora_invocation_tokens", "the adapter acts from these tokens on alone",
        readers="read by PEFT; other programs were not measured"),
    Key("exclude_modules", "modules that target_modules names are left out",
        readers="what has tensors has an adapter: other readers need not know"),
)  # fmt: skip
MOST_UNKNOWN = 20
"""Keys that are compared with the known ones."""
OLD_EXPERT = re.compile(r"\.experts\.\d+\.")
UNUSUAL = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    "ensure_weight_tying",
)  # fmt: skip
"""Variants of PEFT's that no other program was seen to read."""


def wrong_types(adapter: AdapterFile) -> Iterator[Finding]:
    """Find values of the wrong type in the keys that decide numbers."""
    wrong = []
    r, alpha, bias = adapter.get("r"), adapter.get("lora_alpha"), adapter.get("bias", "none")
    if r is not None and (type(r) is not int or r < 1):
        wrong.append(f"r is {short(r)}")
    if alpha is not None and type(alpha) not in (int, float):
        wrong.append(f"lora_alpha is {short(alpha)}")
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        if not isinstance(value := adapter.get(name, False), bool):
            wrong.append(f"{name} is {short(value)}")
    for name, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        table = adapter.get(name, {})
        wrong += [f"{name}[{short(k)}] is {short(v)}" for k, v in table.items() if type(v) not in kinds or v <= 0]
    if bias not in ("none", "all", "lora_only"):
        wrong.append(f"bias is {short(bias)}")
    if wrong:
        yield Finding(WRONG, "config-type", f"{'; '.join(wrong)}: no value that PEFT can compute with")


def negative_alpha(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an update that is subtracted."""
    alpha = adapter.get("lora_alpha")
    if type(alpha) in (int, float) and alpha < 0:
        yield Finding(SUSPICIOUS, "alpha-negative", f"lora_alpha is {alpha:g}: the update is subtracted")


def start(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a start that changed the base weight, and one that PEFT does not know."""
    value = adapter.get("init_lora_weights")
    if isinstance(value, bool | str | None) and value in KEYS["init_lora_weights"]["x-supported"]:
        return
    said = f"init_lora_weights is {short(value)}"
    if not isinstance(value, str) or not OTHER_STARTS.fullmatch(value):
        yield Finding(WRONG, "start-unknown", f"{said}, which PEFT does not know and refuses")
        return
    text = (
        f"{said}: the training began with another base weight, and beside the original one the factors mean nothing "
        "until that start is taken off. PEFT makes some such starts again when it loads; vLLM, mistral.rs and "
        "`minilora export` refuse them, and other readers are silently wrong. PEFT converts it: save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)"
    )
    yield Finding(SUSPICIOUS, "start-changes-base", text)


def unknown_keys(adapter: AdapterFile) -> Iterator[Finding]:
    """Find keys that PEFT does not have: a misspelt one is a key that nobody reads."""
    known = [key.lower() for key in KEYS]
    unknown = [key for key, value in (adapter.config or {}).items() if key not in KEYS and value not in UNSET]
    near = {key: difflib.get_close_matches(key.lower(), known, 1, 0.85) for key in unknown[:MOST_UNKNOWN]}
    for key, matches in near.items():
        for match in matches:
            text = f"{short(key)} is no key of PEFT's, which passes over it: {match!r}?"
            yield Finding(SUSPICIOUS, "key-misspelt", text)
    others = [key for key, matches in near.items() if not matches]
    yield from found(NOTE, "key-unknown", "{count} that this version does not know: {names}", others, "key")


def two_saves(adapter: AdapterFile) -> Iterator[Finding]:
    """Find two files of minilora's that are of different saves."""
    noted, text, path = (
        adapter.tensors.notes.get(DIGEST_KEY),
        config_text(dict(adapter.config or {})),
        adapter.config_path,
    )
    if noted is not None and path is not None and path.stat().st_size == len(text) and digest(text) != noted:
        yield Finding(WRONG, "two-saves", "the configuration is not the one that was saved with the factors")


def no_type(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a configuration that does not say that it is of a LoRA."""
    if adapter.get("peft_type") is None:
        yield Finding(SUSPICIOUS, "config-type", "there is no peft_type, without which PEFT does not load it")


def layout(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a packing of experts' factors that nobody knows."""
    value = adapter.get("lora_B_layout")
    if value is not None and (not isinstance(value, str) or value not in B_LAYOUTS):
        text = f"lora_B_layout is {short(value)}, and nobody knows how experts' factors are packed then"
        yield Finding(SUSPICIOUS, "packing-undecided", text)


def notable(adapter: AdapterFile) -> Iterator[Finding]:
    """Find keys that change the meaning of the factors, and are set."""
    for key in READERS:
        if key.is_set(adapter.get(key.name)) and key.name != "exclude_modules":
            cost = _root_lost(adapter) if key.name == "use_rslora" else ""
            text = f"{key.name}: {key.meaning}{cost}; {key.readers}"
            yield Finding(NOTE, key.name.replace("_", "-"), text)
    for name in UNUSUAL:
        if adapter.get(name) not in (None, False, []):
            text = f"{name} is {short(adapter.get(name))}: a variant of PEFT's that no other program was seen to read"
            yield Finding(NOTE, name.replace("_", "-"), text)


def _root_lost(adapter: AdapterFile) -> str:
    """Say by which factor a reader that ignores rsLoRA would be off."""
    ranks = sorted({m.rank for m in adapter.modules.values() if m.rank})
    if not ranks:
        return ""
    factors = sorted({f"{math.sqrt(rank):.3g}" for rank in (ranks[0], ranks[-1])}, key=float)
    return f", so a reader that ignores it makes the update {' to '.join(factors)} times too small"


def old_experts(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an adapter for each expert, as before PEFT took experts for arrays."""
    text = (
        "each expert has an adapter of its own, in names that PEFT converts since 0.18: {names}. PEFT 0.21.2 makes the "
        "update of gate and up too large by the root of 2 under rsLoRA, and loses what Qwen2-MoE's experts have"
    )
    yield from found(NOTE, "old-expert-names", text, [path for path in adapter.modules if OLD_EXPERT.search(path)])


def rank_above_width(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a rank that is more than a matrix can have."""
    above = [p for p, m in adapter.modules.items() if m.widths and (m.rank_in_file or 0) > min(m.widths)]
    text = "the rank is above the smaller width of {names}: more than it can use"
    yield from found(NOTE, "rank-above-width", text, above)


RULES = (
    wrong_types, negative_alpha, start, unknown_keys, two_saves, no_type, layout, notable, old_experts,
    rank_above_width,
)  # fmt: skip
"""Those of PEFT's configurations."""
