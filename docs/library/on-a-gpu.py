"""Checks and computed contents of on-a-gpu.md; its parts see the page's own names."""

# %% What is transferred, and when the host waits

import json
import re
import sys
from unittest import mock

from pages import ROOT, says

from minilora import cross_entropy, mse
from minilora.watching import first_loss
from tests.support import cupy_standin

waits = []
with mock.patch.dict(sys.modules, cupy=cupy_standin.make(kernels=False)):
    device = get_backend("cupy")
    layer = LoRA.init(7, 5, rank=2, alpha=1, rng=rng, backend=device)
    rows = device.asarray(rng.standard_normal((6, 7)), "float32")
    for target, loss in ((rng.standard_normal((6, 5)).astype("float32"), mse), (np.arange(6) % 5, cross_entropy)):
        target = device.asarray(target)
        cupy_standin.traffic.reset()
        first_loss(layer, rows, target, loss)
        waits.append(cupy_standin.traffic.waits)
says(f"compares with the last one | {waits[0]}; {waits[1]} with classes |")
says(f"ten times the first one? | {waits[0]}; {waits[1]} with classes |")

# Facts from elsewhere: NVIDIA's format TF32.
says("to 10 bits of mantissa")

# %% Memory

from minilora.fast.blockwise import GPU

says(f"Beyond {GPU.plain_up_to:,} positions")

# %% What is tested without a GPU

from tests.devices.test_cupy_standin import LEAKS

release = json.loads((ROOT / "tests" / "support" / "cupy_api.json").read_text(encoding="utf-8"))["version"]
says(f"the wheel of CuPy {release.rpartition('.')[0]} does not have")
says(f"- {len(LEAKS)} leaks planted in the library")

# Facts from elsewhere: the version that .ci/another-library fetched on the day when it ran.
says("with dpnp 0.20 in CuPy's place")

# %% What is not yet measured

tests = ROOT / "tests" / "devices"
test = (tests / "test_devices.py").read_text(encoding="utf-8")
examples = int(re.search(r"^N, IN, OUT, RANK = (\d+)", test, re.M)[1])
epochs, size = map(int, re.search(r'"epochs": (\d+), "batch_size": (\d+), "lr": 0.01', test).groups())
says(f"to 1e-9 in float64 after\n  {epochs * (examples // size)} training steps;")
test = (tests / "test_gpu.py").read_text(encoding="utf-8")
single, double = re.search(r'tolerance = \{"float32": (\S+), "float64": (\S+)\}', test).groups()
says(f"to {double} in float64 and {single} in float32 for each layer")
test = test.partition("def test_memory_stays_flat")[2]
examples, size, epochs = map(
    int, re.search(r"\((\d+), width\).*?batch_size=(\d+).*?later = fit\((\d+)\)", test, re.S).groups()
)
says(f"does not grow over {epochs * (examples // size)} steps")
