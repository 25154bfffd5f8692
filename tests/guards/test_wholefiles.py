"""Files are written whole or not at all, whoever else writes them; only regular files are ever replaced."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.files.inspection import inspect_adapter
from minilora.files.peft.adapterfolder import AdapterFolder
from minilora.guards import wholefiles
from minilora.guards.tensorfile import TensorFile
from minilora.guards.wholefiles import is_new_or_empty, places, written_folder, written_together, written_whole

ROOT = Path(__file__).parents[2]


CONFIG, WEIGHTS, READY = "adapter_config.json", "adapter_model.safetensors", ".minilora-ready-"


def layers(value, alpha):
    """Two modules that differ in shape, rank and dtype; `value` fills the factors."""
    return {
        "enc.fc": LoRA(np.full((2, 3), value, "f4"), np.full((4, 2), value, "f4"), alpha),
        "head": LoRA(np.full((1, 4), value, "f2"), np.full((5, 1), value, "f2"), alpha / 2),
    }


def contents(folder):
    """Return all that is in a folder: names, kinds and bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


def recorded(monkeypatch, folder):
    """Record the calls that make a write final, in their order, by the names they are about."""
    calls = []

    def name_of(handle):
        path = os.readlink(f"/proc/self/fd/{handle}")
        return "folder" if os.path.isdir(path) else "part" if path.endswith(".part") else os.path.basename(path)

    def fsync(handle):
        calls.append(("fsync", name_of(handle)))

    def replace(source, target):
        calls.append(("rename", os.path.basename(target)))
        real_replace(source, target)

    def unlink(self, missing_ok=False):
        calls.append(("remove", self.name))
        real_unlink(self, missing_ok)

    real_replace, real_unlink = os.replace, Path.unlink
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    return calls


linux = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="names of open files are read from /proc")


@linux
def test_the_order_is_file_rename_folder(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, tmp_path)
    with written_whole(tmp_path / "a") as file:
        file.write(b"new")
    assert calls == [("fsync", "part"), ("rename", "a"), ("fsync", "folder")]


@linux
def test_the_last_of_several_decides_which_are_read(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / name).write_bytes(b"old")
    calls = recorded(monkeypatch, tmp_path)
    with written_together(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write(b"new a")
        b.write(b"new b")
    assert calls == [
        *[("fsync", "part"), ("fsync", "part"), ("rename", READY + "a"), ("rename", READY + "b"), ("fsync", "folder")],
        *[("remove", "b"), ("fsync", "folder"), ("rename", "a"), ("fsync", "folder"), ("rename", "b")],
        ("fsync", "folder"),
    ]
    assert contents(tmp_path) == {"a": b"new a", "b": b"new b"}


def test_three_files_are_read_as_one_set(tmp_path):
    """Cut at each call that changes the disk, in turn."""
    seen, done = [], False
    while not done:
        paths = [tmp_path / f"{name}{len(seen)}" for name in "abc"]
        for path in paths:
            path.write_bytes(b"old")
        with failing(len(seen) + 1, once=False), contextlib.suppress(Killed):
            with written_together(*paths) as files:
                for file in files:
                    file.write(b"new")
            done = True
        seen.append({path.read_bytes() for path in places(*paths)})
    changed = seen.index({b"new"})
    assert seen == [{b"old"}] * changed + [{b"new"}] * (len(seen) - changed)
    assert changed == 8  # 3 files to the disk, 3 put ready, the folder to the disk; then the last is removed


@linux
def test_a_configuration_that_stays_is_not_removed(tmp_path, monkeypatch):
    save_adapter(tmp_path, layers(1.0, 3.0))
    calls = recorded(monkeypatch, tmp_path)
    save_adapter(tmp_path, layers(2.0, 3.0))
    assert "remove" not in dict(calls)
    assert load_adapter(tmp_path)["head"].lora_B[0, 0] == 2


@linux
def test_the_order_of_a_folder_is_files_folder_rename_parent(tmp_path, monkeypatch):
    calls = recorded(monkeypatch, tmp_path)
    with written_folder(tmp_path / "out") as part, wholefiles.synced(part / "x") as file:
        file.write(b"new")
    assert calls == [("fsync", "x"), ("fsync", "folder"), ("rename", "out"), ("fsync", "folder")]
    assert contents(tmp_path / "out") == {"x": b"new"}


class Killed(BaseException):
    """Where a process is killed, nothing that comes later is done."""


@contextlib.contextmanager
def failing(at, once):
    """Let the call of that number fail, among those that change the disk; unless `once`, each later one too."""
    with pytest.MonkeyPatch.context() as patched:
        calls = []

        def failing(real):
            def call(*args, **options):
                calls.append(args)
                if len(calls) == at or (len(calls) > at and not once):
                    raise Killed
                return real(*args, **options)

            return call

        for name in ("fsync", "replace", "unlink"):
            patched.setattr(os, name, failing(getattr(os, name)))
        yield


def as_another_program(folder):
    """Write an adapter again without what `save_adapter` notes in it."""
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text())))


