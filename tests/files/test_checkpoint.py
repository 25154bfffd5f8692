"""A training that was killed and resumed is, bit for bit, one that never was."""

import contextlib
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
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

from ..support.memory import traced

ROOT = Path(__file__).parents[2]


def problem(seed=0, *, adapter=True, dtype="float32", seed_of_base=7, alpha=2.0, n=60):
    """A model, its data and a generator: the same for the same arguments."""
    data = np.random.default_rng(5)
    X, Y = data.standard_normal((n, 6)).astype(dtype), data.standard_normal((n, 4)).astype(dtype)
    model = Linear.init(6, 4, rng=np.random.default_rng(seed_of_base), dtype=dtype)
    if adapter:
        model = LoRALinear.from_linear(model, rank=2, alpha=alpha, rng=np.random.default_rng(8))
    return model, X, Y, np.random.default_rng(seed)


def fit(checkpoint=None, *, epochs=7, batch_size=8, lr=0.01, log_every=2, **options):
    model, X, Y, rng = problem(**options)
    settings = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "log_every": log_every}
    history = train(model, X, Y, rng=rng, checkpoint=checkpoint, **settings)
    return model, history, rng


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


def assert_same_bits(one, other):
    (model, history, rng), (model2, history2, rng2) = one, other
    assert history == history2
    assert rng.bit_generator.state == rng2.bit_generator.state
    for name, p in model.trainable().items():
        assert p.tobytes() == model2.trainable()[name].tobytes()


