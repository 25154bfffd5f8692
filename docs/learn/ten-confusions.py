"""What ten-confusions.md asserts and shows; the names are the page's own."""

# %% 7. Which rank?
import pictures
from pages import picture

figure = pictures.lines(
    {"best possible": (list(ranks), best, pictures.BASE)},
    xlabel="rank of the adapter",
    ylabel="loss",
    yscale="log",
)
figure.axes[0].plot(list(ranks), trained, "o", color=pictures.LORA, label="trained")
figure.axes[0].legend()
picture(
    "ten-confusions-1",
    pictures.show(
        figure,
        "The loss against the adapter's rank from 1 to 8. It falls steeply up to rank 4, the true rank, and is almost level "
        "from there on. The points of the trained adapters lie on the line of the best possible ones.",
        "An elbow at the true rank, 4.",
    ),
)
