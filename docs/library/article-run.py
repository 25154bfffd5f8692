"""What article-run.md asserts and shows; the names are the page's own."""

from inspect import getsource, signature
from types import SimpleNamespace

import numpy as np
import pictures
from pages import block, picture, recording, says, shown

from minilora.article import (
    ARTICLE_BASE_LOSSES,
    ARTICLE_EPOCHS,
    ARTICLE_LORA_LOSSES,
    ARTICLE_MERGED_LOSS,
    ARTICLE_SHIFTED_LOSS,
    run,
)
from minilora.cli import figures
from minilora.training import draw_batches

found = recording("article-run")
base, lora = (SimpleNamespace(epochs=found["epochs"], losses=found["losses"][name]) for name in ("base", "lora"))

# %% The article, run

shown("settings", block(found["settings"]), exact=True)
usual = {name: parameter.default for name, parameter in signature(run).parameters.items()}
n, n_in, n_out, rank = (usual[name] for name in ("n", "in_features", "out_features", "rank"))
assert found["parameters"] == {"base": n_out * n_in, "adapter": rank * (n_in + n_out)}

# %% 1. Simulate a linear model

assert n == 10_000
says(f"There are ten thousand rows, {n_in} inputs and {n_out} outputs.")

# %% 2. Train a full layer on it

says(f"This layer of {n_out * n_in:,} numbers")


def beside(history, theirs):
    assert tuple(history.epochs) == ARTICLE_EPOCHS
    rows = [(e, f"{t:.7g}", f"{o:.4g}") for e, t, o in zip(ARTICLE_EPOCHS, theirs, history.losses, strict=True)]
    return pictures.table(["epoch", "the article", "minilora"], rows)


# Another random generator draws other numbers: the two runs agree as two seeds do.
assert 0.95 < base.losses[4] / ARTICLE_BASE_LOSSES[4] < 1.05
shown("base-losses", beside(base, ARTICLE_BASE_LOSSES), exact=True)

# %% 4. The base does not fit it

says(f"a sum of {n_in} normal numbers of variance 1,\nso its mean square is {n_in}.")
lines = f"expected {n_in}", f"article  {ARTICLE_SHIFTED_LOSS}", f"minilora {found['shifted']:.3f}"
shown("shifted", block(*lines), exact=True)
assert abs(found["shifted"] / n_in - 1) < 0.05

# %% 5. Learn the change

batches = len(list(draw_batches(np.random.default_rng(0), n, usual["batch_size"])))
says(f"The adapter has rank {rank}.", f"in any of the {usual['epochs'] * batches:,} steps")
assert 2 * rank <= usual["batch_size"]  # else the residual form computes the base's output
(line,) = (line.strip() for line in getsource(run).splitlines() if "gradients=" in line)
shown("plain", f"```py\n{line.replace('gradients=residual_form, ', '')}\n```\n", exact=True)
assert 1 / 3 < lora.losses[4] / ARTICLE_LORA_LOSSES[4] < 3
shown("lora-losses", beside(lora, ARTICLE_LORA_LOSSES), exact=True)

figure = figures.new_figure(5.2, 3.6)
result = SimpleNamespace(base_history=base, lora_history=lora, adapter=SimpleNamespace(rank=1))
figures.draw_losses(figure.subplots(), result)
picture(
    "article-run-3",
    pictures.show(
        figure,
        "Two falling curves on a logarithmic scale, the loss of the base and of the adapter over 100 epochs. Both begin near "
        "a thousand and end near a thousandth. The article's ten points of each lie on the curves or close by.",
        "The loss of the base and of the adapter by epoch. Lines: this run. Points: the article's ten numbers of each.",
    ),
)

# %% 6. Look at what was learned

low, high = found["between"]
corner = str(np.array(found["corner"]))
shown("change", block(corner, f"all {n_out * n_in:,} entries lie between {low:.4f} and {high:.4f}"), exact=True)
says(f"it is stored in {rank * (n_in + n_out):,} numbers")
assert 0.95 < low < high < 1.05

# %% 7. Merge

merged, before = found["merged"], lora.losses[-1]
lines = f"article  {ARTICLE_MERGED_LOSS}", f"minilora {merged:.6f}", f"minilora, before merging {before:.6f}"
shown("merged", block(*lines), exact=True)
assert abs(merged / before - 1) < 0.01

# %% Watch it learn

assert X.shape == (n, n_in) and residual.shape == (n, n_out) and len(moved) == usual["epochs"] * batches
snapshots = {f"epoch {epoch}": corner for epoch, corner in corners.items()} | {"the truth": np.ones((30, 30))}
limit = max(np.abs(corner).max() for corner in snapshots.values())
figure = figures.new_figure(5.2, 3.8)
for axes, (title, corner) in zip(figure.subplots(2, 3).flat, snapshots.items(), strict=True):
    axes.imshow(corner, cmap=pictures.SIGNED, vmin=-limit, vmax=limit)
    axes.set(xticks=[], yticks=[], title=title)
    axes.spines[:].set_visible(True)
picture(
    "article-run-4",
    pictures.show(
        figure,
        "Six square heat maps of a corner of the change of weight. At epoch 0 it is empty. "
        "At epoch 10 it shows faint vertical stripes of both signs, at epoch 30 strong ones: A's random start. Then "
        "they fade, and at epoch 100 all cells have one colour, that of the sixth map, the truth.",
        "The first 30 rows and columns of the learned change. The stripes are A's random start; the truth is one colour.",
    ),
)
