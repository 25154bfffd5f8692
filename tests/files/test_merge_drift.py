"""Merging an adapter and taking it out again: the weight comes back up to rounding, and how far off it gets."""

import numpy as np
import pytest

from minilora import LoRA, merge_adapter, save_adapter
from minilora.files.tensors import FLOATS, TensorFile, write_tensors

UNIT = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
"""How far a number may be off that is rounded to nearest, as a part of it."""


def write(path, weight, dtype):
    with open(path, "wb") as file:
        write_tensors(file, {"fc.weight": weight.astype(FLOATS[dtype])}, {})


def read(path):
    file = TensorFile(path)
    return file.read("fc.weight").astype("f8")


class Cycles:
    """A weight (24, 40) of a type in a file, and adapters of rank 3 merged and taken out by their negatives."""

    def __init__(self, folder, dtype):
        self.folder, self.rng = folder, np.random.default_rng(5)
        self.weight = folder / "weight.safetensors"
        W = self.rng.standard_normal((24, 40)) / 40**0.5
        write(self.weight, W, dtype)
        self.before, self.dtype = read(self.weight), dtype
        self.adapter = self.drawn()

    def drawn(self):
        A, B = self.rng.standard_normal((3, 40)) / 40**0.5, 0.3 * self.rng.standard_normal((24, 3))
        for name, sign in (("add", 1), ("subtract", -1)):
            save_adapter(self.folder / name, {"fc": LoRA(A.astype("f4"), (sign * B).astype("f4"), 3.0)}, overwrite=True)
        return np.abs(B @ A)

    def cycle(self):
        inside = self.folder / "inside.safetensors"
        merge_adapter(self.weight, self.folder / "add", inside)
        merge_adapter(inside, self.folder / "subtract", self.weight)
        return read(self.weight) - self.before


@pytest.mark.parametrize("dtype", UNIT)
def test_a_weight_comes_back_up_to_two_roundings(tmp_path, dtype):
    """W + d is rounded, and so is what is left when d is taken off; the second time the sum rounds to the same."""
    cycles = Cycles(tmp_path, dtype)
    once = cycles.cycle()
    in_float32 = UNIT["F32"] * cycles.adapter  # the update itself is computed in the adapter's type
    bound = UNIT[dtype] * (2 * np.abs(cycles.before) + 2 * cycles.adapter) + 8 * in_float32
    assert (np.abs(once) <= 1.01 * bound).all()
    assert dtype == "F64" or once.any()
    again = cycles.cycle()
    assert np.abs(again - once).max() <= 2 * in_float32.max() if dtype == "F64" else (again == once).mean() > 0.97


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_drift_grows_with_the_root_of_the_merges(tmp_path, dtype):
    cycles, drift = Cycles(tmp_path, dtype), []
    for _ in range(64):
        drift.append(np.linalg.norm(cycles.cycle()))
        cycles.drawn()
    assert 5 < drift[-1] / drift[0] < 12  # the root of 64 is 8