@given(epochs=st.integers(1, 9), done=st.integers(1, 9), log_every=st.integers(1, 4), adapter=st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_training_in_two_parts_equals_one(tmp_path_factory, epochs, done, log_every, adapter):
    file = tmp_path_factory.mktemp("c") / "checkpoint.safetensors"
    done = min(done, epochs)
    fit(file, epochs=done, log_every=log_every, adapter=adapter)
    resumed = fit(file, epochs=epochs, log_every=log_every, adapter=adapter)
    assert_same_bits(resumed, fit(epochs=epochs, log_every=log_every, adapter=adapter))


def test_a_model_of_layers_goes_on_in_a_new_folder(tmp_path):
    """Its parameters' names have dots."""

    def run(checkpoint, epochs):
        model, data = MLP.init(3, 4, 2, rng=np.random.default_rng(1)), np.random.default_rng(2)
        X, Y = data.standard_normal((20, 3)).astype("f4"), data.standard_normal((20, 2)).astype("f4")
        rng = np.random.default_rng(3)
        history = train(model, X, Y, epochs=epochs, batch_size=4, rng=rng, checkpoint=checkpoint)
        return history.losses, {name: p.tobytes() for name, p in model.trainable().items()}

    run(tmp_path / "new" / "folder" / "c", 2)
    assert run(tmp_path / "new" / "folder" / "c", 5) == run(None, 5)


def test_a_training_stopped_in_its_first_epoch_starts_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(sys.modules["minilora.training"], "draw_batches", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "c")
    assert text_of(tmp_path / "c")["epoch"] == 0
    assert_same_bits(fit(tmp_path / "c"), fit())


def test_a_checkpoint_of_another_library_is_refused(tmp_path, standin):
    fit(tmp_path / "c", epochs=1)
    (model, X, Y, rng), there = problem(), get_backend("cupy").asarray
    with pytest.raises(CheckpointError, match="backend is 'numpy' there and 'cupy' here"):
        train(
            rebuild(model, array=there), there(X), there(Y), epochs=1, batch_size=8, lr=0.01, log_every=2, rng=rng,
            checkpoint=tmp_path / "c",
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
def test_every_bit_generator_of_numpy_resumes(tmp_path, kind):
    def run(epochs, checkpoint):
        model, X, Y, _ = problem()
        rng = np.random.Generator(getattr(np.random, kind)(3))
        train(model, X, Y, epochs=epochs, batch_size=8, rng=rng, checkpoint=checkpoint)
        return model.adapter.lora_A.tobytes(), rng.random()

    run(2, tmp_path / "c")
    assert run(4, tmp_path / "c") == run(4, None)


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


def test_a_training_that_is_done_is_only_read_again(tmp_path, monkeypatch):
    first = fit(tmp_path / "c")
    monkeypatch.setattr(sys.modules["minilora.training"], "draw_batches", None)
    assert_same_bits(fit(tmp_path / "c"), first)


def four(prediction, target):
    """The mean of the fourth powers."""
    away = prediction - target
    return float((away**4).mean()), 4 * away**3 / away.size


def assert_refused(file, match, **other):
    """A refused checkpoint leaves itself, the model and the generator as they were."""
    settings = {
        "epochs": 7,
        "batch_size": 8,
        "lr": 0.01,
        "log_every": 2,
        "loss": mse,
        "held_out": None,
        "schedule": None,
        "weight_decay": 0.0,
        "max_grad_norm": None,
        "Y": None,
    }
    settings |= {name: other.pop(name) for name in list(other) if name in settings}
    before, (model, X, Y, rng), given = file.read_bytes(), problem(**other), settings.pop("Y")
    start = {name: p.tobytes() for name, p in model.trainable().items()}
    state = rng.bit_generator.state
    with pytest.raises(CheckpointError, match=match) as error:
        train(model, X, Y if given is None else given, rng=rng, checkpoint=file, **settings)
    assert f"'{file}" in str(error.value)
    assert str(error.value).isprintable()
    assert {name: p.tobytes() for name, p in model.trainable().items()} == start
    assert rng.bit_generator.state == state
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"lr": 0.02}, "lr is 0.01 there and 0.02 here"),
        ({"batch_size": 9}, "batch_size is 8 there and 9 here"),
        ({"log_every": 3}, "log_every"),
        ({"epochs": 6}, "epochs is 6 here, and 7 are done there"),
        ({"seed": 1}, "rng is 'PCG64 of 0' there and 'PCG64 of 1' here"),
        ({"dtype": "float64"}, "float64"),
        ({"adapter": False}, "model is 'LoRALinear' there and 'Linear' here"),
        ({"n": 61}, r"X is .*\(60, 6\).* there and .*\(61, 6\)"),
        ({"Y": np.zeros((60, 4), "f4")}, r"configuration: Y is .* there and .* here"),
        (
            {"held_out": (np.zeros((2, 6), "f4"), np.zeros((2, 4), "f4"))},
            r"configuration: held_out is None there and \[",
        ),
        ({"schedule": lambda t: 0.5}, "schedule is None there and "),
        ({"weight_decay": 0.1}, "weight_decay is None there and 0.1 here"),
        ({"max_grad_norm": 2.0}, "max_grad_norm is None there and 2.0 here"),
        ({"seed_of_base": 6}, "frozen"),
        ({"alpha": 3.0}, "frozen"),
        ({"loss": four}, "loss is 'mse' there and 'four' here"),
        ({"loss": functools.partial(four)}, "loss is 'mse' there and 'partial' here"),
    ],
)
def test_another_configuration_is_refused_naming_the_difference(kept, other, named):
    assert_refused(kept, named, **other)


def test_another_micro_batch_goes_on_to_rounding(tmp_path):
    """The way to the gradients is no part of what is asked: the same numbers, added up in another order."""
    whole, halves = fit(epochs=9), problem()
    fit(tmp_path / "c")
    model, X, Y, rng = halves
    options = {"epochs": 9, "batch_size": 8, "lr": 0.01, "log_every": 2}
    train(model, X, Y, rng=rng, checkpoint=tmp_path / "c", gradients=accumulate(3), **options)
    for name, p in model.trainable().items():
        np.testing.assert_allclose(p, whole[0].trainable()[name], rtol=1e-4, atol=1e-6)


def test_mutated_checkpoints_resume_to_the_same_bits_or_are_refused(tmp_path):
    file, rng = tmp_path / "c", np.random.default_rng(0)
    first = fit(file, epochs=3)
    sound, refused = file.read_bytes(), 0
    for number in range(150):
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
    assert refused > 140


def text_of(file):
    with safe_open(file, framework="numpy") as opened:
        return json.loads(opened.metadata()["minilora_checkpoint"])


