"""Is the stand-in as strict as CuPy? Its facts, tried on CuPy itself where there is a GPU, and leaks it must catch."""

import copy
import operator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from minilora import LoRA, get_backend, train

from ..support import cupy_standin
from ..support.cupy_standin import API, traffic
from ..support.places import real_cupy


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request):
    return cupy_standin.make() if request.param == "stand-in" else real_cupy().xp


@pytest.fixture
def stand_in():
    traffic.reset()
    return cupy_standin.make()


def test_a_product_of_stacks_counts_what_it_copies(stand_in):
    """As `ascontiguousarray` in CuPy's matmul; of two matrices the transposed one goes to cuBLAS as it is."""
    a, stack = stand_in.zeros((3, 4), dtype="float32"), stand_in.zeros((2, 3, 4), dtype="float32")
    a @ a.T
    stack @ a.T.copy()
    assert traffic.copied == 0
    stack[:, :1] @ a.T
    assert traffic.copied == a.nbytes
    stack.swapaxes(-1, -2) @ stack
    assert traffic.copied == stack.nbytes


# Facts of CuPy, which the stand-in must share.


@pytest.mark.parametrize(
    "misuse",
    [
        lambda xp, a, host: a + host,
        lambda xp, a, host: host + a,
        lambda xp, a, host: a @ host,
        lambda xp, a, host: operator.iadd(a, host),
        lambda xp, a, host: a + [1.0, 2.0, 3.0],  # noqa: RUF005
        lambda xp, a, host: xp.add(a, host),
        lambda xp, a, host: xp.sqrt(host),
        lambda xp, a, host: xp.sqrt([1.0, 2.0, 3.0]),
        lambda xp, a, host: np.asarray(a),
        lambda xp, a, host: np.array(a),
        lambda xp, a, host: xp.sqrt(a, out=host),
        lambda xp, a, host: xp.take(a, xp.asarray([0]), axis=0, mode="clip"),
        lambda xp, a, host: a.sum(axis=0, where=True),
        lambda xp, a, host: hash(a),
        lambda xp, a, host: range(xp.asarray(3)),
    ],
)
def test_cupy_refuses(xp, misuse):
    host = np.arange(3.0)
    with pytest.raises(TypeError):
        misuse(xp, xp.asarray(host), host)


def test_reductions_and_entries_stay_on_the_device(xp):
    """Python's numbers leave the dtype alone, and NumPy's do not."""
    a = xp.asarray(np.arange(6.0, dtype="float32").reshape(2, 3))
    for number in (a.sum(), a.mean(), a.min(), a[0, 1], xp.isfinite(a).all(), a[0] @ a[1], xp.linalg.norm(a)):
        assert isinstance(number, xp.ndarray)
        assert number.shape == ()
    assert float(a.mean()) == 2.5
    assert (a.sum() * 0.5).dtype == (2.0 * a).dtype == (a / 3).dtype == np.float32
    assert (np.float64(2.0) * a).dtype == np.float64


def test_rows_and_slices_are_views_and_moving_copies(xp):
    """Also where nothing is converted."""
    a = xp.zeros((3, 2))
    for row in a:
        row += 1
    a[1:][...] = 5
    np.testing.assert_array_equal(xp.asnumpy(a), [[1, 1], [5, 5], [5, 5]])
    host = np.ones(3)
    a = xp.asarray(host)
    a += 1
    assert host.sum() == 3
    back = xp.asnumpy(a)
    back += 1
    assert float(a.sum()) == 6
    assert float(copy.deepcopy(a).sum()) == 6


def test_an_index_out_of_range_wraps_a_mask_selects(xp):
    a = xp.asarray(np.arange(3.0))
    for found, expected in (
        (a[xp.asarray([4, -1])], [1, 2]),
        (xp.take(a, xp.asarray([5])), [2]),
        (a[a > 0], [1, 2]),
    ):
        np.testing.assert_array_equal(xp.asnumpy(found), expected)


def test_scattering_adds_what_meets(xp):
    """The method that scatters warns."""
    a = xp.zeros((2, 3))
    xp.add.at(a, (slice(None), xp.asarray([1, 1, 0])), xp.asarray(np.arange(6.0).reshape(2, 3)))
    np.testing.assert_array_equal(xp.asnumpy(a), [[2, 1, 0], [5, 7, 0]])
    a = xp.zeros((2,))
    with pytest.warns(DeprecationWarning, match="Please use `cupy.add.at` instead"):
        a.scatter_add(xp.asarray([1, 1]), xp.asarray(np.array([1.0, 2.0])))
    np.testing.assert_array_equal(xp.asnumpy(a), [0, 3])


def test_a_product_is_left_to_what_asks_for_it(xp):
    class Rows:
        __array_ufunc__ = None

        def __rmatmul__(self, left):
            return left.shape

    assert xp.zeros((2, 3)) @ Rows() == (2, 3)


