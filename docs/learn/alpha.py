"""What alpha.md asserts and shows; the names are the page's own."""

import json

import pictures
from pages import RECORDINGS, picture, shown
from recordings import Recordings

# %% Where s enters

assert np.isclose(moved(8, False) / moved(4, False), 4) and np.isclose(moved(8, True) / moved(4, True), 2, rtol=1e-3)

# %% Three rules

assert np.isclose(Adapter(np.ones((16, 6)), np.ones((4, 16)), 4, use_rslora=True).scaling, 1)
assert [LoRA(np.ones((r, 99)), np.ones((99, r)), 2 * r).scaling for r in (4, 16, 64)] == [2, 2, 2]
assert round(1 / np.sqrt(2), 2) == 0.71

# %% Why divide at all?

last = {case: own[-1] for case, own in moves.items()}
assert 0.7 < last[1, "alpha fixed"] < 1.4 and 0.7 < last[512, "over the root"] < 1.4  # what keeps its size
assert 3.5 < last[1, "over the root"] < 5.6 and 0.2 < last[512, "alpha fixed"] < 0.33
assert last[1, "alpha = 2r"] > 12 and 3 < last[512, "alpha = 2r"] < 5
start = LoRA.init(4096, 4, rank=64, alpha=1, rng=np.random.default_rng(0), dtype="float64")
rows = np.random.default_rng(1).standard_normal((200, 4096))
assert abs((rows @ start.lora_A.T).var() - 1 / 3) < 0.01

# %% What each rule does to the best rate

laboratory = json.loads((RECORDINGS / "laboratory.json").read_text())
recordings, ranks = Recordings(laboratory), (1, 4, 16)
assert all(np.isclose(s(4), 2) for s in RULES.values())
found = {
    name: {rank: recordings.losses("LoRA", rank, scaling=float(s(rank))) for rank in ranks} for name, s in RULES.items()
}
best = {name: [min(of[rank], key=of[rank].get) for rank in ranks] for name, of in found.items()}
times = {
    name: [float(s(rank)) * rate for rank, rate in zip(ranks, best[name], strict=True)] for name, s in RULES.items()
}
figure = pictures.new_figure(5.6, 3.1)
left, right = figure.subplots(1, 2)
looks = dict(zip(RULES, ((pictures.LORA, "o-"), (pictures.BASE, "s--"), (pictures.THIRD, "^:")), strict=True))
for name, (colour, style) in looks.items():
    left.plot(ranks, best[name], style, color=colour, label=name, markersize=6)
    right.plot(ranks, times[name], style, color=colour, markersize=6)
for axes, title in ((left, "best rate"), (right, "s times the best rate")):
    axes.set(xscale="log", yscale="log", xlabel="rank", title=title)
    axes.set_xticks(ranks, ranks)
    ticks = (0.002, 0.004, 0.008, 0.016, 0.032)
    axes.set_yticks(ticks, ticks)
    axes.set_ylim(0.0015, 0.05)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
left.legend(loc="upper right", fontsize=10)
says = lambda rates: ", ".join(f"{rate:g}" for rate in rates)
alt = "Two charts over rank 1, 4 and 16. Left, the best rate: " + "; ".join(
    f"{name} {says(best[name])}" for name in RULES
)
alt += ". Right, s times the best rate: the three lines fall together."
picture(
    "rules", pictures.show(figure, alt, "The rate with the least held-out loss, by rank and rule, on the whole text.")
)
rows = [
    (name, *(f"{rate:g}: {found[name][rank][rate]:.2f}" for rank, rate in zip(ranks, best[name], strict=True)))
    for name in RULES
]
shown("rates", pictures.table(["best rate: its loss", *(f"rank {rank}" for rank in ranks)], rows))
assert [own[-1] / own[0] for own in best.values()] == [2, 0.5, 1]
assert all(own[0] > own[-1] for own in times.values())
for i, rank in enumerate(ranks):
    assert max(own[i] for own in times.values()) <= 2 * min(own[i] for own in times.values())
    least = [min(of[rank].values()) for of in found.values()]
    assert max(least) - min(least) < 0.02

# %% From memory

assert round(2 * np.sqrt(8), 1) == 5.7 and np.isclose(2 * np.sqrt(8) / np.sqrt(32), 1)
