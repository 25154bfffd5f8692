"""Embeddings, convolutions and DoRA under PEFT's keys and in its shapes."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from minilora import (
    Adapter,
    Conv1d,
    Conv2d,
    DoRA,
    DoRAAdapter,
    Embedding,
    FileRefused,
    Linear,
    LoRA,
    LoRALinear,
    Sequential,
    adapt,
    adapters,
    attach,
    load_adapter,
    merge,
    save_adapter,
)
from minilora.cli import main
from minilora.cli.inspect import table
from minilora.files.inspection import inspect_adapter
from minilora.files.peft import NORM_KEY
from minilora.files.tensors import TensorFile
from minilora.variants.adapter import AdaptedRows

from ..support.adapter_folder import change_json
from ..support.kinds_of_layers import (
    CONFIG,
    EMB,
    IMG,
    PATHS,
    PREFIX,
    WEIGHTS,
    adapted_by_module,
    layer_of,
    model_of,
    tensors_of,
    trained,
)

NETS = ("linear", "embedding", "conv1d", "conv2d")


def input_for(layer, rng):
    base = getattr(layer, "base", layer)
    if isinstance(base, Linear):
        return rng.standard_normal((4, base.in_features)).astype(base.weight.dtype)
    if isinstance(base, Embedding):
        return rng.integers(0, len(base.weight), (3, 4))
    return rng.standard_normal((2, base.weight.shape[1], *(6 for _ in base.kernel))).astype(base.weight.dtype)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(["float32", "float64"]),
    dora=st.booleans(),
    rslora=st.booleans(),
    norm=st.sampled_from(["constant", "full"]),
)
@example(0, "float32", True, True, "full")
@settings(max_examples=12)
def test_every_kind_comes_back_bit_for_bit(tmp_path_factory, seed, dtype, dora, rslora, norm):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("a")
    model = model_of(rng, dtype)
    saved = adapted_by_module(model, rng, use_dora=dora, use_rslora=rslora, dora_norm=norm)
    save_adapter(folder, saved)
    loaded = load_adapter(folder)
    for path, adapter in saved.items():
        other = loaded[path]
        assert type(other) is type(adapter)
        for name in ("kind", "kernel", "use_rslora", "alpha", "start", *(["dora_norm"] if dora else [])):
            assert getattr(other, name) == getattr(adapter, name), name
        assert list(other.trainable()) == ["lora_A", "lora_B", *(["magnitude"] if dora else [])]
        for name, array in other.trainable().items():
            assert array.dtype == adapter.trainable()[name].dtype
            np.testing.assert_array_equal(array, adapter.trainable()[name])


NAMED = {  # of each module its layer, and by PEFT's names the shapes of A, of B, and of a magnitude, at rank 6
    "enc.fc": (Linear(np.ones((4, 5))), {"lora_A.weight": (6, 5), "lora_B.weight": (4, 6)}, (4,)),
    "emb": (Embedding(np.ones((7, 3))), {"lora_embedding_A": (6, 7), "lora_embedding_B": (3, 6)}, (3,)),
    "seq": (Conv1d(np.ones((3, 2, 4))), {"lora_A.weight": (6, 2, 4), "lora_B.weight": (3, 6, 1)}, (1, 3, 1)),
    "img": (
        Conv2d(np.ones((5, 2, 3, 4))),
        {"lora_A.weight": (6, 2, 3, 4), "lora_B.weight": (5, 6, 1, 1)},
        (1, 5, 1, 1),
    ),
}


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a start is saved
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("module", NAMED)
def test_names_and_shapes_are_pefts(tmp_path, module, dora):
    layer, shapes, magnitude = NAMED[module]
    save_adapter(tmp_path, {module: adapt(layer, "", rank=6, alpha=3, rng=np.random.default_rng(0), use_dora=dora)})
    expected = shapes | ({"lora_magnitude_vector": magnitude} if dora else {})
    found = {key: array.shape for key, array in tensors_of(tmp_path).items()}
    assert found == {f"{PREFIX}{module}.{name}": shape for name, shape in expected.items()}
    assert config_of(tmp_path)["use_dora"] is dora


def test_a_saved_adapter_that_was_not_trained_is_reported(tmp_path):
    """By its change of weight; a magnitude changes the weight without it."""
    rng = np.random.default_rng(0)
    model = adapt(model_of(rng), ["linear", "embedding", "conv2d"], rank=2, alpha=3, rng=rng)
    for count, path in ((3, "enc.linear"), (2, "enc.embedding"), (1, "conv2d")):
        said = f"^{count} of the 3 saved adapters, such as '{path}', change no weight: B A is zero, as before "
        with pytest.warns(UserWarning, match=said):
            save_adapter(tmp_path, adapters(model), overwrite=True)
        (adapters(model)[path].lora_A if path == "enc.embedding" else adapters(model)[path].lora_B)[:] = 1
    save_adapter(tmp_path, adapters(model), overwrite=True)
    dora = adapt(model_of(rng), ["linear"], rank=2, alpha=3, rng=rng, use_dora=True)
    save_adapter(tmp_path, adapters(dora), overwrite=True)


def test_a_convolutions_columns_are_channel_first(tmp_path):
    """Column c KH KW + i KW + j of lora_A is entry [c, i, j] of PEFT's."""
    A, B = np.arange(2 * 24.0).reshape(2, 24), np.ones((5, 2))
    save_adapter(tmp_path, {"img": Adapter(A, B, 1, kind="conv2d", kernel=(3, 4))})
    stored = tensors_of(tmp_path)[PREFIX + "img.lora_A.weight"]
    for r, c, i, j in np.ndindex(2, 2, 3, 4):
        assert stored[r, c, i, j] == A[r, c * 12 + i * 4 + j]


