"""What decoder.md asserts and shows; the names are the page's own."""

import costs
import drawings
import rungs
from pages import picture, shown

from minilora.language.llama import recomputed
from minilora.language.memory import step_bytes
from minilora.layer import rebuild
from minilora.training import backpropagate

# %% The whole model

assert gradcheck(loss, some, found).passed

# %% How far the gradient goes

picture("way", drawings.way_of_dy())
rows = np.arange(24).reshape(2, 12)
full, all_seven = (
    sum(drawings.kept(drawings.small_model(drawings.WHERE[way]), rows).values())
    for way in ("all weights", "all seven, all blocks")
)
assert 1 < all_seven / full < 1.1

# %% What need not be kept

lines = []
for what, targets in {"LoRA": "all-linear", "all weights": None}.items():
    for blocks in (3, 24):
        deep = drawings.small_model(targets, blocks)
        deep.model.embed_tokens.frozen = True  # it has no product
        seen = rebuild(deep, array=lambda a: a.view(costs.Watched))
        forward, _ = costs.watch(lambda: seen(ids))
        cells = [f"{what}, {blocks} blocks"]
        for way in (seen, recomputed(seen)):
            kept = step_bytes(way.forward(ids)[1]) / 1e3
            step, _ = costs.watch(lambda: backpropagate(way, ids, ids, cross_entropy))
            cells += [f"{kept:,.0f} kB", f"{step / forward:.1f} forwards"]
        lines.append(f"| {' | '.join(cells)} |\n")
shown(
    "forwards", "| | kept | a step costs | recomputed, kept | a step costs |\n|---|--:|--:|--:|--:|\n" + "".join(lines)
)

deep = drawings.small_model("all-linear", 24)
plain, lean = (m.forward(ids)[1] for m in (deep, recomputed(deep)))
assert step_bytes(lean) < step_bytes(plain) / 8
gradients = [backpropagate(m, ids, ids, cross_entropy) for m in (deep, recomputed(deep))]
assert all(np.array_equal(g, gradients[1][name]) for name, g in gradients[0].items())

# %% One task, four networks

shown("rungs", rungs.table("decoder"))
rows = list(rungs.RECORDED.values())
after, people = ([row[key] for row in rows] for key in ("dinosaurs after", "people"))
assert after == sorted(after, reverse=True) and after[0] - after[-1] > 0.4
assert people[0] > max(people[1:]) + 0.15 and max(people[1:]) - min(people[1:]) < 0.03
assert all(row["LoRA numbers"] < row["numbers"] / 3 for row in rows)
assert all(row["dinosaurs after"] < row["dinosaurs before"] - 0.5 for row in rows)
