"""What laboratory.md asserts and shows; the names are the page's own."""

# %% LoRA against full fine-tuning
import json

import numpy as np
import pictures
from pages import RECORDINGS, picture, shown
from recordings import Recordings

laboratory = json.loads((RECORDINGS / "laboratory.json").read_text())
before, points, recordings = laboratory["before"], laboratory["trainings"], Recordings(laboratory)


def curve(way, rank=None, **settings):
    """Return the trainings of one way, by their rates, of those that stayed finite."""
    wanted = {"way": way, "rank": rank, "scaling": 2.0, "batch": 16, "share": 1.0, "seed": 0} | settings
    found = {
        point["run"]["lr"]: point["result"]
        for point in points
        if wanted.items() <= point["run"].items() and point["result"]["new"] is not None
    }
    return dict(sorted(found.items()))


def best(results):
    return min(results, key=lambda lr: results[lr]["new"])


full, lora = curve("full"), {rank: curve("LoRA", rank) for rank in (1, 4, 16)}
names = {"full fine-tuning": full} | {f"LoRA, r = {rank}": lora[rank] for rank in (16, 4, 1)}
looks = dict(zip(names, ((pictures.BASE, "-"), (pictures.LORA, "-"), (pictures.LORA, "--"), (pictures.LORA, ":"))))

# %% The rate

figure = pictures.new_figure(5.6, 3.8)
axes = figure.subplots()
for name, results in names.items():
    colour, style = looks[name]
    losses = [result["new"] for result in results.values()]
    axes.plot(list(results), losses, style, color=colour, marker="o", markersize=3.5, label=name)
axes.axvline(10 * best(full), color=pictures.INK, linewidth=0.8, alpha=0.6)
axes.annotate(
    "ten times the\nbest rate of full", (10 * best(full), 3.2), (4, 0), textcoords="offset points", va="center"
)
axes.axhline(before["new"], color=pictures.INK, linewidth=0.8, linestyle=":", alpha=0.6)
axes.annotate("untouched", (min(full), before["new"]), (0, 3), textcoords="offset points", va="bottom")
axes.set(
    xscale="log",
    xlabel="learning rate of Adam",
    ylabel="held-out loss, nats a token",
    xlim=(None, 0.08),
    ylim=(2.7, 5.7),
)
axes.grid(alpha=0.3)
axes.legend(loc="center left", bbox_to_anchor=(0, 0.62))
picture(
    "laboratory-1",
    pictures.show(
        figure,
        "Four curves of the held-out loss against the learning rate, each with a flat valley. Full fine-tuning's is lowest. LoRA's "
        "are the higher the lower the rank, with the lowest point two to four times further right; at sixteen times "
        "full fine-tuning's best rate, rank 4 is above the untouched model.",
        "The loss after 300 steps against the rate, alpha = 2 r, on all 956 windows. The upright line is ten times the best rate of full fine-tuning.",
    ),
)

figure = pictures.new_figure(5.6, 3.6)
axes = figure.subplots()
bests = {windows: recordings.best("full", windows=windows) for windows in recordings.windows}
ratios, spans = {}, {}
for shift, (rank, style) in enumerate(((16, "-"), (4, "--"), (1, ":"))):
    ratios[rank] = [recordings.best("LoRA", rank, windows=windows) / bests[windows] for windows in recordings.windows]
    spans[rank] = []
    for windows in recordings.windows:
        ours, theirs = recordings.near("LoRA", rank, windows=windows), recordings.near("full", windows=windows)
        spans[rank].append((min(ours) / max(theirs), max(ours) / min(theirs)))
    place = np.array(recordings.windows) * 1.06 ** (shift - 1)
    reach = [[ratio - low, high - ratio] for ratio, (low, high) in zip(ratios[rank], spans[rank])]
    axes.errorbar(
        place,
        ratios[rank],
        np.array(reach).T,
        color=pictures.LORA,
        linestyle=style,
        marker="o",
        markersize=4,
        capsize=4,
        label=f"r = {rank}",
    )
