"""Adapters as llama.cpp's files: read back, they are the same change of the model; what does not fit is refused."""

import os

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from minilora import Adapter, DoRAAdapter, FileRefused, LoRA, adapt, adapters, quantize, save_adapter
from minilora.language import save_llama
from minilora.language.files.ggufexport import export_adapter
from minilora.layer import walk

from ...support.compare import refused
from ...support.disk import contents
from ...support.gguf_file import llama_of_kind, theirs, write
from ...support.language import tiny_llama, write_folder

gguf = pytest.importorskip("gguf", reason="pip install -e '.[models]'")

LINEARS = "all-linear"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]
IDS = np.random.default_rng(0).integers(0, 20, (2, 6))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("llama") / "model", model)


def drawn(model, seed, targets):
    """Adapters of ranks, alphas and scalings of their own, none of them zero."""
    rng, found = np.random.default_rng(seed), {}
    for path, adapter in adapters(adapt(model, targets, rank=1, alpha=1, rng=rng)).items():
        (out, width), r = adapter.shape, int(rng.integers(1, 5))
        A, B = (rng.standard_normal(shape).astype("f4") for shape in ((r, width), (out, r)))
        found[path] = Adapter(A, B, float(rng.uniform(0.5, 20)), kind=adapter.kind, use_rslora=bool(rng.integers(2)))
    return found


