"""The page's reader of a few lines of NumPy gives what NumPy gives, and stops where NumPy stops."""

import warnings
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest

from .javascript import by_node, node

SCRIPT = Path(__file__).parents[2] / "docs" / "_static" / "numpy.js"


def arrays():
    rng = np.random.default_rng(4)
    shapes = {"x": (4, 3), "y": (4, 5), "A": (2, 3), "B": (5, 2), "Q": (3, 3), "v": (3,), "w": (4,), "T": (2, 3, 4)}
    return {name: rng.standard_normal(shape).round(3) for name, shape in shapes.items()} | {"s": 0.75}


def in_python(text, names):
    """Return the value of a text's last expression or `return`, or of its function, and the names' values after it."""
    known = {"np": np}
    if not text.startswith("def"):
        *before, last = text.split("\n")
        last = last if last.startswith(("return", " ")) else f"return {last}"
        text = f"def f({', '.join(names)}):\n" + "".join(f"    {line}\n" for line in [*before, last])
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        exec(text, known)
        return known["f"](*names.values()), [*names.values()]


def alike(found, value):
    if isinstance(value, (tuple, list)):
        return isinstance(found, list) and len(found) == len(value) and all(map(alike, found, value))
    numbers = np.array([float(number.replace("Infinity", "inf")) for number in found["data"]])
    return tuple(found["shape"]) == np.shape(value) and np.allclose(
        numbers, np.ravel(np.asarray(value, float)), rtol=1e-10, atol=1e-12, equal_nan=True
    )


def compared(texts):
    """Hold each text against Python; return how many gave a value, and how many stopped."""
    names = arrays()
    lists = {name: np.asarray(value).tolist() for name, value in names.items()}
    counted = Counter()
    for text, found in zip(texts, node("numpy.mjs", SCRIPT, names=lists, texts=texts), strict=True):
        if "not read here" in found.get("error", ""):
            counted["not read"] += 1
            continue
        stopped = None
        try:
            value, after = in_python(text, deepcopy(names))
        except Exception as error:
            stopped = error
        if isinstance(stopped, AttributeError):  # Python's own numbers have no .T: here each number is an array
            continue
        if stopped:
            assert found.get("kind") == "Error", (text, stopped, found)
            assert "undefined" not in found["error"], (text, found)
            counted["stopped"] += 1
            continue
        assert "error" not in found, (text, found)
        assert alike(found["value"], value), (text, found["value"], value)
        assert all(map(alike, found["after"], after)), text
        counted["value"] += 1
    return counted


INDICES = ["0", "-1", "1", "1:", ":2", ":-1", "::2", "::-1", ":", "None", "...", "2:0:-1", "3:1", "-2:", "7"]


def expressions(seed, count):
    """Return generated expressions: each is made of those before it, and NumPy says which have a value."""
    rng, names = np.random.default_rng(seed), arrays()
    pool, texts = [*names, "2", "0.5", "3"], []

    def some():
        return rng.choice(pool if rng.random() < 0.5 else pool[:9])

    def one(choices):
        return choices[rng.integers(len(choices))]

    while len(texts) < count:
        a, b, axis = some(), some(), one(["0", "1", "-1", "None", "2", "(0, 1)"])
        fold = one(["sum", "mean", "max", "min", "prod"])
        keep = one(["", ", keepdims=True", ", keepdims=False"])
        index = ", ".join(one(INDICES) for _ in range(rng.integers(1, 4)))
        text = one(
            [
                *(f"({a} {sign} {b})" for sign in ("+", "-", "*", "/", "@", "@", "@")),
                *(f"({a})**2", f"-({a})", f"({a}).T", f"({a}).T", f"({a})[{index}]", f"({a})[{index}]"),
                *(f"({a}).{fold}(axis={axis}{keep})", f"np.{fold}({a}, {axis}{keep})", f"({a}).{fold}()"),
                *(f"np.exp(-({a})**2)", f"np.sqrt(np.abs({a}))", f"np.log(1 + ({a})**2)", f"np.tanh({a})"),
                *(f"np.linalg.norm({a}, axis={axis}{keep})", f"np.outer({a}, {b})", f"np.diag({a})", f"np.square({a})"),
                *(f"({a}).dot({b})", f"np.maximum({a}, {b})", f"np.multiply({a}, {b})", f"np.transpose({a})"),
                *(f"({a}).reshape(-1)", f"({a}).reshape({one(['3, -1', '(-1, 2)', '4, 3', '2, -1, 1'])})"),
                *(f"np.zeros_like({a}) + {b}", f"np.ones(({a}).shape) * {b}", f"np.eye(3) - {a}", f"({a}).copy()"),
                *(f"({a}).shape[{one(['0', '-1', '1'])}] * {b}", f"({a}).size + {b}", f"len({a}) * {b}", f"({a}).ndim"),
                *(f"np.einsum('ij,jk->ik', {a}, {b})", f"np.einsum('ij,ik->jk', {a}, {b})", f"np.einsum('ii->i', {a})"),
                *(f"np.expand_dims({a}, {one(['0', '1', '-1'])})", f"np.array([{a}, {b}])", f"({a}).ravel()[::-1]"),
                *(f"{a} // 0.3", f"{a} % 0.7", f"np.sign({a})", f"np.minimum({a}, 0)", f"({a}).flatten()"),
            ]
        )
        if text in texts or len(text) > 90:
            continue
        try:
            value, _ = in_python(text, deepcopy(names))
        except Exception:
            if rng.random() < 0.15:
                texts.append(text)
            continue
        if not np.size(value) or not np.isfinite(value).all() or np.abs(value).max() > 1e6:
            continue  # an empty array has no maximum, and rounding in a large number is a large number
        texts.append(text)
        if np.size(value) < 200:
            pool.append(text)
    return texts