axes.axhline(10, color=pictures.INK, linewidth=0.8, alpha=0.6)
axes.annotate("ten times", (450, 10), (0, 3), textcoords="offset points")
axes.set(
    xscale="log", yscale="log", ylim=(1, 160), xlabel="windows of text", ylabel="LoRA's best rate, times that of full"
)
axes.set_xticks(recordings.windows, recordings.windows)
axes.set_yticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend()
picture(
    "laboratory-2",
    pictures.show(
        figure,
        "Three lines over 60, 239 and 956 windows. Rank 16 lies at two to four times full fine-tuning's best rate, rank 4 and rank 1 "
        "rise to sixteen and thirty-two times in the middle, with long bars there, and come down again.",
        "LoRA's best rate as a multiple of full fine-tuning's. A bar spans what the seeds cannot tell apart.",
    ),
)

say = lambda lr: f"{lr:.7f}".rstrip("0")
rows = [
    (
        windows,
        say(bests[windows]),
        *(f"{say(recordings.best('LoRA', rank, windows=windows))}, × {ratios[rank][i]:g}" for rank in (16, 4, 1)),
    )
    for i, windows in enumerate(recordings.windows)
]
shown("laboratory-3", pictures.table(["windows", "full: best rate", "r = 16", "r = 4", "r = 1"], rows))

everywhere = [ratio for of in ratios.values() for ratio in of]
assert (min(everywhere), max(everywhere)) == (2, 32) and max(ratios[16]) == 4
assert all(one >= four >= sixteen for sixteen, four, one in zip(*ratios.values()))
assert (
    spans[1][1] == (16, 128)
    and spans[4][1] == (4, 128)
    and all(high <= 8 * ratio for rank in ratios for ratio, (low, high) in zip(ratios[rank], spans[rank]))
)
assert lora[4][0.032]["new"] > before["new"] > 3.8 > lora[1][0.032]["new"] and lora[16][0.016]["new"] > 5
lost = {}  # at a multiple of the best rate, of what is gained at the best
for rank in (1, 4, 16):
    for windows in recordings.windows:
        losses = recordings.losses("LoRA", rank, windows=windows)
        rate = recordings.best("LoRA", rank, windows=windows)
        gain = recordings.before["new"] - losses[rate]
        for factor in (1 / 2, 2, 4):
            if rate * factor in losses:
                lost[rank, windows, factor] = (losses[rate * factor] - losses[rate]) / gain
assert sum(factor == 1 / 2 for *_, factor in lost) == sum(factor == 2 for *_, factor in lost) == 9
assert 1 / 8 < max(share for (*_, factor), share in lost.items() if factor in (1 / 2, 2)) < 1 / 6
assert max(lost.values()) == lost[16, 956, 4] > 0.95 and lost[1, 956, 4] < 0.06
assert (
    full[best(full)]["new"]
    < lora[16][best(lora[16])]["new"]
    < lora[4][best(lora[4])]["new"]
    < lora[1][best(lora[1])]["new"]
)
assert 0.009 < recordings.spread < 0.015
for windows in recordings.windows:
    for way, rank in (("full", None), ("LoRA", 16), ("LoRA", 4), ("LoRA", 1)):
        assert len(recordings.seeds(way, rank, windows=windows)[recordings.best(way, rank, windows=windows)]) == 3

# %% The rank and the scaling

