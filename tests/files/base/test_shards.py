"""A checkpoint in several files: its index and its shards say the same, or it is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilora import FileRefused
from minilora.files.base.shards import INDEX_NAME, SINGLE_NAME, open_base


def write(folder, shards, weight_map=None):
    """Write shards, by name the numbers under each tensor's name, and an index, by default of all of them."""
    for name, tensors in shards.items():
        save_file({key: np.full(2, number, "f4") for key, number in tensors.items()}, folder / name)
    weight_map = weight_map or {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return folder


ONE, TWO = "1.safetensors", "2.safetensors"


def number_of(base, name):
    with base.holder[name].opened() as file:
        return base.holder[name].read(name, file)[0]


def test_each_tensor_is_read_from_the_file_that_has_it(tmp_path):
    base = open_base(write(tmp_path, {TWO: {"a": 1, "b": 2}, ONE: {"c": 3}}))
    assert [file.path.name for file in base.files] == [ONE, TWO]
    assert {name: number_of(base, name) for name in base.holder} == {"a": 1, "b": 2, "c": 3}
    assert base.path == tmp_path / INDEX_NAME


def test_what_the_index_leaves_out_belongs_to_the_checkpoint(tmp_path):
    base = open_base(write(tmp_path, {ONE: {"a": 1}, TWO: {"b": 2, "c": 3}}, {"a": ONE, "b": TWO}))
    assert number_of(base, "c") == 3


@pytest.mark.parametrize("weight_map", [{"a": ONE, "b": TWO}, {"a": TWO, "b": TWO, "c": ONE}])
def test_a_tensor_in_two_shards_is_refused(tmp_path, weight_map):
    write(tmp_path, {ONE: {"a": 1, "c": 3}, TWO: {"a": 1, "b": 2}}, weight_map)
    other, here = (ONE, TWO) if weight_map["a"] == ONE else (TWO, ONE)
    with pytest.raises(FileRefused) as error:
        open_base(tmp_path)
    assert str(error.value) == f"'{tmp_path / here}': 'a' stands here and in {other}: expected once"


def test_a_tensor_that_its_shard_lacks_is_refused(tmp_path):
    write(tmp_path, {ONE: {"a": 1}, TWO: {"b": 2}}, {"a": TWO, "b": TWO})
    with pytest.raises(FileRefused, match=f"{TWO}': there is no 'a', which {INDEX_NAME} says it holds"):
        open_base(tmp_path)


def test_a_single_file_beside_an_index_of_others_is_refused(tmp_path):
    write(tmp_path, {ONE: {"a": 1}})
    save_file({"a": np.ones(2, "f4")}, tmp_path / SINGLE_NAME)
    with pytest.raises(FileRefused, match="programs differ in which they take"):
        open_base(tmp_path)
    assert open_base(tmp_path / SINGLE_NAME).files[0].path == tmp_path / SINGLE_NAME
    assert open_base(tmp_path / INDEX_NAME).files[0].path == tmp_path / ONE
    write(tmp_path, {SINGLE_NAME: {"a": 1}})
    assert open_base(tmp_path).files[0].path == tmp_path / SINGLE_NAME
