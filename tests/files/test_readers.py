"""Who reads while another program writes gets the old or the new, or is refused in one line; never some of each.

Nothing here is a matter of luck: the reader is stopped before each of its calls in turn, and the writer does then what
it would have time for.
"""

import contextlib
import itertools
import json
import math
import os
import shutil
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.audit.formats import open_adapter
from minilora.files.disk import RegularFile
from minilora.files.tensors import INDEX_NAME, TensorFile, open_weights
from minilora.language.files.weights import load

from ..support.adapter_folder import CONFIG, WEIGHTS
from ..support.compare import refused
from ..support.disk import Killed, cut_at, paused_at
from ..support.language import tiny_llama, write_folder


def adapter(value, rank, alpha):
    """Two modules whose factors are filled with a value."""
    return {
        name: LoRA(np.full((rank, 3), value, "f4"), np.full((4, rank), value, "f4"), alpha) for name in ("enc.fc", "up")
    }


OLD = adapter(1.0, 2, 3.0)
NEWS = {
    "the same configuration": adapter(2.0, 2, 3.0),
    "another alpha": adapter(2.0, 2, 6.0),
    "another rank": adapter(2.0, 5, 15.0),
}


def by_loading(folder):
    """Return what each module has: its factors' shapes and all their values, and its alpha."""
    return {name: described(a.lora_A, a.lora_B, a.alpha) for name, a in load_adapter(folder).items()}


def by_audit(folder):
    """Return the same as `by_loading`, as the audit has it; None where it finds no configuration, and says so."""
    file = open_adapter(folder)
    factors = {name: [m.tensors.read(m.parts[part]) for part in "AB"] for name, m in file.modules.items()}
    found = {name: described(*factors[name], m.alpha) for name, m in file.modules.items()}
    return None if file.config is None else found


def described(A, B, alpha):
    return A.shape, B.shape, {*A.ravel().tolist(), *B.ravel().tolist()}, alpha


def whole(saved):
    """Return what a reader of the whole adapter finds."""
    return {name: described(a.lora_A, a.lora_B, a.alpha) for name, a in saved.items()}


def result(read, folder):
    """Return what is read, and None of what is refused in one line that names a file."""
    try:
        return read(folder)
    except FileRefused as error:
        line = str(error)
    assert line.startswith(f"'{folder}")
    assert "\n" not in line
    return None


