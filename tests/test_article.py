"""The article's experiment, small enough for a test; `.ci/nightly` runs it at full length."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from minilora import CheckpointError, Linear, LoRALinear, article, get_backend, training
from minilora.article import ARTICLE_BASE_LOSSES, ARTICLE_EPOCHS, ARTICLE_LORA_LOSSES
from minilora.backend import Backend
from minilora.training import backpropagate, train

SMALL = {"n": 1280, "in_features": 21, "out_features": 20, "lr": 0.01}


@pytest.fixture(scope="module")
def result():
    return article.run(**SMALL)


def test_the_base_learns_the_task_and_the_adapter_the_shift(result):
    for history in (result.base_history, result.lora_history):
        assert history.epochs == list(ARTICLE_EPOCHS)
        assert all(b < a for a, b in zip(history.losses[:5], history.losses[1:6], strict=True))
    assert result.base_history.losses[-1] < 0.01
    assert result.lora_history.losses[-1] < 0.02
    assert np.abs(result.delta - 1).max() < 0.1


def test_the_bases_loss_on_the_new_task_is_its_inputs(result):
    """Its error is the sum of a row of 21 Gaussians: the mean of its square over 1,280 rows is 21 give or take 1."""
    assert result.shifted_loss == pytest.approx(21, abs=4)


def test_the_merged_layer_is_as_good_as_base_and_adapter(result):
    assert result.merged_loss == pytest.approx(result.lora_history.losses[-1], rel=1e-3)
    np.testing.assert_allclose(result.merged.weight, result.base.weight + result.delta, atol=1e-6)


def by_hand(*, n, in_features, out_features, rank, alpha, epochs, batch_size, lr, seed):
    """The article's text in plain NumPy: its order of draws, its data, two trainings, what is measured."""
    rng, scaling = np.random.default_rng(seed), alpha / rank

    def adam(params, gradients, loss, x, y):
        m, v, t, losses = [0.0] * len(params), [0.0] * len(params), 0, []
        for epoch in range(1, epochs + 1):
            for _ in range(n // batch_size):
                batch, t = rng.choice(n, batch_size, replace=False, shuffle=False), t + 1
                for i, g in enumerate(gradients(x[batch], y[batch])):
                    m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
                    params[i] -= lr * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
            if epoch % 10 == 0 or epoch == epochs:
                losses.append(loss(x, y))
        return losses

    def mean_square(error):
        return (error**2).sum() / error.size

    theta, X = rng.standard_normal((in_features, out_features)), rng.standard_normal((n, in_features))
    bound = 1 / math.sqrt(in_features)
    W = rng.uniform(-bound, bound, (out_features, in_features))

    def base_gradients(x, y):
        return [2 / y.size * (x @ W.T - y).T @ x]

    base_losses = adam([W], base_gradients, lambda x, y: mean_square(x @ W.T - y), X, X @ theta)

    X2 = rng.standard_normal((n, in_features))
    Y2 = X2 @ (theta + 1)
    A, B = rng.standard_normal((rank, in_features)), np.zeros((out_features, rank))

    def adapter_gradients(x, y):
        error = 2 / y.size * (x @ W.T + scaling * x @ A.T @ B.T - y)
        return [scaling * B.T @ error.T @ x, scaling * error.T @ x @ A.T]

    def adapted_loss(x, y):
        return mean_square(x @ W.T + scaling * x @ A.T @ B.T - y)

    shifted_loss = mean_square(X2 @ W.T - Y2)
    lora_losses = adam([A, B], adapter_gradients, adapted_loss, X2, Y2)
    delta = scaling * B @ A
    return SimpleNamespace(
        base_losses=base_losses, base=W, shifted_loss=shifted_loss, lora_losses=lora_losses, A=A, B=B, delta=delta,
        merged=W + delta, merged_loss=mean_square(X2 @ (W + delta).T - Y2), X2=X2, Y2=Y2,
    )  # fmt: skip


RUNS = (
    {"n": 70, "in_features": 5, "out_features": 3, "rank": 1, "alpha": 1.0, "epochs": 12, "batch_size": 16, "lr": 0.02},
    {"n": 31, "in_features": 4, "out_features": 6, "rank": 3, "alpha": 7.0, "epochs": 3, "batch_size": 31, "lr": 0.1},
)


@pytest.mark.parametrize(("settings", "seed"), list(zip(RUNS, (0, 5), strict=True)))
def test_a_run_is_the_articles_text_in_plain_numpy(settings, seed):
    run, plain = article.run(**settings, seed=seed, dtype="float64"), by_hand(**settings, seed=seed)
    logged = [e for e in range(1, settings["epochs"] + 1) if e % 10 == 0 or e == settings["epochs"]]
    assert run.base_history.epochs == run.lora_history.epochs == logged
    assert run.base.bias is run.merged.bias is None
    for ours, theirs in (
        (run.base_history.losses, plain.base_losses),
        (run.base.weight, plain.base),
        (run.shifted_loss, plain.shifted_loss),
        (run.lora_history.losses, plain.lora_losses),
        (run.adapter.lora_A, plain.A),
        (run.adapter.lora_B, plain.B),
        (run.delta, plain.delta),
        (run.merged.weight, plain.merged),
        (run.merged_loss, plain.merged_loss),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


@pytest.mark.parametrize("settings", [*RUNS, RUNS[1] | {"rank": 16}])  # at rank 16 the base runs in each step
def test_the_short_way_trains_what_the_plain_one_trains(settings, monkeypatch):
    short = article.run(**settings, dtype="float64")
    monkeypatch.setattr(article, "residual_form", backpropagate)
    plain = article.run(**settings, dtype="float64")
    assert short.lora_history.epochs == plain.lora_history.epochs
    for ours, theirs in (
        (short.lora_history.losses, plain.lora_history.losses),
        (short.adapter.lora_A, plain.adapter.lora_A),
        (short.adapter.lora_B, plain.adapter.lora_B),
        (short.merged_loss, plain.merged_loss),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_an_adapted_layer_trains_and_its_base_keeps_its_bits(monkeypatch):
    trained = []

    def watched(model, X, Y, **options):
        before = {name: p.copy() for name, p in model.trainable().items()}
        kept = None if type(model) is Linear else model.base.weight.copy()
        history = train(model, X, Y, **options)
        trained.append((model, kept, before))
        return history

    monkeypatch.setattr(article, "train", watched)
    run = article.run(**SMALL, epochs=2)
    (base, _, _), (layer, kept, before) = trained
    assert type(layer) is LoRALinear
    assert layer.base is base is run.base
    assert layer.adapter is run.adapter
    assert run.base.weight.tobytes() == kept.tobytes()
    assert before.keys() == {"lora_A", "lora_B"}
    assert all((run.adapter.trainable()[name] != p).all() for name, p in before.items())


def test_the_loss_at_the_end_is_the_merged_layers(monkeypatch):
    """With a merged layer that is a little off, the loss is that layer's, on the new task."""
    settings, real = RUNS[0], LoRALinear.merge
    monkeypatch.setattr(LoRALinear, "merge", lambda self: Linear(real(self).weight + 0.25))
    plain, run = by_hand(**settings, seed=0), article.run(**settings, dtype="float64")
    expected = ((plain.X2 @ (plain.merged + 0.25).T - plain.Y2) ** 2).mean()
    assert run.merged_loss == pytest.approx(expected, rel=1e-9)


def test_one_seed_gives_one_run():
    one, two, other = (article.run(**SMALL, epochs=2, seed=seed) for seed in (1, 1, 2))
    assert one.lora_history == two.lora_history != other.lora_history
    np.testing.assert_array_equal(one.delta, two.delta)


def test_every_precision_has_the_same_data_and_start():
    single, double = (article.run(**SMALL, epochs=2, dtype=dtype) for dtype in ("float32", "float64"))
    assert single.delta.dtype == np.float32
    assert double.delta.dtype == np.float64
    assert single.lora_history.losses == pytest.approx(double.lora_history.losses, rel=1e-4)


def test_a_larger_rank_has_more_parameters_and_the_same_scale():
    result = article.run(**SMALL, epochs=1, rank=4, alpha=2)
    assert (result.adapter.rank, result.adapter.scaling) == (4, 0.5)


REPORT = """\
Understanding LoRA with a minimal example
(rank 1, alpha 1, 20 epochs, batches of 128, lr 0.01, seed 0, float32, {device})

1. Simulate y = x theta, theta of 21 x 20.
2. Train the base, 420 parameters:

   epoch          loss       article
{base}   ({run.base_seconds:.1f} s)

3. A new task: theta + 1.
4. The base's loss on it: {run.shifted_loss:.3f}   (article 992.673, expectation 21)
5. Train an adapter, 41 parameters, 1/10 of the base's:

   epoch          loss       article
{lora}   ({run.lora_seconds:.1f} s)

6. What it learned, delta[:5, :5]; the truth is 1 everywhere:

{corner}
   all 420 entries lie between {low:.4f} and {high:.4f}

7. Merged into one layer, loss {run.merged_loss:.7g}   (article 0.00130013)
"""


def test_the_report_has_the_articles_figures_beside_ours():
    def rows(history, theirs):
        losses = zip((10, 20), history.losses, theirs[:2], strict=True)
        return "".join(f"   {epoch:5d} {ours:13.7g} {other:13.7g}\n" for epoch, ours, other in losses)

    result = article.run(**SMALL, epochs=20)
    assert result.told == REPORT.format(
        run=result, device=get_backend("numpy").device, low=result.delta.min(), high=result.delta.max(),
        base=rows(result.base_history, ARTICLE_BASE_LOSSES), lora=rows(result.lora_history, ARTICLE_LORA_LOSSES),
        corner="\n".join("   " + " ".join(f"{v:8.4f}" for v in row) for row in result.delta[:5, :5]),
    )  # fmt: skip


def test_an_epoch_the_article_did_not_print_has_a_dash():
    text = article.run(**SMALL, epochs=3).told
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("       3 ")] == ["-", "-"]


def test_the_report_is_told_as_it_goes(tmp_path):
    """Each loss is told before the next epoch, also the last one; of a training that goes on those before it too."""
    told, at, right = [], [], training.draw_batches
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "draw_batches", lambda *a: at.append(len(told)) or right(*a))
        run = article.run(**SMALL, epochs=21, tell=told.append, checkpoint=tmp_path / "c")
    assert "".join(told) == run.told
    heads = [number for number, text in enumerate(told) if "epoch" in text and "loss" in text]
    for head, begun in zip(heads, (at[:21], at[21:]), strict=True):
        assert [number - head for number in begun[1:]] == [1] * 9 + [2] * 10 + [3]
        assert [told[head + row].split()[0] for row in (1, 2, 3)] == ["10", "20", "21"]
    again = []
    article.run(**SMALL, epochs=21, tell=again.append, checkpoint=tmp_path / "c")
    with_another_time = [re.sub(r"\([\d.]+ s\)", "", "".join(texts)) for texts in (again, told)]
    assert with_another_time[0] == with_another_time[1]


def test_parameter_counts_at_the_articles_sizes():
    tiny = article.run(n=128, epochs=1)
    text = tiny.told
    assert "1,001,000 parameters" in text
    assert "2,001 parameters, 1/500 of the base's" in text
    assert "expectation 1001" in text


def test_a_checkpoint_of_another_library_is_refused_before_a_number(tmp_path):
    settings = {**SMALL, "epochs": 1, "checkpoint": tmp_path / "c"}
    article.run(**settings)
    with pytest.raises(CheckpointError, match="backend is 'numpy' there and 'cupy' here"):
        article.run(**settings, backend=Backend("cupy", None))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"alpha": 0}, "alpha must be above 0 and finite, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_what_is_out_of_range_is_refused_before_a_training(wrong, said, monkeypatch):
    monkeypatch.setattr(article, "train", None)
    with pytest.raises(ValueError, match=f"^{said}$"):
        article.run(**SMALL, **wrong)
