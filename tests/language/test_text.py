"""Training on token ids: windows of a text, steps, held-out data, gradients in parts, resuming."""

import math
import re
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import Llama, LoRALinear, adapters, cross_entropy, evaluate
from minilora.fast import accumulate
from minilora.language.examples import load_data
from minilora.language.llama import Decoder
from minilora.language.text import (
    HELD_OUT,
    MEASURED,
    evaluate_where_it_counts,
    next_token_loss,
    read_text,
    token_ids,
    where_it_counts,
    windows,
)
from minilora.layer import walk
from minilora.losses import IGNORED
from minilora.training import backpropagate
from minilora.variants.dropout import with_dropout

from ..support.command_line import run
from ..support.language import LETTERS, adapted, of_lengths, tiny_llama, tiny_mixture


@given(count=st.integers(3, 4000), length=st.integers(1, 40))
@settings(max_examples=60)
def test_every_id_but_the_first_is_a_target_once(count, length):
    ids = list(range(count))  # each id is its own place
    n = (count - 1) // length
    if n < 2:
        with pytest.raises(ValueError, match=f"the text has {count} tokens, expected at least {2 * length + 1}"):
            windows(ids, length)
        return
    X, Y, X_held, Y_held = windows(ids, length)
    for x, y in ((X, Y), (X_held, Y_held)):
        assert x.shape[1] == length
        assert x.dtype == y.dtype == np.int64
        np.testing.assert_array_equal(y, x + 1)
        np.testing.assert_array_equal(np.diff(y, axis=1), 1)
    targets = np.concatenate([Y.reshape(-1), Y_held.reshape(-1)])
    held = -(-n // HELD_OUT)
    assert len(np.unique(targets)) == len(targets)  # none twice, and so none of those held out is trained on
    assert len(Y) == n - held
    assert len(Y_held) == min(held, MEASURED)
    assert Y_held[-1, -1] == n * length  # the end of the text among them
    assert np.ptp(Y_held) >= 0.6 * np.ptp(targets) or held < 3  # all through the text


def test_a_text_of_one_window_is_refused():
    with pytest.raises(ValueError, match="the text has 8 tokens, expected at least 9: two windows of 4"):
        windows(range(8), 4)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        windows(range(8), 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"caf\xe9 au lait", "not a text in UTF-8: byte 3 is 0xe9"), (b"", "holds no text"), (b" \n\t", "holds no text")],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, data, message):
    (tmp_path / "t").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "t")


def test_a_text_is_read_as_it_is(tmp_path):
    text = "\ufeffcafé\r\n日本 \U0001f600"
    (tmp_path / "t").write_bytes(text.encode())
    assert read_text(tmp_path / "t") == text[1:]  # without the mark of byte order
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_text(path)


def test_a_tokenizer_of_another_model_is_refused():
    assert token_ids("ab", lambda text: [0, 4], 5) == [0, 4]
    with pytest.raises(ValueError, match="ids up to 5, and the model has 5 tokens"):
        token_ids("ab", lambda text: [0, 5], 5)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0.9] * 9, TypeError, "ids must be a sequence of integers, got 1 axes of float64"),
        (["1"] * 9, TypeError, "ids must be a sequence of integers, got 1 axes of <U1"),
        ([True] * 9, TypeError, "ids must be a sequence of integers, got 1 axes of bool"),
        ([[1, 2]] * 9, TypeError, "ids must be a sequence of integers, got 2 axes of int64"),
        ([1] * 8 + [-1], ValueError, r"ids\[8\] must be at least 0, got -1"),
    ],
)
def test_ids_that_are_no_ids_are_refused(ids, error, message):
    with pytest.raises(error, match=message):
        windows(ids, 4)


def in_words(text):
    """Every run of letters, of spaces, or of other signs is a token."""
    return [hash(word) % 1000 for word in re.findall(r"[a-z]+| +|[^a-z ]+", text)]


def in_pairs(text):
    """Letters in twos, from the first on: which are together depends on all that stands before."""
    return [ord(a) * 1000 + ord(b or "\1") for a, b in re.findall(r"(?s)(.)(.?)", text)]


def with_a_mark(text):
    """A mark before the text, as of tokenizers that put a space before it."""
    return [1, *(ord(letter) for letter in text)] if text else []


