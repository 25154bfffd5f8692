"""The format under adapters, bases and checkpoints: what is written byte for byte, and reads that fail."""

import io
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from minilora import FileRefused
from minilora.guards import tensorfile
from minilora.guards.tensorfile import TensorFile, tensor_header


def test_a_header_is_written_compactly_and_padded(tmp_path):
    """So that the tensors begin at a multiple of 8, and long names that are saved can be loaded."""
    tensors = {"é": np.arange(3.0), "b": np.ones((1, 2), "f2")}
    text = (
        '{"__metadata__":{"note":"x"},"é":{"dtype":"F64","shape":[3],"data_offsets":[0,24]},'
        '"b":{"dtype":"F16","shape":[1,2],"data_offsets":[24,28]}}'
    ).encode()
    header = tensor_header(tensors, {"note": "x"})
    assert header[8:].rstrip(b" ") == text
    assert int.from_bytes(header[:8], "little") == len(header) - 8 == len(text) + -len(text) % 8
    (tmp_path / "a").write_bytes(header + b"".join(array.tobytes() for array in tensors.values()))
    for name, array in load_file(tmp_path / "a").items():
        np.testing.assert_array_equal(array, tensors[name])


@pytest.mark.parametrize("length", range(1, 10))
def test_every_length_of_header_is_padded(length):
    header = tensor_header({"a" * length: np.ones(1)}, {})
    assert len(header) % 8 == 0
    assert len(header) - 8 - len(header[8:].rstrip(b" ")) < 8
    assert json.loads(header[8:])["a" * length]["shape"] == [1]


@pytest.fixture
def file(tmp_path):
    save_file({"a": np.arange(4.0), "b": np.arange(3)}, tmp_path / "f")
    return TensorFile(tmp_path / "f")


def test_a_header_is_read_up_to_a_size(file, monkeypatch):
    length = file.data_start - 8
    monkeypatch.setattr(tensorfile, "MAX_HEADER", length)
    assert TensorFile(file.path).tensors == file.tensors
    monkeypatch.setattr(tensorfile, "MAX_HEADER", length - 1)
    with pytest.raises(
        FileRefused, match=f"^'{file.path}': the header is {length} bytes long, expected at most {length - 1}"
    ):
        TensorFile(file.path)


def test_a_file_replaced_while_it_is_checked_is_refused(file, monkeypatch):
    """The library opens it once more, by its name."""

    def replace_and_open(path, **options):
        save_file({"a": np.zeros(4), "b": np.arange(3)}, path.with_name("other"))
        path.with_name("other").replace(path)
        return safe_open(path, **options)

    monkeypatch.setattr(tensorfile, "safe_open", replace_and_open)
    with pytest.raises(FileRefused, match="the file changed after it was checked"):
        TensorFile(file.path)


def test_numbers_of_another_kind_are_not_read(file):
    with file.opened() as opened, pytest.raises(FileRefused) as error:
        file.read("b", opened)
    assert str(error.value) == f"'{file.path}': 'b' has dtype I64, expected one of F16, BF16, F32, F64"


class Broken(io.BytesIO):
    def readinto(self, buffer):
        raise OSError(5, "Input/output error")


class Cut(io.BytesIO):
    def readinto(self, buffer):
        return len(buffer) - 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Broken, "cannot be read: [Errno 5] Input/output error"), (Cut, "the file was cut while it was read")],
)
def test_a_read_that_fails_names_the_file(file, kind, reason):
    with pytest.raises(FileRefused) as error:
        file.read("a", kind())
    assert str(error.value) == f"'{file.path}': {reason}"


def header(entries):
    """A file of 4 bytes of data with these entries."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the header would be 0 bytes long and the file has 0"),
        (bytes([9]) + bytes(7), "the header would be 9 bytes long and the file has 8"),
        (bytes([9]) + bytes(15), "the header would be 9 bytes long and the file has 16"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a pointer of Git LFS"),
        (b"<!doctype html>", "it is a page of HTML"),
        (bytes([8]) + bytes(15), "not a sound safetensors file"),
        (header({"a": ENTRY | {"more": 1}}), "the header's entry 'a' is not dtype, shape and data_offsets"),
        (header({"a": ENTRY | {"more": [[]] * 99}}), "the header holds far more than its 1 tensors"),
    ],
)
def test_a_header_that_is_not_sound_says_how(tmp_path, data, reason):
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(FileRefused) as error:
        TensorFile(tmp_path / "f")
    assert str(error.value).startswith(f"'{tmp_path / 'f'}': {reason}")


def test_a_name_that_stands_twice_is_refused(tmp_path):
    """The library takes the last one."""
    entry = json.dumps(ENTRY)
    text = f'{{"a": {entry}, "a": {entry}}}'.encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FileRefused) as error:
        TensorFile(tmp_path / "f")
    assert str(error.value) == f"'{tmp_path / 'f'}': the header is not sound JSON: the key 'a' stands twice"


def test_names_may_hold_any_number_of_quotes(tmp_path):
    name, notes = '"\\",[{' * 300, {'""' * 200: '\\"' * 200}
    (tmp_path / "f").write_bytes(tensor_header({name: np.ones(1)}, notes) + np.ones(1).tobytes())
    assert list(TensorFile(tmp_path / "f").tensors) == [name]
    assert TensorFile(tmp_path / "f").metadata == notes


@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_numbers_become_bfloat16_by_one_rounding_to_even(wide):
    """Eight bits are kept: 1 + 2^-8 lies between two, and goes to the even one; 1 + 3 2^-8 too, upwards."""
    numbers = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -2.5, np.inf, np.nan], wide)
    found = tensorfile.decode(tensorfile.encode(numbers, "BF16"), "BF16")
    np.testing.assert_array_equal(found, [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -2.5, np.inf, np.nan])


@pytest.mark.parametrize(("wide", "narrow"), [("float64", "float32"), ("float64", "float16"), ("float32", "float16")])
def test_numbers_that_a_narrower_type_cannot_hold_are_refused(wide, narrow):
    largest = np.finfo(narrow).max
    held = tensorfile.in_dtype(np.array([1.0, -largest], wide), narrow, "f", "it reaches")
    np.testing.assert_array_equal(held, np.array([1.0, -largest], narrow), strict=True)
    with pytest.raises(FileRefused, match=rf"^'f': it reaches [\d.e+]+, which {narrow} cannot hold$"):
        tensorfile.in_dtype(np.array([1.0, -2.0 * float(largest)], wide), narrow, "f", "it reaches")
