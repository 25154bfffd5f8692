"""What to set for LoRA: what fits into memory, which runs to make, and what their held-out losses say.

What is a fact and no rule stands in `settings.json`: the sizes of models, as LitGPT's list and each config.json have
them, the recipes of others, every sentence, and where a line is from. The rules stand in `_static/live/settings.js`
alone. What docs/learn/what-do-i-set.md shows of them, this file asks of that script, by Node.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages

from minilora.language.config import LlamaConfig
from minilora.layers.rotary import frequencies

HERE = Path(__file__).parent
FACTS = json.loads((HERE / "settings.json").read_text(encoding="utf-8"))


def config(model: dict[str, Any]) -> LlamaConfig:
    """Return a model's sizes as the package counts them."""
    V, d, m, L, H, K, D = (model[size] for size in "VdmLHKD")
    kind = "llama" if model["kind"] == "gemma" else model["kind"]
    return LlamaConfig(
        V, d, m, L, H, K, D, 1e-6, frequencies(D, 10_000.0),
        tie_word_embeddings=model["tied"], attention_bias=kind == "qwen2", model_type=kind,
    )  # fmt: skip


def ask(data: dict[str, Any], **asked: list[Any]) -> dict[str, list[Any]]:
    """Return what the page's script answers to `inputs`, fields by name; to `configs` and `texts` that are pasted."""
    return pages.node("settings.mjs", {"data": data, **asked})


def control(evidence: dict[str, float], address: Callable[[str], str]) -> str:
    """Return what a reader sets and reads, as HTML; `address` is where the site has the page that a source names."""
    sources = {key: (name, address(target)) for key, (name, target) in FACTS["sources"].items()}
    data = {key: of for key, of in FACTS.items() if key != "when"} | {"evidence": evidence, "sources": sources}
    return (HERE / "settings.html").read_text(encoding="utf-8").replace("DATA", pages.data(data))
