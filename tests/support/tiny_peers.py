"""Tiny models of transformers with random weights, and what adapters of them stand beside."""

from .peers import transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **more))


def classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))


def gpt2():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen3_moe(**more):
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=24, **more)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4))
