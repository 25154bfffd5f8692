"""What each setting of a model's files does: the tables of model-files.md.

A value that is not implemented is refused by the package, which has the values; here stand the words.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from minilora.language import config, gguf
from minilora.language.tokens import GGUF_SPLITS

FOLDER = {
    "model_type": "the kind of model, read",
    "architectures": "the class of the model; must be that of model_type",
    "vocab_size": "V, read",
    "hidden_size": "d, read",
    "intermediate_size": "m of the MLP, read",
    "num_hidden_layers": "the number of blocks, read",
    "num_attention_heads": "H, read",
    "num_key_value_heads": (
        "K, read; where it is missing H of llama, 8 of mistral and mixtral, 32 of qwen2 and qwen3, 16 of "
        "qwen2_moe, 4 of qwen3_moe"
    ),
    "head_dim": "D, read; where it is missing 128 of qwen3, else d / H",
    "rms_norm_eps": "read; where it is missing 1e-5 of mixtral, else 1e-6",
    "tie_word_embeddings": "whether the head is the embedding, read; a head of other bits beside it is refused",
    "attention_bias": "whether the projections of attention have biases, read of llama, qwen3 and qwen3_moe",
    "mlp_bias": "whether those of the MLP have, read of llama",
    "hidden_act": "the gate's activation",
    "rope_parameters": "the rotary positions, read (below)",
    "rope_scaling": "the same in older files, read (below); refused beside other rope_parameters",
    "rope_theta": "the rotary base, read; refused beside another in rope_parameters",
    "original_max_position_embeddings": "read for rope_type llama3; refused beside another in rope_parameters",
    "partial_rotary_factor": "how much of each head is turned",
    "is_causal": "false, or null, lets a token attend to what follows it",
    "sliding_window": "how far attention reaches back, read: null, or but of llama all of the context",
    "use_sliding_window": "whether a Qwen has the window, read of qwen2",
    "max_window_layers": "nothing where there is no window: from which layer on a Qwen has it",
    "attention_chunk_size": "likewise",
    "layer_types": "how each layer attends, while text is generated",
    "kv_sharing_modes": "which layers share their keys and values",
    "per_layer_config": "other settings for some of the layers",
    "text_config": "the settings of the decoder in a model of several parts",
    "decoder": "likewise",
    "generator": "likewise",
    "is_encoder_decoder": "whether an encoder stands beside the decoder",
    "add_cross_attention": "whether the decoder attends to it",
    "quantization_config": "how the weights are quantised, read (below)",
    "compression_config": "likewise, in older files",
    "fusion_config": "which layers are replaced by others",
    "transformers_weights": "the name of the file with the weights",
    "eos_token_id": "the tokens that end a text, read by `minilora generate`; first in generation_config.json",
    "bos_token_id": "nothing here: what a text begins with, tokenizer.json says",
    "pad_token_id": "nothing here: there is no padding",
    "max_position_embeddings": "the context, read: beyond it `minilora finetune` and `generate` warn",
    "attention_dropout": "nothing but in transformers' own training",
    "pretraining_tp": "nothing: older versions cut the products into as many parts, with the same sums",
    "initializer_range": "nothing: the weights are in the file",
    "use_cache": "nothing: the same numbers either way",
    "torch_dtype": "nothing here: what we compute in is `dtype`",
    "dtype": "nothing here: likewise",
}
"""What config.json says of a folder, as transformers 5 reads it."""

MIXTURE = {
    "num_local_experts": "E, read of mixtral and qwen3_moe; of qwen2_moe transformers passes over it",
    "num_experts": "E, read; refused beside another num_local_experts",
    "num_experts_per_tok": "K, read; where it is missing 2 of mixtral, 4 of qwen2_moe, 8 of qwen3_moe",
    "moe_intermediate_size": "m of an expert, read of qwen2_moe and qwen3_moe; of mixtral it is intermediate_size",
    "shared_expert_intermediate_size": "m of the shared expert, read of qwen2_moe",
    "norm_topk_prob": "whether the kept experts' shares sum to 1, read of qwen2_moe and qwen3_moe",
    "decoder_sparse_step": "every how many layers there is a mixture, read of qwen2_moe and qwen3_moe",
    "mlp_only_layers": "the layers with an MLP in its place, read of qwen2_moe and qwen3_moe",
    "qkv_bias": "whether q, k and v have biases, read of qwen2_moe; they have where it is missing",
    "quantization_config": "how the weights are quantised",
    "output_router_logits": "nothing but in transformers' own training",
    "router_aux_loss_coef": "nothing but there",
    "router_jitter_noise": "nothing but there",
}
"""What config.json says besides of a mixture of experts."""

ROPE = {
    "rope_type": "how the frequencies are scaled, read",
    "type": "the same in older files, read; refused beside another rope_type",
    "rope_theta": "the base, read; 10,000 where it is missing",
    "factor": "what frequencies are divided by, read for linear and llama3",
    "low_freq_factor": "of llama3, read",
    "high_freq_factor": "of llama3, read",
    "original_max_position_embeddings": "of llama3, read",
    "partial_rotary_factor": "how much of each head is turned",
}
"""What ``rope_parameters`` or ``rope_scaling`` says. What only other types read, such as beta_fast, does nothing."""

QUANTIZATION = {
    "quant_method": "the library that quantised",
    "load_in_4bit": "whether weights have four bits",
    "load_in_8bit": "whether they have eight",
    "bnb_4bit_quant_type": "the code book",
    "bnb_4bit_quant_storage": "the type under which the codes' bytes are kept",
    "llm_int8_skip_modules": ("the layers that are not quantised, by name, read; lm_head where it is missing"),
    "bnb_4bit_use_double_quant": "nothing here: each weight says whether its scales are quantised",
    "bnb_4bit_compute_dtype": "nothing here: what we compute in is `dtype`",
}
"""What its ``quantization_config`` says. What only int8 reads, such as llm_int8_threshold, does nothing."""

FOLDER_TOKENIZER = {
    "truncation": "nothing: reset, as transformers does with each call",
    "padding": "nothing: likewise",
    "post_processor": "read: what it puts before a text begins one; what it puts behind is left out",
    "added_tokens_decoder": "in tokenizer_config.json; must name tokens of tokenizer.json alone",
    "add_bos_token": "in tokenizer_config.json: nothing beside a post_processor",
    "eos_token": "in tokenizer_config.json: what a completion ends with, read; else the first eos_token_id",
    "dropout": "in the model of tokenizer.json: whether a text has other ids each time",
    "split_special_tokens": "in tokenizer_config.json: whether special tokens are letters",
    "tokenizer_class": "likewise: the special tokens where none is named; what tokenizer.json says is followed",
    "add_prefix_space": "likewise: nothing beside tokenizer.json",
    "bos_token": "likewise, or special_tokens_map.json: a special token, also one that tokenizer.json has not",
    "extra_special_tokens": "likewise, or additional_special_tokens: more of them, read",
    "chat_template": "in tokenizer_config.json, or chat_template.jinja instead: how a chat is written, read",
}
"""What tokenizer.json, and tokenizer_config.json beside it, say; the rest is the package `tokenizers`'."""

