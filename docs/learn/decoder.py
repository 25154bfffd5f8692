"""What decoder.md asserts and shows; the names are the page's own."""

# %% A language model's block
import drawings
from pages import RECORDINGS, picture, shown

picture("decoder-1", drawings.block(drawings.small_model("all-linear")))

# %% What the backward passes through, and where it stops

picture("decoder-2", drawings.way_of_dy())

full, all_seven = (
    sum(drawings.kept(drawings.small_model(drawings.WHERE[way]), np.arange(24).reshape(2, 12)).values())
    for way in ("all weights", "all seven, all blocks")
)
assert 1 < all_seven / full < 1.1

# %% What need not be kept

deep = drawings.small_model("all-linear", 24)
plain, lean = (m.forward(ids)[1] for m in (deep, recomputed(deep)))
assert step_bytes(lean) < step_bytes(plain) / 8
found = [backpropagate(m, ids, ids, cross_entropy) for m in (deep, recomputed(deep))]
assert all(np.array_equal(g, found[1][name]) for name, g in found[0].items())

# %% The names, with a decoder

import rungs

shown("decoder-3", rungs.table("decoder"))

import json

rows = list(json.loads((RECORDINGS / "rungs.json").read_text()).values())
after, people = ([row[key] for row in rows] for key in ("dinosaurs after", "people"))
assert after == sorted(after, reverse=True) and after[0] - after[-1] > 0.4
assert people[0] > max(people[1:]) + 0.15 and max(people[1:]) - min(people[1:]) < 0.03
assert all(row["LoRA numbers"] < row["numbers"] / 3 for row in rows)
assert all(row["dinosaurs after"] < row["dinosaurs before"] - 0.5 for row in rows)