def test_kernels_update_their_outputs_in_place(xp):
    kernel = xp.ElementwiseKernel("T g, T rate", "T p", "p = p - rate * sqrt(g);", "descend")
    p, g = xp.zeros((2, 2), "float32"), xp.asarray(np.array([[1, 4], [9, 16]], "float32"))
    kernel(g, 2.0, p.T)
    np.testing.assert_array_equal(xp.asnumpy(p), [[-2, -6], [-4, -8]])
    with pytest.raises(TypeError):
        kernel(g.astype("float64"), 2.0, p)
    with pytest.raises(TypeError):
        kernel(xp.asnumpy(g), 2.0, p)


def test_names_that_cupy_lacks_are_lacking(xp):
    lacking = ("vecdot", "matvec", "geomspace", "insert", "errstate", "memmap", "nothing_at_all")
    assert [name for name in lacking if hasattr(xp, name)] == []


@pytest.mark.gpu
def test_the_list_of_names_is_that_of_the_installed_cupy(gpu):
    if gpu.xp.__version__ != API["version"]:
        pytest.skip(f"CuPy {gpu.xp.__version__} is installed, and the list is of {API['version']}")
    from ..support.list_cupy_api import NAMESPACES, names_of

    assert {title: list(names_of(space)) for title, space in NAMESPACES.items() if title != "cupy.cuda.runtime"} == {
        title: list(names) for title, names in API.items() if title not in ("version", "cupy.cuda.runtime")
    }


# Where the stand-in is stricter than CuPy, and what it counts.


def test_every_public_name_of_the_stand_in_is_listed():
    own = {"cupy": cupy_standin.make(), "cupy.cuda": cupy_standin.make().cuda}
    for title, space in own.items():
        added = {name for name in vars(space) if not name.startswith("_")} - {"linalg", "cuda", "runtime"}
        assert added <= API[title].keys()
    operators = {name for name in vars(cupy_standin.ndarray) if name.startswith("__")}
    python = {"__doc__", "__module__", "__slots__", "__init__", "__getattr__", "__hash__", "__firstlineno__"}
    python |= {"__static_attributes__", "__annotations__"}
    assert operators - python <= API["cupy.ndarray"].keys() | {"__array_ufunc__", "__array_function__"}


@pytest.mark.parametrize(
    "misuse",
    [
        lambda a: np.sqrt(a),
        lambda a: np.take(a, [0], axis=0),
        lambda a: np.mean(a),
        lambda a: np.linalg.norm(a),
        lambda a: np.stack([a, a]),
        lambda a: a[np.array([0, 1])],
        lambda a: a[[0, 1]],
        lambda a: a.__setitem__(0, np.float64([1.0])),
        lambda a: a.__setitem__(slice(2), [1.0, 2.0]),
    ],
)
def test_the_stand_in_refuses_what_cupy_only_dislikes(stand_in, misuse):
    with pytest.raises(TypeError):
        misuse(stand_in.asarray(np.arange(3.0)))


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (lambda xp, a: float(a[0]), (1, 0, 0)),
        (lambda xp, a: int(a.sum()), (1, 0, 0)),
        (lambda xp, a: 1 if a[0] < a[1] else 0, (1, 0, 0)),
        (lambda xp, a: a[0].item(), (1, 0, 0)),
        (lambda xp, a: a.tolist(), (1, 0, 0)),
        (lambda xp, a: f"{a[0]:.3f}", (1, 0, 0)),
        (lambda xp, a: str(a), (1, 0, 1)),
        (lambda xp, a: repr(a), (1, 0, 1)),
        (lambda xp, a: a.get(), (1, 0, 1)),
        (lambda xp, a: xp.asnumpy(a), (1, 0, 1)),
        (lambda xp, a: a[a > 0], (1, 0, 0)),
        (lambda xp, a: a.nonzero(), (1, 0, 0)),
        (lambda xp, a: xp.where(a > 0), (1, 0, 0)),
        (lambda xp, a: sum(1 for x in a if x > 0), (3, 0, 0)),
        (lambda xp, a: xp.cuda.Device().synchronize(), (1, 0, 0)),
        (lambda xp, a: xp.asarray([1, 2]), (0, 1, 0)),
        (lambda xp, a: xp.asarray(a), (0, 0, 0)),
        (lambda xp, a: [row.shape for row in a], (0, 0, 0)),
        (lambda xp, a: xp.where(a > 0, a, 0), (0, 0, 0)),
        (lambda xp, a: (len(a), a.shape, a.dtype, a.size, a.copy(), a.T @ a), (0, 0, 0)),
    ],
)
def test_waits_and_transfers_are_counted(stand_in, act, expected):
    a = stand_in.asarray(np.arange(3.0))
    traffic.reset()
    act(stand_in, a)
    assert (traffic.waits, traffic.to_device, traffic.to_host) == expected


def test_the_stand_in_gives_no_view_beyond_cupys_promise(stand_in):
    a = stand_in.zeros((2, 3))
    for view in (a.reshape(-1), a.ravel()):
        view[...] = 1
    np.testing.assert_array_equal(stand_in.asnumpy(a), 0)