scalings = {
    "alpha = 8, scaled by alpha / r": {1: 8.0, 4: 2.0, 16: 0.5},
    "alpha = 4, scaled by alpha / sqrt(r)": {1: 4.0, 4: 2.0, 16: 1.0},
    "alpha = 2 r, scaled by alpha / r": {1: 2.0, 4: 2.0, 16: 2.0},
}
scaled = {name: {r: curve("LoRA", r, scaling=s) for r, s in of.items()} for name, of in scalings.items()}
panels = []
for name, of in scaled.items():
    figure = pictures.new_figure(3.6, 3.2)
    axes = figure.subplots()
    for rank, style in ((16, "-"), (4, "--"), (1, ":")):
        losses = [result["new"] for result in of[rank].values()]
        axes.plot(list(of[rank]), losses, style, color=pictures.LORA, marker="o", markersize=3, label=f"r = {rank}")
        axes.plot(
            best(of[rank]), of[rank][best(of[rank])]["new"], "o", color=pictures.INK, markersize=7, fillstyle="none"
        )
    axes.axvline(10 * best(full), color=pictures.INK, linewidth=0.8, alpha=0.6)
    axes.set(xscale="log", xlabel="learning rate of Adam", ylabel="held-out loss", ylim=(2.7, 5.7), title=name)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    alt = f"Loss against rate, {name}: three flat valleys, the deeper the higher the rank. Ranks 4 and 16 have a steep wall at the largest rate. Circles mark the best."
    panels.append(pictures.show(figure, alt))
picture(
    "laboratory-4",
    pictures.beside(
        panels,
        "The loss against the rate, on the whole text. A circle marks each rank's best rate. The upright line is ten times the best rate of full fine-tuning. At rank 4 the three scalings are equal.",
    ),
)

rows = [
    (name, *(f"{best(of[r]):g}: {of[r][best(of[r])]['new']:.3f}" for r in (1, 4, 16))) for name, of in scaled.items()
]
shown("laboratory-5", pictures.table(["best rate: its loss", "r = 1", "r = 4", "r = 16"], rows))

for of in scaled.values():
    rates = [best(results) for results in of.values()]
    assert max(rates) <= 2 * min(rates)
assert {best(results) for results in scaled["alpha = 4, scaled by alpha / sqrt(r)"].values()} == {0.004}
for rank in (1, 4, 16):
    losses = [of[rank][best(of[rank])]["new"] for of in scaled.values()]
    assert max(losses) - min(losses) < 0.02

falls = {
    windows: recordings.best("LoRA", 1, windows=windows) / recordings.best("LoRA", 16, windows=windows)
    for windows in recordings.windows
}
assert falls == {60: 4, 239: 8, 956: 2}

# %% The batch

sizes = (4, 16, 64)
batched = {
    "full fine-tuning": {size: curve("full", batch=size) for size in sizes},
    "LoRA, r = 16": {size: curve("LoRA", 16, batch=size) for size in sizes},
}
figure = pictures.new_figure(5.6, 3.4)
axes = figure.subplots()
for name, colour in (("full fine-tuning", pictures.BASE), ("LoRA, r = 16", pictures.LORA)):
    least = [of[best(of)]["new"] for of in batched[name].values()]
    axes.plot(sizes, least, color=colour, marker="o", markersize=4, label=name)
    for size, of in batched[name].items():
        axes.annotate(f"{best(of):g}", (size, of[best(of)]["new"]), (0, 6), textcoords="offset points", ha="center")
axes.set(
    xscale="log", xticks=sizes, xticklabels=sizes, xlabel="windows in a batch", ylabel="held-out loss at the best rate"
)
axes.minorticks_off()
axes.grid(alpha=0.3)
axes.legend()
picture(
    "laboratory-6",
    pictures.show(
        figure,
        "Two curves over batches of 4, 16 and 64 windows. LoRA's lies above that of full fine-tuning, and the gap widens with the batch.",
        "The loss after 4,800 windows, at the best of five rates. The rate stands at each point.",
    ),
)

gaps = []
for size in sizes:
    theirs, ours = (of[size] for of in batched.values())
    gaps.append(ours[best(ours)]["new"] - theirs[best(theirs)]["new"])
    for of in (theirs, ours):
        assert min(of) < best(of) < max(of)  # the best rate is not at the grid's edge
