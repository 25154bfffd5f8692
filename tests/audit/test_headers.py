"""What headers say of an adapter's factors, however they lie, and of a model's weights; and parts of their tensors."""

import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora.audit.headers import Module, Tensors, open_model, open_tensors
from minilora.texts import FileRefused
from minilora.variants.stackedlora import stacked_B

from .adapters import D, V, gguf_model, ones, written

E, R, OUT, IN = 3, 2, 4, 6
RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((E, R, IN)), RNG.standard_normal((E, OUT, R))


def module(a, b, kind="linear", **more):
    """A module whose factors are these; either may be missing."""
    arrays = {part: array for part, array in (("A", a), ("B", b)) if array is not None}
    tensors = Tensors(None, {part: array.shape for part, array in arrays.items()}, {}, {}, {}, arrays.get, None)
    return Module("m", tensors, {part: part for part in arrays}, kind, **more)


STORED = {
    "linear": module(A[0], B[0]),
    "MLX's": module(A[0].T, B[0].T, transposed="AB"),
    "an embedding of llama.cpp's": module(A[0].T, B[0], "embedding", transposed="A"),
    "a convolution": module(A[0].reshape(R, 3, 2, 1), B[0].reshape(OUT, R, 1, 1), "conv"),
    "experts": module(
        A.reshape(E * R, IN), np.concatenate([B[:, :, r].T for r in range(R)], axis=1), "experts", experts=E),
    "experts in groups": module(A.reshape(E * R, IN), np.concatenate([*B], axis=1), "experts", experts=E, grouped=True),
    "experts of three axes": module(A, B, "experts", experts=E),
}  # fmt: skip


@pytest.mark.parametrize("how", STORED)
def test_factors_are_the_same_however_they_lie(how):
    of_it = STORED[how]
    E_ = of_it.experts
    assert of_it.factors == ((E_ * R, IN), (OUT, E_ * R))
    assert of_it.matrices == ((E_ * R, IN), (OUT, E_ * R))
    assert (of_it.rank_in_file, of_it.widths) == (R, (OUT, IN))
    pairs = of_it.pairs(*(of_it.tensors.read(part) for part in "AB"))
    assert len(pairs) == E_
    for (a, b), a_e, b_e in zip(pairs, A, B, strict=False):
        np.testing.assert_array_equal(a, a_e)
        np.testing.assert_array_equal(b, b_e)


def test_experts_lie_as_stacked_layers_have_them():
    np.testing.assert_array_equal(stacked_B(STORED["experts"].tensors.read("B"), E), B)


NONE = {
    "no A": (module(None, B[0]), None, None),
    "no B": (module(A[0], None), None, None),
    "a vector": (module(A[0].ravel(), B[0]), None, None),
    "a vector too": (module(A[0], B[0].ravel()), None, None),
    "three axes": (module(A, B[0]), None, None),
    "no numbers": (module(A[0][:, :0], B[0]), None, None),
    "no rows": (module(A[0], B[0][:0]), None, None),
    "other ranks": (module(A[0][:1], B[0]), None, None),
    "other ranks of groups": (module(np.ones((4, 3, 1)), np.ones((OUT, 2, 1)), "conv"), None, (OUT, 3)),
    "other ranks of no groups": (module(np.ones((3, 3, 1)), np.ones((OUT, 2, 1)), "conv"), None, None),
    "a rank that no experts share": (replace(STORED["experts"], experts=4), None, (OUT, IN)),
    "another count of experts": (replace(STORED["experts of three axes"], experts=2), None, (OUT, IN)),
    "one factor of three axes": (module(A, np.ones((E, E * R)), "experts", experts=E), None, (E, IN)),
}


@pytest.mark.parametrize("what", NONE)
def test_factors_that_do_not_agree_have_no_rank(what):
    of_it, rank, widths = NONE[what]
    assert (of_it.rank_in_file, of_it.widths) == (rank, widths)
    assert of_it.shape("magnitude") is None


# --- files ---


def safetensors(t, arrays):
    save_file(arrays, t / "m.safetensors", {"note": "text"})
    return t / "m.safetensors"


def in_gguf(t, arrays):
    from gguf import GGUFWriter

    from .adapters import closed

    writer = GGUFWriter(t / "m.bin", "llama")  # whatever it is called
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    return closed(writer, t / "m.bin")