# Leaks planted in the library itself: training on the stand-in must fail, or its traffic must show.

losses, backend, optim, training = (
    import_module(f"minilora.{name}") for name in ("losses", "backend", "optim", "training")
)
mse, gradients, take_rows, all_finite = losses.mse, training.backpropagate, training.take_rows, backend.all_finite
step, moments = optim.Adam.step, optim.Adam.__init__


def xp_of(array):
    return backend.backend_of(array).xp


def adam_with_numpys_root(theta, g, m, v, t, *, lr, betas, eps):
    m += (1 - betas[0]) * (g - m)
    v += (1 - betas[1]) * (g * g - v)
    theta -= lr * m / (np.sqrt(v) + eps)


def moments_on_the_host(self, params, **options):
    moments(self, params, **options)
    self.m = {name: np.zeros(p.shape, p.dtype) for name, p in params.items()}


def changed_gradients(change):
    """Return the gradients with something done to them."""
    return lambda model, x, y, loss: change(gradients(model, x, y, loss))


def scaled_by_numpy(grads):
    return {name: g * np.ones(g.shape, g.dtype) for name, g in grads.items()}


def clipped_if_large(grads):
    return {name: g * 0.5 if abs(g).max() > 1e9 else g for name, g in grads.items()}


def gathered_on_the_host(array, rows, out):
    where = backend.backend_of(array)
    return where.asarray(where.to_numpy(array)[where.to_numpy(rows)])


def chosen_by_mask(array, rows, out):
    xp = xp_of(array)
    return array[xp.isin(xp.arange(len(array)), rows)]


LEAKS = {
    "np.sqrt in Adam": ("optim.adam_update", adam_with_numpys_root),
    "Adam's means made by np.zeros": ("optim.Adam.__init__", moments_on_the_host),
    "a gradient times a NumPy array": ("training.backpropagate", changed_gradients(scaled_by_numpy)),
    "np.asarray of the prediction": ("losses.mse", lambda p, t: mse(p, np.asarray(t))),
    "NumPy's mode= in take": (
        "training.take_rows", lambda a, rows, out: xp_of(a).take(a, rows, axis=0, mode="clip")),
    "a function that CuPy lacks": ("losses.mse", lambda p, t: (xp_of(p).vecdot(p - t, p - t).mean(), p - t)),
    "a list as an operand": ("losses.mse", lambda p, t: (((p - t) * ([0.5] * p.shape[-1])).mean(), p)),
    "batches as NumPy indices": (
        "training.take_rows", lambda a, rows, out: take_rows(a, backend.backend_of(rows).to_numpy(rows), out)),
    "rows gathered on the host": ("training.take_rows", gathered_on_the_host),
    "the loss read at each block": ("losses.mse", lambda p, t: (float(mse(p, t)[0]) + 0 * p[0, 0], p)),
    "if, on a gradient": ("training.backpropagate", changed_gradients(clipped_if_large)),
    "rows chosen by a mask": ("training.take_rows", chosen_by_mask),
    "the device waited for at each step": (
        "optim.Adam.step", lambda self, grads: (step(self, grads), backend.backend_of(grads["lora_A"]).synchronize())),
}  # fmt: skip


def traffic_of_training(where, **more):
    rng = np.random.default_rng(0)
    adapter = LoRA.init(7, 5, rank=2, alpha=1, rng=rng, backend=where)
    X, Y = (where.asarray(rng.standard_normal((50, width)), "float32") for width in (7, 5))
    traffic.reset()
    train(adapter, X, Y, epochs=2, batch_size=8, rng=rng, loss=losses.mse, gradients=training.backpropagate, **more)
    return traffic.waits, traffic.to_device, traffic.to_host


EXPECTED = (3 + 2 + 2 + 1, 2, 0)


def test_training_without_a_leak_passes(standin):
    assert traffic_of_training(standin) == EXPECTED
    assert traffic_of_training(standin, weight_decay=0.1, max_grad_norm=0.01) == EXPECTED


@pytest.mark.parametrize("leak", LEAKS)
def test_the_stand_in_catches_a_leak_that_numpy_passes(standin, monkeypatch, leak):
    path, leaky = LEAKS[leak]
    *holders, attribute = path.split(".")
    owner = import_module("minilora")
    for holder in holders:
        owner = getattr(owner, holder)
    monkeypatch.setattr(owner, attribute, leaky)
    traffic_of_training(get_backend("numpy"))
    try:
        seen = traffic_of_training(standin)
    except (TypeError, AttributeError):
        return
    assert seen != EXPECTED


def test_the_page_about_gpus_counts_the_leaks_right():
    page = (Path(__file__).parents[2] / "docs" / "library" / "on-a-gpu.md").read_text()
    assert f"- {len(LEAKS)} leaks planted in the library" in page
    assert f"CuPy {API['version'].rpartition('.')[0]} does not have" in page
