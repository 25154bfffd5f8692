"""Qwen3, Mixtral and Qwen's mixtures as transformers computes them: logits, gradients, folders, adapters of experts."""

import json
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from minilora import Llama, adapt, adapters, attach, cross_entropy, load_adapter, merge, merge_adapter, save_adapter
from minilora.files import save_llama

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from transformers.models.mixtral import modeling_mixtral as mixtral  # noqa: E402
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe  # noqa: E402
from transformers.models.qwen3 import modeling_qwen3 as qwen3  # noqa: E402
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3_moe  # noqa: E402

from .test_llama_peers import SCALINGS, close, ids_of, targets_of, torch_loss  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

drawn = settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MODELS = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, qwen3.Qwen3RotaryEmbedding),
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM, mixtral.MixtralRotaryEmbedding),
    "qwen2_moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM, qwen2_moe.Qwen2MoeRotaryEmbedding),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, qwen3_moe.Qwen3MoeRotaryEmbedding),
}
MIXED = [kind for kind in MODELS if kind != "qwen3"]


class InDouble(ModuleType):
    """torch, to a module that asks for float32 whatever its arrays are."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """Their norms, angles, softmax and routers stay in float64; as they are, they compute in float32."""
    for module in (mixtral, qwen2_moe, qwen3, qwen3_moe):
        monkeypatch.setattr(module, "torch", InDouble("torch"))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float", torch.float64)  # in which they make the frequencies


def config_of(kind, seed, **changes):
    rng = np.random.default_rng(seed)
    kv, group, width = (int(rng.integers(1, 4)) for _ in range(3))
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    sizes = {
        **{"vocab_size": int(rng.integers(20, 40)), "hidden_size": 4 * kv * group, "num_key_value_heads": kv},
        **{"num_attention_heads": kv * group, "intermediate_size": int(rng.integers(5, 30)), "head_dim": 2 * width},
        **{"num_hidden_layers": layers, "rms_norm_eps": 10.0 ** -rng.integers(2, 7)},
        **{"tie_word_embeddings": bool(rng.integers(2)), "rope_parameters": dict(SCALINGS[rng.integers(4)])},
        "max_position_embeddings": 64,
    }
    if kind != "mixtral":
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


def written(folder, kind, seed, **changes):
    """A model of random sizes and weights in transformers, and in its folder."""
    torch.manual_seed(seed)
    config = config_of(kind, seed, **changes)
    config._experts_implementation = "eager"
    model = MODELS[kind][1](config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return in_double(kind, model)


def in_double(kind, model):
    model.double()
    model.config._experts_implementation = "eager"
    model.model.rotary_emb = MODELS[kind][2](model.config)
    return model.eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids), use_cache=False).logits.numpy()


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


@pytest.mark.parametrize("kind", MODELS)
@given(seed=st.integers(0, 2**31))
@drawn
def test_logits_losses_and_gradients_are_those_of_transformers(tmp_path_factory, kind, seed):
    folder = tmp_path_factory.mktemp("model")
    theirs = written(folder, kind, seed)
    ours = Llama.load(folder, dtype="float64")
    assert ours.config.model_type == kind
    grads = backward_of(theirs, ours, ids_of(theirs, seed))
    if theirs.config.tie_word_embeddings:
        grads["model.embed_tokens.weight"] += grads.pop("lm_head.weight")
    params = dict(theirs.named_parameters())
    assert grads.keys() == params.keys()
    for name, p in params.items():
        close(grads[name], p.grad.numpy(), 1e-9)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(4))
def test_a_saved_model_is_in_transformers_what_it_was(tmp_path, kind, seed):
    theirs = written(tmp_path / "m", kind, seed)
    save_llama(Llama.load(tmp_path / "m", dtype="float64"), tmp_path / "again")
    again, told = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", dtype=torch.float64, output_loading_info=True
    )
    assert not any(told.values())
    assert type(again) is MODELS[kind][1]
    ids = ids_of(theirs, seed)
    close(logits_of(in_double(kind, again), ids), logits_of(theirs, ids), 1e-9)


@pytest.mark.parametrize("kind", MIXED)
def test_fused_tensors_and_other_spellings_are_the_same_model(tmp_path, kind):
    theirs = written(tmp_path / "m", kind, 3)
    ids = ids_of(theirs, 3)
    theirs.float().save_pretrained(tmp_path / "fused", save_original_format=False)
    ours = Llama.load(tmp_path / "m", dtype="float64")
    assert (Llama.load(tmp_path / "fused", dtype="float64")(ids) == ours(ids)).all()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    count = config.pop("num_experts", None) or config.pop("num_local_experts")
    for name in ("num_experts",) if kind == "qwen2_moe" else ("num_experts", "num_local_experts"):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | {name: count}))
        assert (Llama.load(tmp_path / "m", dtype="float64")(ids) == ours(ids)).all()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MIXED)
def test_adapters_of_experts_train_as_pefts(tmp_path, kind, rslora):
    everywhere = {} if kind == "mixtral" else {"decoder_sparse_step": 1}
    theirs = written(tmp_path, kind, 11, num_hidden_layers=2, **everywhere)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(r=3, lora_alpha=5.0, use_rslora=rslora, target_modules=["q_proj"], target_parameters=names)
    tuned = peft.get_peft_model(theirs, config).double()
    rng = np.random.default_rng(0)
    ours = adapt(
        Llama.load(tmp_path, dtype="float64"), ["q_proj"], rank=3, alpha=5.0, rng=rng, use_rslora=rslora,
        target_parameters=names,
    )  # fmt: skip
    factors = {}
    for path, module in tuned.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            where = path.replace(".base_layer", "")
            where += f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""
            for part in ("lora_A", "lora_B"):
                factors[f"{where}.{part}"] = getattr(module, part)["default"].weight
    assert ours.trainable().keys() == factors.keys()
    for name, p in ours.trainable().items():
        p[...] = rng.standard_normal(p.shape) / 4
        factors[name].data = torch.tensor(p)
    ids = ids_of(theirs, 11)
    grads = backward_of(tuned, ours, ids)
    for name, p in factors.items():
        close(grads[name], p.grad.numpy(), 1e-9)
    close(merge(ours)(ids), ours(ids), 1e-9)
    z, past = ours.extend(ids[:, :9])
    for t in range(9, 17):
        z, past = ours.extend(ids[:, t : t + 1], past)
    close(z, ours(ids)[:, -1], 1e-9)


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MIXED)
def test_files_are_merged_as_pefts_merge_and_unload_does(tmp_path, kind, rslora, layout):
    everywhere = {} if kind == "mixtral" else {"decoder_sparse_step": 1, "mlp_only_layers": []}
    theirs = written(tmp_path / "m", kind, 11, num_hidden_layers=2, **everywhere).float()
    if layout == "fused":
        theirs.save_pretrained(tmp_path / "m", save_original_format=False)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    config = peft.LoraConfig(r=3, lora_alpha=5.0, use_rslora=rslora, target_modules=["q_proj"], target_parameters=names)
    tuned = peft.get_peft_model(theirs, config)
    torch.manual_seed(0)
    for name, p in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.25)
    tuned.save_pretrained(tmp_path / "a")
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "ours")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs", save_original_format=layout == "each")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        close(ours[name], array, 2e-6)
    before = load_file(tmp_path / "m" / "model.safetensors")
    assert sum((before[name] != array).any() for name, array in ours.items()) >= 2 * (1 + 1 + 2)


SETTINGS = {
    "one array": {"target_parameters": ["mlp.experts.down_proj"]},
    "gate and up": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "both": {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]},
    "both, rsLoRA": {"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"], "use_rslora": True},
    "the router": {"target_parameters": ["mlp.gate.weight"]},
    "all, and attention": {
        "target_parameters": ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "target_modules": ["q_proj", "v_proj"],
    },
    "ranks and alphas": {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"mlp.experts.down_proj": 5},
        "alpha_pattern": {"mlp.experts.gate_up_proj": 9.0},
    },
}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # PEFT's, which did match
@pytest.mark.parametrize("chosen", SETTINGS)
@pytest.mark.parametrize("kind", MIXED)
def test_pefts_adapter_of_experts_is_read_and_ours_by_peft(tmp_path, kind, chosen):
    everywhere = {} if kind == "mixtral" else {"decoder_sparse_step": 1, "mlp_only_layers": [0]}
    theirs = written(tmp_path / "m", kind, 21, num_hidden_layers=3, **everywhere)
    options = {"r": 3, "lora_alpha": 5.0, "target_modules": []} | SETTINGS[chosen]
    tuned = peft.get_peft_model(theirs, peft.LoraConfig(**options)).double()
    rng = np.random.default_rng(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_" in name:
                p.copy_(torch.tensor(rng.standard_normal(p.shape) / 4))
    tuned.save_pretrained(tmp_path / "adapter")
    ids = ids_of(theirs, 21)
    expected = logits_of(tuned, ids)
    base = Llama.load(tmp_path / "m", dtype="float64")
    assert np.abs(base(ids) - expected).max() > 1e-3
    ours = attach(base, load_adapter(tmp_path / "adapter", dtype="float64"))
    close(ours(ids), expected, 1e-9)
    save_adapter(tmp_path / "ours", adapters(ours))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(in_double(kind, again), tmp_path / "ours", autocast_adapter_dtype=False)
    close(logits_of(loaded.double().eval(), ids), expected, 1e-9)
    save_llama(merge(ours), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    close(logits_of(in_double(kind, merged), ids), expected, 1e-9)
