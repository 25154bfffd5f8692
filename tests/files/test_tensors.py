"""Tensors in files: what is written byte for byte, what is read, and what is refused."""

import errno
import io
import json
import os

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load, load_file, save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.files import tensors
from minilora.files.dtypes import cast
from minilora.files.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorFile,
    in_dtype,
    numpy_dtype,
    open_weights,
    same_bytes,
    write_tensors,
)

from ..support.compare import refused


def written(tensors, metadata):
    file = io.BytesIO()
    write_tensors(file, tensors, metadata)
    return file.getvalue()


def test_a_file_is_written_compactly_and_its_header_padded():
    """So that the tensors begin at a multiple of 8; and byte for byte the same each time."""
    tensors = {"é": np.arange(3.0), "b": np.ones((1, 2), "f2"), "c": np.ones((2, 1), bfloat16)}
    text = (
        '{"__metadata__":{"note":"x"},"é":{"dtype":"F64","shape":[3],"data_offsets":[0,24]},'
        '"b":{"dtype":"F16","shape":[1,2],"data_offsets":[24,28]},"c":{"dtype":"BF16","shape":[2,1],"data_offsets":[28,32]}}'
    ).encode()
    raw = written(tensors, {"note": "x"})
    length = int.from_bytes(raw[:8], "little")
    assert raw[8 : 8 + length] == text + b" " * (-len(text) % 8)
    assert raw[8 + length :] == b"".join(array.tobytes() for array in tensors.values())


@pytest.mark.parametrize("length", range(1, 10))
def test_every_length_of_header_is_padded(length):
    raw = written({"a" * length: np.ones(1)}, {})
    header = raw[:-8]
    assert len(header) % 8 == 0
    assert len(header) - len(header.rstrip(b" ")) < 8
    assert load(raw).keys() == {"a" * length}


# Two numbers just above the middle of two neighbours in bfloat16, closer to it than float32 can tell; to even is down.
ABOVE_TIES = np.array([1 + 2.0**-8 + 2.0**-30, -3 - 2.0**-7 - 2.0**-30])


def test_bfloat16_is_rounded_from_float32_whatever_ml_dtypes_does():
    assert cast(ABOVE_TIES, bfloat16).tolist() == [1.0, -3.0]
    assert in_dtype(ABOVE_TIES, bfloat16, "f", "it reaches").tolist() == [1.0, -3.0]
    assert cast(ABOVE_TIES.astype("f4") + np.float32(2**-20), bfloat16).tolist() == [1.0078125, -3.0]
    assert cast(ABOVE_TIES, "f8") is ABOVE_TIES


def test_a_saved_adapter_is_rounded_so_too(tmp_path):
    A, B = ABOVE_TIES[None], ABOVE_TIES[:, None]
    save_adapter(tmp_path, {"fc": LoRA(A, B, 1.0)}, dtype="bfloat16")
    saved = load_adapter(tmp_path)["fc"]
    assert (saved.lora_A.tolist(), saved.lora_B.tolist()) == ([[1.0, -3.0]], [[1.0], [-3.0]])


@pytest.fixture
def file(tmp_path):
    save_file({"a": np.arange(4.0), "b": np.arange(3)}, tmp_path / "f")
    return TensorFile(tmp_path / "f")


