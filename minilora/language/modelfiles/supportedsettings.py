"""The settings of a Llama decoder that were looked at, and what each does: the one list that code and docs share.

Two programs say what a file means: transformers of a folder, llama.cpp of a .gguf file. A setting that one of them
reads is computed here, may have only the values listed, or changes nothing that is computed here; each stands in a
table below. A setting that neither of them reads is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...checks import FileRefused, short


@dataclass(frozen=True)
class Setting:
    """One setting of a file."""

    name: str  # its key, with "llama." and the like before it; of a Qwen2 in GGUF that is "qwen2."
    does: str  # in the program that the file is for
    only: tuple[Any, ...] = ()  # the values that are supported; empty where it is read, or changes nothing here
    needed: bool = False  # whether its absence is refused too
    every: bool = False  # whether it may also be a list, each of whose values is in `only`

    def allows(self, value: Any) -> bool:
        """Return whether a value is supported."""
        values = value if self.every and isinstance(value, list) else [value]
        return not self.only or all(value in self.only for value in values)


CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
"""The class that transformers computes each kind of model with."""

FOLDER = (
    Setting("model_type", "the kind of model, read", tuple(CLASSES), needed=True),
    Setting(
        "architectures",
        "the class of the model; must be that of model_type",
        (*CLASSES.values(), None, []),
        every=True,
    ),
    Setting("vocab_size", "V, read"),
    Setting("hidden_size", "d, read"),
    Setting("intermediate_size", "m of the MLP, read"),
    Setting("num_hidden_layers", "the number of blocks, read"),
    Setting("num_attention_heads", "H, read"),
    Setting(
        "num_key_value_heads",
        "K, read; where it is missing H of llama, 8 of mistral and mixtral, 32 of qwen2 and qwen3, 16 of qwen2_moe, 4 "
        "of qwen3_moe",
    ),
    Setting("head_dim", "D, read; where it is missing 128 of qwen3, else d / H"),
    Setting("rms_norm_eps", "read; where it is missing 1e-5 of mixtral, else 1e-6"),
    Setting(
        "tie_word_embeddings", "whether the head is the embedding, read; a head of other bits beside it is refused"
    ),
    Setting("attention_bias", "whether the projections of attention have biases, read of llama, qwen3 and qwen3_moe"),
    Setting("mlp_bias", "whether those of the MLP have, read of llama"),
    Setting("hidden_act", "the gate's activation", ("silu", "swish", None)),
    Setting("rope_parameters", "the rotary positions, read (below)"),
    Setting("rope_scaling", "the same in older files, read (below); refused beside other rope_parameters"),
    Setting("rope_theta", "the rotary base, read; refused beside another in rope_parameters"),
    Setting("original_max_position_embeddings", "read for rope_type llama3; refused beside another in rope_parameters"),
    Setting("partial_rotary_factor", "how much of each head is turned", (1, None)),
    Setting("is_causal", "false, or null, lets a token attend to what follows it", (True,)),
    Setting("sliding_window", "how far attention reaches back, read: null, or but of llama all of the context"),
    Setting("use_sliding_window", "whether a Qwen has the window, read of qwen2"),
    Setting("max_window_layers", "nothing where there is no window: from which layer on a Qwen has it"),
    Setting("attention_chunk_size", "likewise", (None,)),
    Setting("layer_types", "how each layer attends, while text is generated", ("full_attention", None), every=True),
    Setting("kv_sharing_modes", "which layers share their keys and values", (None,)),
    Setting("per_layer_config", "other settings for some of the layers", (None, {})),
    Setting("text_config", "the settings of the decoder in a model of several parts", (None,)),
    Setting("decoder", "likewise", (None,)),
    Setting("generator", "likewise", (None,)),
    Setting("is_encoder_decoder", "whether an encoder stands beside the decoder", (False, None)),
    Setting("add_cross_attention", "whether the decoder attends to it", (False, None)),
    Setting("quantization_config", "how the weights are quantised, read (below)"),
    Setting("compression_config", "likewise, in older files", (None,)),
    Setting("fusion_config", "which layers are replaced by others", (None,)),
    Setting("transformers_weights", "the name of the file with the weights", (None,)),
    Setting("eos_token_id", "the tokens that end a text, read by `minilora generate`; first in generation_config.json"),
    Setting("bos_token_id", "nothing here: what a text begins with, tokenizer.json says"),
    Setting("pad_token_id", "nothing here: there is no padding"),
    Setting("max_position_embeddings", "the context, read: beyond it `minilora finetune` and `generate` warn"),
    Setting("attention_dropout", "nothing but in transformers' own training"),
    Setting("pretraining_tp", "nothing: older versions cut the products into as many parts, with the same sums"),
    Setting("initializer_range", "nothing: the weights are in the file"),
    Setting("use_cache", "nothing: the same numbers either way"),
    Setting("torch_dtype", "nothing here: what we compute in is `dtype`"),
    Setting("dtype", "nothing here: likewise"),
)
"""What config.json says of a folder, as transformers 5 reads it."""

MIXTURE = (
    Setting("num_local_experts", "E, read of mixtral and qwen3_moe; of qwen2_moe transformers passes over it"),
    Setting("num_experts", "E, read; refused beside another num_local_experts"),
    Setting("num_experts_per_tok", "K, read; where it is missing 2 of mixtral, 4 of qwen2_moe, 8 of qwen3_moe"),
    Setting(
        "moe_intermediate_size", "m of an expert, read of qwen2_moe and qwen3_moe; of mixtral it is intermediate_size"
    ),
    Setting("shared_expert_intermediate_size", "m of the shared expert, read of qwen2_moe"),
    Setting("norm_topk_prob", "whether the kept experts' shares sum to 1, read of qwen2_moe and qwen3_moe"),
    Setting("decoder_sparse_step", "every how many layers there is a mixture, read of qwen2_moe and qwen3_moe"),
    Setting("mlp_only_layers", "the layers with an MLP in its place, read of qwen2_moe and qwen3_moe"),
    Setting("qkv_bias", "whether q, k and v have biases, read of qwen2_moe; they have where it is missing"),
    Setting("quantization_config", "how the weights are quantised", (None,)),
    Setting("output_router_logits", "nothing but in transformers' own training"),
    Setting("router_aux_loss_coef", "nothing but there"),
    Setting("router_jitter_noise", "nothing but there"),
)
"""What config.json says besides of a mixture of experts."""

QUANTIZATION = (
    Setting("quantization_config.quant_method", "the library that quantised", ("bitsandbytes",), needed=True),
    Setting("quantization_config.load_in_4bit", "whether weights have four bits", (True,), needed=True),
    Setting("quantization_config.load_in_8bit", "whether they have eight", (False, None)),
    Setting("quantization_config.bnb_4bit_quant_type", "the code book", ("nf4",), needed=True),
    Setting(
        "quantization_config.bnb_4bit_quant_storage", "the type under which the codes' bytes are kept", ("uint8", None)
    ),
    Setting(
        "quantization_config.llm_int8_skip_modules",
        "the layers that are not quantised, by name, read; lm_head where it is missing",
    ),
    Setting(
        "quantization_config.bnb_4bit_use_double_quant",
        "nothing here: each weight says whether its scales are quantised",
    ),
    Setting("quantization_config.bnb_4bit_compute_dtype", "nothing here: what we compute in is `dtype`"),
)
"""What its ``quantization_config`` says. What only int8 reads, such as llm_int8_threshold, does nothing."""

FOLDER_TOKENIZER = (
    Setting("truncation", "nothing: reset, as transformers does with each call"),
    Setting("padding", "nothing: likewise"),
    Setting("post_processor", "read: what it puts before a text begins one; what it puts behind is left out"),
    Setting("added_tokens_decoder", "in tokenizer_config.json; must name tokens of tokenizer.json alone"),
    Setting("add_bos_token", "in tokenizer_config.json: nothing beside a post_processor"),
    Setting("eos_token", "in tokenizer_config.json: what a completion ends with, read; else the first eos_token_id"),
    Setting("dropout", "in the model of tokenizer.json: whether a text has other ids each time", (None, 0)),
    Setting("split_special_tokens", "in tokenizer_config.json: whether special tokens are letters", (False,)),
    Setting("tokenizer_class", "likewise: where transformers 5 has one that passes over tokenizer.json, a warning"),
    Setting("add_prefix_space", "likewise: nothing beside tokenizer.json but that warning"),
    Setting("bos_token", "likewise, or special_tokens_map.json: a special token, also one that tokenizer.json has not"),
    Setting("extra_special_tokens", "likewise, or additional_special_tokens: more of them, read"),
    Setting("chat_template", "in tokenizer_config.json, or chat_template.jinja instead: how a chat is written, read"),
)
"""What tokenizer.json, and tokenizer_config.json beside it, say; the rest is the package `tokenizers`'."""

