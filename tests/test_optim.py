"""Adam: its steps to the bit, decay, clipping, its state, and what it refuses."""

import copy

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Adam, optim
from minilora.fast import adam

from .support.claims import ADAM_CLAIMS
from .support.compare import assert_close
from .support.memory import traced
from .support.problems import ALL_ONES, Problem, problems


@pytest.mark.parametrize("claim", ADAM_CLAIMS, ids=lambda claim: claim.__name__)
@given(problem=problems())
@example(problem=ALL_ONES)
def test_adam(claim, problem):
    claim(Adam, problem)


LAYOUTS = {
    "rows": lambda a: a,
    "columns": np.asfortranarray,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "from the last row to the first": lambda a: a[::-1].copy()[::-1],
}


def algorithm_1(theta, g, m, v, t, lr, betas, eps, decay):
    """Step t as the papers write it, each line a new array."""
    theta = theta * (1 - lr * decay)
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g**2
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return theta - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    block=st.integers(1, 200),
    dtype=st.sampled_from(["float32", "float64"]),
    layout=st.sampled_from([*LAYOUTS]),
    t=st.sampled_from([1, 10, 164, 355, 1000, 100_000]),
    lr=st.sampled_from([1e-3, 1e-12, 1e32]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0), (0.999, 0.9)]),
    eps=st.sampled_from([1e-8, 1e-20, 10.0]),
    decay=st.sampled_from([0.0, 0.01, 3.0]),
    scale=st.sampled_from([0.0, 1e-12, 1.0, 1e15]),
    seed=st.integers(0, 2**32 - 1),
)
@example([1000, 1001], adam.BLOCK, "float32", "rows", 1, 1e-3, (0.9, 0.999), 1e-8, 0.0, 1.0, 0)  # the article's weight
@example([1, 300], 7, "float32", "columns", 1, 1e-3, (0.9, 0.999), 1e-8, 0.1, 1.0, 0)
def test_steps_have_the_bits_of_algorithm_1(shape, block, dtype, layout, t, lr, betas, eps, decay, scale, seed):
    randn, place = np.random.default_rng(seed).standard_normal, LAYOUTS[layout] if shape else np.array
    theta, m, v = (place(np.array(a, dtype)) for a in (randn(shape), randn(shape), randn(shape) ** 2))
    optimizer = Adam({"p": (p := theta.copy("K"))}, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    optimizer.load_state_dict({"t": t - 1, "m": {"p": m}, "v": {"p": v}})
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(adam, "BLOCK", block)
        for step in range(t, t + 3):
            g = place(np.array(scale * randn(shape), dtype))
            given_g = g.copy()
            optimizer.step({"p": g})
            np.testing.assert_array_equal(g, given_g)
            theta, m, v = algorithm_1(theta, g, m, v, step, lr, betas, eps, decay)
    for found, expected in ((p, theta), (optimizer.m["p"], m), (optimizer.v["p"], v)):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, expected)


# --- weight decay ---


@given(problem=problems(), decay=st.floats(0, 5))
def test_without_gradients_a_parameter_decays_by_its_own_rates(problem, decay):
    factors, rates, schedule = problem.factors, {"A": 0.1, "B": 0.02}, {1: 0.5, 2: 1.0, 3: 0.25}.__getitem__
    params = {name: p.copy() for name, p in factors.items()}
    optimizer = Adam(params, lr=rates, schedule=schedule, weight_decay=decay)
    for _ in range(3):
        optimizer.step({name: np.zeros_like(p) for name, p in params.items()})
    for name, p in params.items():
        shares = [1 - rates[name[-1]] * schedule(t) * decay for t in (1, 2, 3)]
        np.testing.assert_allclose(p, factors[name] * np.prod(shares), rtol=1e-13, atol=0)


def test_a_tied_parameter_decays_once():
    p = np.ones(3)
    Adam({"a": p, "b": p}, lr=0.1, weight_decay=2.0).step({"a": np.zeros(3), "b": np.zeros(3)})
    np.testing.assert_array_equal(p, np.full(3, 1 - 0.1 * 2.0))


# --- clipping ---


