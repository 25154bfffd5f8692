"""Embeddings, convolutions and DoRA are merged on disk as they are in memory."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora import Adapter, DoRA, FileRefused, Linear, adapt, attach, load_adapter, merge, merge_adapter, save_adapter
from minilora.files.inspection import inspect_adapter
from minilora.variants.dora import DoRAAdapter

from ..support.adapter_folder import merged
from ..support.kinds_of_layers import EMB, PATHS, WEIGHTS, adapted_by_module, layer_of, model_of, tensors_of, trained
from ..support.memory import traced


def base_file(model, path, **more):
    """The model's arrays as a checkpoint has them."""
    tensors = dict(more)
    for kind, name in PATHS.items():
        layer = layer_of(model, name)
        tensors[f"{name}.weight"] = layer.weight
        if kind in ("linear", "conv2d"):
            tensors[f"{name}.bias"] = layer.bias
    save_file(tensors, path, {"format": "pt"})
    return tensors


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float64"]),
    dora=st.booleans(),
    rslora=st.booleans(),
    block=st.sampled_from([1, 50, 4 << 20]),
)
@example(0, "float64", True, False, 1)
@settings(max_examples=12)
def test_merging_on_disk_and_in_memory_agree(tmp_path_factory, seed, dtype, dora, rslora, block):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("m")
    model = model_of(rng, dtype)
    before = base_file(model, folder / "base.safetensors", other=np.ones(3))
    found = adapted_by_module(model, rng, use_dora=dora, use_rslora=rslora)
    save_adapter(folder / "adapter", found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.files.merge"], "BLOCK_BYTES", block)
        changes = merge_adapter(folder / "base.safetensors", folder / "adapter", folder / "out.safetensors")
    after, in_memory = load_file(folder / "out.safetensors"), merge(attach(model, found))
    assert after.keys() == before.keys()
    assert {change.module: str(change.form).split()[0] for change in changes} == {v: k for k, v in PATHS.items()}
    assert {c.module for c in changes if c.layout == "in-out"} == {PATHS["embedding"]}
    assert {c.layout for c in changes} == {"in-out", "out-in"}
    tolerance = 1e-12 if dtype == "float64" else 2e-4 if dora else 1e-5
    for name, array in after.items():
        assert (array.dtype, array.shape) == (before[name].dtype, before[name].shape)
        if name.endswith("weight"):
            expected = layer_of(in_memory, name.removesuffix(".weight")).weight
            np.testing.assert_allclose(array, expected, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(array, before[name])


def test_an_embedding_that_is_square_is_merged_transposed(tmp_path):
    base = dict.fromkeys(("emb.weight", "fc.weight"), np.zeros((2, 2)))
    one = Adapter(np.array([[1.0, 2.0]]), np.array([[1.0], [0.0]]), 1)
    after = merged(tmp_path, base, {"emb": replace(one, kind="embedding"), "fc": one}, fan_in_fan_out=False)
    np.testing.assert_array_equal(after["fc.weight"], [[1, 2], [0, 0]])
    np.testing.assert_array_equal(after["emb.weight"], [[1, 0], [2, 0]])


def test_dora_of_a_transposed_linear_layer_is_merged(tmp_path):
    """GPT-2's Conv1D stores (in, out): the rows that have a length are its columns."""
    rng = np.random.default_rng(6)
    linear = Linear(rng.standard_normal((4, 3)))
    model = trained(adapt(linear, "", rank=2, alpha=3, rng=rng, use_dora=True), rng)
    base = {"fc.weight": np.ascontiguousarray(linear.weight.T)}
    after = merged(tmp_path, base, {"fc": model}, fan_in_fan_out=True)
    np.testing.assert_allclose(after["fc.weight"], merge(model).weight.T, rtol=1e-13)


BASE = {"emb.weight": np.ones((7, 3)), "img.weight": np.ones((5, 2, 3, 4))}


def assert_merge_refused(folder, tensors, match, error=FileRefused, **options):
    save_file(BASE | tensors, folder / "base.safetensors")
    with pytest.raises(error, match=match) as refusal:
        merge_adapter(folder / "base.safetensors", folder / "saved_dora", folder / "out.safetensors", **options)
    if error is FileRefused:
        assert str(refusal.value).startswith(f"'{folder}")
    assert not (folder / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"emb.weight": np.ones((3, 7))}, r"shape \[3, 7\], the adapter is for \[7, 3\] \(of an embedding DoRA\)"),
        ({"img.weight": np.ones((5, 2, 4, 3))}, r"the adapter is for \[5, 2, 3, 4\] \(of a conv2d 3x4 DoRA\)"),
        ({"img.weight": np.ones((5, 24))}, r"the adapter is for \[5, 2, 3, 4\]"),
        ({"img.weight": np.ones((5, 2, 3, 4), "i1")}, "I8"),
        (
            {"emb.weight": np.ones((7, 3)) * [1, 1e200, 1]},
            r"'emb.weight': the weights of an output have the norm inf, by which DoRA divides$",
        ),
    ],
)
def test_a_base_that_the_adapter_does_not_fit_is_refused(saved_dora, tmp_path, change, match):
    assert_merge_refused(tmp_path, change, match)


