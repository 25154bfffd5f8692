"""The trace of a training step: its numbers are the equations', its lines are the pages', and all that ran is there."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

import minilora
from minilora import MLP, Adam, CheckRefused, DoRA, Layer, Linear, LoRA, LoRALinear, Tanh
from minilora.cli.check import all_instances
from minilora.layer import rows, walk
from minilora.verify.trace import by_pencil, drawn_layer, record, trace

from ..support.compare import assert_close

ROOT = Path(minilora.__file__).parents[1]
NAMES = pytest.mark.parametrize("name", all_instances())


def instance(name, **drawing):
    return drawn_layer(all_instances()[name], **drawing)


def lines_of(found):
    """Return all lines of a trace, in the order in which they ran."""
    return [*found.forward, *found.loss, *found.backward, *(line for lines in found.step.values() for line in lines)]


# --- five layers and more, beside arithmetic that is written out here ---


def added_path(x, A, B, s, dy=None):
    """What (1) to (6) say, in sums over entries."""
    h = np.einsum("ni,ki->nk", x, A)
    forward = {"1": h, "2": s * np.einsum("nk,ok->no", h, B)}
    if dy is None:
        return forward
    dh = s * np.einsum("no,ok->nk", dy, B)
    dA, dB = np.einsum("nk,ni->ki", dh, x), s * np.einsum("no,nk->ok", dy, h)
    return forward | {"4": dh, "6": np.einsum("nk,ki->ni", dh, A), "3": dB, "5": dA}


def of_loss(y, target):
    return {"15": ((y - target) ** 2).sum() / y.size, "16": 2 * (y - target) / y.size}


def of_linear(given, x, target):
    W, b = given["weight"], given["bias"]
    y = np.einsum("ni,oi->no", x, W) + b
    dy = 2 * (y - target) / y.size
    dW, db = np.einsum("no,ni->oi", dy, x), np.einsum("no->o", dy)
    return of_loss(y, target) | {"7": y, "8": dW, "9": db, "10": np.einsum("no,oi->ni", dy, W)}


def of_lora(given, x, target):
    A, B, s = given["lora_A"], given["lora_B"], given["alpha"] / len(given["lora_A"])
    y = added_path(x, A, B, s)["2"]
    return of_loss(y, target) | added_path(x, A, B, s, 2 * (y - target) / y.size)


def of_lora_linear(given, x, target):
    A, B, W = given["adapter.lora_A"], given["adapter.lora_B"], given["base.weight"]
    s = given["adapter.alpha"] / len(A)
    base = np.einsum("ni,oi->no", x, W) + given.get("base.bias", 0.0)
    y = base + added_path(x, A, B, s)["2"]
    dy = 2 * (y - target) / y.size
    path, through_base = added_path(x, A, B, s, dy), np.einsum("no,oi->ni", dy, W)
    return of_loss(y, target) | path | {"7": base, "10": through_base, "11": y, "12": through_base + path["6"]}


def of_dora(given, x, target):
    A, B, W, m = (given[key] for key in ("adapter.lora_A", "adapter.lora_B", "base.weight", "adapter.magnitude"))
    s = given["adapter.alpha"] / len(A)
    delta = s * np.einsum("ok,ki->oi", B, A)
    V = W + delta
    n = np.array([sum(v * v for v in row) ** 0.5 for row in V])
    u, g = np.einsum("ni,oi->no", x, V), m / n
    y = g * u
    dy = 2 * (y - target) / y.size
    du, dm = dy * g, np.einsum("no,no->o", dy, u) / n
    dV = -g[:, None] * dm[:, None] * V / n[:, None]
    full = s * np.einsum("oi,ki->ok", dV, A), s * np.einsum("ok,oi->ki", B, dV)
    of_n = {"dora.1": n, "dora.2": g, "dora.3": y, "dora.4": du, "dora.5": dm, "dora.6": -g * dm, "dora.7": dV}
    more = {"dora.8": full, "10": np.einsum("no,oi->ni", du, W), "13": delta, "rs.1": s}
    return of_loss(y, target) | added_path(x, A, B, s, du) | of_n | more


def of_embedding(given, ids, target):
    y = np.array([given["weight"][i] for i in ids])
    dy, dW = 2 * (y - target) / y.size, np.zeros_like(given["weight"])
    for i, row in zip(ids, dy, strict=True):
        dW[i] += row
    return of_loss(y, target) | {"emb.1": y, "emb.2": dW}


def of_norm(given, x, target):
    g, d = given["weight"], x.shape[-1]
    r = np.array([[[(sum(v * v for v in row) / d + given["eps"]) ** 0.5] for row in part] for part in x])
    y = x / r * g
    dy = 2 * (y - target) / y.size
    dx = np.zeros_like(x)
    for n in np.ndindex(*x.shape[:-1]):  # dy_i / dx_j = g_i ((i = j) / r - x_i x_j / (d r^3))
        jacobian = g[:, None] * (np.eye(d) / r[n] - np.outer(x[n], x[n]) / (d * r[n] ** 3))
        dx[n] = dy[n] @ jacobian
    return of_loss(y, target) | {"norm.1": r, "norm.2": y, "norm.3": (dy * x / r).sum(axis=(0, 1)), "norm.4": dx}


def of_tanh(given, x, target):
    y = (np.exp(x) - np.exp(-x)) / (np.exp(x) + np.exp(-x))
    return of_loss(y, target) | {"act.3": y, "act.4": 2 * (y - target) / y.size / np.cosh(x) ** 2}


ARITHMETIC = {
    "Linear": of_linear,
    "LoRA": of_lora,
    "LoRALinear": of_lora_linear,
    "Linear, DoRA": of_dora,
    "Embedding": of_embedding,
    "RMSNorm": of_norm,
    "Tanh": of_tanh,
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_each_line_has_the_value_of_its_equation(name, seed):
    layer, x, target = instance(name, rank=1 + seed, seed=seed)
    found = trace(layer, x, target)
    assert (found.given["x"] == x).all()
    assert (found.given["target"] == target).all()
    equations = ARITHMETIC[name](found.given, x, target)
    lines = [*found.forward, *found.loss, *found.backward]
    assert {line.equation for line in lines} == equations.keys()
    for line in lines:
        expected = equations[line.equation]
        for value, right in zip(
            line.values.values(), expected if line.equation == "dora.8" else [expected], strict=True
        ):
            assert_close(value.reshape(np.shape(right)), np.asarray(right), 1e-12)


def test_the_step_is_adams_first_by_its_equations():
    found = trace(*instance("LoRALinear", rank=2), lr=0.03)
    gradients = {slope.name: slope.gradient for slope in found.slopes}
    assert found.step.keys() == {"lora_A", "lora_B"}
    for name, lines in found.step.items():
        g, theta = gradients[name], found.given[f"adapter.{name}"]
        m, v, m_hat, v_hat, new = (next(iter(line.values.values())) for line in lines)
        assert [line.equation for line in lines] == ["20", "21", "22", "23", "24"]
        for value, right in ((m, 0.1 * g), (v, 0.001 * g * g), (m_hat, g), (v_hat, g * g)):
            assert_close(value, right, 1e-12)
        assert_close(new, theta - 0.03 * g / (abs(g) + 1e-8), 1e-12)


def test_the_loss_after_the_step_is_the_stepped_layers():
    layer, x, target = by_pencil()
    found = trace(layer, x, target, lr=0.2)
    A, B = (np.array(found.step[name][-1].values["theta"]) for name in ("lora_A", "lora_B"))
    before, after = found.losses
    assert (before, found.lr) == (12, 0.2)
    y = x @ layer.base.weight.T + 2 * x @ A.T @ B.T
    assert after == pytest.approx(((y - target) ** 2).mean(), rel=1e-12)


def test_what_is_given_stays_as_it_was():
    for name in ("Linear, DoRA", "MLP", "Conv1d, LoRA"):
        layer, x, target = instance(name)
        kept = {key: p.copy() for key, p in layer.trainable().items()}
        found = trace(layer, x, target)
        assert all((p == kept[key]).all() for key, p in layer.trainable().items())
        assert set(found.step) == set(kept)


# --- of every layer: all that ran, and only that ---

EQUATION = re.compile(r"# eq\. \(([\w.]+)\)")


def numbered_lines_that_run(layer, x, target):
    """Return file and number of each line with an equation's number that a step executes, seen by a plain tracer."""
    executed = set()

    def tracer(frame, event, arg):
        if event == "line":
            executed.add((frame.f_code.co_filename, frame.f_lineno))
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        y, cache = layer.forward(x)
        _, grads = layer.backward(minilora.mse(y, target)[1], cache)
        if grads:
            Adam(layer.trainable()).step(grads)
    finally:
        sys.settrace(before)
    files = {file: Path(file).read_text(encoding="utf-8").splitlines() for file, _ in executed if Path(file).is_file()}
    return {
        (Path(file).relative_to(ROOT).as_posix(), line, EQUATION.search(files[file][line - 1])[1])
        for file, line in executed
        if file in files and EQUATION.search(files[file][line - 1])
    }