def length(grads):
    return float(np.linalg.norm(np.concatenate([np.ravel(g) for g in grads.values()])))


@given(problem=problems(), share=st.floats(0.01, 100), dtype=st.sampled_from(["float32", "float64"]))
def test_a_clipped_gradient_is_shorter_and_turns_nowhere(problem, share, dtype):
    grads = {name: p.astype(dtype) for name, p in problem.factors.items()}
    clipped = optim.clip(grads, share * length(grads))
    precision = 100 * float(np.finfo(dtype).eps)
    assert optim.gradient_norm(grads) == pytest.approx(length(grads), rel=precision)
    for name, g in grads.items():
        assert clipped[name].dtype == dtype
        np.testing.assert_allclose(clipped[name], min(share, 1) * g, rtol=precision)
        if share > 1.1:
            np.testing.assert_array_equal(clipped[name], g)


def test_a_gradient_of_zero_is_not_divided():
    zeros = {"a": np.zeros(3), "b": np.zeros((2, 2))}
    assert optim.gradient_norm(zeros) == length(optim.clip(zeros, 0.5)) == 0


def test_one_nan_makes_every_gradient_nan():
    grads = {"a": np.array([1.0, np.nan]), "b": np.ones(2)}
    clipped = optim.clip(grads, 10.0)
    assert np.isnan([optim.gradient_norm(grads), *clipped["a"], *clipped["b"]]).all()


def test_adam_clips_the_sum_of_a_tied_arrays_gradients():
    shared, own = np.zeros(2), np.zeros(2)
    optimizer = Adam({"a": shared, "b": shared, "c": own}, betas=(0.5, 0.999), max_grad_norm=2.0)
    optimizer.step({"a": np.array([1.0, 5.0]), "b": np.array([2.0, -5.0]), "c": np.array([0.0, 4.0])})
    np.testing.assert_allclose(optimizer.m["a"], [0.5 * 3 * 2 / 5, 0], rtol=1e-15)
    np.testing.assert_allclose(optimizer.m["c"], [0, 0.5 * 4 * 2 / 5], rtol=1e-15)


def test_a_nan_in_a_gradient_is_not_hidden():
    p = np.zeros(3)
    Adam({"p": p}).step({"p": np.array([1.0, np.nan, -1.0])})
    np.testing.assert_array_equal(np.isnan(p), [False, True, False])


def test_arrays_are_known_by_name_and_not_by_place():
    shapes = {"a": (2, 3), "b": (2, 3), "c": (3,), "d": (3,)}
    problem = Problem(n=1, in_features=1, out_features=1, rank=1)
    start = {name: problem.randn(name, *shape) for name, shape in shapes.items()}
    grads = {name: problem.randn(f"g {name}", *shape) for name, shape in shapes.items()}

    def backwards(arrays):
        return dict(reversed(arrays.items()))

    together = Adam({name: p.copy() for name, p in start.items()})
    together.step(backwards(grads))
    state = together.state_dict()
    together.load_state_dict({"t": 1, "m": backwards(state["m"]), "v": backwards(state["v"])})
    together.step(backwards(grads))
    for name, p in start.items():
        alone = Adam({name: p.copy()})
        for _ in range(2):
            alone.step({name: grads[name]})
        np.testing.assert_array_equal(together.params[name], alone.params[name])


def test_what_is_trained_was_settled_at_the_start():
    params = {"a": np.zeros(2)}
    optimizer = Adam(params)
    params["b"] = np.zeros(2)
    optimizer.step({"a": np.ones(2)})
    assert params["a"].all()


def test_a_new_lr_holds_from_the_next_step():
    p = np.zeros(2)
    optimizer = Adam({"p": p}, lr=0.5, betas=(0.0, 0.0))
    optimizer.step({"p": np.ones(2)})
    optimizer.lr = 0.25
    optimizer.step({"p": np.ones(2)})
    assert_close(p, np.full(2, -0.75), 1e-7)


