"""What adapter-files.md asserts and shows; the names are the page's own."""

import json
from inspect import signature
from pathlib import Path
from textwrap import dedent

import merge_memory
import numpy as np
from pages import says

from minilora import article
from minilora.files.inspection import product_spectrum
from minilora.files.patterns import SECONDS

usual = {name: parameter.default for name, parameter in signature(article.run).parameters.items()}
n, n_in, n_out, rank = (usual[name] for name in ("n", "in_features", "out_features", "rank"))

# %% Adapters as files

says(f"in the article's experiment, {rank * (n_in + n_out):,} numbers")

# %% What is in the two files

saved = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
start = saved.index(b"{")
length = int.from_bytes(saved[:start], "little")
assert json.loads(saved[start : start + length]).keys() == {*file.tensors, "__metadata__"}
says(f"{start} bytes with the length of a header")

# %% Look into an adapter

own = np.random.default_rng(1)
B = np.outer(own.standard_normal(7), own.standard_normal(4))
squares = product_spectrum(own.standard_normal((4, 5)), B) ** 2
shares = squares / squares.sum()
says(f"An adapter of rank {len(shares)} whose first share is {100 * shares[0]:.0f} % uses one direction of four.")

# %% Merge it into a weights file

sizes = {}


def noted(dtype, shapes):
    sizes[dtype] = [rows * columns * np.dtype(dtype).itemsize for rows, columns in shapes]


exec(dedent(Path(merge_memory.__file__).read_text().partition('"__main__":\n')[2]), {"measure": noted})
assert "with rank 16, and merge" in merge_memory.measure.__doc__
says(f"merges rank 16 into weights of {sum(sizes['float32']) / 1e6:.0f} MB.")
assert 499e6 < min(map(sum, sizes.values())) < max(map(sum, sizes.values())) < 504e6
single, half = (f"{max(sizes[dtype]) / 2**20:.0f} MiB" for dtype in ("float32", "float16"))
says(f"for float32 with a largest tensor of {single}", f"for float16\n  with tensors of {half}")
# Facts from elsewhere: what examples/measure/merge_memory.py printed on the machine that the page names: 83 and 95 MiB,
# of which 48 with all imported.
says("the process took at most 35 MiB", "and 47 MiB", "two cores, Python 3.11, NumPy 2.4")

# %% In other programs

# Facts from elsewhere: vLLM's own default of --max-lora-rank.
says("Above rank 16 it also needs `--max-lora-rank`")

# %% What is refused

says(f"stopped after {SECONDS:g} seconds")

# %% Training that survives a kill

says(f"the {4 * n * n_in / 1e6:.0f} MB of the article's inputs")
# Facts from elsewhere: `minilora.files.checkpoint.fingerprint`, timed on an Intel Xeon.
says("takes about 30 ms")
