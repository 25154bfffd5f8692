"""A training that was killed and resumed is, bit for bit, one that never was."""

import contextlib
import functools
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from minilora import (
    MLP,
    Adam,
    CheckpointError,
    Conv2d,
    Linear,
    LoRALinear,
    Sequential,
    TrainingDiverged,
    article,
    get_backend,
    mse,
    train,
)
from minilora.fast import accumulate
from minilora.files import checkpoint
from minilora.layer import rebuild
from minilora.training import TrainingState, backpropagate
from minilora.variants.dora import DoRAAdapter

from ..support.disk import Killed, contents, cut_at
from ..support.memory import traced

FIT = {"epochs": 7, "batch_size": 8, "lr": 0.01, "log_every": 2}
SMALL = {"epochs": 3, "n": 200, "in_features": 12, "out_features": 9, "batch_size": 32}
"""The article on a small problem."""
GENERATORS = ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"]


def problem(seed=0, *, kind="adapter", dtype="float32", seed_of_base=7, alpha=2.0, n=60, generator="PCG64"):
    """A model, its data and a generator: the same for the same arguments."""
    data, base = np.random.default_rng(5), np.random.default_rng(seed_of_base)
    X, Y = data.standard_normal((n, 6)).astype(dtype), data.standard_normal((n, 4)).astype(dtype)
    if kind == "layers":  # whose parameters' names have dots
        model = MLP.init(6, 3, 4, rng=base, dtype=dtype)
    elif kind == "linear":
        model = Linear.init(6, 4, rng=base, dtype=dtype)
    else:
        linear, rng = Linear.init(6, 4, rng=base, dtype=dtype), np.random.default_rng(8)
        model = LoRALinear.from_linear(linear, rank=2, alpha=alpha, rng=rng)
    return model, X, Y, np.random.Generator(getattr(np.random, generator)(seed))


def fit(checkpoint=None, gradients=None, **options):
    given = FIT | {name: options.pop(name) for name in FIT if name in options}
    model, X, Y, rng = problem(**options)
    given |= {} if gradients is None else {"gradients": gradients}
    history = train(model, X, Y, rng=rng, checkpoint=checkpoint, **given)
    return model, history, rng


def assert_same_bits(one, other):
    (model, history, rng), (model2, history2, rng2) = one, other
    assert history == history2
    assert repr(rng.bit_generator.state) == repr(rng2.bit_generator.state)
    for name, p in model.trainable().items():
        assert p.tobytes() == model2.trainable()[name].tobytes()


