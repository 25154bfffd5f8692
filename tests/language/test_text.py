"""Training on token ids: windows of a text, steps, held-out data, gradients in parts, resuming."""

import io
import re
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora import (
    MLP,
    Adam,
    CheckpointError,
    Embedding,
    Linear,
    Sequential,
    TrainingDiverged,
    adapt,
    cross_entropy,
    evaluate,
    mse,
    train,
)
from minilora.fast import accumulate
from minilora.language.text import HELD_OUT, MEASURED, next_token_loss, read_text, token_ids, windows
from minilora.language.trainingmemory import cache_bytes
from minilora.layer import parameter_count
from minilora.layers.embedding import OneHot
from minilora.training import backpropagate

from ..support.compare import assert_close
from ..support.language import LETTERS, TEXT, tiny_llama
from ..support.memory import traced

IDS = [LETTERS.index(c) for c in TEXT]


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


# --- a long text in pieces ------------------------------------------------------------------------


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


# --- the loss and its gradients -------------------------------------------------------------------


def test_the_loss_in_place_is_cross_entropy():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((3, 4, 7)), rng.integers(7, size=(3, 4))
    expected = cross_entropy(logits.copy(), targets)
    loss, d_logits = next_token_loss(logits, targets)
    assert d_logits is logits
    assert loss == expected[0]
    np.testing.assert_array_equal(d_logits, expected[1])