@NAMES
def test_every_numbered_line_that_runs_is_in_the_trace(name):
    found = lines_of(trace(*instance(name)))
    assert {(line.file, line.line, line.equation) for line in found} == numbered_lines_that_run(*instance(name))
    for line in found:
        source = (ROOT / line.file).read_text(encoding="utf-8").splitlines()[line.line - 1]
        assert line.code == source.strip().partition("  # eq. (")[0]
        assert line.values


@NAMES
def test_gradients_slopes_and_differences_of_the_loss_agree(name):
    """The measured slopes are held to a difference of losses of our own, along one direction through all arrays."""
    layer, x, target = instance(name)
    found = trace(layer, x, target)
    arrays = layer.trainable() | ({} if x.dtype.kind == "i" else {"x": x})
    assert {slope.name for slope in found.slopes} == arrays.keys()
    rng = np.random.default_rng(1)
    predicted, way = 0.0, {}
    for slope in found.slopes:
        assert slope.gradient.shape == slope.measured.shape == arrays[slope.name].shape
        assert abs(slope.difference).max() < 1e-12
        assert (slope.difference == slope.gradient - slope.measured).all()
        way[slope.name] = rng.standard_normal(slope.gradient.shape)
        predicted += (way[slope.name] * slope.measured).sum()
    losses = []
    for h in (1e-5, -1e-5):
        for key, d in way.items():
            arrays[key] += h * d
        losses.append(((layer(x) - target) ** 2).mean())
        for key, d in way.items():
            arrays[key] -= h * d
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(predicted, rel=1e-5, abs=1e-8)