def test_adapters_and_adapted_layers_make_one_file(tmp_path):
    rng = np.random.default_rng(1)
    for dora in (False, True):
        model = trained(adapt(model_of(rng), list(PATHS.values()), rank=2, alpha=3, rng=rng, use_dora=dora), rng)
        whole = {path: layer_of(model, path) for path in PATHS.values()}
        assert {type(layer) for layer in whole.values()} == {DoRA if dora else LoRALinear, AdaptedRows}
        save_adapter(tmp_path / "a", adapters(model), overwrite=True)
        save_adapter(tmp_path / "b", {path: whole[path] for path in adapters(model)}, overwrite=True)
        for name in (CONFIG, WEIGHTS):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_plain_adapter_beside_a_convolution_is_saved_as_one(tmp_path):
    layer = AdaptedRows(Conv1d(np.ones((3, 2, 4))), LoRA(np.ones((2, 8)), np.ones((3, 2)), 1))
    save_adapter(tmp_path, {"seq": layer})
    assert tensors_of(tmp_path)[PREFIX + "seq.lora_A.weight"].shape == (2, 2, 4)
    assert load_adapter(tmp_path)["seq"].kernel == (4,)


def test_an_adapter_prints_what_is_not_as_usual(saved_dora):
    assert repr(load_adapter(saved_dora)["img"]) == (
        "DoRAAdapter(lora_A=(2, 24), lora_B=(5, 2), alpha=3.0, kind='conv2d', kernel=(3, 4), magnitude=(5,))"
    )


def test_a_dtype_asked_for_is_the_magnitudes_too(tmp_path):
    save_adapter(tmp_path, {"fc": DoRAAdapter(np.ones((1, 2)), np.ones((3, 1)), 1, magnitude=np.ones(3))})
    adapter = load_adapter(tmp_path, dtype="float32")["fc"]
    assert {adapter.lora_A.dtype, adapter.lora_B.dtype, adapter.magnitude.dtype} == {np.dtype("float32")}


