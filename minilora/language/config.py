"""The configuration of a Llama decoder, as read from config.json.

Several kinds of model share this decoder. They differ in which projections have biases, in whether the q and k of each
head are normalised, and in whether a mixture of experts replaces the MLP:

    kind         biases                                                q-k norm  instead of the MLP
    llama        q, k, v and o, if `attention_bias` is true, and
                 those of the MLP, if `mlp_bias` is true               no
    mistral      none                                                  no
    qwen2        q, k and v                                            no
    qwen3        as llama's, but none in the MLP                       yes
    mixtral      none                                                  no        a mixture, renormalised
    qwen2_moe    q, k and v, if `attention_bias` is true               no        a mixture with a shared expert
    qwen3_moe    as qwen3's                                            yes       a mixture

Mistral, Mixtral and Qwen models are supported only without a sliding window.

`from_json` reads a config.json as transformers does. Versions 4 and 5 write the rotary settings differently:
version 4 uses the keys ``rope_theta`` and ``rope_scaling``, version 5 puts both into ``rope_parameters``. Both forms
are read, and contradictory values are refused. A setting that affects the result but is not implemented is refused by
name, since ignoring it would be silently wrong. `SUPPORTED` lists the supported values; docs/library/model-files.md
explains each setting.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checks import check_choice, check_flag, check_instance, check_integer, check_number, check_sizes
from ..layers.rotary import frequencies
from ..texts import named, reading, short


@dataclass(frozen=True)
class ModelKind:
    """How a kind of model differs from a Llama."""

    architecture: str  # the class in transformers
    fixed: Mapping[str, bool] = field(default_factory=dict)  # flags whose values do not depend on the file
    o_bias: bool = True  # whether o_proj has a bias when q, k and v do
    qk_norm: bool = False  # whether the q and k of each head are normalised
    experts: int = 0  # the default number of experts; 0 for a kind without mixtures
    rope_theta: float = 10_000.0  # the default rotary base
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers' values for missing settings


NO_BIASES = {"attention_bias": False, "mlp_bias": False}
MISTRAL_WINDOW = {"sliding_window": 4096}
MODEL_KINDS = {
    "llama": ModelKind("LlamaForCausalLM"),
    "mistral": ModelKind("MistralForCausalLM", NO_BIASES, defaults=MISTRAL_WINDOW | {"num_key_value_heads": 8}),
    "qwen2": ModelKind(
        "Qwen2ForCausalLM", {"attention_bias": True, "mlp_bias": False}, o_bias=False,
        defaults=MISTRAL_WINDOW | {"num_key_value_heads": 32},
    ),
    "qwen3": ModelKind(
        "Qwen3ForCausalLM", {"mlp_bias": False}, qk_norm=True,
        defaults=MISTRAL_WINDOW | {"num_key_value_heads": 32, "head_dim": 128},
    ),
    "mixtral": ModelKind(
        "MixtralForCausalLM", NO_BIASES, experts=8, rope_theta=1e6,
        defaults={"num_key_value_heads": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
    ),
    "qwen2_moe": ModelKind(
        "Qwen2MoeForCausalLM", {"mlp_bias": False}, o_bias=False, experts=60,
        defaults=MISTRAL_WINDOW | {
            "num_key_value_heads": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "qkv_bias": True,
        },
    ),
    "qwen3_moe": ModelKind(
        "Qwen3MoeForCausalLM", {"mlp_bias": False}, qk_norm=True, experts=128,
        defaults=MISTRAL_WINDOW | {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}  # fmt: skip

SIZE_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
HEADS = ("num_key_value_heads", "head_dim")
"""Sizes that are derived from the others if they are missing or null in a file."""


@dataclass(frozen=True)
class MixtureConfig:
    """The settings of a decoder's mixtures of experts. Invalid ones raise ValueError or TypeError."""

    num_experts: int  # E
    num_experts_per_tok: int  # K, the number of experts chosen at each position
    moe_intermediate_size: int  # m, the width of each expert
    norm_topk_prob: bool = True  # whether the K chosen weights are rescaled to sum to 1
    shared_expert_intermediate_size: int | None = None  # the width of the shared expert, if there is one
    decoder_sparse_step: int = 1  # every n-th layer has a mixture, the others an MLP
    mlp_only_layers: tuple[int, ...] = ()  # the indices of further layers with an MLP

    def __post_init__(self) -> None:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_integer("num_experts_per_tok", self.num_experts_per_tok, at_least=1, at_most=self.num_experts)
        check_flag("norm_topk_prob", self.norm_topk_prob)
        if self.shared_expert_intermediate_size is not None:
            check_sizes(shared_expert_intermediate_size=self.shared_expert_intermediate_size)
        for i, layer in enumerate(self.mlp_only_layers):
            check_integer(f"mlp_only_layers[{i}]", layer, at_least=0)

    def has_mixture(self, layer: int) -> bool:
        """Return whether the layer with this index has a mixture instead of an MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one mixture's arrays, by name."""
        d, m, E = hidden_size, self.moe_intermediate_size, self.num_experts
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (E, d)}
        shapes |= {"experts.gate_up_proj": (E, 2 * m, d), "experts.down_proj": (E, d, m)}
        shared = self.shared_expert_intermediate_size
        if shared is not None:
            pairs = {"gate_proj": (shared, d), "up_proj": (shared, d), "down_proj": (d, shared)}
            shapes |= {f"shared_expert.{name}.weight": shape for name, shape in pairs.items()}
            shapes["shared_expert_gate.weight"] = (1, d)
        return shapes


