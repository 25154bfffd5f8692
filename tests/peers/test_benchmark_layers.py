"""The benchmark of layers gives both sides the same work."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.peers
pytest.importorskip("torch")
pytest.importorskip("peft")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


def test_both_compute_the_same_outputs_and_input_gradients():
    import benchmark_layers

    found = benchmark_layers.steps()
    for name in benchmark_layers.BARS:
        ours, theirs = found[f"{name}: minilora"](), found[f"{name}: torch + PEFT"]()
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert np.abs(a - b.detach().numpy()).max() < 1e-4 * np.abs(a).max()