def test_each_line_names_the_layer_that_computes():
    layer, x, target = instance("MLP, LoRA on fc1")
    found = trace(layer, x, target)
    paths = {path for path, _ in walk(layer)}
    assert {line.layer for line in (*found.forward, *found.backward)} <= paths
    where = [(line.equation, line.layer, line.function) for line in found.forward]
    assert where[:4] == [
        ("1", "fc1.adapter", "LoRA.forward"),
        ("2", "fc1.adapter", "LoRA.forward"),
        ("7", "fc1.base", "Linear.forward"),
        ("11", "fc1", "LoRALinear.forward"),
    ]
    assert where[-1] == ("seq.1", "", "Sequential.forward")
    assert {line.layer for line in found.loss} == {""}
    rotated = trace(*instance("Attention"))
    assert {line.layer for line in rotated.forward if line.function == "rotate"} == {
        "rotary"
    }  # no method: its caller's


def test_given_are_all_arrays_and_numbers_of_the_layer():
    layer, x, target = instance("Conv2d, LoRA")
    given = trace(layer, x, target).given
    for path, part in walk(layer):
        for name, value in vars(part).items():
            if isinstance(value, np.ndarray) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
                assert (given[f"{path}.{name}".strip(".")] == value).all()
    assert given["adapter.scaling"] == layer.adapter.scaling
    assert given["base.stride"].tolist() == [2, 1]
    assert given.keys() >= {"x", "target", "base.weight", "base.bias"}


def test_an_array_under_two_names_takes_one_step():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((3, 3))
    tied = MLP(fc1=Linear(W), act=Tanh(), fc2=Linear(W))
    found = trace(tied, rng.standard_normal((4, 3)), rng.standard_normal((4, 3)))
    assert [slope.name for slope in found.slopes] == ["x", "fc1.weight"]
    assert list(found.step) == ["fc1.weight"]
    assert max(abs(slope.difference).max() for slope in found.slopes) < 1e-12
    separate = [line.values["grads['weight']"] for line in found.backward if line.equation == "8"]
    assert_close(found.slopes[1].gradient, sum(separate), 1e-12)