def test_a_tensor_is_read_in_its_type_but_bfloat16(tmp_path):
    arrays = {
        name: np.arange(6).reshape(3, 2).astype(dtype)
        for name, dtype in {"F16": "f2", "BF16": bfloat16, "F32": "f4", "F64": "f8"}.items()
    }
    save_file(arrays | {"none": np.zeros(()), "empty": np.zeros((0, 3))}, tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    for name, array in arrays.items():
        wide = array.astype("f4") if name == "BF16" else array
        np.testing.assert_array_equal(file.read(name), wide, strict=True)
        assert file.tensors[name].dtype == name
    assert file.read("none").shape == ()
    assert file.read("empty").shape == (0, 3)


@pytest.mark.parametrize(
    ("name", "size"), [("F8_E4M3", 1), ("F8_E8M0", 1), ("I32", 4), ("U16", 2), ("BOOL", 1), ("F64", 8)]
)
def test_a_formats_type_is_as_wide_as_its_name(name, size):
    assert numpy_dtype(name).itemsize == size


def test_bytes_come_in_blocks(file, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 24)
    assert [block.size for block in file.blocks("a")] == [24, 8]
    assert np.concatenate([*file.blocks("a")]).view("f8").tolist() == [0, 1, 2, 3]


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    with open(tmp_path / "f", "wb") as out:
        write_tensors(out, {"z": np.ones(1), "a": np.ones(1)}, {})
    assert [*TensorFile(tmp_path / "f").tensors] == ["z", "a"]


def test_numbers_of_another_kind_are_not_read(file):
    with refused(f"'{file.path}': 'b' has dtype I64, expected one of F16, BF16, F32, F64"):
        file.read("b")


def test_a_file_cut_after_it_was_opened_is_refused(file):
    os.truncate(file.path, file.tensors["a"].end - 1)
    for read in (file.read, lambda name: [*file.blocks(name)]):
        with pytest.raises(FileRefused, match=r"another program modified it while it was being read: read it again$"):
            read("a")


def test_a_shape_that_numpy_refuses_is_named(tmp_path):
    """Of no entries, yet with an axis too long for any array."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(FileRefused, match=rf"^'{tmp_path / 'f'}': 'x': array is too big"):
        TensorFile(tmp_path / "f").read("x")


@pytest.mark.parametrize(("before", "after"), [({}, "pt"), ({"format": "np", "note": "kept"}, "np")])
def test_a_note_is_added_to_the_metadata(tmp_path, before, after):
    """transformers requires a format, so a file without one gets "pt"."""
    save_file({"x": np.ones(2)}, tmp_path / "f", before)
    file = TensorFile(tmp_path / "f")
    for words in ("a", "b"):
        numbers = file.path.read_bytes()[len(file.header) :]
        (tmp_path / "g").write_bytes(file.header_with("key", words) + numbers)
        file = TensorFile(tmp_path / "g")
    assert file.metadata == before | {"format": after, "key": "a b"}
    assert load_file(tmp_path / "g")["x"].tolist() == [1.0, 1.0]


def test_a_disk_that_cannot_be_read_is_named(file, monkeypatch):
    def broken(*args, **more):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensors, "safe_open", broken)
    with refused(f"'{file.path}': Input/output error"):
        TensorFile(file.path)


def header(entries):
    """A file of 4 bytes of data with these entries."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Error while deserializing header: header too small"),
        (bytes([9]) + bytes(15), "Error while deserializing header: invalid header length"),
        (b"\xff" * 40, "Error while deserializing header: header too large"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b"<!doctype html>", "it is an HTML page"),
        (b"PK\x03\x04" + bytes(20), "it is an archive, such as a pickle saved by torch"),
        (bytes([8]) + bytes(15), "Error while deserializing header: "),
        (header({"a": ENTRY | {"data_offsets": [0, 8]}}), "Error while deserializing header: "),
        (header({"a": ENTRY | {"shape": [-1]}}), "Error while deserializing header: "),
        (header({"a": ENTRY, "b": ENTRY}), "Error while deserializing header: "),
        (header({"a": ENTRY, "__metadata__": {"note": 1}}), "Error while deserializing header: "),
        (header({"a": ENTRY})[:-1], "Error while deserializing header: "),
        (header([]), "Error while deserializing header: "),
    ],
)
def test_a_header_that_is_not_sound_is_refused(tmp_path, data, reason):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FileRefused) as error:
        TensorFile(tmp_path / "f")
    assert str(error.value).startswith(f"'{tmp_path / 'f'}': {reason}")


@pytest.mark.parametrize("start", [b"PK", b"<"])
def test_a_header_whose_length_spells_another_format_is_read(tmp_path, start):
    length = int.from_bytes(start + b"\1" * (3 - len(start)), "little")
    text = json.dumps({"a": ENTRY}).encode().ljust(length)
    (tmp_path / "f").write_bytes(length.to_bytes(8, "little") + text + np.float32(7).tobytes())
    assert (tmp_path / "f").read_bytes().startswith(start)
    assert TensorFile(tmp_path / "f").read("a").tolist() == [7]


def test_of_a_name_twice_the_last_counts_as_in_safetensors(tmp_path):
    text = json.dumps({"a": ENTRY, "b": ENTRY}).replace('"b"', '"a"').replace("[1]", "[4]", 1).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + np.float32(7).tobytes())
    np.testing.assert_array_equal(TensorFile(tmp_path / "f").read("a"), load_file(tmp_path / "f")["a"], strict=True)


def test_names_may_hold_any_number_of_quotes(tmp_path):
    name, notes = '"\\",[{' * 300, {'""' * 200: '\\"' * 200}
    (tmp_path / "f").write_bytes(written({name: np.ones(1)}, notes))
    assert list(TensorFile(tmp_path / "f").tensors) == [name]
    assert TensorFile(tmp_path / "f").metadata == notes


