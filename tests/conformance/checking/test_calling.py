"""An implementation's functions are called: what they raise, return, keep, and how their arguments lie in memory."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance.checking.kindreport import STATES

from ..implementations import OURS, PLAIN, beside_forward, report_of


@pytest.mark.parametrize(("function", "name"), [("forward", "x"), ("backward", "dy"), ("merge", "weight")])
def test_an_array_of_an_earlier_call_is_the_caller_s(function, name):
    kept = []

    def spoils(first, *arrays):
        if kept:
            kept.pop()[...] = 0
        kept.append(first)
        return vars(PLAIN)[function](first, *arrays)

    report = check(beside_forward(**{function: spoils}))
    said = f"a later call changes {name} of an earlier call of {function}; the caller owns it"
    assert report.claims["nothing is changed"] == said
    assert report.diagnoses == [said]
    assert not report.passed


def test_what_is_changed_first_is_told():
    def forward(x, *layer):
        y = PLAIN.forward(x, *layer)
        x += 1
        return y

    def backward(dy, *arrays):
        grads = PLAIN.backward(dy, *arrays)
        dy += 1
        return grads

    report = check(SimpleNamespace(forward=forward, backward=backward))
    assert report.claims["nothing is changed"] == "forward changes x, which the caller owns"


def raising(error, *of):
    def function(*arguments):
        raise error(*of)

    return function


def returning(value):
    return lambda *arguments: value


ENDS = {"backward": "slope", "merge": "merge", "init": "start", "step": "adam"}


@pytest.mark.parametrize(
    ("function", "claim", "does", "said"),
    [
        *((function, claim, raising(SystemExit, 0), "raises SystemExit: 0") for function, claim in ENDS.items()),
        ("backward", "slope", raising(RuntimeError, "one\n  two"), "raises RuntimeError: one two (N=7 "),
        ("merge", "merge", raising(NotImplementedError), "raises NotImplementedError (N=7 "),
        ("merge", "merge", returning("y"), "returns a str, expected one array (N=7 "),
        ("merge", "merge", returning((1, 2)), "returns a tuple of 2, expected one array (N=7 "),
        ("merge", "merge", returning(None), "returns None, expected one array (N=7 "),
        ("merge", "merge", returning(np.ones(3, complex)),
            "returns an array of dtype complex128, expected real numbers (N"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_said_of_its_claim(function, claim, does, said):
    report = check(beside_forward(**{function: does}))
    (text,) = report.diagnoses
    assert text.startswith(f"{function} {said}")
    assert {of for of, verdict in report.claims.items() if verdict not in STATES} == {claim}
    assert report.claims[claim].startswith(f"{function} {said}")
    assert report.habits["memory order"] == "ok"  # it is raised in every order


def test_a_class_instead_of_an_object_is_said():
    class Mine:
        def __init__(self, scale):
            self.scale = scale

        def forward(self, *arrays):
            return PLAIN.forward(*arrays)

    class Held:
        """Functions, of which this one takes nothing."""

        @staticmethod
        def forward():
            return None

    with pytest.raises(CannotRun, match=r"^Mine is a class; pass an instance of it: Mine\(\.\.\.\)$"):
        check(Mine)
    assert check(Mine(1)).passed
    with pytest.raises(CannotRun, match=r"^Held: forward raises TypeError: "):
        check(Held)


def in_a_file_of_numpy(*arrays):
    return np.linalg.inv(np.zeros((2, 2)))


def without_a_file(*arrays):
    return eval("1 / 0")


@pytest.mark.parametrize(("raises", "said"), [(in_a_file_of_numpy, "LinAlgError: Sing"), (without_a_file, "ZeroDiv")])
def test_the_innermost_line_of_the_users_file_is_told(raises, said):
    (text,) = check(beside_forward(backward=lambda *arrays: raises(*arrays))).diagnoses
    assert text.startswith(f"backward raises {said}")
    assert text.endswith(f", a bias), in test_calling.py, line {raises.__code__.co_firstlineno + 1}")


class Compiled:
    """A function of no file."""

    def __call__(self, *arrays):
        return None


@pytest.mark.parametrize("merge", [np.matmul, Compiled()], ids=["raises", "returns nothing"])
def test_of_what_has_no_line_none_is_told(merge):
    (text,) = check(beside_forward(merge=merge)).diagnoses
    assert text.endswith(" (N=7 in=5 out=3 r=2 alpha=3, a bias)")


NO_ARRAY = "Can't call numpy() on Tensor that requires grad"


class Tensor:
    """As torch has them: it cannot become an array."""

    def __array__(self, *more, **options):
        raise RuntimeError(f"{NO_ARRAY}.")


@pytest.mark.parametrize(
    ("module", "hint", "made"),
    [("torch", "; with PyTorch, return y.detach().float().numpy()", partial), ("jax", "", lambda function: function)],
)
def test_what_cannot_become_an_array_is_said(monkeypatch, module, hint, made):
    monkeypatch.setattr(Tensor, "__module__", module)

    def forward(x, *arrays):
        return Tensor()

    with pytest.raises(CannotRun) as refused:
        check(SimpleNamespace(forward=made(forward)), name="mine")
    text = f"mine: forward returns a Tensor, not an array: RuntimeError: {NO_ARRAY}"
    line = f", in test_calling.py, line {forward.__code__.co_firstlineno}"
    assert str(refused.value) == f"{text}{hint} (N=7 in=5 out=3 r=2 alpha=3, a bias){line}"


def test_functions_that_share_what_raises_are_told_once():
    def shared(*arrays):
        raise RuntimeError("no GPU")

    def forward(x, weight, bias, *arrays):
        return shared() if bias is None else PLAIN.forward(x, weight, bias, *arrays)

    def backward(dy, x, weight, bias, *arrays):
        return shared() if bias is None else PLAIN.backward(dy, x, weight, bias, *arrays)

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
    assert report.claims["cat"].startswith("cat, with three adapters, raises ValueError: two at most (in=6 out=6")
    assert (report.claims["svd"], report.claims["linear"]) == ("ok", "not offered")
    with pytest.raises(CannotRun, match="cat raises ZeroDivisionError"):
        report_of("combine", cat=lambda *lists: 1 // 0)
    with pytest.raises(CannotRun, match="has none of the functions cat, linear, svd"):
        report_of("combine", forward=ours.cat)


def test_one_buffer_for_all_outputs_is_right():
    buffers, kept = {}, []

    def forward(*arrays):
        y = PLAIN.forward(*arrays)
        buffer = buffers.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        kept.append(arrays)
        return buffer

    report = check(beside_forward(forward=forward))
    assert report.passed, str(report)


# --- the lists of slots ---------------------------------------------------------------------------

FUSED = OURS["fused"]
LISTS = {
    "a ndarray for lora_B, expected a list, one for each slot": lambda A, B: (A, B[-1]),
    "2 arrays for lora_B, expected 3, one for each slot": lambda A, B: (A, B[:-1]),
    "shape (5, 2) for lora_A of slot 0, expected shape (2, 5)": lambda A, B: ([g if g is None else g.T for g in A], B),
    "an array for lora_A of slot 1, expected None, as it has no adapter": lambda A, B: (
        [np.ones((2, 5)) if g is None else g for g in A],
        B,
    ),
    "nothing for lora_B of slot 0, expected shape (8, 2)": lambda A, B: (A, [None] * len(B)),
}


@pytest.mark.parametrize("said", LISTS)
def test_a_gradient_that_is_no_list_is_told(said):
    def backward(*arrays):
        grads = FUSED.backward(*arrays)
        lists = LISTS[said](grads["lora_A"], grads["lora_B"])
        return grads | dict(zip(("lora_A", "lora_B"), lists, strict=True))

    (text,) = report_of("fused", forward=FUSED.forward, backward=backward).diagnoses
    assert text.startswith("backward")
    assert f"returns gradients with {said}" in text


def test_a_factor_of_a_slot_that_is_changed_is_told():
    def forward(x, weight, bias, A, *slots):
        y = FUSED.forward(x, weight, bias, A, *slots)
        A[-1][0, 0] += 1
        return y

    report = report_of("fused", forward=forward)
    assert report.claims["nothing is changed"] == "forward changes lora_A[2], which the caller owns"


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
    report = check(beside_forward(**{name: value}))
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
        return PLAIN.forward(x, turned[0], bias, *turned[1:], alpha)

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
    met = set()

    def forward(*arrays):
        turn = [a.T if orientation == "in, out" and i in (1, 3, 4) else a for i, a in enumerate(arrays)]
        matrices = [a for a in arrays if np.ndim(a) == 2 and a.size > 9]
        met.update(name for name, lies in LAYOUTS.items() if all(map(lies, matrices)))
        return PLAIN.forward(*turn)

    report = check(SimpleNamespace(forward=forward, orientation=orientation))
    assert report.passed, str(report)
    assert report.habits["memory order"] == "ok"
    assert met == set(LAYOUTS)


def as_c(array):
    """What a reader of raw memory takes an array for."""
    return np.ndarray(array.shape, array.dtype, np.lib.stride_tricks.as_strided(array, (array.size,), (8,)).copy())


@pytest.mark.parametrize(
    ("reads", "said"),
    [
        (lambda x: x.T.reshape(x.shape) if LAYOUTS["F"](x) and not LAYOUTS["C"](x) else x, "in Fortran order"),
        (lambda x: as_c(x) if LAYOUTS["strided"](x) else x, "with a stride of two"),
    ],
)
def test_memory_that_is_read_as_c_order_fails(reads, said):
    report = check(SimpleNamespace(forward=lambda x, *layer: PLAIN.forward(reads(x), *layer)))
    assert not report.passed
    assert report.claims["memory order"].startswith(f"for arrays {said}, the output is off by ")
    assert report.diagnoses == [report.claims["memory order"]]
