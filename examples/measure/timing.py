"""What both benchmarks share: laps in turn, what the machine was and how busy, growth with a size, tables, bars.

Whoever is compared does the same work on the same arrays. They take turns, lap after lap, so that whatever else the
machine does falls on all alike, and a ratio is the median over laps of the ratio within a lap. Before each turn there
is a rest, since OpenBLAS and OpenMP keep their threads spinning for some 30 ms after a product, on a core that the next
one wants; then some steps that are not timed.
"""

import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

REST, WARM_UP, TURN = 0.06, 3, 0.12  # seconds, steps, seconds
OTHERS = 0.25
"""Cores that other processes may take, on average, while ratios are measured that are judged."""
UNITS = ("avx512_bf16", "amx_bf16")
"""What a processor's flags say of its units for products in bfloat16."""
GROUPS = {
    "full": "full rank: every weight trained",
    "lora": "LoRA beside its frozen base",
    "residual": "LoRA on the residual: the base run once",
}
"""The ways to train one layer, by the beginning of a contender's name."""


def laps(
    steps: dict[str, Callable[[], object]], count: int, warm_up: int = WARM_UP, least: int = 3
) -> dict[str, list[float]]:
    """Let everyone run in turn, `count` times; return milliseconds a step, one for each lap.

    A turn has `warm_up` steps that are not timed, and at least `least` that are.
    """
    times = {name: [] for name in steps}
    turns = {}
    for lap in range(count + 1):  # the first lap only finds out how many steps fill a turn
        for name, step in steps.items():
            time.sleep(REST)
            for _ in range(warm_up):
                step()
            start = time.perf_counter()
            for _ in range(turns.get(name, least)):
                step()
            seconds = (time.perf_counter() - start) / turns.get(name, least)
            if lap == 0:
                turns[name] = max(least, round(TURN / seconds))
            else:
                times[name].append(1000 * seconds)
    return times


def ratio(times, name, others):
    """Return the median over laps of this contender's time to that of the best of some others."""
    best = min((other for other in others if other in times), key=lambda other: np.median(times[other]))
    return float(np.median(np.divide(times[name], times[best])))


def exponent(sizes, values):
    """Return the p of the size^p that fits best; a part that does not grow brings it below 1."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak_bytes(forget=False):
    """Return the most memory that this process has had in use at once; on Linux that can be forgotten."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux lets a child's ru_maxrss begin with its parent's
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Load:
    """How many cores other processes computed on, on average, since this was made; None where the system does not say.

    A process of ours that runs still is not counted as ours: wait for it first.
    """

    def __init__(self):
        self.began, self.before = time.perf_counter(), self._others()

    @staticmethod
    def _others():
        """Return the seconds that all other processes have computed since the machine started."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().split("\n")[0].split()[1:])
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - sum(
            u.ru_utime + u.ru_stime for u in usage
        )

    def others(self):
        """Return that number of cores."""
        now = self._others()
        return None if now is None else max(0.0, (now - self.before) / (time.perf_counter() - self.began))


def kernel():
    """Return which kernel NumPy's BLAS runs on this processor, such as SkylakeX; None where nothing tells."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    found = [
        pool.get("architecture")
        for pool in threadpool_info()
        if pool["user_api"] == "blas" and "numpy" in pool["filepath"]
    ]
    return found[0] if found else None


def machine():
    """Describe where this ran, without naming the computer."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = [line.partition(": ") for line in cpuinfo.read_text().splitlines()] if cpuinfo.exists() else []
    models, flags = ([what for key, _, what in lines if key.startswith(name)] for name in ("model name", "flags"))
    units = [unit for unit in UNITS if unit in flags[0].split()] if flags else None
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = {"python": platform.python_version(), "numpy": np.__version__, blas["name"]: blas["version"]}
    for name in ("torch", "peft"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "kernel": kernel(), "units": units, "cores": cores, "versions": versions}


# --- tables -----------------------------------------------------------------------------------------------------------


def machine_line(result):
    """Say in two lines what ran where; the second ends with the day."""
    task, machine = result["task"], result["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    return (
        f"A training step, float32, batch {task['batch']} of {task['rows']:,} rows, {task['in']} inputs, {task['out']} "
        f"outputs, rank 1.\n{cpu_line(machine)}; {versions}; {result['when']}"
    )


def cpu_line(machine):
    """Say which processor it was, which kernel it ran, how many cores it has, and how many of them others took."""
    kernel = f", {machine['kernel']} kernel" if machine.get("kernel") else ""
    others = machine.get("others")
    return f"{machine['cpu']}{kernel}, {machine['cores']} cores" + (
        "" if others is None else f", {others:.2f} of them taken by others"
    )


def too_busy(machine):
    """Say why ratios measured there are not to be judged; "" where they are."""
    others = machine.get("others")
    if others is None or others <= OTHERS:
        return ""
    return (
        f"not judged: other processes computed on {others:.2f} cores meanwhile, and {OTHERS} is the most for a verdict"
    )


def bars_table(bars, busy=""):
    """Lay out what we hold ourselves to, and whether it is met; or why that is not judged."""
    lines = [f"{'ours as a fraction':82}{'measured':>9}{'at most':>9}"]
    for bar in bars:
        verdict = "" if busy or bar["ratio"] <= bar["bound"] else "  not met"
        lines.append(f"  {bar['what']:80}{bar['ratio']:9.3f}{bar['bound']:9.3f}{verdict}")
    return "\n".join([*lines, busy] if busy else lines)


def growth_table(axis, sizes, rows):
    """Lay out what grows with a size: rows of (what, values, digits, exponent or None)."""
    lines = ["", f"  {axis:28}" + "".join(f"{size:10,}" for size in sizes) + f"{'p':>8}"]
    for what, values, digits, p in rows:
        numbers = "".join(f"{value:10,.{digits}f}" for value in values)
        lines.append(f"  {what:28}{numbers}" + ("" if p is None else f"{p:8.2f}"))
    return "\n".join(lines)