def state_of(folder):
    """Return which of `layers` a folder holds, all of it."""
    found = load_adapter(folder)
    value = float(found["head"].lora_B[0, 0])
    for name, lora in layers(value, found["enc.fc"].alpha).items():
        np.testing.assert_array_equal(found[name].lora_A, lora.lora_A)
        np.testing.assert_array_equal(found[name].lora_B, lora.lora_B)
        assert found[name].alpha == lora.alpha
    return value, found["enc.fc"].alpha


@pytest.mark.parametrize("once", [False, True], ids=["killed", "interrupted"])
@pytest.mark.parametrize("alpha", [3.0, 4.0], ids=["same configuration", "another configuration"])
@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "of another program"])
def test_a_save_cut_short_leaves_old_or_new(tmp_path, once, alpha, foreign):
    """Cut at each call that changes the disk, in turn; the next save removes what is left."""
    seen, done = [], False
    while not done:
        folder = tmp_path / str(len(seen))
        save_adapter(folder, layers(1.0, 3.0))
        if foreign:
            as_another_program(folder)
        before = contents(folder)
        with failing(len(seen) + 1, once):
            try:
                save_adapter(folder, layers(2.0, alpha))
                done = True
            except Killed:
                pass
        seen.append(state_of(folder))
        assert load_adapter(folder).keys() == {summary.module for summary in inspect_adapter(folder)}
        if once:
            assert not list(folder.glob("*.part"))
            assert seen[-1] == (2.0, alpha) or contents(folder) == before
        save_adapter(folder, layers(5.0, 7.0))
        assert state_of(folder) == (5.0, 7.0)
        assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]
    assert seen == sorted(seen)
    assert set(seen) == {(1.0, 3.0), (2.0, alpha)}


def test_a_save_after_one_cut_short_may_be_cut_short(tmp_path):
    """What the first had put ready is finished before the second begins to put its own."""
    seen, done = [], False
    while not done:
        folder = tmp_path / str(len(seen))
        save_adapter(folder, layers(1.0, 3.0))
        with failing(7, once=False), contextlib.suppress(Killed):  # the old configuration is gone
            save_adapter(folder, layers(2.0, 4.0))
        assert not (folder / CONFIG).exists()
        with failing(len(seen) + 1, once=False):
            try:
                save_adapter(folder, layers(5.0, 7.0))
                done = True
            except Killed:
                pass
        seen.append(state_of(folder))
    assert seen == sorted(seen)
    assert set(seen) == {(2.0, 4.0), (5.0, 7.0)}


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    save_adapter(tmp_path, layers(1.0, 3.0))
    before = contents(tmp_path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path, layers(2.0, 4.0))
    assert contents(tmp_path) == before


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
        save_adapter(tmp_path / "a", layers(1.0, 3.0))
    assert str(error.value) == f"'{target}' is a {KINDS[kind]}, expected a regular file or a new name"
    assert contents(tmp_path) == before


def test_a_file_is_not_taken_for_the_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"precious")
    for path in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(ValueError, match="a' is a file, expected a folder"):
            save_adapter(path, layers(1.0, 3.0))
    assert contents(tmp_path) == {"a": b"precious"}


def test_files_of_others_beside_the_target_stay(tmp_path):
    others = {f"{name}.part": b"precious" for name in (CONFIG, WEIGHTS)} | {".minilora-0.part": b"precious"}
    for name, text in others.items():
        (tmp_path / name).write_bytes(text)
    save_adapter(tmp_path, layers(1.0, 3.0))
    assert {name: contents(tmp_path)[name] for name in others} == others


def test_unfinished_files_have_names_of_their_own(tmp_path):
    with written_whole(tmp_path / "a") as one, written_whole(tmp_path / "a") as other:
        one.write(b"one")
        other.write(b"other")
        assert len(list(tmp_path.iterdir())) == 2
    assert contents(tmp_path) == {"a": b"one"}  # the last to finish