def test_drawn_numbers_are_short_and_differ_by_seed():
    layer, x, target = instance("LoRALinear", rank=3)
    for array in (x, target, *layer.trainable().values(), layer.base.weight):
        assert (array == array.round(1)).all()
        assert array.all()
    assert instance("LoRALinear")[0].rank == 1
    assert layer.rank == 3
    assert layer.scaling == 2
    assert (x.shape, target.shape) == ((2, 3), (2, 2))
    other = instance("LoRALinear", rank=3, seed=1)
    assert (other[1] != x).any()
    assert all((a == b).all() for a, b in zip(instance("LoRALinear", rank=3)[1:], (x, target), strict=True))


def test_a_tenth_stands_for_each_zero_that_is_drawn():
    _, x, _ = drawn_layer(lambda d: (Tanh(), d.randn(9, 900)))
    assert not (x == 0).any()
    assert 1.5 < (x == 0.1).sum() / (x == -0.1).sum() < 2.5


def test_a_wrong_gradient_shows_by_how_much(monkeypatch):
    right = LoRA.backward

    def wrong(self, *given, **options):
        dx, grads = right(self, *given, **options)
        return dx, grads | {"lora_A": 1.5 * grads["lora_A"]}

    monkeypatch.setattr(LoRA, "backward", wrong)
    slopes = {slope.name: slope for slope in trace(*by_pencil()).slopes}
    assert_close(slopes["lora_A"].difference, np.array([[-5.0, 7]]), 1e-12)
    assert_close(slopes["lora_A"].measured, np.array([[-10.0, 14]]), 1e-12)
    assert abs(slopes["lora_B"].difference).max() < 1e-12


def test_a_kinked_forward_is_measured_by_differences():
    class Absolute(Layer):
        takes = "..."

        def forward(self, x):
            return np.abs(x), (x,)

        def backward(self, dy, cache, *, need_dx=True):
            return dy * np.sign(cache[0]), {}

    x = np.array([[0.5, -2.0], [1.5, 3.0]])
    found = trace(Absolute(), x, np.zeros((2, 2)))
    assert found.method == "central"
    assert_close(found.slopes[0].measured, x / 2, 1e-8)
    assert trace(Tanh(), x, np.zeros((2, 2))).method == "complex"
    assert found.step == {}
    assert found.losses[0] == found.losses[1]


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda layer, x, t: (layer, x, t[:, :1]), "target has shape"),
        (lambda layer, x, t: (layer, x.astype("f4"), t), "x has dtype float32"),
        (lambda layer, x, t: ({"layer": layer}, x, t), "layer must be"),
    ],
)
def test_what_does_not_fit_is_refused(of, message):
    with pytest.raises((ValueError, TypeError), match=message):
        trace(*of(*by_pencil()))


def test_single_precision_is_refused():
    single = Linear(np.ones((2, 2), "f4"))
    with pytest.raises(CheckRefused, match="expected float64"):
        trace(single, np.ones((3, 2), "f4"), np.zeros((3, 2), "f4"))