ROPE = (
    Setting("rope_type", "how the frequencies are scaled, read", ("default", "linear", "llama3")),
    Setting("type", "the same in older files, read; refused beside another rope_type"),
    Setting("rope_theta", "the base, read; 10,000 where it is missing"),
    Setting("factor", "what frequencies are divided by, read for linear and llama3"),
    Setting("low_freq_factor", "of llama3, read"),
    Setting("high_freq_factor", "of llama3, read"),
    Setting("original_max_position_embeddings", "of llama3, read"),
    Setting("partial_rotary_factor", "how much of each head is turned", (1,)),
)
"""What ``rope_parameters`` or ``rope_scaling`` says. What only other types read, such as beta_fast, does nothing."""

GGUF = (
    Setting(
        "general.architecture", "the kind of model, read; a Mistral is a llama here", ("llama", "qwen2"), needed=True
    ),
    Setting("general.type", "what the file is: an adapter, a part for images, or a model", ("model",)),
    Setting("adapter.type", "that the file is an adapter, of which kind", ("",)),
    Setting("split.count", "the number of files that the model is split into", (0, 1)),
    Setting("llama.vocab_size", "V, read; the embedding's rows where it is missing"),
    Setting("llama.embedding_length", "d, read"),
    Setting("llama.feed_forward_length", "m of the MLP, read"),
    Setting("llama.block_count", "the number of blocks, read"),
    Setting("llama.attention.head_count", "H, read"),
    Setting("llama.attention.head_count_kv", "K, read; H where it is missing"),
    Setting("llama.attention.key_length", "D, read; d / H where it is missing"),
    Setting("llama.attention.value_length", "the width of a head's values; must be D"),
    Setting("llama.attention.layer_norm_rms_epsilon", "read", needed=True),
    Setting("llama.attention.sliding_window", "how far attention reaches back", (0,)),
    Setting("llama.attention.causal", "whether a token attends to what follows it", (True,)),
    Setting("llama.rope.dimension_count", "how much of each head is turned; must be D"),
    Setting("llama.rope.freq_base", "the rotary base, read; 10,000 where it is missing"),
    Setting("llama.rope.scaling.type", "read; linear where it is missing", ("linear", "none")),
    Setting("llama.rope.scaling.factor", "what frequencies are divided by, read; 0 is 1"),
    Setting("llama.rope.scale_linear", "the same in older files, read; refused beside another factor"),
    Setting("llama.rope.scaling.attn_factor", "what queries and keys are multiplied by; 0 is 0", (1,)),
    Setting("llama.rope.scaling.original_context_length", "nothing with the types that are supported"),
    Setting("llama.rope.scaling.finetuned", "nothing: a note"),
    Setting("llama.rope.scaling.yarn_ext_factor", "how far YaRN goes, in versions that read it", (0,)),
    Setting("llama.rope.scaling.yarn_attn_factor", "what YaRN multiplies by, likewise", (1,)),
    Setting("llama.rope.scaling.yarn_log_multiplier", "likewise", (0,)),
    Setting("llama.attention.scale", "what scores are multiplied by, in versions that read it; 0 is 1 / sqrt(D)", (0,)),
    Setting("llama.embedding_scale", "what embeddings are multiplied by, likewise; 0 is 1", (0,)),
    Setting("llama.residual_scale", "what is added to the residual stream is multiplied by, likewise; 0 is 1", (0,)),
    Setting("llama.logit_scale", "what logits are divided by, likewise; 0 is 1", (0,)),
    Setting("llama.expert_count", "the number of MLPs to choose from", (0,)),
    Setting("llama.expert_used_count", "how many are chosen", (0,)),
    Setting("llama.expert_group_count", "likewise", (0,)),
    Setting("llama.expert_group_used_count", "likewise", (0,)),
    Setting("llama.context_length", "the context, read: beyond it `minilora finetune` and `generate` warn"),
    Setting("llama.pooling_type", "nothing here: what embeddings of texts are made of"),
)
"""What a .gguf file's header says of the model, as llama.cpp reads it of its architecture llama.

Of qwen2 the keys begin with ``qwen2.``, see `gguf_settings`.
"""