DAMAGED = "damaged: its checksum is not that of its contents"


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


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, "no checkpoint of a training"),
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


def test_one_row_of_many_that_differs_is_noticed(tmp_path):
    """Each row in turn, of the inputs and of the targets; with 9 rows, and with many hashed in parts."""
    data, targets = np.random.default_rng(5).standard_normal((9, 6)), np.zeros((9, 4))
    options = {"epochs": 1, "batch_size": 3, "checkpoint": tmp_path / "c"}

    def run(X, Y):
        model = LoRALinear.from_linear(Linear.init(6, 4, rng=np.random.default_rng(7), dtype="float64"), **LORA())
        return train(model, X, Y, rng=np.random.default_rng(0), **options)

    run(data, targets)
    for row in range(9):
        for name in "XY":
            X, Y = data.copy(), targets.copy()
            {"X": X, "Y": Y}[name][row, -1] += 1e-12
            with pytest.raises(CheckpointError, match=f"{name} is "):
                run(X, Y)
    assert run(data, targets).epochs == [1]


def LORA():
    return {"rank": 2, "alpha": 2.0, "rng": np.random.default_rng(8)}


def test_a_frozen_number_far_from_the_first_outputs_is_noticed(tmp_path):
    """The output's first 64 entries do not depend on it."""
    X, Y = np.ones((8, 3), "f4"), np.zeros((8, 200), "f4")

    def run(change=0.0, alpha=2.0):
        rng = np.random.default_rng(7)
        layer = LoRALinear.from_linear(Linear.init(3, 200, rng=rng), rank=2, alpha=alpha, rng=rng)
        layer.base.weight[-1, -1] += change
        return train(layer, X, Y, epochs=1, batch_size=8, rng=np.random.default_rng(0), checkpoint=tmp_path / "c")

    run()
    with pytest.raises(CheckpointError, match=r"frozen\['base.weight'\] is 'float32 \(200, 3\), hash .* there and"):
        run(change=1e-3)
    with pytest.raises(CheckpointError, match=r"frozen\['adapter.alpha'\] is '2.0' there and '3.0' here"):
        run(alpha=3.0)
    assert run().epochs == [1]


def test_what_is_frozen_is_named_by_its_path():
    conv = Conv2d(np.ones((3, 2, 1, 2)), stride=2)
    numbers = {"stride": "(2, 2)", "padding": "(0, 0)", "dilation": "(1, 1)"}
    alone, inside = (
        checkpoint.frozen_parts(conv, {}),
        checkpoint.frozen_parts(Sequential(c=conv), {"c.weight": conv.weight}),
    )
    assert alone.pop("frozen['weight']").startswith("float64 (3, 2, 1, 2), hash ")
    assert alone == {f"frozen['{name}']": text for name, text in numbers.items()}
    assert inside.pop("frozen['c']") == "Conv2d"
    assert inside == {f"frozen['c.{name}']": text for name, text in numbers.items()}  # its weight trains


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7, 3), (1000, 3, 2)])
def test_a_fingerprint_is_that_of_all_the_bytes(shape, monkeypatch):
    array = np.random.default_rng(0).standard_normal(shape)
    want = f"float64 {shape}, hash {hashlib.sha256(array.tobytes()).hexdigest()[:16]}"
    for numbers in (1, 10, 1 << 20):
        monkeypatch.setattr(checkpoint, "FINGERPRINT_NUMBERS", numbers)
        assert checkpoint.fingerprint(array) == want
    assert checkpoint.fingerprint(array.copy(order="F")) == want


def test_a_checkpoint_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="checkpoint must be the path"):
        fit("")
    with pytest.raises(ValueError, match="checkpoint must be the path"):
        article.run(checkpoint="")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "not a regular file"),
        (os.mkdir, "not a regular file"),
        (lambda path: path.symlink_to("gone"), "No such file"),
    ],
)
def test_only_a_regular_file_is_a_checkpoint(tmp_path, make, reason):
    make(tmp_path / "c")
    for call in (fit, lambda place: article.run(**SMALL, checkpoint=place)):
        with pytest.raises(CheckpointError, match=reason):
            call(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("name", ["file", "file/c", "x" * 300])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, name):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OSError, match=f": '{tmp_path / name}"):
        fit(tmp_path / name / "c")
    assert (tmp_path / "file").read_text() == "precious"


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
        f"{str(file)!r} is a checkpoint of another configuration: rank is 1 there and 2 here; more is None there and "
        "True here. Ask for the same, or name another checkpoint"
    )
    for fewer in (None, {"rank": 1}):  # noticed when the training starts
        with pytest.raises(CheckpointError, match="note is 'a' there and None here"):
            fit(checkpoint.Checkpoint(file, fewer))
    assert file.read_bytes() == before


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


