"""What article-run.md asserts and shows; the names are the page's own."""

from pages import picture, printed, recording, shown

# %% The article, run

with printed("article-run-1"):
    from types import SimpleNamespace

    import numpy as np

    found = recording("article-run")
    histories = {
        f"{name}_history": SimpleNamespace(epochs=found["epochs"], losses=losses)
        for name, losses in found["losses"].items()
    }
    result = SimpleNamespace(  # its parts are named as in `article.ArticleResult`
        settings=found["settings"],
        parameters=found["parameters"],
        shifted_loss=found["shifted"],
        merged_loss=found["merged"],
        adapter=SimpleNamespace(rank=1),
        corner=np.array(found["corner"]),
        between=found["between"],
        **histories,
    )
    print(result.settings)
    assert result.parameters == {"base": 1_001_000, "adapter": 2001}

# %% 2. Train a full layer on it

import pictures

from minilora.article import (
    ARTICLE_BASE_LOSSES,
    ARTICLE_EPOCHS,
    ARTICLE_LORA_LOSSES,
    ARTICLE_MERGED_LOSS,
    ARTICLE_SHIFTED_LOSS,
)


def beside(history, theirs):
    assert tuple(history.epochs) == ARTICLE_EPOCHS
    rows = [(e, f"{t:.7g}", f"{o:.4g}") for e, t, o in zip(ARTICLE_EPOCHS, theirs, history.losses, strict=True)]
    return pictures.table(["epoch", "the article", "minilora"], rows)


# Another random generator draws other numbers: the two runs agree as two seeds do.
assert 0.95 < result.base_history.losses[4] / ARTICLE_BASE_LOSSES[4] < 1.05
shown("article-run-2", beside(result.base_history, ARTICLE_BASE_LOSSES))

# %% 4. The base does not fit it

with printed("shifted"):
    print("expected 1001")
    print(f"article  {ARTICLE_SHIFTED_LOSS}")
    print(f"minilora {result.shifted_loss:.3f}")
assert abs(result.shifted_loss / 1001 - 1) < 0.05

# %% 5. Learn the change

assert 1 / 3 < result.lora_history.losses[4] / ARTICLE_LORA_LOSSES[4] < 3
shown("lora-losses", beside(result.lora_history, ARTICLE_LORA_LOSSES))

from minilora.cli import figures

figure = figures.new_figure(5.2, 3.6)
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

with printed("learned"):
    print(result.corner)
    low, high = result.between
    print(f"all 1,001,000 entries lie between {low:.4f} and {high:.4f}")
assert 0.95 < low < high < 1.05

# %% 7. Merge

with printed("merged"):
    print(f"article  {ARTICLE_MERGED_LOSS}")
    print(f"minilora {result.merged_loss:.6f}")
    print(f"minilora, before merging {result.lora_history.losses[-1]:.6f}")
assert abs(result.merged_loss / result.lora_history.losses[-1] - 1) < 0.01

# %% Watch it learn

picture(
    "article-run-4",
    pictures.show(
        pictures.growth(
            {f"epoch {epoch}": corner for epoch, corner in corners.items()} | {"the truth": np.ones((30, 30))}
        ),
        "Six square heat maps of a corner of the change of weight. At epoch 0 it is empty. "
        "At epoch 10 it shows faint vertical stripes of both signs, at epoch 30 strong ones: A's random start. Then "
        "they fade, and at epoch 100 all cells have one colour, that of the sixth map, the truth.",
        "The first 30 rows and columns of the learned change. The stripes are A's random start; the truth is one colour.",
    ),
)