@by_node
@pytest.mark.parametrize("seed", range(2))
def test_generated_expressions_give_what_numpy_gives(seed):
    counted = compared(expressions(seed, 800))
    assert counted["value"] > 400
    assert counted["stopped"] > 40
    assert counted["not read"] < 80


def dimensions(text, names):
    try:
        return np.ndim(in_python(text, deepcopy(names))[0])
    except Exception:
        return 1


STATEMENTS = [
    *("t = {e}", "t = {e}\nu = t.T", "u = {e}", "t += {e}", "t *= {e}", "u -= {e}", "t[{i}] = {e}", "u[{i}] += {e}"),
    *("t, u = {e}, {e}", "(t, u) = {e}, {e}", "t = u = {e}", "u = t[{i}]", "x += {e}", "y[{i}] = 0", "t = t.copy()"),
    *(
        "for i in range({n}):\n    t = t + {e}",
        "for i in range({n}):\n    u[i] = {e}",
        "t = {e}  # so",
        "t = ({e}\n  )",
    ),
    *(
        "for i in range(2):\n    for j in range({n}):\n        t[i, j] += x[j, i]",
        "def g(a):\n  return a * 2\nt = g({e})",
    ),
    *("g = lambda a, b: a + b\nu = g(t, {e})", "u = t; t = {e}", "a, b, c = x.shape", "n, m = x.shape\nt = t * n / m"),
    *(
        "for a, b in [(1, 2), (3, 4)]:\n    t = t * a - b",
        "U, S, V = np.linalg.svd(x, False)\nt = U * S @ V",
    ),
]


@by_node
def test_generated_lines_give_and_change_what_numpy_does():
    rng = np.random.default_rng(9)
    names = arrays()
    parts = [text for text in expressions(11, 300) if len(text) < 40 and 0 < dimensions(text, names) < 3]
    programs = []
    for _ in range(900):
        lines = [f"t = {rng.choice(parts)}", f"u = {rng.choice(parts)}"]
        for _ in range(rng.integers(1, 5)):
            statement = str(rng.choice(STATEMENTS))
            while "{e}" in statement:
                statement = statement.replace("{e}", rng.choice(parts), 1)
            index = ", ".join(rng.choice(INDICES, rng.integers(1, 3)))
            lines.append(statement.replace("{i}", index).replace("{n}", str(rng.integers(4))))
        lines.append(str(rng.choice(["t", "u", "return t", "return t, u", "t, u", "(u, t)", "t.sum()"])))
        programs.append("\n".join(lines))
    counted = compared(programs)
    assert counted["value"] > 200
    assert counted["stopped"] > 100
    assert counted["not read"] < 90


@by_node
def test_singular_values_are_numpys_with_any_directions():
    for shape in ((5, 7), (7, 5), (4, 4), (3, 1), (1, 3)):
        for matrix in (np.random.default_rng(1).standard_normal(shape), np.ones(shape)):
            for full in (True, False):
                text = f"np.linalg.svd(M, full_matrices={full})"
                (found,) = node("numpy.mjs", SCRIPT, names={"M": matrix.tolist()}, texts=[text])
                U, S, Vt = (np.reshape([float(v) for v in part["data"]], part["shape"]) for part in found["value"])
                assert [part.shape for part in (U, S, Vt)] == [p.shape for p in np.linalg.svd(matrix, full)]
                assert np.allclose(S, np.linalg.svd(matrix)[1], atol=1e-12)
                assert np.allclose(U[:, : len(S)] * S @ Vt[: len(S)], matrix, atol=1e-12)
                assert np.allclose(Vt @ Vt.T, np.eye(len(Vt)), atol=1e-12)
                assert np.allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-9) or np.linalg.matrix_rank(matrix) < min(shape)
