"""Mixtral and Qwen's mixtures as PEFT adapts and merges their experts: folders, gradients, files both ways."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama, adapt, adapters, attach, load_adapter, merge, merge_adapter, save_adapter
from minilora.language import found_by_weight, save_llama

from ..support.peers import (
    MIXED,
    PEERS,
    backward_of,
    close,
    ids_of,
    in_double,
    logits_of,
    peft,
    torch,
    transformers,
    written,
)

pytestmark = [*PEERS, pytest.mark.usefixtures("double")]


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


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")  # PEFT's, which did match
@pytest.mark.parametrize("ranks", [(3, 3), (3, 5)])
def test_dense_layers_of_a_qwen3_moe_reach_peft(tmp_path, ranks):
    """By the names of their modules PEFT takes them for the experts', and all but drops them."""
    theirs = written(tmp_path / "m", "qwen3_moe", 21, num_hidden_layers=3, mlp_only_layers=[0], decoder_sparse_step=2)
    base, rng = Llama.load(tmp_path / "m", dtype="float64"), np.random.default_rng(1)
    dense, others = ["up_proj"], ["gate_proj", "down_proj", "q_proj"]
    ours = adapt(base, others, rank=ranks[0], alpha=5.0, rng=rng)
    ours = adapt(ours, dense, rank=ranks[1], alpha=5.0, rng=rng)
    for p in ours.trainable().values():
        p[...] = rng.standard_normal(p.shape) / 4
    by_weight = found_by_weight(ours)
    assert len(by_weight) == 3 * 2
    ids = ids_of(theirs, 21)
    for names in ([], by_weight):
        save_adapter(tmp_path / "a", adapters(ours), target_parameters=names, overwrite=True)
        again = in_double(
            "qwen3_moe", transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float64)
        )
        if names or ranks[0] == ranks[1]:
            loaded = peft.PeftModel.from_pretrained(again, tmp_path / "a", autocast_adapter_dtype=False)
            apart = np.abs(logits_of(loaded.double().eval(), ids) - ours(ids)).max()
            assert (apart < 1e-9) == bool(names)
        close(attach(base, load_adapter(tmp_path / "a", dtype="float64"))(ids), ours(ids), 1e-12)