@pytest.mark.parametrize("write", [safetensors, in_gguf])
def test_any_part_of_a_tensor_is_read(tmp_path, write):
    arrays = {"a": RNG.standard_normal((3, 4)).astype("f4"), "b": RNG.standard_normal(5).astype("f2"),
              "c": RNG.standard_normal((2, 3, 2)).astype("f4")}  # fmt: skip
    path = write(tmp_path, arrays)
    tensors = open_tensors(path)
    assert tensors.path == path
    assert tensors.shapes == {name: array.shape for name, array in arrays.items()}
    assert tensors.dtypes == {"a": "F32", "b": "F16", "c": "F32"}
    assert tensors.sizes == {"a": 48, "b": 10, "c": 48}
    assert "text" in tensors.metadata.values() or tensors.metadata["general.architecture"] == "llama"
    for name, array in arrays.items():
        np.testing.assert_array_equal(tensors.read(name), array)
        for start in range(array.size):
            for stop in range(start + 1, array.size + 1):
                np.testing.assert_array_equal(tensors.part(name, start, stop), array.ravel()[start:stop])


def test_a_gguf_tensor_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def dequantize(data, kind):
        raise NotImplementedError("no such type")

    monkeypatch.setattr("gguf.dequantize", dequantize)
    path = gguf_model(tmp_path / "m.gguf", {"attn_q": (12, D)})
    with pytest.raises(FileRefused) as refused:
        open_tensors(path).read("blk.0.attn_q.weight")
    assert str(refused.value) == f"'{path}': 'blk.0.attn_q.weight' cannot be read: no such type"


def test_a_gguf_file_needs_its_package(tmp_path, monkeypatch):
    (tmp_path / "m").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"^a \.gguf file needs gguf "):
        open_tensors(tmp_path / "m")


# --- a model ---


@pytest.mark.parametrize("names", [(), ("a.gguf", "b.gguf"), ("a.gguf", "b.safetensors")])
def test_a_folder_of_another_number_of_models_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    one = "expected model.safetensors, model.safetensors.index.json or one .gguf or .safetensors file"
    with pytest.raises(FileRefused) as refused:
        open_model(tmp_path)
    assert str(refused.value) == f"'{tmp_path}': {one}, but there are {len(names)}"


@pytest.mark.parametrize(
    ("settings", "names", "tied"),
    [
        ({}, ["a"], False), ({"tie_word_embeddings": True}, ["a"], True),
        ({"text_config": {"tie_word_embeddings": True}}, ["a"], True),
        ({"text_config": {"tie_word_embeddings": 1}}, ["a"], False), ({"text_config": True}, ["a"], False),
        ({"text_config": {"tie_word_embeddings": True}}, ["lm_head"], False),
        ({"tie_word_embeddings": True}, ["lm_head"], False),
    ],
)  # fmt: skip
def test_the_head_is_the_embedding_where_it_has_no_tensor(tmp_path, settings, names, tied):
    arrays = {"model.embed_tokens.weight": (V, D)} | {f"{name}.weight": (V, D) for name in names}
    headers = open_model(written(tmp_path / "m", ones(arrays), settings))
    assert (headers.tied, headers.config, headers.is_gguf) == (tied, settings, False)


@pytest.mark.parametrize("more", [[], ["output"]])
def test_the_head_of_a_gguf_model_is_its_output(tmp_path, more):
    headers = open_model(gguf_model(tmp_path / "m.gguf", {"attn_q": (12, D)}, more=["token_embd", *more]))
    assert headers.is_gguf
    assert headers.tied == (not more)
    assert headers.config["general.architecture"] == "llama"
    assert headers.modules["model.layers.1.self_attn.q_proj"] == (12, D)


def test_weights_in_few_bits_have_no_shape(tmp_path):
    arrays = {
        "plain.weight": np.ones((3, 4), "f2"), "plain.bias": np.ones(3, "f2"), "norm.weight": np.ones(4, "f4"),
        "conv.weight": np.ones((3, 4, 2), "f4"), "float8.weight": np.ones((3, 4), ml_dtypes.float8_e4m3fn),
        "gptq.qweight": np.ones((3, 4), "i4"), "gptq.qzeros": np.ones((3, 4), "i4"),
        "packed.weight_packed": np.ones((3, 4), "i4"), "packed.weight_scale": np.ones((3, 4), "f4"),
        "nf4.weight": np.ones((6, 1), "u1"), "nf4.weight.absmax": np.ones(1, "f4"),
        "marked.weight": np.ones((3, 4), "f4"), "marked.weight_format": np.ones(1, "u1"),
        "mlx.weight": np.ones((3, 4), "u4"), "mlx.scales": np.ones((3, 4), "f2"),
        "integers.weight": np.ones((3, 4), "i8"), "experts.gate_up": np.ones((2, 3, 4), "f4"), "table": np.ones((3, 4)),
    }  # fmt: skip
    headers = open_model(written(tmp_path / "m", arrays))
    known = {"plain": (3, 4), "conv": (3, 4, 2), "float8": (3, 4)}
    assert headers.modules == known | dict.fromkeys(("gptq", "packed", "nf4", "marked", "mlx", "integers"))
    assert headers.arrays == {"experts.gate_up": (2, 3, 4)}
    assert {*headers.paths} == {*headers.modules, "experts.gate_up"}
    assert (headers.bias("plain"), headers.bias("conv")) == ((3,), None)