@pytest.mark.parametrize(
    ("drawing", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 101}, "rank must be at most 100, got 101"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_a_drawing_out_of_range_is_refused(drawing, said):
    with pytest.raises(ValueError, match=said):
        instance("LoRA", **drawing)


# --- how lines are recorded ---


LAST = -1


@dataclass(eq=False, repr=False)
class Own(Layer):
    """A layer of another package, with each form of a numbered line."""

    gain: Annotated[np.ndarray, "in"]
    words: tuple = ("no", "number")
    empty: tuple = ()

    def forward(self, x):
        total = sum(
            part.sum()  # the inside of a comprehension is no line of its own
            for part in x
        )  # eq. (own.1)
        y: np.ndarray = x * self.gain  # eq. (own.2)
        y += 0 * total  # eq. (own.3)
        for _ in range(2):
            a, b = y - 1, y + 1  # eq. (own.4)
        z = np.zeros_like(y)
        for i in range(2):
            z[i] = i * y[i]  # eq. (own.11)
        z[LAST] = 7  # eq. (own.12)
        np.add(y, a + b - 2 * y, out=y)  # eq. (own.5)
        try:
            y = self.fails()  # eq. (own.6)
        except KeyError:
            kept = {"x": x, "of": {"y": y}}  # eq. (own.7)
        _, given = None, print(end="")  # eq. (own.8)
        print(end="", file=given)  # eq. (own.10)
        y.shape  # eq. (own.13)  # noqa: B018
        return y, (kept["x"],)

    def fails(self):
        return {}["nothing"]

    def backward(self, dy, cache, *, need_dx=True):
        (x,) = cache
        return self.input_gradient(dy), {"gain": rows(dy * x).sum(axis=0)}

    def input_gradient(self, dy):
        if True:
            return dy * self.gain  # eq. (own.9)

    shape = property(lambda self: self.gain.shape * 2)


def test_each_form_of_a_numbered_line_is_recorded():
    x, gain = np.array([[1.0, 2], [3, 5]]), np.array([2.0, 3])
    found = trace(Own(gain), x, np.zeros((2, 2)))
    y = x * gain
    expected = [
        ("own.1", {"total": 11}),
        ("own.2", {"y": y}),
        ("own.3", {"y": y}),
        ("own.4", {"a": y - 1, "b": y + 1}),
        ("own.4", {"a": y - 1, "b": y + 1}),
        ("own.11", {"z[i]": 0 * y[0]}),
        ("own.11", {"z[i]": y[1]}),
        ("own.12", {"z[LAST]": [7, 7]}),
        ("own.5", {"y": y}),
        ("own.7", {"kept.x": x, "kept.of.y": y}),
        ("own.8", {"_": None, "given": None}),
        ("own.10", {}),
        ("own.13", {}),
    ]
    assert [line.equation for line in found.forward] == [equation for equation, _ in expected]  # own.6 did not end
    for line, (_, values) in zip(found.forward, expected, strict=True):
        assert line.values.keys() == values.keys()
        assert all(np.all(line.values[key] == value) for key, value in values.items())
        assert (Path(line.file).name, line.function, line.layer) == ("test_trace.py", "Own.forward", "")
    assert found.forward[0].code == "total = sum( part.sum() for part in x )"
    assert all(value is None for value in found.forward[-3].values.values())
    assert found.given.keys() == {"x", "target", "gain"}
    (returned,) = found.backward
    assert returned.code == "return dy * self.gain"
    assert_close(returned.values["return"], y / 2 * gain, 1e-12)
    assert abs(found.slopes[0].difference).max() < 1e-12


def test_values_are_kept_as_they_were_when_the_line_ran():
    """Adam changes m_hat in place in a later line."""
    lines = {line.equation: line for line in trace(*by_pencil()).step["lora_A"]}
    assert_close(lines["22"].values["m_hat"], np.array([[-10.0, 14]]), 1e-12)


def test_code_of_a_page_without_source_is_passed_over():
    space = {}
    exec(compile("def f(x):\n    y = 2 * x  # eq. (1)\n    return y", "no such file.py", "exec"), space)
    assert record(space["f"], 3.0, paths={}) == (6.0, [])


def test_a_file_that_is_no_python_is_passed_over(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text about it:\n\n    y = 2 * x  # eq. (1)\n")
    space = {}
    exec(compile("\n\ndef f(x):\n    y = 2 * x\n    return y", str(page), "exec"), space)
    assert record(space["f"], 3.0, paths={}) == (6.0, [])


@pytest.mark.parametrize("fails", [False, True])
def test_the_tracer_that_was_set_is_put_back(monkeypatch, fails):
    def another(frame, event, arg):
        return None

    if fails:
        monkeypatch.setattr(LoRA, "forward", lambda self, x: {}["nothing"])
    before = sys.gettrace()
    sys.settrace(another)
    try:
        if fails:
            with pytest.raises(KeyError):
                trace(*by_pencil())
        else:
            trace(*by_pencil())
        assert sys.gettrace() is another
    finally:
        sys.settrace(before)
    assert isinstance(by_pencil()[0], LoRALinear)
    assert not isinstance(by_pencil()[0], DoRA)
