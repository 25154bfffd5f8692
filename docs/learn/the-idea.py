"""What the-idea.md asserts and shows; the names are the page's own."""

# %% A picture of rank
import pictures
from pages import picture, shown

assert row.size + column.size == 32 and adapter.delta().size == 240
assert np.linalg.matrix_rank(adapter.delta()) == 1

picture(
    "the-idea-1",
    pictures.show(
        pictures.factors(row, column),
        "A column of 12 coloured cells, B, left of a grid, and a row of 20, A, above it. Every row of the grid repeats the "
        "pattern of A, stronger, weaker or with the colours exchanged, as B's entry beside it says.",
        "Orange is positive, blue negative. Every row of the product is A, scaled by one entry of B.",
    ),
)

# %% What it saves

full = 1001 * 1000
rows = []
for r in (1, 4, 16, 64, 500):
    lora = LoRA.init(1001, 1000, rank=r, alpha=r, rng=rng)
    count = sum(p.size for p in lora.trainable().values())
    rows.append((r, f"{count:,}", f"{count / full:.2%}"))
rows.append(("full", f"{full:,}", "100%"))
assert rows[0][1] == "2,001"
shown("the-idea-2", pictures.table(["rank", "numbers to train", "of the full weight"], rows))

# %% What the assumption buys

models = {"base": base, **{f"LoRA, rank {r}": m for r, m in loras.items()}}
models["full fine-tuning"] = full
trained = [sum(p.size for p in m.trainable().values()) for m in models.values()]
trained[0] = 0  # the base, as it is
seen = {name: evaluate(m, X, Y) for name, m in models.items()}
new = {name: evaluate(m, X_test, Y_test) for name, m in models.items()}
assert new["LoRA, rank 3"] < new["LoRA, rank 12"] < new["full fine-tuning"]
assert new["full fine-tuning"] < new["LoRA, rank 1"] < new["base"]
assert seen["full fine-tuning"] < seen["LoRA, rank 12"] < seen["LoRA, rank 3"]
shown(
    "the-idea-3",
    pictures.table(
        ["model", "numbers trained", "loss, training rows", "loss, new rows"],
        [
            (name, f"{count:,}", f"{seen[name]:.2f}", f"{new[name]:.2f}")
            for count, name in zip(trained, models, strict=True)
        ],
    ),
)

picture(
    "the-idea-4",
    pictures.show(
        pictures.spectra(truth, loras[k].delta(), full.weight - base.weight),
        "Bars of the first eight singular values of three changes of weight. The truth and LoRA have three, of nearly the "
        "same height, and nothing after. Full fine-tuning has these three and five more, slowly falling: the noise.",
        "Singular values of the true change, of the one that LoRA of rank 3 learned, and of full fine-tuning's.",
    ),
)
