"""rsLoRA, LoRA+, PiSSA, DoRA and sums of adapters: what each of them promises, beyond its gradients."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import (
    Adam,
    Adapter,
    CheckpointError,
    Conv2d,
    DoRA,
    DoRAAdapter,
    Embedding,
    Linear,
    LoRA,
    LoRALinear,
    Sequential,
    adapt,
    adapters,
    attach,
    best_of_rank,
    loraplus,
    merge,
    train,
    weighted_sum,
)
from minilora.fast import residual_form
from minilora.layer import freeze
from minilora.training import backpropagate
from minilora.variants.adapter import AdaptedRows
from minilora.variants.pissa import over_original, pissa
from minilora.variants.sums import singular_values

from ..support.claims import sums_are_exact, terms_of, the_best_rank_leaves_the_discarded_values
from ..support.compare import assert_close
from ..support.memory import traced
from ..support.problems import RANK_ABOVE_WIDTHS, SQUARE, problems

RNG = np.random.default_rng
LAYERS = {
    "linear": lambda rng: (Linear(rng.standard_normal((5, 6)), rng.standard_normal(5)), rng.standard_normal((4, 6))),
    "embedding": lambda rng: (Embedding(rng.standard_normal((7, 5))), rng.integers(0, 7, (4, 3))),
    "conv2d": lambda rng: (
        Conv2d(rng.standard_normal((5, 2, 3, 2)), rng.standard_normal(5), stride=(1, 2), padding=1, dilation=(1, 2)),
        rng.standard_normal((2, 2, 4, 5)),
    ),
}
every_layer = pytest.mark.parametrize("kind", LAYERS)
CONFIGURATIONS = [
    {},
    {"use_rslora": True},
    {"init": "pissa"},
    {"use_dora": True},
    {"use_dora": True, "dora_norm": "full"},
    {"use_dora": True, "init": "pissa", "use_rslora": True},
]
every_configuration = pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: " ".join(o) or "plain")


def adapted(kind, seed=0, **options):
    rng = RNG(seed)
    base, x = LAYERS[kind](rng)
    return base, x, adapt(base, "", rank=2, alpha=3, rng=rng, **options)


def moved(model, seed=1):
    """The same model after every array that trains has moved, as training would."""
    for p in model.trainable().values():
        p += 0.3 * RNG(seed).standard_normal(p.shape)
    return model


@every_layer
@every_configuration
def test_an_adapted_layer_is_what_every_variant_promises(kind, options):
    """It starts as its base and leaves that alone, says what it is, is attached again, and is merged."""
    base, x, model = adapted(kind, **options)
    before = {name: array.copy() for name, array in base.trainable().items()}
    dora, pissa_start = options.get("use_dora", False), options.get("init") == "pissa"
    assert_close(model(x), base(x), 1e-13)
    (adapter,) = adapters(model).values()
    assert (adapter.kind, adapter.kernel) == (kind, (3, 2) if kind == "conv2d" else ())
    assert (adapter.alpha, adapter.rank, adapter.use_rslora) == (3, 2, options.get("use_rslora", False))
    assert adapter.scaling == model.scaling == (3 / 2**0.5 if options.get("use_rslora") else 1.5)
    assert list(model.trainable()) == ["lora_A", "lora_B"] + ["magnitude"] * dora
    assert (adapter.start is not None) == pissa_start
    assert not pissa_start or (model.base.frozen and adapter.start.frozen)
    again = attach(base, adapters(moved(model)))
    assert_close(again(x), model(x), 1e-12)
    assert pissa_start or again.adapter is model.adapter
    merged = merge(model)
    assert type(merged) is type(base)
    assert_close(merged(x), model(x), 1e-12)
    assert np.abs(merged(x) - base(x)).max() > 1e-3
    assert not any(np.shares_memory(array, base.trainable()[name]) for name, array in merged.trainable().items())
    matrix = merged if kind == "linear" else merged.as_linear()
    assert adapter.delta().shape == matrix.weight.shape
    if dora:  # a row has the length of its magnitude
        assert_close(np.linalg.norm(matrix.weight, axis=1), np.abs(model.adapter.magnitude), 1e-13)
    assert all(np.array_equal(array, before[name]) for name, array in base.trainable().items())


@every_layer
def test_adapters_start_as_peft_starts_them(kind):
    _, _, model = adapted(kind)
    A, B = model.adapter.lora_A, model.adapter.lora_B
    if kind == "embedding":
        assert not A.any()
        assert B.std() > 0.5
    else:
        assert not B.any()
        assert np.abs(A).max() <= 1 / A.shape[1] ** 0.5
        assert np.abs(A).max() > 0.5 / A.shape[1] ** 0.5


# --- LoRA+ -----------------------------------------------------------------------------


def test_each_array_has_the_rate_of_its_longest_ending():
    params = {name: np.zeros(2) for name in ("fc1.lora_A", "fc1.lora_B", "fc2.lora_B")}
    optimizer = Adam(params, lr={"": 0.1, "lora_B": 0.3, "fc2.lora_B": 0.7})
    optimizer.step({name: np.ones(2) for name in params})
    for name, rate in (("fc1.lora_A", 0.1), ("fc1.lora_B", 0.3), ("fc2.lora_B", 0.7)):
        assert_close(params[name], np.full(2, -rate), 1e-7)
    assert "lora_B" in repr(optimizer)
    assert loraplus(1e-3) == loraplus(1e-3, ratio=16) == {"": 1e-3, "lora_B": 16e-3}


# --- PiSSA ----------------------------------------------------------------------------------------


@given(problem=problems(), data=st.data())
@settings(max_examples=20)
def test_pissa_takes_the_leading_singular_values_away(problem, data):
    base = Linear(**problem.full)
    r = data.draw(st.integers(1, min(base.shape)))
    rest, adapter = pissa(base, rank=r, alpha=problem.alpha)
    values = np.linalg.svd(base.weight, compute_uv=False)
    left = np.linalg.svd(rest.weight, compute_uv=False)
    assert_close(left[: len(values) - r], values[r:], 1e-12)
    assert_close(rest.weight + adapter.delta(), base.weight, 1e-13)
    assert_close(np.linalg.svd(adapter.delta(), compute_uv=False)[:r], values[:r], 1e-12)
    # Both factors carry the same share.
    assert_close(adapter.lora_A @ adapter.lora_A.T, adapter.lora_B.T @ adapter.lora_B, 1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_as_a_file_is_of_twice_the_rank(use_rslora):
    base, x, model = adapted("linear", init="pissa", use_rslora=use_rslora)
    file = over_original(adapters(moved(model))[""])
    assert (file.rank, file.scaling) == (4, pytest.approx(model.scaling, rel=1e-15))
    # What PEFT's configuration will say: doubled, or times sqrt 2 where the scaling is alpha / sqrt(r).
    assert file.alpha == (3 * 2**0.5 if use_rslora else 6)
    assert_close(LoRALinear(base, file)(x), model(x), 1e-13)
    assert over_original(file) is file


# --- DoRA -----------------------------------------------------------------------------------------


@every_layer
def test_the_two_norms_differ_in_the_factors_alone(kind):
    found = {}
    for norm in ("constant", "full"):
        _, x, model = adapted(kind, use_dora=True, dora_norm=norm)
        y, cache = moved(model).forward(x)
        dx, grads = model.backward(RNG(2).standard_normal(y.shape), cache)
        found[norm] = {"y": y, "dx": dx, **grads}
    for name in ("y", "dx", "magnitude"):
        if found["full"][name] is not None:
            assert np.array_equal(found["full"][name], found["constant"][name])
    for name in ("lora_A", "lora_B"):
        assert np.abs(found["full"][name] - found["constant"][name]).max() > 1e-3


@pytest.mark.parametrize("norm", ["constant", "full"])
def test_our_dora_is_finite_at_a_row_of_zeros(norm):
    """And it does not train there: the magnitude is zero."""
    rng = np.random.default_rng(0)
    weight, x, dy = rng.standard_normal((4, 3)), rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    weight[1], weight[2] = 0, 1e-9 * weight[2]  # a short row is none of zeros
    base = Linear(weight, rng.standard_normal(4))
    A, B = rng.standard_normal((2, 3)), np.zeros((4, 2))
    layer = DoRA(base, DoRAAdapter(A, B, 3.0, magnitude=np.linalg.norm(weight, axis=1), dora_norm=norm))
    y, cache = layer.forward(x)
    np.testing.assert_allclose(y, base(x), rtol=1e-13)
    np.testing.assert_allclose(layer.merge()(x), base(x), rtol=1e-13)
    dx, grads = layer.backward(dy, cache)
    np.testing.assert_allclose(dx, base.input_gradient(dy), rtol=1e-13)
    assert all(np.isfinite(g).all() for g in grads.values())
    assert not grads["lora_B"][1].any()
    assert not grads["magnitude"][1]


def lora(n_in=6, n_out=5, r=2, cls=LoRA, dtype="float64", **more):
    return cls(np.ones((r, n_in), dtype), np.ones((n_out, r), dtype), 1, **more)


def dora(n_in=6, n_out=5, dtype="float64", **more):
    return lora(n_in, n_out, cls=DoRAAdapter, dtype=dtype, **{"magnitude": np.ones(n_out, dtype), **more})


BASE = Linear(np.ones((5, 6)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DoRA(BASE, dora(7, 5)), ValueError, "adapter is 7 -> 5 wide, expected in -> out with in = 6 as in b"),
        (lambda: DoRA(BASE, dora(6, 4)), ValueError, "adapter is 6 -> 4 wide, expected in -> out with out = 5 as in "),
        (lambda: DoRA(BASE, dora(dtype="f4")), TypeError, "adapter has dtype float32, expected float64 as in base"),
        (lambda: DoRA(BASE, lora(cls=Adapter)), TypeError, "adapter must be a DoRAAdapter, got Adapter"),
        (lambda: dora(magnitude=np.ones(3)), ValueError, r"magnitude has shape \(3,\), expected \(out,\) with out = 5"),
        (lambda: dora(magnitude=np.ones(5, "f4")), TypeError, "magnitude has dtype float32, expected float64 as in lo"),
        (lambda: dora(dora_norm="none"), ValueError, "dora_norm must be 'constant' or 'full', got 'none'"),
        (lambda: lora(cls=Adapter, use_rslora="no"), TypeError, "use_rslora must be True or False, got 'no'"),
        (lambda: lora(cls=Adapter, kind="lstm"), ValueError, "kind must be 'linear', .* got 'lstm'"),
        (lambda: lora(cls=Adapter, start=lora(7)), ValueError, r"start\.lora_A has shape \(2, 7\), expected \(2, 6\)"),
        (lambda: lora(cls=Adapter, start=lora(r=1)), ValueError, r"start\.lora_A has shape \(1, 6\), expected"),
        (lambda: lora(cls=Adapter, start=lora(6, 4)), ValueError, r"start\.lora_B has shape \(4, 2\), expected"),
        (lambda: AdaptedRows(BASE, lora()), AttributeError, "'Linear' object has no attribute 'as_linear'"),
        (lambda: pissa(BASE, rank=2, alpha=0), ValueError, "alpha must be above 0"),
        (lambda: adapt(BASE, "", rank=6, alpha=3, rng=RNG(0), init="pissa"), ValueError, "rank must be at most 5, got"),
        (lambda: attach(LAYERS["conv2d"](RNG(0))[0], {"": lora(18, 4, cls=Adapter, kind="conv2d", kernel=(3, 2))}),
         ValueError, ".*adapter is 18 -> 4 wide, expected in -> out with in = 12"),
        (lambda: attach(LAYERS["embedding"](RNG(0))[0], {"": lora(18, 4, cls=Adapter, kind="embedding")}),
         ValueError, ".*adapter is 18 -> 4 wide, expected in -> out with in = 7"),
        (lambda: loraplus(0), ValueError, "lr must be above 0"),
        (lambda: loraplus(1e-3, ratio=-1), ValueError, "ratio must be above 0"),
    ],
)  # fmt: skip
def test_what_makes_no_variant_is_refused(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


# --- sums -----------------------------------------------------------------------------------------


@given(problem=problems())
@example(problem=RANK_ABOVE_WIDTHS)
@example(problem=SQUARE)
@settings(max_examples=10)
def test_sums_and_the_best_of_a_rank_are_exact(problem):
    sums_are_exact(weighted_sum, problem)
    the_best_rank_leaves_the_discarded_values(best_of_rank, problem)


@given(problem=problems(), data=st.data())
@example(problem=RANK_ABOVE_WIDTHS, data=None)
@settings(max_examples=30)
def test_a_sum_of_a_rank_is_the_nearest(problem, data):
    terms, weights = terms_of(problem, more=1), [1.5, -0.5, 0.25]
    wanted = sum(w * term.delta() for w, term in zip(weights, terms, strict=True))
    largest = min(problem.rank + 2, *wanted.shape)
    U, S, Vt = np.linalg.svd(wanted)
    for rank in (None, data.draw(st.integers(1, largest)) if data else 1):
        nearest = weighted_sum(terms, weights, "svd", rank)
        r = rank or largest
        assert nearest.rank == r
        assert np.linalg.norm(nearest.delta() - wanted) == pytest.approx(np.linalg.norm(S[r:]), rel=1e-10, abs=1e-11)
        gap = S[r - 1] - S[r] if r < len(S) and S[r] > 1e-12 * S[0] else S[0]
        if gap > 1e-3 * S[0]:  # of two values that are alike, either may stay
            assert_close(nearest.delta(), U[:, :r] * S[:r] @ Vt[:r], 1e-13 * S[0] / gap)


def test_a_sum_of_half_precision_is_of_half_precision():
    """LAPACK has no float16."""
    rng = RNG(0)
    A, B = rng.standard_normal((3, 6)).astype(np.float16), rng.standard_normal((5, 3)).astype(np.float16)
    terms = [LoRA(A, B, 2), LoRA(-A, B[::-1].copy(), 4)]
    wide = [LoRA(t.lora_A.astype("f8"), t.lora_B.astype("f8"), t.alpha) for t in terms]
    for options in (("cat",), ("linear",), ("svd", 2)):
        total = weighted_sum(terms, [0.5, -0.25], *options)
        assert total.lora_A.dtype == total.lora_B.dtype == np.float16
        assert_close(total.delta(), weighted_sum(wide, [0.5, -0.25], *options).delta(), 1e-2)
    assert_close(singular_values(terms[0]), singular_values(wide[0]), 1e-3)


def test_a_sum_is_for_the_same_kind_of_layer():
    terms = [adapters(moved(adapted("conv2d", seed)[2]))[""] for seed in (0, 1)]
    base, x = LAYERS["conv2d"](RNG(0))
    total = weighted_sum(terms, [2, -1])
    for adapter in (total, best_of_rank(total, 4)):
        assert (adapter.kind, adapter.kernel) == ("conv2d", (3, 2))
        changes = [attach(base, {"": a})(x) - base(x) for a in (adapter, *terms)]
        assert_close(changes[0], 2 * changes[1] - changes[2], 1e-12)


def test_a_frozen_adapter_is_listed_frozen():
    model = LoRALinear(Linear(np.ones((5, 6))), LoRA(np.ones((2, 6)), np.ones((5, 2)), 1))
    assert adapters(freeze(model))[""].frozen
    assert not adapters(model)[""].frozen


def test_sums_never_form_the_change():
    rng, width = RNG(0), 4000
    terms = [LoRA(rng.standard_normal((2, width)), rng.standard_normal((width, 2)), 1) for _ in range(3)]
    with traced() as memory:
        best_of_rank(weighted_sum(terms, [1, -1, 2]), 2)
    assert memory.peak < 8 * width * width / 20


CONV = {"cls": Adapter, "kind": "conv2d"}


@pytest.mark.parametrize(
    ("terms", "weights", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "expected one weight for each adapter, got 0 adapters, 0 weights"),
        ([lora()], [1, 2], {}, ValueError, "expected one weight for each adapter, got 1 adapters, 2 weights"),
        ([lora(), lora(5, 6)], [1, 2], {}, ValueError, r"adapters\[1\] is of .* \(\(6, 5\), 'linear', "),
        ([lora(), lora(dtype="f4")], [1, 1], {}, TypeError,
         r"adapters\[1\] has dtype float32, expected float64 as in adapters\[0\]: convert it with minilora"),
        ([lora()], [float("nan")], {}, ValueError, r"weights\[0\]"),
        ([lora(), lora(kernel=(3, 2), **CONV)], [1, 1], {}, ValueError,
         r"adapters\[1\] is of shape, kind and kernel .*, expected .* as adapters\[0\]$"),
        ([lora(kernel=(2, 3), **CONV), lora(kernel=(3, 2), **CONV)], [1, 1], {}, ValueError,
         r"adapters\[1\] is of .* \(\(\d+, \d+\), 'conv2d', \(3, 2\)\), expected \(.*, 'conv2d', \(2, 3\)\)"),
        ([lora()], [1], {"combination_type": "ties"}, ValueError, "combination_type must be 'cat', 'linear' or 'svd'"),
        ([lora(), lora(r=3)], [1, 1], {"combination_type": "linear"}, ValueError,
         "combination_type 'linear' adds factors of one rank, got ranks .2, 3.$"),
        ([lora()], [1], {"rank": 0}, ValueError, "rank is for combination_type 'svd' alone, got 0 for 'cat'"),
        ([lora(r=4), lora(r=4)], [1, 1], {"combination_type": "svd", "rank": 6}, ValueError, "rank must be at most 5"),
        ([lora()], [1], {"combination_type": "svd", "rank": 3}, ValueError, "rank must be at most 2, got 3"),
        ([lora()], [1], {"combination_type": "svd", "rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ([lora()], [1], {"combination_type": "svd", "rank": 2.0}, TypeError, "rank must be an integer, got 2.0"),
    ],
)  # fmt: skip
def test_a_sum_that_cannot_be_is_refused(terms, weights, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        weighted_sum(terms, weights, **options)


# --- adapt and attach -----------------------------------------------------------------------------


def net(rng):
    return Sequential(
        table=Embedding(rng.standard_normal((7, 4))),
        fc=Linear(rng.standard_normal((4, 4))),
        body=Sequential(**{name: Linear(np.ones((4, 4))) for name in ("no_lm_head", "lm_head")}),
        lm_head=Linear(rng.standard_normal((7, 4))),
    )


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all-linear", {"fc", "body.no_lm_head"}),
        (["table", "lm_head"], {"table", "body.lm_head", "lm_head"}),
        ("t.*|f.*", {"table", "fc"}),
    ],
)
def test_target_modules_name_layers_of_every_kind(targets, found):
    model = adapt(net(RNG(0)), targets, rank=2, alpha=1, rng=RNG(1))
    assert adapters(model).keys() == found
    assert {name.rpartition(".")[0] for name in model.trainable()} == found


def test_adapted_layers_take_the_residual_form_too():
    base, x, model = adapted("linear")
    found = residual_form(moved(model), x, base(x) + 1)
    for name, grad in backpropagate(model, x, base(x) + 1).items():
        assert_close(found[name], grad, 1e-12)


def test_a_checkpoint_remembers_a_mapping_of_rates(tmp_path):
    rng, rates = RNG(0), {"": 1e-2, "lora_B": 3e-2}
    X, Y = rng.standard_normal((16, 6)), rng.standard_normal((16, 5))
    ends = []
    for parts in ((4,), (2, 4)):
        _, _, model = adapted("linear")
        for epochs in parts:
            options = {"epochs": epochs, "batch_size": 8, "rng": RNG(1), "checkpoint": tmp_path / f"{len(parts)}"}
            train(model, X, Y, lr=rates, **options)
        ends.append(model.trainable())
    for name, array in ends[0].items():
        assert np.array_equal(array, ends[1][name])
    with pytest.raises(CheckpointError, match="lr"):
        train(adapted("linear")[2], X, Y, lr=1e-2, **options)


def test_a_frozen_dora_keeps_no_output():
    _, x, model = adapted("linear", use_dora=True)
    *_, kept = model.forward(x)[1].kept
    *_, dropped = freeze(model).forward(x)[1].kept
    assert kept.shape == (4, 5)
    assert dropped is None
