"""A folder's lock is waited for and named, ends with its process, and is no hindrance where there are none."""

import contextlib
import errno
import os

import numpy as np
import pytest

from minilora import FileRefused, LoRA, load_adapter, save_adapter
from minilora.guards import folderlocks, wholefiles
from minilora.guards.folderlocks import locked
from minilora.guards.wholefiles import written_folder


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


def state_of(folder):
    """Return which of `layers` a folder holds, all of it."""
    found = load_adapter(folder)
    value = float(found["head"].lora_B[0, 0])
    for name, lora in layers(value, found["enc.fc"].alpha).items():
        np.testing.assert_array_equal(found[name].lora_A, lora.lora_A)
        np.testing.assert_array_equal(found[name].lora_B, lora.lora_B)
        assert found[name].alpha == lora.alpha
    return value, found["enc.fc"].alpha


def test_a_lock_that_another_keeps_is_waited_for_and_named(tmp_path, monkeypatch):
    save_adapter(tmp_path, layers(1.0, 3.0))
    before = contents(tmp_path)
    monkeypatch.setattr(folderlocks, "LOCK_SECONDS", 0.02)
    with locked(tmp_path):
        with pytest.raises(FileRefused, match="another process has kept it locked") as error:
            save_adapter(tmp_path, layers(2.0, 4.0))
        assert str(error.value) == f"'{tmp_path}': another process has kept it locked for 0.02 s"
        with pytest.raises(FileRefused, match="another process has kept it locked"):
            load_adapter(tmp_path)
    with locked(tmp_path, shared=True):
        assert load_adapter(tmp_path)["head"].alpha == 1.5
    assert contents(tmp_path) == before


def test_a_lock_that_ends_is_waited_for_and_not_longer(tmp_path, monkeypatch):
    other, waits = contextlib.ExitStack(), []
    other.enter_context(locked(tmp_path))

    def wait(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            other.close()

    monkeypatch.setattr(folderlocks.time, "sleep", wait)
    with locked(tmp_path):
        assert len(waits) == 3
        assert max(waits) < 0.1


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch):
    def unsupported(handle, kind):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(wholefiles.fcntl, "flock", unsupported)
    save_adapter(tmp_path, layers(1.0, 3.0))
    save_adapter(tmp_path, layers(2.0, 4.0))
    assert state_of(tmp_path) == (2.0, 4.0)


def test_without_locks_files_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(wholefiles, "fcntl", None)
    save_adapter(tmp_path / "a", layers(1.0, 3.0))
    assert load_adapter(tmp_path / "a")["head"].alpha == 1.5
    with written_folder(tmp_path / "b") as part:
        (part / "x").write_bytes(b"new")
    assert contents(tmp_path / "b") == {"x": b"new"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_folder_to_wait_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with locked(tmp_path / "pipe", shared=True):
        pass  # a reader refuses what is no folder afterwards
    with pytest.raises(NotADirectoryError), locked(tmp_path / "pipe"):
        pytest.fail("it is locked")
    with pytest.raises(FileRefused, match="not a folder"):
        load_adapter(tmp_path / "pipe")