assert [round(gap, 2) for gap in gaps] == [0.11, 0.14, 0.17]
smallest, alike = batched["full fine-tuning"][4], (0.0005, 0.001, 0.002)
assert max(smallest[lr]["new"] for lr in alike) - min(smallest[lr]["new"] for lr in alike) < 0.01
for of in batched.values():
    rates = [best(of[size]) for size in sizes]
    assert rates == sorted(rates)

# %% The size of the text

shares = (1 / 16, 1 / 4, 1.0)
counts = [round(share * laboratory["windows"]) for share in shares]
ways = {"full": None, "r = 16": 16, "r = 4": 4, "r = 1": 1}
panels = []


def least(what, rank, share):
    windows = counts[shares.index(share)]
    return min(recordings.losses("LoRA" if rank else "full", rank, windows=windows, what=what).values())


for what, title, alt in (
    (
        "seen",
        "on the text that it trained on",
        "Four rising curves: the higher the rank, the lower the loss; full fine-tuning's is lowest.",
    ),
    (
        "new",
        "on held-out text",
        "Four falling curves in the order of the ranks, full fine-tuning's lowest: close together with 60 windows, far apart with 956.",
    ),
):
    figure = pictures.new_figure(3.6, 3.3)
    axes = figure.subplots()
    for (name, rank), (colour, style) in zip(ways.items(), looks.values(), strict=True):
        losses = [least(what, rank, share) for share in shares]
        axes.plot(counts, losses, style, color=colour, marker="o", markersize=3.5, label=name)
    axes.set(xscale="log", xlabel="windows of text", ylabel="least loss over the rates", title=title)
    axes.grid(alpha=0.3)
    if what == "new":
        axes.legend()
    panels.append(pictures.show(figure, alt))
picture(
    "laboratory-7",
    pictures.beside(
        panels,
        "The least loss of each way over its rates, after 300 steps. Left, how much it learns of its own text by heart; right, what that is worth on text that it has not seen.",
    ),
)

short, middle, whole = shares
assert counts == [60, 239, 956] and [round(4800 / count) for count in counts] == [80, 20, 5]
held_out = {share: [least("new", rank, share) for rank in ways.values()] for share in shares}
assert all(losses == sorted(losses) for losses in held_out.values())  # full fine-tuning, rank 16, 4, 1
apart = [losses[-1] - losses[0] for losses in held_out.values()]
assert apart == sorted(apart)
shown(
    "lengths",
    pictures.table(
        ["windows", "share of full's gain: r = 16", "r = 4", "r = 1", "nats apart"],
        [
            (windows, *(f"{recordings.gain(rank, windows=windows):.0%}" for rank in (16, 4, 1)), f"{nats:.2f}")
            for windows, nats in zip(counts, apart, strict=True)
        ],
    ),
)
results = curve("full", share=short)
assert (
    min(results) < best(results) == 2e-3 / 32
    and results[2e-3]["seen"] < 0.02
    and results[2e-3]["new"] > 5.9 > before["new"]
)
for rank in (1, 4, 16):
    results = curve("LoRA", rank, share=short)
    assert min(results) < best(results) < max(results)
assert least("seen", 16, short) < 0.04 and round(least("seen", 1, short), 1) == 2.3

# %% Forgetting

figure = pictures.new_figure(5.6, 3.8)
axes = figure.subplots()
for name, results in names.items():
    colour, style = looks[name]
    new, old = ([result[which] for result in results.values()] for which in ("new", "old"))
    axes.plot(new, np.array(old) - before["old"], style, color=colour, marker="o", markersize=3.5, label=name)