@pytest.mark.parametrize(
    ("kind", "rslora", "dora"),
    [
        *((kind, False, False) for kind in NETS),
        ("linear", True, False),
        ("embedding", False, True),
        ("conv2d", True, True),
    ],
)
def test_pissa_is_saved_over_the_original_base(tmp_path, kind, rslora, dora):
    """Rank 2r, and lora_alpha doubled, times sqrt 2 more where the file divides by the root of the rank."""
    rng = np.random.default_rng(3)
    bases = {
        "linear": Linear(rng.standard_normal((6, 5))),
        "embedding": Embedding(rng.standard_normal((7, 4))),
        "conv1d": Conv1d(rng.standard_normal((5, 2, 3))),
        "conv2d": Conv2d(rng.standard_normal((5, 2, 3, 2))),
    }
    options = {"init": "pissa", "use_rslora": rslora, "use_dora": dora}
    model = trained(adapt(Sequential(net=bases[kind]), ["net"], rank=2, alpha=3, rng=rng, **options), rng)
    save_adapter(tmp_path, adapters(model), overwrite=True)
    config, loaded = config_of(tmp_path), load_adapter(tmp_path)
    assert (config["r"], config["use_rslora"], config["init_lora_weights"]) == (4, rslora, True)
    assert config["lora_alpha"] == pytest.approx(6 / math.sqrt(2) if rslora else 6, rel=1e-15)
    x = input_for(bases[kind], rng)
    again = attach(Sequential(net=bases[kind]), loaded)
    np.testing.assert_allclose(again.net(x), model.net(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.long), 32])
def test_every_alpha_and_rank_come_back_from_a_file(tmp_path, use_rslora, stride):
    pairs = [(alpha, rank) for rank in range(1, 65) for alpha in range(1 + rank % stride, 200, stride)]
    pairs += [(alpha, rank) for rank in (1, 2, 3, 5, 8, 13, 64) for alpha in (2.5, 0.3, 1 / 3)]
    ones = {rank: (np.ones((rank, 1), "float16"), np.ones((1, rank), "float16")) for _, rank in pairs}
    save_adapter(tmp_path, {f"m{i}": Adapter(*ones[r], a, use_rslora=use_rslora) for i, (a, r) in enumerate(pairs)})
    config, found = config_of(tmp_path), load_adapter(tmp_path)
    assert len(found) == (12_757 if stride == 1 else 419)
    assert {config["lora_alpha"], *config["alpha_pattern"].values()} == {alpha for alpha, _ in pairs}  # as it was said
    for (alpha, rank), one in zip(pairs, found.values(), strict=True):
        assert (one.alpha, one.rank, one.use_rslora) == (alpha, rank, use_rslora)
        assert one.scaling == (alpha / rank**0.5 if use_rslora else alpha / rank)


def test_rslora_beside_plain_lora_keeps_both_scalings(tmp_path):
    """And each module its type of numbers."""
    plain = Adapter(np.ones((4, 3)), np.ones((2, 4)), 6)
    stabilised = Adapter(np.ones((4, 3), "f4"), np.ones((2, 4), "f4"), 5, use_rslora=True)
    save_adapter(tmp_path, {"a": plain, "b": stabilised})
    config, found = config_of(tmp_path), load_adapter(tmp_path)
    assert (config["use_rslora"], config["lora_alpha"], config["alpha_pattern"]) == (False, 6, {"^b": 10})
    assert [(a.scaling, a.lora_A.dtype) for a in found.values()] == [(1.5, np.float64), (2.5, np.float32)]


