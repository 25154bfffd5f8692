"""Parts of a batch: the same bits on any number of threads, and nothing left behind."""

import signal
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

from minilora import (
    Conv1d,
    Embedding,
    Linear,
    LoRALinear,
    ReLU,
    Sequential,
    adapt,
    cross_entropy,
    evaluate,
    mse,
    quantize,
    train,
)
from minilora.fast import accumulate
from minilora.language import next_token_loss
from minilora.layers.flatten import Flatten
from minilora.training import backpropagate

from ..support.compare import assert_close
from ..support.language import adapted, drawn, tiny_llama

BLAS = ThreadpoolController().select(user_api="blas")
IDS = (7, 5)  # a batch's windows, and their length


@contextmanager
def blas_at(count):
    """Give the BLAS so many threads, in a way that leaves others free to change it."""
    with BLAS.limit(limits=count):
        for library in BLAS.lib_controllers:
            getattr(library, "clear_controlling_thread", lambda force: None)(force=True)
        yield


def blas_threads():
    return [library["num_threads"] for library in BLAS.info()]


def sequence_net():
    rng = np.random.default_rng(1)
    layers = {"embed": Embedding(rng.standard_normal((28, 6))), "conv": Conv1d(rng.standard_normal((4, 5, 3)))}
    net = Sequential(**layers, act=ReLU(), flat=Flatten(), fc=Linear(rng.standard_normal((28, 16))))
    return adapt(net, ["embed", "conv", "fc"], rank=2, alpha=3, rng=rng)


TIED = {"vocab_size": 28, "intermediate_size": 20, "num_hidden_layers": 1, "tie_word_embeddings": True}
MODELS = {
    "LoRA": adapted,
    "DoRA": lambda: adapted(use_dora=True),
    "DoRA, its norm not constant": lambda: adapted(use_dora=True, dora_norm="full"),
    "over four bits": lambda: adapted(model=quantize(tiny_llama())),
    "PiSSA": lambda: adapted(init="pissa"),
    "every weight, a tied head": lambda: drawn(0, "float64", **TIED),
    "embedding and convolution": sequence_net,
}


def problem(name, seed=0, batch=IDS):
    """Return a model that has moved from its start, ids, and targets of which some do not count."""
    rng = np.random.default_rng(seed)
    model = MODELS[name]()
    for p in model.trainable().values():
        p += rng.standard_normal(p.shape) / 4
    x, y = rng.integers(28, size=(2, *batch))
    y[rng.random(y.shape) < 0.3] = -100
    return model, x, (y[:, 0] if name == "embedding and convolution" else y)


def bits(grads):
    return {name: g.tobytes() for name, g in grads.items()}


@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_workers_gives_the_same_bits(name):
    model, x, y = problem(name)
    first = accumulate(2)(model, x, y, cross_entropy)
    for name, g in backpropagate(model, x, y, cross_entropy).items():
        assert_close(first[name], g, 1e-12)
    for workers in (3, 9):
        assert bits(accumulate(2, workers)(model, x, y, cross_entropy)) == bits(first)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 8), workers=st.integers(2, 5), batch=st.integers(1, 8), before=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_bits_depend_on_the_rows_alone(rows, workers, batch, before, seed):
    """In float32, at widths that a BLAS cuts for its threads; whatever its number of threads was before."""
    rng = np.random.default_rng(seed)
    base = Linear(rng.standard_normal((151, 203), np.float32))
    model = LoRALinear.from_linear(base, rank=4, alpha=8, rng=rng)
    model.adapter.lora_B[...] = rng.standard_normal((151, 4), np.float32)
    x, t = rng.standard_normal((batch, 40, 203), np.float32), rng.standard_normal((batch, 40, 151), np.float32)
    with BLAS.limit(limits=1):
        expected = accumulate(rows)(model, x, t, mse)
    with BLAS.limit(limits=before):
        assert bits(accumulate(rows, workers)(model, x, t, mse)) == bits(expected)
        assert blas_threads() == [before] * len(blas_threads())


@pytest.mark.parametrize("height", [5, 8, 512])
def test_a_loss_has_the_same_bits_with_any_workers(height, monkeypatch):
    monkeypatch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", height)
    model, x, y = problem("LoRA")
    found = {evaluate(model, x, y, next_token_loss, workers) for workers in (1, 2, 3, 9)}
    assert len(found) == 1
    assert found.pop() == pytest.approx(evaluate(model, x, y, next_token_loss), rel=1e-14)


class Watched(Linear):
    """A layer that calls a function with its input when a forward begins, and another when a backward does."""

    def __init__(self, see, end=lambda: None):
        super().__init__(np.ones((28, 3)))
        self.see, self.end = see, end

    def forward(self, x):
        self.see(x)
        return super().forward(x)

    def backward(self, dy, cache, *, need_dx=True):
        self.end()
        return super().backward(dy, cache, need_dx=need_dx)


def counted_rows(n=8):
    """Return inputs whose rows are numbered."""
    return np.repeat(np.arange(float(n))[:, None], 3, axis=1)


def watched(rows, workers, see, end=lambda: None, n=8):
    """Compute gradients of numbered rows, so many in a part, while functions are told of it."""
    return accumulate(rows, workers)(Watched(see, end), counted_rows(n), np.zeros(n, int), cross_entropy)