axes.set(
    xlabel="held-out loss on the new text", ylabel="forgotten of the old, nats a token", xlim=(2.7, 4.1), ylim=(0, 3)
)
axes.grid(alpha=0.3)
axes.legend()
picture(
    "laboratory-8",
    pictures.show(
        figure,
        "Curves of what is forgotten against the loss on the new text, one for each way to train, a point for each rate. "
        "At the same loss on the new text full fine-tuning has forgotten least.",
        "Left is better learned, low is less forgotten. Each curve begins at the lower right, with the smallest rate.",
    ),
)

rows, forgot = [], {}
for windows in recordings.windows:
    forgot[windows] = [recordings.forgotten("full", windows=windows)]
    cells = [f"{forgot[windows][0]:.2f}"]
    for rank in (16, 4, 1):
        own = recordings.forgotten("LoRA", rank, windows=windows)
        loss = min(recordings.losses("LoRA", rank, windows=windows).values())
        of_full = recordings.forgotten_in_full(loss, windows=windows)
        assert of_full.nats < own - 0.15  # it had forgotten less when it was there, on each text, beside each rank
        forgot[windows].append(own)
        cells.append(f"{own:.2f} ({of_full.nats:.2f}{'' if of_full.loss == loss else '*'})")
    rows.append((windows, *cells))
assert forgot[956] == sorted(forgot[956], reverse=True)
assert all(forgot[windows][0] < min(forgot[windows][1:]) - 0.1 for windows in (60, 239))

shown("laboratory-9", pictures.table(["windows: forgotten", "full", "r = 16", "r = 4", "r = 1"], rows))

# %% The variants

kinds, seeds = ("LoRA", "LoRA+", "PiSSA", "DoRA", "DoRA, full gradient"), range(5)
tuned = {}
for kind in kinds:
    lr = best(curve(kind, 4))
    tuned[kind] = lr, np.array([curve(kind, 4, seed=seed)[lr]["new"] for seed in seeds])
T95 = 2.776  # Student's t for a mean of five
half = {kind: T95 * losses.std(ddof=1) / np.sqrt(len(seeds)) for kind, (lr, losses) in tuned.items()}
figure = pictures.new_figure(5.6, 3.2)
axes = figure.subplots()
for place, (kind, (lr, losses)) in enumerate(tuned.items()):
    axes.errorbar(losses.mean(), place, xerr=half[kind], color=pictures.LORA, capsize=4)
    axes.plot(losses, [place] * len(seeds), "o", color=pictures.INK, markersize=4)
axes.set(
    yticks=range(len(kinds)), yticklabels=[f"{kind}, {tuned[kind][0]:g}" for kind in kinds], xlabel="held-out loss"
)
axes.invert_yaxis()
axes.grid(alpha=0.3)
picture(
    "laboratory-10",
    pictures.show(
        figure,
        "Five rows of five dots, a row for a variant. LoRA, LoRA+ and PiSSA lie around 3.24 and overlap; both kinds of DoRA lie around 3.20.",
        "Rank 4, each at its own best rate of four, which stands beside its name. A dot is a seed, a bar the 95 % interval of the mean.",
    ),
)

mean = {kind: losses.mean() for kind, (lr, losses) in tuned.items()}
assert max(abs(mean[kind] - mean["LoRA"]) for kind in ("LoRA+", "PiSSA")) < 0.005 < min(half.values())
for kind in ("DoRA", "DoRA, full gradient"):
    assert mean[kind] + half[kind] < mean["LoRA"] - half["LoRA"] and 0.012 < 1 - mean[kind] / mean["LoRA"] < 0.0145
assert abs(mean["DoRA"] - mean["DoRA, full gradient"]) < min(half["DoRA"], half["DoRA, full gradient"])
assert round(curve("LoRA+", 4)[0.016]["new"] - curve("DoRA", 4)[0.016]["new"], 2) == 0.33
outputs, inputs = (128, 64, 64, 128, 341, 341, 128), (128, 128, 128, 128, 128, 128, 341)
assert round(100 * sum(outputs) / (4 * sum(outputs + inputs))) == 13  # magnitudes, of the numbers of A and B
