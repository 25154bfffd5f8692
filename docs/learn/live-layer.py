"""What live-layer.md asserts and shows; the names are the page's own."""

from math import isclose

from pages import DOCS, live, node, says

# %% Train a layer in your browser

live("live-layer", (DOCS / "_ext" / "live-layer.html").read_text(encoding="utf-8"))

plain = {"rank": 2, "alpha": 4, "rate": 0.03, "truth": "face", "steps": 600}  # how the page begins
full, strong, fast = {"rank": 5}, {"alpha": 16}, {"optimizer": "descent", "rate": 0.3}
found = node("layer.mjs", {"runs": [plain | other for other in ({}, full, strong, fast, fast | strong)]})
rows, columns = found["shape"]
says(f"Its frozen weight $W$ has {rows} by {columns} entries")

# %% What to try

at_two, at_five, stronger, descent, too_far = found["runs"]
assert isclose(at_two["loss"], at_two["least"], rel_tol=1e-3) and at_five["loss"] < 1e-5
assert sum(value > 1e-9 for value in at_two["values"]) == full["rank"]
large = next(rank for rank in range(1, 9) if rank * (rows + columns) > rows * columns)
says(
    f"At rank {plain['rank']} the loss of the face stops at the dashed line",
    f"At rank {full['rank']} all of it is learned. From rank {large} on, $A$ and $B$ have more numbers than "
    f"the {rows * columns} of $D$.",
)
assert isclose(stronger["moved"] / at_two["moved"], 4, rel_tol=1e-3)
assert isclose(stronger["loss"], at_two["least"], rel_tol=1e-3)
assert isclose(descent["loss"], at_two["least"], rel_tol=1e-3) and too_far["loss"] is None  # JSON's word for NaN
says(
    f"With Adam, alpha {strong['alpha']} in place of {plain['alpha']} makes the first step of the weight four times as long",
    f"at a rate of {fast['rate']}, alpha {plain['alpha']} learns as much, and with alpha {strong['alpha']} the loss grows",
)

# %% Five mistakes, and what shows them

names = found["mistakes"]
runs = node("layer.mjs", {"runs": [plain | {"mistakes": [name]} for name in names]})["runs"]
far = {name: isclose(run["loss"], at_two["loss"], rel_tol=1e-3) for name, run in zip(names, runs, strict=True)}
assert len(names) == 5 and [name for name in names if not far[name]] == ["A-zero"]
assert runs[names.index("A-zero")]["moved"] == 0
says(
    "## Five mistakes, and what shows them",
    "With four of the five, the loss falls as far as before. Only *A starts at zero, too* stops it.",
)