@dataclass(frozen=True)
class LlamaConfig:
    """The configuration of a decoder. Invalid settings raise ValueError or TypeError."""

    vocab_size: int  # V
    hidden_size: int  # d
    intermediate_size: int  # m, the width of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, a divisor of H
    head_dim: int  # D, even; H D may differ from d
    rms_norm_eps: float
    frequencies: tuple[float, ...]  # the D / 2 rotary frequencies
    tie_word_embeddings: bool = False  # whether the head shares the embedding's array
    attention_bias: bool = False  # biases of q, k and v, and of a Llama's o
    mlp_bias: bool = False
    # The settings of a file from which `frequencies` were computed.
    rope: Mapping[str, Any] | None = field(default=None, compare=False)
    model_type: str = "llama"  # one of `MODEL_KINDS`
    max_position_embeddings: int | None = None  # the context length in tokens, if known
    mixture: MixtureConfig | None = None  # only for kinds with mixtures

    def __post_init__(self) -> None:
        check_sizes(**{name: getattr(self, name) for name in (*SIZE_KEYS, *HEADS)})
        check_number("rms_norm_eps", self.rms_norm_eps, above=0)
        H, K, D = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if H % K or D % 2:
            raise ValueError(
                f"{H} attention heads, {K} key-value heads, head_dim {D}: expected key-value heads that "
                "divide the attention heads, and an even head_dim"
            )
        if len(self.frequencies) != D // 2:  # a single one would be broadcast
            raise ValueError(f"there are {len(self.frequencies)} frequencies, expected head_dim / 2 = {D // 2}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            check_flag(name, getattr(self, name))
        for name, fixed in MODEL_KINDS[check_choice("model_type", self.model_type, MODEL_KINDS)].fixed.items():
            if getattr(self, name) != fixed:
                raise ValueError(f"{name} must be {fixed} for a {self.model_type}, got {getattr(self, name)}")
        if self.max_position_embeddings is not None:
            check_sizes(max_position_embeddings=self.max_position_embeddings)
        _check_mixture(self.model_type, self.mixture)

    @property
    def qk_norm(self) -> bool:
        """Whether the q and k of each head are normalised."""
        return MODEL_KINDS[self.model_type].qk_norm

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all arrays, by their names in transformers."""
        d, m, V = self.hidden_size, self.intermediate_size, self.vocab_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
        biased = {*(attention if self.attention_bias else ()), *(mlp if self.mlp_bias else ())}
        if not MODEL_KINDS[self.model_type].o_bias:
            biased.discard("o_proj")
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, d)}
        for i in range(self.num_hidden_layers):
            mixed = self.mixture is not None and self.mixture.has_mixture(i)
            for part, linears in (("self_attn", attention), ("mlp", {} if mixed else mlp)):
                for name, shape in linears.items():
                    shapes[f"model.layers.{i}.{part}.{name}.weight"] = shape
                    if name in biased:
                        shapes[f"model.layers.{i}.{part}.{name}.bias"] = shape[:1]
            if self.mixture is not None and mixed:
                shapes |= {f"model.layers.{i}.mlp.{name}": shape for name, shape in self.mixture.shapes(d).items()}
            if self.qk_norm:
                shapes |= {f"model.layers.{i}.self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (d,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (d,)
        shapes["model.norm.weight"] = (d,)
        return shapes if self.tie_word_embeddings else shapes | {"lm_head.weight": (V, d)}


def _check_mixture(kind: str, mixture: Any) -> None:
    """Require a mixture that this kind of model can have, since a saved config.json could not express any other."""
    if not MODEL_KINDS[kind].experts:
        if mixture is not None:
            raise ValueError(f"mixture must be None for a {kind}, got {mixture}")
        return
    check_instance("mixture", mixture, MixtureConfig)
    plain = (mixture.shared_expert_intermediate_size, mixture.decoder_sparse_step, mixture.mlp_only_layers)
    if kind == "mixtral" and (not mixture.norm_topk_prob or plain != (None, 1, ())):
        raise ValueError(f"a mixtral has norm_topk_prob, no shared expert and mixtures in all layers, got {mixture}")
    if (kind == "qwen2_moe") != (mixture.shared_expert_intermediate_size is not None):
        raise ValueError(f"a qwen2_moe must have a shared expert, and other kinds must not, got {mixture} for a {kind}")


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Look up a name in another format's `names`, where * stands for a block's index; None if there is no entry."""
    number = re.search(r"\.(\d+)\.", name)
    other = names.get(name if number is None else name.replace(number[0], ".*.", 1))
    return other if other is None or number is None else other.replace("*", number[1])


# --- the sizes in a file ---

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "model_type": tuple(MODEL_KINDS),
    "hidden_act": ("silu", "swish", None),
    "partial_rotary_factor": (1, None),
    "is_causal": (True,),
    "attention_chunk_size": (None,),
    "layer_types": ("full_attention", "sliding_attention", None),  # see `_check_window` for the second
    "kv_sharing_modes": (None,),
    "per_layer_config": (None, {}),
    "text_config": (None,),
    "decoder": (None,),
    "generator": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "compression_config": (None,),
    "fusion_config": (None,),
    "transformers_weights": (None,),
}
"""Settings of a config.json that affect the result, with their supported values."""
SUPPORTED_ROPE: dict[str, Any] = {"rope_type": ("default", "linear", "llama3"), "partial_rotary_factor": (1,)}
"""The same table for ``rope_parameters`` and ``rope_scaling``."""
SUPPORTED_QUANTIZATION: dict[str, tuple[Any, ...]] = {
    "quant_method": ("bitsandbytes",),
    "load_in_4bit": (True,),
    "load_in_8bit": (False, None),
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_quant_storage": ("uint8", None),
}
"""The same table for ``quantization_config``."""

