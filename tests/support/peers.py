"""What tests beside torch, PEFT and transformers share: models of every kind, in float64, and how both are compared."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from minilora import cross_entropy

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402, F401  (for those that import them from here)
from transformers.models.llama import modeling_llama as llama  # noqa: E402
from transformers.models.mistral import modeling_mistral as mistral  # noqa: E402
from transformers.models.mixtral import modeling_mixtral as mixtral  # noqa: E402
from transformers.models.qwen2 import modeling_qwen2 as qwen2_  # noqa: E402
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3 as qwen3  # noqa: E402
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

PEERS = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
drawn = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
often = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SCALINGS = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    {
        **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 40},
    },
]
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, llama.LlamaRotaryEmbedding),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, mistral.MistralRotaryEmbedding),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, qwen2_.Qwen2RotaryEmbedding),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, qwen3.Qwen3RotaryEmbedding),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, mixtral.MixtralRotaryEmbedding),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM, qwen2_moe.Qwen2MoeRotaryEmbedding),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, qwen3_moe.Qwen3MoeRotaryEmbedding),
}
DENSE, MIXED = ["llama", "mistral", "qwen2"], ["mixtral", "qwen2_moe", "qwen3_moe"]


class InDouble(ModuleType):
    """torch, to a module that asks for float32 whatever its arrays are."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def stay_in_double(monkeypatch):
    """Their norms, angles, softmax and routers stay in float64; as they are, they compute in float32."""
    for module in (llama, mistral, mixtral, qwen2_, qwen2_moe, qwen3, qwen3_moe):
        monkeypatch.setattr(module, "torch", InDouble("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)  # in which they make the frequencies


def config_of(kind, seed, **changes):
    rng = np.random.default_rng(seed)
    kv, group, width = (int(rng.integers(1, 4)) for _ in range(3))
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    sizes = {
        **{"vocab_size": int(rng.integers(20, 40)), "hidden_size": 4 * kv * group, "num_key_value_heads": kv},
        **{"num_attention_heads": kv * group, "intermediate_size": int(rng.integers(5, 30))},
        **{"num_hidden_layers": layers, "rms_norm_eps": 10.0 ** -rng.integers(2, 7)},
        **{"tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": dict(SCALINGS[rng.integers(4)])},
        "max_position_embeddings": 64,
    }
    if kind != "qwen2" or rng.integers(2):
        sizes["head_dim"] = 2 * width
    if kind in DENSE:
        sizes |= {
            "llama": {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))},
            "mistral": {"sliding_window": [None, 64, 100][rng.integers(3)]}, "qwen2": {"max_window_layers": 1},
        }[kind]  # fmt: skip
    elif kind != "mixtral":
        sizes["qkv_bias" if kind == "qwen2_moe" else "attention_bias"] = bool(rng.integers(2))
    if kind in MIXED:
        sizes["num_local_experts" if kind == "mixtral" else "num_experts"] = experts
        sizes["num_experts_per_tok"] = int(rng.integers(1, experts + 1))
    if kind.endswith("moe"):
        sizes |= {"moe_intermediate_size": int(rng.integers(3, 9)), "norm_topk_prob": bool(rng.integers(2))}
        sizes |= {"decoder_sparse_step": int(rng.integers(1, 3)), "mlp_only_layers": [[], [0], [1, 7]][rng.integers(3)]}
    if kind == "qwen2_moe":
        sizes["shared_expert_intermediate_size"] = int(rng.integers(3, 9))
    return MODELS[kind][0](**sizes | changes)


def written(folder, kind, seed, dtype=torch.float32, shard="1GB", **changes):
    """A model of random sizes and weights, in transformers and in its folder; its numbers are those in the file."""
    torch.manual_seed(seed)
    config = config_of(kind, seed, **changes)
    config._experts_implementation = "eager"
    model = MODELS[kind][1](config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return in_double(kind, model)


def in_double(kind, model):
    model.double()
    model.config._experts_implementation = "eager"
    model.model.rotary_emb = MODELS[kind][2](model.config)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.numpy()


def ids_of(model, seed):
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 17))


def targets_of(ids):
    """The next token, some of which do not count."""
    targets = np.roll(ids, -1, axis=1)
    targets[:, -1] = targets[0, 3] = -100
    return targets


def torch_loss(logits, targets):
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten(), ignore_index=-100)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1.0, float(np.abs(expected).max())))


def backward_of(theirs, ours, ids):
    """The gradients of both, after their logits and losses were compared."""
    logits = theirs(torch.tensor(ids)).logits
    z, cache = ours.forward(ids)
    close(z, logits.detach().numpy(), 1e-9)
    loss, dz = cross_entropy(z, targets_of(ids), out=z)
    expected = torch_loss(logits, targets_of(ids))
    close(loss, expected.item(), 1e-9)
    expected.backward()
    return ours.backward(dz, cache)[1]


def with_peft(theirs, rank=3, alpha=5, **options):
    torch.manual_seed(0)
    options = {"r": rank, "lora_alpha": alpha, "target_modules": []} | options
    model = peft.get_peft_model(theirs, peft.LoraConfig(**options)).double()
    for name, p in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def factors_of(tuned):
    """PEFT's arrays that train, by our names."""
    found = {}
    for path, module in tuned.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            where = path.replace(".base_layer", "")
            where += f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
            for ours, theirs in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                found |= {f"{where}.{ours}": factor.weight for factor in theirs.values()}
            for ours, theirs in (("lora_A", module.lora_embedding_A), ("lora_B", module.lora_embedding_B)):
                found |= {f"{where}.{ours}": factor for factor in theirs.values()}
            found |= {f"{where}.magnitude": one.weight for one in module.lora_magnitude_vector.values()}
    return found


def read_again(kind, folder, **options):
    """transformers' model of a folder, in float64."""
    return in_double(kind, transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options))


def beside_again(folder, kind, adapter):
    """PEFT's model of a saved base and a saved adapter, in float64."""
    base = read_again(kind, folder)
    return peft.PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).double().eval()


def llama_cpp_rows(weight, heads):
    """The rows of W_q and W_k in llama.cpp's order, as its converter makes it."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path, config, arrays, quantized="F32", metadata=(), *, pre=None, tokens=None, types=None, merges=("t 0",)
):
    """As llama.cpp's converter writes a Qwen2, and a Llama or a Mistral, whose rows of W_q and W_k it reorders."""
    gguf, kind = pytest.importorskip("gguf"), {"mistral": "llama"}.get(config.model_type, config.model_type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens or [f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(merges)
    writer.add_token_types(types or [1] * config.vocab_size)
    for name, value in metadata:
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(name, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if kind == "llama" else {}
    for name, array in arrays.items():
        module = name.split(".")[-2]
        array = llama_cpp_rows(array, heads[module]) if module in heads else array
        wanted = gguf.GGMLQuantizationType[quantized if array.ndim > 1 else "F32"]
        data = gguf.quantize(np.ascontiguousarray(array, np.float32), wanted)
        to = names.get_name(name, (".weight", ".bias"))
        writer.add_tensor(to, np.ascontiguousarray(data), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