def test_arrays_that_are_views_are_updated_in_place():
    owner = np.random.default_rng(0).standard_normal((5, 7))  # a row ends where its last entry does
    plain, view = owner[:, ::2].T.copy(), owner[:, ::2].T
    assert not view.flags.c_contiguous
    untouched = owner[:, 1::2].copy()
    g = np.random.default_rng(1).standard_normal(view.shape)
    for p, grad in ((plain, g), (view, np.asfortranarray(g))):
        Adam({"p": p}).step({"p": grad})
    np.testing.assert_array_equal(owner[:, ::2].T, plain)
    np.testing.assert_array_equal(owner[:, 1::2], untouched)


@given(problem=problems())
def test_dtype_follows_the_parameters(problem):
    params = {name: p.astype(np.float32) for name, p in problem.factors.items()}
    optimizer = Adam(params, lr=np.float64(0.01), betas=(np.float64(0.9), 0.99), eps=np.float64(1e-8))
    optimizer.step({name: np.ones_like(p) for name, p in params.items()})
    for arrays in (params, optimizer.m, optimizer.v):
        assert {array.dtype for array in arrays.values()} == {np.dtype(np.float32)}


def test_a_restored_state_goes_on_as_if_nothing_had_happened():
    problem = Problem(n=2, in_features=5, out_features=4, rank=3)
    steps = [{name: problem.randn(f"{name} {t}", *p.shape) for name, p in problem.factors.items()} for t in range(6)]
    params = {name: p.copy() for name, p in problem.factors.items()}
    optimizer = Adam(params)
    for grads in steps[:3]:
        optimizer.step(grads)
    state, resumed = optimizer.state_dict(), {name: p.copy() for name, p in params.items()}
    kept = copy.deepcopy(state)
    for grads in steps[3:]:
        optimizer.step(grads)  # must not reach into the saved state
    other = Adam(resumed)
    other.load_state_dict(state)
    for grads in steps[3:]:
        other.step(grads)
    assert other.t == optimizer.t == 6
    for name, p in params.items():
        np.testing.assert_array_equal(resumed[name], p)
    again = Adam({name: p.copy() for name, p in params.items()})
    again.load_state_dict(state)  # nor may a restored optimizer have changed it
    assert again.t == 3
    for moment in ("m", "v"):
        assert state[moment].keys() == params.keys()
        for name in params:
            np.testing.assert_array_equal(state[moment][name], kept[moment][name])


def test_a_restored_t_is_a_plain_number():
    """A NumPy scalar would promote."""
    optimizer = Adam({"p": np.zeros(2, np.float32)})
    optimizer.load_state_dict({**optimizer.state_dict(), "t": np.int64(7)})
    assert type(optimizer.state_dict()["t"]) is int


def test_adam_prints_its_settings_and_shapes():
    optimizer = Adam({"lora_A": np.zeros((2, 5)), "lora_B": np.zeros((4, 2))}, lr=0.01)
    optimizer.step({"lora_A": np.ones((2, 5)), "lora_B": np.ones((4, 2))})
    assert repr(optimizer) == ("Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08, t=1, {lora_A: (2, 5), lora_B: (4, 2)})")


# --- what is refused ---

