"""Time a training step: ours, the peers', and the floor that this machine sets.

    python examples/benchmark.py                          the table, and the bars we hold ourselves to
    python examples/benchmark.py --article 5              also the whole article, 5 epochs of each training
    python examples/benchmark.py --sizes                  also how our step grows with rank, width, batch and rows
    python examples/benchmark.py --json FILE --plot FILE  keep it
    python examples/benchmark.py --model                  a language model's step instead, see benchmark_model.py
    python examples/benchmark.py --dtypes                 its whole steps in float32 and in bfloat16
    python examples/benchmark.py --losses                 what 200 of these reach: an hour

Everybody does the same work on the same arrays in this one process: draw a batch without replacement, gather its
rows, forward, mean squared error, backward, a step of Adam. They take turns, lap after lap, so that whatever else the
machine does falls on all alike, and a ratio is the median over laps of the ratio within a lap. Before each turn there
is a rest, since OpenBLAS and OpenMP keep their threads spinning for some 30 ms after a product, on a core that the next
one wants; then some steps that are not timed. Without torch and PEFT the table has our rows and the floors.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout's minilora, installed or not

import benchmark_report as report
from benchmark_ours import FLOORS, OURS, Step, Task

from minilora import article
from minilora.cli.figures import check_figure_path

REST, WARM_UP, TURN = 0.06, 3, 0.12  # seconds, steps, seconds
FULL, LORA_LINEAR, LORA_LINEAR_SHORT, ADAPTER, ADAPTER_SHORT = OURS
FLOOR_OF = {  # what a step of each kind cannot do without
    "full": "full: floor, two products",
    "lora": "lora: floor, if the base is run",
    "residual": "residual: floor, gathers",
}
BEST_TORCH = ["residual: torch", "residual: torch, fused", "residual: torch, compiled"]
BARS = [  # what is measured, of which, of the best of which, at most
    ("full-rank step, of torch", FULL, ["full: torch"], 1.10),
    ("adapter step, of the best torch has", ADAPTER, BEST_TORCH, 0.75),
    ("adapter step, of PEFT", ADAPTER, ["lora: PEFT"], 1 / 7),
    ("adapter step by the residual form, of the best torch has", ADAPTER_SHORT, BEST_TORCH, 0.50),
    ("adapter step by the residual form, of PEFT", ADAPTER_SHORT, ["lora: PEFT"], 1 / 10),
    ("LoRALinear step, of PEFT", LORA_LINEAR, ["lora: PEFT"], 1.0),
]


def contenders():
    """Return everyone who is here, in the order of the table, and why the peers are not, if they are not."""
    try:
        from benchmark_peers import PEERS
    except ImportError as error:
        everyone, absence = OURS | FLOORS, f"without torch and PEFT ({error}): pip install torch peft"
    else:
        everyone, absence = OURS | PEERS | FLOORS, ""
    groups = ("full", "lora", "residual")
    return {name: make for group in groups for name, make in everyone.items() if name.startswith(group)}, absence


def laps(steps: dict[str, Step], count: int, warm_up: int = WARM_UP, least: int = 3) -> dict[str, list[float]]:
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


def peak_bytes(forget=False):
    """Return the most memory that this process has had in use at once; on Linux that can be forgotten."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux lets a child's ru_maxrss begin with its parent's
        if forget:
            Path("/proc/self/clear_refs").write_text("5")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def print_memory(name):
    """Print what 20 steps of one contender add to the memory of a process that holds the data already."""
    make, task = contenders()[0][name], Task()
    before = peak_bytes(forget=True)
    step = make(task)
    for _ in range(20):
        step()
    print(peak_bytes() - before)


def memory(name):
    """Measure that in a process of its own."""
    found = subprocess.run([sys.executable, __file__, "--memory", name], capture_output=True, text=True)
    return int(found.stdout.split()[-1]) / 1e6 if found.returncode == 0 else None


def whole_article(epochs, count):
    """Return the seconds of the article's two trainings, ours and torch's, lap by lap; simulating data is left out."""
    from benchmark_peers import ArticleModule, full, train_as_the_article_does

    times = {"minilora": [], "torch": []}
    for _ in range(count):
        time.sleep(REST)
        result = article.run(epochs=epochs)
        times["minilora"].append(result.base_seconds + result.lora_seconds)
        task = Task()
        time.sleep(REST)
        start = time.perf_counter()
        train_as_the_article_does(task, full(task), epochs)
        train_as_the_article_does(task, ArticleModule(task), epochs)
        times["torch"].append(time.perf_counter() - start)
    return times


GROWTH = {
    "rank": [1, 2, 4, 8, 16, 32, 64],
    "width": [256, 512, 1024, 2048, 4096],
    "batch": [32, 64, 128, 256, 512, 1024],
    "n": [2500, 5000, 10_000, 20_000, 40_000],
}


