"""The sizes of a Llama decoder, under the names of transformers' config.json, and the arrays that they ask for.

Mistral without a sliding window and Qwen2 are the same decoder. They differ in which projections have biases:

    llama      q, k, v and o, where `attention_bias` says so, and those of the MLP, where `mlp_bias` does
    mistral    none
    qwen2      q, k and v
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_choice, check_flag, check_number, check_sizes
from ..layers.rotary import check_frequencies

KINDS: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "mlp_bias": False},
}
"""The kinds of model, and what each always has, whatever its file says."""


@dataclass(frozen=True)
class LlamaConfig:
    """What a decoder is, without its weights. What makes no decoder is a ValueError or a TypeError."""

    vocab_size: int  # V
    hidden_size: int  # d
    intermediate_size: int  # m, of the MLP
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # K, which divides H
    head_dim: int  # D, even; H D may differ from d
    rms_norm_eps: float
    frequencies: tuple[float, ...]  # of the rotary positions, D / 2
    tie_word_embeddings: bool = False  # whether the head is the embedding's array
    attention_bias: bool = False  # of q, k and v, and of a Llama's o
    mlp_bias: bool = False
    # Where `frequencies` are from, in a file's words.
    rope: Mapping[str, Any] | None = field(default=None, compare=False)
    model_type: str = "llama"  # or "mistral", "qwen2"
    max_position_embeddings: int | None = None  # the context: tokens that it was made for, where that is known

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        check_sizes(**{name: getattr(self, name) for name in (*sizes, "num_key_value_heads", "head_dim")})
        check_number("rms_norm_eps", self.rms_norm_eps, above=0)
        H, K, D = self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if H % K or D % 2:
            raise ValueError(
                f"{H} attention heads, {K} key-value heads, head_dim {D}: expected groups of one size and an even "
                "head_dim"
            )
        if len(check_frequencies(self.frequencies)) != D // 2:
            raise ValueError(f"there are {len(self.frequencies)} frequencies, expected {D // 2}: head_dim is {D}")
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            check_flag(name, getattr(self, name))
        for name, always in KINDS[check_choice("model_type", self.model_type, KINDS)].items():
            if getattr(self, name) != always:
                raise ValueError(f"{name} must be {always} of a {self.model_type}, got {getattr(self, name)}")
        if self.max_position_embeddings is not None:
            check_sizes(max_position_embeddings=self.max_position_embeddings)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array, by the name that transformers gives it."""
        d, m, V = self.hidden_size, self.intermediate_size, self.vocab_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
        biased = {*(attention if self.attention_bias else ()), *(mlp if self.mlp_bias else ())}
        if self.model_type == "qwen2":
            biased.remove("o_proj")
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, d)}
        for i in range(self.num_hidden_layers):
            for part, linears in (("self_attn", attention), ("mlp", mlp)):
                for name, shape in linears.items():
                    shapes[f"model.layers.{i}.{part}.{name}.weight"] = shape
                    if name in biased:
                        shapes[f"model.layers.{i}.{part}.{name}.bias"] = shape[:1]
            shapes[f"model.layers.{i}.input_layernorm.weight"] = (d,)
            shapes[f"model.layers.{i}.post_attention_layernorm.weight"] = (d,)
        shapes["model.norm.weight"] = (d,)
        return shapes if self.tie_word_embeddings else shapes | {"lm_head.weight": (V, d)}
