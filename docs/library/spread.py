"""What spread.md asserts and shows; the names are the page's own."""

# %% Where the directions come from

import numpy as np
import pictures
from pages import picture, recording, shown

model = recording("language-model")["glassllm"]
before, full = model["before"], "the same matrices"
loss = {name: run["losses"][-1] for name, run in model["runs"].items()}
gain = {name: (before - value) / (before - loss[full]) for name, value in loss.items()}
values = {name: {path: np.array(v) for path, v in of.items()} for name, of in model["singular values"].items()}
kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in values[full]))
assert len(values[full]) == 28 and len(kinds) == 7 and 8e5 < model["parameters"] < 9e5

found = recording("laboratory")["directions"]
adam, descent = found["Adam"], found["momentum"]
last = max(adam["steps"], key=int)


def count(of, moment, what, kind):
    return of["steps"][moment][what][kind]["90 %"]


rows = []
for kind in kinds:
    cells = [
        ", ".join(f"{count(adam, moment, what, kind):.0f}" for moment in adam["steps"])
        for what in ("gradient", "step", "change")
    ]
    rows.append((kind, *cells, f"{count(descent, last, 'change', kind):.0f}"))
head = ["", "gradient", "step", "change", "descent"]
shown("spread-1", pictures.table(head, rows))

figure = pictures.new_figure(5.6, 3.6)
axes = figure.subplots()
first, end = adam["steps"]["1"], adam["steps"][last]
curves = {
    "the first gradient": (first["gradient"], pictures.LORA, "-"),
    "Adam's first step": (first["step"], pictures.LORA, "--"),
    "the finished change": (end["change"], pictures.BASE, "-"),
    "by gradient descent": (descent["steps"][last]["change"], pictures.BASE, "--"),
    "a random matrix": (found["random"], pictures.INK, ":"),
}
for name, (of, colour, style) in curves.items():
    share = of["v_proj"]["share"]
    axes.plot(found["powers"][: len(share)], share, style, color=colour, marker="o", markersize=3, label=name)
axes.axhline(0.9, color=pictures.INK, linewidth=0.8, alpha=0.5)
axes.set(xscale="log", xlabel="leading directions", ylabel="their share of the square", ylim=(0, 1.02))
axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
axes.set_xticks([], minor=True)
axes.grid(alpha=0.3)
axes.legend(loc="lower right")
picture(
    "spread-2",
    pictures.show(
        figure,
        "Five curves that rise to one, for v_proj. The first gradient's begins at 0.7 with one direction. That of Adam's first step and those of the "
        "finished changes begin between 0.08 and 0.4, the random matrix's at 0.04.",
        "v_proj, the mean over the four layers: the share of the square in the leading directions.",
    ),
)

assert first["gradient"]["v_proj"]["share"][0] > 0.65 and first["gradient"]["v_proj"]["90 %"] < 7
for kind in kinds:
    gradient, step = count(adam, "1", "gradient", kind), count(adam, "1", "step", kind)
    change, plain, noise = (
        count(adam, last, "change", kind),
        count(descent, last, "change", kind),
        found["random"][kind]["90 %"],
    )
    assert 1.9 * gradient < step < 0.85 * noise  # Adam spreads it, and not to noise
    gradients = [count(adam, moment, "gradient", kind) for moment in adam["steps"]]
    assert gradients == sorted(gradients) and gradients[-1] < change  # later gradients agree less
    assert gradient < plain < change < noise  # and gradient descent ends nearly as spread
assert {round(found["random"][kind]["90 %"]) for kind in kinds} == {43, 66, 91, 92}
assert list(adam["steps"]) == ["1", "101", "300"]
assert np.mean([count(descent, last, "change", k) / count(adam, last, "change", k) for k in kinds]) > 0.85
assert (round(adam["new"], 3), round(descent["new"], 3)) == (2.804, 2.867) and set(found["momentum's rates"]) == {
    "0.03",
    "0.1",
    "0.3",
    "1.0",
}

points = recording("laboratory")["earlier"]["trainings"]


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

# %% New directions

rates = sorted({lr for results in names.values() for lr in results})
cells = [
    (f"{lr:g}", *(results[lr]["intruders"] if lr in results else "–" for results in names.values())) for lr in rates
]
shown("spread-3", pictures.table(["rate", "full", "r = 16", "r = 4", "r = 1"], cells))

assert full[min(full)]["intruders"] == 5 and [lora[r][0.001]["intruders"] for r in (1, 4, 16)] == [18, 55, 96]
assert [results[best(results)]["intruders"] for results in (full, lora[1], lora[4], lora[16])] == [85, 27, 98, 235]
assert (
    max(result["intruders"] for result in lora[1].values()) == 28
    and max(result["intruders"] for result in lora[4].values()) == 111
)