def of_another_program(folder):
    """Write an adapter again without what `save_adapter` notes in it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text())))


def save_up_to(folder, layers, at=math.inf):
    """Save an adapter over the one that is there, up to a call; return how many calls there were."""
    with cut_at(at) as calls, contextlib.suppress(Killed):
        save_adapter(folder, layers, overwrite=True)
    return len(calls)


@pytest.mark.parametrize("read", [by_loading, by_audit])
@pytest.mark.parametrize("new", NEWS)
@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "of another program"])
def test_a_reader_beside_a_save_gets_old_or_new(tmp_path, read, new, theirs):
    """Before each of its calls, the save has time for one call more each time, or for all."""
    before, folder, seen = tmp_path / "before", tmp_path / "a", []
    save_adapter(before, OLD)
    if theirs:
        of_another_program(before)
    with paused_at(0, None) as calls:
        assert read(before) == whole(OLD)
    steps = save_up_to(shutil.copytree(before, tmp_path / "whole"), NEWS[new])
    for at, step in itertools.product(range(1, len(calls) + 1), range(1, steps + 2)):
        shutil.copytree(before, folder)
        with paused_at(at, partial(save_up_to, folder, NEWS[new], step)):
            seen.append(result(read, folder))
        shutil.rmtree(folder)
    states = [whole(OLD), None, whole(NEWS[new])]
    assert all(state in states for state in seen)
    assert all(state in seen for state in states)


def test_a_replaced_file_is_read_as_it_was_opened(tmp_path):
    save_file({"a": np.full(9, 1.0), "b": np.full(9, 1.0)}, tmp_path / "f")
    file = TensorFile(tmp_path / "f")
    save_file({"b": np.full(3, 2.0), "a": np.full(20, 2.0)}, tmp_path / "g")
    os.replace(tmp_path / "g", tmp_path / "f")
    assert {*file.read("a"), *file.read("b")} == {1.0}


@pytest.mark.parametrize("changed", ["its time", "its size"])
def test_a_file_that_is_written_in_its_place_is_refused(tmp_path, changed):
    save_file({"a": np.full(9, 1.0)}, tmp_path / "f")
    os.utime(tmp_path / "f", (1, 1))
    file = TensorFile(tmp_path / "f")
    assert file.read("a").tolist() == [1.0] * 9
    with open(tmp_path / "f", "r+b") as writer:
        writer.seek(-1 if changed == "its time" else 1, os.SEEK_END)
        writer.write(b"x")
    if changed == "its size":
        os.utime(tmp_path / "f", (1, 1))
    for read in (file.read, lambda name: [*file.blocks(name)], file.numbers):
        with refused(f"'{file.path}': another program modified it while it was being read: read it again"):
            read("a")


def test_another_file_of_one_size_and_time_is_another(tmp_path):
    for name in "fg":
        (tmp_path / name).write_bytes(b"12")
        os.utime(tmp_path / name, (1, 1))
    file = RegularFile(tmp_path / "f")
    file.check_unchanged(in_place=True)
    os.replace(tmp_path / "g", tmp_path / "f")
    file.check_unchanged()
    with refused(f"'{tmp_path / 'f'}': another program modified it while it was being read: read it again"):
        file.check_unchanged(in_place=True)


def test_the_header_that_was_judged_is_the_one_that_counts(tmp_path):
    """Of two tensors at one place the library would say so; here it is given the file that comes next."""
    entries = {name: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]} for name in "ab"}
    text = json.dumps(entries).encode()
    (tmp_path / "f").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    save_file({"a": np.ones(1)}, tmp_path / "g")
    with (
        paused_at(3, lambda: os.replace(tmp_path / "g", tmp_path / "f")) as calls,
        pytest.raises(FileRefused, match=r"another program modified it while it was being read: read it again$"),
    ):
        TensorFile(tmp_path / "f")
    assert calls[2].endswith("safe_open")


def test_a_model_that_is_replaced_gives_the_shards_of_one(tmp_path):
    """Its folder, before each call of its reader: the index names the same shards, of the same names and shapes."""
    names = [f"{i}.safetensors" for i in range(3)]

    def put_models():
        for model, value in ("a", 1.0), ("b", 2.0):
            (tmp_path / model).mkdir()
            for name in names:
                save_file({name: np.full(5, value)}, tmp_path / model / name)
            (tmp_path / model / INDEX_NAME).write_text(json.dumps({"weight_map": {name: name for name in names}}))

    def read(model):
        weights = open_weights(model)
        return {number for name in names for number in weights.read(name).tolist()}

    def exchange():
        os.rename(tmp_path / "a", tmp_path / "gone")
        os.rename(tmp_path / "b", tmp_path / "a")

    put_models()
    with paused_at(0, None) as calls:
        assert read(tmp_path / "a") == {1.0}
    seen = []
    for at in range(1, len(calls) + 1):
        with paused_at(at, exchange):
            seen.append(result(read, tmp_path / "a"))
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        put_models()
    assert all(state in ({1.0}, None, {2.0}) for state in seen)
    assert all(state in seen for state in ({1.0}, None, {2.0}))


def test_a_model_saved_anew_is_old_new_or_refused(tmp_path):
    """Another program writes the configuration first, and then weights of the same names and shapes."""
    folder, other = tmp_path / "m", tmp_path / "new"
    for path, eps, value in (folder, 1e-5, 1.0), (other, 1e-3, 2.0):
        write_folder(path, tiny_llama(dtype="float32"))
        config = json.loads((path / "config.json").read_text()) | {"rms_norm_eps": eps}
        (path / "config.json").write_text(json.dumps(config))
        arrays = load_file(path / "model.safetensors")
        save_file({name: np.full_like(a, value) for name, a in arrays.items()}, path / "model.safetensors")
    before = shutil.copytree(folder, tmp_path / "before")

    def save_anew():
        for name in ("config.json", "model.safetensors"):
            os.replace(shutil.copy(other / name, tmp_path / "part"), folder / name)

    def read(path):
        config, arrays = load(path)
        return config.rms_norm_eps, {number for a in arrays.values() for number in a.ravel().tolist()}

    old, new, seen = (1e-5, {1.0}), (1e-3, {2.0}), []
    with paused_at(0, None) as calls:
        assert read(folder) == old
    for at in range(1, len(calls) + 1):
        with paused_at(at, save_anew):
            seen.append(result(read, folder))
        shutil.copytree(before, folder, dirs_exist_ok=True)
    assert all(state in (old, None, new) for state in seen)
    assert all(state in seen for state in (old, None, new))