V, T = ValueError, TypeError
P = np.zeros(2)
SETTINGS = [
    (V, {"lr": 0.0}, "lr must be above 0 and finite, got 0.0"),
    (V, {"lr": -1.0}, "lr must be above 0 and finite, got -1.0"),
    (V, {"lr": float("nan")}, "lr must be above 0 and finite, got nan"),
    (V, {"lr": float("inf")}, "lr must be above 0 and finite, got inf"),
    (T, {"lr": {"p": "fast"}}, "lr['p'] must be a number, got 'fast'"),
    (V, {"lr": {"": 0}}, "lr[''] must be above 0 and finite, got 0"),
    (V, {"lr": {}}, "lr has no rate for ['p']: give one for the ending, or for '', which ends every name"),
    (V, {"lr": {"q": 0.1}}, "lr has rates for ['q'], which end no name; there are ['p']"),
    (V, {"lr": {"p": 0.1, "q": 0.1}}, "lr has rates for ['q'], which end no name; there are ['p']"),
    (V, {"betas": (1.0, 0.9)}, "betas[0] must be at least 0 and below 1, got 1.0"),
    (V, {"betas": (0.9, -0.1)}, "betas[1] must be at least 0 and below 1, got -0.1"),
    (V, {"betas": (-0.1, 0.9)}, "betas[0] must be at least 0 and below 1, got -0.1"),
    (V, {"betas": (0.9, 1.0)}, "betas[1] must be at least 0 and below 1, got 1.0"),
    (V, {"eps": 0.0}, "eps must be above 0 and finite, got 0.0"),
    (V, {"weight_decay": -0.1}, "weight_decay must be at least 0 and finite, got -0.1"),
    (V, {"max_grad_norm": 0.0}, "max_grad_norm must be above 0 and finite, got 0.0"),
    (T, {"schedule": "linear"}, "schedule must be a function, schedule(t), got 'linear'"),
    (V, {"params": {}}, "params is empty: there is nothing to train"),
    (T, {"params": {"p": np.zeros(2, int)}},
     "params['p'] has dtype int64, expected a floating-point dtype such as float32"),
    (T, {"params": {"p": np.zeros(2, np.float16)}},
     "params['p'] has dtype float16, expected float32 or float64: others cannot be trained"),
    (T, {"params": {"p": np.zeros(2, complex)}},
     "params['p'] has dtype complex128, expected float32 or float64: others cannot be trained"),
    (V, {"params": {"p": np.broadcast_to(0.0, 2)}},
     "params['p'] is read-only: Adam updates it in place, so give a copy"),
    (T, {"params": {"p": [0.0]}}, "params['p'] must be an array, got list; convert it with numpy.asarray(params['p'])"),
    (T, {"params": [P]}, "params must be a dict, got list"),
    (V, {"params": {"p": P, "q": P[1:]}},
     "params['p'] and params['q'] share memory: give one array both names"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "given", "said"), SETTINGS)
def test_what_adam_cannot_train_or_how_is_refused(error, given, said):
    with pytest.raises(error) as refused:
        Adam(**{"params": {"p": P}} | given)
    assert str(refused.value) == said


GRADIENTS = [
    (V, {"b": None}, "grads must have the keys ['a', 'b', 'c', 'tied']: missing ['b'], extra []"),
    (V, {"d": np.ones(1)}, "grads must have the keys ['a', 'b', 'c', 'tied']: missing [], extra ['d']"),
    (
        V,
        {"d": np.ones(1), 1: np.ones(1)},
        "grads must have the keys ['a', 'b', 'c', 'tied']: missing [], extra [1, 'd']",
    ),
    (V, {"b": np.ones(4)}, "grads['b'] has shape (4,), expected (3,)"),
    (V, {"c": np.ones(1)}, "grads['c'] has shape (1,), expected (4,)"),
    (
        T,
        {"b": np.ones(3, np.float32)},
        "grads['b'] has dtype float32, expected float64 as in params: convert it with grads['b'].astype('float64')",
    ),
    (T, {"b": [1.0, 1.0, 1.0]}, "grads['b'] must be an array, got list; convert it with numpy.asarray(grads['b'])"),
    *(
        (V, {name: np.ones(n)}, f"grads['{name}'] has shape ({n},), expected (2,)")
        for name in ("a", "tied")
        for n in (1, 3)
    ),
    *(
        (
            T,
            {name: np.ones(2, "f4")},
            f"grads['{name}'] has dtype float32, expected float64 as in params: "
            f"convert it with grads['{name}'].astype('float64')",
        )
        for name in ("a", "tied")
    ),
    (T, [np.ones(2)], "grads must be a dict, got list"),
]


@pytest.mark.parametrize(("error", "change", "said"), GRADIENTS)
def test_a_gradient_that_does_not_fit_changes_nothing(error, change, said):
    params = {"a": np.zeros(2), "b": np.zeros(3), "c": np.zeros(4)}
    optimizer = Adam(params | {"tied": params["a"]})
    grads = {name: np.ones_like(p) for name, p in params.items()} | {"tied": np.ones(2)}
    if isinstance(change, dict):
        change = {name: g for name, g in (grads | change).items() if g is not None}
    with pytest.raises(error) as refused:
        optimizer.step(change)
    assert str(refused.value) == said
    assert optimizer.t == 0
    assert not any(array.any() for arrays in (params, optimizer.m, optimizer.v) for array in arrays.values())


