"""The sizes of a Llama decoder, under the names of transformers' config.json, and the arrays that they ask for.

Other kinds of model are the same decoder. They differ in which projections have biases, in whether q and k are normed
head by head, and in whether a mixture of experts stands in the place of the MLP:

    kind         biases                                                norms     in the place of the MLP
    llama        q, k, v and o, where `attention_bias` says so, and
                 those of the MLP, where `mlp_bias` does               no
    mistral      none                                                  no
    qwen2        q, k and v                                            no
    qwen3        as llama's, without those of the MLP                  q and k
    mixtral      none                                                  no        a mixture, renormalised
    qwen2_moe    q, k and v, where `attention_bias` says so            no        a mixture with a shared expert
    qwen3_moe    as qwen3's                                            q and k   a mixture

A Mistral, a Mixtral and all Qwen have no sliding window here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_choice, check_flag, check_instance, check_integer, check_number, check_sizes
from ..layers.rotary import check_frequencies

KINDS: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {"attention_bias": False, "mlp_bias": False},
    "qwen2": {"attention_bias": True, "mlp_bias": False},
    "qwen3": {"mlp_bias": False},
    "mixtral": {"attention_bias": False, "mlp_bias": False},
    "qwen2_moe": {"mlp_bias": False},
    "qwen3_moe": {"mlp_bias": False},
}
"""The kinds of model, and what each always has, whatever its file says."""

WITHOUT_O_BIAS = ("qwen2", "qwen2_moe")
WITH_NORMS = ("qwen3", "qwen3_moe")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class MixtureConfig:
    """What the mixtures of a decoder are. What makes none is a ValueError or a TypeError."""

    num_experts: int  # E
    num_experts_per_tok: int  # K, how many a position keeps
    moe_intermediate_size: int  # m, of each expert
    norm_topk_prob: bool = True  # whether the K shares of a position sum to 1
    shared_expert_intermediate_size: int | None = None  # of the expert that all positions share, where there is one
    decoder_sparse_step: int = 1  # every how many layers there is a mixture, and an MLP in the others
    mlp_only_layers: tuple[int, ...] = ()  # further layers with an MLP, by number

    def __post_init__(self) -> None:
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")
        check_sizes(**{name: getattr(self, name) for name in names})
        check_integer("num_experts_per_tok", self.num_experts_per_tok, at_least=1, at_most=self.num_experts)
        check_flag("norm_topk_prob", self.norm_topk_prob)
        if self.shared_expert_intermediate_size is not None:
            check_sizes(shared_expert_intermediate_size=self.shared_expert_intermediate_size)
        for i, layer in enumerate(self.mlp_only_layers):
            check_integer(f"mlp_only_layers[{i}]", layer, at_least=0)

    def stands_in(self, layer: int) -> bool:
        """Return whether a layer, by its number, has a mixture, and not an MLP."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def shapes(self, hidden_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array of one mixture, by its name there."""
        d, m, E, shared = (
            hidden_size,
            self.moe_intermediate_size,
            self.num_experts,
            self.shared_expert_intermediate_size,
        )
        shapes: dict[str, tuple[int, ...]] = {"gate.weight": (E, d)}
        shapes |= {"experts.gate_up_proj": (E, 2 * m, d), "experts.down_proj": (E, d, m)}
        if shared is not None:
            pairs = {"gate_proj": (shared, d), "up_proj": (shared, d), "down_proj": (d, shared)}
            shapes |= {f"shared_expert.{name}.weight": shape for name, shape in pairs.items()}
            shapes["shared_expert_gate.weight"] = (1, d)
        return shapes


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
    model_type: str = "llama"  # or another of `KINDS`
    max_position_embeddings: int | None = None  # the context: tokens that it was made for, where that is known
    mixture: MixtureConfig | None = None  # of the kinds that have mixtures

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
        _check_mixture(self.model_type, self.mixture)

    @property
    def qk_norm(self) -> bool:
        """Whether q and k are normed, head by head."""
        return self.model_type in WITH_NORMS

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array, by the name that transformers gives it."""
        d, m, V = self.hidden_size, self.intermediate_size, self.vocab_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        mlp = {"gate_proj": (m, d), "up_proj": (m, d), "down_proj": (d, m)}
        biased = {*(attention if self.attention_bias else ()), *(mlp if self.mlp_bias else ())}
        if self.model_type in WITHOUT_O_BIAS:
            biased.discard("o_proj")
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, d)}
        for i in range(self.num_hidden_layers):
            mixed = self.mixture is not None and self.mixture.stands_in(i)
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
    """Refuse a mixture that a kind of model has not, or none where it has one."""
    if mixture is None and kind not in MIXTURES:
        return
    check_instance("mixture", mixture, MixtureConfig)
    if kind not in MIXTURES:
        raise ValueError(f"mixture must be None of a {kind}, got {mixture}")
    plain = (mixture.shared_expert_intermediate_size, mixture.decoder_sparse_step, mixture.mlp_only_layers)
    if kind == "mixtral" and (not mixture.norm_topk_prob or plain != (None, 1, ())):
        raise ValueError(f"a mixtral renormalises, has no shared expert and a mixture in each layer, got {mixture}")
    if (kind == "qwen2_moe") != (mixture.shared_expert_intermediate_size is not None):
        raise ValueError(f"a qwen2_moe has a shared expert, and no other kind, got {mixture} of a {kind}")