def test_the_full_norm_is_noted_by_module(tmp_path):
    one = DoRAAdapter(np.ones((1, 2)), np.ones((3, 1)), 1, magnitude=np.ones(3))
    save_adapter(tmp_path, {"a": replace(one, dora_norm="full"), "b": one, "c.d": replace(one, dora_norm="full")})
    assert TensorFile(tmp_path / WEIGHTS).metadata[NORM_KEY] == "a\nc.d"
    assert {name: adapter.dora_norm for name, adapter in load_adapter(tmp_path).items()} == {
        "a": "full",
        "b": "constant",
        "c.d": "full",
    }
    save_adapter(tmp_path, {"b": one}, overwrite=True)
    assert NORM_KEY not in TensorFile(tmp_path / WEIGHTS).metadata


def test_arrays_of_another_library_are_saved_and_loaded(tmp_path, standin):
    rng = np.random.default_rng(10)
    weight = rng.standard_normal((5, 2, 3, 4))
    layers = {
        "img": Conv2d(standin.asarray(weight)),
        "emb": Embedding(standin.asarray(weight.reshape(-1, 3))),
        "fc": Linear(standin.asarray(weight.reshape(5, -1))),
    }
    for options in ({"use_dora": True}, {"init": "pissa"}):
        found = {name: adapt(one, "", rank=2, alpha=3, rng=rng, **options) for name, one in layers.items()}
        save_adapter(tmp_path, found, overwrite=True)
        for name, adapter in load_adapter(tmp_path, backend=standin).items():
            again = merge(attach(layers[name], {"": adapter}))
            np.testing.assert_allclose(
                standin.to_numpy(again.weight), standin.to_numpy(merge(found[name]).weight), rtol=0, atol=1e-12
            )


