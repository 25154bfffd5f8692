"""What low-rank.md asserts and shows; the names are the page's own."""

# %% Is a real change of low rank?
import json

import numpy as np
import pictures
from pages import RECORDINGS, picture, shown

model = json.loads((RECORDINGS / "language-model.json").read_text())["glassllm"]
before, full = model["before"], "the same matrices"
loss = {name: run["losses"][-1] for name, run in model["runs"].items()}
gain = {name: (before - value) / (before - loss[full]) for name, value in loss.items()}
values = {name: {path: np.array(v) for path, v in of.items()} for name, of in model["singular values"].items()}
kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in values[full]))
assert len(values[full]) == 28 and len(kinds) == 7 and 8e5 < model["parameters"] < 9e5

# %% A mechanism to repeat

assert shares[8][0] < 0.4 and shares[8][1] < 0.25 and shares[8][2] > 0.93
assert shares[16][2] > 0.97 and 0.6 < shares[16][1] < 0.7

import leading

found = leading.shares(16)
rows = [(kind, width, f"{low:.0%} to {high:.0%}", f"{even:.0%}") for kind, (width, low, high, even) in found.items()]
shown(
    "low-rank-1", pictures.table(["inputs of", "directions", "the strongest 16 hold", "of noise they would hold"], rows)
)

assert all(2.9 * even < low < high < 5.6 * even for _, low, high, even in found.values())

# %% What full training changes

held = np.array([(np.cumsum(v**2) / np.sum(v**2))[:64] for v in values[full].values()])
number = np.arange(1, 65)
figure = pictures.new_figure(5.6, 3.4)
axes = figure.subplots()
axes.fill_between(number, held.min(0), held.max(0), color=pictures.BASE, alpha=0.25, linewidth=0)
axes.plot(number, held.mean(0), color=pictures.BASE, label="full training")
for rank, style in ((4, "--"), (16, "-")):
    of = np.array([np.cumsum(v**2) / np.sum(v**2) for v in values[f"LoRA, r = {rank}"].values()])
    axes.plot(number[:rank], of.mean(0), style, color=pictures.LORA, label=f"LoRA, r = {rank}")
axes.set(xscale="log", xlabel="leading directions", ylabel="their share of the square", ylim=(0, 1.02))
axes.set_xticks([1, 4, 16, 64], [1, 4, 16, 64], minor=False)
axes.set_xticks([], minor=True)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
picture(
    "low-rank-2",
    pictures.show(
        figure,
        "The share of the square in the leading directions. LoRA's curves reach one at rank 4 and 16. That of full training rises slowly: "
        "about a half at 16 directions, and it is not at one even at 64.",
        "How much of a change its strongest directions hold: lines are means over the 28 matrices, the band has all 28 of full training.",
    ),
)

share = {path: np.cumsum(v**2) / np.sum(v**2) for path, v in values[full].items()}
rows = []
for kind in kinds:
    of_kind = np.array([s for path, s in share.items() if path.endswith(kind)])
    need = np.mean([np.searchsorted(s, 0.9) + 1 for s in of_kind])
    rows.append((kind, of_kind.shape[1], *(f"{of_kind[:, r - 1].mean():.0%}" for r in (1, 4, 16)), f"{need:.0f}"))
shown(
    "low-rank-3",
    pictures.table(
        ["matrices", "full rank", "in the first 1", "in the first 4", "in the first 16", "90 % takes"], rows
    ),
)

assert {s.size for s in share.values()} == {64, 128}
assert all(s[0] < 1 / 8 for s in share.values())
assert all(np.searchsorted(s, 0.9) + 1 > 16 and np.searchsorted(s, 0.9) + 1 > len(s) / 4 for s in share.values())
assert all(s[15] < 0.9 for s in share.values()) and np.mean([s[15] for s in share.values()]) < 0.6
assert all(values[name][p][0] > v[0] for name in values if "LoRA" in name for p, v in values[full].items())

# %% Is a change of low rank enough?

cut = {int(rank): value for rank, value in model["cut to rank"].items()}
kept = {rank: (before - value) / (before - loss[full]) for rank, value in cut.items()}
rows = []
for rank, value in cut.items():
    name = f"LoRA, r = {rank}"
    trained = (f"{loss[name]:.3f}", f"{gain[name]:.0%}") if name in loss else ("–", "–")
    rows.append((rank, f"{value:.3f}", f"{kept[rank]:.0%}", *trained))
rows = [("0", f"{before:.3f}", "0%", "–", "–"), *rows[1:], ("all", f"{loss[full]:.3f}", "100%", "–", "–")]
shown(
    "low-rank-4",
    pictures.table(["r", "full training, cut to r", "of the gain", "LoRA trained at r", "of the gain"], rows),
)

one, four, sixteen = (gain[f"LoRA, r = {rank}"] for rank in (1, 4, 16))
assert one > kept[16] > 0.5 and kept[1] < 0.2
assert 0.6 < one < 2 / 3 and four > 0.8 and 0.9 < sixteen < 0.95
assert model["runs"]["LoRA, r = 1"]["parameters"] < model["runs"][full]["parameters"] / 75
assert loss["all weights"] < loss[full] < loss["LoRA, r = 16"]
steps = model["runs"][full]["steps"]
reached = next(n for n, value in zip(steps, model["runs"][full]["losses"]) if value < loss["LoRA, r = 16"])
assert reached == steps[-1] / 2