STATES = [
    (V, {"t": -1}, "state['t'] must be at least 0, got -1"),
    (T, {"m": None}, "state['m'] must be a dict, got NoneType"),
    (V, {"m": {}}, "state['m'] must have the keys ['p']: missing ['p'], extra []"),
    (V, {"m": {"p": np.zeros(3)}}, "state['m']['p'] has shape (3,), expected (2,)"),
    (V, {"v": {"p": np.zeros(3)}}, "state['v']['p'] has shape (3,), expected (2,)"),
    (V, {"w": 1}, "state must have the keys ['m', 't', 'v']: missing [], extra ['w']"),
    (
        T,
        {"m": {"p": [0.0, 0.0]}},
        "state['m']['p'] must be an array, got list; convert it with numpy.asarray(state['m']['p'])",
    ),
    (
        T,
        {"v": {"p": np.zeros(2, "f4")}},
        "state['v']['p'] has dtype float32, expected float64 as in params: "
        "convert it with state['v']['p'].astype('float64')",
    ),
]


@pytest.mark.parametrize(("error", "change", "said"), STATES)
def test_a_state_that_does_not_fit_changes_nothing(error, change, said):
    optimizer = Adam({"p": np.zeros(2)})
    optimizer.step({"p": np.ones(2)})
    before = optimizer.state_dict()
    with pytest.raises(error) as refused:
        optimizer.load_state_dict({**Adam({"p": np.zeros(2)}).state_dict(), **change})
    assert str(refused.value) == said
    after = optimizer.state_dict()
    assert after["t"] == before["t"] == 1
    np.testing.assert_array_equal(after["m"]["p"], before["m"]["p"])
    np.testing.assert_array_equal(after["v"]["p"], before["v"]["p"])


@given(axes=st.lists(st.tuples(st.integers(1, 4), st.integers(-6, 6)), min_size=1, max_size=3))
@example(axes=[(2, 0)])
@example(axes=[(1, 0), (2, 1)])
@example(axes=[(3, 2), (2, 1), (2, 5)])
@example(axes=[(2, 6), (3, -2), (2, 1)])
@settings(max_examples=40)
def test_no_entry_of_a_parameter_stands_twice_in_memory(axes):
    shape, strides = zip(*axes, strict=True)
    view = np.lib.stride_tricks.as_strided(np.zeros(200)[100:], shape, [8 * stride for stride in strides])
    places = {sum(i * stride for i, stride in zip(index, strides, strict=True)) for index in np.ndindex(shape)}
    try:
        Adam({"p": view})
    except ValueError as error:
        assert str(error) == "params['p'] has entries that share memory, as of a view: give a copy"  # noqa: PT017
    else:
        assert len(places) == view.size


# --- memory, and other libraries ---


@pytest.mark.parametrize(("shape", "rows"), [((300, 5000), 4), ((8, 50_000), 1), ((1_000_000,), 20_000)])
def test_a_large_arrays_step_needs_three_blocks_of_memory(monkeypatch, shape, rows):
    """Of the rows that fit in a block, and of one row at least."""
    monkeypatch.setattr(adam, "BLOCK", 20_000)
    p = np.ones(shape)
    optimizer, g = Adam({"p": p}), np.ones(shape)
    with traced() as memory:
        optimizer.step({"p": g})
    blocks = 3 * p[:rows].nbytes
    assert blocks <= memory.peak < 1.1 * blocks


def test_another_library_takes_an_array_whole(monkeypatch, standin):
    """It has no such cache. The stand-in makes no kernel."""
    seen = []
    monkeypatch.setattr(adam, "BLOCK", 12)
    monkeypatch.setattr(optim, "adam_update", lambda theta, *a, **k: seen.append(theta.shape))
    Adam({"p": standin.zeros((13, 5), "float32")}).step({"p": standin.zeros((13, 5), "float32")})
    assert seen == [(13, 5)]


def test_rows_in_reverse_overlap_nothing():
    p = np.ones((3, 2))
    Adam({"p": p[::-1]}, lr=0.5).step({"p": np.ones((3, 2))})
    np.testing.assert_allclose(p, 0.5)