def read_back(path, kind="llama"):
    """Return the changed weights as llama.cpp computes them from the file: alpha / r, one alpha, its order of rows."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == kind
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora")
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    deltas = {}
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        s = fields["adapter.lora.alpha"] / B.shape[1]
        # ggml takes rows of an embedding's A, and so stores it (V, r)
        deltas[name] = s * (A @ B.T if name == "token_embd.weight" else B @ A)
    return deltas


def test_rows_of_a_qwen2_are_not_reordered(tmp_path):
    model = llama_of_kind("qwen2")
    save_llama(model, tmp_path / "m")
    found = drawn(model, 0, ["q_proj", "k_proj", "v_proj"])
    save_adapter(tmp_path / "a", found)
    export_adapter(tmp_path / "a", tmp_path / "m", tmp_path / "a.gguf")
    deltas = read_back(tmp_path / "a.gguf", "qwen2")
    for module, adapter in found.items():
        delta = deltas[f"blk.{module.split('.')[2]}.attn_{module[-6]}.weight"]
        np.testing.assert_allclose(delta, adapter.delta(), rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**31), targets=st.sets(st.sampled_from(TARGETS), min_size=1))
@example(seed=0, targets={"q_proj", "k_proj", "down_proj", "embed_tokens", "lm_head"})
@settings(max_examples=5)
def test_a_gguf_adapter_is_the_same_change_of_weights(tmp_path_factory, model, model_dir, seed, targets):
    place = tmp_path_factory.mktemp("adapter")
    found = drawn(model, seed, sorted(targets))
    save_adapter(place / "adapter", found)
    names = export_adapter(place / "adapter", model_dir, place / "a.gguf")
    deltas = read_back(place / "a.gguf")
    assert len(names) == 2 * len(deltas) == 2 * len(found)
    # The model's own .gguf file has the rows in llama.cpp's order: the change must be that of its weights.
    merged = tiny_llama(dtype="float64")
    layers = dict(walk(merged))
    for path, adapter in found.items():
        delta = adapter.delta().astype("f8")
        layers[path].weight += delta.T if adapter.kind == "embedding" else delta
    before, after = (
        {t.name: np.array(t.data) for t in gguf.GGUFReader(write(place / f"{i}.gguf", one)).tensors}
        for i, one in enumerate((tiny_llama(dtype="float64"), merged))
    )
    for name, delta in deltas.items():
        np.testing.assert_allclose(delta, after[name] - before[name], rtol=0, atol=2e-5 * np.abs(delta).max())
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == set(deltas)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_factors_of_one_scaling_stay_as_they_are(model, model_dir, tmp_path, use_rslora):
    rng = np.random.default_rng(0)
    found = adapters(adapt(model, ["o_proj", "down_proj"], rank=3, alpha=5, rng=rng, use_rslora=use_rslora))
    for adapter in found.values():
        adapter.lora_B[...] = rng.standard_normal(adapter.lora_B.shape)
    save_adapter(tmp_path / "a", found)
    export_adapter(tmp_path / "a", model_dir, tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").stat().st_size % 32 == 0  # llama.cpp reads up to the last array's padding
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    for path, adapter in found.items():
        name, _ = theirs(f"{path}.weight", adapter.lora_B)
        np.testing.assert_array_equal(tensors[f"{name}.lora_a"], adapter.lora_A)
        np.testing.assert_array_equal(tensors[f"{name}.lora_b"], adapter.lora_B)


def test_the_command_writes_it_over_any_file_of_the_model(model, model_dir, tmp_path, shell):
    save_adapter(tmp_path / "a", drawn(model, 0, LINEARS))
    base = write(tmp_path / "base.gguf", model)
    found = []
    for source in (model_dir, base):
        out = tmp_path / f"{source.stem}-adapter.gguf"
        assert f"14 modules written to {out}" in shell("export", tmp_path / "a", "--model", source, "-o", out)
        found.append(out.read_bytes())
    assert found[0] == found[1]


def of(path, **more):
    rng = np.random.default_rng(0)
    shape = {"model.embed_tokens": (12, 29), "lm_head": (29, 12)}.get(path, (16, 12))
    A, B = rng.standard_normal((2, shape[1])), rng.standard_normal((shape[0], 2))
    return {path: (DoRAAdapter if "magnitude" in more else Adapter)(A, B, 3.0, **more)}


Q = "model.layers.0.self_attn.q_proj"
EMBEDDING, NORM = "model.embed_tokens", "model.layers.0.input_layernorm"


def other(path, is_of, expected):
    return f"the adapter of {path!r} is of kind {is_of}, expected {expected}, like the model's"


REFUSED = {
    f"{Q!r} has DoRA's magnitude, which a LoRA GGUF cannot represent": of(Q, magnitude=np.ones(16)),
    **{
        other(path, "linear and shape [16, 12]", f"linear and {expected}"): of(path)
        for path, expected in (
            ("model.layers.2.self_attn.q_proj", []), (NORM, [12]), ("model.layers.0.self_attn.k_proj", [8, 12])
        )
    },
    other(Q, "embedding and shape [16, 12]", "linear and [16, 12]"): of(Q, kind="embedding"),
    other(EMBEDDING, "linear and shape [12, 29]", "embedding and [12, 29]"): {
        EMBEDDING: LoRA(np.ones((2, 29)), np.ones((12, 2)), 1.0)
    },
    f"the factors of {Q!r} reach 1e+39, which float32 cannot hold": {
        Q: LoRA(np.ones((2, 12)), np.full((16, 2), 1e39), 1.0)
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_such_a_file_cannot_hold_is_refused_by_name(model_dir, tmp_path, reason, shell):
    save_adapter(tmp_path / "a", REFUSED[reason])
    save_adapter(tmp_path / "sound", of(Q))
    out = tmp_path / "a.gguf"
    export_adapter(tmp_path / "sound", model_dir, out)
    before = out.read_bytes()
    command = ["export", tmp_path / "a", "--model", model_dir, "-o", out]
    assert shell.refused(*command) == f"-o {str(out)!r} already exists: choose another path, or pass --overwrite"
    assert shell.refused(*command, "--overwrite") == f"'{tmp_path}/a': {reason}"
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.gguf", "sound"]


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_one_of_a_tied_pair_is_refused(model, tmp_path, path):
    kind = "embedding" if path.startswith("model") else "linear"
    save_adapter(tmp_path / "a", of(path, kind=kind))
    base = write(tmp_path / "tied.gguf", model, tied=True)
    change = "a LoRA GGUF cannot represent a change of only one of them"
    with refused(f"'{tmp_path}/a': {path!r} is adapted, but the model's head shares the embedding's weight: {change}"):
        export_adapter(tmp_path / "a", base, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_output_that_could_not_be_written_is_refused_first(model, model_dir, tmp_path):
    save_adapter(tmp_path / "a", drawn(model, 0, ["q_proj"]))
    for out, error, said in (
        (tmp_path, ValueError, f"'{tmp_path}' is a folder, a device or a pipe, expected a regular file or a new path"),
        (tmp_path / "no" / "a", ValueError, f"out '{tmp_path}/no/a': there is no folder '{tmp_path}/no'"),
        (3, TypeError, "out must be a path, got 3"),
    ):
        with refused(said, error):
            export_adapter(tmp_path / "a", model_dir, out)
    with pytest.raises(FileRefused):
        export_adapter(tmp_path / "a", tmp_path / "nothing", tmp_path / "a.gguf")


def test_an_export_replaces_nothing_that_it_reads(model, tmp_path):
    """But an earlier export, also in the adapter's folder or the model's."""
    write_folder(tmp_path / "model", model)
    base = write(tmp_path / "base.gguf", model)
    save_adapter(tmp_path / "a", drawn(model, 0, ["q_proj"]))
    os.link(base, tmp_path / "link.gguf")
    before = contents(tmp_path)
    for output in ("base.gguf", "link.gguf", *(name for name in before if "/" in name and "tokenizer" not in name)):
        with pytest.raises(ValueError, match=r"is a file of the (model|adapter), expected another file"):
            export_adapter(tmp_path / "a", base if output.endswith("gguf") else tmp_path / "model", tmp_path / output)
    assert contents(tmp_path) == before
    for folder in ("a", "model") * 2:
        assert export_adapter(tmp_path / "a", tmp_path / "model", tmp_path / folder / "a.gguf")


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
def test_an_export_onto_a_full_disk_leaves_the_old_file(model, model_dir, tmp_path):
    """At every size that is too small, tensors of less than a page among them."""
    import resource

    save_adapter(tmp_path / "a", drawn(model, 0, ["q_proj"]))
    export_adapter(tmp_path / "a", model_dir, tmp_path / "a.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    assert len(gguf.GGUFReader(tmp_path / "a.gguf").tensors) == 4
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 100, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                export_adapter(tmp_path / "a", model_dir, tmp_path / "a.gguf")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (tmp_path / "a.gguf").read_bytes() == whole
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.gguf"]


@pytest.mark.parametrize("dtype", ["f4", "f2"])
@pytest.mark.parametrize("other", [False, True])
def test_a_weight_beside_the_factors_must_be_the_models(model, model_dir, tmp_path, shell, dtype, other):
    """PEFT computes with the file's; a half type's rounding is no other weight."""
    adapter = tmp_path / "\N{ESCAPE}[31mred"
    save_adapter(adapter, of("lm_head"))
    file, head = adapter / "adapter_model.safetensors", model.lm_head.weight.astype(dtype)
    if other:  # the last bit of one number is enough
        head[-1, -1] = np.nextafter(head[-1, -1], head.dtype.type(9))
    save_file(load_file(file) | {"base_model.model.lm_head.base_layer.weight": head}, file)
    (tmp_path / "text").write_text("the cat sat on the mat")
    for line in (
        ["export", adapter, "--model", model_dir, "-o", tmp_path / "a.gguf"],
        ["generate 'the cat' --tokens 1 --model", model_dir, "--adapter", adapter],
        ["evaluate --length 4", tmp_path / "text", "--model", model_dir, "--adapter", adapter],
    ):
        shell(*line, code=2 if other else 0)
        said = shell.err.splitlines()
        assert all(text.startswith("minilora: ") and text.isprintable() for text in said)
        assert len(said) == 1 + other
        assert ("is not the model's 'lm_head': the adapter is for another base" in said[-1]) is other
    assert (tmp_path / "a.gguf").exists() is not other
    save_llama(quantize(model, "lm_head"), tmp_path / "nf4")  # no number of it is the file's
    assert shell("export", adapter, "--model", tmp_path / "nf4", "-o", tmp_path / "nf4.gguf")
