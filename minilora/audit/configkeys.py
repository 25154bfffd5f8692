"""The keys of adapter_config.json that change what an adapter computes, and which programs read them.

`READERS` is what the golden adapters showed: the page docs/golden-adapters.md has the versions and the scripts. "no
place" means that the program's files or layers cannot hold it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import short
from ..files.experts import B_LAYOUTS
from ..files.peft import DIGEST_KEY, KEYS, UNSET, config_text, digest
from .adapterfile import AdapterFile
from .findings import NOTE, SUSPICIOUS, WRONG, Finding, counted, listed

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
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "ensure_weight_tying",
)
"""Variants of PEFT's that no other program was seen to read."""


def key_findings(adapter: AdapterFile) -> Iterator[Finding]:
    """Yield what the configuration says besides, and what is wrong with its own values."""
    config = adapter.config
    if config is None or "PEFT" not in adapter.format:
        return
    yield from _types(config)
    yield from _start(config)
    yield from _unknown(config)
    yield from _other_save(adapter, config)
    if config.get("peft_type") is None:
        yield Finding(SUSPICIOUS, "config-type", "there is no peft_type, without which PEFT does not load it")
    layout = config.get("lora_B_layout")
    if layout is not None and (not isinstance(layout, str) or layout not in B_LAYOUTS):
        text = f"lora_B_layout is {short(layout)}, and nobody knows how experts' factors are packed then"
        yield Finding(SUSPICIOUS, "packing-undecided", text)
    for key in READERS:
        value = config.get(key.name)
        if key.is_set(value) and key.name != "exclude_modules":
            cost = _root_lost(adapter) if key.name == "use_rslora" else ""
            yield Finding(NOTE, key.name.replace("_", "-"), f"{key.name}: {key.meaning}{cost}; {key.readers}")
    for name in UNUSUAL:
        value = config.get(name)
        if value not in (None, False, []):
            text = f"{name} is {short(value)}: a variant of PEFT's that no other program was seen to read"
            yield Finding(NOTE, name.replace("_", "-"), text)
    old = [path for path in adapter.modules if OLD_EXPERT.search(path)]
    if old:
        text = (
            f"each expert has an adapter of its own, in names that PEFT converts since 0.18: {listed(old)}. PEFT "
            "0.21.2 makes the update of gate and up too large by the root of 2 under rsLoRA, and loses what "
            "Qwen2-MoE's experts have"
        )
        yield Finding(NOTE, "old-expert-names", text, tuple(old))
    above = [
        path for path, m in adapter.modules.items()
        if (widths := m.widths(adapter.tensors)) and (m.rank_in_file(adapter.tensors) or 0) > min(widths)
    ]  # fmt: skip
    if above:
        yield Finding(
            NOTE, "rank-above-width", f"the rank is above the smaller width of {listed(above)}: more than it can use"
        )


def _root_lost(adapter: AdapterFile) -> str:
    """Say by which factor a reader that ignores rsLoRA would be off."""
    ranks = sorted({m.rank for m in adapter.modules.values() if m.rank})
    if not ranks:
        return ""
    factors = sorted({f"{math.sqrt(rank):.3g}" for rank in (ranks[0], ranks[-1])}, key=float)
    return f", so a reader that ignores it makes the update {' to '.join(factors)} times too small"


def _types(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield values of the wrong type in the keys that decide numbers."""
    wrong = []
    for name in ("r", "lora_alpha"):
        value = config.get(name)
        kinds = (int,) if name == "r" else (int, float)
        if value is not None and (type(value) not in kinds or (name == "r" and value < 1)):
            wrong.append(f"{name} is {short(value)}")
        elif name == "lora_alpha" and value is not None and value < 0:
            yield Finding(SUSPICIOUS, "alpha-negative", f"lora_alpha is {value:g}: the update is subtracted")
    for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"):
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            wrong.append(f"{name} is {short(value)}")
    for name, kinds in (("rank_pattern", (int,)), ("alpha_pattern", (int, float))):
        table = config.get(name)
        bad = {k: v for k, v in table.items() if type(v) not in kinds or v <= 0} if isinstance(table, dict) else {}
        wrong += [f"{name}[{short(k)}] is {short(v)}" for k, v in bad.items()]
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        wrong.append(f"bias is {short(config['bias'])}")
    if wrong:
        yield Finding(WRONG, "config-type", f"{'; '.join(wrong)}: no value that PEFT can compute with")


def _start(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield a start that changed the base weight, and one that PEFT does not know."""
    start = config.get("init_lora_weights")
    if isinstance(start, bool | str | None) and start in KEYS["init_lora_weights"]["x-supported"]:
        return
    if not isinstance(start, str) or not OTHER_STARTS.fullmatch(start):
        yield Finding(
            WRONG, "start-unknown", f"init_lora_weights is {short(start)}, which PEFT does not know and refuses"
        )
        return
    text = (
        f"init_lora_weights is {short(start)}: the training began with another base weight, and beside the original "
        "one the factors mean nothing until that start is taken off. PEFT makes some such starts again when it "
        "loads; vLLM, mistral.rs and `minilora export` refuse them, and other readers are silently wrong. PEFT "
        "converts it: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    yield Finding(SUSPICIOUS, "start-changes-base", text)


def _unknown(config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield keys that PEFT does not have: a misspelt one is a key that nobody reads."""
    unknown = [key for key, value in config.items() if key not in KEYS and value not in UNSET][:MOST_UNKNOWN]
    spelled = {key: match[0] for key in unknown if (match := difflib.get_close_matches(key.lower(), _lower(), 1, 0.85))}
    for key, near in spelled.items():
        yield Finding(SUSPICIOUS, "key-misspelt", f"{short(key)} is no key of PEFT's, which passes over it: {near!r}?")
    if others := [key for key in unknown if key not in spelled]:
        text = f"{counted(len(others), 'key')} that this version does not know: {listed(others, 'key')}"
        yield Finding(NOTE, "key-unknown", text)


def _lower() -> list[str]:
    return [key.lower() for key in KEYS]


def _other_save(adapter: AdapterFile, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield that two files of minilora's are of different saves."""
    noted = adapter.tensors.notes.get(DIGEST_KEY)
    if noted is None or adapter.config_path is None:
        return
    text = config_text(dict(config))
    if adapter.config_path.stat().st_size == len(text) and digest(text) != noted:
        yield Finding(WRONG, "two-saves", "the configuration is not the one that was saved with the factors")
