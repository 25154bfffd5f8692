"""Parts of a batch: the same bits on any number of threads, nothing left behind, and rows of like widths together."""

import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
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
)
from minilora.fast import accumulate, keep_pages
from minilora.fast.parts import by_width, of_area, widths
from minilora.language import next_token_loss
from minilora.layers.flatten import Flatten
from minilora.training import backpropagate

from ..support.compare import assert_close
from ..support.language import adapted, drawn, of_lengths, tiny_llama

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


@pytest.mark.parametrize(
    "measure",
    [lambda *data: evaluate(*data, 2), lambda *data: accumulate(4, workers=2).evaluate(*data)],
    ids=["evaluate", "accumulate"],
)
def test_two_parts_of_a_loss_are_computed_at_once(monkeypatch, measure):
    monkeypatch.setattr(sys.modules["minilora.training"], "EVALUATION_ROWS", 4)
    tried = []  # `evaluate` looks at the first row before it computes

    def see(x):
        tried.append(len(x))
        if tried[0] == 1 < len(x):
            meet.wait()

    meet = threading.Barrier(2, timeout=20)
    assert measure(Watched(see), counted_rows(), np.zeros(8, int), cross_entropy) > 0
    assert tried == [1, 4, 4]


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


# --- rows of like widths ---

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def all_cuts(n):
    """Every way to cut n rows in a line, as slices."""
    for last in range(n):
        for cut in all_cuts(last) if last else [[]]:
            yield [*cut, slice(last, n)]


@given(lengths=LENGTHS)
def test_a_row_reaches_to_its_last_target_that_counts(lengths):
    np.testing.assert_array_equal(widths(of_lengths(lengths)[1]), lengths)


@given(lengths=LENGTHS, rows=st.integers(1, 7))
@example(lengths=[4, 1, 1, 1], rows=2)
@settings(max_examples=60)
def test_no_other_cut_has_a_smaller_largest_area(lengths, rows):
    parts, wide = by_width(of_lengths(lengths)[1], rows), sorted((n for n in lengths if n), reverse=True)
    if not wide:
        np.testing.assert_array_equal(parts, [np.arange(min(rows, len(lengths)))])
        return
    assert sorted(np.concatenate(parts)) == [row for row, n in enumerate(lengths) if n]
    assert [lengths[row] for part in parts for row in part] == wide
    most = -(-len(wide) // rows)
    assert len(parts) <= most
    least = min(max((p.stop - p.start) * wide[p.start] for p in cut) for cut in all_cuts(len(wide)) if len(cut) <= most)
    assert max(len(part) * lengths[part[0]] for part in parts) == least <= rows * wide[0]


@given(lengths=LENGTHS, area=st.integers(1, 40))
def test_no_part_exceeds_the_area_or_fits_into_the_last(lengths, area):
    parts = of_area(of_lengths(lengths)[1], area)
    assert [lengths[row] for part in parts for row in part] == sorted((n for n in lengths if n), reverse=True)
    for i, part in enumerate(parts):
        assert len(part) == 1 or len(part) * lengths[part[0]] <= area
        assert i == 0 or (len(parts[i - 1]) + 1) * lengths[parts[i - 1][0]] > area


def test_rows_of_one_width_keep_their_order():
    """Of so many rows, a sort that may exchange equals does, and each processor's in its own way."""
    lengths = [1 + i % 3 for i in range(40)]
    for cut, most in ((by_width, 7), (of_area, 20)):
        rows = np.concatenate(cut(of_lengths(lengths)[1], most)).tolist()
        assert rows == sorted(range(40), key=lambda row: -lengths[row])


# --- memory that is kept from one step to the next ------------------------------------------------

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
COUNT = """
import resource, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from minilora.fast import keep_pages

def step():
    return [np.ones(size) for size in (400_000, 300_000, 8_000_000)]  # 3.2, 2.4 and 64 MB

def turn():
    with ThreadPoolExecutor(threads) as pool:  # new threads each time, as `accumulate` has them
        for _ in pool.map(lambda _: step(), range(threads)):
            pass

if sys.argv[1] == "keep" and not keep_pages():
    sys.exit("no glibc")
threads = int(sys.argv[2])
for _ in range(3):
    turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(how, threads):
    found = subprocess.run([sys.executable, "-c", COUNT, how, str(threads)], capture_output=True, text=True)
    if "no glibc" in found.stderr:
        pytest.skip("not glibc")
    assert found.returncode == 0, found.stderr
    return int(found.stdout)


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
def test_the_next_step_asks_for_no_new_pages(threads):
    assert new_pages("give back", threads) > 300
    assert new_pages("keep", threads) < 100


@LINUX
@pytest.mark.parametrize("refused", [None, -1, -4, -8])
def test_pages_are_kept_where_each_setting_is_taken(monkeypatch, refused):
    """By mallopt(3): -1 trims nothing, -4 at 0 maps nothing by itself, -8 at 1 has one arena for all threads."""
    taken = {-1: -1, -4: 0, -8: 1}
    library = SimpleNamespace(mallopt=lambda name, value: int(name != refused and taken[name] == value))
    monkeypatch.setattr("minilora.fast.parts.ctypes.CDLL", lambda name: library)
    assert keep_pages() is (refused is None)


@LINUX
def test_another_system_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr("minilora.fast.parts.sys.platform", "darwin")
    monkeypatch.setattr("minilora.fast.parts.ctypes.CDLL", lambda name: pytest.fail("asked a library"))
    assert keep_pages() is False
