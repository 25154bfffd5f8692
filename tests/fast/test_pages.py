"""Memory that is kept from one step to the next."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from minilora.fast import keep_pages

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
COUNT = """
import resource, sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from minilora.fast import keep_pages

def step(all_at_once):
    kept = [np.ones(size) for size in (400_000, 300_000, 8_000_000)]  # 3.2, 2.4 and 64 MB
    all_at_once.wait()  # on a busy machine one thread might otherwise end before the next begins

def turn():
    all_at_once = threading.Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:  # new threads each time, as `accumulate` has them
        for _ in pool.map(lambda _: step(all_at_once), range(threads)):
            pass

if sys.argv[1] == "keep" and not keep_pages():
    sys.exit("no glibc")
threads = int(sys.argv[2])
for _ in range(3):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how, threads):
    found = subprocess.run([sys.executable, "-c", COUNT, how, str(threads)], capture_output=True, text=True)
    if "no glibc" in found.stderr:
        pytest.skip("not glibc")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_next_step_asks_for_no_new_pages(threads):
    assert new_pages("give back", threads) > 300
    assert new_pages("keep", threads) < 100


@LINUX
@pytest.mark.parametrize("refused", [None, -1, -4, -8])
def test_pages_are_kept_where_each_setting_is_taken(monkeypatch, refused):
    """By mallopt(3): -1 trims nothing, -4 at 0 maps nothing by itself, -8 at 1 has one arena for all threads."""
    taken = {-1: -1, -4: 0, -8: 1}
    library = SimpleNamespace(mallopt=lambda name, value: int(name != refused and taken[name] == value))
    monkeypatch.setattr("minilora.fast.pages.ctypes.CDLL", lambda name: library)
    assert keep_pages() is (refused is None)


@LINUX
def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("minilora.fast.pages.sys.platform", "darwin")
    monkeypatch.setattr("minilora.fast.pages.ctypes.CDLL", lambda name: pytest.fail("asked a library"))
    assert keep_pages() is False
