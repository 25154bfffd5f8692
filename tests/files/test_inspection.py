"""What `inspect` says of an adapter is what the whole change of weight, formed at last, would say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora import LoRA, save_adapter
from minilora.cli.figures import plot_adapter
from minilora.cli.inspect import table
from minilora.files.inspection import inspect_adapter, product_spectrum
from minilora.variants.dora import DoRAAdapter

from ..support.adapter_folder import CONFIG, change_json
from ..support.memory import traced


@given(
    seed=st.integers(0, 2**32 - 1),
    dtypes=st.lists(st.sampled_from(["float16", "float32", "float64"]), min_size=1, max_size=3),
    use_rslora=st.booleans(),
)
@settings(max_examples=12, deadline=None)
def test_a_summary_is_that_of_the_delta(tmp_path_factory, seed, dtypes, use_rslora):
    """Of layers that differ in shape, rank, alpha and type."""
    rng, folder, layers = np.random.default_rng(seed), tmp_path_factory.mktemp("a"), {}
    for i, dtype in enumerate(dtypes):
        n_in, n_out, r = (int(n) for n in rng.integers(1, 9, 3))
        A, B = rng.standard_normal((r, n_in)), rng.standard_normal((n_out, r))
        layers[f"l{i}.fc"] = LoRA(A.astype(dtype), B.astype(dtype), 0.5 + i)
    save_adapter(folder, layers)
    change_json(folder / CONFIG, use_rslora=use_rslora)
    for summary, (name, lora) in zip(inspect_adapter(folder), layers.items(), strict=True):
        A, B, r = lora.lora_A.astype(float), lora.lora_B.astype(float), lora.rank
        scaling = lora.alpha / (math.sqrt(r) if use_rslora else r)
        delta = scaling * B @ A
        values = np.linalg.svd(delta, compute_uv=False)[:r]
        np.testing.assert_allclose(summary.singular_values, values, rtol=1e-10, atol=1e-12 * values[0])
        assert math.isclose(summary.norm, np.linalg.norm(delta), rel_tol=1e-12)
        np.testing.assert_allclose(summary.shares, values**2 / (values**2).sum(), atol=1e-10)
        module = summary.module
        assert (summary.path, module.rank, module.alpha) == (name, r, lora.alpha)
        assert math.isclose(module.scaling, scaling, rel_tol=1e-15)
        assert summary.parameters == A.size + B.size
        assert module.shape == delta.shape


def test_a_magnitude_is_among_the_parameters(tmp_path):
    sizes = {"fc": (2, 5, 3), "head": (1, 4, 7)}
    layers = {
        name: DoRAAdapter(np.ones((r, n_in)), np.ones((n_out, r)), 1.0, magnitude=np.ones(n_out))
        for name, (r, n_in, n_out) in sizes.items()
    }
    save_adapter(tmp_path, layers)
    assert [summary.parameters for summary in inspect_adapter(tmp_path)] == [2 * 5 + 3 * 2 + 3, 4 + 7 + 7]


def test_layers_are_listed_in_their_order(tmp_path):
    """By their numbers, wherever these stand and however long they are; the figure too."""
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    ordered = ["h2.fc", "h10.fc", "head", f"m.{'9' * 6000}.q"]
    ordered += [f"model.{name}" for name in ("0.mlp", "0.q", "2.mlp", "10.mlp")]
    lora = LoRA(rng.standard_normal((1, 3)), rng.standard_normal((2, 1)), 1.0)
    save_adapter(tmp_path, dict.fromkeys(sorted(ordered), lora))
    summaries = inspect_adapter(tmp_path)
    assert [summary.path for summary in summaries] == ordered
    assert [line.split()[0] for line in table(summaries).splitlines()[1:-1]] == ordered
    labels = plot_adapter(summaries).axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ordered


@pytest.mark.parametrize("r", [1, 3, 40, 200])
def test_a_rank_above_the_widths_gives_the_widths_values(r):
    rng = np.random.default_rng(r)
    A, B = rng.standard_normal((r, 50)).astype("f2"), rng.standard_normal((30, r)).astype("f2")
    values = np.linalg.svd(B.astype(float) @ A.astype(float), compute_uv=False)[: min(r, 30)]
    np.testing.assert_allclose(product_spectrum(A, B), values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(4, 100_000), (400_000, 1)])
def test_memory_is_linear_in_the_factors(shape):
    """A decomposition needs some copies of a factor in float64; the product would be 125 times as large or more."""
    A, B = np.ones(shape, "f2"), np.ones((500, shape[0]), "f2") if shape[0] < 9 else np.ones((1, shape[0]), "f2")
    with traced() as memory:
        values = product_spectrum(A, B)
    assert memory.peak < 6 * 8 * max(A.size, B.size)
    assert values[0] == pytest.approx(math.sqrt(A.shape[1] * B.shape[0]) * shape[0])


@pytest.mark.filterwarnings("ignore:.* change no weight:UserWarning")  # a product of zero too
@pytest.mark.parametrize(
    ("A", "B", "values", "shares"),
    [
        (np.diag([1e300, 1e-300]), np.diag([1e300, 1e-300]), [math.inf, 0], [0, 0]),  # beyond float64
        (np.eye(2, 3), np.diag([0.0, 4.0]), [4, 0], [1, 0]),  # a rank that is not used
        (np.full((2, 3), 1e120), np.full((4, 2), 1e80), [2e200 * math.sqrt(12), 0], [1, 0]),  # its square is beyond it
        (np.full((2, 3), 1e-100), np.full((4, 2), 1e-100), [2e-200 * math.sqrt(12), 0], [1, 0]),
        (np.full((2, 3), 1e-200), np.full((4, 2), 1e-200), [0, 0], [0, 0]),
        (np.zeros((2, 3)), np.zeros((4, 2)), [0, 0], [0, 0]),
    ],
)
def test_zero_tiny_and_huge_changes_are_summed_up(tmp_path, A, B, values, shares):
    save_adapter(tmp_path, {"fc": LoRA(A, B, 2.0)})
    (summary,) = inspect_adapter(tmp_path)
    assert summary.norm == pytest.approx(values[0], rel=1e-12, abs=0)
    assert [*summary.singular_values] == pytest.approx(values, abs=1e-10 * min(values[0], 1e300))
    assert [*summary.shares] == pytest.approx(shares)
    assert table([summary])
