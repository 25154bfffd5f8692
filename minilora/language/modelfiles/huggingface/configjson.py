"""What a model's config.json says: the sizes of a Llama decoder, in the words of transformers.

Mistral without a sliding window, Qwen and the mixtures are such decoders too: see `minilora.language.llamaconfig`. What
a .gguf or a .npz file says of its model is put into these words, and read here as well.

Versions 4 and 5 of transformers write the configuration differently: ``rope_theta`` and ``rope_scaling`` stand alone in
one, and together in ``rope_parameters`` in the other. Both are read, and two that contradict each other are refused. A
setting that would change what the decoder computes, and is not supported, is refused by its name; `supportedsettings`
lists them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....checks import FileRefused, check_flag, check_number, check_sizes, short
from ....layers.rotary import frequencies
from ...llamaconfig import KINDS, MIXTURES, LlamaConfig, MixtureConfig
from ..supportedsettings import CLASSES, FOLDER, MIXTURE, ROPE, check_settings
from .nf4tensors import check_quantization

TRAINED = "original_max_position_embeddings"
MAX_HEAD = 1 << 16
"""Entries of one head: what is larger is no model's, and a tuple of its frequencies would fill the memory."""

USUAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    "qwen2_moe": {
        **{"num_key_value_heads": 16, "sliding_window": 4096, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
        **{"shared_expert_intermediate_size": 5632, "qkv_bias": True},
    },
    "qwen3_moe": {
        **{"num_key_value_heads": 4, "sliding_window": 4096, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    },
}
"""What transformers takes for a setting that is missing, where that differs between the kinds of model."""
USUAL_BASE = {"mixtral": 1e6}
"""The rotary base, where it is missing and not 10,000."""
USUAL_EXPERTS = {"mixtral": 8, "qwen2_moe": 60, "qwen3_moe": 128}
EXPERTS = {"qwen2_moe": ("num_experts",)}
"""The settings that transformers reads the number of experts from, where these are not both spellings."""


def parse_config(path: Path, config: Mapping[str, Any]) -> LlamaConfig:
    """Return the sizes that a config.json states, or refuse what is not supported, naming the setting."""
    check_settings(path, FOLDER, config)
    if config["model_type"] in MIXTURES:
        check_settings(path, MIXTURE, config)
    check_quantization(path, config.get("quantization_config"))
    try:
        return _sizes({**USUAL[config["model_type"]], **config})
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise FileRefused(path, reason) from error


def _sizes(config: Mapping[str, Any]) -> LlamaConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    V, d, m, layers, H = check_sizes(**{name: config[name] for name in names})
    optional = {"num_key_value_heads": config.get("num_key_value_heads"), "head_dim": config.get("head_dim")}
    usual = {"num_key_value_heads": H, "head_dim": max(1, d // H)}
    K, D = check_sizes(**{name: usual[name] if size is None else size for name, size in optional.items()})
    if D > MAX_HEAD:
        raise ValueError(f"head_dim {D}: expected at most {MAX_HEAD}")
    kind, context = _kind(config), config.get("max_position_embeddings")
    if context is not None:
        check_sizes(max_position_embeddings=context)
    _check_window(kind, config, context)
    flags = {name: config.get(name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")} | KINDS[kind]
    if kind == "qwen2_moe":
        flags["attention_bias"] = check_flag("qkv_bias", config["qkv_bias"])
    return LlamaConfig(
        V, d, m, layers, H, K, D,
        rms_norm_eps=check_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), above=0),
        frequencies=_frequencies(D, config),
        rope=rope_settings(config), model_type=kind, max_position_embeddings=context,
        mixture=_mixture(kind, config) if kind in MIXTURES else None,
        **{name: flag is not None and check_flag(name, flag) for name, flag in flags.items()},
    )  # fmt: skip


def _mixture(kind: str, config: Mapping[str, Any]) -> MixtureConfig:
    """Return what a config.json says of its mixtures."""
    spellings = EXPERTS.get(kind, ("num_experts", "num_local_experts"))
    counts = {name: config[name] for name in spellings if config.get(name) is not None}
    check_sizes(**counts)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"num_experts is {counts['num_experts']} and num_local_experts {counts['num_local_experts']}: expected one "
            "of the two, since kinds of models differ in which they take"
        )
    E, K = next(iter(counts.values()), USUAL_EXPERTS[kind]), config["num_experts_per_tok"]
    if kind == "mixtral":
        return MixtureConfig(E, K, config["intermediate_size"])
    dense = config.get("mlp_only_layers")
    if dense is not None and not isinstance(dense, list):
        raise ValueError(f"mlp_only_layers is {short(dense)}, expected a list of numbers")
    return MixtureConfig(
        E,
        K,
        config["moe_intermediate_size"],
        check_flag("norm_topk_prob", config.get("norm_topk_prob", False)),
        config["shared_expert_intermediate_size"] if kind == "qwen2_moe" else None,
        config.get("decoder_sparse_step", 1),
        tuple(dense or ()),
    )


def _kind(config: Mapping[str, Any]) -> str:
    """Return the kind of model; refuse a class that is not its own, since programs differ in which they go by."""
    kind: str = config["model_type"]
    classes = config.get("architectures") or []
    if set([classes] if isinstance(classes, str) else classes) - {CLASSES[kind], None}:
        raise ValueError(f"architectures is {short(classes)} and model_type {kind!r}: expected {[CLASSES[kind]]}")
    return kind


def _check_window(kind: str, config: Mapping[str, Any], context: int | None) -> None:
    """Refuse a window through which a token sees less than all before it.

    A window of W lets it see itself and W - 1 tokens before it, so one of the whole context changes nothing within it.
    """
    window = config.get("sliding_window")
    if kind.startswith("qwen"):
        used = config.get("use_sliding_window")
        if used is None or not check_flag("use_sliding_window", used):
            return
    if window is None:
        return
    if kind == "llama":
        raise ValueError(f"sliding_window is {short(window)}, supported: None")
    check_sizes(sliding_window=window)
    if context is None or window < context:
        raise ValueError(
            f"sliding_window is {window} and max_position_embeddings {context}, supported: no window, or one that "
            "reaches over as many tokens"
        )


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says of the rotary positions, the base among it."""
    rope = _rope(config)
    settings = {"rope_type": "default"} | {setting.name: rope[setting.name] for setting in ROPE if setting.name in rope}
    settings["rope_theta"] = _agreed("rope_theta", rope, config, _usual_base(config))
    if settings["rope_type"] == "llama3":
        settings[TRAINED] = _agreed(TRAINED, rope, config)
    return {name: value for name, value in settings.items() if name not in ("type", "partial_rotary_factor")}


def _frequencies(D: int, config: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the rotary frequencies, scaled as ``rope_parameters`` or ``rope_scaling`` say."""
    rope = _rope(config)
    base = check_number("rope_theta", _agreed("rope_theta", rope, config, _usual_base(config)), above=1)
    kind = rope.get("rope_type", "default")

    def number(name: str) -> float:
        return check_number(name, rope[name], above=0)

    plain = frequencies(D, base)
    if kind == "default":
        return plain
    if kind == "linear":
        return tuple(f / number("factor") for f in plain)
    factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
    trained = check_number(TRAINED, _agreed(TRAINED, rope, config), above=0)
    if high <= low:
        raise ValueError(f"high_freq_factor must be above low_freq_factor = {low}, got {high}")
    # A pair that turns fewer than `low` times over the length trained on is slowed down by the factor; one that
    # turns more than `high` times stays as it is; between the two, something between.
    share = [min(1.0, max(0.0, (trained * f / (2 * math.pi) - low) / (high - low))) for f in plain]
    return tuple(f * (s + (1 - s) / factor) for f, s in zip(plain, share, strict=True))


def _usual_base(config: Mapping[str, Any]) -> float:
    """Return the rotary base of a kind of model whose config.json says none."""
    return USUAL_BASE.get(config["model_type"], 10_000.0)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings under version 5's names; refuse two that contradict each other."""
    for name in ("rope_parameters", "rope_scaling"):
        if config.get(name) and not isinstance(config[name], Mapping):
            raise ValueError(f"{name} is {short(config[name])}, expected an object")
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if new and old and new != old:
        raise ValueError(
            f"rope_scaling is {short(dict(old))} and rope_parameters is {short(dict(new))}: expected one of the two, "
            "since versions of transformers differ in which they take"
        )
    rope = dict(new or old)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"the rotary settings hold {short(nested[0])}, one kind of layers: expected one for all layers"
        )
    if "type" in rope:
        rope["rope_type"] = _agreed("rope_type", rope, {"rope_type": rope["type"]})
    for setting in ROPE:
        if setting.name in rope and not setting.allows(rope[setting.name]):
            raise ValueError(
                f"{setting.name} is {short(rope[setting.name])}, supported: {', '.join(map(repr, setting.only))}"
            )
    return rope


def _agreed(name: str, rope: Mapping[str, Any], config: Mapping[str, Any], *usual: Any) -> Any:
    """Return a setting that may stand among the rotary ones or beside them; refuse two that differ."""
    if name in rope and name in config and rope[name] != config[name]:
        raise ValueError(f"{name} is {short(rope[name])} in the rotary settings and {short(config[name])} beside them")
    if name not in rope and name not in config and usual:
        return usual[0]
    return rope[name] if name in rope else config[name]