GGUF_TOKENIZER = (
    Setting("tokenizer.ggml.model", "the kind of tokenizer", ("gpt2",), needed=True),
    Setting("tokenizer.ggml.pre", "how a text is split into words", ("smollm", "gpt-2", "qwen2"), needed=True),
    Setting("tokenizer.ggml.tokens", "the tokens, read"),
    Setting("tokenizer.ggml.token_type", "read: types 2, 3 and 4 stand for themselves; 2 and 3 are no text"),
    Setting("tokenizer.ggml.merges", "the merges of BPE, read"),
    Setting("tokenizer.ggml.add_bos_token", "whether a text begins with a token, read"),
    Setting("tokenizer.ggml.bos_token_id", "with which, read"),
    Setting("tokenizer.ggml.eos_token_id", "a token that ends a text, read"),
    Setting("tokenizer.ggml.eot_token_id", "likewise"),
    Setting("tokenizer.ggml.eom_token_id", "likewise"),
    Setting("tokenizer.ggml.fim_pad_token_id", "likewise; llama.cpp finds tokens that end a text by their names too"),
    Setting("tokenizer.ggml.fim_rep_token_id", "likewise"),
    Setting("tokenizer.ggml.fim_sep_token_id", "likewise"),
    Setting("tokenizer.ggml.add_eos_token", "nothing here: a prompt goes on"),
    Setting("tokenizer.ggml.add_space_prefix", "nothing with a byte-level BPE"),
    Setting("tokenizer.ggml.scores", "nothing with a byte-level BPE"),
    Setting("tokenizer.ggml.padding_token_id", "nothing but pad_token of the chat template"),
    Setting("tokenizer.ggml.unknown_token_id", "nothing but unk_token of the chat template"),
    Setting("tokenizer.chat_template", "how a chat is written, read"),
)
"""What its header says of the tokenizer."""