def test_layouts_are_for_linear_layers_alone(saved_dora, tmp_path):
    match = "layouts has 'emb', .*; it has no linear layers, and only their layout can be chosen$"
    assert_merge_refused(tmp_path, {}, match, ValueError, layouts={"emb": "out-in"})


def test_a_base_weight_in_the_adapter_must_be_the_bases(saved_dora, tmp_path):
    """PEFT saves an adapted embed_tokens or lm_head with the weight that it stands beside."""
    rng = np.random.default_rng(9)
    base = {"emb.weight": rng.standard_normal((7, 3)), "img.weight": rng.standard_normal((5, 2, 3, 4))}
    tensors, weight = tensors_of(saved_dora), base["emb.weight"]
    first, last = weight.copy(), weight.copy()
    first[0, 0] += 1
    last[6, 2] *= -1  # the file's last byte alone
    for wrong in (first, last, weight.astype("f4"), weight[:6].copy()):
        save_file({**tensors, EMB + "base_layer.weight": wrong}, saved_dora / WEIGHTS)
        assert_merge_refused(tmp_path, base, "'base_model.model.emb.base_layer.weight' is not the base's 'emb.weight'")
    save_file({**tensors, EMB + "base_layer.weight": weight}, saved_dora / WEIGHTS)
    said = "which is not loaded: the adapter belongs to that weight. A merge compares it with the base$"
    with pytest.warns(UserWarning, match=f"also contains the base weight of 'emb', {said}"):
        loaded = load_adapter(saved_dora)
    for name, factor in (("lora_A", loaded["emb"].lora_A), ("lora_B", loaded["emb"].lora_B)):
        np.testing.assert_array_equal(factor, tensors[EMB + name.replace("lora_", "lora_embedding_")])
    with pytest.warns(UserWarning, match="base weight of 'emb'"):
        assert [summary.path for summary in inspect_adapter(saved_dora)] == ["emb", "img"]
    merge_adapter(tmp_path / "base.safetensors", saved_dora, tmp_path / "with.safetensors")
    save_file(tensors, saved_dora / WEIGHTS)
    merge_adapter(tmp_path / "base.safetensors", saved_dora, tmp_path / "without.safetensors")
    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("with", "without"))
    assert {name: array.tobytes() for name, array in one.items()} == {name: a.tobytes() for name, a in other.items()}


def test_dora_on_disk_is_rounded_as_in_peft(tmp_path):
    """Bit for bit: the direction in float32, its length's squares in float64, their quotient in float32 again."""
    rng = np.random.default_rng(11)
    W, A, B, m = (rng.standard_normal(n).astype("f4") / 50 for n in ((70, 60), (2, 60), (70, 2), 70))
    after = merged(tmp_path, {"fc.weight": W}, {"fc": DoRAAdapter(A, B, 5, magnitude=m)})
    V = W + (B @ A) * np.float32(2.5)
    lengths = np.sqrt((V.astype("f8") ** 2).sum(axis=1))
    assert lengths.max() < 1
    np.testing.assert_array_equal(after["fc.weight"], V * (m / lengths).astype("f4")[:, None])


def test_rows_of_zeros_are_merged_by_dora_as_they_compute(tmp_path):
    """The file gives what the layer's own merge gives."""
    rng = np.random.default_rng(4)
    W, A, B, m = (rng.standard_normal(n) for n in ((5, 4), (2, 4), (5, 2), 5))
    W[2] = B[2] = W[4] = 0  # the adapter leaves one of the two zero
    adapter = DoRAAdapter(A, B, 3, magnitude=m)
    after = merged(tmp_path, {"fc.weight": W}, {"fc": adapter})["fc.weight"]
    assert not after[2].any()
    assert after[4].all()
    np.testing.assert_allclose(after, DoRA(Linear(W), adapter).merge().weight, rtol=1e-12)


def test_a_large_embedding_with_dora_is_merged_in_little_memory(tmp_path, monkeypatch):
    """In blocks of a thirtieth of the base; the factors and their widened copies take a fifteenth of it."""
    monkeypatch.setattr(sys.modules["minilora.files.merge"], "BLOCK_BYTES", 1 << 17)
    rng = np.random.default_rng(7)
    base = rng.standard_normal((10_000, 100)).astype("f4")
    save_file({"emb.weight": base}, tmp_path / "base.safetensors")
    A, B = rng.standard_normal((1, 10_000)).astype("f4"), rng.standard_normal((100, 1)).astype("f4")
    adapter = DoRAAdapter(A, B, 1, kind="embedding", magnitude=np.ones(100, "f4"))
    save_adapter(tmp_path / "a", {"emb": adapter})
    with traced() as memory:
        merge_adapter(tmp_path / "base.safetensors", tmp_path / "a", tmp_path / "out.safetensors")
    assert memory.peak < 0.65 * base.nbytes
    lengths = np.linalg.norm(load_file(tmp_path / "out.safetensors")["emb.weight"].astype(float), axis=0)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
