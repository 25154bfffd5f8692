"""Adapters of a mixture's experts folded into files: as in memory, in each layout of tensors and of factors."""

import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama, adapt, adapters, merge, merge_adapter, save_adapter
from minilora.language import save_llama
from minilora.texts import FileRefused
from minilora.variants.stackedlora import StackedLoRA

from ..support.adapter_folder import merged
from ..support.language import tiny_mixture
from .test_expert_adapters import rewritten

GATE_UP, DOWN, ROUTER = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
R, E = 3, 4  # E is that of `tiny_mixture`


def fused(folder):
    """Write a folder's tensors again with one for all experts."""
    tensors = load_file(folder / "model.safetensors")
    config = Llama.load(folder).config
    each = [name for name in tensors if ".experts." in name]
    for i in range(config.num_hidden_layers):
        own = {n: tensors.pop(n) for n in each if n.startswith(f"model.layers.{i}.")}
        for array, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            old = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
            rows = []
            for e in range(E):
                found = [own[n] for p in parts for n in own if n.split(".")[-3:-1] in ([str(e), p], [str(e), old[p]])]
                rows.append(np.concatenate(found))
            tensors[f"model.layers.{i}.mlp.experts.{array}"] = np.stack(rows)
    renamed = {name.replace("block_sparse_moe", "mlp"): array for name, array in tensors.items()}  # a Mixtral's router
    save_file(renamed, folder / "model.safetensors")


def written(tmp_path, kind, layout, names=(GATE_UP, DOWN, ROUTER), modules=("q_proj",), **options):
    """A mixture's folder in a layout, an adapter of it with random factors, and the mixture that both make."""
    save_llama(tiny_mixture(kind, dtype="float32"), tmp_path / "m")
    if layout == "fused":
        fused(tmp_path / "m")
    rng, base = np.random.default_rng(0), Llama.load(tmp_path / "m")
    model = adapt(base, list(modules), rank=R, alpha=5, rng=rng, target_parameters=list(names), **options)
    for p in model.trainable().values():
        p[...] = rng.standard_normal(p.shape)
    save_adapter(tmp_path / "a", adapters(model))
    return model


MERGED = [  # the kind, the arrays and modules adapted, how, and what another program writes into the configuration
    *((kind, (GATE_UP, DOWN, ROUTER), ("q_proj",), {}, {}) for kind in ("mixtral", "qwen2_moe")),
    *(("qwen3_moe", names, ("q_proj",), {}, {}) for names in ((GATE_UP, DOWN, ROUTER), (GATE_UP,), (DOWN,), (ROUTER,))),
    *(("mixtral", (GATE_UP, DOWN), modules, {"use_rslora": True}, {}) for modules in ((), ("q_proj", "k_proj"))),
    *(
        ("qwen3_moe", (GATE_UP, DOWN), (), {}, said)
        for said in ({"peft_version": "0.21.2"}, {"peft_version": "absent"}, {"lora_B_layout": "rank_major"})
    ),
]


@pytest.mark.parametrize(
    ("layout", "kind", "names", "modules", "options", "said"),
    [*(("each", *row) for row in MERGED), *(("fused", *row) for row in MERGED[:5])],
)
def test_files_are_merged_as_in_memory(tmp_path, monkeypatch, layout, kind, names, modules, options, said):
    monkeypatch.setattr("minilora.files.merge.BLOCK_BYTES", 80)  # one or two rows at a time
    model = written(tmp_path, kind, layout, names, modules, **options)
    if said:
        rewritten(tmp_path / "a", **said)
    same(tmp_path, model)


