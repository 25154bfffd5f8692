"""An implementation's functions are called: what they raise, return, keep, and how their arguments lie in memory."""

import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check

from ..implementations import OURS, implementation
from ..planting import report_of

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


def test_a_class_instead_of_an_object_is_said():
    class Mine:
        def __init__(self, scale):
            self.scale = scale

        def forward(self, *arrays):
            return LINEAR["forward"](*arrays)

    with pytest.raises(CannotRun, match=r"^Mine is a class, hand over an object: Mine\(\.\.\.\)$"):
        check(Mine)
    assert check(Mine(1)).passed


def test_a_class_may_hold_functions_that_take_nothing():
    class Mine:
        @staticmethod
        def forward():
            return None

    with pytest.raises(CannotRun, match=r"^Mine: forward raises TypeError: "):
        check(Mine)


def test_the_innermost_line_of_the_user_s_file_is_told():
    def inner():
        return np.linalg.inv(np.zeros((2, 2)))  # raises in a file of NumPy

    def backward(*arrays):
        return inner()

    (text,) = check(implementation(backward=backward)).diagnoses
    line = inner.__code__.co_firstlineno + 1
    assert text.startswith("backward raises LinAlgError: Singular matrix (N=7 ")
    assert text.endswith(f", a bias), in test_calling.py, line {line}")


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
    assert report.claims["slope"].startswith("backward, where there is no bias, raises RuntimeError: no GPU")


def test_a_sum_that_is_not_offered_or_raises_fails_alone():
    ours = OURS["combine"]

    def two_at_most(As, *more):
        if len(As) > 2:
            raise ValueError("two at most")
        return ours.cat(As, *more)

    report = report_of("combine", cat=two_at_most, svd=ours.svd)
    assert report.claims["cat"].startswith("cat, of three adapters, raises ValueError: two at most (in=6 out=6")
    assert (report.claims["svd"], report.claims["linear"]) == ("ok", "not offered")
    with pytest.raises(CannotRun, match="cat raises ZeroDivisionError"):
        report_of("combine", cat=lambda *lists: 1 // 0)
    with pytest.raises(CannotRun, match="has none of the functions cat, linear, svd"):
        report_of("combine", forward=ours.cat)


def test_one_buffer_for_all_outputs_is_right():
    buffers, kept = {}, []

    def forward(*arrays):
        y = LINEAR["forward"](*arrays)
        buffer = buffers.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        kept.append(arrays)
        return buffer

    report = check(implementation(forward=forward))
    assert report.passed, str(report)


# --- the lists of slots ---------------------------------------------------------------------------

FUSED = vars(OURS["fused"])
LISTS = {
    "a ndarray for lora_B, expected a list, one for each slot": lambda A, B: (A, B[-1]),
    "2 arrays for lora_B, expected 3, one for each slot": lambda A, B: (A, B[:-1]),
    "shape (5, 2) for lora_A of slot 0, expected shape (2, 5)": lambda A, B: ([g if g is None else g.T for g in A], B),
    "lora_A of slot 1, which has no adapter": lambda A, B: ([np.ones((2, 5)) if g is None else g for g in A], B),
    "nothing for lora_B of slot 0, expected shape (8, 2)": lambda A, B: (A, [None] * len(B)),
}


@pytest.mark.parametrize("said", LISTS)
def test_a_gradient_that_is_no_list_is_told(said):
    def backward(*arrays):
        grads = FUSED["backward"](*arrays)
        lists = LISTS[said](grads["lora_A"], grads["lora_B"])
        return grads | dict(zip(("lora_A", "lora_B"), lists, strict=True))

    (text,) = report_of("fused", forward=FUSED["forward"], backward=backward).diagnoses
    assert text.startswith("backward")
    assert f"returns gradients with {said}" in text


def test_a_factor_of_a_slot_that_is_changed_is_told():
    def forward(x, weight, bias, A, *slots):
        y = FUSED["forward"](x, weight, bias, A, *slots)
        A[-1][0, 0] += 1
        return y

    report = report_of("fused", forward=forward)
    assert report.claims["nothing is changed"] == "forward changes lora_A[2], which belongs to the caller"


def test_a_wrong_entry_is_said_with_its_slot_or_expert():
    def backward(*arrays):
        grads = FUSED["backward"](*arrays)
        return grads | {"lora_A": [*grads["lora_A"][:-1], 1.1 * grads["lora_A"][-1] + 0.01]}

    def forward(x, weight, bias, A, B, alpha, widths):
        y = FUSED["forward"](x, weight, bias, A, B, alpha, widths)
        y[..., widths[0]] += 1
        return y

    def merge(weight, *factors):
        merged = OURS["experts"].merge(weight, *factors)
        merged[-1, 0, 0] += 1
        return merged

    of_y, of_A = report_of("fused", forward=forward, backward=backward).diagnoses
    assert ", 8], in slot 1: " in of_y
    assert ", in slot 2: " in of_A

    def routed(x, *layer):
        y = OURS["experts"].forward(x, *layer)
        y[:, 0] += layer[-1].reshape(-1) == 1
        return y

    (text,) = report_of("experts", **vars(OURS["experts"]) | {"merge": merge}).diagnoses
    assert "at [2, 0, 0], of expert 2: " in text
    (text,) = report_of("experts", forward=routed).diagnoses
    assert ", 0], of expert 1: " in text


# --- declarations ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("orientation", " Out , IN "),
        ("scaling", "alpha/r"),
        ("dtype", np.float64),
        ("dtype", "Float64"),
        ("dtype", SimpleNamespace(__name__="jax.numpy.float64")),
        ("dtype", type("dtype", (), {"__str__": lambda self: "torch.float64"})()),
    ],
)
def test_a_declaration_may_be_spelled_in_other_ways(name, value):
    report = check(implementation(**{name: value}))
    assert report.passed, str(report)
    assert report.dtype == "float64"


