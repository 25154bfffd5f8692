"""Mixtral's and Qwen's mixtures: spellings of their folders, files merged as by PEFT, dense layers beside experts."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from minilora import Llama, adapt, adapters, attach, load_adapter, merge_adapter, save_adapter
from minilora.language import found_by_weight

from ..support.peers import (
    MIXED,
    PEERS,
    beside_again,
    close,
    ids_of,
    logits_of,
    with_peft,
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


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MIXED)
def test_files_are_merged_as_pefts_merge_and_unload_does(tmp_path, kind, rslora, layout):
    everywhere = {} if kind == "mixtral" else {"decoder_sparse_step": 1, "mlp_only_layers": []}
    theirs = written(tmp_path / "m", kind, 11, num_hidden_layers=2, **everywhere).float()
    if layout == "fused":
        theirs.save_pretrained(tmp_path / "m", save_original_format=False)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    tuned = with_peft(theirs, use_rslora=rslora, target_modules=["q_proj"], target_parameters=names).float()
    tuned.save_pretrained(tmp_path / "a")
    merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "ours")
    tuned.merge_and_unload().save_pretrained(tmp_path / "theirs", save_original_format=layout == "each")
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        close(ours[name], array, 2e-6)
    before = load_file(tmp_path / "m" / "model.safetensors")
    assert sum((before[name] != array).any() for name, array in ours.items()) >= 2 * (1 + 1 + 2)


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
        if names or ranks[0] == ranks[1]:
            loaded = beside_again(tmp_path / "m", "qwen3_moe", tmp_path / "a")
            apart = np.abs(logits_of(loaded, ids) - ours(ids)).max()
            assert (apart < 1e-9) == bool(names)
        close(attach(base, load_adapter(tmp_path / "a", dtype="float64"))(ids), ours(ids), 1e-12)
