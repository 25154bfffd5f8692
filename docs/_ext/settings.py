"""Advice on LoRA's settings: what fits into memory, which runs to try, how to read their held-out losses.

Facts are in `settings.json`: the sizes of models, as in LitGPT's list and each config.json, the recipes of others,
every sentence, and the source of each line. The rules are only in `_static/live/settings.js`. This file calls that
script with Node for what docs/learn/what-do-i-set.md shows of it.
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
    """Return a model's sizes as a configuration of the package."""
    V, d, m, L, H, K, D = (model[size] for size in "VdmLHKD")
    kind = "llama" if model["kind"] == "gemma" else model["kind"]
    return LlamaConfig(
        V, d, m, L, H, K, D, 1e-6, frequencies(D, 10_000.0),
        tie_word_embeddings=model["tied"], attention_bias=kind == "qwen2", model_type=kind,
    )  # fmt: skip


def ask(data: dict[str, Any], **asked: list[Any]) -> dict[str, list[Any]]:
    """Return the page script's answers to `inputs`, given as fields by name, and to pasted `configs` and `texts`."""
    return pages.node("settings.mjs", {"data": data, **asked})


def control(evidence: dict[str, float], address: Callable[[str], str]) -> str:
    """Return the page's controls and results as HTML; `address` maps a source's page to its URL on the site."""
    sources = {key: (name, address(target)) for key, (name, target) in FACTS["sources"].items()}
    data = {key: of for key, of in FACTS.items() if key != "when"} | {"evidence": evidence, "sources": sources}
    return (HERE / "settings.html").read_text(encoding="utf-8").replace("DATA", pages.data(data))
