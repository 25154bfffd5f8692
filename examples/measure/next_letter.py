"""One task through the rungs: the next letter of a name, by a linear layer, two layers, attention, and a decoder block.

Each rung learns the names of people. Then it is frozen, and LoRA learns the names of dinosaurs beside its linear
layers. ``python examples/measure/next_letter.py`` trains all of them, about a minute, and writes
docs/recordings/rungs.json; the pages show its rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from written import RECORDINGS, ROOT, keep

from minilora import (
    MLP,
    Adam,
    Attention,
    Embedding,
    Linear,
    Llama,
    LlamaConfig,
    Sequential,
    adapt,
    cross_entropy,
)
from minilora.layers.rotary import Rotary, frequencies

NAMES = ROOT / "examples" / "names"
RESULT = RECORDINGS / "rungs.json"
LETTERS = ".abcdefghijklmnopqrstuvwxyz"  # a full stop begins each name, and ends it
PLACES = 16
SEEN = 3  # letters that the net of two layers sees
RANK, ALPHA, STEPS, BATCH = 4, 8, 300, 64
RATES = (0.003, 0.01, 0.03)
RUNGS = ("linear", "two layers", "attention", "decoder")


def names(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the letters of names (count, PLACES), and those that follow, -100 behind a name's end."""
    found = [name for name in (NAMES / f"{kind}.txt").read_text().split() if len(name) < PLACES]
    letters, following = np.zeros((len(found), PLACES), int), np.full((len(found), PLACES), -100)
    for i, name in enumerate(found):
        places = [LETTERS.index(letter) for letter in f".{name}."]
        letters[i, : len(places) - 1], following[i, : len(places) - 1] = places[:-1], places[1:]
    return letters, following


def last_letters(letters: np.ndarray, count: int) -> np.ndarray:
    """Return for each place the last `count` letters, one-hot, side by side; before a name stand full stops."""
    before = np.pad(letters, ((0, 0), (count - 1, 0)))
    columns = [np.eye(27, dtype="f")[before[:, i : i + PLACES]] for i in range(count)]
    return np.concatenate(columns, axis=-1).reshape(-1, 27 * count)


def build(rung: str, rng: np.random.Generator) -> tuple[Any, Any]:
    """Return a rung's model with random weights, and the function that makes its input of letters."""
    if rung == "linear":
        return Sequential(head=Linear.init(27, 27, rng=rng)), lambda letters: last_letters(letters, 1)
    if rung == "two layers":
        return MLP.init(27 * SEEN, 64, 27, activation="tanh", rng=rng), lambda letters: last_letters(letters, SEEN)
    sizes = {"vocab_size": 27, "hidden_size": 48, "intermediate_size": 96, "head_dim": 12}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    if rung == "attention":
        linear = lambda n_in, n_out: Linear.init(n_in, n_out, bias=False, rng=rng)  # noqa: E731
        layers = {name: linear(48, 48) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        attention = Attention(**layers, rotary=Rotary(frequencies(12, 1e4)))
        embedding = Embedding(rng.standard_normal((27, 48)).astype("f"))
        return Sequential(embed=embedding, attention=attention, head=linear(48, 27)), lambda letters: letters
    config = LlamaConfig(**sizes, rms_norm_eps=1e-5, frequencies=frequencies(12, 1e4))
    arrays = {
        name: np.ones(shape, "f") if len(shape) == 1 else (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype("f")
        for name, shape in config.shapes().items()
    }
    return Llama.build(config, arrays), lambda letters: letters


def loss_of(model: Any, inputs: Any, letters: np.ndarray, following: np.ndarray) -> float:
    """Return the mean loss, in nats a letter."""
    return float(cross_entropy(model(inputs(letters)).reshape(-1, 27), following.reshape(-1))[0])


def learn(model: Any, inputs: Any, data: tuple, held: tuple, rate: float) -> float:
    """Train on names; return the loss on those held out."""
    rng, adam = np.random.default_rng(1), Adam(model.trainable(), lr=rate)
    for _ in range(STEPS):
        rows = rng.choice(len(data[0]), BATCH, replace=False)
        y, cache = model.forward(inputs(data[0][rows]))
        _, dy = cross_entropy(y.reshape(-1, 27), data[1][rows].reshape(-1))
        adam.step(model.backward(dy.reshape(y.shape), cache, need_dx=False)[1])
    return loss_of(model, inputs, *held)


def split(kind: str) -> tuple[tuple, tuple]:
    """Return nine tenths of the names, and the rest, which is held out."""
    letters, following = names(kind)
    order = np.random.default_rng(0).permutation(len(letters))
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    return (letters[rest], following[rest]), (letters[held], following[held])


def count(model: Any) -> int:
    """Return how many numbers train."""
    return sum({id(p): p.size for p in model.trainable().values()}.values())


def climb() -> dict[str, Any]:
    """Train each rung at each rate, keep the best, and adapt it at each rate."""
    found = {}
    people, dinosaurs = split("people"), split("dinosaurs")
    for rung in RUNGS:
        tries = []
        for rate in RATES:
            model, inputs = build(rung, np.random.default_rng(0))
            tries.append((learn(model, inputs, *people, rate), rate, model))
        loss, rate, model = min(tries, key=lambda item: item[0])
        before = loss_of(model, inputs, *dinosaurs[1])
        after = []
        for lora_rate in RATES:
            tuned = adapt(model, "all-linear", rank=RANK, alpha=ALPHA, rng=np.random.default_rng(2))
            after.append((learn(tuned, inputs, *dinosaurs, lora_rate), lora_rate, count(tuned)))
        best, lora_rate, trained = min(after)
        found[rung] = {"numbers": count(model), "people": loss, "rate": rate, "dinosaurs before": before}
        found[rung] |= {"dinosaurs after": best, "LoRA rate": lora_rate, "LoRA numbers": trained}
    return found


if __name__ == "__main__":
    keep(RESULT, __file__, {"rungs": climb()})
    print(RESULT.read_text(encoding="utf-8"))