@pytest.mark.parametrize("value", [5, [], object()])
def test_what_keeps_no_state_is_refused(value):
    with pytest.raises(TypeError, match="checkpoint must be a path, got "):
        fit(value)


def test_a_divergence_leaves_the_last_good_checkpoint(tmp_path):
    """Resumed with right gradients, the training ends as if nothing had been."""

    def run(file, poisoned_step=99):
        model, X, Y, rng = problem()
        steps = iter(range(1, 99))

        def gradients(model, x, y, loss):
            factor = np.float32(np.nan if next(steps) == poisoned_step else 1)
            return {name: g * factor for name, g in backpropagate(model, x, y, loss).items()}

        history = train(model, X, Y, epochs=4, batch_size=8, rng=rng, log_every=1, checkpoint=file, gradients=gradients)
        return model, history, rng

    with pytest.raises(
        TrainingDiverged, match=r"^epoch 3: lora_A, lora_B is no longer finite, and the last loss .* 2\."
    ):
        run(tmp_path / "c", poisoned_step=2 * 7 + 3)
    assert text_of(tmp_path / "c")["epoch"] == 2
    assert_same_bits(run(tmp_path / "c"), run(None))


def test_a_loss_that_diverges_leaves_the_last_good_checkpoint(tmp_path):
    model, X, Y, rng = problem()
    losses = iter([1.0, 2.0, float("inf")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["minilora.training"], "evaluate", lambda *a: next(losses))
        with pytest.raises(TrainingDiverged) as caught:
            train(model, X, Y, epochs=4, batch_size=8, rng=rng, log_every=1, checkpoint=tmp_path / "c")
    assert str(caught.value) == (
        "the loss over all of X and Y is inf after epoch 3, and the last loss reported was 2 after epoch 2. "
        "The model keeps what the epoch left"
    )
    assert text_of(tmp_path / "c")["epoch"] == 2


def test_keeping_a_state_makes_no_second_copy_of_it(tmp_path):
    """Three arrays go into the file, whose bytes are made once."""
    rng = np.random.default_rng(0)
    model = Linear.init(700, 600, bias=False, rng=rng)
    state = TrainingState(model, Adam(model.trainable()), rng)
    file = checkpoint.Checkpoint(tmp_path / "c", {"rank": 1})
    with traced() as memory:
        file.keep(state)
    assert memory.peak < 1.2 * 3 * model.weight.nbytes
    assert text_of(tmp_path / "c")["configuration"] == {"rank": 1}


# --- kills ---

TRAIN = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from minilora import Linear, LoRALinear, save_adapter, train

data = np.random.default_rng(5)
X, Y = data.standard_normal((400, 60)), data.standard_normal((400, 40))
model = LoRALinear.from_linear(Linear.init(60, 40, rng=data, dtype="float64"), rank=8, alpha=2, rng=data)
history = train(model, X, Y, epochs=25, batch_size=8, log_every=3, rng=data, checkpoint=sys.argv[1] or None)
print(history, model.adapter.lora_A.tobytes().hex(), model.adapter.lora_B.tobytes().hex(), data.random())
"""


def start(checkpoint):
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(checkpoint)], stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def never_killed():
    process = start("")
    return process.communicate()[0]


def written(file):
    return file.stat().st_mtime_ns if file.exists() else 0


def kill_at_random_moments(folder, kills, rng, expected):
    """Kill a training a few times, let it end, and start another one, until there were so many kills."""
    done = runs = 0
    while done < kills:
        checkpoint, output = folder / f"{runs}.safetensors", None
        for _ in range(min(4, kills - done)):
            before, process = written(checkpoint), start(checkpoint)
            while written(checkpoint) == before and process.poll() is None:
                time.sleep(0.0005)  # the imports are over once it writes
            time.sleep(float(rng.uniform(0, 0.05)))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
            output = process.communicate()[0]
            if process.returncode == 0:
                break
        if process.returncode != 0:
            output = start(checkpoint).communicate()[0]
        assert output == expected
        runs += 1


@pytest.mark.long
def test_a_training_killed_at_random_ends_with_the_same_bits(tmp_path, never_killed):
    kill_at_random_moments(tmp_path, 2, np.random.default_rng(0), never_killed)


class Killed(BaseException):
    """Where a process is killed, nothing that comes later is done."""


def test_a_training_killed_while_writing_ends_with_the_same_bits(tmp_path, monkeypatch):
    """Three calls make each write final: the file's fsync, its rename, the folder's fsync. Each is the last in turn."""
    never_killed, at, calls = fit(epochs=3), 0, []

    def deadly(real):
        def call(*args, **options):
            calls.append(args)
            if len(calls) >= at:
                raise Killed
            return real(*args, **options)

        return call

    while at <= len(calls):
        at, file = at + 1, tmp_path / str(at)
        calls.clear()
        with monkeypatch.context() as patched, contextlib.suppress(Killed):
            for name in ("fsync", "replace", "unlink"):
                patched.setattr(os, name, deadly(getattr(os, name)))
            fit(file, epochs=3)
        assert_same_bits(fit(file, epochs=3), never_killed)
    assert at == 13  # the start and three epochs, and one more without a kill


SMALL = {"epochs": 3, "n": 200, "in_features": 12, "out_features": 9, "batch_size": 32}


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
        assert resumed.base_history == whole.base_history
        assert resumed.lora_history == whole.lora_history
        assert resumed.base.weight.tobytes() == whole.base.weight.tobytes()
        assert resumed.delta.tobytes() == whole.delta.tobytes()


def test_the_article_refuses_another_configuration_before_anything_is_drawn(tmp_path, monkeypatch):
    place = tmp_path / "c"
    article.run(**SMALL, checkpoint=place)
    monkeypatch.setattr(np.random, "default_rng", lambda seed: pytest.fail("something was drawn"))
    before = place.read_bytes()
    others = {"rank": 2, "alpha": 3.0, "seed": 1, "lr": 0.1, "dtype": "float64", "epochs": 4, "batch_size": 31}
    for name, value in {**others, "n": 201, "in_features": 13, "out_features": 8}.items():
        with pytest.raises(CheckpointError, match=rf"' is .* configuration: {name} is .* there and "):
            article.run(**{**SMALL, name: value}, checkpoint=place)
    assert place.read_bytes() == before


def test_notes_are_kept_with_each_state_and_not_compared(tmp_path):
    notes, (model, X, Y, rng) = {"rows": [1]}, problem()
    given = {"epochs": 3, "batch_size": 8, "rng": rng, "report": lambda state: notes["rows"].append(state.epoch)}
    train(model, X, Y, checkpoint=checkpoint.Checkpoint(tmp_path / "c", notes=notes), **given)
    assert checkpoint.read_checkpoint(tmp_path / "c").notes == {"rows": [1, 1, 2]}  # it is written before the report
    model, X, Y, rng = problem()
    train(model, X, Y, rng=rng, epochs=3, batch_size=8, checkpoint=tmp_path / "c")


def test_of_many_differences_the_first_and_last_are_told(tmp_path):
    def fit(**widths):
        rng = np.random.default_rng(0)
        model = Sequential(**{f"l{i}": Linear.init(3, 3, rng=rng, **widths) for i in range(30)})
        train(
            model, *2 * [np.ones((8, 3), widths["dtype"])], epochs=1, batch_size=4, rng=rng, checkpoint=tmp_path / "c"
        )

    fit(dtype="float32")
    with pytest.raises(CheckpointError, match=r"params\['l0.weight'\] is .* \.\.\. .*Ask for the same") as error:
        fit(dtype="float64")
    assert len(str(error.value)) < 1300
