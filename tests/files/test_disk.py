"""Only regular files are read, and replaced; what is written is whole or not there."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.files import disk
from minilora.files.disk import (
    RegularFile,
    check_new_file,
    is_new_or_empty,
    member,
    model_format,
    parse_json,
    read_json,
    read_start,
    read_whole,
    refuse_inputs,
    synced,
    written_folder,
    written_into,
    written_whole,
)
from minilora.files.tensors import TensorFile

from ..support.compare import refused
from ..support.disk import Killed, contents, cut_at

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(FileRefused) as error:
        member(tmp_path, name)
    assert str(error.value) == f"'{tmp_path}': {name!r} is not the plain name of a file in this folder"
    assert member(tmp_path, "..a") == tmp_path / "..a"


@pytest.mark.parametrize(("name", "reason"), [
    ("pipe", "not a regular file"),
    ("link to the pipe", "not a regular file"),
    ("folder", "not a regular file"),
    ("missing", "No such file or directory"),
])  # fmt: skip
@pytest.mark.parametrize("read", [RegularFile, read_whole, read_json, lambda path: read_start(path, 4)])
def test_nothing_but_a_regular_file_is_opened(tmp_path, name, reason, read):
    """Neither is a pipe waited for."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to the pipe").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileRefused) as error:
        read(tmp_path / name)
    assert str(error.value) == f"'{tmp_path / name}': {reason}"


def test_a_file_is_read_up_to_a_size(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"12345")
    monkeypatch.setattr("minilora.files.disk.MAX_FILE_BYTES", 5)
    assert read_whole(tmp_path / "a") == b"12345"
    assert read_start(tmp_path / "a", 2) == b"12"
    monkeypatch.setattr("minilora.files.disk.MAX_FILE_BYTES", 4)
    with pytest.raises(FileRefused, match=r"larger than 4 bytes, the limit for such a file$"):
        read_whole(tmp_path / "a")


class Point(msgspec.Struct):
    x: int


@pytest.mark.parametrize("text", [
    "[1]", '{"x": NaN}', '{"x": -Infinity}', '{"x": 1e999}', '{"x": 1', "", "\ufeff{}", '{"x": ' + "[" * 9999,
    '{"x": "\\ud800"}',
])  # fmt: skip
def test_unsound_json_is_refused_in_one_line(tmp_path, text):
    for kind in (dict, Point):
        with pytest.raises(FileRefused, match=r"^'a\.json': [^\n]+$"):
            parse_json("a.json", text, kind)


def test_json_has_the_type_that_is_asked_for(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"x": 3, "é": [1, 2.5]}', encoding="utf-8")
    assert read_json(path) == {"x": 3, "é": [1, 2.5]}
    assert read_json(path, Point) == Point(3)
    path.write_text('{"x": "3"}')
    with pytest.raises(FileRefused) as error:
        read_json(path, Point)
    assert str(error.value) == f"'{path}': Expected `int`, got `str` - at `$.x`"


# --- writing ---


def layers(value, alpha):
    """Two modules that differ in shape, rank and dtype; `value` fills the factors."""
    return {
        "enc.fc": LoRA(np.full((2, 3), value, "f4"), np.full((4, 2), value, "f4"), alpha),
        "head": LoRA(np.full((1, 4), value, "f2"), np.full((5, 1), value, "f2"), alpha / 2),
    }


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files are read from /proc")
def test_what_is_written_is_synced_before_and_after_its_name(tmp_path, monkeypatch):
    calls, replace, unlink = [], os.replace, Path.unlink

    def fsync(handle):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        calls.append(("fsync", "folder" if path.is_dir() else "part" if path.suffix == ".part" else path.name))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *a: calls.append(("rename", a[1].name)) or replace(*a))
    monkeypatch.setattr(Path, "unlink", lambda path, **k: calls.append(("remove", path.name)) or unlink(path, **k))
    with written_whole(tmp_path / "a") as file:
        file.write(b"new")
    with written_folder(tmp_path / "out") as part, synced(part / "x") as file:
        file.write(b"new")
    with written_into(tmp_path / "out", "x") as part:
        for name in "xy":
            with synced(part / name) as file:
                file.write(b"newer")
    of_file = [("fsync", "part"), ("rename", "a"), ("fsync", "folder")]
    of_folder = [("fsync", "x"), ("fsync", "folder"), ("rename", "out"), ("fsync", "folder")]
    of_two = [("fsync", "x"), ("fsync", "y"), ("remove", "x"), ("rename", "y"), ("rename", "x"), ("fsync", "folder")]
    assert calls == of_file + of_folder + of_two
    assert contents(tmp_path / "out") == {"x": b"newer", "y": b"newer"}
    assert (tmp_path / "a").read_bytes() == b"new"