def text_of(file):
    with safe_open(file, framework="numpy") as opened:
        return json.loads(opened.metadata()["minilora_checkpoint"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of seven epochs."""
    file = tmp_path_factory.mktemp("sound") / "c"
    fit(file)
    return file.read_bytes()


@pytest.fixture
def kept(sound, tmp_path):
    (tmp_path / "c").write_bytes(sound)
    return tmp_path / "c"


# --- the same bits --------------------------------------------------------------------------------


@given(
    epochs=st.integers(1, 9), done=st.integers(0, 9), log_every=st.integers(1, 4),
    kind=st.sampled_from(["adapter", "linear", "layers"]), generator=st.sampled_from(GENERATORS),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_a_training_in_two_parts_equals_one(tmp_path_factory, epochs, done, log_every, kind, generator):
    """The first of no epoch, where it is stopped before the end of the first; in a folder that is new."""
    file, given = tmp_path_factory.mktemp("c") / "new" / "c", {"log_every": log_every, "kind": kind}
    given["generator"] = generator
    with pytest.MonkeyPatch.context() as patched:
        if not done:
            patched.setattr("minilora.training.draw_batches", lambda *a: 1 / 0)
        with contextlib.suppress(ZeroDivisionError):
            fit(file, epochs=min(done, epochs) or 1, **given)
    assert text_of(file)["epoch"] == min(done, epochs)
    assert_same_bits(fit(file, epochs=epochs, **given), fit(epochs=epochs, **given))


def test_a_training_that_is_done_is_only_read_again(tmp_path, monkeypatch):
    first = fit(tmp_path / "c")
    monkeypatch.setattr("minilora.training.draw_batches", None)
    assert_same_bits(fit(tmp_path / "c"), first)
    monkeypatch.setattr("minilora.training.loss_over", lambda *a, **b: float("inf"))
    with pytest.raises(TrainingDiverged, match="after epoch 7"):
        fit(tmp_path / "c")


def test_another_micro_batch_goes_on_to_rounding(kept):
    """The way to the gradients is no part of what is asked: the same numbers, added up in another order."""
    whole, (model, *_) = fit(epochs=9), fit(kept, accumulate(3), epochs=9)
    for name, p in model.trainable().items():
        np.testing.assert_allclose(p, whole[0].trainable()[name], rtol=1e-4, atol=1e-6)


def test_a_divergence_leaves_the_last_good_checkpoint(tmp_path):
    """Resumed with right gradients, the training ends as if nothing had been."""

    def run(file, poisoned_step=99):
        steps = iter(range(1, 99))

        def gradients(model, x, y, loss):
            factor = np.float32(np.nan if next(steps) == poisoned_step else 1)
            return {name: g * factor for name, g in backpropagate(model, x, y, loss).items()}

        return fit(file, gradients, epochs=4, log_every=1)

    said = r"^epoch 3: lora_A, lora_B is no longer finite, and the last loss .* 2\."
    with pytest.raises(TrainingDiverged, match=said):
        run(tmp_path / "c", poisoned_step=2 * 7 + 3)
    assert text_of(tmp_path / "c")["epoch"] == 2
    assert_same_bits(run(tmp_path / "c"), run(None))


def test_a_loss_that_diverges_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0, float("inf")])
    monkeypatch.setattr("minilora.training.loss_over", lambda *a, **b: next(losses))
    with pytest.raises(TrainingDiverged) as caught:
        fit(tmp_path / "c", epochs=4, log_every=1)
    assert str(caught.value) == (
        "the loss over all of X and Y is inf after epoch 3, and the last loss reported was 2 after epoch 2. "
        "The model keeps what the epoch left"
    )
    assert text_of(tmp_path / "c")["epoch"] == 2


def test_the_article_resumes_both_of_its_trainings(tmp_path, monkeypatch):
    whole, place = article.run(**SMALL), tmp_path / "c"
    for name in ("c", "c.adapter"):

        def keep(self, state, name=name, right=checkpoint.Checkpoint.keep):
            right(self, state)
            if (self.path.name, state.epoch) == (name, 2):
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.Checkpoint, "keep", keep)
            with pytest.raises(KeyboardInterrupt):
                article.run(**SMALL, checkpoint=place)
    assert sorted(os.listdir(tmp_path)) == ["c", "c.adapter"]
    for _ in range(2):  # what is done is read again
        resumed = article.run(**SMALL, checkpoint=place)
        assert (resumed.base_history, resumed.lora_history) == (whole.base_history, whole.lora_history)
        assert resumed.base.weight.tobytes() == whole.base.weight.tobytes()
        assert resumed.delta.tobytes() == whole.delta.tobytes()


# --- kills ----------------------------------------------------------------------------------------


def test_a_training_killed_while_writing_ends_with_the_same_bits(tmp_path):
    """Three calls make each write final: the file's fsync, its rename, the folder's fsync. Each is the last in turn."""
    never_killed, at, calls = fit(epochs=3), 0, 0
    while at <= calls:
        at, file = at + 1, tmp_path / str(at)
        with cut_at(at, ("fsync", "replace", "unlink")) as seen, contextlib.suppress(Killed):
            fit(file, epochs=3)
        calls = len(seen)
        assert_same_bits(fit(file, epochs=3), never_killed)
    assert at == 13  # the start and three epochs, and one more without a kill


# --- what is kept ---------------------------------------------------------------------------------


class Seeds(np.random.bit_generator.ISeedSequence):
    """A source of seeds without a name."""

    def generate_state(self, n_words, dtype=np.uint32):
        return np.ones(n_words, dtype)


def test_a_generator_is_known_by_its_seed():
    child = np.random.default_rng(3).spawn(2)[1]
    for rng, name in (
        (np.random.default_rng(3), "PCG64 of 3"),
        (child, "PCG64 of 3, spawned (1,)"),
        (child.spawn(1)[0], "PCG64 of 3, spawned (1, 0)"),
        (np.random.Generator(np.random.MT19937([1, 2])), "MT19937 of [1, 2]"),
        (np.random.Generator(np.random.SFC64(Seeds())), "SFC64 of None"),
    ):
        assert checkpoint.seed_of(rng) == name
        rng.random(5)
        assert checkpoint.seed_of(rng) == name


def test_what_is_frozen_is_named_by_its_path():
    conv = Conv2d(np.ones((3, 2, 1, 2)), stride=2)
    numbers = {"stride": "(2, 2)", "padding": "(0, 0)", "dilation": "(1, 1)"}
    alone = checkpoint.frozen_parts(conv, {})
    inside = checkpoint.frozen_parts(Sequential(c=conv), {"c.weight": conv.weight})
    assert alone.pop("frozen['weight']").startswith("float64 (3, 2, 1, 2), hash ")
    assert alone == {f"frozen['{name}']": text for name, text in numbers.items()}
    assert inside.pop("frozen['c']") == "Conv2d"
    assert inside == {f"frozen['c.{name}']": text for name, text in numbers.items()}  # its weight trains
    dora = DoRAAdapter(np.ones((1, 2)), np.ones((3, 1)), 1, magnitude=np.ones(3), dora_norm="full")
    assert checkpoint.frozen_parts(dora, {})["frozen['dora_norm']"] == "'full'"


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 3), (1000, 3, 2)])
def test_a_fingerprint_is_that_of_all_the_bytes(shape, monkeypatch):
    array = np.random.default_rng(0).standard_normal(shape)
    want = f"float64 {shape}, hash {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    for numbers in (1, 10, 1 << 20):
        monkeypatch.setattr(checkpoint, "FINGERPRINT_NUMBERS", numbers)
        assert checkpoint.fingerprint(array) == want
    assert checkpoint.fingerprint(array.copy(order="F")) == want


def test_notes_are_kept_with_each_state_and_not_compared(tmp_path):
    notes, (model, X, Y, rng) = {"rows": [1]}, problem()
    given = {"epochs": 3, "batch_size": 8, "rng": rng, "report": lambda state: notes["rows"].append(state.epoch)}
    train(model, X, Y, checkpoint=checkpoint.Checkpoint(tmp_path / "c", notes=notes), **given)
    assert checkpoint.read_checkpoint(tmp_path / "c").notes == {"rows": [1, 1, 2]}  # it is written before the report
    model, X, Y, rng = problem()
    train(model, X, Y, rng=rng, epochs=3, batch_size=8, checkpoint=tmp_path / "c")


def test_keeping_a_state_makes_no_second_copy_of_it(tmp_path):
    """Three arrays go into the file, whose bytes are made once."""
    rng = np.random.default_rng(0)
    model = Linear.init(700, 600, bias=False, rng=rng)
    state = TrainingState(model, Adam(model.trainable()), rng)
    with traced() as memory:
        checkpoint.Checkpoint(tmp_path / "c", {"rank": 1}).keep(state)
    assert memory.peak < 1.2 * 3 * model.weight.nbytes
    assert text_of(tmp_path / "c")["configuration"] == {"rank": 1}


def test_whatever_keeps_a_state_can_be_handed_to_train():
    class Memory:
        kept = ()

        def resume(self, state, epochs, settings, data):
            assert (state.epoch, epochs) == (0, 7)
            assert settings == {"batch_size": 8, "steps": 7, "log_every": 2, "loss": "mse"}
            assert list(data) == ["X", "Y", "held_out"]
            assert data["held_out"] is None

        def keep(self, state):
            self.kept += ((state.epoch, state.optimizer.t, list(state.history.epochs)),)

    memory = Memory()
    fit(memory)
    assert memory.kept == tuple((e, 7 * e, list(range(2, e + 1, 2))) for e in range(1, 8))
    for value in (5, [], object()):
        with pytest.raises(TypeError, match="checkpoint must be a path, got "):
            fit(value)


# --- another configuration ------------------------------------------------------------------------


def four(prediction, target):
    """The mean of the fourth powers."""
    away = prediction - target
    return float((away**4).mean()), 4 * away**3 / away.size


def assert_refused(file, match, **other):
    """A refused checkpoint leaves itself, the model and the generator as they were."""
    options = {"loss": mse, "held_out": None, "schedule": None, "weight_decay": 0.0, "max_grad_norm": None, "Y": None}
    options |= FIT
    options |= {name: other.pop(name) for name in list(other) if name in options}
    before, (model, X, Y, rng), targets = file.read_bytes(), problem(**other), options.pop("Y")
    start = {name: p.tobytes() for name, p in model.trainable().items()}
    state = rng.bit_generator.state
    with pytest.raises(CheckpointError, match=match) as error:
        train(model, X, Y if targets is None else targets, rng=rng, checkpoint=file, **options)
    assert f"'{file}" in str(error.value)
    assert str(error.value).isprintable()
    assert {name: p.tobytes() for name, p in model.trainable().items()} == start
    assert rng.bit_generator.state == state
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"lr": 0.02}, "lr is 0.01 there and 0.02 here"),
        ({"lr": {"": 0.01}}, "lr is 0.01 there and {'': 0.01} here"),
        ({"batch_size": 9}, "batch_size is 8 there and 9 here"),
        ({"log_every": 3}, "log_every"),
        ({"epochs": 6}, "epochs is 6, but the checkpoint has 7"),
        ({"seed": 1}, "rng is 'PCG64 of 0' there and 'PCG64 of 1' here"),
        ({"dtype": "float64"}, "float64"),
        ({"kind": "linear"}, "model is 'LoRALinear' there and 'Linear' here"),
        ({"n": 61}, r"X is .*\(60, 6\).* there and .*\(61, 6\)"),
        ({"Y": np.zeros((60, 4), "f4")}, r"configuration: Y is .* there and .* here"),
        ({"held_out": (np.zeros((2, 6), "f4"), np.zeros((2, 4), "f4"))}, r"held_out is None there and \["),
        ({"schedule": lambda t: 0.5}, "schedule is None there and "),
        ({"weight_decay": 0.1}, "weight_decay is None there and 0.1 here"),
        ({"max_grad_norm": 2.0}, "max_grad_norm is None there and 2.0 here"),
        ({"seed_of_base": 6}, r"frozen\['base.weight'\] is "),
        ({"alpha": 3.0}, r"frozen\['adapter.alpha'\] is '2.0' there and '3.0' here"),
        ({"loss": four}, "loss is 'mse' there and 'four' here"),
        ({"loss": functools.partial(four)}, "loss is 'mse' there and 'partial' here"),
    ],
)
def test_another_configuration_is_refused_naming_the_difference(kept, other, named):
    assert_refused(kept, named, **other)


def test_a_checkpoint_of_another_library_is_refused(kept, standin):
    (model, X, Y, rng), there = problem(), get_backend("cupy").asarray
    with pytest.raises(CheckpointError, match="backend is 'numpy' there and 'cupy' here"):
        train(rebuild(model, array=there), there(X), there(Y), rng=rng, checkpoint=kept, **FIT)


def test_one_number_of_many_that_differs_is_noticed(tmp_path):
    """In each row of the inputs and the targets, and in a frozen weight of which the first outputs know nothing."""
    X, Y = np.random.default_rng(5).standard_normal((9, 3)), np.zeros((9, 200))

    def run(**changed):
        arrays, rng = {"X": X.copy(), "Y": Y.copy()}, np.random.default_rng(7)
        layer = LoRALinear.from_linear(Linear.init(3, 200, rng=rng, dtype="float64"), rank=2, alpha=2.0, rng=rng)
        arrays["W"] = layer.base.weight
        for name, row in changed.items():
            arrays[name][row, -1] += 1e-12
        given = {"epochs": 1, "batch_size": 3, "checkpoint": tmp_path / "c"}
        return train(layer, arrays["X"], arrays["Y"], rng=np.random.default_rng(0), **given)

    run()
    for row in range(9):
        for name in "XY":
            with pytest.raises(CheckpointError, match=f"{name} is "):
                run(**{name: row})
    with pytest.raises(CheckpointError, match=r"frozen\['base.weight'\] is 'float64 \(200, 3\), hash .* there and"):
        run(W=-1)
    assert run().epochs == [1]


def test_of_many_differences_the_first_and_last_are_told(tmp_path):
    def fit(dtype):
        rng = np.random.default_rng(0)
        model = Sequential(**{f"l{i}": Linear.init(3, 3, rng=rng, dtype=dtype) for i in range(30)})
        X = np.ones((8, 3), dtype)
        train(model, X, X, epochs=1, batch_size=4, rng=rng, checkpoint=tmp_path / "c")

    fit("float32")
    with pytest.raises(CheckpointError, match=r"params\['l0.weight'\] is .* \.\.\. .*Use the same") as error:
        fit("float64")
    assert len(str(error.value)) < 1300


def test_a_checkpoint_is_kept_for_its_settings(tmp_path):
    file = tmp_path / "new" / "c"
    made = checkpoint.Checkpoint(file, {"rank": 1, "note": "a"})
    assert not file.parent.exists()  # nothing is written before the training starts
    assert_same_bits(fit(made), fit())
    before = file.read_bytes()
    assert {"rank": 1, "note": "a"}.items() <= text_of(file)["configuration"].items()
    assert_same_bits(fit(checkpoint.Checkpoint(file, {"rank": 1, "note": "a"}), epochs=9), fit(epochs=9))
    file.write_bytes(before)
    with pytest.raises(CheckpointError) as error:
        checkpoint.Checkpoint(file, {"rank": 2, "more": True, "note": "a"})
    assert str(error.value) == (
        f"{str(file)!r} is a checkpoint with a different configuration: rank is 1 there and 2 here; more is None there "
        "and True here. Use the same configuration, or choose another checkpoint"
    )
    for fewer in (None, {"rank": 1}):  # noticed when the training starts
        with pytest.raises(CheckpointError, match="note is 'a' there and None here"):
            fit(checkpoint.Checkpoint(file, fewer))
    assert file.read_bytes() == before


def test_the_article_refuses_another_configuration_before_it_draws(tmp_path, monkeypatch):
    place = tmp_path / "c"
    article.run(**SMALL, checkpoint=place)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: pytest.fail("something was drawn"))
    before = place.read_bytes()
    others = {"rank": 2, "alpha": 3.0, "seed": 1, "lr": 0.1, "dtype": "float64", "epochs": 4, "batch_size": 31}
    for name, value in {**others, "n": 201, "in_features": 13, "out_features": 8}.items():
        with pytest.raises(CheckpointError, match=rf"' is .* configuration: {name} is .* there and "):
            article.run(**{**SMALL, name: value}, checkpoint=place)
    assert place.read_bytes() == before


def test_the_articles_second_checkpoint_is_of_its_layer_and_base(tmp_path, monkeypatch):
    def alone(model, X, Y, gradients=None, **options):
        """An adapter without its base, on what the base leaves over, as in the fifth edition."""
        if isinstance(model, LoRALinear):
            model, Y = model.adapter, Y - model.base(X)
        return train(model, X, Y, **options)

    def other_base(*args, right=Linear.init, **options):
        layer = right(*args, **options)
        layer.weight *= 2
        return layer

    for change, said in (
        ((article, "train", alone), "model is 'LoRA' there and 'LoRALinear' here"),
        ((Linear, "init", other_base), r"frozen\['base.weight'\] is 'float32 \(9, 12\), hash .*' there and 'float32 "),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(*change)
            article.run(**SMALL, checkpoint=tmp_path / "c")
        os.remove(tmp_path / "c")
        before = (tmp_path / "c.adapter").read_bytes()
        with pytest.raises(CheckpointError, match=f"c.adapter' is a checkpoint with a different.*{said}"):
            article.run(**SMALL, checkpoint=tmp_path / "c")
        assert (tmp_path / "c.adapter").read_bytes() == before
        (tmp_path / "c.adapter").unlink()
        (tmp_path / "c").unlink()


# --- no sound checkpoint --------------------------------------------------------------------------


def test_mutated_checkpoints_resume_to_the_same_bits_or_are_refused(tmp_path):
    file, rng = tmp_path / "c", np.random.default_rng(0)
    first = fit(file, epochs=3)
    sound, refused = file.read_bytes(), 0
    for number in range(90):
        raw = bytearray(sound)
        if number % 3 == 0:
            del raw[int(rng.integers(len(raw))) :]
        else:
            raw[int(rng.integers(len(raw) if number % 3 == 1 else 200))] ^= 1 << int(rng.integers(8))
        file.write_bytes(raw)
        try:
            assert_same_bits(fit(file, epochs=3), first)
        except CheckpointError:
            refused += 1
    assert refused > 84


DAMAGED = "damaged: its checksum does not match its contents"


@pytest.mark.parametrize("part", ["m", "params", "v"])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_a_changed_name_or_number_of_any_tensor_is_damage(kept, part, name):
    raw, key = kept.read_bytes(), f"{part}.{name}"
    kept.write_bytes(raw.replace(f'"{key}"'.encode(), f'"{key[:-1]}C"'.encode()))  # its place in the order is the same
    assert_refused(kept, DAMAGED)
    header = 8 + int.from_bytes(raw[:8], "little")
    end = header + json.loads(raw[8:header])[key]["data_offsets"][1]
    kept.write_bytes(raw[: end - 4] + bytes([raw[end - 4] ^ 1]) + raw[end - 3 :])  # the last digit of the last number
    assert_refused(kept, DAMAGED)


@pytest.mark.parametrize("part", ["m", "params", "v"])
@pytest.mark.parametrize("shape", [[1, 2, 6], [12], [6, 2]])
def test_a_changed_shape_of_a_tensor_is_damage(kept, part, shape):
    """NumPy would broadcast the first, and the checksum is that of the numbers."""
    raw = kept.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    entries = json.loads(raw[8:header])
    entries[f"{part}.lora_A"]["shape"] = shape
    text = json.dumps(entries).encode()
    kept.write_bytes(len(text).to_bytes(8, "little") + text + raw[header:])
    model, X, Y, rng = problem()
    before = {name: p.copy() for name, p in model.trainable().items()}
    found = f"{part}.lora_A is float32 {tuple(shape)}, expected float32 (2, 6): the file is damaged"
    with pytest.raises(CheckpointError, match=re.escape(f"{str(kept)!r}: {found}") + "$"):
        train(model, X, Y, rng=rng, checkpoint=kept, **FIT)
    for name, p in model.trainable().items():
        np.testing.assert_array_equal(p, before[name])


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "there is no 'minilora_checkpoint'"),
        ({"minilora_checkpoint": "{}"}, DAMAGED),
        ({"minilora_checkpoint": "{", "crc32": None}, "Input data was truncated"),
        ({"minilora_checkpoint": '{"version": 3}', "crc32": None}, "Invalid enum value 3"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, metadata, reason):
    file, tensors = tmp_path / "c", {"params.lora_A": np.ones((2, 6), "f4")}
    if metadata and "crc32" in metadata:
        metadata = metadata | {"crc32": checkpoint.checksum(tensors, metadata["minilora_checkpoint"])}
    save_file(tensors, file, metadata)
    assert_refused(file, f"^the checkpoint cannot be read: '{file}': {reason}")


@pytest.mark.parametrize(
    ("make", "name", "error", "reason"),
    [
        (os.mkfifo, "c", CheckpointError, "not a regular file"),
        (os.mkdir, "c", CheckpointError, "not a regular file"),
        (lambda path: path.symlink_to("gone"), "c", CheckpointError, "No such file"),
        (Path.touch, "", ValueError, "checkpoint must be the path"),
        (Path.touch, "c/d", OSError, "c'$"),
        (Path.touch, "c/d/e", OSError, ": '.*c/d"),
        (Path.touch, "x" * 300, OSError, ": '.*x"),
    ],
)
def test_where_no_file_can_be_is_no_checkpoint(tmp_path, monkeypatch, make, name, error, reason):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "c")
    before = contents(tmp_path)
    for call in (fit, lambda place: article.run(**SMALL, checkpoint=place)):
        with pytest.raises(error, match=reason):
            call(tmp_path / name if name else "")
    assert contents(tmp_path) == before
