"""An interactive chart of the laboratory: rank, scaling rule, learning rate, text length.

All numbers are recorded and included in the page. `_static/live/valley.js` looks them up and draws them. Without it, a
reader sees the drawing of the initial position.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pictures
from hands import Slider, figure
from recordings import RULES, SEEDS, Recordings

RANKS = (1, 4, 16)
RULE = "alpha = 2r"
"""The rule that the chart shows first."""


def numbers(recorded: Recordings) -> dict[str, Any]:
    """Return the data of the chart: for each cell its rates, with means over the seeds."""
    cells: dict[str, list] = {}
    for windows in recorded.windows:
        for rank in (None, *RANKS):
            for scaling in {1.0} if rank is None else {rule(rank) for rule in RULES.values()}:
                of = {"windows": windows} | ({"scaling": scaling} if rank else {})
                if found := [rate(recorded, lr, rank, **of) for lr in recorded.losses(way(rank), rank, **of)]:
                    cells[f"{rank or 'full'}|{scaling:g}|{windows}"] = found
    return {
        "before": recorded.before,
        "moments": recorded.moments,
        "ranks": list(RANKS),
        "rates": sorted({of["lr"] for found in cells.values() for of in found}),
        "scalings": {name: {str(rank): rule(rank) for rank in RANKS} for name, rule in RULES.items()},
        "cells": cells,
    }


def way(rank: int | None) -> str:
    """Return the method that trains a rank; None is full fine-tuning."""
    return "LoRA" if rank else "full"


def rate(recorded: Recordings, lr: float, rank: int | None, **of: Any) -> dict[str, Any]:
    """Return a rate's results: means over its seeds, and the mean losses along the way, as far as all seeds go."""
    results = [
        result
        for run, result in recorded.trainings(way(rank), rank, lr=lr, **of)
        if run["seed"] in SEEDS and result["new"] is not None
    ]
    steps = [result["step"] for result in results]
    return {
        "lr": lr,
        "seeds": len(results),
        "choice": round(fmean(result[recorded.chooses] for result in results), 4),
        "new": round(fmean(result["new"] for result in results), 4),
        "steps": [min(steps), max(steps)],
        "path": [round(fmean(losses), 3) for losses in zip(*(result["losses"] for result in results), strict=False)],
    }


def chart(recorded: Recordings) -> str:
    """Return the chart: its sliders, its first drawing and its numbers."""
    data = numbers(recorded)
    windows = max(recorded.windows)
    rank = 4
    start = recorded.best("LoRA", rank, windows=windows)
    controls = {  # for each control the label, the values, and the initial value
        "windows": ("windows of text", recorded.windows, windows),
        "rule": ("rule of scaling", list(RULES), RULE),
        "rank": ("rank", ["full", *RANKS], rank),
        "lr": ("rate", data["rates"], start),
    }
    data["values"] = {name: values for name, (_, values, _) in controls.items()}
    sliders = [
        Slider(name, label, [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values], values.index(first))
        for name, (label, values, first) in controls.items()
    ]
    caption = (
        "The loss on held-out text, on windows that chose neither the rate nor the step to stop at. Left: against the "
        "rate, with a dot at each best one. Right: during training, with full fine-tuning at its best rate."
    )
    return figure("valley", sliders, "", still(recorded, windows), data, caption, "picture recorded")


def still(recorded: Recordings, windows: int) -> str:
    """Return the drawing of the initial position: the loss against the rate, for full fine-tuning and for each rank."""
    drawn = pictures.new_figure(5.6, 3.6)
    axes, bests, rates = drawn.subplots(), [], set()
    for name, rank, colour in (
        ("full", None, pictures.BASE_COLOR),
        *((f"r = {rank}", rank, pictures.LORA_COLOR) for rank in RANKS),
    ):
        losses = recorded.losses(way(rank), rank, windows=windows)
        best = recorded.best(way(rank), rank, windows=windows)
        axes.plot(list(losses), list(losses.values()), color=colour, marker="o", markersize=3)
        axes.plot(best, losses[best], "o", color=pictures.INK, markersize=8, fillstyle="none")
        first = min(losses)
        axes.annotate(name, (first, losses[first]), (-6, -4), textcoords="offset points", ha="right", color=colour)
        rates |= {*losses}
        bests.append(f"{name}: {losses[best]:.2f} at {best:g}")
    axes.set(xscale="log", xlabel="rate", ylabel="held-out loss")
    axes.set_xlim(min(rates) / 4, 1.3 * max(rates))  # room for names at the left
    ticks = sorted(rates)[1::2]
    axes.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return pictures.show(
        drawn,
        f"The held-out loss against the rate on {windows} windows, alpha = 2r. The best of each: {'; '.join(bests)}.",
    )
