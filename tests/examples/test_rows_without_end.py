"""The example's one pass over blocks of rows finds what all rows in memory at once would give."""

import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import Linear, best_adapter, mse

da = pytest.importorskip("dask.array")
EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "03_rows_without_end.py"))


@pytest.mark.long
@settings(max_examples=15)
@given(
    st.integers(30, 90), st.integers(1, 40), st.integers(1, 6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99)
)
def test_one_pass_over_blocks_gives_the_best_adapter(rows, block, in_features, out_features, rank, seed):
    rng = np.random.default_rng(seed)
    base = Linear.init(in_features, out_features, rng=rng, dtype="float64")
    X, Y = rng.standard_normal((rows, in_features)), rng.standard_normal((rows, out_features))
    read = Counter()

    def block_of(data):
        def make(block_info):
            start, stop = block_info[None]["array-location"][0]
            read[id(data), start] += 1
            return data[start:stop]

        chunks = da.core.normalize_chunks((block, data.shape[1]), data.shape)
        return da.map_blocks(lambda block_info=None: make(block_info), chunks=chunks, dtype=float, meta=data[:0])

    best = EXAMPLE["best_in_one_pass"](base, block_of(X), block_of(Y), rank=rank)

    assert set(read.values()) == {1}
    expected = best_adapter(X, Y - base(X), rank=rank)
    np.testing.assert_allclose(best.adapter.delta(), expected.delta(), rtol=0, atol=1e-9)
    assert best.loss_before == pytest.approx(mse(base(X), Y)[0])
    assert best.loss == pytest.approx(mse(base(X) + expected(X), Y)[0])


def test_the_simulated_task_asks_for_the_change_that_it_names():
    base, change, X, Y = EXAMPLE["simulate"](20_000, 1_000, 7, 5, 2)
    best = EXAMPLE["best_in_one_pass"](base, X, Y, rank=2)
    np.testing.assert_allclose(best.adapter.delta(), change, atol=0.05)
    assert best.loss == pytest.approx(1, abs=0.02)  # the noise
    assert Y.shape == (20_000, 5)
