"""The memory of a machine, a container, or a GPU."""

import os
from types import SimpleNamespace

import pytest

from minilora import get_backend
from minilora.guards import machinememory as machine

pytest.importorskip("tokenizers", reason="pip install -e '.[models]'")


def test_on_a_gpu_the_memory_is_the_devices():
    def backend(**runtime):
        return SimpleNamespace(
            name="cupy", xp=SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(**runtime)))
        )

    assert machine.memory(backend(memGetInfo=lambda: (3, 10))) == machine.Memory(whole=10, free=3)
    assert machine.memory(backend()) is None


def test_the_machines_memory_is_less_than_it_has():
    found = machine.memory(get_backend("numpy"))
    assert 0 < found.free <= found.whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("place", ["", "a", "a/b"])
def test_a_limit_at_any_group_above_the_process_counts(tmp_path, monkeypatch, place):
    """The process is in a/b, a group of a, which is a group of the root."""
    limit, use, stat = machine.FILES[""]
    (tmp_path / "a" / "b").mkdir(parents=True)
    for group in ("", "a", "a/b"):
        (tmp_path / group / limit).write_text("3000000\n" if group == place else "max\n")
        (tmp_path / group / use).write_text("2000000\n")
        (tmp_path / group / "memory.stat").write_text(f"anon 7\n{stat} 500000\n")
    (tmp_path / "own").write_text("0::/a/b\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    assert machine.memory(get_backend("numpy")) == machine.Memory(3_000_000, 1_500_000)


@pytest.mark.parametrize("version", ["", "memory"])
def test_the_limit_of_a_container_is_the_machines(tmp_path, monkeypatch, version):
    """Of both versions of control groups; the limit stands at a folder above, or at the root in a container."""
    limit, use, stat = machine.FILES[version]
    group = tmp_path / version
    group.mkdir(exist_ok=True)
    (group / limit).write_text("3000000\n")
    (group / use).write_text("2000000\n")
    (group / "memory.stat").write_text(f"anon 7\n{stat} 500000\n")
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN", tmp_path / "own")
    for line, of in (("0::/a/b\n", ""), ("4:cpu,memory:/x/y\n", "memory"), ("5:pids:/\n", None)):
        (tmp_path / "own").write_text(line)
        here = of == version
        found = machine.memory(get_backend("numpy"))
        assert (found == machine.Memory(3_000_000, 1_500_000)) == here
