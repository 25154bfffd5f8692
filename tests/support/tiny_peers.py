"""Tiny models of transformers with random weights, PEFT's adapters of every kind beside them, and both as files."""

from .peers import peft, torch, transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
QV = ["q_proj", "v_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | more))


def tied_llama():
    return llama(tie_word_embeddings=True)


def llama_with_biases():
    return llama(attention_bias=True)


def headless():
    return transformers.LlamaModel(transformers.LlamaConfig(**SIZES))


def classifier():
    return transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))


def gpt2():
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def mixtral():
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, num_local_experts=4))


def qwen2_moe():
    sizes = SIZES | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    config = transformers.Qwen2MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)
    return transformers.Qwen2MoeForCausalLM(config)


def qwen3_moe(**more):
    config = transformers.Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=24, **more)
    return transformers.Qwen3MoeForCausalLM(config)


def gpt_oss():
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4))


def bert():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    return transformers.BertForSequenceClassification(config)


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3))


def llava():
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    parts = {
        "vision_config": transformers.CLIPVisionConfig(**vision, image_size=16, patch_size=8),
        "text_config": transformers.LlamaConfig(**SIZES),
    }
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**parts, image_token_index=31))


def qwen2_vl():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 4, "hidden_size": SIZES["hidden_size"], "patch_size": 4}
    text = SIZES | {"rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2VLForConditionalGeneration(config)


def t5():
    config = transformers.T5Config(vocab_size=32, d_model=16, d_ff=24, num_layers=2, num_heads=4, d_kv=4)
    return transformers.T5ForConditionalGeneration(config)


class Convolutions(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = torch.nn.Conv2d(4, 6, 3), torch.nn.Conv2d(6, 8, 3, groups=2)
        self.line, self.fc = torch.nn.Conv1d(4, 5, 3), torch.nn.Linear(7, 3)


PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 3, "layers.1.mlp.up_proj": 8},
    "alpha_pattern": {"v_proj": 3, r".*\.1\..*q_proj": 5},
}
ADAPTERS = {
    "defaults": (llama, {"target_modules": QV}),
    "PEFT's own targets": (llama, {}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "rsLoRA": (llama, {"target_modules": QV, "use_rslora": True}),
    "DoRA": (llama, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA of an embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "patterns": (llama, {"target_modules": "all-linear", **PATTERNS}),
    "modules_to_save": (llama, {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "the embedding saved too": (llama, {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "an embedding": (llama, {"target_modules": [*QV, "embed_tokens"]}),
    "a head": (llama, {"target_modules": [*QV, "lm_head"]}),
    "a tied embedding": (tied_llama, {"target_modules": [*QV, "embed_tokens"]}),
    "a tied head": (tied_llama, {"target_modules": [*QV, "lm_head"]}),
    "a tied model": (tied_llama, {"target_modules": QV}),
    "biases of all": (llama_with_biases, {"target_modules": QV, "bias": "all"}),
    "biases of the adapted": (llama_with_biases, {"target_modules": QV, "bias": "lora_only"}),
    "biases where there are none": (llama, {"target_modules": QV, "bias": "all"}),
    "lora_bias": (llama_with_biases, {"target_modules": QV, "lora_bias": True}),
    "one layer": (llama, {"target_modules": QV, "layers_to_transform": 1}),
    "some layers": (llama, {"target_modules": QV, "layers_to_transform": [1], "layers_pattern": "layers"}),
    "an expression": (llama, {"target_modules": r".*\.self_attn\.[qk]_proj"}),
    "excluded modules": (llama, {"target_modules": QV, "exclude_modules": r".*\.0\..*"}),
    "Gaussian start": (llama, {"target_modules": QV, "init_lora_weights": "gaussian"}),
    "PiSSA, converted": (llama, {"target_modules": QV, "init_lora_weights": "pissa"}),
    "trained tokens": (llama, {"target_modules": QV, "trainable_token_indices": [0, 3, 7]}),
    "a rank above the width": (llama, {"target_modules": QV, "r": 64}),
    "experts": (mixtral, {"target_modules": QV, "target_parameters": EXPERTS}),
    "experts and a shared one": (qwen2_moe, {"target_modules": QV, "target_parameters": EXPERTS}),
    "experts of Qwen3": (qwen3_moe, {"target_modules": QV, "target_parameters": EXPERTS}),
    "experts stored the other way round": (gpt_oss, {"target_modules": QV, "target_parameters": EXPERTS}),
    "experts alone": (gpt_oss, {"target_parameters": EXPERTS}),
    "one array of experts": (mixtral, {"target_parameters": ["mlp.experts.down_proj"]}),
    "a router": (mixtral, {"target_parameters": ["mlp.gate.weight"]}),
    "a shared expert": (qwen2_moe, {"target_modules": ["up_proj", "down_proj"]}),
    "all-linear beside experts": (lambda: qwen3_moe(mlp_only_layers=[0]), {"target_modules": "all-linear"}),
    "experts under old names": (mixtral, {"target_modules": ["w1", "w2", "w3"]}),
    "GPT-2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "GPT-2, DoRA": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "GPT-2, by default": (gpt2, {}),
    "GPT-2's head": (gpt2, {"target_modules": ["c_attn", "lm_head"]}),
    "BERT": (bert, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "a classifier": (classifier, {"target_modules": QV, "task_type": "SEQ_CLS"}),
    "a model without a head": (headless, {"target_modules": QV, "task_type": None}),
    "features": (headless, {"target_modules": QV, "task_type": "FEATURE_EXTRACTION"}),
    "a model that sees": (llava, {"target_modules": QV, "task_type": None}),
    "its language part": (llava, {"target_modules": r".*language_model.*\.(q_proj|up_proj)", "task_type": None}),
    "all of another that sees": (qwen2_vl, {"target_modules": "all-linear", "task_type": None}),
    "an encoder and a decoder": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "convolutions": (Convolutions, {"target_modules": ["conv1", "line", "fc"], "task_type": None}),
    "a convolution in groups": (Convolutions, {"target_modules": ["conv2"], "task_type": None}),
    "ResNet": (resnet, {"target_modules": ["convolution"], "task_type": None}),
    "ResNet, DoRA": (resnet, {"target_modules": ["convolution"], "task_type": None, "use_dora": True}),
}
"""Of each a model, and PEFT's settings."""


def tuned(model, folder, *, size=0.1, dtype=None, **settings):
    """Save an adapter of a model whose every number moved, and return PEFT's model."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)
    adapted, options = peft.get_peft_model(model, config), {}
    if config.init_lora_weights == "pissa":
        adapted.save_pretrained(folder.with_name("start"))
        options = {"path_initial_model_for_weight_conversion": str(folder.with_name("start"))}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn_like(parameter)
    (adapted.to(dtype) if dtype else adapted).save_pretrained(folder, **options)
    return adapted.eval()
