"""What the recipes claim, on the page's own code, which runs here once."""

import contextlib
import io
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import adapters, attach, cross_entropy, evaluate, load_adapter, mse
from minilora.fast import accumulate
from minilora.training import backpropagate

pytestmark = pytest.mark.long

PAGE = (Path(__file__).parents[2] / "docs" / "library" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.S | re.M)


@pytest.fixture(scope="module")
def page():
    """Run the page."""
    names = {"__name__": "recipes"}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for code in BLOCKS:
            exec(compile(code, "recipes.md", "exec"), names)
    yield SimpleNamespace(**names, printed=out.getvalue())
    shutil.rmtree(names["folder"])


def length(grads):
    return np.linalg.norm(np.concatenate([np.ravel(g) for g in grads.values()]))


def test_a_recipe_is_at_most_twenty_lines():
    for code in BLOCKS:
        lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import ", "from "))]
        assert len(lines) <= 20


def test_the_rate_warms_up_and_ends_at_zero(page):
    rates = np.array([page.rate(t) for t in range(page.STEPS + 1)])
    steps = np.diff(rates)
    np.testing.assert_allclose(steps[: page.WARM], page.PEAK / page.WARM, rtol=1e-12)
    assert rates.argmax() == page.WARM
    assert (steps[page.WARM :] < 0).all()
    middle = (page.WARM + page.STEPS) // 2
    assert rates[middle] == pytest.approx(page.PEAK / 2, rel=1e-12)
    assert rates[-1] == 0


def test_the_loop_is_the_formulas_of_adamw(page):
    """Rank 4, alpha 8, from the same start on the same batches, with the matrices written out."""
    A, B = page.A0.copy(), np.zeros((40, 4))
    m, v = [np.zeros_like(A), np.zeros_like(B)], [np.zeros_like(A), np.zeros_like(B)]
    fc1, fc2 = page.model.fc1, page.model.fc2
    clipped = 0
    for t, batch in enumerate(page.batches, 1):
        x, y = page.X[batch], page.Y[batch]
        before = x @ (fc1.weight + 2 * B @ A).T + fc1.bias
        dz = 2 / y.size * (np.maximum(before, 0) @ fc2.weight.T + fc2.bias - y) @ fc2.weight * (before > 0)
        dW = dz.T @ x
        grads = {"A": 2 * B.T @ dW, "B": 2 * dW @ A.T}
        scale = min(1.0, page.MOST / length(grads))
        clipped += scale < 1
        lr = page.rate(t)
        for i, (p, g) in enumerate(((A, grads["A"]), (B, grads["B"]))):
            g = g * scale
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            p -= lr * page.DECAY * p + lr * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    hidden = np.maximum(page.X_held @ (fc1.weight + 2 * B @ A).T + fc1.bias, 0)
    loss = ((hidden @ fc2.weight.T + fc2.bias - page.Y_held) ** 2).mean()
    assert f"after: {loss:.6f}\n" in page.printed
    assert 0 < clipped < len(page.batches)


def test_accumulation_takes_the_place_of_backpropagation(page):
    whole = backpropagate(page.again, page.X, page.Y)
    parts = accumulate(4)(page.again, page.X, page.Y, mse)
    for name, g in whole.items():
        np.testing.assert_allclose(parts[name], g, rtol=1e-9, atol=1e-15)


def test_answers_and_their_ends_count_and_nothing_else_does(page):
    for prompt, x, y in zip(page.prompts, page.ids, page.targets, strict=True):
        counted = np.flatnonzero(y != page.IGNORED)
        assert list(y[counted]) == [prompt.max(), page.END]
        assert list(x[: len(prompt) + 1]) == [*prompt, prompt.max()]
        assert list(counted) == [len(prompt) - 1, len(prompt)]
    _, dz = cross_entropy(page.chat(page.ids[:20]), page.targets[:20])
    assert ((dz != 0).any(axis=-1) == (page.targets[:20] != page.IGNORED)).all()


def test_what_fills_up_changes_no_gradient(page):
    other = page.ids[:20].copy()
    for prompt, x in zip(page.prompts, other, strict=False):
        x[len(prompt) + 1 :] = 7
    assert (other != page.ids[:20]).any()
    one, two = (backpropagate(page.chat, ids, page.targets[:20], cross_entropy) for ids in (page.ids[:20], other))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_stopping_kept_the_best_and_did_not_wait_longer(page):
    assert page.best < page.last
    assert page.epoch == page.best_epoch + page.PATIENCE < 200
    kept = attach(page.model, load_adapter(page.folder / "monday"))
    assert evaluate(kept, page.X_held, page.Y_held) == page.best


def test_a_continued_adapter_begins_where_the_file_ends(page):
    monday, tuesday = (load_adapter(page.folder / day) for day in ("monday", "tuesday"))
    moved = [np.abs(tuesday[path].lora_B - monday[path].lora_B).max() for path in monday]
    assert min(moved) > 1e-3
    assert np.array_equal(attach(page.model, tuesday)(page.X), page.again(page.X))
    again = attach(page.model, monday)
    assert len(monday) == 2
    for path, adapter in monday.items():
        assert again.trainable()[f"{path}.lora_B"] is adapter.lora_B  # what was loaded trains


def test_the_sum_has_both_changes_in_its_file(page):
    monday, tuesday, both = (load_adapter(page.folder / name) for name in ("monday", "tuesday", "both"))
    assert list(both) == ["fc1", "fc2"] == list(adapters(page.summed))
    for path, adapter in both.items():
        wanted = 0.7 * monday[path].delta() + 0.3 * tuesday[path].delta()
        np.testing.assert_allclose(adapter.delta(), wanted, rtol=0, atol=1e-12)