@given(rows=st.integers(1, 9), count=st.integers(1, 8), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_gradients_in_parts_are_those_of_the_batch(rows, count, seed):
    """Also where the parts differ in size and in how many targets count, and where none counts in the whole batch."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(len(LETTERS), size=(2, count, 5))
    y[rng.random(y.shape) < 0.3] = -100
    y[: rng.integers(count + 1)] = -100
    model = adapt(tiny_llama(), "all-linear", rank=2, alpha=3, rng=rng)
    for adapter in model.trainable().values():
        adapter[...] = rng.standard_normal(adapter.shape)
    expected = backpropagate(model, x, y, cross_entropy)
    found = accumulate(rows)(model, x, y, next_token_loss)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], 1e-13)


def test_gradients_in_parts_ask_for_no_dx():
    asked = []

    class Watched(Linear):
        def backward(self, dy, cache, *, need_dx=True):
            asked.append((len(dy), need_dx))
            return super().backward(dy, cache, need_dx=need_dx)

    rng = np.random.default_rng(0)
    accumulate(3)(Watched(rng.random((2, 4))), rng.random((8, 4)), rng.random((8, 2)), mse)
    assert asked == [(3, False), (3, False), (2, False)]


@pytest.mark.parametrize(("rows", "error"), [(0, ValueError), (1.5, TypeError)])
def test_parts_of_no_rows_are_refused(rows, error):
    with pytest.raises(error, match="rows must be"):
        accumulate(rows)


@pytest.mark.parametrize("height", [1, 13, 10**9])
def test_evaluation_in_blocks_is_the_loss_of_all_targets(monkeypatch, height):
    X, Y, _, _ = windows(IDS, 11)
    Y = Y.copy()
    Y[:7] = Y[9, 3] = -100  # blocks without a target, and with fewer
    monkeypatch.setattr(sys.modules["minilora.evaluation"], "EVALUATION_ROWS", height)
    model = tiny_llama()
    assert_close(np.array(evaluate(model, X, Y, next_token_loss)), cross_entropy(model(X), Y)[0], 1e-13)


# --- train ----------------------------------------------------------------------------------------


def start(dtype="float64"):
    """A model with adapters, and the data: the same each time."""
    model = adapt(tiny_llama(dtype=dtype), ["q_proj", "up_proj"], rank=2, alpha=4, rng=np.random.default_rng(3))
    X, Y, *held_out = windows(IDS, 8)
    return model, X, Y, tuple(held_out)


def fit(steps_of_all, *, checkpoint=None, rng=None, **options):
    model, X, Y, held_out = start()
    settings = {"steps": 1, "batch_size": 6, "lr": 0.02, "log_every": 3, "held_out": held_out}
    rng = np.random.default_rng(1) if rng is None else rng
    settings |= {"loss": cross_entropy, "rng": rng, "checkpoint": checkpoint, **options}
    return model, train(model, X, Y, epochs=steps_of_all, **settings)


def test_training_by_steps_is_the_loop_written_out():
    model, history = fit(7)
    plain, X, Y, held_out = start()
    rng, optimizer, losses = np.random.default_rng(1), Adam(plain.trainable(), lr=0.02), []
    for step in range(1, 8):
        rows = rng.choice(len(X), 6, replace=False, shuffle=False)
        optimizer.step(backpropagate(plain, X[rows], Y[rows], cross_entropy))
        if step in (3, 6, 7):
            losses.append(cross_entropy(plain(held_out[0]), held_out[1])[0])
    assert history.epochs == [3, 6, 7]
    assert_close(np.array(history.losses), np.array(losses), 1e-13)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, plain.trainable()[name])


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("which", ["inputs", "targets"])
@pytest.mark.parametrize("wrong", [-1, -101, len(LETTERS)])
def test_an_id_out_of_range_is_refused_before_training(wrong, which, held_out):
    model, X, Y, held = start()
    before = {name: p.copy() for name, p in model.trainable().items()}
    data = [d.copy() for d in (held if held_out else (X, Y))]
    data[1][0, 0] = -100  # a target that does not count is no id
    data[which == "targets"][-1, 3] = wrong
    row = rf"row {len(data[0]) - 1} of X and Y: (x|targets) holds {wrong} at \(0, 3\), expected 0 to"
    X, Y, held = (X, Y, tuple(data)) if held_out else (*data, held)
    with pytest.raises(ValueError, match=("held_out: " if held_out else "^") + row):
        train(model, X, Y, rng=np.random.default_rng(1), batch_size=6, loss=cross_entropy, held_out=held)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])


def test_an_epoch_of_more_steps_draws_the_same_batches():
    one, other = fit(6)[0], fit(2, steps=3, log_every=1)[0]
    for name, p in one.trainable().items():
        np.testing.assert_array_equal(p, other.trainable()[name])


def test_a_bigram_model_learns_the_pairs_of_a_text():
    """One matrix from id to id can do no better than the entropy of a letter after the one before it."""
    X, Y, _, _ = windows(IDS, 8)
    V, rng = len(LETTERS), np.random.default_rng(0)
    model = Sequential(emb=Embedding(np.eye(V)), fc=Linear.init(V, V, bias=False, rng=rng, dtype="float64"))
    model.emb.frozen = True
    history = train(model, X, Y, epochs=60, batch_size=64, lr=0.3, rng=rng, loss=next_token_loss, log_every=60)
    pairs = np.zeros((V, V))
    np.add.at(pairs, (X, Y), 1)
    given_one = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    entropy = -(pairs * np.log(np.where(given_one > 0, given_one, 1))).sum() / pairs.sum()
    assert entropy < history.losses[-1] < entropy + 0.03


@given(done=st.integers(1, 7), steps=st.integers(1, 2))
@settings(max_examples=5)
def test_a_killed_training_on_text_resumes_bit_for_bit(tmp_path_factory, done, steps):
    class Killed(BaseException):
        pass

    calls = 0

    def gradients(model, x, y, loss):
        nonlocal calls
        calls += 1
        if calls > done * steps:
            raise Killed
        return accumulate(4)(model, x, y, loss)

    file = tmp_path_factory.mktemp("c") / "c.safetensors"
    with pytest.raises(Killed):
        fit(8, checkpoint=file, steps=steps, gradients=gradients)
    calls = -1000
    resumed, history = fit(8, checkpoint=file, steps=steps, gradients=gradients)
    whole, expected = fit(8, steps=steps, gradients=gradients)
    assert calls == -1000 + (8 - done) * steps + 8 * steps  # what was done is not done again
    assert history == expected
    for name, p in resumed.trainable().items():
        assert p.tobytes() == whole.trainable()[name].tobytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"steps": 2}, "steps is 1 there and 2 here"),
        ({"held_out": None}, "held_out is .* there and None here"),
        ({"held_out": tuple(a[:1] for a in start()[3])}, "held_out"),
        ({"held_out": (start()[3][0], start()[3][0])}, "held_out"),
        ({"held_out": (start()[3][1], start()[3][1])}, "held_out"),
    ],
)
def test_a_checkpoint_with_other_steps_or_data_is_refused(tmp_path, change, named):
    fit(2, checkpoint=tmp_path / "c")
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(CheckpointError, match=named):
        fit(2, checkpoint=tmp_path / "c", **change)
    assert (tmp_path / "c").read_bytes() == before


X_HELD, Y_HELD = start()[3]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.0}, TypeError, "steps must be an integer, got 1.0"),
        ({"held_out": X_HELD}, TypeError, "held_out must be two arrays, inputs and targets, got ndarray"),
        ({"held_out": (X_HELD,)}, TypeError, "held_out must be two arrays"),
        ({"held_out": (X_HELD, Y_HELD[:1])}, ValueError, "held_out: Y has shape"),
        ({"held_out": (X_HELD + 99, Y_HELD)}, ValueError, "held_out: x holds"),
        ({"held_out": (X_HELD, Y_HELD * 0 - 100)}, ValueError, "held_out: Y has no target that counts"),
        ({"held_out": (X_HELD, Y_HELD.astype(float))}, TypeError, "held_out: targets has dtype float64"),
    ],
)
def test_bad_steps_and_held_out_data_are_refused_first(change, error, message):
    model, X, Y, _ = start()
    rng, before = np.random.default_rng(0), {name: p.copy() for name, p in model.trainable().items()}
    with pytest.raises(error, match=message):
        train(model, X, Y, epochs=1, batch_size=4, rng=rng, **{"loss": cross_entropy, **change})
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])


def test_held_out_data_that_is_not_finite_is_named():
    rng = np.random.default_rng(0)
    model, x, y = Linear.init(3, 2, rng=rng, dtype="float64"), rng.random((9, 3)), rng.random((9, 2))
    with pytest.raises(ValueError, match=r"held_out\[1\] holds NaN or infinity: entry \(1, 0\) is nan"):
        train(model, x, y, batch_size=3, rng=rng, held_out=(x[:2], np.array([[0.0, 1.0], [np.nan, 1.0]])))
    with pytest.raises(ValueError, match=r"^held_out\[0\] holds NaN or infinity: entry \(0, 2\) is inf"):
        train(model, x, y, batch_size=3, rng=rng, held_out=(np.array([[0, 1, np.inf]]), y[:1]))
    with pytest.raises(TrainingDiverged, match="the loss over all of held_out is inf after epoch 1"):
        train(model, x, y, epochs=1, log_every=1, batch_size=3, rng=rng, held_out=(x[:2], np.full((2, 2), 1e300)))


def test_progress_counts_tokens(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    fit(4, progress=True, log_every=1)
    assert "192/192" in sys.stderr.getvalue()  # 4 steps of 6 windows of 8
    assert "token/s" in sys.stderr.getvalue()
    assert "loss=" in sys.stderr.getvalue()


# --- what a step takes ----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 6])
def test_the_memory_of_a_cache_is_counted(n):
    rng = np.random.default_rng(0)
    mlp = MLP.init(5, 7, 3, activation="silu", rng=rng, dtype="float64")
    _, cache = mlp.forward(rng.standard_normal((n, 5)))
    assert cache_bytes(cache) == 8 * n * (5 + 7 + 7 + 7)  # the inputs of the three layers, each once, and SiLU's q


def test_an_array_over_memory_that_is_no_array_is_counted():
    x = np.frombuffer(bytearray(8 * 10)).reshape(2, 5)
    _, cache = Linear.init(5, 3, rng=np.random.default_rng(0), dtype="float64").forward(x)
    assert cache_bytes(cache) == 8 * 10


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"], r".*\.1\.mlp\.down_proj"])
def test_the_counted_memory_is_what_python_allocates(targets):
    adapted = adapt(tiny_llama(), targets, rank=2, alpha=1, rng=np.random.default_rng(0))
    ids = np.array(IDS[:2000]).reshape(40, 50)
    with traced() as memory:
        cache = adapted.forward(ids)[1]
    assert cache_bytes(cache) == pytest.approx(memory.kept, rel=0.02)


def test_a_frozen_model_keeps_nothing_of_its_own():
    model, ids = tiny_llama(), np.array(IDS[:20])[None]
    top = adapt(model, r"model\.layers\.1\.mlp\.down_proj", rank=1, alpha=1, rng=np.random.default_rng(0))
    every = adapt(model, "all-linear", rank=1, alpha=1, rng=np.random.default_rng(0))
    sizes = [cache_bytes(m.forward(ids)[1]) for m in (top, every)]
    assert 0 < sizes[0] < 0.5 * sizes[1]


def test_a_view_keeps_the_whole_array_that_it_looks_at():
    layer, x, y = Linear(np.zeros((4, 3))), np.zeros((6, 5)), np.zeros(7)
    cache = (layer, (6, 4), x[:2], [x[3:].T, x[:2][0]], y)
    assert cache_bytes(cache) == x.nbytes + y.nbytes


def test_views_of_the_models_own_arrays_are_not_counted():
    whole, x = np.zeros((8, 3)), np.zeros(5)
    layer = Linear(whole[:4])  # itself a view
    assert cache_bytes((layer, (6, 4), layer.weight.T, whole[2:], x)) == x.nbytes


def test_one_hot_rows_keep_their_ids_alone():
    embedding, ids = Embedding(np.zeros((50, 4))), np.array([[3, 1, 3]])
    assert cache_bytes(embedding.forward(ids)[1]) == ids.nbytes
    own = (embedding, (1, 3, 4), OneHot(ids[0], 50, embedding.weight), ids)
    assert cache_bytes(own) == ids.nbytes


def test_parameters_are_counted_once():
    weight = np.zeros((4, 3))
    tied = Sequential(emb=Embedding(weight), head=Linear(weight))
    assert parameter_count(tied) == parameter_count(tied, trained=True) == 12
    adapted = adapt(tied, ["head"], rank=2, alpha=1, rng=np.random.default_rng(0))
    assert (parameter_count(adapted), parameter_count(adapted, trained=True)) == (12 + 14, 14)


def test_an_array_that_has_no_base_counts_as_its_own():
    class Bare:
        dtype, shape, nbytes = np.dtype("float64"), (3,), 24

    assert cache_bytes((Linear(np.ones((2, 3))), (2,), Bare())) == 24
