"""Rules about the keys of adapter_config.json that change what an adapter computes.

`READERS` lists which programs read each key, as measured with the golden adapters: docs/library/golden-adapters.md has
the versions and the scripts. "not representable" means that the program's files or layers cannot express it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..files.expert_adapters import B_LAYOUTS
from ..files.peft import CONFIG_KEYS, DIGEST_KEY, UNSET, config_digest, config_text
from ..texts import short
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, about
from .headers import AdapterFile

CHANGING_INITS = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga|eva")
"""Values of init_lora_weights that PEFT knows; all except "eva" change the base weight before training."""


@dataclass(frozen=True)
class Key:
    """A configuration key that changes what the factors mean."""

    name: str
    meaning: str
    is_set: Callable[[Any], bool] = bool
    readers: str = ""  # the programs that read it, and those that do not


READERS = (
    Key("use_rslora", "the update is multiplied by alpha / sqrt(r) instead of alpha / r",
        readers="read by PEFT 0.21, vLLM 0.32 and mistral.rs 0.9; not by llama.cpp's converter, nor by OpenVINO GenAI"),
    Key("rank_pattern", "some modules have their own rank, and thus their own scaling",
        readers="read by PEFT, vLLM and mistral.rs; implied by the shapes in llama.cpp; not read by OpenVINO GenAI"),
    Key("alpha_pattern", "some modules have their own alpha",
        readers="read by PEFT, vLLM and mistral.rs; not by llama.cpp's converter, nor by OpenVINO GenAI"),
    Key("use_dora", "each row of the updated weight is rescaled to a norm that the file stores",
        readers="read by PEFT and mlx-lm; refused by vLLM and mistral.rs; ignored by transformers without PEFT and by "
        "OpenVINO GenAI; not representable in llama.cpp"),
    Key("lora_bias", "the adapter adds its own bias, times the scaling",
        readers="read by PEFT; refused by vLLM and mistral.rs; not representable in llama.cpp and mlx-lm"),
    Key("bias", "biases of the base were trained too", lambda value: value not in (None, "none"),
        readers="read by PEFT; other programs were not measured"),
    Key("target_parameters", "arrays without a module of their own, such as a mixture's experts, are adapted",
        readers="read by PEFT since 0.18, which swapped the factors after 0.19.0; other programs were not measured"),
    Key("lora_B_layout", "which index of lora_B is the expert; only unsloth writes this key",
        lambda value: isinstance(value, str), "read by unsloth, refused by minilora; other programs were not measured"),
    Key("trainable_token_indices", "rows of an embedding were fully trained",
        readers="read by PEFT; other programs were not measured"),
    Key("layer_replication", "layers are repeated in the model, each copy with its own adapter",
        readers="read by PEFT; other programs were not measured"),
    Key("alora_invocation_tokens", "the adapter is active only after these tokens",
        readers="read by PEFT; other programs were not measured"),
    Key("exclude_modules", "some modules that target_modules names are excluded",
        readers="other readers do not need it: a module is adapted if the file has its tensors"),
)  # fmt: skip
MAX_UNKNOWN = 20
"""The most unknown keys that are checked for misspellings."""
OLD_EXPERT = re.compile(r"\.experts\.\d+\.")
PEFT_ONLY = (
    "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
    "ensure_weight_tying",
)  # fmt: skip
"""PEFT variants that no other measured program reads."""


def wrong_types(adapter: AdapterFile) -> Iterator[Finding]:
    """Find invalid values of the keys that affect the numbers."""
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
        yield Finding(WRONG, "config-type", f"{'; '.join(wrong)}: PEFT cannot compute with such a value")


def negative_alpha(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a negative alpha, which subtracts the update."""
    alpha = adapter.get("lora_alpha")
    if type(alpha) in (int, float) and alpha < 0:
        yield Finding(SUSPICIOUS, "alpha-negative", f"lora_alpha is {alpha:g}: the update is subtracted")


