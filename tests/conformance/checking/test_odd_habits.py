"""Right implementations with odd habits pass: one output buffer, gradients that are used up, Adam in float32."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora import Linear, mse
from minilora.conformance import CannotRun, check, claims
from minilora.conformance import __main__ as command
from minilora.conformance.bugs.table import BUGS
from minilora.conformance.bugs.wrong_arrays import EVERY_ENTRY
from minilora.conformance.claims import (
    ClaimBroken,
    backward_is_pure,
    backward_knows_no_large_and_no_small,
    require_close,
)
from minilora.conformance.running import child_process as apart

from ...support.cases import linear_case
from ...support.problems import Problem
from ..implementations import OURS, from_formulas, implementation, with_kinds

LINEAR = vars(OURS["linear"])


def test_one_buffer_for_every_output_of_a_shape_is_right():
    buffers = {}

    def forward(*arrays):
        y = LINEAR["forward"](*arrays)
        buffer = buffers.setdefault(y.shape, np.empty_like(y))
        buffer[...] = y
        return buffer

    report = check(implementation(forward=forward))
    assert report.passed, str(report)


def adam(dtype=np.float64, *, spoil=False):
    """Algorithm 1, in a precision; it may use its gradients up."""

    def step(params, grads, state):
        t, m, v = state or (0, {}, {})
        moved, t = {}, t + 1
        for name, p in params.items():
            g = grads[name].astype(dtype)
            m[name] = 0.9 * m.get(name, 0 * g) + 0.1 * g
            v[name] = 0.999 * v.get(name, 0 * g) + 0.001 * g**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            moved[name] = (p.astype(dtype) - 1e-3 * direction).astype(dtype)
            if spoil:
                grads[name] *= 0
        return moved, (t, m, v)

    return step


@pytest.mark.parametrize("step", [adam(np.float32), adam(spoil=True)], ids=["float32", "gradients used up"])
def test_a_right_adam_with_its_own_habits_is_right(step):
    assert check(implementation(step=step)).claims["adam"] == "ok"


class Compiled:
    """A function that has no signature to look at."""

    @property
    def __signature__(self):
        raise ValueError("no signature found")

    def __call__(self, *arrays):
        return OURS["conv2d"].forward(*arrays)


def test_a_function_without_a_signature_is_handed_no_options():
    report = check(with_kinds(conv2d=SimpleNamespace(forward=Compiled()))).kinds["conv2d"]
    assert report.claims["forward"] == "ok", str(report)


SCALING = [bug for bug in BUGS if bug.breaks == "scaling" and bug.kinds[0] == "linear"]


@pytest.mark.long
@pytest.mark.parametrize("bug", SCALING, ids=lambda bug: bug.name)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_every_wrong_scaling_is_named_in_lower_precision(bug, dtype):
    assert check(from_formulas("linear", bug.parts), dtype=dtype).diagnoses[0].startswith(bug.name)


@pytest.mark.parametrize(("dtype", "other"), [("float64", 0.9), ("bfloat16", 1.33)])
def test_a_factor_of_some_entries_is_not_told_of_all(dtype, other):
    def forward(*arrays):
        y = LINEAR["forward"](*arrays)
        return np.where(y > 0, 1.37 * y, other * y)

    report = check(SimpleNamespace(forward=forward), dtype=dtype)
    assert not report.passed
    assert EVERY_ENTRY not in str(report)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "status"), [(OURS["rslora"], 0), (None, 1)], ids=["right", "wrong"])
def test_a_further_kind_that_is_wrong_fails_the_command(monkeypatch, capsys, kind, status):
    wrong = from_formulas("rslora", next(bug.parts for bug in BUGS if bug.name.startswith("rsLoRA")))
    report = check(with_kinds(rslora=kind or wrong), name="mine")
    monkeypatch.setattr(apart, "check_apart", lambda *given, **more: report)
    assert command.main(["mine"]) == status
    assert ("rslora: rsLoRA's root is ignored" in capsys.readouterr().out) is (status == 1)


# --- the claims' own guards -----------------------------------------------------------------------


@pytest.mark.parametrize(("found", "expected"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0)])
def test_what_is_not_finite_is_close_to_nothing(found, expected):
    with pytest.raises(ClaimBroken):
        require_close("y", np.array([found]), np.array([expected]), 1.0)


def test_a_gradient_buffer_that_is_handed_out_again_is_impure():
    from minilora.layer import rows

    class OneBuffer(Linear):
        """Right, but for the memory: the second backward writes over what the first returned."""

        buffer = None

        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = super().backward(dy, cache, need_dx=need_dx)
            if self.buffer is None:
                self.buffer = [np.empty_like(grads["weight"])]
            grads["weight"] = np.matmul(rows(dy).T, rows(cache[2]), out=self.buffer[0])
            return dx, grads

    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    backward_is_pure(linear_case(), problem)
    with pytest.raises(ClaimBroken, match="shares memory"):
        backward_is_pure(linear_case(OneBuffer), problem)


def test_a_dx_in_the_outputs_memory_is_impure():
    class UsesUp(Linear):
        """Right, but for the memory: the first backward puts dx where the output was."""

        left = None

        def forward(self, x):
            self.left, cache = super().forward(x)
            return self.left, cache

        def backward(self, dy, cache, *, need_dx=True):
            dx, grads = super().backward(dy, cache, need_dx=need_dx)
            if self.left is not None:
                self.left[...], dx, self.left = dx, self.left, None
            return dx, grads

    with pytest.raises(ClaimBroken, match="gradient of x shares memory"):
        backward_is_pure(linear_case(UsesUp), Problem(n=4, in_features=3, out_features=3, rank=2))


def test_what_a_backward_loses_of_small_gradients_is_seen():
    class Cuts(Linear):
        def backward(self, dy, cache, *, need_dx=True):
            return super().backward(np.where(abs(dy) < 1e-9, 0, dy), cache, need_dx=need_dx)

    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    backward_knows_no_large_and_no_small(linear_case(), problem)
    with pytest.raises(ClaimBroken):
        backward_knows_no_large_and_no_small(linear_case(Cuts), problem)


class Odd(Linear):
    """Right, but for what a subclass makes of an output or of a dx."""

    def of_y(self, y, x):
        return y

    def of_dx(self, dx):
        return dx

    def forward(self, x):
        y, cache = super().forward(x)
        return self.of_y(y, x), cache

    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return self.of_dx(dx), grads


class OtherWhenFrozen(Odd):
    def of_y(self, y, x):
        return 2 * y if self.frozen else y


class BlindToStrides(Odd):
    """Like a program in another language that takes an address and no strides: an array read backwards is turned."""

    def of_y(self, y, x):
        return y[::-1] if x.strides[0] < 0 else y


class FlatWithoutRows(Odd):
    def of_dx(self, dx):
        return dx if len(dx) else dx.reshape(-1)


class OneBiasForOneRow(Odd):
    def backward(self, dy, cache, *, need_dx=True):
        dx, grads = super().backward(dy, cache, need_dx=need_dx)
        return dx, {**grads, "bias": dy} if dy.ndim == 1 else grads


class FlatWithoutEntries(Odd):
    def of_y(self, y, x):
        return y if y.size else y.reshape(-1, y.shape[-1])


class AlwaysALittle(Odd):
    def of_dx(self, dx):
        return dx + 1e-12


class UnaskedDx(Odd):
    def backward(self, dy, cache, *, need_dx=True):
        return super().backward(dy, cache)


class KeepsTheWeight(Odd):
    def of_y(self, y, x):
        kept = vars(self).setdefault("kept", {"weight": self.weight.copy()})["weight"]
        return x @ kept.T + self.bias


class WideForHalf(Odd):
    def of_y(self, y, x):
        return y.astype(np.float64) if y.dtype == np.float16 else y


@pytest.mark.parametrize(
    ("claim", "cls", "said"),
    [
        (claims.leading_axes_are_rows, OneBiasForOneRow, "the gradient of bias is dy's own memory"),
        (claims.leading_axes_are_rows, FlatWithoutEntries, r"\(2, 0, in\) does not give \(2, 0, out\)"),
        (claims.backward_is_linear_in_the_cotangent, AlwaysALittle, "the gradient of x differs"),
        (claims.backward_without_dx_is_the_same, UnaskedDx, "dx is not None where nobody asked for it"),
        (claims.a_layer_remembers_nothing_but_its_cache, KeepsTheWeight, "the output for new numbers differs"),
        (claims.every_precision_is_exact_on_small_integers, WideForHalf, "y is float64 for float16"),
        (claims.a_frozen_layer_only_passes_dx, OtherWhenFrozen, "the frozen output differs"),
        (claims.memory_order_makes_no_difference, BlindToStrides, "the output is off"),
        (claims.no_rows_give_no_rows, FlatWithoutRows, r"no rows give a dx of shape \(0,\)"),
    ],
)
def test_a_claim_sees_the_layer_that_only_it_can_see(claim, cls, said):
    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claim(linear_case(Odd), problem)
    with pytest.raises(ClaimBroken, match=said):
        claim(linear_case(cls), problem)


def test_a_loss_whose_gradient_is_wider_is_seen():
    problem = Problem(n=4, in_features=3, out_features=2, rank=2)
    claims.mse_gradient_is_its_slope(mse, problem)
    with pytest.raises(ClaimBroken, match="its gradient is float64 for float32"):
        claims.mse_gradient_is_its_slope(lambda p, t: (mse(p, t)[0], mse(p, t)[1].astype(np.float64)), problem)


# --- declarations ---------------------------------------------------------------------------------


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("orientation", ["out, in", "in, out"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_forward_that_raises_is_tried_in_other_ways(orientation, dtype):
    def forward(x, weight, bias, A, B, alpha):
        if x.dtype != dtype:
            raise RuntimeError("mat1 and mat2 must have the same dtype, but got Double and Float")
        turned = [a.T if orientation == "in, out" else a for a in (weight, A, B)]
        return LINEAR["forward"](x, turned[0], bias, *turned[1:], alpha)

    mine = SimpleNamespace(forward=forward)
    said = ['dtype = "float32"'] * (dtype == "float32") + ['orientation = "in, out"'] * (orientation == "in, out")
    if not said:
        assert check(mine).passed
        return
    with pytest.raises(CannotRun) as refused:
        check(mine)
    assert str(refused.value).endswith(f"; it answers with {' and '.join(said)}")
    declared = dict(part.split(" = ") for part in said)
    assert check(SimpleNamespace(forward=forward, **{k: v.strip('"') for k, v in declared.items()})).passed


def test_no_declaration_is_told_where_none_helps():
    def forward(*arrays):
        raise RuntimeError("boom")

    with pytest.raises(CannotRun, match=r"forward raises RuntimeError: boom .*\d$"):
        check(SimpleNamespace(forward=forward))
