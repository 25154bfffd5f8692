"""Memory that a training keeps from one step to the next."""

import subprocess
import sys

import pytest

from minilora.fast import keep_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")

COUNT = """
import resource, sys
import numpy as np
from minilora.fast import keep_pages

def step():
    return [np.ones(size) for size in (400_000, 300_000, 8_000_000)]  # 3.2, 2.4 and 64 MB

if sys.argv[1] == "keep" and not keep_pages():
    sys.exit("no glibc")
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how):
    found = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True)
    if "no glibc" in found.stderr:
        pytest.skip("not glibc")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


def test_the_next_step_asks_for_no_new_pages():
    assert new_pages("give back") > 1000
    assert new_pages("keep") < 100


def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("minilora.fast.memory.sys.platform", "darwin")
    monkeypatch.setattr("minilora.fast.memory.ctypes.CDLL", lambda name: pytest.fail("asked a library"))
    assert keep_pages() is False