def test_a_declaration_spelled_in_another_way_counts():
    def forward(x, weight, bias, A, B, alpha):
        y = x @ weight + alpha * (x @ A @ B)
        return y if bias is None else y + bias

    report = check(SimpleNamespace(forward=forward, orientation="in,out", scaling="ALPHA", dtype=np.float32))
    assert report.passed, str(report)
    assert report.dtype == "float32"


@pytest.mark.parametrize("declared", [{}, {"dtype": "float32"}, {"orientation": "in, out"},
                                      {"dtype": "float32", "orientation": "in, out"}])  # fmt: skip
def test_a_forward_that_raises_is_tried_in_other_ways(declared):
    def forward(x, weight, bias, A, B, alpha):
        if x.dtype != declared.get("dtype", "float64"):
            raise RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
        turned = [a.T if "orientation" in declared else a for a in (weight, A, B)]
        return LINEAR["forward"](x, turned[0], bias, *turned[1:], alpha)

    if declared:
        with pytest.raises(CannotRun) as refused:
            check(SimpleNamespace(forward=forward))
        said = " and ".join(f'{name} = "{value}"' for name, value in declared.items())
        assert str(refused.value).endswith(f"; it answers with {said}")
    assert check(SimpleNamespace(forward=forward, **declared)).passed


def test_no_declaration_is_told_where_none_helps():
    def forward(*arrays):
        raise RuntimeError("boom")

    with pytest.raises(CannotRun, match=r"forward raises RuntimeError: boom .*\d$"):
        check(SimpleNamespace(forward=forward))


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


def test_a_function_that_raises_in_every_order_has_no_habit():
    def merge(*arrays):
        raise NotImplementedError

    report = check(implementation(merge=merge))
    assert re.match("merge raises NotImplementedError", report.claims["merge"])
    assert report.habits["memory order"] == "ok"