ORIGINAL_CONTEXT = "original_max_position_embeddings"


def check_settings(
    table: Mapping[str, Collection[Any]], settings: Mapping[str, Any], *, needed: Collection[str] = ()
) -> None:
    """Require one of the table's values for each setting that is present or in `needed`."""
    for name, allowed in table.items():
        value = settings.get(name)
        values = value if name == "layer_types" and isinstance(value, list) else [value]
        if (name in settings or name in needed) and any(value not in allowed for value in values):
            supported = [value for value in allowed if value not in (None, {})] or list(allowed)[:1]
            raise ValueError(f"{name} is {short(value)}, supported: {', '.join(map(short, supported))}")


def from_sizes(sizes: Mapping[str, Any], rope: Mapping[str, Any], **others: Any) -> LlamaConfig:
    """Return the configuration for a file's sizes. By default there are as many key-value heads as query heads."""
    d, H = check_sizes(hidden_size=sizes["hidden_size"], num_attention_heads=sizes["num_attention_heads"])
    defaults = {"num_key_value_heads": H, "head_dim": max(1, d // H)}
    heads = {name: sizes[name] for name in HEADS if sizes[name] is not None}
    K, D = check_sizes(**defaults | heads)
    known = {**sizes, "num_key_value_heads": K, "head_dim": D}
    return LlamaConfig(**known, frequencies=rope_frequencies(D, rope), rope=rope, **others)


def from_json(path: Path, settings: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration in a config.json; refuse any setting that is not implemented."""
    with reading(path):
        check_settings(SUPPORTED, settings, needed=("model_type",))
        kind = MODEL_KINDS[settings["model_type"]]
        return _config(settings["model_type"], kind, {**kind.defaults, **settings})


def _config(name: str, kind: ModelKind, settings: Mapping[str, Any]) -> LlamaConfig:
    """Return the configuration for settings that include this kind's defaults."""
    classes = settings.get("architectures") or []
    if set([classes] if isinstance(classes, str) else classes) - {kind.architecture, None}:
        raise ValueError(f"architectures is {short(classes)}, expected {[kind.architecture]} for model_type {name!r}")
    _check_quantization(kind, settings.get("quantization_config"))
    flags = {name: settings.get(name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias")}
    if name == "qwen2_moe":
        flags["attention_bias"] = settings["qkv_bias"]
    rope = rope_settings(settings, kind.rope_theta)
    config = from_sizes(
        {name: settings[name] for name in SIZE_KEYS} | {name: settings.get(name) for name in HEADS}, rope,
        rms_norm_eps=settings.get("rms_norm_eps", 1e-6), model_type=name,
        max_position_embeddings=settings.get("max_position_embeddings"),
        mixture=_mixture(name, kind, settings) if kind.experts else None,
        **{name: False if flag is None else flag for name, flag in {**flags, **kind.fixed}.items()},
    )  # fmt: skip
    _check_window(name, settings, config.max_position_embeddings)
    return config


def _mixture(name: str, kind: ModelKind, settings: Mapping[str, Any]) -> MixtureConfig:
    """Return the mixture settings in a config.json."""
    spellings = ("num_experts",) if name == "qwen2_moe" else ("num_experts", "num_local_experts")
    counts = [settings[spelling] for spelling in spellings if settings.get(spelling) is not None]
    if counts and counts[0] != counts[-1]:
        raise ValueError(
            f"num_experts is {short(counts[0])} and num_local_experts {short(counts[1])}: expected only one of "
            "them, since it depends on the kind of model which one is used"
        )
    E, K = counts[0] if counts else kind.experts, settings["num_experts_per_tok"]
    if name == "mixtral":
        return MixtureConfig(E, K, settings["intermediate_size"])
    return MixtureConfig(
        E,
        K,
        settings["moe_intermediate_size"],
        settings.get("norm_topk_prob", False),
        settings["shared_expert_intermediate_size"] if name == "qwen2_moe" else None,
        settings.get("decoder_sparse_step", 1),
        tuple(settings.get("mlp_only_layers") or ()),
    )


def _check_window(name: str, settings: Mapping[str, Any], context: int | None) -> None:
    """Require no sliding window, or one over the whole context; a window counts the token's own position."""
    window, used, types = (settings.get(key) for key in ("sliding_window", "use_sliding_window", "layer_types"))
    if window is None or (name.startswith("qwen") and (used is None or not check_flag("use_sliding_window", used))):
        if "sliding_attention" in (types or ()):
            raise ValueError(f"layer_types is {short(types)}, supported without a sliding window: 'full_attention'")
        return
    if name == "llama":
        raise ValueError(f"sliding_window is {short(window)}, supported: None")
    check_sizes(sliding_window=window)
    if context is None or window < context:
        raise ValueError(
            f"sliding_window is {window} and max_position_embeddings {context}, supported: no window, or one "
            "that is at least as long"
        )


def _check_quantization(kind: ModelKind, settings: Any) -> None:
    """Require that weights are unquantised or NF4, and that the exceptions are names of modules, not patterns."""
    if settings is None:
        return
    if kind.experts or not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config is {short(settings)}, supported: None")
    with named("quantization_config"):
        check_settings(SUPPORTED_QUANTIZATION, settings, needed=("quant_method", "load_in_4bit", "bnb_4bit_quant_type"))
        skipped = settings.get("llm_int8_skip_modules") or []
        if not isinstance(skipped, list) or any(not re.fullmatch(r"[\w.]+", str(name)) for name in skipped):
            raise ValueError(f"llm_int8_skip_modules is {short(skipped)}, supported: a list of module names")


# --- the rotary positions ---

ROPE = ("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", ORIGINAL_CONTEXT)
"""The supported rotary settings."""
MAX_HEAD = 1 << 16
"""The largest head dimension. No model has a larger one, and a damaged file must not make us fill the memory."""


def rope_settings(settings: Mapping[str, Any], base: float) -> dict[str, Any]:
    """Return the rotary settings of a config.json under transformers 5's names, including the base frequency."""
    new, old = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    for name, value in {"rope_parameters": new, "rope_scaling": old}.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {short(value)}, expected an object")
    if new and old and new != old:
        raise ValueError(
            f"rope_scaling is {short(old)} and rope_parameters is {short(new)}: expected only one of them, "
            "since it depends on the version of transformers which one is used"
        )
    rope = dict(new or old)
    if nested := [name for name, value in rope.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"the rotary settings contain {short(nested[0])}, a group for some layers: expected one for all layers"
        )
    if "type" in rope:  # the name in older files
        _move_into(rope, "rope_type", rope["type"])
    rope.setdefault("rope_type", "default")
    check_settings(SUPPORTED_ROPE, rope)
    for name in ("rope_theta", ORIGINAL_CONTEXT) if rope["rope_type"] == "llama3" else ("rope_theta",):
        if name in settings:
            _move_into(rope, name, settings[name])
    rope.setdefault("rope_theta", base)
    return {name: rope[name] for name in ROPE if name in rope}


def _move_into(rope: dict[str, Any], name: str, outer: Any) -> None:
    """Set a rotary setting to the value that is outside the rotary settings; refuse a different one inside."""
    if rope.setdefault(name, outer) != outer:
        raise ValueError(f"{name} is {short(rope[name])} in the rotary settings and {short(outer)} outside them")


def rope_frequencies(D: int, rope: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the rotary frequencies for a head dimension D, scaled according to the settings."""
    if D > MAX_HEAD:
        raise ValueError(f"head_dim is {D}, expected at most {MAX_HEAD}")

    def number(name: str) -> float:
        return check_number(name, rope[name], above=0)

    plain = frequencies(D, check_number("rope_theta", rope["rope_theta"], above=1))
    if rope["rope_type"] == "default":
        return plain
    factor = number("factor")
    if rope["rope_type"] == "linear":
        return tuple(f / factor for f in plain)
    low, high, context = number("low_freq_factor"), number("high_freq_factor"), number(ORIGINAL_CONTEXT)
    if high <= low:
        raise ValueError(f"high_freq_factor must be above low_freq_factor = {low}, got {high}")
    # A pair that rotates fewer than `low` times over the original context is slowed down by the factor; one that
    # rotates more than `high` times is unchanged; in between, the two frequencies are interpolated.
    share = [min(1.0, max(0.0, (context * f / (2 * math.pi) - low) / (high - low))) for f in plain]
    return tuple(f * (s + (1 - s) / factor) for f, s in zip(plain, share, strict=True))
