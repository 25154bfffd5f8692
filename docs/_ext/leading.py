"""The share of the inputs' square in the strongest directions, for each linear layer of the small language model."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from minilora import Llama
from minilora.language.files.tokens import load_tokenizer
from minilora.layer import Layer, rebuild

LENGTH = 128
KINDS = {"q_proj": "q, k and v", "o_proj": "o", "gate_proj": "gate and up", "down_proj": "down"}
"""Names of kinds of layers, by the ends of their paths. k and v have the same inputs as q."""


def inputs() -> dict[str, list[np.ndarray]]:
    """Return the inputs of each kind of layer, one array per block, for the text in the live model's page."""
    weights = Path(str(files("glassllm") / "weights" / "en.npz"))
    page = Path(__file__).with_name("live-model.html").read_text(encoding="utf-8")
    ids = load_tokenizer(weights).encode(re.search(r"<textarea.*?>(.*?)</textarea>", page, re.S)[1])
    seen: dict[str, list[np.ndarray]] = {name: [] for name in KINDS.values()}

    def watch(path: str, layer: Layer) -> Layer:
        if kind := KINDS.get(path.rpartition(".")[2]):
            forward = layer.forward

            def seeing(x):
                seen[kind].append(x.reshape(-1, x.shape[-1]))
                return forward(x)

            layer.forward = seeing
        return layer

    windows = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    rebuild(Llama.load(weights), layer=watch).forward(windows)
    return seen


def shares(count: int) -> dict[str, tuple[int, float, float, float]]:
    """Return for each kind of layer its width, the smallest and largest share over the blocks, and that of noise."""

    def share(x: np.ndarray) -> float:  # of the square of x (rows, width) in its strongest directions
        squares = np.linalg.svd(x, compute_uv=False) ** 2
        return float(squares[:count].sum() / squares.sum())

    noise, found = np.random.default_rng(0).standard_normal, {}
    for name, of in inputs().items():
        held = [share(x) for x in of]
        found[name] = of[0].shape[1], min(held), max(held), share(noise(of[0].shape))
    return found