def test_all_of_a_file_is_written_before_it_is_synced(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    with synced(tmp_path / "a") as file:
        file.write(b"few")  # which wait in a buffer
    assert sizes == [3]


def test_a_new_file_takes_no_other_files_place(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(FileExistsError), synced(tmp_path / "a"):
        pass
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("name", ["a" * 255, "\xe9" * 127, "\udcff"], ids=["long", "of two bytes each", "no text"])
def test_every_name_that_the_system_allows_is_written(tmp_path, name):
    with written_whole(tmp_path / name) as file:
        file.write(b"new")
    assert contents(tmp_path) == {name: b"new"}


def test_an_input_still_to_be_made_is_refused_as_output(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    inputs = [(tmp_path / "folder" / "c", "the checkpoint")]
    with pytest.raises(ValueError, match=r"^the log '.*link/c' is the checkpoint, expected another file$"):
        refuse_inputs("the log", tmp_path / "link" / "c", inputs)
    refuse_inputs("the log", tmp_path / "link" / "d", inputs)


def state_for_all(folder):
    """Return the factors' value and alpha by which any reader takes a folder."""
    value = load_file(folder / WEIGHTS)["base_model.model.enc.fc.lora_A.weight"][0, 0]
    config = json.loads((folder / CONFIG).read_text())
    return float(value), float(config["alpha_pattern"].get("enc.fc", config["lora_alpha"]))


def state_of(folder):
    """Return which of `layers` a folder holds, all of it."""
    found = load_adapter(folder)
    value = float(found["head"].lora_B[0, 0])
    for name, lora in layers(value, found["enc.fc"].alpha).items():
        np.testing.assert_array_equal(found[name].lora_A, lora.lora_A)
        np.testing.assert_array_equal(found[name].lora_B, lora.lora_B)
        assert found[name].alpha == lora.alpha
    return value, found["enc.fc"].alpha


def as_another_program(folder):
    """Write an adapter again without what `save_adapter` notes in it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text())))


OLD, NEW, LATER = (1.0, 3.0), (2.0, 4.0), (5.0, 7.0)


@pytest.mark.parametrize(
    ("new", "once"),
    [((2.0, 3.0), False), (NEW, False), (NEW, True)],
    ids=["same configuration, killed", "killed", "interrupted"],
)
@pytest.mark.parametrize("old", ["ours", "of another program"])
def test_a_save_cut_short_leaves_old_or_new_or_none(tmp_path, once, new, old):
    """Cut at each call that changes the disk, in turn; a save after it is whole again, and files of others stay."""
    save_adapter(tmp_path / "before", layers(*OLD))
    (tmp_path / "before" / "README.md").write_text("mine")
    (tmp_path / "before" / "runs").mkdir()
    if old == "of another program":
        as_another_program(tmp_path / "before")
    seen, done = [], False
    while not done:
        folder = shutil.copytree(tmp_path / "before", tmp_path / str(len(seen)) / "a")
        with cut_at(len(seen) + 1, once=once), contextlib.suppress(Killed):
            save_adapter(folder, layers(*new), overwrite=True)
            done = True
        if (folder / CONFIG).exists():
            seen.append(state_for_all(folder))
            assert state_of(folder) == seen[-1]
        else:
            seen.append("none")
            with pytest.raises(FileRefused, match="No such file"):
                load_adapter(folder)
        assert (folder / "README.md").read_text() == "mine"
        save_adapter(folder, layers(*LATER), overwrite=True)
        assert state_of(folder) == LATER
    assert [*dict.fromkeys(seen)] == [OLD, "none", new]


@pytest.mark.parametrize("name", ["../a", "../link", "."])
def test_replacing_an_adapter_leaves_all_else_where_it_is(tmp_path, monkeypatch, name):
    adapter = tmp_path / "a"
    save_adapter(adapter, layers(*OLD))
    (tmp_path / "aside").mkdir()
    (adapter / "README.md").write_text("mine")
    links = {adapter / "file": "README.md", adapter / "folder": "../aside", tmp_path / "link": "a"}
    for link, target in links.items():
        link.symlink_to(target)
    adapter.chmod(0o750)
    own = adapter.stat()
    monkeypatch.chdir(adapter if name == "." else tmp_path / "aside")
    save_adapter(name, layers(*NEW), overwrite=True)
    assert state_of(adapter) == NEW
    assert (adapter.stat().st_ino, adapter.stat().st_mode) == (own.st_ino, own.st_mode)
    assert {link: str(link.readlink()) for link in links} == links
    assert {*os.listdir(adapter)} == {"README.md", "file", "folder", WEIGHTS, CONFIG}
    assert {*os.listdir(tmp_path)} == {"a", "aside", "link"}


def test_a_new_folder_needs_a_place(tmp_path):
    with pytest.raises(ValueError, match=rf"^folder '{tmp_path}/no/a': there is no folder"):
        disk.check_new_folder("folder", tmp_path / "no" / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match=r"exists, expected an empty or new folder: a folder is written$"):
        disk.check_new_folder("folder", tmp_path / "full")


@pytest.mark.parametrize("write", [written_whole, written_folder])
def test_a_writer_that_is_interrupted_leaves_nothing(tmp_path, write):
    (tmp_path / "a").mkdir() if write is written_folder else (tmp_path / "a").write_bytes(b"old")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), write(tmp_path / "a"):
        raise KeyboardInterrupt
    assert contents(tmp_path) == before


@pytest.mark.parametrize("alpha", [3.0, 4.0], ids=["same configuration", "another configuration"])
def test_a_full_disk_loses_nothing_and_names_the_adapter(tmp_path, alpha, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_adapter(tmp_path / "a", layers(*OLD))
    before = contents(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/a(/adapter_model\.safetensors)?'$"):
        save_adapter(tmp_path / "a", layers(2.0, alpha), overwrite=True)
    with pytest.raises(OSError, match=r"No space left on device: '.*/b'$"):
        save_adapter(tmp_path / "b", layers(2.0, alpha))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("write", [written_whole, written_folder])
def test_an_error_that_names_a_file_keeps_its_name(tmp_path, write):
    with pytest.raises(FileNotFoundError, match=r": 'what is read'$"), write(tmp_path / "a"):
        os.stat("what is read")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("write", [written_whole, written_folder])
def test_an_error_of_an_unfinished_file_names_the_target(tmp_path, monkeypatch, write):
    """A folder that another program has made meanwhile, and a folder that cannot be written to."""

    def taken(source, target):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", source, None, target)

    monkeypatch.setattr(os, "replace", taken)
    with (
        pytest.raises(OSError, match=re.escape(f"Directory not empty: '{tmp_path / 'a'}'") + "$"),
        write(tmp_path / "a"),
    ):
        pass
    assert contents(tmp_path) == {}


KINDS = {
    "pipe": "folder, a device or a pipe",
    "folder": "folder, a device or a pipe",
    "link to a file": "symbolic link",
    "link to nothing": "symbolic link",
}


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_a_regular_file_is_replaced(tmp_path, name, kind):
    target, other = tmp_path / "a" / name, tmp_path / "other"
    target.parent.mkdir()
    other.write_bytes(b"precious")
    if kind == "pipe":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        target.symlink_to(other if kind == "link to a file" else tmp_path / "gone")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="expected a regular file") as error:
        save_adapter(tmp_path / "a", layers(*OLD))
    assert str(error.value) == f"'{target}' is a {KINDS[kind]}, expected a regular file or a new path"
    assert contents(tmp_path) == before


def test_a_place_that_takes_no_adapter_is_said_in_full(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"precious")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ValueError, match="is a file") as error:
            save_adapter(path, layers(*OLD))
        assert str(error.value) == f"'{path}': '{tmp_path / 'file'}' is a file, expected a folder"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="is not writable") as error:
        save_adapter(tmp_path / "new" / "a", layers(*OLD))
    assert str(error.value) == f"'{tmp_path / 'new' / 'a'}': the folder '{tmp_path}' is not writable"
    assert contents(tmp_path) == {"file": b"precious"}


def test_a_models_folder_takes_no_adapter(tmp_path):
    """A program that loads the model would apply the adapter, too."""
    (tmp_path / "config.json").write_text("{}")
    with refused(f"save '{tmp_path}' is a model's folder, expected a separate one for the adapter", ValueError):
        save_adapter(tmp_path, layers(*OLD))
    assert contents(tmp_path) == {"config.json": b"{}"}


def test_files_of_others_beside_the_target_stay(tmp_path):
    others = {f"{name}.part": b"precious" for name in (CONFIG, WEIGHTS)} | {".a-0.part": b"precious"}
    for name, text in others.items():
        (tmp_path / name).write_bytes(text)
    save_adapter(tmp_path, layers(*OLD))
    assert {name: contents(tmp_path)[name] for name in others} == others


def test_unfinished_files_have_names_of_their_own(tmp_path):
    with written_whole(tmp_path / "a") as one, written_whole(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"other")
        assert len(list(tmp_path.iterdir())) == 2
    assert contents(tmp_path) == {"a": b"one"}  # the last to finish


def test_permissions_are_those_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a"), written_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_the_noted_digest_is_that_of_the_configuration(tmp_path):
    save_adapter(tmp_path, layers(*OLD))
    text = (tmp_path / CONFIG).read_bytes()
    assert json.loads(text)["lora_alpha"] == 3
    assert TensorFile(tmp_path / WEIGHTS).metadata == {
        "format": "pt",
        "minilora_config_sha256": hashlib.sha256(text).hexdigest(),
    }


def test_a_name_no_file_can_have_is_refused_by_name(tmp_path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(OSError, match=f"File name too long: '{path}'$"), written_whole(path):
        pytest.fail("it was opened")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "free"), [
    ("new", True), ("empty", True), ("full", False), ("file", False), ("link", False), ("dangling", False),
])  # fmt: skip
def test_a_new_name_or_an_empty_folder_is_free(tmp_path, place, free):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert is_new_or_empty(tmp_path / place) is free


def test_a_file_of_another_format_is_no_model(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"")
    said = "expected a folder with config.json, a .gguf file or a .npz file"
    with refused(f"'{tmp_path / 'm.bin'}': {said}"):
        model_format(tmp_path / "m.bin")


def test_a_file_that_is_there_is_replaced_only_where_asked(tmp_path):
    there = tmp_path / "log"
    there.write_text("own\nlines")
    check_new_file("the log", there, True, b"own.li")
    check_new_file("the log", tmp_path / "new", False, b"own")
    check_new_file("the log", None, False, b"own")
    with pytest.raises(ValueError, match="already exists: choose another path, or pass --overwrite"):
        check_new_file("the log", there, False, b"own")
    for foreign in (b"lines", b"Own"):
        with pytest.raises(
            ValueError, match=r"^the log '.*log' was not written by minilora, so --overwrite does not replace it: "
        ):
            check_new_file("the log", there, True, foreign)
