"""What a type checker knows of the public functions."""

import pytest

pytestmark = pytest.mark.long

USE = """
from typing import assert_type

import numpy as np

from minilora import MLP, Linear, adapt, attach, merge, quantize, weighted_sum

rng = np.random.default_rng(0)
mlp = MLP.init(3, 4, 5, rng=rng)
adapted: MLP = adapt(mlp, ["fc1"], rank=2, alpha=2, rng=rng)
again: MLP = attach(mlp, {})
merged: MLP = merge(adapted)
assert_type(quantize(mlp), MLP)
print(adapted(np.ones((2, 3))))

layer = adapt(Linear(np.eye(3)), "", rank=1, alpha=1, rng=rng)
print(layer.adapter.rank, layer.base, layer.delta(), layer.scaling, merge(layer).weight)
total = weighted_sum([layer.adapter], [1.0])
"""


def test_misspelt_methods_of_models_are_found(tmp_path):
    """``mypy --strict`` complains of each misspelling, and of nothing else."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    wrong = [f"{model}.no_such_method()" for model in ("mlp", "adapted", "again", "merged", "quantize(mlp)", "total")]
    path = tmp_path / "use.py"
    path.write_text(USE + "\n".join(wrong))
    out, err, _ = api.run(["--strict", "--no-error-summary", f"--cache-dir={tmp_path}", str(path)])
    assert err == ""
    first = len(USE.splitlines()) + 1
    places = {int(line.removeprefix(f"{path}:").partition(":")[0]) for line in out.splitlines()}
    assert places == set(range(first, first + len(wrong)))
    assert all('has no attribute "no_such_method"' in line for line in out.splitlines())
