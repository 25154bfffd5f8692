"""How much of its inputs' square the strongest directions hold, in each linear layer of the small language model."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import numpy as np

from minilora import Linear, Llama
from minilora.language.tokens import load_tokenizer
from minilora.layer import Layer, rebuild

DOCS = Path(__file__).parent.parent
LENGTH = 128


def inputs() -> dict[str, np.ndarray]:
    """Return the inputs of each linear layer, by its path, on the text that stands in the page of the live model."""
    weights = Path(str(files("glassllm") / "weights" / "en.npz"))
    page = (DOCS / "_ext" / "live-model.html").read_text(encoding="utf-8")
    ids = load_tokenizer(weights).encode(re.search(r"<textarea.*?>(.*?)</textarea>", page, re.S)[1])
    seen: dict[str, np.ndarray] = {}

    def watch(path: str, layer: Layer) -> Layer:
        plain = layer.forward

        def forward(x):
            seen[path] = np.asarray(x).reshape(-1, x.shape[-1])
            return plain(x)

        if type(layer) is Linear:
            layer.forward = forward
        return layer

    windows = np.array(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    rebuild(Llama.load(weights), layer=watch).forward(windows)
    return seen


def leading_share(x: np.ndarray, count: int) -> float:
    """Return the share of the square of x (rows, width) in its strongest directions."""
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    return float(squares[:count].sum() / squares.sum())


def shares(count: int) -> dict[str, tuple[int, float, float, float]]:
    """Return for each kind of layer its width, the least and the largest share over the blocks, and that of noise."""
    rng = np.random.default_rng(0)
    found: dict[str, tuple[int, float, float, float]] = {}
    kinds = {"q_proj": "q, k and v", "o_proj": "o", "gate_proj": "gate and up", "down_proj": "down"}
    layers = {path: x for path, x in inputs().items() if path.rpartition(".")[2] in kinds}
    for kind, name in kinds.items():
        own = [x for path, x in layers.items() if path.endswith(kind)]
        held = [leading_share(x, count) for x in own]
        noise = leading_share(rng.standard_normal(own[0].shape), count)
        found[name] = own[0].shape[1], min(held), max(held), noise
    return found
