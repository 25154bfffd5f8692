"""A Llama decoder in Hugging Face's layout: config.json beside one safetensors file, or several with an index.

Versions 4 and 5 of transformers write the configuration differently: ``rope_theta`` and ``rope_scaling`` stand alone in
one, and together in ``rope_parameters`` in the other. Both are read. A setting that would change what the decoder
computes, and is not supported, is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import check_flag, check_number, check_sizes
from ..layers.rotary import frequencies
from ..models.llamaconfig import LlamaConfig
from .basefile import open_base
from .errors import FileRefused, short
from .tensorfile import FLOATS, read_json

MAX_MODEL_CONFIG = 4 << 20
"""Bytes of a model's config.json, or generation_config.json, that we agree to parse."""
MAX_HEAD = 1 << 16
"""Entries of one head: what is larger is no model's, and a tuple of its frequencies would fill the memory."""

SETTINGS: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", "swish", None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "sliding_window": (None,),
}
"""What a setting may say; None stands for its absence."""


def open_folder(path: Path) -> tuple[LlamaConfig, dict[str, tuple[int, ...]], Callable[[str], np.ndarray]]:
    """Return the decoder's sizes, the shapes of the arrays in the folder, and how one is read."""
    config = parse_config(path / "config.json", read_json(path / "config.json", MAX_MODEL_CONFIG))
    base = open_base(path)
    found = {name: base.spec(name) for name in base.holder}
    if config.tie_word_embeddings:
        found.pop("lm_head.weight", None)  # some files hold it a second time
    # Old files keep the frequencies as an array of each layer.
    found = {name: spec for name, spec in found.items() if not name.endswith(".rotary_emb.inv_freq")}
    for name, spec in found.items():
        if spec.dtype not in FLOATS:
            raise FileRefused(
                base.holder[name].path, f"{short(name)} has dtype {spec.dtype}, expected one of {', '.join(FLOATS)}"
            )

    def read(name: str) -> np.ndarray:
        with base.holder[name].opened() as file:
            return base.holder[name].read(name, file)

    return config, {name: spec.shape for name, spec in found.items()}, read


def parse_config(path: Path, config: Mapping[str, Any]) -> LlamaConfig:
    """Return the sizes that a config.json states, or refuse what is not supported, naming the setting."""
    for name, allowed in SETTINGS.items():
        if config.get(name) not in allowed:
            raise FileRefused(path, f"{name} is {short(config.get(name))}, supported: {short(allowed[0])}")
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise FileRefused(path, f"architectures is {short(architectures)}, supported: ['LlamaForCausalLM']")
    try:
        return _sizes(config)
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise FileRefused(path, reason) from error


def _sizes(config: Mapping[str, Any]) -> LlamaConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    V, d, m, layers, H = check_sizes(**{name: config[name] for name in names})
    given = {"num_key_value_heads": config.get("num_key_value_heads"), "head_dim": config.get("head_dim")}
    usual = {"num_key_value_heads": H, "head_dim": max(1, d // H)}
    K, D = check_sizes(**{name: usual[name] if size is None else size for name, size in given.items()})
    if H % K or D % 2 or D > MAX_HEAD:
        raise ValueError(
            f"{H} attention heads, {K} key-value heads, head_dim {D}: expected groups of one size and an even head_dim"
        )
    flags = {name: config.get(name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    return LlamaConfig(
        V, d, m, layers, H, K, D,
        rms_norm_eps=check_number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), above=0),
        frequencies=_frequencies(D, config),
        **{name: flag is not None and check_flag(name, flag) for name, flag in flags.items()},
    )  # fmt: skip


def _frequencies(D: int, config: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the rotary frequencies, scaled as ``rope_parameters`` or ``rope_scaling`` say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ValueError(f"rope_parameters is {short(rope)}, expected an object")
    base = check_number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0)), above=1)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"partial_rotary_factor is {short(rope['partial_rotary_factor'])}, supported: 1")

    def number(name: str) -> float:
        return check_number(name, rope[name], above=0)

    plain = frequencies(D, base)
    if kind == "default":
        return plain
    if kind == "linear":
        return tuple(f / number("factor") for f in plain)
    if kind == "llama3":
        factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
        trained = number("original_max_position_embeddings")
        if high <= low:
            raise ValueError(f"high_freq_factor must be above low_freq_factor = {low}, got {high}")
        # A pair that turns fewer than `low` times over the length trained on is slowed down by the factor; one that
        # turns more than `high` times stays as it is; between the two, something between.
        share = [min(1.0, max(0.0, (trained * f / (2 * math.pi) - low) / (high - low))) for f in plain]
        return tuple(f * (s + (1 - s) / factor) for f, s in zip(plain, share, strict=True))
    raise ValueError(f"rope_type is {short(kind)}, supported: 'default', 'linear', 'llama3'")