def growth(count):
    """Time our steps at many sizes; return medians and the exponent p of the size^p that fits them best."""
    found = {}
    for axis, sizes in GROWTH.items():
        steps = {}
        for size in sizes:
            task = Task(in_features=size, out_features=size) if axis == "width" else Task(**{axis: size})
            steps |= {(name, size): make(task) for name, make in OURS.items()}
        times = laps(steps, count)
        for name in OURS:
            medians = [float(np.median(times[name, size])) for size in sizes]
            exponent = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
            found.setdefault(axis, {})[name] = {"sizes": sizes, "ms": medians, "exponent": exponent}
    return found


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


UNITS = ("avx512_bf16", "amx_bf16")
"""What a processor's flags say of its units for products in bfloat16."""


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


def measure(lap_count, article_epochs, with_growth):
    """Do all that was asked for; return it as JSON has it."""
    (everyone, absence), load = contenders(), Load()
    task, steps, left_out = Task(), {}, [absence] if absence else []
    for name, make in everyone.items():
        try:
            steps[name] = make(task)
        except Exception as error:  # torch.compile fails in as many ways as there are compilers
            left_out.append(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    times = laps(steps, lap_count)
    rows = []
    for name, milliseconds in times.items():
        low, median, high = np.percentile(milliseconds, [25, 50, 75])
        same_work = next(our for our in OURS if our.split(":")[0] == name.split(":")[0])
        row = {"name": name, "ms": median, "low": low, "high": high, "ratio": ratio(times, name, [same_work])}
        row["of floor"] = ratio(times, name, [FLOOR_OF[name.split(":")[0]]])
        rows.append({**row, "memory_mb": None if "floor" in name else memory(name)})
    bars = [
        {"what": what, "ratio": ratio(times, name, others), "bound": bound}
        for what, name, others, bound in BARS
        if any(other in times for other in others)
    ]
    where = machine() | {"others": load.others()}
    result = {"date": date.today().isoformat(), "machine": where, "laps": lap_count, "left_out": left_out}
    result |= {"task": {"rows": task.n, "in": task.in_features, "out": task.out_features, "batch": task.batch}}
    if article_epochs and not absence:
        seconds = whole_article(article_epochs, 3)
        bars.append(
            {
                "what": f"whole article, of torch's ({article_epochs} epochs of each training)",
                "ratio": ratio(seconds, "minilora", ["torch"]),
                "bound": 1 / 3,
            }
        )
        result["article_seconds"] = {name: float(np.median(value)) for name, value in seconds.items()}
    return result | {"steps": rows, "bars": bars, "growth": growth(max(3, lap_count // 3)) if with_growth else None}


def measure_model(arguments):
    """Time a language model, print the table line by line, and return it as JSON has it."""
    import benchmark_model

    if absence := benchmark_model.missing():
        raise SystemExit(absence)
    if arguments.dtypes:
        return benchmark_model.measure_dtypes(arguments.laps, arguments.json)
    if arguments.losses:
        return benchmark_model.measure_losses(arguments.json)
    count = arguments.laps
    print(benchmark_model.HEAD)
    result = benchmark_model.measure(count)
    print("\n" + report.bars_table(result["bars"], report.too_busy(result["machine"])))
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--laps", type=int, default=15, metavar="N", help="turns that everyone gets (default 15)")
    parser.add_argument("--article", type=int, default=0, metavar="EPOCHS", help="time the whole article, that long")
    parser.add_argument("--sizes", action="store_true", help="time our step at many sizes, and fit exponents")
    parser.add_argument("--model", action="store_true", help="a language model's step and text, beside torch + PEFT")
    parser.add_argument("--dtypes", action="store_true", help="its whole steps in float32 and in bfloat16")
    parser.add_argument("--losses", action="store_true", help="what 200 of these reach: an hour")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and where they were measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg, .pdf)")
    parser.add_argument("--memory", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        print_memory(arguments.memory)
        return
    if arguments.laps < 1 or arguments.article < 0:
        parser.error("--laps must be at least 1 and --article at least 0")
    of_model = arguments.model or arguments.dtypes or arguments.losses
    if of_model and (arguments.plot or arguments.sizes or arguments.article):
        parser.error("--model, --dtypes and --losses go with --laps and --json alone")
    if arguments.plot:
        try:
            check_figure_path(arguments.plot)
        except ValueError as error:
            parser.error(str(error))
    if of_model:
        result = measure_model(arguments)
    else:
        result = measure(arguments.laps, arguments.article, arguments.sizes)
        print(report.text(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.plot:
        report.plot(result).savefig(arguments.plot)


if __name__ == "__main__":
    main()