GGUF = {
    "general.architecture": "the kind of model, read; a Mistral is a llama here",
    "general.type": "what the file is: an adapter, a part for images, or a model",
    "adapter.type": "that the file is an adapter, of which kind",
    "split.count": "the number of files that the model is split into",
    "llama.vocab_size": "V, read; the embedding's rows where it is missing",
    "llama.embedding_length": "d, read",
    "llama.feed_forward_length": "m of the MLP, read",
    "llama.block_count": "the number of blocks, read",
    "llama.attention.head_count": "H, read",
    "llama.attention.head_count_kv": "K, read; H where it is missing",
    "llama.attention.key_length": "D, read; d / H where it is missing",
    "llama.attention.value_length": "the width of a head's values; must be D",
    "llama.attention.layer_norm_rms_epsilon": "read",
    "llama.attention.sliding_window": "how far attention reaches back",
    "llama.attention.causal": "whether a token attends to what follows it",
    "llama.rope.dimension_count": "how much of each head is turned; must be D",
    "llama.rope.freq_base": "the rotary base, read; 10,000 where it is missing",
    "llama.rope.scaling.type": "read; linear where it is missing",
    "llama.rope.scaling.factor": "what frequencies are divided by, read; 0 is 1",
    "llama.rope.scale_linear": "the same in older files, read; refused beside another factor",
    "llama.rope.scaling.attn_factor": "what queries and keys are multiplied by; 0 is 0",
    "llama.rope.scaling.original_context_length": "nothing with the types that are supported",
    "llama.rope.scaling.finetuned": "nothing: a note",
    "llama.rope.scaling.yarn_ext_factor": "how far YaRN goes, in versions that read it",
    "llama.rope.scaling.yarn_attn_factor": "what YaRN multiplies by, likewise",
    "llama.rope.scaling.yarn_log_multiplier": "likewise",
    "llama.attention.scale": "what scores are multiplied by, in versions that read it; 0 is 1 / sqrt(D)",
    "llama.embedding_scale": "what embeddings are multiplied by, likewise; 0 is 1",
    "llama.residual_scale": "what is added to the residual stream is multiplied by, likewise; 0 is 1",
    "llama.logit_scale": "what logits are divided by, likewise; 0 is 1",
    "llama.expert_count": "the number of MLPs to choose from",
    "llama.expert_used_count": "how many are chosen",
    "llama.expert_group_count": "likewise",
    "llama.expert_group_used_count": "likewise",
    "llama.context_length": "the context, read: beyond it `minilora finetune` and `generate` warn",
    "llama.pooling_type": "nothing here: what embeddings of texts are made of",
}
"""What a .gguf file's header says of the model, as llama.cpp reads it of its architecture llama."""

