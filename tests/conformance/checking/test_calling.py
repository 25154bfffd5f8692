"""An implementation's functions are called: what they raise, return, keep, and how their arguments lie in memory."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check

from ..implementations import OURS, implementation

LINEAR = vars(OURS["linear"])


@pytest.mark.parametrize("function", ["forward", "backward", "merge"])
def test_an_array_of_an_earlier_call_is_the_caller_s(function):
    kept = []

    def spoils(first, *arrays):
        if kept:
            kept.pop()[...] = 0
        kept.append(first)
        return LINEAR[function](first, *arrays)

    name = {"forward": "x", "backward": "dy", "merge": "weight"}[function]
    report = check(implementation(**{function: spoils}))
    said = f"a later call changes {name} of an earlier {function}, which belongs to the caller"
    assert report.claims["nothing is changed"] == said
    assert report.diagnoses == [said]
    assert not report.passed


def test_what_is_kept_and_left_alone_is_no_change():
    kept = []

    def forward(x, *arrays):
        kept.append((x, *arrays))
        return LINEAR["forward"](x, *arrays)

    assert check(implementation(forward=forward)).passed


def test_a_class_instead_of_an_object_is_said():
    class Mine:
        def __init__(self, scale):
            self.scale = scale

        def forward(self, *arrays):
            return LINEAR["forward"](*arrays)

    with pytest.raises(CannotRun, match=r"^Mine is a class, hand over an object: Mine\(\.\.\.\)$"):
        check(Mine)
    assert check(Mine(1)).passed


def test_the_line_of_the_user_s_file_is_told():
    def backward(*arrays):
        return np.linalg.inv(np.zeros((2, 2)))  # raises in a file of NumPy

    (text,) = check(implementation(backward=backward)).diagnoses
    line = backward.__code__.co_firstlineno + 1
    assert text.startswith("backward raises LinAlgError: Singular matrix (N=7 ")
    assert text.endswith(f", a bias), in test_calling.py, line {line}")


def test_the_innermost_line_of_the_user_is_told():
    def inner():
        raise RuntimeError("here")

    def backward(*arrays):
        return inner()

    (text,) = check(implementation(backward=backward)).diagnoses
    assert text.endswith(f", in test_calling.py, line {inner.__code__.co_firstlineno + 1}")


class Tensor:
    """As torch has them: it cannot become an array."""

    def __array__(self, *more, **options):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")


@pytest.mark.parametrize(("module", "hint"), [("torch", "; of torch, return y.detach().float().numpy()"), ("jax", "")])
def test_what_cannot_become_an_array_is_said(monkeypatch, module, hint):
    monkeypatch.setattr(Tensor, "__module__", module)

    def forward(x, *arrays):
        return Tensor()

    with pytest.raises(CannotRun) as refused:
        check(SimpleNamespace(forward=forward), name="mine")
    text = (
        "mine: forward returns a Tensor that is no array: RuntimeError: Can't call numpy() on Tensor that requires grad"
    )
    line = f", in test_calling.py, line {forward.__code__.co_firstlineno}"
    assert str(refused.value) == f"{text}{hint} (N=7 in=5 out=3 r=2 alpha=3, a bias){line}"


def test_functions_that_share_what_raises_are_told_once():
    def shared(*arrays):
        raise RuntimeError("no GPU")

    def forward(x, weight, bias, *arrays):
        return shared() if bias is None else LINEAR["forward"](x, weight, bias, *arrays)

    def backward(dy, x, weight, bias, *arrays):
        return shared() if bias is None else LINEAR["backward"](dy, x, weight, bias, *arrays)

    report = check(SimpleNamespace(forward=forward, backward=backward))
    assert len(report.diagnoses) == 1
    assert report.claims["slope"].startswith("backward, wherever there is no bias, raises RuntimeError: no GPU")


# --- memory order ---------------------------------------------------------------------------------

LAYOUTS = {"C": lambda a: a.flags.c_contiguous, "F": lambda a: a.flags.f_contiguous,
           "strided": lambda a: not (a.flags.c_contiguous or a.flags.f_contiguous)}  # fmt: skip


@pytest.mark.parametrize("orientation", ["out, in", "in, out"])
def test_every_function_meets_every_memory_order(orientation):
    met = {}

    def seen(function):
        def with_orders(*arrays):
            turn = [a.T if orientation == "in, out" and i in (1, 3, 4) else a for i, a in enumerate(arrays)]
            met.setdefault(function, set()).update(
                name for name, lies in LAYOUTS.items() if all(lies(a) for a in arrays if np.ndim(a) == 2 and a.size > 9)
            )
            return LINEAR[function](*turn)

        return with_orders

    mine = SimpleNamespace(forward=seen("forward"), orientation=orientation)
    report = check(mine)
    assert report.passed, str(report)
    assert report.habits["memory order"] == "ok"
    assert met == {"forward": set(LAYOUTS)}


def as_c(array):
    """What a reader of raw memory takes an array for."""
    return np.ndarray(array.shape, array.dtype, np.lib.stride_tricks.as_strided(array, (array.size,), (8,)).copy())


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (
            lambda x: x.T.reshape(x.shape) if x.flags.f_contiguous and not x.flags.c_contiguous else x,
            "in Fortran order",
        ),
        (lambda x: as_c(x) if not (x.flags.f_contiguous or x.flags.c_contiguous) else x, "at every second place"),
    ],
)
def test_memory_that_is_read_as_c_order_fails(reads, said):
    def forward(x, *arrays):
        return LINEAR["forward"](reads(x), *arrays)

    report = check(implementation(forward=forward))
    assert not report.passed
    assert report.claims["memory order"].startswith(f"where arrays lie {said}, the output is off by ")
    assert report.diagnoses == [report.claims["memory order"]]


def test_what_is_wrong_in_every_order_has_no_habit():
    report = check(implementation(forward=lambda *arrays: LINEAR["forward"](*arrays) + 1))
    assert not report.passed
    assert report.habits["memory order"] == "ok"


def test_a_function_that_raises_in_every_order_has_no_habit():
    def merge(*arrays):
        raise NotImplementedError

    report = check(implementation(merge=merge))
    assert re.match("merge raises NotImplementedError", report.claims["merge"])
    assert report.habits["memory order"] == "ok"
