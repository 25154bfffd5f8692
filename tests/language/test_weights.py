"""A model is loaded from whichever file it comes in; what is no model, and no number, is refused."""

import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import Llama
from minilora.files.tensors import FLOATS, write_tensors

from ..support.language import tiny_llama, write_folder


@pytest.fixture
def model():
    return tiny_llama(dtype="float32")


@pytest.fixture
def folder(tmp_path, model):
    return write_folder(tmp_path / "model", model)


def weights(folder):
    return load_file(folder / "model.safetensors")


def with_weights(folder, arrays):
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, folder / "model.safetensors")
    return folder


def test_arrays_live_where_they_are_asked_to(folder, standin):
    model = Llama.load(folder, backend=standin)
    assert all(isinstance(a, standin.xp.ndarray) for a in model.trainable().values())


@pytest.mark.parametrize("kind", ["BF16", "F16"])
def test_half_types_are_widened_exactly(folder, kind):
    arrays = weights(folder)
    halves = {name: a.astype(FLOATS[kind]) for name, a in arrays.items()}
    with open(folder / "model.safetensors", "wb") as file:
        write_tensors(file, halves, {})
    found = Llama.load(folder).trainable()
    for name, half in halves.items():
        np.testing.assert_array_equal(found[name], half.astype("float32"))


def spoiled(name, array):
    return lambda folder: with_weights(folder, weights(folder) | {name: array})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    broken = weights(folder)["model.norm.weight"]
    broken[3] = value
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' holds NaN or infinity"):
        Llama.load(spoiled("model.norm.weight", broken)(folder))


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_beyond_the_type_are_refused(folder, sign):
    """Finite in the file, and infinite in the type that was asked for; as large as it holds is not."""
    large = weights(folder)["model.norm.weight"].astype("f8")
    large[3] = sign * 1e300
    with_weights(folder, weights(folder) | {"model.norm.weight": large})
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' reaches 1e\+300, which float32 cannot hold"):
        Llama.load(folder)
    assert Llama.load(folder, dtype="float64").model.norm.weight[3] == sign * 1e300
    large[3] = sign * float(np.finfo("f4").max)
    with_weights(folder, weights(folder) | {"model.norm.weight": large})
    assert Llama.load(folder).model.norm.weight[3] == large[3]


def test_other_arguments_are_refused_by_name(folder, tmp_path):
    for dtype in ("float16", "int8", 3, None):
        with pytest.raises(ValueError, match="dtype must be 'float32' or 'float64', got"):
            Llama.load(folder, dtype=dtype)
    with pytest.raises(TypeError, match="backend must be a Backend"):
        Llama.load(folder, backend="numpy")
    for nowhere in ("model.bin", "model.gguf", "model.npz", "folder"):
        with pytest.raises(ValueError, match=rf"{nowhere}': No such file or directory"):
            Llama.load(tmp_path / nowhere)
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected a folder with config\.json, a \.gguf file or a \.npz file"):
        Llama.load(tmp_path / "model.bin")
    with pytest.raises(TypeError, match="path must be a path"):
        Llama.load(3)


def test_a_gguf_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"needs gguf .*: pip install gguf tokenizers$"):
        Llama.load(tmp_path / "model.gguf")
