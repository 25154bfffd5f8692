"""`examples/microlora.py` beside the same model made of minilora's layers, and planted mistakes that this shows."""

import contextlib
import io
import math
import re
import subprocess
import sys
import types
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minilora import Adam, Embedding, Linear, LoRA, LoRALinear, RMSNorm, cross_entropy
from minilora.layer import nest
from minilora.layers.attention import Attention
from minilora.layers.rotary import Rotary
from minilora.variants.adapter import AdaptedRows

from ..support.sample import one_in

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "microlora.py"
TEXT = FILE.read_text(encoding="utf-8")
RATES = (0.005, 0.01)


def load(*changes):
    """Return the module, with each (old, new) exchanged in its text."""
    text = TEXT
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    module = types.ModuleType("microlora")
    module.__file__ = str(FILE)
    exec(compile(text, str(FILE), "exec"), vars(module))
    module.random.seed(0)
    return module


def adapt(module, model):
    model.layers = {name: module.LoRA(layer, module.RANK, module.ALPHA) for name, layer in model.layers.items()}


def learn(module, model, names, lr):
    with contextlib.redirect_stdout(io.StringIO()):
        return module.learn(model, names, lr)


class Twin:
    """The same model of minilora's layers. A letter and its place are two ids of one table, whose vectors add."""

    def __init__(self, module, layers):
        self.letters, width = module.LETTERS, module.WIDTH
        linear = {name: Linear(np.array(layer.W)) for name, layer in layers.items()}
        self.table = Embedding(linear["embed"].weight.T.copy())
        self.norms = [RMSNorm(np.ones(width), eps=1e-6) for _ in range(2)]
        # Frequencies of zero turn nothing: positions come in with the embedding.
        still = Rotary((0.0,) * (width // 2))
        self.attention = Attention(*(linear[name] for name in "qkvo"), rotary=still)
        self.head = linear["head"]

    def adapt(self, layers, alpha):
        """Put beside each layer an adapter with the numbers of the one there."""
        beside = {name: LoRA(np.array(layer.A), np.array(layer.B), alpha) for name, layer in layers.items()}
        self.table = AdaptedRows(self.table, beside["embed"])
        for name in "qkvo":
            path = f"{name}_proj"
            setattr(self.attention, path, LoRALinear(getattr(self.attention, path), beside[name]))
        self.head = LoRALinear(self.head, beside["head"])

    def parts(self):
        """Return the layers under the names that they have there."""
        inner = {name: getattr(self.attention, f"{name}_proj") for name in "qkvo"}
        return inner | {"embed": self.table, "head": self.head}

    def params(self):
        return {f"{name}.{key}": p for name, part in self.parts().items() for key, p in part.trainable().items()}

    def forward(self, letters):
        ids = np.array([self.letters.index(letter) for letter in letters])
        both = np.stack([ids, len(self.letters) + np.arange(len(ids))])  # (2, T)
        rows, self.c_table = self.table.forward(both)
        x = rows.sum(axis=0)  # (T, WIDTH)
        n, self.c_norm = self.norms[0].forward(x)
        branch, self.c_attention = self.attention.forward(n)
        m, self.c_last = self.norms[1].forward(x + branch)
        z, self.c_head = self.head.forward(m)
        return z

    def loss_and_gradients(self, name):
        z = self.forward("." + name)
        loss, dz = cross_entropy(z, np.array([self.letters.index(letter) for letter in name + "."]))
        dm, head = self.head.backward(dz, self.c_head)
        dx, _ = self.norms[1].backward(dm, self.c_last)
        dn, attention = self.attention.backward(dx, self.c_attention)
        dx = dx + self.norms[0].backward(dn, self.c_norm)[0]
        _, table = self.table.backward(np.stack([dx, dx]), self.c_table)
        grads = {key.replace("_proj", ""): g for key, g in attention.items()}
        return float(loss), grads | nest("embed", table) | nest("head", head)

    def learn(self, names, lr):
        adam, losses = Adam(self.params(), lr=lr), []
        for step, name in enumerate(names):
            adam.lr = lr * (1 - step / len(names))
            loss, grads = self.loss_and_gradients(name)
            adam.step(grads)
            losses.append(loss)
        return losses


def as_here(layers):
    """Return the matrices that there train and their gradients, under the names of `Twin.params`."""
    arrays = {}
    for name, layer in layers.items():
        keys = ("lora_A", "lora_B") if hasattr(layer, "A") else ("weight",)
        assert len(layer.trained) == len(keys), name
        for key, pair in zip(keys, layer.trained, strict=True):
            W, dW = map(np.array, pair)
            arrays[f"{name}.{key}"] = (W.T, dW.T) if (name, key) == ("embed", "weight") else (W, dW)
    return arrays


def close(actual, expected, within, what):
    assert np.shape(actual) == np.shape(expected), what
    gap = np.max(np.abs(np.asarray(actual) - expected)) / max(1e-3, np.max(np.abs(expected)))
    assert gap <= within, f"{what}: {gap:.1e} apart"


def check_gradients(module, model, twin, name):
    loss, dz = module.cross_entropy(model.forward("." + name), name + ".")
    model.backward(dz)
    expected_loss, expected = twin.loss_and_gradients(name)
    close(loss, expected_loss, 1e-12, "loss")
    arrays = as_here(model.layers)
    assert arrays.keys() == expected.keys()
    for key, g in expected.items():
        close(arrays[key][1], g, 1e-12, key)


def check(module, steps):
    """Hold all that the file promises against minilora: gradients, losses, the start, the frozen weights, the merge."""
    model = module.Model()
    twin = Twin(module, model.layers)
    people, dinosaurs = (names[100 : 100 + steps] for names in (module.PEOPLE, module.DINOSAURS))
    check_gradients(module, model, twin, people[0])
    close(learn(module, model, people, RATES[0]), twin.learn(people, RATES[0]), 1e-9, "losses of people")

    before, frozen = model.forward(".rex"), {name: np.array(layer.W) for name, layer in model.layers.items()}
    adapt(module, model)
    for name, layer in model.layers.items():
        A, bound = np.array(layer.A), 1 / math.sqrt(len(layer.W[0]))
        assert A.shape == (module.RANK, len(layer.W[0])), name
        assert np.abs(A).max() <= bound, name
        assert A.std() > bound / 3, name
        assert not np.any(layer.B), name
    assert model.forward(".rex") == before
    twin.adapt(model.layers, module.ALPHA)
    check_gradients(module, model, twin, dinosaurs[0])
    close(learn(module, model, dinosaurs, RATES[1]), twin.learn(dinosaurs, RATES[1]), 1e-9, "losses of dinosaurs")
    check_gradients(module, model, twin, dinosaurs[0])  # now B isn't zero
    for key, p in twin.params().items():
        close(as_here(model.layers)[key][0], p, 1e-9, key)
    for name, layer in model.layers.items():
        assert np.array_equal(layer.W, frozen[name]), name

    after = model.forward(".rex")
    merged = {name: layer.merged() for name, layer in model.layers.items()}
    for name, layer in merged.items():
        merge = twin.parts()[name].merge().weight
        close(layer.W, merge.T if name == "embed" else merge, 1e-9, name)
    model.layers = merged
    close(model.forward(".rex"), after, 1e-12, "merged")


def test_it_computes_what_minilora_computes():
    check(load(), steps=6)


ADAPTER_TRAINS = "self.trained = [(self.A, dA), (self.B, dB)]"
START_OF_A = "self.A = at_random(r, len(self.W[0]))"
MASKED = "softmax(S[t][: t + 1]) + [0.0] * (T - t - 1)"
MISTAKES = {
    "alpha is not divided by r": ("self.s = alpha / r", "self.s = alpha"),
    "s is left out of y": ("scale(self.s, matmul(self.h, transpose(self.B)))", "matmul(self.h, transpose(self.B))"),
    "s is left out of dB": ("scale(self.s, matmul(transpose(dy), self.h))", "matmul(transpose(dy), self.h)"),
    "s is left out of dh, so of dA and dx": ("scale(self.s, matmul(dy, self.B))", "matmul(dy, self.B)"),
    "s comes into dA twice": ("matmul(transpose(dh), self.x)", "scale(self.s, matmul(transpose(dh), self.x))"),
    "s is left out of the merge": ("scale(self.s, matmul(self.B, self.A))", "matmul(self.B, self.A)"),
    "B starts at random": ("[[0.0] * r for _ in self.W]", "at_random(len(self.W), r)"),
    "A starts at zero": (START_OF_A, "self.A = scale(0, at_random(r, len(self.W[0])))"),
    "A's bound is that of the rank": (START_OF_A, "self.A = transpose(at_random(len(self.W[0]), r))"),
    "dx comes from the frozen weight alone": ("add(matmul(dy, self.W), matmul(dh, self.A))", "matmul(dy, self.W)"),
    "W trains as well": (ADAPTER_TRAINS, ADAPTER_TRAINS[:-1] + ", (self.W, matmul(transpose(dy), self.x))]"),
    "no mask": (MASKED, "softmax(S[t])"),
    "the mask hides the letter itself": (MASKED, "softmax(S[t][: max(t, 1)]) + [0.0] * (T - max(t, 1))"),
    "scores are not scaled": ("scale(c, matmul(self.q, transpose(self.k)))", "matmul(self.q, transpose(self.k))"),
    "the norm is taken as a constant": ("(d_j - y_j * mean) / r", "d_j / r"),
    "the softmax's sum is left out": ("p_u * (d_u - total)", "p_u * d_u"),
    "the branch is not added": ("add(dx, self.norm.backward(dn))", "self.norm.backward(dn)"),
    "the loss's gradient is no mean": ("dz = [[(p - (b == a)) / len(z)", "dz = [[(p - (b == a))"),
    "Adam's means are not corrected": ("m[i] / (1 - 0.9**t), v[i] / (1 - 0.999**t)", "m[i], v[i]"),
    "the rate falls one step early": ("lr * (1 - (t - 1) / len(names))", "lr * (1 - t / len(names))"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", one_in(7, [*MISTAKES], MISTAKES))
def test_a_planted_mistake_is_seen(mistake):
    module = load(MISTAKES[mistake])
    with pytest.raises(AssertionError):
        check(module, steps=3)


def test_it_is_a_page_of_the_standard_library():
    lines = TEXT.splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 100
    assert {*re.findall(r"^ *(?:import|from) (\w+)", TEXT, re.M)} <= set(sys.stdlib_module_names)
    command = [sys.executable, "-m", "ruff", "format", "--isolated", "--check", "--line-length", "100", str(FILE)]
    subprocess.run(command, check=True, capture_output=True)


def test_its_names_are_letters_once_each_and_fit():
    module = load()
    assert (len(module.PEOPLE), len(module.DINOSAURS)) == (2000, 1349)  # as the page says
    for names in (module.PEOPLE, module.DINOSAURS):
        assert len(names) == len(set(names))
        assert all(re.fullmatch(f"[a-z]{{1,{module.PLACES - 1}}}", name) for name in names)
        assert names != sorted(names)  # in random order, or the first hundred would be no fair sample
    assert len(set(module.PEOPLE) & set(module.DINOSAURS)) <= 5


def test_what_it_trains_is_the_least_of_it():
    module = load()
    model = module.Model()
    whole = sum(len(layer.W) * len(layer.W[0]) for layer in model.layers.values())
    adapt(module, model)
    added = sum(len(M) * len(M[0]) for layer in model.layers.values() for M in (layer.A, layer.B))
    assert (added, whole) == (620, 3984)


# --- what the page shows ---

sys.path.insert(0, str(ROOT / "examples" / "measure"))
import microlora_runs as micro  # noqa: E402

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")


def without_names(lines):
    """Return the text that is no invented name, with # for each number, and the numbers."""
    text = "\n".join(line for line in lines if not line.startswith("invented"))
    return NUMBER.sub("#", text), [float(number) for number in NUMBER.findall(text)]


def test_the_recorded_runs_are_of_this_file_and_fall():
    assert micro.RECORDED["file"] == micro.digest()
    assert micro.RECORDED["runs"].keys() == micro.CHALLENGES.keys()
    for changes in micro.CHALLENGES.values():
        load(*changes)
    losses = [float(line.split()[-1]) for line in micro.lines("as it is") if line.startswith("step")]
    people, dinosaurs = losses[:7], losses[7:]
    assert len(losses) == 11
    assert all(a >= b - 0.02 for a, b in [*pairwise(people), *pairwise(dinosaurs)])


@pytest.mark.full
@pytest.mark.parametrize("name", ["as it is", "the head trains whole"])
def test_a_run_made_again_prints_what_was_recorded(name):
    text, numbers = without_names(micro.run(name))
    recorded_text, recorded = without_names(micro.lines(name))
    assert text == recorded_text
    # Machines and Pythons round differently, and the same steps end a little apart.
    assert numbers == pytest.approx(recorded, abs=0.05)
