"""A language model's loss and gradients, computed only where targets count."""

import math
import re
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minilora import Llama, LoRALinear, adapters, cross_entropy, evaluate
from minilora.fast import accumulate
from minilora.fast.widths import by_width
from minilora.language.data import load_data
from minilora.language.llama import Decoder
from minilora.language.text import evaluate_where_it_counts, gradients_at_targets, next_token_loss
from minilora.layer import walk
from minilora.losses import IGNORE_INDEX
from minilora.training import backpropagate
from minilora.variants.dropout import with_dropout

from ..support.compare import calls_of
from ..support.language import LETTERS, adapted, of_lengths, tiny_llama, tiny_mixture


def test_the_loss_in_place_is_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((3, 4, 7)), rng.integers(7, size=(3, 4))
    expected = cross_entropy(logits.copy(), targets)
    loss, d_logits = next_token_loss(logits, targets)
    assert d_logits is logits
    assert loss == expected[0]
    np.testing.assert_array_equal(d_logits, expected[1])


# --- gradients with logits only where a target counts ---


def some_count(share, seed=0):
    """Return ids and targets of three short texts; about this share of the targets counts."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(LETTERS), (3, 9))
    return ids[:, :-1], np.where(rng.random((3, 8)) < share, ids[:, 1:], IGNORE_INDEX)


TRAINED = (["q_proj"], ["down_proj"], ["lm_head"], ["layers.1.self_attn.q_proj"], ["q_proj", "gate_proj", "lm_head"])
ALL = ["q_proj", "gate_proj", "down_proj", "lm_head"]


@given(
    make=st.sampled_from([tiny_llama, lambda: tiny_mixture("qwen2_moe")]),
    trained=st.sampled_from([*TRAINED, ALL]),
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    share=st.sampled_from([0.3, 0.7, 1]),
    dropout=st.sampled_from([0, 0.5]),
    part=st.sampled_from([None, (1, 1), (2, 1), (2, 2), (5, 1)]),
    cut=st.sampled_from([(), (by_width,)]),
)
@example(tiny_llama, ALL, [8, 8, 8], 1, 0, None, ())
@example(tiny_llama, ALL, [0, 0], 1, 0.5, (1, 1), (by_width,))
@example(tiny_llama, ALL, [3, 9, 0, 4, 1], 1, 0.5, (2, 2), (by_width,))
@example(lambda: tiny_mixture("qwen2_moe"), ALL, [7, 9], 0.7, 0.5, (1, 2), ())
@settings(max_examples=12)
def test_gradients_where_it_counts_are_those_of_all_logits(make, trained, lengths, share, dropout, part, cut):
    """This holds for every choice of what trains, in parts and on workers; dropout masks do not depend on the parts."""
    model, (X, Y), losses = adapted(trained, make()), of_lengths(lengths), []
    Y[np.random.default_rng(len(lengths)).random(Y.shape) >= share] = IGNORE_INDEX
    model = with_dropout(model, dropout, range(5, 5 + len(lengths))) if dropout else model
    few = max(1, (Y != IGNORE_INDEX).sum())

    def noting(logits, targets):
        value, dz = next_token_loss(logits, targets)
        losses.append(float(value) * (targets != IGNORE_INDEX).sum() / few)
        return value, dz

    gradients = gradients_at_targets if part is None else accumulate(*part, gradients_at_targets, *cut)
    found, expected = gradients(model, X, Y, noting), backpropagate(model, X, Y, next_token_loss)
    assert found.keys() == expected.keys() == model.trainable().keys()
    for name, g in found.items():
        assert np.abs(g - expected[name]).max() <= 1e-12
    plain, _ = model.forward(X)
    assert sum(losses) == pytest.approx(float(cross_entropy(plain, Y)[0]), abs=1e-12)


def test_where_every_target_counts_the_bits_are_the_same():
    model, (x, y) = adapted(), some_count(1)
    found, expected = gradients_at_targets(model, x, y, next_token_loss), backpropagate(model, x, y, next_token_loss)
    for name, g in found.items():
        np.testing.assert_array_equal(g, expected[name])


@pytest.mark.parametrize(("share", "workers"), [(0.1, None), (0.5, 2), (1, None)])
def test_evaluation_computes_logits_only_where_targets_count(share, workers, monkeypatch):
    model, (x, y) = adapted(), some_count(share)
    seen = calls_of(monkeypatch, type(model.lm_head), "__call__")
    loss = evaluate_where_it_counts(model, x, y, next_token_loss, workers)
    rows = [np.prod(h.shape[:-1]) for layer, h in seen if layer is model.lm_head]
    assert sum(rows) <= 2 * int((y != IGNORE_INDEX).sum()) + y.shape[1]  # the first rows are tried before
    monkeypatch.undo()
    assert loss == pytest.approx(evaluate(model, x, y, next_token_loss, workers), abs=1e-12)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=9), most=st.sampled_from([1, 20, 40, 512]))
@example(lengths=[0, 3], most=40)  # the first row, which is tried, has no target
@settings(max_examples=10)
def test_the_loss_of_any_lengths_is_that_of_all_logits(lengths, most):
    model, (X, Y) = adapted(), of_lengths(lengths, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minilora.language.text.EVALUATION_ROWS", most)
        if not any(lengths):
            with pytest.raises(ValueError, match="Y has no target that counts"):
                evaluate_where_it_counts(model, X, Y, next_token_loss)
            return
        loss = evaluate_where_it_counts(model, X, Y, next_token_loss)
    assert loss == pytest.approx(float(cross_entropy(model(X), Y)[0]), abs=1e-12)


@pytest.mark.parametrize("workers", [None, 2])
def test_with_workers_evaluation_runs_on_its_own_threads(workers, monkeypatch):
    model, (X, Y), seen, right = adapted(), of_lengths([3, 12, 4], 12), [], Decoder.__call__
    monkeypatch.setattr("minilora.language.text.EVALUATION_ROWS", 1)
    monkeypatch.setattr(Decoder, "__call__", lambda self, x: seen.append(threading.current_thread()) or right(self, x))
    evaluate_where_it_counts(model, X, Y, next_token_loss, workers)
    tried, *parts = [thread is threading.main_thread() for thread in seen]
    assert tried
    assert parts == [workers is None] * 2


def test_nothing_is_computed_after_the_last_target_of_a_part(monkeypatch):
    X, Y = of_lengths([3, 12, 0, 4, 11, 3], 12)
    monkeypatch.setattr("minilora.language.text.EVALUATION_ROWS", 24)
    seen = calls_of(monkeypatch, Decoder, "__call__")
    evaluate_where_it_counts(adapted(), X, Y, next_token_loss)
    tried, *parts = (x for _, x in seen)
    assert tried.shape == (1, 12)
    for part, rows, width in zip(parts, ([1, 4], [3, 0, 5]), (12, 4), strict=True):  # the widest first
        np.testing.assert_array_equal(part, X[rows, :width])


@pytest.mark.parametrize("way", [gradients_at_targets, evaluate_where_it_counts])
def test_targets_that_do_not_fit_the_ids_are_refused(way):
    X, Y = of_lengths([3, 6, 2], 6)
    with pytest.raises(ValueError, match=re.escape("targets has shape (3, 5), expected (3, 6)")):
        way(adapted(), X, Y[:, 1:], next_token_loss)
    with pytest.raises(ValueError, match=re.escape("targets has shape (3, 6, 1), expected (3, 6)")):
        way(adapted(), X[..., None], Y[..., None], next_token_loss)
    Y[0, 2] = 99
    with pytest.raises(ValueError, match=re.escape("Y holds 99 at (0, 2), expected 0 to 28")):
        evaluate_where_it_counts(adapted(), X, Y, next_token_loss)


def test_the_evaluated_loss_is_that_of_all_logits(folder, shell):
    (folder / "e.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n' * 8 + '{"text": "on"}\n' * 8)
    (loss,) = re.findall(r"loss +(\S+) nats", shell("evaluate e.jsonl --model model"))
    data = load_data(folder / "e.jsonl", folder / "model", held_out=0)
    assert float(loss) == pytest.approx(evaluate(Llama.load("model"), data.X, data.Y, cross_entropy), abs=6e-5)


def test_only_rows_that_count_reach_last_mlp_and_head(monkeypatch):
    model = adapted(["q_proj", "down_proj", "gate_proj", "lm_head"])
    (x, y), seen = some_count(0.4), calls_of(monkeypatch, LoRALinear, "forward")
    paths = {id(layer): path for path, layer in walk(model)}
    gradients_at_targets(model, x, y, next_token_loss)
    rows = {paths[id(layer)]: math.prod(h.shape[:-1]) for layer, h in seen}
    late = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    few = int((y != IGNORE_INDEX).sum())
    assert few < y.size
    assert rows == {path: few if path in late else y.size for path in adapters(model)}


def test_a_fine_tuning_computes_logits_where_they_count(folder, shell, monkeypatch):
    """In each example of 12 tokens, only the completion and the end token count."""
    calls = calls_of(monkeypatch, Llama, "forward")
    long, short = '{"prompt": "the cat ", "completion": "sat"}\n', '{"prompt": "cat", "completion": "s"}\n'
    (folder / "e.jsonl").write_text(long * 40)
    (folder / "f.jsonl").write_text((long + 3 * short) * 10)
    shell("finetune e.jsonl --save a --model model --steps 2 --batch-size 4")
    assert [(x.shape, at[0].sum()) for _, x, *at in calls if at] == [((2, 11), 8)] * 4  # two steps of two halves
    calls.clear()  # of two workers two would begin in either order
    shell("finetune f.jsonl --save b --model model --steps 1 --batch-size 36 --workers 1")
    assert [x.shape[1] for _, x, *at in calls if at] == [11, 4]  # the long in one part, the short in another


TARGETS = ["q_proj", "gate_proj", "lm_head"]


def test_each_part_is_computed_as_far_as_its_widest_row(monkeypatch):
    (X, Y), seen = of_lengths([2, 6, 1, 3, 2]), calls_of(monkeypatch, Llama, "forward")
    accumulate(3, 1, gradients_at_targets, by_width)(adapted(TARGETS), X, Y, cross_entropy)
    for (_, part, *_), rows, width in zip(seen, ([1, 3], [0, 4, 2]), (6, 2), strict=True):
        np.testing.assert_array_equal(part, X[rows, :width])


@pytest.mark.parametrize(("of_x", "of_y"), [(3, 2), (2, 3)])
def test_targets_of_other_rows_than_inputs_are_refused(of_x, of_y):
    model, (X, Y) = adapted(TARGETS), of_lengths([2, 6, 3])
    for cut in (accumulate(2, 1, gradients_at_targets, by_width), accumulate(2, 1)):
        with pytest.raises(ValueError, match=f"y has {of_y} rows, expected {of_x} as x has"):
            cut(model, X[:of_x], Y[:of_y], next_token_loss)