def same(tmp_path, model):
    before = load_file(tmp_path / "m" / "model.safetensors")
    changes = merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (a.shape, a.dtype) for n, a in after.items()} == {n: (a.shape, a.dtype) for n, a in before.items()}
    assert {name for name in before if (before[name] != after[name]).any()} == {change.name for change in changes}
    save_llama(merge(model), tmp_path / "in-memory")
    if any("gate_up_proj" in name for name in before):
        fused(tmp_path / "in-memory")
    expected = load_file(tmp_path / "in-memory" / "model.safetensors")
    assert expected.keys() == after.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(after[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("layout", ["each", "fused"])
@pytest.mark.parametrize("modules", [(), ("q_proj",)])
def test_a_checkpoint_without_the_models_head_is_merged_too(tmp_path, layout, modules):
    model = written(tmp_path, "qwen3_moe", layout, modules=modules)
    whole = load_file(tmp_path / "m" / "model.safetensors")
    headless = {name.removeprefix("model."): array for name, array in whole.items() if not name.startswith("lm_head")}
    save_file(headless, tmp_path / "h.safetensors")
    merge_adapter(tmp_path / "h.safetensors", tmp_path / "a", tmp_path / "out.safetensors")
    same(tmp_path, model)
    expected, after = (load_file(tmp_path / name) for name in ("out/model.safetensors", "out.safetensors"))
    for name, array in after.items():
        np.testing.assert_array_equal(array, expected[f"model.{name}"], err_msg=name)


def turned(array):
    return np.ascontiguousarray(array.swapaxes(1, 2))


def turned_in_all_layers(*names):
    return {f"model.layers.{i}.mlp.experts.{name}": turned for i in range(2) for name in names}


LAYER = "model.layers.1.mlp.experts"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("fused", turned_in_all_layers("gate_up_proj", "down_proj"),
         "'model.layers.0.mlp.experts.down_proj' is stored (E, in, out), as the shapes of both arrays show: "
         "only (E, out, in) is supported"),
        ("fused", turned_in_all_layers("down_proj"),
         "'model.layers.0.mlp.experts.down_proj' has shape [4, 10, 12], expected [4, 12, 10] (4 experts, 12 x "
         "10 each)"),
        ("fused", {f"{LAYER}.down_proj": None},
         f"there is no '{LAYER}.down_proj', nor a tensor for each expert, such as '{LAYER}.0.down_proj.weight'"),
        ("fused", {f"{LAYER}.down_proj": lambda array: array[:-1]},
         f"'{LAYER}.down_proj' has shape [3, 12, 10], expected [4, 12, 10] (4 experts, 12 x 10 each)"),
        ("fused", {f"{LAYER}.down_proj": lambda array: array[0]},
         f"'{LAYER}.down_proj' has shape [12, 10], expected [4, 12, 10] (4 experts, 12 x 10 each)"),
        ("each", {f"{LAYER}.2.up_proj.weight": None}, f"there is no '{LAYER}.2.up_proj.weight', expected 4 experts"),
        ("each", {f"{LAYER}.2.up_proj.weight": lambda array: array[:-1]},
         f"'{LAYER}.2.up_proj.weight' has shape [9, 12], expected [10, 12] (4 experts, 20 x 12 each)"),
        *(("each", {f"{LAYER}.4.{name}.weight": lambda _: np.ones((12, 10), "f4")},
           f"there is '{LAYER}.4.{name}.weight', expected only 4 experts") for name in ("down_proj", "up_proj")),
        ("each", {"model.layers.0.mlp.gate.weight": None}, "there is no 'model.layers.0.mlp.gate.weight'"),
    ],
)  # fmt: skip
def test_a_base_that_does_not_fit_is_refused(tmp_path, layout, change, message):
    written(tmp_path, "qwen3_moe", layout)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    for name, how in change.items():
        array = tensors.pop(name, None)
        tensors |= {name: how(array)} if how else {}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(FileRefused, match=f": {re.escape(message)}$"):
        merge_adapter(tmp_path / "m", tmp_path / "a", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "m"]


def test_a_square_array_alone_is_refused(tmp_path):
    def array(*shape):
        return np.random.default_rng(0).standard_normal(shape).astype("f4")

    base, ones = {"mlp.experts.down_proj": array(2, 6, 6)}, np.ones((6, 6), "f4")
    layers = {"mlp.experts.down_proj": StackedLoRA(ones, ones, 3, experts=2)}
    said = r"has square matrices, and the other array does not show whether it is stored \(E, out, in\)$"
    with pytest.raises(FileRefused, match=said):
        merged(tmp_path, base, layers)
    assert not (tmp_path / "out.safetensors").exists()
    after = merged(tmp_path, base | {"mlp.experts.gate_up_proj": array(2, 12, 6)}, layers, overwrite=True)
    np.testing.assert_allclose(after["mlp.experts.down_proj"], base["mlp.experts.down_proj"] + 3)
    with pytest.raises(FileRefused, match=r"is stored \(E, in, out\)"):
        merged(tmp_path, base | {"mlp.experts.gate_up_proj": array(2, 6, 12)}, layers, overwrite=True)