def of_runs(text):
    """Signs of one kind are counted together: a cut between two of them changes both counts."""
    return [1000 * len(run.group()) + ord(run.group()[0]) for run in re.finditer(r"(?s)(.)\1*", text)]


def by_lines(text):
    """Lines with their ends; the last sign of the text is left out, as by one that strips spaces."""
    return [hash(line) % 10_000 for line in re.findall(r"[^\n]*\n|[^\n]+$", text.rstrip())]


@pytest.fixture
def short_pieces(monkeypatch):
    for name, size in {"PIECE": 60, "CONTEXT": 24, "UNCUT": 240}.items():
        monkeypatch.setattr(sys.modules["minilora.language.text"], name, size)


@pytest.mark.long
@given(
    words=st.lists(st.sampled_from(["a", "bb", " ", "  ", "\n", "cat", "é", "日本", ", ", "."]), min_size=1),
    times=st.integers(1, 200),
    encode=st.sampled_from([in_words, in_pairs, with_a_mark, of_runs, by_lines]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_ids_of_pieces_are_those_of_the_whole(short_pieces, words, times, encode):
    text = "".join(words) * times
    asked = []

    def told(part):
        asked.append(len(part))
        return encode(part)

    try:
        found = token_ids(text, told, 10**9)
    except ValueError:  # no place for a cut, which a mark alone always leaves
        assert encode is not with_a_mark
        assert len(text) > 240
    else:
        assert found == encode(text)
    assert max(asked) <= 240 + 24


def test_most_texts_are_encoded_in_short_pieces(short_pieces):
    asked = []

    def told(text):
        asked.append(len(text))
        return in_words(text)

    text = "the cat sat on the mat, and the dog sat on the log.\n" * 500
    assert token_ids(text, told, 1000) == in_words(text)
    assert max(asked) <= 60 + 24
    assert sum(asked) < 8 * len(text)


def test_a_place_that_changes_what_stands_before_is_passed_over(short_pieces):
    """A line that ends the text has a token of its own there, so no line's start is a place for a cut."""

    def encode(part):
        return [*in_words(part.removesuffix("\n")), 1] if part.endswith("\n") else in_words(part)

    text = "the cat sat on the mat\n" * 50
    assert token_ids(text, encode, 1000) == encode(text)


def test_a_text_that_allows_no_cut_is_refused(short_pieces):
    with pytest.raises(
        ValueError, match="from character 0 on depend on all of it: expected a place for a cut within 240"
    ):
        token_ids("a" * 500, of_runs, 10**9)
    assert token_ids("a" * 240, of_runs, 10**9) == of_runs("a" * 240)


def test_where_no_cut_was_found_is_told(short_pieces):
    """The runs of one letter before it allow a cut anywhere."""
    with pytest.raises(ValueError) as error:
        token_ids("ab" * 40 + "a" * 500, of_runs, 10**9)
    assert 40 < int(re.search(r"from character (\d+) on", str(error.value))[1]) < 80


def test_a_cut_that_fails_later_is_refused(short_pieces):
    """Around the cut all is well, and the piece as a whole is another one."""
    text = "cat dog " * 30

    def encode(part):
        return [len(part), *in_words(part)] if len(part) > 60 else in_words(part)

    with pytest.raises(ValueError, match="expected a place for a cut"):
        token_ids(text, encode, 1000)


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
    """Return ids and targets of three short texts, of which so many count."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(LETTERS), (3, 9))
    return ids[:, :-1], np.where(rng.random((3, 8)) < share, ids[:, 1:], IGNORED)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 1])
@pytest.mark.parametrize("parts", [None, 1, 2])
def test_gradients_where_it_counts_are_those_of_all_logits(share, parts):
    model, (x, y), losses = adapted(), some_count(share), []

    def noting(logits, targets):
        value, dz = next_token_loss(logits, targets)
        losses.append(float(value) * (targets != IGNORED).sum() / max(1, (y != IGNORED).sum()))
        return value, dz

    gradients = where_it_counts if parts is None else accumulate(parts, 2, where_it_counts)
    found, expected = gradients(model, x, y, noting), backpropagate(model, x, y, next_token_loss)
    assert found.keys() == expected.keys()
    for name, g in found.items():
        assert np.abs(g - expected[name]).max() <= 1e-12
    assert sum(losses) == pytest.approx(float(cross_entropy(model(x), y)[0]), abs=1e-12)


def test_where_every_target_counts_the_bits_are_the_same():
    model, (x, y) = adapted(), some_count(1)
    found, expected = where_it_counts(model, x, y, next_token_loss), backpropagate(model, x, y, next_token_loss)
    for name, g in found.items():
        np.testing.assert_array_equal(g, expected[name])


@pytest.mark.parametrize("share", [0.1, 0.5, 1])
@pytest.mark.parametrize("workers", [None, 2])
def test_a_loss_is_measured_with_logits_where_targets_count_alone(share, workers, monkeypatch):
    model, (x, y) = adapted(), some_count(share)
    seen, right = [], type(model.lm_head).__call__
    monkeypatch.setattr(type(model.lm_head), "__call__", lambda self, h: seen.append((self, h.shape)) or right(self, h))
    loss = evaluate_where_it_counts(model, x, y, next_token_loss, workers)
    rows = [np.prod(shape[:-1]) for layer, shape in seen if layer is model.lm_head]
    assert sum(rows) <= 2 * int((y != IGNORED).sum()) + y.shape[1]  # the first rows are tried before
    monkeypatch.undo()
    assert loss == pytest.approx(evaluate(model, x, y, next_token_loss, workers), abs=1e-12)


@given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=9), most=st.sampled_from([1, 20, 40, 512]))
@settings(max_examples=25)
def test_a_loss_over_texts_of_any_lengths_is_that_of_all_logits(lengths, most):
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
def test_a_loss_is_measured_on_threads_of_its_own_where_there_are_workers(workers, monkeypatch):
    model, (X, Y), seen, right = adapted(), of_lengths([3, 12, 4], 12), [], Decoder.__call__
    monkeypatch.setattr("minilora.language.text.EVALUATION_ROWS", 1)
    monkeypatch.setattr(Decoder, "__call__", lambda self, x: seen.append(threading.current_thread()) or right(self, x))
    evaluate_where_it_counts(model, X, Y, next_token_loss, workers)
    tried, *parts = [thread is threading.main_thread() for thread in seen]
    assert tried
    assert parts == [workers is None] * 2


def test_nothing_is_computed_behind_the_last_target_of_a_part(monkeypatch):
    model, (X, Y), seen, right = adapted(), of_lengths([3, 12, 0, 4, 11, 3], 12), [], Decoder.__call__
    monkeypatch.setattr("minilora.language.text.EVALUATION_ROWS", 24)
    monkeypatch.setattr(Decoder, "__call__", lambda self, x: seen.append(x) or right(self, x))
    evaluate_where_it_counts(model, X, Y, next_token_loss)
    tried, *parts = seen
    assert tried.shape == (1, 12)
    for part, rows, width in zip(parts, ([1, 4], [3, 0, 5]), (12, 4), strict=True):  # the widest first
        np.testing.assert_array_equal(part, X[rows, :width])


WRONG = {
    "targets of another shape": (lambda X, Y: (X, Y[:, 1:]), "targets has shape (3, 5), expected (3, 6)"),
    "no position": (lambda X, Y: (X[:, :0], Y[:, :0]), "expected (n, T) with at least one row and one position"),
    "one axis": (lambda X, Y: (X[0], Y[0]), "targets has shape (6,), expected (n, T)"),
    "three axes": (lambda X, Y: (X[..., None], Y[..., None]), "targets has shape (3, 6, 1), expected (n, T)"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("way", [where_it_counts, evaluate_where_it_counts])
def test_what_is_no_ids_and_their_targets_is_refused(way, case):
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        way(adapted(), *change(*of_lengths([3, 6, 2], 6)), next_token_loss)


@pytest.mark.parametrize("way", [where_it_counts, evaluate_where_it_counts])
def test_a_list_of_ids_is_refused(way):
    X, Y = of_lengths([3, 6, 2], 6)
    with pytest.raises(TypeError, match="targets must be an array of integers, got list; convert it with"):
        way(adapted(), X, Y.tolist(), next_token_loss)


def test_a_target_out_of_range_is_named_where_it_stands():
    X, Y = of_lengths([3, 6, 2], 6)
    Y[0, 2] = 99
    with pytest.raises(ValueError, match=re.escape("Y holds 99 at (0, 2), expected 0 to 28")):
        evaluate_where_it_counts(adapted(), X, Y, next_token_loss)


def test_the_loss_before_a_fine_tuning_and_of_evaluate_is_that_of_all_logits(folder, capsys):
    (folder / "e.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n' * 8 + '{"text": "on"}\n' * 8)
    assert run("evaluate", "e.jsonl", "--model", "model") == 0
    (loss,) = re.findall(r"loss +(\S+) nats", capsys.readouterr().out)
    data = load_data(folder / "e.jsonl", folder / "model", held_out=0)
    assert float(loss) == pytest.approx(evaluate(Llama.load("model"), data.X, data.Y, cross_entropy), abs=6e-5)


@pytest.mark.parametrize("start", [tiny_llama(), tiny_mixture("qwen2_moe")], ids=["MLP", "shared expert"])
@pytest.mark.parametrize("parts", [None, 1])
def test_masks_where_targets_count_are_those_of_the_whole(start, parts):
    rng, model = np.random.default_rng(3), adapted(["q_proj", "gate_proj", "down_proj", "lm_head"], start)
    masked, (x, y) = with_dropout(model, 0.5, [5, 6]), rng.integers(0, len(LETTERS), (2, 2, 7))
    y[:, :4] = y[1, 5] = IGNORED
    counting = where_it_counts if parts is None else accumulate(parts, 2, where_it_counts)
    found, expected = (way(masked, x, y, next_token_loss) for way in (counting, backpropagate))
    assert found.keys() == expected.keys()
    for name, g in found.items():
        assert np.abs(g - expected[name]).max() <= 1e-12
    without = where_it_counts(model, x, y, next_token_loss)
    assert any(np.abs(g - without[name]).max() > 1e-3 for name, g in found.items())


@pytest.mark.parametrize("trained", [["q_proj"], ["down_proj"], ["lm_head"], ["layers.1.self_attn.q_proj"]])
def test_gradients_where_it_counts_are_right_whatever_trains(trained):
    model, (x, y) = adapted(trained), some_count(0.4)
    found, expected = (way(model, x, y, next_token_loss) for way in (where_it_counts, backpropagate))
    assert found.keys() == expected.keys() == model.trainable().keys()
    for name, g in found.items():
        assert np.abs(g - expected[name]).max() <= 1e-12


def test_only_rows_that_count_reach_the_last_mlp_and_the_head(monkeypatch):
    model = adapted(["q_proj", "down_proj", "gate_proj", "lm_head"])
    (x, y), rows, right = some_count(0.4), {}, LoRALinear.forward
    paths = {id(layer): path for path, layer in walk(model)}

    def watched(self, h):
        rows[paths[id(self)]] = math.prod(h.shape[:-1])
        return right(self, h)

    monkeypatch.setattr(LoRALinear, "forward", watched)
    where_it_counts(model, x, y, next_token_loss)
    late = {"model.layers.1.mlp.gate_proj", "model.layers.1.mlp.down_proj", "lm_head"}
    few = int((y != IGNORED).sum())
    assert few < y.size
    assert rows == {path: few if path in late else y.size for path in adapters(model)}


def test_a_fine_tuning_computes_logits_where_they_count(folder, monkeypatch):
    """Of each example of 12 tokens the loss counts the completion and the end behind it."""
    seen, right = [], Llama.forward

    def watched(self, x, at=None):
        if at is not None:
            seen.append((x.shape, int(at.sum())))
        return right(self, x, at)

    monkeypatch.setattr(Llama, "forward", watched)
    (folder / "e.jsonl").write_text('{"prompt": "the cat ", "completion": "sat"}\n' * 40)
    assert run("finetune", "e.jsonl", "--save", "a", "--model", "model", "--steps", "2", "--batch-size", "4") == 0
    assert seen == [((2, 11), 8)] * 4  # two steps of two halves
    seen.clear()
    long, short = '{"prompt": "the cat ", "completion": "sat"}\n', '{"prompt": "cat", "completion": "s"}\n'
    (folder / "e.jsonl").write_text((long + 3 * short) * 10)
    assert run("finetune", "e.jsonl", "--save", "b", "--model", "model", "--steps", "1", "--batch-size", "36") == 0
    assert [shape[1] for shape, _ in seen] == [11, 4]  # the long in one part, the short in another


def test_where_nothing_is_held_out_one_window_is_enough():
    assert len(windows(range(5), 4, 0)[0]) == 1
    with pytest.raises(ValueError, match=r"the text has 4 tokens, expected at least 5: a window of 4$"):
        windows(range(4), 4, 0)