def test_two_parts_are_computed_at_once():
    meet = threading.Barrier(2, timeout=20)  # broken, and the test with it, where the second never comes
    watched(4, 2, lambda x: meet.wait())


def measured_by_train(model, X, Y, loss):
    how = {"batch_size": 1, "steps": 1, "loss": loss, "gradients": accumulate(4, workers=2)}
    return train(model, X, Y, epochs=1, rng=np.random.default_rng(0), **how).losses[-1]


@pytest.mark.parametrize("measure", [lambda *data: evaluate(*data, 2), measured_by_train], ids=["evaluate", "train"])
def test_two_parts_of_a_loss_are_computed_at_once(monkeypatch, measure):
    monkeypatch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", 4)
    parts = []

    def see(x):
        if len(x) == 4 and threading.current_thread() is not threading.main_thread():
            parts.append(x)
            meet.wait()

    meet = threading.Barrier(2, timeout=20)
    assert measure(Watched(see), counted_rows(), np.zeros(8, int), cross_entropy) > 0
    assert len(parts) == 2


def test_no_more_parts_than_workers_hold_their_caches():
    now, most, lock = [0], [0], threading.Lock()

    def begin(x):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])

    def end():
        with lock:
            now[0] -= 1

    watched(1, 3, begin, end)
    assert (now[0], 1 <= most[0] <= 3) == (0, True)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_part_without_targets_is_passed_over(workers):
    seen = []
    y = np.array([-100, -100, 1, -100, -100, -100, 2, 3])
    model = Watched(lambda x: seen.append(x[0, 0]))
    found = accumulate(2, workers)(model, counted_rows(), y, cross_entropy)
    assert sorted(seen) == [2.0, 6.0]
    assert_close(found["weight"], backpropagate(model, counted_rows(), y, cross_entropy)["weight"], 1e-14)
    seen.clear()
    of_none = accumulate(2, workers)(model, counted_rows(), np.full(8, -100), cross_entropy)
    np.testing.assert_array_equal(of_none["weight"], np.zeros((28, 3)))
    assert seen == [0.0]  # one part, for the shapes
    seen.clear()
    accumulate(2, workers)(model, counted_rows(), np.full((8, 28), -100.0), mse)
    assert sorted(seen) == [0.0, 2.0, 4.0, 6.0]  # of numbers that are no ids all count


class Broken(ArithmeticError):
    pass


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_exception_comes_out_as_itself_and_ends_all(workers):
    error, seen, threads = Broken("part 2"), [], threading.active_count()

    def see(x):
        seen.append(x[0, 0])
        if x[0, 0] == 2:
            raise error

    with blas_at(2):
        with pytest.raises(Broken) as caught:
            watched(1, workers, see)
        assert blas_threads() == [2] * len(blas_threads())
    assert caught.value is error
    assert max(seen) <= 2 + workers - 1  # what had begun beside it, and no more
    assert threading.active_count() == threads


def test_the_first_of_two_failing_parts_is_told():
    both = threading.Barrier(2, timeout=20)

    def see(x):
        both.wait()
        raise Broken(f"part {x[0, 0]:.0f}")

    for _ in range(5):
        with pytest.raises(Broken, match="part 0"):
            watched(1, 2, see, n=2)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals for one thread")
def test_an_interrupt_ends_all_parts():
    threads, seen = threading.active_count(), []

    def see(x):
        seen.append(x[0, 0])
        if x[0, 0] == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        with blas_at(2):
            with pytest.raises(KeyboardInterrupt):
                watched(1, 2, see, n=100)
            assert blas_threads() == [2] * len(blas_threads())
    finally:
        signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 20
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # of a thread that was just being started, Python does not know yet that it is to be awaited
    assert threading.active_count() == threads
    assert len(seen) < 10


@pytest.mark.parametrize("workers", [1, 2])
def test_parts_warn_as_the_caller_wants_it(workers):
    def loss(prediction, target):
        np.full(2, 1e308) * 10
        return mse(prediction, target)

    call = accumulate(1, workers)
    arrays = Watched(lambda x: None), counted_rows(3), np.zeros((3, 28)), loss
    with np.errstate(over="ignore"):
        call(*arrays)
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        call(*arrays)


def test_each_part_has_one_blas_thread():
    found = []
    with BLAS.limit(limits=2):
        for workers in (1, 2):
            watched(3, workers, lambda x: found.extend(blas_threads()))
        assert set(found) <= {1}
        assert blas_threads() == [2] * len(blas_threads())


def test_two_trainings_of_one_process_take_turns():
    """The number of BLAS threads is the process's: the first to end would give the other two."""
    inside, found = [], []

    def see(x):
        inside.append(threading.get_ident())
        time.sleep(0.001)
        found.extend([*blas_threads(), len(set(inside))])

    with blas_at(2):
        callers = [threading.Thread(target=watched, args=(8, 1, see, inside.clear)) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert set(found) == {1}
        assert blas_threads() == [2] * len(blas_threads())


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_counts_that_are_no_number_are_refused(count):
    says = f"must be {'at least 1' if type(count) is int else 'an integer'}, got {count}$"
    model, x, y = problem("LoRA")
    for name, call in (
        ("workers", lambda: accumulate(2, count)),
        ("rows", lambda: accumulate(count)),
        ("workers", lambda: evaluate(model, x, y, next_token_loss, count)),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name} {says}"):
            call()