@pytest.mark.parametrize(("wide", "narrow"), [("float64", "float32"), ("float64", "float16"), ("float32", "float16")])
def test_numbers_that_a_narrower_type_cannot_hold_are_refused(wide, narrow):
    largest = np.finfo(narrow).max
    held = in_dtype(np.array([1.0, -largest], wide), narrow, "f", "it reaches")
    np.testing.assert_array_equal(held, np.array([1.0, -largest], narrow), strict=True)
    with pytest.raises(FileRefused, match=rf"^'f': it reaches [\d.e+]+, which {narrow} cannot hold$"):
        in_dtype(np.array([1.0, -2.0 * float(largest)], wide), narrow, "f", "it reaches")


def test_tensors_are_the_same_by_type_shape_and_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 4)
    bits = np.arange(6, dtype="u2")
    other = bits.copy()
    other[-1] += 1
    arrays = {
        "a": bits.view("f2"), "same": bits.view("f2"), "type": bits.view(bfloat16), "bits": other.view("f2"),
        "shape": bits.view("f2").reshape(2, 3),
    }  # fmt: skip
    (tmp_path / "f").write_bytes(written(arrays, {}))
    file = TensorFile(tmp_path / "f")
    assert {name: same_bytes(file, "a", file, name) for name in arrays} == {
        "a": True, "same": True, "type": False, "bits": False, "shape": False,
    }  # fmt: skip


# --- a model in several files: its index and its shards say the same, or it is refused ---


def write_shards(folder, shards, weight_map=None):
    """Write shards, by name the numbers under each tensor's name, and an index, by default of all of them."""
    for name, numbers in shards.items():
        save_file({key: np.full(2, number, "f4") for key, number in numbers.items()}, folder / name)
    weight_map = weight_map or {key: name for name, numbers in shards.items() for key in numbers}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


ONE, TWO = "1.safetensors", "2.safetensors"


def number_of(base, name):
    return base.read(name)[0]


def test_each_tensor_is_read_from_the_file_that_has_it(tmp_path):
    base = open_weights(write_shards(tmp_path, {TWO: {"a": 1, "b": 2}, ONE: {"c": 3}}))
    assert [file.path.name for file in base.files] == [ONE, TWO]
    assert {name: number_of(base, name) for name in base.holder} == {"a": 1, "b": 2, "c": 3}
    assert base.path == tmp_path / INDEX_NAME


def test_what_the_index_leaves_out_belongs_to_the_checkpoint(tmp_path):
    base = open_weights(write_shards(tmp_path, {ONE: {"a": 1}, TWO: {"b": 2, "c": 3}}, {"a": ONE, "b": TWO}))
    assert number_of(base, "c") == 3


@pytest.mark.parametrize("weight_map", [{"a": ONE, "b": TWO}, {"a": TWO, "b": TWO, "c": ONE}])
def test_a_tensor_in_two_shards_is_refused(tmp_path, weight_map):
    write_shards(tmp_path, {ONE: {"a": 1, "c": 3}, TWO: {"a": 1, "b": 2}}, weight_map)
    other, here = (ONE, TWO) if weight_map["a"] == ONE else (TWO, ONE)
    with pytest.raises(FileRefused) as error:
        open_weights(tmp_path)
    assert str(error.value) == f"'{tmp_path / here}': 'a' is also in {other}, expected only one"


def test_a_tensor_that_its_shard_lacks_is_refused(tmp_path):
    write_shards(tmp_path, {ONE: {"a": 1}, TWO: {"b": 2}}, {"a": TWO, "b": TWO})
    with pytest.raises(FileRefused, match=f"{TWO}': there is no 'a', although {INDEX_NAME} lists it"):
        open_weights(tmp_path)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    write_shards(tmp_path, {ONE: {"a": 1}})
    save_file({"a": np.ones(2, "f4")}, tmp_path / SINGLE_NAME)
    said = f"next to {INDEX_NAME}, which lists other files: programs differ in which they read. Remove one of the two$"
    with pytest.raises(FileRefused, match=said):
        open_weights(tmp_path)
    assert open_weights(tmp_path / SINGLE_NAME).files[0].path == tmp_path / SINGLE_NAME
    assert open_weights(tmp_path / INDEX_NAME).files[0].path == tmp_path / ONE
    write_shards(tmp_path, {SINGLE_NAME: {"a": 1}, TWO: {"b": 2}})
    with pytest.raises(FileRefused, match=said):
        open_weights(tmp_path)
    write_shards(tmp_path, {SINGLE_NAME: {"a": 1}})
    assert open_weights(tmp_path).files[0].path == tmp_path / SINGLE_NAME