def initialization(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an initialisation that changed the base weight, or one that PEFT does not know."""
    value = adapter.get("init_lora_weights")
    if isinstance(value, bool | str | None) and value in CONFIG_KEYS["init_lora_weights"]["x-supported"]:
        return
    said = f"init_lora_weights is {short(value)}"
    if not isinstance(value, str) or not CHANGING_INITS.fullmatch(value):
        yield Finding(WRONG, "start-unknown", f"{said}, which PEFT does not know and refuses")
        return
    text = (
        f"{said}: training started from a modified base weight, so the factors are useless with the original one until "
        "that change is subtracted. PEFT repeats some of these initialisations when it loads; vLLM, mistral.rs and "
        "`minilora export` refuse them, and other readers are silently wrong. PEFT can convert the adapter: "
        "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    yield Finding(SUSPICIOUS, "start-changes-base", text)


def unknown_keys(adapter: AdapterFile) -> Iterator[Finding]:
    """Find keys that PEFT does not have, and name the key that a misspelt one resembles."""
    known = [key.lower() for key in CONFIG_KEYS]
    unknown = [key for key, value in (adapter.config or {}).items() if key not in CONFIG_KEYS and value not in UNSET]
    near = {key: difflib.get_close_matches(key.lower(), known, 1, 0.85) for key in unknown[:MAX_UNKNOWN]}
    for key, matches in near.items():
        for match in matches:
            text = f"PEFT ignores the key {short(key)}; is {match!r} meant?"
            yield Finding(SUSPICIOUS, "key-misspelt", text)
    others = [key for key, matches in near.items() if not matches]
    yield from about(NOTE, "key-unknown", "{count} that this version does not know: {names}", others, "key")


def two_saves(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a configuration and factors that minilora saved at different times."""
    noted, text, path = (
        adapter.tensors.metadata.get(DIGEST_KEY),
        config_text(dict(adapter.config or {})),
        adapter.config_path,
    )
    if noted is not None and path is not None and path.stat().st_size == len(text) and config_digest(text) != noted:
        yield Finding(WRONG, "two-saves", "the configuration is not the one that was saved with the factors")


def missing_type(adapter: AdapterFile) -> Iterator[Finding]:
    """Find a configuration without a peft_type."""
    if adapter.get("peft_type") is None:
        yield Finding(SUSPICIOUS, "config-type", "peft_type is missing: PEFT does not load the adapter without it")


def layout(adapter: AdapterFile) -> Iterator[Finding]:
    """Find an unknown packing of the experts' factors."""
    value = adapter.get("lora_B_layout")
    if value is not None and (not isinstance(value, str) or value not in B_LAYOUTS):
        text = f"lora_B_layout is {short(value)}, so the packing of the experts' factors is unknown"
        yield Finding(SUSPICIOUS, "packing-undecided", text)


def noted_keys(adapter: AdapterFile) -> Iterator[Finding]:
    """Note the keys that are set and change what the factors mean."""
    for key in READERS:
        if key.is_set(adapter.get(key.name)) and key.name != "exclude_modules":
            cost = _rslora_cost(adapter) if key.name == "use_rslora" else ""
            text = f"{key.name}: {key.meaning}{cost}; {key.readers}"
            yield Finding(NOTE, key.name.replace("_", "-"), text)
    for name in PEFT_ONLY:
        if adapter.get(name) not in (None, False, []):
            text = f"{name} is {short(adapter.get(name))}: a PEFT variant that no other measured program reads"
            yield Finding(NOTE, name.replace("_", "-"), text)


def _rslora_cost(adapter: AdapterFile) -> str:
    """Return the error factor of a reader that ignores use_rslora, as the end of a sentence."""
    ranks = sorted({m.rank for m in adapter.modules.values() if m.rank})
    if not ranks:
        return ""
    factors = sorted({f"{math.sqrt(rank):.3g}" for rank in (ranks[0], ranks[-1])}, key=float)
    return f", so a reader that ignores it makes the update {' to '.join(factors)} times too small"


def old_experts(adapter: AdapterFile) -> Iterator[Finding]:
    """Find separate adapters for each expert, as PEFT had them before it treated experts as arrays."""
    text = (
        "each expert has its own adapter, under names that PEFT has converted since 0.18: {names}. With rsLoRA, PEFT "
        "0.21.2 makes the update of gate and up too large by sqrt(2), and it loses those of a Qwen2-MoE's experts"
    )
    yield from about(NOTE, "old-expert-names", text, [path for path in adapter.modules if OLD_EXPERT.search(path)])


def rank_above_width(adapter: AdapterFile) -> Iterator[Finding]:
    """Find ranks above the smaller side of the weight."""
    above = [p for p, m in adapter.modules.items() if m.widths and (m.rank_in_file or 0) > min(m.widths)]
    text = "the rank exceeds the smaller width of {names}, so part of it is redundant"
    yield from about(NOTE, "rank-above-width", text, above)


RULES = (
    wrong_types, negative_alpha, initialization, unknown_keys, two_saves, missing_type, layout, noted_keys, old_experts,
    rank_above_width,
)  # fmt: skip
"""The rules for PEFT's configurations."""
