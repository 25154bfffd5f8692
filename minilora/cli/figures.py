"""Figures of a training and of an adapter, drawn with matplotlib from the extra ``plot``.

A notebook shows a figure that is a cell's last line; ``figure.savefig(path)`` saves it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..article import ARTICLE_BASE_LOSSES, ARTICLE_EPOCHS, ARTICLE_LORA_LOSSES, ArticleResult
from ..backend import backend_of
from ..extras import needed
from ..files.disk import check_parent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..files.inspection import LayerSummary

FIGURE_FORMATS: dict[str, dict[str, Any]] = {
    "png": {"metadata": {"Software": "minilora"}},
    "svg": {"metadata": {"Creator": "minilora"}},
    "pdf": {"metadata": {"Creator": "minilora"}},
    "jpg": {"pil_kwargs": {"comment": b"minilora"}},
    "webp": {"pil_kwargs": {"xmp": b"minilora"}},
}
"""File formats of figures, each with the option that marks the file as minilora's for --overwrite.

matplotlib's other formats need further programs, or few programs read them.
"""
BASE_COLOR, LORA_COLOR, INK = "#4269d0", "#e8743b", "#888888"  # legible on white and on black


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure without a window; report it if matplotlib is missing."""
    new = needed("matplotlib.figure", "a figure").Figure
    figure: Figure = new(figsize=(width, height), layout="constrained", dpi=120)
    # IPython calls this for a cell's last line, and a Figure without a window lacks it.
    vars(figure)["_repr_png_"] = partial(_png, figure)
    return figure


def _png(figure: Figure) -> bytes:
    """Return the bytes of a figure's file."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def check_figure_path(path: str | Path) -> None:
    """Require a valid path for a figure, before the work rather than after it."""
    new_figure(1, 1)  # requires matplotlib
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix not in FIGURE_FORMATS:
        raise ValueError(f"plot file {str(path)!r} ends in {suffix!r}, expected one of {', '.join(FIGURE_FORMATS)}")
    check_parent("plot file", Path(path))


def plot_article(result: ArticleResult) -> Figure:
    """Draw a run of the article: its loss curves, the learned delta, and its singular values."""
    figure = new_figure(13, 4)
    losses, picture, spectrum = figure.subplots(1, 3, width_ratios=[1.35, 1, 1])
    draw_losses(losses, result)

    spread = float(np.abs(result.delta - 1).max())
    image = picture.imshow(result.delta, cmap="PuOr", vmin=1 - spread, vmax=1 + spread, interpolation="nearest")
    picture.set(title="The learned change of weight\n(the truth is 1 everywhere)", xlabel="input", ylabel="output")
    figure.colorbar(image, ax=picture, shrink=0.8)

    draw_spectrum(spectrum, result)
    return figure


def draw_losses(axes: Any, result: ArticleResult) -> None:
    """Draw both loss curves on a log scale, with the article's points."""
    for name, history, article, colour in (
        ("base, full rank", result.base_history, ARTICLE_BASE_LOSSES, BASE_COLOR),
        (f"LoRA, rank {result.adapter.rank}", result.lora_history, ARTICLE_LORA_LOSSES, LORA_COLOR),
    ):
        axes.plot(history.epochs, history.losses, color=colour, label=name, marker=".")
        axes.plot(ARTICLE_EPOCHS, article, color=colour, linestyle="none", marker="o", fillstyle="none", markersize=9)
    axes.plot([], color=INK, linestyle="none", marker="o", fillstyle="none", markersize=9, label="the article's run")
    axes.set(title="Loss on all rows", xlabel="epoch", ylabel="mean squared error", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def draw_spectrum(axes: Any, result: ArticleResult, count: int = 10) -> None:
    """Draw the leading singular values of the learned change next to those of the true one."""
    factors = result.adapter.trainable()
    # In float64, so that everything beyond the rank is visibly zero.
    A, B = (backend_of(factor).to_numpy(factor).astype(np.float64) for factor in factors.values())
    learned = np.linalg.svd(result.adapter.scaling * B @ A, compute_uv=False)[:count]
    number = np.arange(1, len(learned) + 1)
    # The true change, all ones, has a single nonzero singular value: sqrt(in * out).
    true = float(np.sqrt(result.delta.size))
    rounding = true * np.finfo(np.float64).eps
    axes.bar(number, np.maximum(learned, rounding / 10), color=LORA_COLOR, label="learned")
    axes.plot(
        [1], [true], color=INK, marker="_", linestyle="none", markersize=26, markeredgewidth=3, label="true, then 0"
    )
    axes.axhline(rounding, color=INK, linestyle=":", label="rounding of float64")
    axes.set(title="Singular values of the change", xlabel="number", yscale="log", xticks=number)
    axes.set_ylim(rounding / 10, true * 100)
    axes.legend()


def plot_learning(rows: Sequence[tuple[int, float, float]], each_step: Sequence[tuple[int, float]] = ()) -> Figure:
    """Draw the training and held-out losses of the rows, and each batch's loss in a pale colour."""
    figure = new_figure(6.5, 4)
    axes: Any = figure.subplots()
    means = [
        point
        for (before, _, _), (step, loss, _) in pairwise(rows)
        for point in ((before + 0.5, loss), (step + 0.5, loss), (step + 0.5, np.nan))
        if loss == loss
    ]
    held_out = [(step, loss) for step, _, loss in rows if loss == loss]
    if each_step:
        axes.plot(*zip(*each_step, strict=True), color=BASE_COLOR, label="training, each step", alpha=0.35, linewidth=1)
    axes.plot(*zip(*means, strict=True) if means else ([], []), color=BASE_COLOR, label="training, mean of its steps")
    axes.plot(*zip(*held_out, strict=True), color=LORA_COLOR, label="held out", marker=".")
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_adapter(summaries: list[LayerSummary]) -> Figure:
    """Draw the norm of each layer's change and its singular values, from the summaries of `inspect_adapter`."""
    count, width = len(summaries), max(len(s.shares) for s in summaries)
    figure = new_figure(12, min(30.0, max(3.0, 1.5 + 0.25 * count)))
    norms, picture = figure.subplots(1, 2, sharey=True)
    rows = np.arange(count)

    norms.barh(rows, [s.norm for s in summaries], color=LORA_COLOR)
    every = max(1, count // 100)  # more names would be illegible
    norms.set_yticks(rows[::every], [s.path for s in summaries[::every]])
    norms.set(title="Frobenius norm of the change of weight", xlabel="norm")
    norms.grid(axis="x", alpha=0.3)

    shares = np.full((count, width), np.nan)
    for row, summary in enumerate(summaries):
        shares[row, : len(summary.shares)] = 100 * summary.shares
    # One row per layer and one column per value, the first centred on 1; aspect auto, or many layers make a thin strip.
    image = picture.imshow(
        shares, cmap="viridis", vmin=0, vmax=100, aspect="auto", extent=(0.5, width + 0.5, count - 0.5, -0.5)
    )
    picture.set(title="Share of the change in each singular value", xlabel="index of the singular value")
    picture.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=picture, label="% of the squared norm")
    return figure
