"""The table of one task with several networks, as `examples/measure/next_letter.py` recorded it."""

from __future__ import annotations

import pictures
from pages import recording

TITLES = {
    "linear": "a linear layer: the last letter",
    "two layers": "two layers: the last 3 letters",
    "attention": "an attention layer: all letters so far",
    "decoder": "a decoder of two blocks: all letters so far",
}
RECORDED = recording("rungs")["rungs"]


def table(last: str) -> str:
    """Return the networks up to `last`, each with its losses on names that it was not trained on."""
    rows = []
    for rung, title in TITLES.items():
        row = RECORDED[rung]
        losses = [f"{row[key]:.2f}" for key in ("people", "dinosaurs before", "dinosaurs after")]
        rows.append((title, f"{row['numbers']:,}", losses[0], losses[1], f"{row['LoRA numbers']:,}", losses[2]))
        if rung == last:
            break
    head = ["", "numbers", "people", "dinosaurs before", "LoRA trains", "dinosaurs after"]
    return pictures.table(head, rows)