GGUF_TOKENIZER = {
    "tokenizer.ggml.model": "the kind of tokenizer",
    "tokenizer.ggml.pre": "how a text is split into words",
    "tokenizer.ggml.tokens": "the tokens, read",
    "tokenizer.ggml.token_type": "read: types 2, 3 and 4 stand for themselves; 2 and 3 are no text",
    "tokenizer.ggml.merges": "the merges of BPE, read",
    "tokenizer.ggml.add_bos_token": "whether a text begins with a token, read",
    "tokenizer.ggml.bos_token_id": "with which, read",
    "tokenizer.ggml.eos_token_id": "a token that ends a text, read",
    "tokenizer.ggml.eot_token_id": "likewise",
    "tokenizer.ggml.eom_token_id": "likewise",
    "tokenizer.ggml.fim_pad_token_id": "likewise; llama.cpp finds tokens that end a text by their names too",
    "tokenizer.ggml.fim_rep_token_id": "likewise",
    "tokenizer.ggml.fim_sep_token_id": "likewise",
    "tokenizer.ggml.add_eos_token": "nothing here: a prompt goes on",
    "tokenizer.ggml.add_space_prefix": "nothing with a byte-level BPE",
    "tokenizer.ggml.scores": "nothing with a byte-level BPE",
    "tokenizer.ggml.padding_token_id": "nothing but pad_token of the chat template",
    "tokenizer.ggml.unknown_token_id": "nothing but unk_token of the chat template",
    "tokenizer.chat_template": "how a chat is written, read",
}
"""What its header says of the tokenizer."""

IN_GGUF = {f"llama.{name}": only for name, only in gguf.MUST.items()}
OF_ITS_TOKENIZER = {"tokenizer.ggml.model": ("gpt2",), "tokenizer.ggml.pre": GGUF_SPLITS}
CLASSES = tuple(kind.architecture for kind in config.KINDS.values())

TABLES: dict[str, tuple[Mapping[str, str], Mapping[str, Collection[Any]]]] = {
    "config.json": (FOLDER, config.MUST | {"architectures": (*CLASSES, None, [])}),
    "config.json, of a mixture": (MIXTURE, {"quantization_config": (None,)}),
    "rope_parameters": (ROPE, config.ROPE_MUST),
    "quantization_config": (QUANTIZATION, config.QUANTIZATION_MUST),
    "tokenizer.json": (FOLDER_TOKENIZER, {"dropout": (None, 0), "split_special_tokens": (False,)}),
    ".gguf": (GGUF | GGUF_TOKENIZER, gguf.FILE_MUST | IN_GGUF | OF_ITS_TOKENIZER),
}
"""By file: what each setting does, and the values that are supported of those that have only some."""


def rows(file: str) -> list[tuple[str, str, str]]:
    """Return a table for people: each setting, the values that are supported, and what it does."""
    does, must = TABLES[file]
    if missing := must.keys() - does.keys():
        raise KeyError(f"no word of {sorted(missing)}")
    return [(name, " or ".join(map(json.dumps, must.get(name, ()))) or "any", text) for name, text in does.items()]
