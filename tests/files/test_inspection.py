"""What `inspect` says of an adapter is what the whole change of weight, formed at last, would say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import LoRA, save_adapter
from minilora.files.inspection import inspect_adapter, singular_values, table


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float16", "float32", "float64"]))
@settings(max_examples=25, deadline=None)
def test_a_summary_is_that_of_the_delta(tmp_path_factory, seed, dtype):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("a")
    n_in, n_out, r = (int(n) for n in rng.integers(1, 9, 3))
    A, B = rng.standard_normal((r, n_in)).astype(dtype), rng.standard_normal((n_out, r)).astype(dtype)
    save_adapter(folder, {"enc.fc": LoRA(A, B, 3.0)})
    (summary,) = inspect_adapter(folder)
    delta = 3.0 / r * B.astype(float) @ A.astype(float)
    values = np.linalg.svd(delta, compute_uv=False)[:r]
    np.testing.assert_allclose(summary.singular_values, values, rtol=1e-10, atol=1e-12 * values[0])
    assert math.isclose(summary.norm, np.linalg.norm(delta), rel_tol=1e-12)
    np.testing.assert_allclose(summary.shares, values**2 / (values**2).sum(), atol=1e-10)
    assert (summary.rank, summary.alpha, summary.parameters) == (r, 3.0, A.size + B.size)
    assert (summary.out_features, summary.in_features) == delta.shape


@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_zero_tiny_and_huge_changes_are_summed_up(tmp_path, size):
    save_adapter(tmp_path, {"fc": LoRA(np.full((2, 3), size), np.full((4, 2), size), 1.0)})
    (summary,) = inspect_adapter(tmp_path)
    assert summary.norm == pytest.approx(size * size * math.sqrt(12))
    assert table([summary])


def test_singular_values_do_not_need_the_large_product():
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((2, 300_000)), rng.standard_normal((300_000, 2))  # B A: 720 GB
    assert singular_values(A, B).shape == (2,)


def test_the_table_has_an_aligned_line_for_each_layer(tmp_path):
    lora = LoRA(np.eye(12), np.eye(12), 6.0)
    save_adapter(tmp_path, {"a.long.path": lora, "b": lora})
    lines = table(inspect_adapter(tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == ["module", "a.long.path", "b", "total"]
    shares = ["8.3%"] * 8
    assert lines[1].split()[1:] == ["12", "x", "12", "12", "6", "0.5", "288", "1.732", *shares, "..."]
    assert lines[3].split() == ["total", "576"]
    assert len({line.index("8.3%") for line in lines[1:3]}) == 1
