"""Right implementations with odd habits pass: one output buffer, gradients that are used up, Adam in float32."""

from types import SimpleNamespace

import numpy as np
import pytest

from minilora.conformance import CannotRun, check
from minilora.conformance import __main__ as command
from minilora.conformance.checking import child as apart
from minilora.conformance.checking.describing import EVERY_ENTRY
from minilora.conformance.problems.bugs import BUGS

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
@pytest.mark.parametrize("bug", SCALING, ids=lambda bug: bug.says)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def test_every_wrong_scaling_is_named_in_lower_precision(bug, dtype):
    assert check(from_formulas("linear", bug.parts), dtype=dtype).diagnoses[0].startswith(bug.says)


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
    wrong = from_formulas("rslora", next(bug.parts for bug in BUGS if bug.says.startswith("rsLoRA")))
    report = check(with_kinds(rslora=kind or wrong), name="mine")
    monkeypatch.setattr(apart, "check_apart", lambda *given, **more: report)
    assert command.main(["mine"]) == status
    assert ("rslora: rsLoRA's root is ignored" in capsys.readouterr().out) is (status == 1)


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