def test_a_target_written_by_someone_else_meanwhile_is_left(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def write_alone():
        with written_whole(tmp_path / "a", alone=True) as file:
            file.write(b"mine")
            with written_whole(tmp_path / "a") as other:
                other.write(b"theirs")

    with pytest.raises(ValueError, match="written by someone else in the meantime"):
        write_alone()
    assert contents(tmp_path) == {"a": b"theirs"}


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    """And what a writer that lives is still writing stays."""
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from minilora.guards.wholefiles import written_folder, written_whole
with written_whole(Path(sys.argv[1]) / "a"), written_folder(Path(sys.argv[1]) / "b") as part:
    (part / "shard").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        for kill in (False, True):
            if kill:
                process.send_signal(signal.SIGKILL)
                process.wait()
            with written_whole(tmp_path / "a") as file:
                file.write(b"new")
            with written_folder(tmp_path / "b"):
                pass
            assert len(list(tmp_path.glob(".minilora-*.part"))) == (0 if kill else 2)
    assert contents(tmp_path) == {"a": b"new", "b": oct((tmp_path / "b").stat().st_mode)}


def test_a_link_named_like_remains_stays(tmp_path):
    (tmp_path / "precious").write_bytes(b"precious")
    part = wholefiles._part_of(tmp_path / "a")
    part.symlink_to("precious")
    with written_whole(tmp_path / "a") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"a": b"new", part.name: b"precious", "precious": b"precious"}


def test_permissions_are_those_of_any_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        with written_whole(tmp_path / "a"), written_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_a_name_that_is_no_text_is_written(tmp_path):
    with written_whole(tmp_path / "\udcff") as file:
        file.write(b"new")
    assert contents(tmp_path) == {"\udcff": b"new"}


WRITER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from minilora import LoRA, save_adapter
value = float(sys.argv[2])
layer = LoRA(np.full((2, 300), value), np.full((300, 2), value), value)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    save_adapter(sys.argv[1], {{"fc": layer}})
"""


@pytest.mark.long
def test_two_writers_and_a_reader_never_see_a_mixture(tmp_path):
    folder, pipe = tmp_path / "a", subprocess.PIPE
    save_adapter(folder, {"fc": LoRA(np.full((2, 300), 1.0), np.full((300, 2), 1.0), 1.0)})
    command = [sys.executable, "-c", WRITER, str(folder)]
    writers = [subprocess.Popen([*command, value, "12"], stdin=pipe, text=True) for value in ("1", "2")]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = set()
    while any(writer.poll() is None for writer in writers):
        lora = load_adapter(folder)["fc"]
        assert lora.alpha == lora.lora_A[0, 0] == lora.lora_B[-1, -1]
        seen.add(lora.alpha)
    for writer in writers:
        writer.stdin.close()
        assert writer.wait() == 0
    assert seen <= {1.0, 2.0}
    assert sorted(os.listdir(folder)) == [CONFIG, WEIGHTS]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    save_adapter(tmp_path / "a", layers(1.0, 3.0))
    weights, copy = tmp_path / "a" / WEIGHTS, tmp_path / "copy"
    shutil.copy(weights, copy)
    folder = AdapterFolder.open(tmp_path / "a")

    def read_while_it_changes():
        with folder.file.opened() as file:
            folder.read("head", file)
            time.sleep(0.02)  # longer than the clock of the file system ticks
            weights.write_bytes(weights.read_bytes())

    with pytest.raises(FileRefused, match="changed while it was read"):
        read_while_it_changes()
    os.replace(copy, weights)
    with pytest.raises(FileRefused, match="changed after it was checked"):
        folder.file.check_unchanged()


def test_the_noted_digest_is_that_of_the_configuration(tmp_path):
    save_adapter(tmp_path, layers(1.0, 3.0))
    text = (tmp_path / CONFIG).read_bytes()
    assert json.loads(text)["lora_alpha"] == 3
    assert TensorFile(tmp_path / WEIGHTS).metadata == {
        "format": "pt",
        "minilora_config_sha256": hashlib.sha256(text).hexdigest(),
    }


def test_a_name_no_file_can_have_is_refused_by_name(tmp_path):
    path = tmp_path / ("x" * 300)
    with pytest.raises(ValueError, match=f"^'{path}' cannot be written: "), written_whole(path):
        pytest.fail("it was opened")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("place", "free"), [
    ("new", True), ("empty", True), ("full", False), ("file", False), ("link", False), ("dangling", False),
])  # fmt: skip
def test_a_folder_may_be_written_at_a_new_name_or_an_empty_folder_itself(tmp_path, place, free):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert is_new_or_empty(tmp_path / place) is free