def check_settings(path: Path, settings: Iterable[Setting], config: Mapping[str, Any]) -> None:
    """Refuse a setting that has another value than those supported, or is missing where it is needed."""
    for setting in settings:
        name, value = setting.name, config.get(setting.name)
        if name not in config and setting.needed and not setting.only:
            raise FileRefused(path, f"there is no {name}")
        if (name in config or setting.needed) and not setting.allows(value):
            raise FileRefused(path, f"{name} is {short(value)}, supported: {_supported(setting)}")


def _supported(setting: Setting) -> str:
    """Return the values that say something, as a message lists them."""
    values = [value for value in setting.only if value not in (None, [], {})] or setting.only[:1]
    return ", ".join(short([value] if setting.every else value) for value in values)


def gguf_settings(architecture: Any) -> tuple[Setting, ...]:
    """Return the settings of a .gguf file under the names that they have in one of that architecture."""
    if architecture != "qwen2":
        return GGUF
    named = (f"qwen2.{name}" if (name := s.name.removeprefix("llama.")) != s.name else name for s in GGUF)
    return tuple(replace(setting, name=name) for setting, name in zip(GGUF, named, strict=True))


def rows(settings: Iterable[Setting]) -> list[tuple[str, str, str]]:
    """Return a table for people: each setting, the values that are supported, and what it does."""
    return [(s.name, " or ".join(map(json.dumps, s.only)) or "any", s.does) for s in settings]