A12, B31 = np.ones((1, 12)), np.ones((3, 1))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": Adapter(A12, B31, 1), "b": DoRAAdapter(A12, B31, 1, magnitude=np.ones(3))},
         "only some of the layers have DoRA's magnitude, and PEFT has one use_dora for all: save them in two folders"),
        ({"a": Adapter(A12, B31, 1, kind="conv2d")},
         "layers['a'] has in = 12 and the kernel (), which do not fit its kind of layer, 'conv2d'"),
        ({"a": Adapter(A12, B31, 1, kind="conv2d", kernel=(3,))},
         "layers['a'] has in = 12 and the kernel (3,), which do not fit its kind of layer, 'conv2d'"),
        ({"a": Adapter(A12, B31, 1, kind="conv1d", kernel=(5,))},
         "layers['a'] has in = 12 and the kernel (5,), which do not fit its kind of layer, 'conv1d'"),
        ({"a": Adapter(A12, B31, 1, kernel=(3,))},
         "layers['a'] has in = 12 and the kernel (3,), which do not fit its kind of layer, 'linear'"),
        ({"a": Adapter(A12, B31, 1, kind="embedding", kernel=(3,))},
         "layers['a'] has in = 12 and the kernel (3,), which do not fit its kind of layer, 'embedding'"),
        ({"a": DoRAAdapter(A12, B31, 1, magnitude=np.array([1, np.nan, 1]))}, "layers['a'] holds NaN or infinity"),
        ({"a": Adapter(np.ones((64, 2)), np.ones((2, 64)), 5e-31, use_rslora=True)},
         "alpha of layers['a'] must be above 1e-30 and below 1e+30, got 5e-31"),
        ({"a": Adapter(np.ones((64, 2)), np.ones((2, 64)), 7e29, use_rslora=True), "b": Adapter(A12, B31, 1)},
         "alpha of layers['a'] must be above 1e-30 and below 1e+30, got 5.6e+30"),
    ],
)  # fmt: skip
def test_what_peft_has_no_place_for_is_not_written(tmp_path, layers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        save_adapter(tmp_path / "a", layers)
    assert not (tmp_path / "a").exists()


REFUSED = [  # tensors that take the place of others or, where they are None, leave; ~ is what all keys begin with
    ({IMG + "lora_magnitude_vector": None}, "use_dora is True for all modules, but 'img' has no lora_magnitude_vector"),
    ({EMB + "lora_embedding_B": None}, "there is no '~emb.lora_embedding_B'"),
    ({EMB + "lora_A.weight": np.ones((3, 7))},
     "the module 'emb' has factors of both an embedding and another kind of layer"),
    ({IMG + "lora_magnitude_vector": np.ones(5)},
     "'~img.lora_magnitude_vector' has shape [5], expected [1, 5, 1, 1] for the rank 2"),
    ({EMB + "lora_magnitude_vector": np.ones((1, 3))},
     "'~emb.lora_magnitude_vector' has shape [1, 3], expected [3] for the rank 3"),
    ({EMB + "lora_magnitude_vector": np.ones(4)},
     "'~emb.lora_magnitude_vector' has shape [4], expected [3] for the rank 3"),
    ({EMB + "lora_magnitude_vector": np.ones(3, "f4")},
     "'~emb.lora_embedding_A' has dtype F64 and '~emb.lora_magnitude_vector' has dtype F32"),
    ({EMB + "lora_magnitude_vector": np.full(3, np.inf)}, "'~emb.lora_magnitude_vector' holds NaN or infinity"),
    ({EMB + "lora_magnitude_vector.weight": np.ones(3)},
     "the key '~emb.lora_magnitude_vector.weight' does not have the form ~<module>.lora_A.weight"),
    ({PREFIX + "other.base_layer.weight": np.ones(2)}, "there is no '~other.lora_A.weight'"),
    ({EMB + "base_layer.bias": np.ones(3)},
     "the key '~emb.base_layer.bias' does not have the form ~<module>.lora_A.weight"),
    ({EMB + "lora_embedding_A": np.ones((3, 7, 1))},
     "'~emb.lora_embedding_A' has shape [3, 7, 1], expected [3, 7] for the rank 3"),
    ({EMB + "lora_embedding_A": np.ones((7, 3))},
     "'~emb.lora_embedding_A' has shape [7, 3], expected [3, 3] for the rank 3"),
    ({IMG + "lora_A.weight": np.ones((3, 2, 3, 4))},
     "'~img.lora_A.weight' has shape [3, 2, 3, 4], expected [2, 2, 3, 4] for the rank 2"),
    ({IMG + "lora_A.weight": np.ones((2, 2, 3, 4, 1))},
     "'~img.lora_A.weight' has shape [2, 2, 3, 4, 1], expected 2 axes, or 3 or 4 for a convolution"),
    ({IMG + "lora_A.weight": np.ones(2)},
     "'~img.lora_A.weight' has shape [2], expected 2 axes, or 3 or 4 for a convolution"),
    ({IMG + "lora_A.weight": np.ones((2, 2, 0, 4))}, "'~img.lora_A.weight' has shape [2, 2, 0, 4], which is empty"),
    ({IMG + "lora_B.weight": np.ones((5, 2, 1))},
     "'~img.lora_B.weight' has shape [5, 2, 1], expected [5, 2, 1, 1] for the rank 2"),
    ({IMG + "lora_B.weight": np.ones((5, 2, 3, 4))},
     "'~img.lora_B.weight' has shape [5, 2, 3, 4], expected [5, 2, 1, 1] for the rank 2"),
    ({IMG + "lora_B.weight": np.ones((5, 1, 1, 1))},
     "'~img.lora_B.weight' has shape [5, 1, 1, 1], expected [5, 2, 1, 1] for the rank 2"),
    ({IMG + "lora_B.weight": np.ones((5, 2, 1, 3))},
     "'~img.lora_B.weight' has shape [5, 2, 1, 3], expected [5, 2, 1, 1] for the rank 2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_arrays_that_make_no_adapter_of_a_kind_are_refused(saved_dora, change, said):
    tensors = {key: array for key, array in (tensors_of(saved_dora) | change).items() if array is not None}
    save_file(tensors, saved_dora / WEIGHTS)
    for read in (load_adapter, inspect_adapter):
        with pytest.raises(FileRefused) as refused:
            read(saved_dora)
        file, _, reason = str(refused.value).partition("': ")
        assert (file, reason.replace(PREFIX, "~")) in {(f"'{saved_dora / name}", said) for name in (WEIGHTS, CONFIG)}


def test_magnitudes_and_the_configuration_must_agree(saved_dora):
    change_json(saved_dora / CONFIG, use_dora=False)
    with pytest.raises(FileRefused, match=r"use_dora is False for all modules, but 'emb' has a lora_magnitude_vector"):
        load_adapter(saved_dora)


@pytest.mark.parametrize("noted", ["img\nother", "", "img\n"])
def test_a_note_of_a_module_without_dora_is_refused(saved_dora, noted):
    save_file(tensors_of(saved_dora), saved_dora / WEIGHTS, {NORM_KEY: noted})
    with pytest.raises(
        FileRefused, match=f"^'{saved_dora / WEIGHTS}': {NORM_KEY} names .*, which is not a module with DoRA"
    ):
        load_adapter(saved_dora)


def test_a_note_of_a_plain_module_is_refused(tmp_path):
    save_adapter(tmp_path, {"fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 1)})
    save_file(tensors_of(tmp_path), tmp_path / WEIGHTS, {NORM_KEY: "fc"})
    with pytest.raises(FileRefused, match="names 'fc', which is not a module with DoRA"):
        load_adapter(tmp_path)


def test_another_kernel_or_kind_is_not_attached(saved_dora):
    found = load_adapter(saved_dora)
    with pytest.raises(ValueError, match=r"of kernel .* expected \(4, 3\)"):
        attach(Sequential(img=Conv2d(np.ones((5, 2, 4, 3)))), {"img": found["img"]})
    with pytest.raises(ValueError, match="of kind 'embedding', expected 'linear'"):
        attach(Sequential(emb=Linear(np.ones((3, 7)))), {"emb": found["emb"]})


def test_inspect_knows_kinds_and_counts_magnitudes(saved_dora, tmp_path, capsys):
    emb, img = inspect_adapter(saved_dora)
    assert (emb.module.shape, emb.parameters) == ((3, 7), 3 * (3 + 7) + 3)
    assert (img.module.shape, img.parameters) == ((5, 24), 2 * (5 + 24) + 5)
    delta = load_adapter(saved_dora)["img"].delta()
    assert img.norm == pytest.approx(np.linalg.norm(delta))
    assert main(["inspect", str(saved_dora)]) == 0
    assert [" ".join(line.split()[:4]) for line in capsys.readouterr().out.splitlines()] == [
        "module kind out x", "emb embedding DoRA 3", "img conv2d 3x4 DoRA", f"total {emb.parameters + img.parameters}"
    ]  # fmt: skip
    save_adapter(tmp_path / "plain", {"fc": LoRA(np.ones((1, 2)), np.ones((3, 1)), 1)})
    assert "kind" not in table(inspect_adapter(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"a.lora_embedding_A": (2, 7), "a.lora_embedding_B": (3, 2)}, "'a'"),
        ({"a.lora_A.weight": (2, 3, 1, 1), "a.lora_B.weight": (4, 2, 1, 1)}, "'a'"),
        ({"x.lm_head.lora_A.weight": (2, 3), "x.lm_head.lora_B.weight": (4, 2)}, "'x.lm_head'"),
    ],
)
def test_all_linear_names_no_other_layers(tmp_path, shapes, what):
    """PEFT passes over their tensors without a word; named otherwise they are read."""
    tensors = {f"base_model.model.{name}": np.ones(shape, "f4") for name, shape in shapes.items()}
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}))
    with pytest.raises(FileRefused, match=rf"json': target_modules does not name {what}, although"):
        load_adapter(tmp_path)
    change_json(tmp_path / CONFIG, target_modules=["a", "lm_head"])
    assert len(load_adapter(tmp_path)) == 1
