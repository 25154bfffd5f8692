"""How much memory does a merge need? Folds an adapter into weights of 500 MB and prints the peak (Linux).

The merge runs in a process of its own, and its peak is what the kernel calls VmHWM: the most memory that this
process ever held, the interpreter and its libraries included. Takes 1 GB of disk, and gives it back.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minilora import LoRA, save_adapter

MERGE = """
import sys
from minilora import merge_adapter

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024

before = peak()
merge_adapter(*sys.argv[1:], progress=True)
print(f"{before:.0f} MiB with all imported, {peak():.0f} MiB at most during the merge")
"""


def measure(dtype: str, shapes: list[tuple[int, int]]) -> None:
    """Write random weights, adapt each of them with rank 16, and merge."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {f"layer.{i}.weight": rng.standard_normal(s, "float32").astype(dtype) for i, s in enumerate(shapes)}
        largest = max(weight.nbytes for weight in weights.values())
        save_file(weights, folder / "base.safetensors")
        layers = {
            f"layer.{i}": LoRA(rng.standard_normal((16, n), "float32"), rng.standard_normal((m, 16), "float32"), 16)
            for i, (m, n) in enumerate(shapes)
        }
        save_adapter(folder / "adapter", layers)
        size = (folder / "base.safetensors").stat().st_size
        print(f"{dtype}, {size / 1e6:.0f} MB, the largest tensor {largest / 2**20:.0f} MiB: ", end="", flush=True)
        paths = [str(folder / name) for name in ("base.safetensors", "adapter", "out.safetensors")]
        subprocess.run([sys.executable, "-c", MERGE, *paths], check=True)


if __name__ == "__main__":
    measure("float32", [(25_000, 3000), (50_000, 1000)])
    measure("float16", [(4096, 3072)] * 20)
