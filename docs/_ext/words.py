"""The words of the front page that come from recordings: what a model writes, and five lines of advice."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

from pages import Drawn
from recordings import Recordings

from minilora.language.memory import LLAMA_2_7B, training_memory

DOCS = Path(__file__).parent.parent
RANKS = (1, 4, 16)


def texts(page: str) -> list[str]:
    """Return the blocks of a page that show what a program printed. A test runs the programs again."""
    return re.findall(r"^```text\n(.*?)^```$", next(DOCS.glob(f"l*/{page}")).read_text(encoding="utf-8"), re.S | re.M)


def beside(parts: dict[str, str]) -> Drawn:
    """Return texts side by side, each under its title."""
    shown = (
        f"<div><strong>{html.escape(title)}</strong><p>{html.escape(text)}</p></div>" for title, text in parts.items()
    )
    return Drawn(f'<div class="written">{"".join(shown)}</div>')


def laboratory() -> Recordings:
    """Return the recorded trainings of the small language model."""
    return Recordings(json.loads((DOCS / "recordings" / "laboratory.json").read_text(encoding="utf-8")))


def gains() -> dict[int, list[float]]:
    """Return how much of full training's gain LoRA has at each rank, on each length of the text, in order."""
    recorded = laboratory()
    return {rank: sorted(recorded.gain(rank, windows=windows) for windows in recorded.windows) for rank in RANKS}


def rate_ratios() -> list[float]:
    """Return LoRA's best rate in multiples of full fine-tuning's, for each size of the text and each rank."""
    recorded = laboratory()
    return sorted(
        recorded.best("LoRA", rank, windows=windows) / recorded.best("full", windows=windows)
        for windows in recorded.windows
        for rank in RANKS
    )


def advice() -> Drawn:
    """Return five lines of advice, their numbers computed."""
    gain, ratios = gains(), rate_ratios()
    full, lora, four = (
        training_memory(LLAMA_2_7B, tokens=4096, **more) for more in ({}, {"rank": 16}, {"rank": 16, "bits": 4})
    )
    total = [sum(parts.values()) / 1e9 for parts in (full, lora, four)]
    low, high = min(gain), max(gain)
    lines = [
        "<b>Where.</b> Beside every linear layer, those of the MLP too. In Llama-2-7B the MLP&rsquo;s adapters "
        "helped more "
        'than those of attention (<a href="choosing.html#which-matrices">sources</a>).',
        f"<b>Rank.</b> Begin with 8, then try twice that. In the model above rank {low} has "
        f"{100 * gain[low][0]:.0f} to {gain[low][-1]:.0%} of full training&rsquo;s gain, the less the longer the text, "
        f"and rank {high} has {100 * gain[high][0]:.0f} to {gain[high][-1]:.0%}, each at its own best rate (<a "
        f'href="laboratory.html#the-size-of-the-text">measured</a>). '
        "So search the rate again when you change the rank.",
        "<b>Alpha.</b> Take twice the rank and leave it. A larger alpha acts much like a larger rate, so search "
        "for one of the two.",
        "<b>Rate.</b> It decides most. For models of 1 to 70 billion weights begin at 0.0002, then try half and "
        "twice of it "
        '(<a href="choosing.html#start-values-for-1-to-70-billion-weights">sources</a>, which differ by a factor '
        "of three). A rate that is "
        f"good for full training says little: LoRA&rsquo;s best was {ratios[0]:g} to {ratios[-1]:g} times as high "
        f"in our small model "
        '(<a href="laboratory.html#the-rate">measured</a>). Stop when the loss on text that you held out rises.',
        f"<b>Memory.</b> For Llama-2-7B and 4096 tokens a step, full training keeps {total[0]:.0f} GB, LoRA of "
        f"rank 16 keeps "
        f"{total[1]:.0f}, and over a base in four bits {total[2]:.0f} (<a "
        f'href="choosing.html#what-a-7b-model-takes">counted</a>).',
    ]
    return Drawn(f"<ol>{''.join(f'<li>{line}</li>' for line in lines)}</ol>")
