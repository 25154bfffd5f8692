"""What directions.md asserts and shows; the names are the page's own."""

# %% A circle becomes an ellipse
import hands
from pages import picture, shown

picture("directions-1", hands.circle())

# %% A sum of outer products

assert (
    np.allclose(M, hands.example_matrix(), atol=1e-4)
    and np.allclose(S, [2, 0.8], atol=1e-4)
    and np.allclose(sum(terms), M)
)
angle = np.degrees(np.arctan2(Vt[0, 1], Vt[0, 0])) % 180
assert round(angle) == 30

# %% The best approximation

picture("directions-2", hands.nearest_on_a_line())

# %% The word, by its directions

import pictures
from ranks import word

values = np.linalg.svd(word(), compute_uv=False)
left = [np.sum(values[r:] ** 2) / np.sum(values**2) for r in range(8)]
figure = pictures.new_figure(5.2, 2.8)
axes = figure.subplots()
axes.bar(range(1, 10), values, 0.6, color=pictures.LORA)
axes.set(xlabel="number", ylabel="singular value", xticks=range(1, 10))
picture(
    "directions-3",
    pictures.show(
        figure,
        "Nine bars, the singular values of the word's cells. The first is "
        + f"{values[0]:.1f}"
        + ", then they fall, and the last two are zero.",
        "The singular values of the word. The height of a bar is how strongly the matrix passes that direction.",
    ),
)

shown(
    "directions-4",
    pictures.table(
        ["rank", "largest value dropped", "left of the square"],
        [(r, f"{values[r]:.2f}", f"{left[r]:.0%}") for r in range(8)],
    ),
)

import json
import re

assert np.linalg.matrix_rank(word()) == 7 and np.all(values[7:] < 1e-9)
picture = hands.rank_by_outer_products().data
learned = [
    int(n)
    for n in re.findall(
        r"Learned (\d+)%", json.dumps(json.loads(re.search(r'json">(.*?)</script>', picture, re.S)[1])["says"])
    )
]
assert len(learned) == 8 and all(abs(100 - 100 * part - n) <= 2 for part, n in zip(left, learned))
