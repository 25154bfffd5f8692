"""The memory that training needs, by formula and measured, and the memory of machines, containers and GPUs."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora import Adam, Embedding, Linear, Llama, LlamaConfig, adapt, get_backend
from minilora.fast.blockwise import CPU
from minilora.language import memory as machine
from minilora.language.data import Data
from minilora.language.finetune import cut_to_fit
from minilora.language.llama import checkpointed
from minilora.language.memory import (
    LLAMA_2_7B,
    MATRICES,
    cache_bytes,
    count_numbers,
    measured_memory,
    parameter_bytes,
    step_bytes,
    training_memory,
)
from minilora.language.text import next_token_loss, windows
from minilora.layer import Record, parameter_count, rebuild
from minilora.layers.embedding import OneHot
from minilora.layers.rotary import frequencies
from minilora.training import backpropagate

from ..support.compare import calls_of, refused
from ..support.language import LETTERS, TEXT, drawn, tiny_llama, tiny_mixture
from ..support.memory import traced

sizes = st.integers(1, 6)


@st.composite
def configs(draw):
    key_value_heads = draw(st.integers(1, 3))
    heads = key_value_heads * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 2))
    tied, *biases = (draw(st.booleans()) for _ in range(3))
    widths = (draw(sizes), draw(sizes), draw(sizes), draw(sizes))
    return LlamaConfig(*widths, heads, key_value_heads, head_dim, 1e-5, frequencies(head_dim, 100.0), tied, *biases)


def of_zeros(config):
    return Llama.build(config, {name: np.zeros(shape, np.float32) for name, shape in config.shapes().items()})


@given(configs(), st.sets(st.sampled_from(MATRICES), min_size=1), st.integers(1, 4))
def test_trained_gradients_and_adam_are_those_of_real_adapters(config, targets, rank):
    found = training_memory(config, tokens=1, rank=rank, targets=sorted(targets))
    adapted = adapt(of_zeros(config), sorted(targets), rank=rank, alpha=1, rng=np.random.default_rng(0))
    params = adapted.trainable()
    adam = Adam(params)
    assert found["trained"] == found["gradients"] == sum(p.nbytes for p in params.values())
    assert found["Adam"] == sum(a.nbytes for moment in (adam.m, adam.v) for a in moment.values())


@given(configs().map(of_zeros) | st.sampled_from(["mixtral", "qwen2_moe", "qwen3_moe"]).map(tiny_mixture))
def test_full_training_takes_sixteen_bytes_per_weight(model):
    found, numbers = training_memory(model.config, tokens=1), parameter_count(model)
    assert sum(found[part] for part in ("weights", "trained", "gradients", "Adam")) == 16 * numbers
    assert sum(count_numbers(model.config)) == numbers


@given(configs(), st.integers(1, 50), st.sets(st.sampled_from(MATRICES)))
def test_activations_grow_with_tokens_and_with_targets(config, tokens, targets):
    def activations(tokens, targets, **more):
        return training_memory(config, tokens=tokens, rank=1, targets=sorted(targets), **more)["activations"]

    assert activations(tokens, targets) == tokens * activations(1, targets)
    assert activations(1, targets) <= activations(1, MATRICES)
    full = training_memory(config, tokens=1)["activations"]
    assert activations(1, MATRICES) == full + 2 * config.num_hidden_layers * 7
    assert training_memory(config, tokens=1, targets=sorted(targets)) == training_memory(config, tokens=1)


def test_a_layer_keeps_the_sum_of_the_pages_table():
    model = LlamaConfig(7, 100, 1000, 1, 10, 1, 12, 1e-5, frequencies(12, 100.0))
    everything = 2 * 100 + (2 * 120 + 2 * 12) + 100 + 100 + 2 * 1000 + 1000
    without = {"q_proj": everything, "down_proj": everything - 1000, "up_proj": everything}
    for dropped, kept in without.items():
        targets = [name for name in MATRICES if name != dropped]
        assert training_memory(model, tokens=3, rank=2, targets=targets)["activations"] == 2 * 3 * (kept + 6 * 2)
    found = training_memory(model, tokens=3, rank=2, targets=["o_proj"], recompute=True)["activations"]
    assert found == 2 * 3 * (everything - 200 - 1000 + 2)  # with one layer, all of it
    assert training_memory(model, tokens=3, rank=2)["logits"] == 4 * 3 * 7
    read = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 100),
        "o_proj": 0,
        "down_proj": 1000,
    }
    for target, more in read.items():
        found = training_memory(model, tokens=3, rank=2, targets=[target])["activations"]
        assert found == 2 * 3 * (everything - 200 - 1000 + more + 2), target


def test_norms_of_queries_and_keys_keep_their_inputs():
    plain, normed = (drawn(0, "float64", vocab_size=7, intermediate_size=20, num_hidden_layers=3, model_type=kind)
                     for kind in ("llama", "qwen3"))  # fmt: skip
    ids, numbers = np.arange(5)[None], 5 * 3 * 4 * (4 + 2)  # tokens, layers, head_dim, heads
    formula = [training_memory(model.config, tokens=5, rank=1)["activations"] for model in (plain, normed)]
    assert formula[1] - formula[0] == 2 * numbers
    options = {"rank": 2, "alpha": 4, "rng": np.random.default_rng(0)}
    kept = [cache_bytes(adapt(model, "all-linear", **options).forward(ids)[1]) for model in (plain, normed)]
    assert 8 * numbers <= kept[1] - kept[0] < 2 * 8 * numbers


def test_fewer_bits_shrink_only_the_frozen_matrices():
    found = {bits: training_memory(LLAMA_2_7B, tokens=1, rank=8, bits=bits) for bits in (16, 8, 4)}
    matrices, elsewhere = count_numbers(LLAMA_2_7B)
    assert matrices + elsewhere == 6_738_415_616  # as published
    a_weight = {bits: 8 * (parts["weights"] - 2 * elsewhere) / matrices for bits, parts in found.items()}
    assert a_weight == pytest.approx({16: 16, 8: 8.0078125, 4: 4.127}, abs=1e-4)
    assert len({tuple(v for k, v in parts.items() if k != "weights") for parts in found.values()}) == 1


def test_bad_input_is_refused():
    for change, error, said in (
        ({"bits": 4}, ValueError, "bits=4 with rank=None: all weights train, expected bits=16"),
        ({"bits": 5, "rank": 1}, ValueError, "bits must be 16, 8 or 4, got 5"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        *(({"rank": 1, "targets": [name]}, ValueError,
           "targets must be 'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj' or 'down_proj', got "
           f"{name!r}") for name in ("lm_head", "experts.down_proj")),
        ({"recompute": 1}, TypeError, "recompute must be True or False, got 1"),
    ):  # fmt: skip
        with refused(said, error):
            training_memory(LLAMA_2_7B, **{"tokens": 1, **change})


IDS = [LETTERS.index(c) for c in TEXT]


class Bare:
    """An array without the attribute `base`."""

    dtype, shape, nbytes = np.dtype("float64"), (3,), 24


def test_a_caches_bytes_exclude_the_models_arrays():
    layer, x, y, ids = Linear(np.zeros((8, 3))[:4]), np.zeros((6, 5)), np.zeros(7), np.array([[3, 1, 3]])
    embedding, no_array = Embedding(np.zeros((50, 4))), np.frombuffer(bytearray(8 * 12)).reshape(4, 3)
    for cache, size in [
        (Record(layer, (6, 4), (x[:2], [x[3:].T, x[:2][0]], y)), x.nbytes + y.nbytes),  # a view keeps what it looks at
        (Record(layer, (6, 4), (layer.weight.T, layer.weight.base[2:], y)), y.nbytes),  # but for the model's own
        (Record(embedding, (1, 3, 4), (OneHot(ids[0], 50, embedding.weight), ids)), ids.nbytes),  # one-hot: the ids
        (embedding.forward(ids)[1], ids.nbytes),
        (layer.forward(no_array)[1], no_array.nbytes),
        (Record(layer, (2,), Bare()), 24),
    ]:
        assert cache_bytes(cache) == size


@pytest.mark.parametrize("targets", ["all-linear", ["v_proj"], r".*\.1\.mlp\.down_proj"])
def test_the_counted_memory_is_what_python_allocates(targets):
    adapted = adapt(tiny_llama(), targets, rank=2, alpha=1, rng=np.random.default_rng(0))
    ids = np.array(IDS[:1000]).reshape(20, 50)
    with traced() as memory:
        cache = adapted.forward(ids)[1]
    assert cache_bytes(cache) == pytest.approx(memory.kept, rel=0.02)


# --- blocks that are computed again ---


def deep(model, targets, times):
    """Return a model with adapters whose blocks are repeated."""
    model.model.layers = [rebuild(block) for _ in range(times) for block in model.model.layers]
    return adapt(model, targets, rank=2, alpha=4, rng=np.random.default_rng(0))


@pytest.mark.parametrize(("make", "length"), [(tiny_mixture, 20), (tiny_llama, 140)])  # the page, and by blocks
def test_each_further_checkpointed_layer_keeps_only_its_input(make, length):
    ids = np.array(IDS[: 3 * length]).reshape(3, length)
    caches = [checkpointed(deep(make(), ["q_proj", "o_proj"], times)).forward(ids)[1] for times in (1, 2, 4)]
    inputs = 2 * ids.size * 12 * 8  # of two blocks
    for count in (cache_bytes, step_bytes):
        assert np.diff([count(cache) for cache in caches]).tolist() == pytest.approx([inputs, 2 * inputs], rel=0.02)
    plain = deep(make(), ["q_proj", "o_proj"], 1)
    x, kept = plain.model.embed_tokens(ids), []
    for block in plain.model.layers:
        y, cache = block.forward(x)
        kept.append(cache_bytes(cache) - x.nbytes)
        x = y
    assert step_bytes(caches[0]) - cache_bytes(caches[0]) == max(kept)


def test_below_the_lowest_adapter_no_input_is_kept():
    ids, sizes = np.array(IDS[:20])[None], []
    for times in (1, 3):
        model = deep(tiny_llama(), rf".*\.{2 * times - 1}\.mlp\.down_proj", times)
        sizes.append([cache_bytes(m.forward(ids)[1]) for m in (model, checkpointed(model))])
        assert step_bytes(checkpointed(model).forward(ids)[1]) == pytest.approx(sizes[-1][0], abs=ids.size * 12 * 8)
    assert sizes[0] == sizes[1]


def test_a_step_takes_less_by_the_predicted_amount():
    """The temporary arrays of the backward come on top, equally with and without checkpointing."""
    model, X = deep(tiny_llama(), "all-linear", 4), np.array(IDS)[:300].reshape(2, 150)
    peaks, counted = [], []
    for m in (model, checkpointed(model)):
        cache = m.forward(X)[1]
        counted.append(step_bytes(cache))
        of_block = counted[-1] - cache_bytes(cache)  # once more, for what its backward computes for the moment
        assert measured(m, X, 150).activations(2) == counted[-1] + of_block
        del cache
        with traced() as memory:
            backpropagate(m, X, X, next_token_loss)
        peaks.append(memory.peak)
    assert peaks[0] - peaks[1] == pytest.approx(counted[0] - counted[1], rel=0.05)
    assert counted[1] < counted[0] / 4


# --- what a step needs, measured on short rows ---


@pytest.fixture
def adapted():
    return adapt(tiny_llama(dtype="float32"), "all-linear", rank=2, alpha=4, rng=np.random.default_rng(0))


def measured(model, X, length, workers=1, held_out=70, width=None):
    return measured_memory(model, X, get_backend("numpy"))(length, workers, (held_out, width or length))


@pytest.mark.parametrize(("length", "workers"), [(1, 2), (2, 1), (8, 2), (192, 1), (193, 2), (300, 1)])
def test_the_memory_is_that_of_the_whole_batch(adapted, length, workers):
    X, *_ = windows(IDS * max(1, length // 80), length)
    found = measured(adapted, X, length, workers)
    logits, cache = adapted.forward(X[:7])
    assert found.activations(7) == cache_bytes(cache)
    assert found.logits * 7 == logits.nbytes
    trained = sum(a.nbytes for a in adapted.trainable().values())
    fixed = parameter_bytes(adapted) + 3 * trained
    assert found.together(700) == fixed + 100 * logits.nbytes + found.activations(700)
    at_once = min(70, workers * max(1, 512 // length))  # so many windows at a time, when the loss is measured
    assert found.together(1) == fixed + at_once * logits.nbytes // 7 + found.activations(1)
    single = measured(adapted, X[:1], length, workers)
    assert (single.together(1), single.further) == (found.together(1), single.first)


def test_the_memory_of_long_windows_is_measured_on_short_ones(adapted, monkeypatch):
    """A forward of long windows would need the very memory to be predicted, and the process would keep it."""
    seen = calls_of(monkeypatch, Llama, "forward")
    X, *_ = windows(IDS * 4, 900)
    of = measured_memory(adapted, X, get_backend("numpy"))
    for length in (300, 500, 900):
        of(length, 1, (1, length))
    assert max(x.shape[1] for _, x in seen) == 1.5 * CPU.plain_up_to
    assert len(seen) == 4  # once each


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_the_memory_of_a_mixture_is_predicted_from_short_windows(kind):
    """The routing depends on the tokens, and so does the memory, slightly."""
    model = adapt(tiny_mixture(kind), "all-linear", rank=1, alpha=4, rng=np.random.default_rng(0))
    X, *_ = windows(IDS, 250)
    assert measured(model, X, 250).activations(3) == pytest.approx(cache_bytes(model.forward(X[:3])[1]), rel=0.02)


def test_measured_rows_may_be_longer_than_trained_ones(adapted):
    X, *_ = windows(IDS * 4, 20)
    short, long = measured(adapted, X, 20, held_out=6), measured(adapted, X, 20, held_out=6, width=300)
    logits = adapted.forward(np.tile(X[:1], (1, 15)))[0].nbytes  # of a row of 300
    assert long.all_logits(1) == logits  # one at a time
    assert short.all_logits(1) == 6 * logits // 15
    assert long.activations(3) == short.activations(3)


def test_a_row_beyond_what_is_measured_at_once_counts_whole(adapted):
    X, *_ = windows(IDS * 4, 20)
    longer = measured(adapted, X, 20, held_out=6, width=600)
    assert longer.all_logits(1) == 30 * longer.logits


@given(most=st.integers(1, 200), parts=st.integers(1, 3), free=st.integers(0, 40_000_000))
def test_the_rows_that_fit_are_the_most(most, parts, free):
    memory = machine.StepMemory(weights=1000, state=500, first=90_000, further=80_000, logits=20_000, measured=4)
    rows = memory.rows_that_fit(free, most, parts)
    assert 0 <= rows <= most
    assert rows == 0 or memory.together(rows * parts) <= free
    assert rows == most or memory.together((rows + 1) * parts) > free


@given(free=st.integers(0, 30_000))
def test_examples_are_truncated_to_the_longest_rows_that_fit(free):
    def needs(length, workers, held_out):
        rows, width = held_out
        return machine.StepMemory(100, 0, 50 * length, 40 * length, 20 * length, measured=rows * width / length)

    X = np.zeros((7, 100), int)
    data = Data(X, X, X, X, 7, "examples", "", 100, 100, with_length=lambda length: replace(data, length=length))
    fits = [length for length in range(1, 101) if needs(length, 2, (7, length)).together(2) <= free]
    found = cut_to_fit(data, needs, 2, free).length
    assert found == (max(fits) if len(fits) > 1 else 100)  # where nothing fits, what is needed is told


def test_evaluation_needs_the_memory_of_one_layer(adapted):
    """The number of layers does not matter, since evaluation keeps no caches."""
    X, *_ = windows(IDS * 3, 300)
    logits, cache = adapted.forward(X)
    with traced() as memory:
        found = adapted(X)
    np.testing.assert_array_equal(found, logits)
    with traced() as of_a_step:
        del cache, logits
        adapted.forward(X)
    assert memory.peak < 0.75 * of_a_step.peak


# --- what the machine has ---


def test_on_a_gpu_the_memory_is_the_devices():
    def backend(**runtime):
        return SimpleNamespace(
            name="cupy",
            xp=SimpleNamespace(
                cuda=SimpleNamespace(runtime=SimpleNamespace(**runtime)),
                get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: 2),
            ),
        )

    assert machine.machine_memory(backend(memGetInfo=lambda: (3, 10))) == machine.Memory(whole=10, free=5)
    assert machine.machine_memory(backend()) is None


def test_the_machines_memory_is_at_most_what_it_has():
    found = machine.machine_memory(get_backend("numpy"))
    assert 0 < found.free <= found.whole <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("version", "line", "place"),
    [
        *(("", "0::/a/b\n", place) for place in ("", "a", "a/b")),
        ("memory", "4:cpu,memory:/a/b\n", "a"),
        ("memory", "4:cpu,memory:/x/y\n", ""),  # in a container the root has it, and the line is the host's
    ],
)
def test_a_limit_at_any_group_above_the_process_counts(tmp_path, monkeypatch, version, line, place):
    """This holds for both versions of control groups. The process is in a/b, below a, below the root."""
    limit, use, stat = {  # as the kernel's documentation has them
        "": ("memory.max", "memory.current", "inactive_file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[version]
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text(line)
    for used, free in ((2_000_000, 1_500_000), (3_400_000, 100_000), (3_600_000, 0)):
        for group in ("", "a", "a/b"):
            folder = tmp_path / version / group
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit).write_text("3000000\n" if group == place else "max\n")
            (folder / use).write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"inactive_file 7\n{stat} 500000\n")
        assert machine.machine_memory(get_backend("numpy")) == machine.Memory(3_000_000, free)
    for other in ("5:pids:/\n", "0::/a/b\n" if version else "4:cpu,memory:/x/y\n"):  # none of these groups
        (tmp_path / "own").write_text(other)
        assert machine.machine_memory(get_backend("numpy")).whole > 3_000_000
