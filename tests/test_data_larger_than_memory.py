"""X and Y may be files: training reads rows as it needs them, and the rest stays on the disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Linear, LoRA, LoRALinear, TrainingDiverged, evaluate, train

# A process of its own reads the files: only there can the memory be limited. RLIMIT_DATA counts what a process
# allocates, and not the pages of a file that the system may drop again.
LIMITED = """
import re, resource, sys
from pathlib import Path

import numpy as np

from minilora import LoRA, train

folder, n, width, allowed = Path(sys.argv[1]), *map(int, sys.argv[2:])
X, Y = (np.memmap(folder / name, np.float32, "r", shape=(n, width)) for name in "XY")
adapter = LoRA(np.load(folder / "A.npy"), np.load(folder / "B.npy"), 1.0)
X[:4096] @ np.zeros((width, width), np.float32)  # the buffers of the BLAS are not ours

in_use = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (in_use + allowed, in_use + allowed))
try:
    np.ones(2 * allowed, np.uint8)
except MemoryError:
    print("the limit holds")
print(repr(train(adapter, X, Y, epochs=2, rng=np.random.default_rng(0)).losses))
np.save(folder / "A_after.npy", adapter.lora_A)
np.save(folder / "B_after.npy", adapter.lora_B)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process by RLIMIT_DATA")
def test_files_larger_than_memory_train_to_the_same_bits(tmp_path):
    n, width, allowed = 60_000, 256, 24_000_000
    rng = np.random.default_rng(0)
    X, Y = (rng.standard_normal((n, width), dtype=np.float32) for _ in "XY")
    adapter = LoRA.init(width, width, rank=2, alpha=1, rng=rng)
    for name, array in {"X": X, "Y": Y}.items():
        array.tofile(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 2.5 * allowed
    np.save(tmp_path / "A.npy", adapter.lora_A)
    np.save(tmp_path / "B.npy", adapter.lora_B)

    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(n), str(width), str(allowed)]
    limited = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert limited.returncode == 0, limited.stderr
    losses = train(adapter, X, Y, epochs=2, rng=np.random.default_rng(0)).losses

    assert limited.stdout.splitlines() == ["the limit holds", repr(losses)]
    np.testing.assert_array_equal(np.load(tmp_path / "A_after.npy"), adapter.lora_A)
    np.testing.assert_array_equal(np.load(tmp_path / "B_after.npy"), adapter.lora_B)


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["full", "lora", "adapter"]), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_file_trains_to_the_same_bits_as_memory(tmp_path_factory, kind, batch_size, seed):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((40, 5)), rng.standard_normal((40, 3))
    path = tmp_path_factory.mktemp("data")
    on_disk = []
    for name, array in (("X", X), ("Y", Y)):
        file = np.memmap(path / name, array.dtype, "w+", shape=array.shape)
        file[:] = array
        file.flush()
        on_disk.append(np.memmap(path / name, array.dtype, "r", shape=array.shape))

    def model():
        start = np.random.default_rng(seed + 1)
        base, adapter = (
            Linear.init(5, 3, rng=start, dtype="float64"),
            LoRA.init(5, 3, rank=2, alpha=1, rng=start, dtype="float64"),
        )
        return {"full": base, "lora": LoRALinear(base, adapter), "adapter": adapter}[kind]

    ends = []
    for x, y in ((X, Y), on_disk):
        layer = model()
        history = train(layer, x, y, epochs=3, batch_size=batch_size, log_every=1, rng=np.random.default_rng(seed))
        ends.append((history.losses, evaluate(layer, x, y), *(p.tobytes() for p in layer.trainable().values())))
    assert ends[0] == ends[1]


def test_a_nan_in_a_mapped_file_is_met_in_training(tmp_path):
    X = np.memmap(tmp_path / "X", np.float64, "w+", shape=(20, 3))
    X[7, 1] = np.nan
    adapter = LoRA.init(3, 2, rank=1, alpha=1, rng=np.random.default_rng(0), dtype="float64")
    with pytest.raises(TrainingDiverged, match="epoch 1: lora_A, lora_B is no longer finite"):
        train(adapter, X, np.zeros((20, 2)), epochs=1, batch_size=20, rng=np.random.default_rng(0))
