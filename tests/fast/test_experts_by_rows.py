"""A mixture's gate that takes some rows at a time, beside the one that takes all at once."""

import numpy as np
import pytest

from minilora.fast.experts_by_rows import GATE_ROWS, ExpertsByRows
from minilora.layers.experts import Experts
from minilora.layers.stacked import StackedLinear


@pytest.mark.parametrize("counts", [[0, 3, 2], [GATE_ROWS, 5, 2 * GATE_ROWS + 1], [1, 0, GATE_ROWS - 1]], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_gate_by_rows_is_the_gate_at_once(counts, dtype):
    rng = np.random.default_rng(0)
    stacks = [StackedLinear(rng.standard_normal(shape).astype(dtype)) for shape in ((3, 14, 5), (3, 5, 7))]
    x, dy = rng.standard_normal((2, sum(counts), 5)).astype(dtype)
    found, expected = [], []
    for cls, answers in ((ExpertsByRows, found), (Experts, expected)):
        y, cache = cls(*stacks).forward(x, counts)
        dx, grads = cls.backward(cache.layer, dy, cache)
        answers += [y, *cache.kept[-2:], dx, *grads.values()]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-13 if dtype == np.float64 else 1e-5)
