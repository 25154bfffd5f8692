"""The words of the front page that come from recordings: what a model writes, and five lines of advice."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from IPython.display import HTML

from minilora.language.trainingmemory import LLAMA_2_7B, training_memory

DOCS = Path(__file__).parent


def texts(page: str) -> list[str]:
    """Return the blocks of a page that show what a program printed. A test runs the programs again."""
    return re.findall(r"^```text\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.S | re.M)


def beside(parts: dict[str, str]) -> HTML:
    """Return texts side by side, each under its title."""
    shown = (f"<div><strong>{html.escape(title)}</strong><p>{html.escape(text)}</p></div>" for title, text in parts.items())
    return HTML(f'<div class="written">{"".join(shown)}</div>')


def gains() -> dict[int, float]:
    """Return how much of full training's gain LoRA has at each rank, in the recorded trainings of the language model."""
    model = json.loads((DOCS / "language-model.json").read_text(encoding="utf-8"))["glassllm"]
    before, runs = model["before"], model["runs"]
    full = before - runs["the same matrices"]["losses"][-1]
    return {
        int(name.rpartition(" ")[2]): (before - run["losses"][-1]) / full
        for name, run in runs.items()
        if name.startswith("LoRA, r =")
    }


def rate_ratios() -> list[float]:
    """Return LoRA's best rate in multiples of full fine-tuning's, for each text size and rank of the laboratory."""
    points = json.loads((DOCS / "laboratory.json").read_text(encoding="utf-8"))["trainings"]
    usual = {"scaling": 2.0, "batch": 16, "seed": 0}
    losses: dict[tuple[float, int | None], dict[float, float]] = {}
    for point in points:
        run, loss = point["run"], point["result"]["new"]
        if usual.items() <= run.items() and run["way"] in ("full", "LoRA") and loss is not None:
            losses.setdefault((run["share"], run["rank"]), {})[run["lr"]] = loss
    best = {key: min(curve, key=curve.__getitem__) for key, curve in losses.items() if len(curve) > 4}
    return sorted(rate / best[share, None] for (share, rank), rate in best.items() if rank and (share, None) in best)


def advice() -> HTML:
    """Return five lines of advice, their numbers computed."""
    gain, ratios = gains(), rate_ratios()
    full, lora, four = (
        training_memory(LLAMA_2_7B, tokens=4096, **more)
        for more in ({}, {"rank": 16}, {"rank": 16, "bits": 4})
    )
    total = [sum(parts.values()) / 1e9 for parts in (full, lora, four)]
    low, high = min(gain), max(gain)
    lines = [
        "<b>Where.</b> Beside every linear layer, those of the MLP too. In Llama-2-7B the MLP&rsquo;s adapters helped more "
        'than those of attention (<a href="choosing.html#which-matrices">sources</a>).',
        f"<b>Rank.</b> Begin with 8 or 16. In the model above rank {low} has {gain[low]:.0%} of full training&rsquo;s gain, and rank "
        f'{high} has {gain[high]:.0%} (<a href="low-rank.html#is-a-change-of-low-rank-enough">measured</a>). Search the rate again '
        "when you change the rank.",
        "<b>Alpha.</b> Take twice the rank and leave it. A larger alpha acts much like a larger rate, so search for one of the two.",
        f"<b>Rate.</b> It decides most. LoRA&rsquo;s best is higher than full training&rsquo;s: {ratios[0]:g} to {ratios[-1]:g} times in "
        'our small model (<a href="laboratory.html#the-rate">measured</a>), about ten times in large ones '
        '(<a href="choosing.html#alpha-and-the-learning-rate">source</a>). Search by factors of two, and stop when the '
        "loss on text that you held out rises.",
        f"<b>Memory.</b> For Llama-2-7B and 4096 tokens a step, full training keeps {total[0]:.0f} GB, LoRA of rank 16 keeps "
        f'{total[1]:.0f}, and over a base in four bits {total[2]:.0f} (<a href="choosing.html#what-a-7b-model-takes">counted</a>).',
    ]
    return HTML(f"<ol>{''.join(f'<li>{line}</li>' for line in lines)}</ol>")
